"""Shut and open eyes: what a model sees of faces whose state is known, and the limits that follow.

A folder holds the photos in closed/ and open/. A face is found and read exactly as demo.py does it
with a single picture.
"""
import dataclasses
import json
import pathlib

import numpy
import tqdm

from utils import checkpoint, draw, experiment
from utils.data.photo import read_photo
from utils.data.readers.pts import IMAGE_SUFFIXES
from utils.errors import UserError
from utils.landmarks import lids
from utils.predictor import Predictor
from utils.video import eyes
from utils.video.detector import get_detector
from utils.video.tracker import Tracker

STATES = ("closed", "open")
# Least faces of each state from which limits are fitted.
FEWEST = 20
# The limits of false alarms at which recall is told.
ALARMS = {"1": 0.01, "0.1": 0.001}


@dataclasses.dataclass(frozen=True)
class Reading:
    """A photo and what was seen in it. points_px (K, 2) and confidence (K,) of the largest face;
    None, as is seen (an eyes.Eyes), where no face was found."""
    photo: pathlib.Path
    closed: bool
    points_px: numpy.ndarray | None
    confidence: numpy.ndarray | None
    seen: eyes.Eyes | None


def list_photos(folder, names="none"):
    """[(path, closed)] of the photos in folder/closed and folder/open.

    names: none for all, or LIST or LIST:PART: a file with lines `closed/0001.jpg` or
    `closed/0001.jpg part`, of which those of the part are taken. Raises UserError.
    """
    folder = pathlib.Path(folder)
    missing = [state for state in STATES if not (folder / state).is_dir()]
    if missing:
        raise UserError(f"{folder}: has no folder {missing[0]}; photos of faces with shut eyes are "
                        f"expected in closed/, with open eyes in open/")
    if names == "none":
        found = [path for state in STATES for path in sorted((folder / state).iterdir())
                 if path.suffix.lower() in IMAGE_SUFFIXES]
    else:
        found = [folder / name for name in _read_names(names)]
    photos = [(path, path.parent.name == "closed") for path in found]
    for state in STATES:
        if not any(path.parent.name == state for path in found):
            raise UserError(f"{folder}: no photo in {state}/"
                            + (f" is named by {names}" if names != "none" else ""))
    absent = [path for path in found if not path.is_file()]
    if absent:
        raise UserError(f"{absent[0]}: no such photo, though {names} names it")
    return photos


def _read_names(names):
    path, _, part = str(names).partition(":")
    try:
        lines = pathlib.Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"names {path}: cannot be read: {error}") from None
    rows = [(number, line.split()) for number, line in enumerate(lines, 1) if line.strip()]
    for number, row in rows:
        if len(row) > 2 or row[0].split("/")[0] not in STATES or len(row[0].split("/")) != 2:
            raise UserError(f"{path}:{number}: expected closed/NAME or open/NAME and perhaps a "
                            f"part, found {' '.join(row)[:60]!r}")
    parts = {row[1] for _, row in rows if len(row) == 2}
    if part and part not in parts:
        raise UserError(f"names {path}: has no part {part}; there is "
                        f"{', '.join(sorted(parts)) or 'none'}")
    return [row[0] for _, row in rows if not part or row[1:] == [part]]


def read_eyes(predictor, detector, photos):
    """A Reading of each of photos [(path, closed)], as demo.py reads a single picture."""
    detector, readings = detector.thorough(), []
    for path, closed in tqdm.tqdm(photos, desc="photos", leave=False):
        image = read_photo(path, upright=True)
        if image is None:
            raise UserError(f"{path}: cannot be read as an image")
        tracker = Tracker(predictor, detector, filter_min_cutoff=0)
        tracks = tracker.update(image, 0.0)
        if not tracks:
            readings.append(Reading(path, closed, None, None, None))
            continue
        face = max(tracks, key=lambda track: (track.box[2:] - track.box[:2]).prod())
        readings.append(Reading(path, closed, face.raw_px, face.confidence, eyes.look(
            face.raw_px, face.confidence, predictor.scheme, predictor.eyes)))
    return readings


def score(readings):
    """What the readings are worth, as a dict of plain numbers.

    AUC (area under the ROC curve) and recall at 1 and 0.1 % false alarms are of the mean eye aspect
    ratio of the faces found, and of single eyes under `eye_`. The rule's `recall` and
    `false_alarms`, in %, are of all faces: who is not found or not judged is not called shut.
    """
    found = [r for r in readings if r.seen is not None]
    numbers = {}
    for state, closed in zip(STATES, (True, False)):
        faces = [r for r in readings if r.closed == closed]
        numbers[state] = {"faces": len(faces), "not_found": sum(r.seen is None for r in faces),
                          "not_judged": sum(r.seen is not None and r.seen.closed is None
                                            for r in faces)}
        called = sum(r.seen is not None and r.seen.closed is True for r in faces)
        numbers["recall" if closed else "false_alarms"] = 100 * called / len(faces)
    for prefix, values in (("", [numpy.mean(r.seen.ratios) for r in found]),
                           ("eye_", [r.seen.ratios for r in found])):
        values = numpy.array(values, numpy.float64).reshape(len(found), -1)
        shut = numpy.array([r.closed for r in found], bool)
        numbers |= {prefix + name: value for name, value in
                    separation(values[shut].ravel(), values[~shut].ravel()).items()}
    return numbers


def separation(shut, opened):
    """AUC, and recall in % at so many % false alarms, of values that are lower where eyes are shut.

    shut (n,), opened (m,). No alarm counts as below the least open value.
    """
    if not len(shut) or not len(opened):
        return {"auc": float("nan"), **{f"recall_at_{name}": float("nan") for name in ALARMS}}
    less = numpy.searchsorted(numpy.sort(opened), shut, "right")
    equal = less - numpy.searchsorted(numpy.sort(opened), shut, "left")
    auc = 1 - float((less - equal / 2).mean()) / len(opened)
    ordered = numpy.sort(opened)
    return {"auc": auc, **{f"recall_at_{name}": 100 * float((shut < ordered[int(
        share * len(opened))]).mean()) for name, share in ALARMS.items()}}


def fit(readings, scheme):
    """The lids.Limits that suit the readings of a model of `scheme`. Raises UserError.

    shut and open: medians of the predicted eye aspect ratio. closed_below: half way between what
    TODO
    """
    found = [r for r in readings if r.seen is not None]
    shut, opened = (numpy.array([r.seen.ratios for r in found if r.closed == closed])
                    for closed in (True, False))
    for state, values in zip(STATES, (shut, opened)):
        if len(values) < FEWEST:
            raise UserError(f"limits need {FEWEST} faces of each state, {len(values)} were found "
                            f"with eyes {state}")
    raise NotImplementedError
