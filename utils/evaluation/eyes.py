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
from utils.data.eye_states import STATES, list_photos
from utils.data.photo import read_photo
from utils.detection.detector import get_detector
from utils.detection.refine import place_crops, predict_boxes
from utils.drowsiness import eyes
from utils.errors import UserError
from utils.files import atomic_write
from utils.landmarks import eyelids
from utils.predictor import Predictor
from utils.tracking.tracker import Tracker, largest

# Least faces of each state from which limits are fitted.
FEWEST = 20
# A driver who is wrongly woken soon switches the alarm off.
ALARM_COST = 3
# A face is one with all below its eyes covered, by a hand or a mask; COVERED of the width of both
# eyes below them the cover begins. What all but LOST % of such faces have is asked: the last
# hundredth are heads turned aside as well, for which `fast` would be asked 0.17, not 0.27. Nine
# tenths of it would keep 21 instead of 14 of 52 boxes that Haar takes for faces (`tiny`).
COVERED, LOST = 0.15, 5
# The shares of false alarms at which recall is told.
ALARMS = {"1": 0.01, "0.1": 0.001}


@dataclasses.dataclass(frozen=True)
class Reading:
    """A photo and what was seen in it. points_px (K, 2) and confidence (K,) of the largest face;
    None, as is seen (an eyes.Eyes), where no face was found.
    """
    photo: pathlib.Path
    closed: bool
    points_px: numpy.ndarray | None
    confidence: numpy.ndarray | None
    seen: eyes.Eyes | None


def read_eyes(predictor, detector, photos):
    """A Reading of each of photos [(path, closed)], as demo.py reads a single picture."""
    detector, readings = detector.thorough(), []
    for path, closed in tqdm.tqdm(photos, desc="photos", leave=False):
        image = read_photo(path, upright=True)
        if image is None:
            raise UserError(f"{path}: cannot be read as an image")
        tracker = Tracker(predictor, detector, filter_min_cutoff=0)
        face = largest(tracker.update(image, 0.0))
        if face is None:
            readings.append(Reading(path, closed, None, None, None))
            continue
        readings.append(Reading(path, closed, face.raw_px, face.confidence, eyes.look(
            face.raw_px, face.confidence, predictor.scheme, predictor.eyes, image.shape)))
    return readings


def score(readings):
    """What the readings are worth, as a dict of plain numbers.

    AUC (area under the ROC curve) and recall at 1 and 0.1 % false alarms are of the mean eye aspect
    ratio of the faces found, and of single eyes under `eye_`. The rule's `recall` and
    `false_alarms`, in %, are of all faces: who is not found or not judged is not called shut.
    """
    found = _found(readings)
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
    """The eyelids.EyeThresholds that suit the readings of a model of `scheme`. Raises UserError where they
    are too few, or the model does not tell the states apart.

    shut and open: medians of the eye aspect ratio as predicted. closed_below: the openness where
    the share of shut faces missed plus ALARM_COST times the share of false alarms is least.
    min_confidence: half of what 99 % of the eyes have.
    """
    _check_counts(readings)
    found = _found(readings)
    ratios = numpy.array([r.seen.ratios for r in found])
    shut = numpy.array([r.closed for r in found], bool)
    low, high = (float(numpy.median(ratios[which].mean(1))) for which in (shut, ~shut))
    if not low < high:
        raise UserError(f"the model sees shut eyes as open as open ones (eye aspect ratio "
                        f"{low:.2f} and {high:.2f}); train it with such faces first")
    openness = eyelids.EyeThresholds(low, high).openness(ratios).mean(1)
    sure = [r.confidence[contour].mean() for r in found for contour in scheme.eyes]
    return eyelids.EyeThresholds(low, high, _cheapest(numpy.sort(openness[shut]),
                                            numpy.sort(openness[~shut])),
                       float(numpy.percentile(sure, 1)) / 2)


def fit_face(predictor, readings):
    """The mean confidence that tells a face from what is none: what 95 % of the faces of
    readings have when everything below their eyes is covered.
    """
    sure, both = [], sum(predictor.scheme.eyes, [])
    for reading in _found(readings):
        image = read_photo(reading.photo, upright=True)
        box, roll = place_crops(predictor, reading.points_px[None])
        contours = reading.points_px[both]
        begins = contours[:, 1].max() + COVERED * numpy.ptp(contours[:, 0])
        image[max(0, round(begins)):] = image.mean((0, 1))
        sure.append(predict_boxes(predictor, image, box, roll)[1].mean())
    return float(numpy.percentile(sure, LOST))


def _found(readings):
    return [r for r in readings if r.seen is not None]


def _check_counts(readings):
    """Raises UserError where too few faces of a state were found."""
    for state, closed in zip(STATES, (True, False)):
        count = sum(r.closed == closed and r.seen is not None for r in readings)
        if count < FEWEST:
            raise UserError(f"limits need {FEWEST} faces with eyes {state}, {count} were found; "
                            f"give more photos, or a better detector with --boxes")


def _cheapest(shut, opened):
    """The value that best parts sorted shut (n,) from opened (m,): in the widest of the best gaps,
    as many times farther from the open side as an alarm costs more than a miss.
    """
    values = numpy.unique(numpy.concatenate([shut, opened]))
    places = (values[1:] + values[:-1]) / 2
    missed = 1 - numpy.searchsorted(shut, places) / len(shut)
    alarms = numpy.searchsorted(opened, places) / len(opened)
    cost = missed + ALARM_COST * alarms
    best = numpy.flatnonzero(cost <= cost.min() + 1e-9)
    # Of equally good gaps the widest, which is the least a matter of chance.
    place = max(best, key=lambda i: values[i + 1] - values[i])
    return float(values[place] + (values[place + 1] - values[place]) / (1 + ALARM_COST))


def fit_weights(args):
    """Fit a model's limits of eyes and faces, and of a .pt its lid head; print and keep them.

    Returns whether an ONNX file beside it is to be exported anew. Raises UserError.
    """
    path, photos, detector = _what(args)
    # Of an ONNX file only the limits can be fitted: its graph is as it is.
    predictor = Predictor(path, args.device, lids=False)
    _check_eyes(predictor)
    readings, head = read_eyes(predictor, detector, photos), None
    _check_counts(readings)
    if predictor.model is not None:
        from utils.training import lid_fit
        before = score(readings)["auc"]
        head, readings = lid_fit.fit(predictor, readings)
        print(f"lid head of {path}: AUC {before:.4f} without it, {score(readings)['auc']:.4f} with "
              f"heads fitted to other faces")
    limits = dataclasses.replace(fit(readings, predictor.scheme),
                                 face=fit_face(predictor, readings))
    keep(limits, head, path)
    print(f"limits of {path}: " + ", ".join(f"{name} {value:.3f}"
                                            for name, value in limits.state().items()))
    return path.suffix == ".pt" and path.with_suffix(".onnx").is_file()


def test(args):
    """Score how a model tells shut eyes from open ones; print, plot, report. Raises UserError."""
    if args.report != "none" and not pathlib.Path(args.report).parent.is_dir():
        raise UserError(f"--report {args.report}: there is no such folder")
    path, photos, detector = _what(args)
    predictor = Predictor(path, args.device)
    _check_eyes(predictor)
    readings = read_eyes(predictor, detector, photos)
    numbers = score(readings)
    print_numbers(numbers)
    draw_readings(readings, predictor.scheme, path)
    if args.report != "none":
        pathlib.Path(args.report).write_text(json.dumps(numbers, indent=2), encoding="utf-8")


def _what(args):
    """(path of the weights, photos, detector) that args name."""
    return (experiment.find_weights(args.exp), list_photos(args.data_dir, args.names),
            get_detector("haar" if args.boxes == "none" else args.boxes))


def _check_eyes(predictor):
    """Raises UserError where the scheme has no eyes."""
    eyelids.aspect_ratios(predictor.scheme.mean_face, predictor.scheme)


def keep(limits, head, path):
    """Write eyelids.EyeThresholds and a nets.lids.LidHead (or None: as before) into a .pt or .onnx."""
    if path.suffix == ".onnx":
        _keep_in_onnx(limits, path)
        return
    state = checkpoint.read(path)
    if head is not None:
        state = checkpoint.with_head(state, "lids", head)
    checkpoint.save({**state, "eyes": limits.state()}, path)


def _keep_in_onnx(limits, path):
    import onnx
    graph = onnx.load(path)
    described = {entry.key: entry.value for entry in graph.metadata_props}
    onnx.helper.set_model_props(graph, described | {"eyes": json.dumps(limits.state())})
    with atomic_write(path) as temporary:
        onnx.save(graph, temporary)


def print_numbers(numbers):
    """Print the numbers of score()."""
    for state in STATES:
        print(f"{state:<8}{{faces}} faces, {{not_found}} not found, {{not_judged}} not judged"
              .format(**numbers[state]))
    print(f"rule    recall {numbers['recall']:.1f} %, false alarms {numbers['false_alarms']:.1f} %")
    for name, prefix in (("faces", ""), ("eyes", "eye_")):
        print(f"{name:<8}AUC {numbers[prefix + 'auc']:.4f}, recall "
              + ", ".join(f"{numbers[f'{prefix}recall_at_{share}']:.1f} % at {share} %"
                          for share in ALARMS) + " false alarms")


def draw_readings(readings, scheme, weights):
    """Write eyes-roc.png, and eyes-worst.png: the 16 faces of each state that look least like it.

    Beside the weights; at the top of weights/ the names begin with theirs.
    """
    prefix = "" if weights.stem == "best" else f"{weights.stem}-"
    found = _found(readings)
    ratio = {id(r): float(numpy.mean(r.seen.ratios)) for r in found}
    shut, opened = ([ratio[id(r)] for r in found if r.closed == closed] for closed in (True, False))
    experiment.plot_roc(shut, opened, weights.with_name(f"{prefix}eyes-roc.png"))
    images, captions = [], []
    for closed, sign in ((True, -1), (False, 1)):
        faces = [r for r in found if r.closed == closed]
        for r in sorted(faces, key=lambda r: sign * ratio[id(r)])[:16]:
            image = read_photo(r.photo, upright=True)
            images.append(draw.landmarks(image, r.points_px, scheme))
            captions.append(f"{r.photo.parent.name} {r.photo.stem} {ratio[id(r)]:.2f}")
    draw.save(weights.with_name(f"{prefix}eyes-worst.png"), draw.sheet(images, 8, 200, captions))
