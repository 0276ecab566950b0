"""Unlabelled sets: crops of faces without landmarks, for self-training.

prepare() cuts the faces of a folder of photos and writes a set; read() gives it as a FaceList. A
set has images/, unlabelled.txt (an image path per line), sources.csv and set.yaml, like a prepared
set but without landmarks. A detector's box is converted to the nominal crop by a BoxTransform that
is fitted on labelled photos, so the crops are like those of the labelled faces.
"""
from __future__ import annotations

import concurrent.futures
import csv
import dataclasses
import glob
import pathlib
import shutil

import numpy
import tqdm
import yaml

from utils.data.dataset import PreparedSet
from utils.data.face_list import FaceList
from utils.data.photo import IMAGE_SUFFIXES, read_photo, warn_left_out, write_crop
from utils.data.readers.pts import shorten, unique_name, walk
from utils.detection.detector import Detector, get_detector
from utils.errors import UserError, shell_word
from utils.files import read_table, read_text
from utils.landmarks import crop as crops
from utils.machine import available_cores

LIST = "unlabelled.txt"
COLUMNS = ("image", "x_min", "y_min", "x_max", "y_max")
# Largest number of photos on which a BoxTransform is fitted. More change its medians by less than
# 0.5 %.
MAX_FIT = 300
# Shortest side of a box in pixels, and smallest share of it inside the photo.
MIN_SIDE, MIN_INSIDE = 24, 0.8


@dataclasses.dataclass(frozen=True)
class BoxTransform:
    """Conversion of a detector's boxes to nominal crops.

    Both attributes are in sides of the box, which is the square root of its area: it varies less
    with the pose than height or width.

    Attributes:
        shift: (2,) from the centre of the box to that of the crop.
        size: (2,) width and height of the crop.
    """
    shift: numpy.ndarray
    size: numpy.ndarray

    def __call__(self, boxes: numpy.ndarray) -> numpy.ndarray:
        """Convert boxes (..., 4) in pixels to nominal crops (..., 4)."""
        centre, side = _centre_and_side(boxes)
        middle, half = centre + side * self.shift, side * self.size / 2
        return numpy.concatenate([middle - half, middle + half], -1)


def fit_transform(boxes: numpy.ndarray, nominal: numpy.ndarray) -> BoxTransform:
    """Fit the transform from boxes (n, 4) to nominal crops (n, 4) of the same faces, by medians."""
    centre, side = _centre_and_side(boxes)
    nominal = numpy.asarray(nominal, numpy.float64)
    middle = (nominal[:, :2] + nominal[:, 2:]) / 2
    return BoxTransform(numpy.median((middle - centre) / side, 0),
                        numpy.median((nominal[:, 2:] - nominal[:, :2]) / side, 0))


def _centre_and_side(boxes):
    boxes = numpy.asarray(boxes, numpy.float64)
    extent = boxes[..., 2:] - boxes[..., :2]
    return (boxes[..., :2] + boxes[..., 2:]) / 2, extent.prod(-1, keepdims=True) ** 0.5


def read_boxes(path: pathlib.Path | str) -> list[tuple[str, numpy.ndarray]]:
    """Read a table with the columns image,x_min,y_min,x_max,y_max (see files.read_table).

    Returns:
        Image name and box (4,) in pixels of each row.

    Raises:
        UserError: it cannot be read, has no rows, or has a bad row, which is named.
    """
    found = []
    try:
        table = read_table(path, errors="surrogateescape")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as a table of boxes: {error}") from None
    missing = [c for c in COLUMNS if c not in table.columns]
    if missing:
        raise UserError(f"{path}: has no column {missing[0]}; expected {','.join(COLUMNS)}, found "
                        f"{shorten(','.join(table.columns)) if table.columns else 'an empty file'}")
    for line, row in table.rows:
        try:
            box = numpy.array([float(row[c]) for c in COLUMNS[1:]])
        except (TypeError, ValueError):
            box = numpy.full(4, numpy.nan)
        # Comparisons with NaN are false.
        if not (row["image"] and numpy.isfinite(box).all() and (box[2:] > box[:2]).all()):
            raise UserError(f"{path}:{line}: expected an image and a box x_min < x_max, y_min < "
                            f"y_max in pixels, found {','.join(map(str, list(row.values())[:5]))}")
        found.append((row["image"], box))
    if not found:
        raise UserError(f"{path}: has no boxes")
    return found


def prepare(data_dir: pathlib.Path | str, labelled: PreparedSet | pathlib.Path | str,
            boxes: pathlib.Path | str | None = None,
            detector: Detector | pathlib.Path | str = "haar",
            output_dir: pathlib.Path | str | None = None) -> pathlib.Path:
    """Make an unlabelled set of the photos under a folder.

    Args:
        data_dir: the photos.
        labelled: the prepared set that the faces are trained with; its crop, size and margin are
            used, and its photos to fit the BoxTransform.
        boxes: a CSV file of boxes (see read_boxes); None: the detector finds the faces.
        detector: haar, or the path of a detector's .onnx file.
        output_dir: folder of the set; None: <data_dir>-<size>.

    Returns:
        The folder of the set.

    Raises:
        UserError: a folder or file is unusable, or no face could be prepared.
    """
    folder = pathlib.Path(data_dir)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of photos")
    prepared = labelled if isinstance(labelled, PreparedSet) else PreparedSet(labelled)
    if prepared.size is None:
        raise UserError(f"{prepared.folder}: has no set.yaml, so the crop is not known; prepare it "
                        f"with util.DataGenerator")
    detector = get_detector(detector) if isinstance(detector, str | pathlib.Path) else detector
    transform = fit_labelled(detector, prepared)
    if boxes is None:
        jobs = list(_detect(detector, photos_in(folder), folder))
    else:
        jobs = read_boxes(boxes)
        transform = _fit_other_boxes(detector, transform, jobs, folder)
    output = pathlib.Path(output_dir or folder.with_name(f"{folder.name}-{prepared.size}"))
    if output.exists() and any(output.iterdir()):
        if not (output / LIST).is_file():
            raise UserError(f"{output}: exists and is no unlabelled set; give another output_dir "
                            f"or empty it")
        shutil.rmtree(output)
    (output / "images").mkdir(parents=True, exist_ok=True)
    # The empty list marks the folder as a set that may be replaced. It is filled last.
    (output / LIST).touch()
    done, problems = _cut_all(jobs, transform, folder, output, prepared)
    if not done:
        reasons = "; ".join(f"{image}: {reason}" for image, reason in problems[:3])
        raise UserError(f"{folder}: no face could be prepared"
                        + (f" ({reasons})" if reasons else ": the detector found none"))
    _write(output, done, problems, prepared, transform)
    (dx, dy), (width, height) = transform.shift, transform.size
    print(f"box to crop: shift {dx:+.3f}, {dy:+.3f}, size {width:.3f} x {height:.3f}, in units of "
          f"the square root of the box's area")
    print(f"{len(done)} faces without landmarks in {output}"
          + (f"; {len(problems)} boxes left out, see problems.txt" if problems else ""))
    return output


def fit_labelled(detector: Detector, prepared: PreparedSet) -> BoxTransform:
    """Fit the BoxTransform of a detector on the training photos of a prepared set.

    Raises:
        UserError: the set has no training photos, or the detector finds no face in them.
    """
    faces = prepared.lists.get("train")
    if faces is None or faces.photos is None:
        raise UserError(f"{prepared.folder}: needs a train.txt and a sources.csv that names the "
                        f"photos, to fit the crop on")
    chosen = faces.select(_spread(len(faces)))
    pairs, unread = [], None
    for photo, nominal in zip(tqdm.tqdm(chosen.photos, desc="fitting the crop", leave=False),
                              chosen.boxes):
        image = read_photo(photo, prepared.upright) if photo.is_file() else None
        if image is None:
            unread = photo
            continue
        box = detector.box_of_face(detector(image), nominal)
        if box is not None:
            pairs.append((box, nominal))
    return _fit(pairs, f"{detector.name} found no face of the labelled photos of {prepared.folder}"
                + (f" ({unread} cannot be read)" if unread else ""))


def _fit_other_boxes(detector, transform, jobs, folder):
    """Fit boxes of another source to the crops that the detector's `transform` gives."""
    pairs = []
    for i in tqdm.tqdm(_spread(len(jobs)), desc="comparing the boxes", leave=False):
        name, box = jobs[i]
        image = read_photo(folder / name, upright=True)
        found = None if image is None else detector.box_of_face(detector(image), box)
        if found is not None:
            pairs.append((box, transform(found)))
    return _fit(pairs, f"{detector.name} finds no face in the boxes of {folder}: do the boxes "
                       f"belong to these photos?")


def _fit(pairs, problem):
    if not pairs:
        raise UserError(f"{problem}; the crop cannot be fitted, try another detector")
    return fit_transform(*map(numpy.array, zip(*pairs)))


def _spread(count):
    """Indices of at most MAX_FIT of `count` elements, evenly spaced."""
    return numpy.unique(numpy.linspace(0, count - 1, min(count, MAX_FIT)).astype(int))


def photos_in(folder: pathlib.Path) -> list[pathlib.Path]:
    """List the photos under a folder and its subfolders, sorted; a note names what is left out."""
    files = walk(folder)
    warn_left_out(folder, files)
    return [p for p in files if p.suffix.lower() in IMAGE_SUFFIXES]


def _detect(detector, photos, folder):
    for photo in tqdm.tqdm(photos, desc="faces", unit="photo"):
        image = read_photo(photo, upright=True)
        for box in () if image is None else detector(image)[:, :4]:
            yield photo.relative_to(folder).as_posix(), box


def _cut_all(jobs, transform, folder, output, prepared):
    """Write all crops: ([(image name, photo, crop (4,))], [(photo name, problem)])."""
    taken = set()
    names = [unique_name(str(pathlib.PurePosixPath(image).with_suffix("")), taken)
             for image, _ in jobs]

    def cut(job, name):
        return _cut(job, output / "images" / f"{name}.jpg", transform, folder, prepared)

    done, problems = [], []
    with concurrent.futures.ThreadPoolExecutor(available_cores()) as pool:
        results = tqdm.tqdm(pool.map(cut, jobs, names), total=len(jobs), desc="crops", unit="face")
        for (image, _), name, result in zip(jobs, names, results):
            if isinstance(result, str):
                problems.append((image, result))
            else:
                done.append((f"images/{name}.jpg", (folder / image).resolve(), result))
    return done, problems


def _cut(job, path, transform, folder, prepared):
    """Write one crop and return its nominal box (4,), or the reason why it is left out."""
    image, box = read_photo(folder / job[0], upright=True), job[1]
    if image is None:
        return "it cannot be read" if (folder / job[0]).is_file() else "no such file"
    extent = box[2:] - box[:2]
    corner = numpy.array(image.shape[1::-1])
    inside = (box[2:].clip(0, corner) - box[:2].clip(0, corner)).prod() / extent.prod()
    if extent.min() < MIN_SIDE or inside < MIN_INSIDE:
        return (f"the box is {extent[0]:.0f} x {extent[1]:.0f} pixels, {100 * inside:.0f} % of it "
                f"in the photo")
    nominal = transform(box)
    stored = crops.cut(image, crops.grow(nominal, prepared.margin),
                       round(prepared.size * prepared.margin))
    try:
        write_crop(path, stored)
    except OSError:
        raise UserError(f"{path}: cannot be written; is the disk full?") from None
    return nominal


def _write(output, done, problems, prepared, transform):
    with open(output / "sources.csv", "w", newline="", encoding="utf-8",
              errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "photo", *COLUMNS[1:]])
        writer.writerows([image, photo, *(f"{v:.4f}" for v in box)] for image, photo, box in done)
    description = {"size": prepared.size, "margin": prepared.margin, "crop": prepared.crop,
                   "shift": transform.shift.tolist(), "box_to_crop": transform.size.tolist()}
    (output / "set.yaml").write_text(yaml.safe_dump(description, sort_keys=False,
                                                    default_flow_style=None), encoding="utf-8")
    if problems:
        text = "".join(f"{image}: {reason}\n" for image, reason in problems)
        (output / "problems.txt").write_text(text, encoding="utf-8", errors="replace")
    (output / LIST).write_text("".join(f"{d[0]}\n" for d in done), encoding="utf-8")


def check(data_dir: str) -> None:
    """Raise UserError if the setting `unlabelled_dir` names no unlabelled set.

    It is called before the labelled set is read, so a set of any size counts.
    """
    folder = pathlib.Path(data_dir)
    if data_dir == "none" or not any((found / LIST).is_file() for found in (
            folder, *folder.parent.glob(f"{glob.escape(folder.name)}-*"))):
        raise _missing(data_dir, "LABELLED")


def _missing(data_dir, labelled):
    # "none" means that the setting was not given.
    problem = ("--gssl needs --unlabelled-dir, the faces to train on without labels"
               if data_dir == "none" else f"{data_dir}: no unlabelled set (no {LIST})")
    return UserError(
        f"{problem}. Make one with: python -m utils.data.generator PHOTOS --labelled "
        f"{shell_word(labelled)} --boxes BOXES.csv")


def read(data_dir: pathlib.Path | str, prepared: PreparedSet) -> FaceList:
    """Read an unlabelled set as a FaceList for training beside a prepared set.

    Args:
        data_dir: the set, or the folder of photos beside it: then <data_dir>-<size> is read.
        prepared: the labelled set.

    Returns:
        The faces; their points are NaN (N, K, 2), because none is known.

    Raises:
        UserError: there is no set, or its crop is not that of `prepared`.
    """
    folder = pathlib.Path(data_dir)
    if not (folder / LIST).is_file() and prepared.size:
        folder = folder.with_name(f"{folder.name}-{prepared.size}")
    if data_dir == "none" or not (folder / LIST).is_file():
        raise _missing(data_dir, prepared.folder)
    try:
        names = read_text(folder / LIST).splitlines()
        description = yaml.safe_load(read_text(folder / "set.yaml"))
        same = (float(description["margin"]) == prepared.margin
                and description["crop"] == prepared.crop)
    except (OSError, UnicodeDecodeError, KeyError, TypeError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{folder}: is a damaged unlabelled set: {' '.join(str(error).split())}; "
                        f"prepare it again") from None
    if not same:
        raise UserError(f"{folder}: has crops {description['crop']} with margin "
                        f"{description['margin']}, {prepared.folder} has {prepared.crop} with "
                        f"{prepared.margin}; prepare it again with --labelled "
                        f"{shell_word(prepared.folder)}")
    names = [name for name in names if name.strip()]
    if not names:
        raise UserError(f"{folder / LIST}: the list is empty")
    unit = numpy.tile(numpy.array([0.0, 0, 1, 1]), (len(names), 1))
    points = numpy.full((len(names), prepared.scheme.points, 2), numpy.nan)
    return FaceList([folder / name for name in names], points, unit, unit.copy(), None)
