"""Pseudo-labels: add photos without landmarks to a prepared set, labelled by trained models.

prepare() detects the faces of a folder, takes the mean landmarks of the teachers (Teachers), leaves
out faces on which they disagree, and adds the others to a copy of a prepared set. The folder may
have photos of closed eyes in closed/ and of open eyes in open/ (see eye_states). Models predict
closed eyes too wide open, so for closed/ the eyelid landmarks are moved to where the lids meet.
"""
from __future__ import annotations

import csv
import os
import pathlib
import shutil
from collections.abc import Iterable

import numpy
import tqdm

from utils import predictor as predictors
from utils.data import eye_states
from utils.data.dataset import PreparedSet
from utils.data.photo import read_photo, write_crop
from utils.data.readers.pts import unique_name
from utils.data.unlabelled import photos_in
from utils.detection.detector import Detector, get_detector
from utils.detection.refine import place_crops, predict_boxes, refine
from utils.errors import UserError
from utils.files import read_text
from utils.landmarks import crop as crops
from utils.landmarks import eyelids, metrics, schemes

# Largest NME, as a fraction, between the first teacher's landmarks and those of the mirrored photo
# or of another teacher. On 300W it is 0.01 to 0.03; a wrong face or no face exceeds the limit.
MAX_DISAGREEMENT = 0.1
# How often a face with closed eyes is listed, because they are few.
REPEAT = 2
LISTS = ("train.txt", "val.txt", "test.txt", "test_*.txt")


class Teachers:
    """Landmarks of the faces of a photo, as the mean over models and mirroring.

    Args:
        paths: weights, .pt or .onnx.
        scheme: scheme of the set; the models must have all of its landmarks.

    Raises:
        UserError: a model has another scheme.
    """

    def __init__(self, paths: Iterable[pathlib.Path | str], scheme: schemes.Scheme):
        self.scheme, self.models = scheme, [predictors.Predictor(path) for path in paths]
        for model in self.models:
            if not schemes.is_part_of(scheme, model.scheme) or scheme.base is not None:
                raise UserError(f"teacher {model.path}: has the {model.scheme.name} scheme, the "
                                f"set {scheme.name}; a teacher needs all landmarks of the set")

    def __call__(self, image: numpy.ndarray, boxes: numpy.ndarray, detector: Detector
                 ) -> tuple[numpy.ndarray, numpy.ndarray]:
        """Predict the landmarks of faces.

        Args:
            image: RGB uint8 (H, W, 3).
            boxes: (n, 4) in pixels, of `detector`.
            detector: the Detector that found them.

        Returns:
            Mean landmarks (n, K, 2) in pixels, and the largest NME (n,), as a fraction, between the
            first model's landmarks and any of the other predictions.
        """
        width, found = image.shape[1], []
        mirrored = numpy.ascontiguousarray(image[:, ::-1])
        for model in self.models:
            points, _, _ = refine(model, image, detector.to_crop(boxes, model.crop["scale"]))
            crop_boxes, rolls = place_crops(model, points)
            flipped = crop_boxes * (-1, 1, -1, 1) + (width - 1, 0, width - 1, 0)
            other, _ = predict_boxes(model, mirrored, flipped[:, [2, 1, 0, 3]], -rolls)
            found += [points, other[:, self.scheme.flip] * (-1, 1) + (width - 1, 0)]
        first = found[0]
        sizes = metrics.divisors(first, self.scheme.divisor, crop_boxes)
        disagreement = numpy.max([metrics.nme(points, first, sizes) for points in found[1:]], 0)
        return numpy.mean(found, 0), disagreement


def prepare(folder: pathlib.Path | str, labelled: pathlib.Path | str,
            teachers: Iterable[pathlib.Path | str], detector: pathlib.Path | str = "haar",
            names: str = "none", output_dir: pathlib.Path | str | None = None) -> pathlib.Path:
    """Copy a prepared set and add the faces of a folder to its training list.

    Every face of a photo is added; of a photo in closed/ or open/ only the largest one.

    Args:
        folder: the photos.
        labelled: the prepared set.
        teachers: weights of the models that label the faces, see Teachers.
        detector: haar, or the path of a detector's .onnx file.
        names: which photos of closed/ and open/ are used, see eye_states.list_photos.
        output_dir: folder of the new set; None: beside `labelled`, named after both.

    Returns:
        The folder of the new set.

    Raises:
        UserError: a folder, file or model is unusable, or no face could be labelled.
    """
    folder, prepared = pathlib.Path(folder), PreparedSet(labelled)
    photos = _photos(folder, names)
    if prepared.size is None:
        raise UserError(f"{prepared.folder}: has no set.yaml, so the crop is not known; prepare it "
                        f"with util.DataGenerator")
    if not prepared.scheme.mirrors:
        raise UserError(f"{prepared.folder}: its scheme has flip: none, and teachers are "
                        f"checked on mirrored faces")
    teachers = Teachers(teachers, prepared.scheme)
    eyes_known = photos[0][1] is not None
    source = "eyes" if eyes_known else folder.name
    if eyes_known:
        # Raises UserError if the scheme has no eyes.
        eyelids.aspect_ratios(prepared.scheme.mean_face, prepared.scheme)
    name = f"{prepared.folder.name.removesuffix(f'-{prepared.size}')}+{folder.name}"
    output = pathlib.Path(output_dir or prepared.folder.with_name(f"{name}-{prepared.size}"))
    _copy(prepared.folder, output)
    detector, problems, rows, lines = get_detector(detector).with_retry(), [], [], []
    # An existing file may be a hard link to a crop of `labelled`, so it must not be overwritten.
    taken = {path.stem.lower() for path in (output / "images").glob("*")}
    for path, closed in tqdm.tqdm(photos, desc="photos", unit="photo"):
        image = read_photo(path, upright=True)
        for points in (["it cannot be read"] if image is None else
                       _label(image, teachers, detector, eyes_known)):
            if isinstance(points, str):
                problems.append(f"{path}: {points}\n")
                continue
            points = eyelids.close(points, prepared.scheme) if closed else points
            stem = f"{path.parent.name}_{path.stem}" if eyes_known else path.stem
            target = f"images/{unique_name(f'{source}_{stem}', taken)}.jpg"
            box = crops.face_box(points, prepared.crop["rule"], prepared.crop["scale"])
            write_crop(output / target, crops.cut(image, crops.grow(box, prepared.margin),
                                                  round(prepared.size * prepared.margin)))
            numbers = " ".join(f"{v:.7f}" for v in crops.to_crop(points, box).flatten())
            lines += [f"{target} {numbers}\n"] * (REPEAT if closed else 1)
            # These photos have no published crop, so the nominal crop stands for both boxes.
            rows.append([target, path.resolve(), source, *(f"{v:.4f}" for v in (*box, *box))])
    (output / "problems.txt").write_text("".join(problems), encoding="utf-8", errors="replace")
    if not rows:
        raise UserError(f"{folder}: no face could be labelled ({problems[0].strip()})")
    with open(output / "sources.csv", "a", newline="", encoding="utf-8",
              errors="surrogateescape") as file:
        csv.writer(file).writerows(rows)
    texts = {path.name: read_text(path) for name in LISTS
             for path in prepared.folder.glob(name)}
    texts["train.txt"] = texts.get("train.txt", "") + "".join(lines)
    # Written last, so that an interrupted set has no list and is not mistaken for a complete one.
    for name, text in texts.items():
        (output / name).write_text(text, encoding="utf-8")
    count = sum(row[0].startswith("images/eyes_closed") for row in rows) if eyes_known else 0
    kinds = f"{len(rows)} faces" if not eyes_known else (
        f"{count} faces with closed eyes, each listed {REPEAT} times, and {len(rows) - count} with "
        f"open eyes")
    print(f"{output}: {kinds} added; {len(problems)} left out, see problems.txt")
    return output


def _photos(folder, names):
    """List the photos, at least one: (path, whether its eyes are closed, None if unknown)."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of photos")
    if any((folder / state).is_dir() for state in eye_states.STATES):
        return eye_states.list_photos(folder, names)
    if names != "none":
        raise UserError(f"{folder}: names choose photos of closed/ and open/, and it has "
                        f"neither")
    found = [(path, None) for path in photos_in(folder)]
    if not found:
        raise UserError(f"{folder}: holds no photo")
    return found


def _label(image, teachers, detector, largest):
    """List the landmarks (K, 2) in pixels of each face, or the reason why one is left out.

    largest: label the largest face only.
    """
    boxes = detector(image)[:, :4]
    if not len(boxes):
        return ["no face was found"]
    if largest:
        boxes = boxes[[(boxes[:, 2:] - boxes[:, :2]).max(1).argmax()]]
    return [points if disagreement <= MAX_DISAGREEMENT else
            f"predictions disagree: landmarks of the mirrored photo or of another teacher have an "
            f"NME of {100 * disagreement:.0f} %"
            for points, disagreement in zip(*teachers(image, boxes, detector))]


def _copy(folder, output):
    """Copy a prepared set without its lists to `output`."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        if not (output / "set.yaml").is_file():
            raise UserError(f"{output}: exists and is no prepared set; give another "
                            f"output_dir=FOLDER (--output-dir FOLDER) or empty it")
        if output.resolve() == folder.resolve():
            raise UserError(f"{output}: is the set itself; give another output_dir=FOLDER "
                            f"(--output-dir FOLDER)")
        shutil.rmtree(output)
    output.mkdir(parents=True, exist_ok=True)
    # From here on an interrupted copy is recognised as a set that may be replaced.
    (output / "set.yaml").touch()
    # Crops are never modified, so hard links save disk space where the file system has them.
    shutil.copytree(folder, output, copy_function=_link, dirs_exist_ok=True,
                    ignore=shutil.ignore_patterns(*LISTS))


def _link(source, target):
    if pathlib.Path(source).suffix != ".jpg":
        return shutil.copy2(source, target)
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return target
