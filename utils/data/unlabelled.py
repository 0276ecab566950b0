"""Photos without landmarks to an unlabelled set for self-training, and back to a list of faces.

An unlabelled set is a folder with images/, `unlabelled.txt` (an image path a line), `sources.csv`
and `set.yaml`, as a prepared set has them, but without coordinates. A face box becomes the training
crop by a rule fitted on labelled photos, so that both kinds of crops look alike.
"""
import concurrent.futures
import csv
import dataclasses
import glob
import os
import pathlib
import shutil

import numpy
import tqdm
import yaml

from utils.data.dataset import FaceList, PreparedSet
from utils.data.photo import IMAGE_SUFFIXES, read_photo, write_crop
from utils.data.readers.pts import unique_name, walk
from utils.detection.detector import get_detector
from utils.errors import UserError
from utils.landmarks import crop as crops

LIST = "unlabelled.txt"
COLUMNS = ("image", "x_min", "y_min", "x_max", "y_max")
# Photos on which a rule is fitted; its medians do not move by 0.5 % beyond this many.
FITTED = 300
# A box smaller than this many pixels, or with less than this share of it in the photo, is left out.
SMALLEST, INSIDE = 24, 0.8


@dataclasses.dataclass(frozen=True)
class BoxRule:
    """How a detector's box becomes the nominal crop.

    shift (2,): of the crop's centre from the box's; size (2,): the crop's width and height. Both in
    the box's side, the square root of its area (it varies less than height or width with the pose).
    """
    shift: numpy.ndarray
    size: numpy.ndarray

    def __call__(self, boxes):
        """Boxes (..., 4) in pixels to nominal crops (..., 4)."""
        centre, side = _centre_and_side(boxes)
        middle, half = centre + side * self.shift, side * self.size / 2
        return numpy.concatenate([middle - half, middle + half], -1)


def fit_rule(boxes, nominal):
    """The BoxRule from boxes (n, 4) to nominal crops (n, 4) of the same faces, by medians."""
    centre, side = _centre_and_side(boxes)
    nominal = numpy.asarray(nominal, numpy.float64)
    middle = (nominal[:, :2] + nominal[:, 2:]) / 2
    return BoxRule(numpy.median((middle - centre) / side, 0),
                   numpy.median((nominal[:, 2:] - nominal[:, :2]) / side, 0))


def _centre_and_side(boxes):
    boxes = numpy.asarray(boxes, numpy.float64)
    extent = boxes[..., 2:] - boxes[..., :2]
    return (boxes[..., :2] + boxes[..., 2:]) / 2, extent.prod(-1, keepdims=True) ** 0.5


def read_boxes(path):
    """[(image name, box (4,))] from a CSV of `image,x_min,y_min,x_max,y_max`. Raises UserError."""
    found = []
    try:
        with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
            reader = csv.DictReader(file)
            missing = [c for c in COLUMNS if c not in (reader.fieldnames or ())]
            if missing:
                found_columns = ",".join(reader.fieldnames or ()) or "an empty file"
                raise UserError(f"{path}: has no column {missing[0]}; expected "
                                f"{','.join(COLUMNS)}, found {found_columns}")
            for row in reader:
                where = f"{path}:{reader.line_num}"
                try:
                    box = numpy.array([float(row[c]) for c in COLUMNS[1:]])
                except (TypeError, ValueError):
                    box = numpy.full(4, numpy.nan)
                # Comparisons with NaN are false, so it is refused too.
                if not (row["image"] and numpy.isfinite(box).all()
                        and (box[2:] > box[:2]).all()):
                    raise UserError(
                        f"{where}: expected an image and a box x_min < x_max, y_min < y_max in "
                        f"pixels, found {','.join(map(str, list(row.values())[:5]))}")
                found.append((row["image"], box))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as a table of boxes: {error}") from None
    if not found:
        raise UserError(f"{path}: has no box in it")
    return found


def prepare(data_dir, labelled, boxes=None, detector="haar", output_dir=None):
    """Make an unlabelled set of the photos under data_dir; returns its folder.

    labelled: the prepared set (or its folder) that the faces are to be trained with; crop, size and
    margin are its. boxes: a CSV, else `detector` (haar, or an .onnx) finds the faces. The rule from
    box to crop is fitted with the detector on the labelled photos. Raises UserError.
    """
    folder = pathlib.Path(data_dir)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of photos")
    prepared = labelled if isinstance(labelled, PreparedSet) else PreparedSet(labelled)
    if prepared.size is None:
        raise UserError(f"{prepared.folder}: has no set.yaml, so the crop is not known; prepare it "
                        f"with util.DataGenerator")
    detector = get_detector(detector) if isinstance(detector, str | pathlib.Path) else detector
    rule = labelled_rule(detector, prepared)
    if boxes is None:
        jobs = list(_detect(detector, photos_in(folder), folder))
    else:
        jobs = read_boxes(boxes)
        rule = _rule_of_other_boxes(detector, rule, jobs, folder)
    output = pathlib.Path(output_dir or folder.with_name(f"{folder.name}-{prepared.size}"))
    if output.exists() and any(output.iterdir()):
        if not (output / LIST).is_file():
            raise UserError(f"{output}: exists and is no unlabelled set; give another output_dir "
                            f"or empty it")
        shutil.rmtree(output)
    (output / "images").mkdir(parents=True, exist_ok=True)
    # It marks the folder as ours, and is filled last: one that was interrupted is made again.
    (output / LIST).touch()
    done, problems = _cut_all(jobs, rule, folder, output, prepared)
    if not done:
        reasons = "; ".join(f"{image}: {reason}" for image, reason in problems[:3])
        raise UserError(f"{folder}: no face could be prepared"
                        + (f" ({reasons})" if reasons else ": the detector found none"))
    _write(output, done, problems, prepared, rule)
    print(f"box to crop: centre moved by {rule.shift[0]:+.3f}, {rule.shift[1]:+.3f}, size "
          f"{rule.size[0]:.3f} x {rule.size[1]:.3f}, in the root of the box's area")
    print(f"{len(done)} faces without landmarks in {output}"
          + (f"; {len(problems)} boxes left out, see problems.txt" if problems else ""))
    return output


def labelled_rule(detector, prepared):
    """The BoxRule of a Detector, fitted on the photos of a PreparedSet. Raises UserError."""
    faces = prepared.lists.get("train")
    if faces is None or faces.photos is None:
        raise UserError(f"{prepared.folder}: needs a train.txt and a sources.csv that names the "
                        f"photos, to fit the crop on")
    wanted = faces.take(_spread(len(faces)))
    pairs, unread = [], None
    for photo, nominal in zip(tqdm.tqdm(wanted.photos, desc="fitting the crop", leave=False),
                              wanted.boxes):
        image = read_photo(photo, prepared.upright) if photo.is_file() else None
        if image is None:
            unread = photo
            continue
        box = detector.same_face(detector(image), nominal)
        if box is not None:
            pairs.append((box, nominal))
    return _fit(pairs, f"{detector.name} found no face of the labelled photos of {prepared.folder}"
                + (f" ({unread} cannot be read)" if unread else ""))


def _rule_of_other_boxes(detector, rule, jobs, folder):
    """The rule for boxes of unknown make: what `rule` says of the detector's box of those faces."""
    pairs = []
    for i in tqdm.tqdm(_spread(len(jobs)), desc="comparing the boxes", leave=False):
        name, box = jobs[i]
        image = read_photo(folder / name, upright=True)
        found = None if image is None else detector.same_face(detector(image), box)
        if found is not None:
            pairs.append((box, rule(found)))
    return _fit(pairs, f"{detector.name} finds no face in the boxes of {folder}: do the boxes "
                       f"belong to these photos?")


def _fit(pairs, nothing):
    if not pairs:
        raise UserError(f"{nothing}; the crop cannot be fitted, try another detector")
    return fit_rule(*map(numpy.array, zip(*pairs)))


def _spread(count):
    return numpy.unique(numpy.linspace(0, count - 1, min(count, FITTED)).astype(int))


def photos_in(folder):
    """The photos (pathlib.Path) anywhere under a folder, sorted."""
    return [p for p in walk(folder) if p.suffix.lower() in IMAGE_SUFFIXES]


def _detect(detector, photos, folder):
    for photo in tqdm.tqdm(photos, desc="faces", unit="photo"):
        image = read_photo(photo, upright=True)
        for box in () if image is None else detector(image)[:, :4]:
            yield photo.relative_to(folder).as_posix(), box


def _cut_all(jobs, rule, folder, output, prepared):
    """([(image name, photo, crop (4,))], [(photo name, reason)]), in the order of jobs."""
    taken = set()
    names = [unique_name(str(pathlib.PurePosixPath(image).with_suffix("")), taken)
             for image, _ in jobs]

    def cut(job, name):
        return _cut(job, output / "images" / f"{name}.jpg", rule, folder, prepared)

    done, problems = [], []
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        results = tqdm.tqdm(pool.map(cut, jobs, names), total=len(jobs), desc="crops", unit="face")
        for (image, _), name, result in zip(jobs, names, results):
            if isinstance(result, str):
                problems.append((image, result))
            else:
                done.append((f"images/{name}.jpg", (folder / image).resolve(), result))
    return done, problems


def _cut(job, path, rule, folder, prepared):
    """Write one crop; its nominal box (4,), or the reason why not."""
    image, box = read_photo(folder / job[0], upright=True), job[1]
    if image is None:
        return "it cannot be read" if (folder / job[0]).is_file() else "no such file"
    extent = box[2:] - box[:2]
    corner = numpy.array(image.shape[1::-1])
    shown = (box[2:].clip(0, corner) - box[:2].clip(0, corner)).prod() / extent.prod()
    if extent.min() < SMALLEST or shown < INSIDE:
        return (f"the box is {extent[0]:.0f} x {extent[1]:.0f} pixels, {100 * shown:.0f} % of it "
                f"in the photo")
    nominal = rule(box)
    stored = crops.cut(image, crops.grow(nominal, prepared.margin),
                       round(prepared.size * prepared.margin))
    try:
        write_crop(path, stored)
    except OSError:
        raise UserError(f"{path}: cannot be written; is the disk full?") from None
    return nominal


def _write(output, done, problems, prepared, rule):
    with open(output / "sources.csv", "w", newline="", encoding="utf-8",
              errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "photo", *COLUMNS[1:]])
        writer.writerows([image, photo, *(f"{v:.4f}" for v in box)] for image, photo, box in done)
    description = {"size": prepared.size, "margin": prepared.margin, "crop": prepared.crop,
                   "shift": rule.shift.tolist(), "box_to_crop": rule.size.tolist()}
    (output / "set.yaml").write_text(yaml.safe_dump(description, sort_keys=False,
                                                    default_flow_style=None), encoding="utf-8")
    if problems:
        text = "".join(f"{image}: {reason}\n" for image, reason in problems)
        (output / "problems.txt").write_text(text, encoding="utf-8", errors="replace")
    (output / LIST).write_text("".join(f"{d[0]}\n" for d in done), encoding="utf-8")


def check(data_dir):
    """Raises UserError where there cannot be an unlabelled set, whatever the labelled one is."""
    folder = pathlib.Path(data_dir)
    if data_dir == "none" or not any((found / LIST).is_file() for found in (
            folder, *folder.parent.glob(f"{glob.escape(folder.name)}-*"))):
        raise _missing(data_dir, "LABELLED")


def _missing(data_dir, labelled):
    # "none" is the setting's way to say that it was not given.
    what = ("--gssl needs --unlabelled-dir, the faces to train on without labels"
            if data_dir == "none" else f"{data_dir}: no unlabelled set (no {LIST})")
    return UserError(
        f"{what}. Make one with: python -c 'from utils import util; util.DataGenerator("
        f"\"PHOTOS\", labelled=\"{labelled}\", boxes=\"BOXES.csv\").run()'")


def read(data_dir, prepared):
    """The faces of an unlabelled set as a FaceList for training beside a PreparedSet.

    data_dir: the set, or the folder of photos it lies beside (as <data_dir>-<size>). The points are
    NaN (N, K, 2): none is known. Raises UserError where there is no set, or one of another crop.
    """
    folder = pathlib.Path(data_dir)
    if not (folder / LIST).is_file() and prepared.size:
        folder = folder.with_name(f"{folder.name}-{prepared.size}")
    if data_dir == "none" or not (folder / LIST).is_file():
        raise _missing(data_dir, prepared.folder)
    try:
        names = (folder / LIST).read_text(encoding="utf-8").splitlines()
        description = yaml.safe_load((folder / "set.yaml").read_text(encoding="utf-8"))
        same = (float(description["margin"]) == prepared.margin
                and description["crop"] == prepared.crop)
    except (OSError, UnicodeDecodeError, KeyError, TypeError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{folder}: is a damaged unlabelled set: {' '.join(str(error).split())}; "
                        f"prepare it again") from None
    if not same:
        raise UserError(f"{folder}: has crops {description['crop']} with margin "
                        f"{description['margin']}, {prepared.folder} has {prepared.crop} with "
                        f"{prepared.margin}; prepare it again with labelled=\"{prepared.folder}\"")
    names = [name for name in names if name.strip()]
    if not names:
        raise UserError(f"{folder / LIST}: the list is empty")
    unit = numpy.tile(numpy.array([0.0, 0, 1, 1]), (len(names), 1))
    points = numpy.full((len(names), prepared.scheme.points, 2), numpy.nan)
    return FaceList([folder / name for name in names], points, unit, unit.copy(), None)
