"""Faces whose eyes are known to be shut or open, without landmarks, to training faces.

A folder holds photos in closed/ and open/. A teacher lays the landmarks; of shut eyes it knows too
little, so their lids are moved to where they meet.
"""
import csv
import os
import pathlib
import shutil

import tqdm

from utils import predictor as predictors
from utils.data.dataset import PreparedSet
from utils.data.photo import read_photo, write_crop
from utils.data.readers.pts import unique_name
from utils.errors import UserError
from utils.landmarks import crop as crops
from utils.landmarks import lids, metrics, schemes
from utils.video.detector import get_detector
from utils.video.sources import IMAGES
from utils.video.tracker import refine

STATES = ("closed", "open")
# A label is left out where the teacher's landmarks of the mirrored photo lie further off, as NME:
# on faces of 300W it is at 0.01 to 0.03, above this limit on the wrong one or on none.
DOUBT = 0.1
# How often a shut face is listed: they are few, and each is one kind of shut eye.
REPEAT = 2


def list_photos(folder, names="none"):
    """[(path, closed)] of the photos in folder/closed and folder/open.

    names: none for all, or LIST or LIST:PART or LIST:PART,PART: a file with lines `closed/0001.jpg`
    or `closed/0001.jpg part`, of which those of the parts are taken. Raises UserError.
    """
    folder = pathlib.Path(folder)
    missing = [state for state in STATES if not (folder / state).is_dir()]
    if missing:
        raise UserError(f"{folder}: has no folder {missing[0]}; photos of faces with shut eyes are "
                        f"expected in closed/, with open eyes in open/")
    if names == "none":
        found = [path for state in STATES for path in sorted((folder / state).iterdir())
                 if path.suffix.lower() in IMAGES]
    else:
        found = [folder / name for name in _read_names(names)]
    for state in STATES:
        if not any(path.parent.name == state for path in found):
            raise UserError(f"{folder}: no photo in {state}/"
                            + (f" is named by {names}" if names != "none" else ""))
    absent = [path for path in found if not path.is_file()]
    if absent:
        raise UserError(f"{absent[0]}: no such photo, though {names} names it")
    return [(path, path.parent.name == "closed") for path in found]


def _read_names(names):
    path, _, wanted = str(names).partition(":")
    wanted = [part for part in wanted.split(",") if part]
    try:
        lines = pathlib.Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"names {path}: cannot be read: {error}") from None
    rows = [(number, line.split()) for number, line in enumerate(lines, 1) if line.strip()]
    for number, row in rows:
        place = row[0].split("/")
        if len(row) > 2 or len(place) != 2 or place[0] not in STATES:
            raise UserError(f"{path}:{number}: expected closed/NAME or open/NAME and perhaps a "
                            f"part, found {' '.join(row)[:60]!r}")
    parts = {row[1] for _, row in rows if len(row) == 2}
    for part in wanted:
        if part not in parts:
            raise UserError(f"names {path}: has no part {part}; there is "
                            f"{', '.join(sorted(parts)) or 'none'}")
    return [row[0] for _, row in rows if not wanted or row[1:] and row[1] in wanted]


def prepare(folder, labelled, teacher, detector="haar", names="none", output_dir=None):
    """A copy of a prepared set with the faces of folder in its training list; returns its folder.

    labelled: the prepared set (its folder). teacher: weights of its points, .pt or .onnx. detector:
    haar or an .onnx. names: see list_photos. Raises UserError.
    """
    prepared, photos = PreparedSet(labelled), list_photos(folder, names)
    if prepared.size is None:
        raise UserError(f"{prepared.folder}: has no set.yaml, so the crop is not known; prepare it "
                        f"with util.DataGenerator")
    teacher = predictors.Predictor(teacher)
    if not schemes.fits(prepared.scheme, teacher.scheme) or prepared.scheme.base is not None:
        raise UserError(f"teacher {teacher.path}: has the {teacher.scheme.name} scheme, the set "
                        f"{prepared.scheme.name}; the teacher lays all points of the set")
    lids.aspect_ratios(prepared.scheme.mean_face, prepared.scheme)  # Or say that it has no eyes.
    name = f"{prepared.folder.name.removesuffix(f'-{prepared.size}')}+{pathlib.Path(folder).name}"
    output = pathlib.Path(output_dir or prepared.folder.with_name(f"{name}-{prepared.size}"))
    _copy(prepared.folder, output)
    detector, problems, rows, lines = get_detector(detector).thorough(), [], [], []
    taken = set()
    for path, closed in tqdm.tqdm(photos, desc="photos", unit="face"):
        points = _label(path, closed, teacher, detector, prepared.scheme)
        if isinstance(points, str):
            problems.append(f"{path}: {points}\n")
            continue
        image = f"images/{unique_name(f'eyes_{path.parent.name}_{path.stem}', taken)}.jpg"
        box = crops.face_box(points, prepared.crop["rule"], prepared.crop["scale"])
        stored = crops.cut(read_photo(path, upright=True), crops.grow(box, prepared.margin),
                           round(prepared.size * prepared.margin))
        write_crop(output / image, stored)
        numbers = " ".join(f"{v:.7f}" for v in crops.to_crop(points, box).flatten())
        lines += [f"{image} {numbers}\n"] * (REPEAT if closed else 1)
        # Nothing is published of these photos: both boxes are ours.
        rows.append([image, path.resolve(), "eyes", *(f"{v:.4f}" for v in (*box, *box))])
    with open(output / "sources.csv", "a", newline="", encoding="utf-8",
              errors="surrogateescape") as file:
        csv.writer(file).writerows(rows)
    with open(output / "train.txt", "a", encoding="utf-8") as file:
        file.writelines(lines)
    (output / "problems.txt").write_text("".join(problems), encoding="utf-8", errors="replace")
    count = {state: sum(row[0].startswith(f"images/eyes_{state}") for row in rows)
             for state in STATES}
    print(f"{output}: {count['closed']} faces with shut eyes, each listed {REPEAT} times, and "
          f"{count['open']} with open ones; {len(problems)} left out, see problems.txt")
    return output


def _copy(folder, output):
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        if not (output / "set.yaml").is_file():
            raise UserError(f"{output}: exists and is no prepared set; give another "
                            f"output_dir=FOLDER (--output-dir FOLDER) or empty it")
        if output.resolve() == folder.resolve():
            raise UserError(f"{output}: is the set itself; give another output_dir=FOLDER "
                            f"(--output-dir FOLDER)")
        shutil.rmtree(output)
    # Crops are never written to again: links save the room where the disk can have them.
    shutil.copytree(folder, output, copy_function=_link)


def _link(source, target):
    if pathlib.Path(source).suffix != ".jpg":
        return shutil.copy2(source, target)
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return target


def _label(path, closed, teacher, detector, scheme):
    """Landmarks (K, 2) in pixels of the largest face of a photo, or why it has none."""
    image = read_photo(path, upright=True)
    if image is None:
        return "it cannot be read"
    boxes = detector(image)
    if not len(boxes):
        return "no face was found"
    side = (boxes[:, 2:4] - boxes[:, :2]).max(1)
    start = detector.to_crop(boxes[[side.argmax()]], teacher.crop["scale"])
    points, _, box = (found[0] for found in refine(teacher, image, start))
    width = image.shape[1]
    mirrored, _, _ = refine(teacher, image[:, ::-1].copy(), [
        [width - 1 - box[2], box[1], width - 1 - box[0], box[3]]], passes=1)
    again = mirrored[0, scheme.flip] * (-1, 1) + (width - 1, 0)
    doubt = float(metrics.nme(again[None], points[None], metrics.divisors(
        points[None], scheme.divisor, box[None]))[0])
    if doubt > DOUBT:
        return f"its mirrored landmarks lie {100 * doubt:.0f} % off, measured as NME"
    return lids.close(points, scheme) if closed else points
