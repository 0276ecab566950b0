"""Reader of AFLW with 19 points: flickr/ holds the images, AFLWinfo_release.mat the annotations."""
from __future__ import annotations

import collections
import os
import pathlib

import numpy

from utils.data.readers.face import Face
from utils.data.readers.pts import shorten, unique_name
from utils.errors import UserError

NAME = "AFLW"
SCHEME = "AFLW"
LAYOUT = "flickr/ and AFLWinfo_release.mat"
EXPECTED = {"train": 20000, "test": 4386}
CROP = {"rule": "box", "scale": 1.0}
_FILE = "AFLWinfo_release.mat"
_POINTS = 19


def matches(folder: pathlib.Path) -> bool:
    """Return True if the folder holds the .mat file of AFLW."""
    return (folder / _FILE).is_file()


def read(folder: pathlib.Path, problems: list) -> list[Face]:
    """Read all faces, 19 points and a box each, in the authors' order.

    A face with a coordinate that is not a finite number goes to `problems`. A negative coordinate
    lies outside the photo and is kept.

    Raises:
        UserError: the image folder is absent, or the file or one of its fields cannot be read.
    """
    path, images = folder / _FILE, folder / "flickr"
    if not images.is_dir():
        raise UserError(f"{images}: no such folder; the images of AFLW are expected there")
    names, boxes, data, order = _load(path)
    faces, taken, count, number = [], set(), collections.Counter(), []
    for name in names:
        count[name] += 1
        number.append(count[name])
    for position, index in enumerate(order):
        name, where = names[index], f"face {index + 1} ({shorten(names[index])})"
        # 19 x, then 19 y; x_min x_max y_min y_max; MATLAB counts pixels from 1.
        values = data[index]
        box = boxes[index][[0, 2, 1, 3]] - 1
        if not numpy.isfinite(values).all():
            problems.append((path, f"{where}: a landmark is absent (no number)"))
        elif not (numpy.isfinite(box).all() and (box[2:] > box[:2]).all()):
            problems.append((path, f"{where}: no x_min x_max y_min y_max: {boxes[index].tolist()}"))
        elif not os.path.isfile(images / name):
            problems.append((images / name, f"no such image; {where} of {_FILE} needs it"))
        else:
            split = "train" if position < EXPECTED["train"] else "test"
            stem = pathlib.PurePosixPath(name).with_suffix("")
            faces.append(Face(images / name, values.reshape(2, _POINTS).T - 1, (split,), split,
                              name, unique_name(f"{stem}-{number[index]}", taken), box))
    return faces


def _load(path: pathlib.Path):
    """Return image names [n], boxes (n, 4), coordinates (n, 38) and 0-based face order (n,)."""
    import scipy.io
    fields = ("nameList", "bbox", "data", "ra")
    try:
        file = scipy.io.loadmat(path, variable_names=fields)
    except Exception as error:  # noqa: BLE001 - scipy raises many types for damaged files
        raise UserError(f"{path}: no readable .mat file older than MATLAB 7.3: "
                        f"{error or type(error).__name__}") from None
    for field in fields:
        if field not in file:
            raise UserError(f"{path}: no field {field}; expected: {', '.join(fields)}")
    names = [_text(entry) for entry in file["nameList"].ravel()]
    tables = []
    for field, columns in (("bbox", 4), ("data", 2 * _POINTS), ("ra", None)):
        try:
            table = numpy.asarray(file[field], numpy.float64)
        except (TypeError, ValueError):
            raise UserError(f"{path}: {field} does not hold numbers") from None
        table = table.ravel() if columns is None else table
        if table.shape != ((len(names),) if columns is None else (len(names), columns)):
            raise UserError(f"{path}: {field} is {table.shape}; nameList has {len(names)} names")
        tables.append(table)
    boxes, data, order = tables
    if sorted(order) != list(range(1, len(names) + 1)):
        raise UserError(f"{path}: ra is no permutation of 1..{len(names)}")
    return names, boxes, data, order.astype(int) - 1


def _text(entry) -> str:
    """Return the string in a cell of a MATLAB cell array."""
    while isinstance(entry, numpy.ndarray) and entry.size:
        entry = entry.ravel()[0]
    return str(entry)
