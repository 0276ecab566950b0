"""Reader of COFW: COFW_{train,test}_color.mat with images, 29 points and boxes inside."""
from __future__ import annotations

import functools
import pathlib

import numpy

from utils.data.readers.face import Face
from utils.errors import UserError

NAME = "COFW"
SCHEME = "COFW"
LAYOUT = "COFW_train_color.mat or COFW_test_color.mat"
EXPECTED = {"train": 1345, "test": 507}
CROP = {"rule": "box", "scale": 1.0}
_FILES = {"train": "COFW_train_color.mat", "test": "COFW_test_color.mat"}
# Names of images, landmarks and boxes in each file.
_FIELDS = {"train": ("IsTr", "phisTr", "bboxesTr"), "test": ("IsT", "phisT", "bboxesT")}
_POINTS = 29


def matches(folder: pathlib.Path) -> bool:
    """Return True if the folder holds a .mat file of COFW."""
    return any((folder / file).is_file() for file in _FILES.values())


def read(folder: pathlib.Path, problems: list) -> list[Face]:
    """Read all faces, 29 points and a box each; bad ones go to `problems`.

    `Face.photo` is the .mat file; image_of decodes the image of a face when it is needed.

    Raises:
        UserError: a file or one of its fields cannot be read.
    """
    faces = []
    for split, file in _FILES.items():
        path = folder / file
        if not path.is_file():
            problems.append((path, f"note: no such file, so there are no {split} faces"))
            continue
        _, phis_field, box_field = _FIELDS[split]
        phis, boxes, count = _read_tables(path, split)
        for field, table in ((phis_field, phis), (box_field, boxes)):
            if len(table) != count:
                raise UserError(f"{path}: {field} has {len(table)} rows for {count} images")
        for index in range(count):
            # 29 x, 29 y, 29 occlusion flags; MATLAB counts pixels from 1.
            points = phis[index, :2 * _POINTS].reshape(2, _POINTS).T - 1
            x, y, width, height = boxes[index]
            box = numpy.array([x - 1, y - 1, x - 1 + width, y - 1 + height])
            if not numpy.isfinite(points).all():
                problems.append((path, f"{phis_field}, face {index + 1}: a point is not finite"))
            elif not (numpy.isfinite(box).all() and width > 0 and height > 0):
                problems.append((path, f"{box_field}, face {index + 1}: no x y width height: "
                                 + str(boxes[index].tolist())))
            else:
                name = f"cofw_{split}_{index}"
                faces.append(Face(path, points, (split,), split, name, name, box,
                                  hidden=phis[index, 2 * _POINTS:] > 0.5))
    return faces


def image_of(face: Face) -> numpy.ndarray:
    """Return the image of a face from `read`, RGB uint8 (H, W, 3).

    Raises:
        UserError: the image cannot be read from the .mat file.
    """
    field = _FIELDS[face.subset][0]
    index = int(face.name.rsplit("_", 1)[1])
    if _is_hdf5(face.photo):
        import h5py
        try:
            with h5py.File(face.photo) as file:
                # MATLAB stores arrays in HDF5 with the axes reversed.
                image = file[file[field][()].ravel()[index]][()].T
        except (OSError, KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise UserError(f"{face.photo}: image {index + 1} of {field} cannot be read: "
                            f"{error}") from None
    else:
        image = _images_before_73(face.photo, field)[index]
    image = numpy.asarray(image)
    if image.dtype != numpy.uint8 or image.ndim not in (2, 3) or image.size == 0 \
            or image.ndim == 3 and image.shape[2] != 3:
        raise UserError(f"{face.photo}: image {index + 1} of {field} is {image.dtype} "
                        f"{image.shape}; uint8 (H, W) or (H, W, 3) expected")
    if image.ndim == 2:
        image = numpy.repeat(image[:, :, None], 3, axis=2)
    return numpy.ascontiguousarray(image)


def _is_hdf5(path: pathlib.Path) -> bool:
    import h5py
    return bool(h5py.is_hdf5(path))


def _read_tables(path: pathlib.Path, split: str) -> tuple[numpy.ndarray, numpy.ndarray, int]:
    """Return landmark rows (n, 87), boxes (n, 4) and the number of images of a .mat file."""
    images, phis, boxes = _FIELDS[split]
    if _is_hdf5(path):
        import h5py
        try:
            with h5py.File(path) as file:
                _require(path, file, (images, phis, boxes))
                count = file[images].size
                phis, boxes = (file[field][()].T for field in (phis, boxes))
        except (OSError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise UserError(f"{path}: damaged MATLAB 7.3 file: {error}") from None
    else:
        # The images are not loaded here, to save memory.
        file, shapes = _load_before_73(path, (phis, boxes))
        _require(path, shapes, (images, phis, boxes))
        phis, boxes, count = file[phis], file[boxes], int(numpy.prod(shapes[images]))
    return _table(path, _FIELDS[split][1], phis, 3 * _POINTS), \
        _table(path, _FIELDS[split][2], boxes, 4), count


def _table(path: pathlib.Path, field: str, values, columns: int) -> numpy.ndarray:
    """Return the numbers of a field as float64 (n, columns), transposed if needed."""
    try:
        values = numpy.asarray(values, numpy.float64)
    except (TypeError, ValueError):
        raise UserError(f"{path}: {field} does not hold numbers") from None
    if values.ndim == 2 and values.shape[1] != columns and values.shape[0] == columns:
        values = values.T
    if values.ndim != 2 or values.shape[1] != columns:
        raise UserError(f"{path}: {field} is {values.shape}; (faces, {columns}) expected")
    return values


def _require(path: pathlib.Path, file, fields) -> None:
    missing = [field for field in fields if field not in file]
    if missing:
        found = ", ".join(sorted(key for key in file if not key.startswith(("_", "#"))))
        raise UserError(f"{path}: no field {missing[0]}; found: {found or 'none'}")


def _load_before_73(path: pathlib.Path, fields):
    """Load variables of a MATLAB file older than 7.3; return them and the shape of each by name."""
    import scipy.io
    try:
        shapes = {name: shape for name, shape, _ in scipy.io.whosmat(path)}
        return scipy.io.loadmat(path, variable_names=fields), shapes
    except Exception as error:  # noqa: BLE001 - scipy raises many types for damaged files
        raise UserError(f"{path}: no readable .mat file: {error or type(error).__name__}") from None


@functools.lru_cache(maxsize=1)
def _images_before_73(path: pathlib.Path, field: str):
    # The format has no random access, so each process loads all images once.
    file, _ = _load_before_73(path, (field,))
    return file[field].ravel()
