"""Fit what separates closed from open eyes: the lid head of a network and its eye thresholds.

`main.py --fit-eyes` predicts photos of known eye state (utils/evaluation/eyes.py). fit_head fits
the lid head (nets/lids.py) to the backbone's features under the eyes. fit_thresholds then fits the
eye thresholds (utils/landmarks/eyelids.py) to the eye aspect ratios of faces that the head was not
fitted to (cross-validation). Both are stored in the .pt; an ONNX file gets the thresholds only.
"""
from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib

import numpy
import scipy.optimize
import scipy.special
import torch
import tqdm

from nets.lids import CLOSURE_EXPONENT, LidHead
from utils import checkpoint, packing
from utils.data.eye_states import STATES
from utils.data.photo import read_photo
from utils.detection.refine import place_crops, predict_boxes
from utils.drowsiness import eyes
from utils.errors import UserError
from utils.evaluation import eyes as eye_scores
from utils.evaluation.eyes import EyeReading, with_face
from utils.files import atomic_write
from utils.landmarks import crop
from utils.landmarks.eyelids import EyeThresholds
from utils.landmarks.schemes import Scheme
from utils.predictor import Predictor

# Minimum number of faces of each state for a fit.
MIN_FACES = 20
# A false alarm costs as much as three missed closed eyes: drivers switch off an alarm that wakes
# them without reason.
FALSE_ALARM_COST = 3
# The least confident face to accept is one covered below the eyes by a hand or a mask. The cover
# begins COVER_START of the width of both eyes below them.
COVER_START = 0.15
# This percentile of the covered faces' mean confidence becomes the threshold. The first percentile
# belongs to heads that are turned aside as well: it would give `fast` 0.17 instead of 0.27. Nine
# tenths of the threshold would accept 21 instead of 14 of 52 boxes that Haar wrongly takes for
# faces (`tiny`).
COVERED_PERCENTILE = 5
# Each face is read from several crops, as a tracker would place them: (shift in x, shift in y,
# size), as shares of the crop. The first is the nominal crop.
JITTERS = ((0.0, 0.0, 1.0), (0.04, 0.03, 1.06), (-0.04, -0.03, 0.95))
# L2 penalty on the weights, for features of unit deviation and the mean loss. Ten times as much or
# a tenth changes the area under the ROC curve by less than 0.001.
WEIGHT_DECAY = 0.01
FOLDS = 10


def fit_weights(args: argparse.Namespace) -> bool:
    """Fit a model's eye thresholds, and of a .pt its lid head; print and store them.

    Args:
        args: resolved settings, see evaluation.eyes.predict_labelled.

    Returns:
        Whether an ONNX file lies beside the .pt, which must be exported again.

    Raises:
        UserError: where weights or photos are missing, too few faces are found, or the model does
            not separate closed from open eyes.
    """
    path, predictor, readings = eye_scores.predict_labelled(args, lids=False, patches=False)
    head = None
    _check_counts(readings)
    # The graph of an ONNX file is fixed: only its thresholds can be fitted.
    if predictor.model is not None:
        before = eye_scores.score(readings)["auc"]
        head, readings = fit_head(predictor, readings)
        print(f"lid head of {path}: AUC {before:.4f} without it, "
              f"{eye_scores.score(readings)['auc']:.4f} with heads fitted to other faces")
    thresholds = dataclasses.replace(fit_thresholds(readings, predictor.scheme),
                                     face=fit_face_confidence(predictor, readings))
    store(thresholds, head, path)
    print(f"eye thresholds of {path}: " + ", ".join(
        f"{name} {value:.3f}" for name, value in thresholds.state().items()))
    return path.suffix == ".pt" and path.with_suffix(".onnx").is_file()


def fit_thresholds(readings: list[EyeReading], scheme: Scheme) -> EyeThresholds:
    """Fit eye thresholds to readings of a model.

    `shut` and `open` are the medians of the predicted eye aspect ratios. `closed_below` is the
    openness at which the share of missed closed faces plus FALSE_ALARM_COST times the share of
    false alarms is least. `min_confidence` is half of what 99 % of the eyes have.

    Args:
        readings: of faces in both states.
        scheme: the model's scheme, with eye contours.

    Returns:
        The thresholds; `face` keeps its default.

    Raises:
        UserError: where a state has too few faces, or closed eyes are not less open than open ones.
    """
    _check_counts(readings)
    readings = with_face(readings)
    ratios = numpy.array([r.eyes.ratios for r in readings])
    closed = numpy.array([r.closed for r in readings], bool)
    low, high = (float(numpy.median(ratios[state].mean(1))) for state in (closed, ~closed))
    if not low < high:
        raise UserError(f"the model predicts closed eyes as open as open ones (eye aspect ratio "
                        f"{low:.2f} and {high:.2f}); train it with closed eyes first")
    openness = EyeThresholds(low, high).openness(ratios).mean(1)
    confidence = [r.confidence[contour].mean() for r in readings for contour in scheme.eyes]
    return EyeThresholds(low, high, _cheapest_threshold(numpy.sort(openness[closed]),
                                                        numpy.sort(openness[~closed])),
                         float(numpy.percentile(confidence, 1)) / 2)


def fit_face_confidence(predictor: Predictor, readings: list[EyeReading]) -> float:
    """Fit the mean confidence above which a crop counts as a face.

    Returns:
        The COVERED_PERCENTILE of the faces' mean confidence with everything below the eyes covered.
    """
    confidences, contours = [], sum(predictor.scheme.eyes, [])
    for reading in with_face(readings):
        image = read_photo(reading.photo, upright=True)
        box, roll = place_crops(predictor, reading.points_px[None])
        points = reading.points_px[contours]
        top = points[:, 1].max() + COVER_START * numpy.ptp(points[:, 0])
        image[max(0, round(top)):] = image.mean((0, 1))
        confidences.append(predict_boxes(predictor, image, box, roll)[1].mean())
    return float(numpy.percentile(confidences, COVERED_PERCENTILE))


def _check_counts(readings):
    """Raise UserError where too few faces of a state were found."""
    for state, closed in zip(STATES, (True, False)):
        count = sum(r.closed == closed for r in with_face(readings))
        if count < MIN_FACES:
            raise UserError(f"eye thresholds need {MIN_FACES} faces with eyes {state}, {count} "
                            f"were found; give more photos, or a better detector with --boxes")


def _cheapest_threshold(closed, opened):
    """Return the threshold of least cost between sorted closed (n,) and open (m,) openness.

    It lies in the widest of the best gaps, FALSE_ALARM_COST times as far from the open side.
    """
    values = numpy.unique(numpy.concatenate([closed, opened]))
    middles = (values[1:] + values[:-1]) / 2
    missed = 1 - numpy.searchsorted(closed, middles) / len(closed)
    false_alarms = numpy.searchsorted(opened, middles) / len(opened)
    cost = missed + FALSE_ALARM_COST * false_alarms
    best = numpy.flatnonzero(cost <= cost.min() + 1e-9)
    # Of equally good gaps, the widest depends least on the sample.
    gap = max(best, key=lambda i: values[i + 1] - values[i])
    return float(values[gap] + (values[gap + 1] - values[gap]) / (1 + FALSE_ALARM_COST))


def store(thresholds: EyeThresholds, head: LidHead | None, path: pathlib.Path) -> None:
    """Write eye thresholds and a lid head into a .pt or .onnx.

    Args:
        thresholds: fitted to the weights in the file.
        head: replaces the lid head in a .pt; None keeps it. Not used for an .onnx.
        path: of the file to change.
    """
    if path.suffix == ".onnx":
        _store_in_onnx(thresholds, path)
        return
    state = checkpoint.read(path)
    if head is not None:
        state = checkpoint.with_head(state, "lids", head)
    checkpoint.save({**state, "eyes": thresholds.state()}, path)


def _store_in_onnx(thresholds, path):
    import onnx
    model = onnx.load(path)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    onnx.helper.set_model_props(model, metadata | {"eyes": json.dumps(thresholds.state())})
    with atomic_write(path) as temporary:
        onnx.save(packing.lower_ir_version(model), temporary)


def fit_head(predictor: Predictor,
             readings: list[EyeReading]) -> tuple[LidHead, list[EyeReading]]:
    """Fit a lid head to faces of known state and apply it to them by cross-validation.

    Args:
        predictor: of a .pt, without its lid head.
        readings: of evaluation.eyes.predict_photos with this predictor. Neighbours in the list
            often show one person and fall into the same fold.

    Returns:
        The head fitted to all faces, and the readings as heads of the other folds give them.
    """
    found = [i for i, r in enumerate(readings) if r.eyes is not None]
    closed = numpy.array([readings[i].closed for i in found], bool)
    features = _features(predictor, [readings[i] for i in found])
    folds = numpy.zeros(len(found), int)
    for state in (True, False):
        members = numpy.flatnonzero(closed == state)
        folds[members] = numpy.arange(len(members)) * FOLDS // max(len(members), 1)
    head = LidHead(predictor.model.backbone.channels, predictor.scheme)
    held_out = numpy.zeros((len(found), len(head.bias)))
    with torch.no_grad():
        for fold in tqdm.tqdm(range(FOLDS), desc="folds", leave=False):
            train = folds != fold
            _fit_eyes(head, features[train], closed[train])
            held_out[~train] = head.closed_probability(
                torch.from_numpy(features[~train, 0])).numpy()
        _fit_eyes(head, features, closed)
    moved = list(readings)
    for i, probability in zip(found, held_out):
        moved[i] = _move_lids(readings[i], head, probability ** CLOSURE_EXPONENT, predictor)
    return head, moved


def _features(predictor, readings):
    """Return the inputs of a LidHead (n, 2 * JITTERS, 2, D): of crops, then of mirrored crops."""
    model, size = predictor.model, predictor.input_size
    device = next(model.parameters()).device
    head = LidHead(model.backbone.channels, predictor.scheme).to(device)
    rows = []
    for reading in tqdm.tqdm(readings, desc="features", leave=False):
        photo = read_photo(reading.photo, upright=True)
        (box,), (roll,) = place_crops(predictor, reading.points_px[None])
        side = numpy.tile(box[2:] - box[:2], 2)
        crops = [crop.cut(photo, crop.grow(box + side * (dx, dy, dx, dy), scale), size, roll)
                 for dx, dy, scale in JITTERS]
        images = torch.from_numpy(numpy.stack([*crops, *(c[:, ::-1] for c in crops)]))
        with torch.inference_mode():
            features = model.backbone(model.normalise(images.permute(0, 3, 1, 2).to(device)))
            landmarks, _ = model.predict_without_lids(features)
            rows.append(head.eye_features(features, landmarks).cpu().numpy())
    return numpy.stack(rows)


def _fit_eyes(head, features, closed):
    """Fit the head's two regressions to features (n, views, 2, D) and states (n,)."""
    for eye in range(features.shape[2]):
        weight, bias = _logistic_regression(features[:, :, eye], closed)
        head.weight[eye] = torch.from_numpy(weight)
        head.bias[eye] = float(bias)


def _logistic_regression(features, closed):
    """Return the weight (D,) and bias for one eye; both states have the same total weight."""
    labels = numpy.repeat(closed, features.shape[1])
    features = features.reshape(len(labels), -1).astype(numpy.float64)
    mean, deviation = features.mean(0), features.std(0) + 1e-6
    features = (features - mean) / deviation
    sample_weight = numpy.where(labels, 0.5 / labels.sum(), 0.5 / (~labels).sum())
    sign = numpy.where(labels, 1.0, -1.0)

    def loss(parameters):
        margin = sign * (features @ parameters[:-1] + parameters[-1])
        slope = -sample_weight * sign * scipy.special.expit(-margin)
        gradient = numpy.append(features.T @ slope + WEIGHT_DECAY * parameters[:-1], slope.sum())
        return (sample_weight @ numpy.logaddexp(0, -margin)
                + WEIGHT_DECAY / 2 * (parameters[:-1] ** 2).sum()), gradient

    solution = scipy.optimize.minimize(loss, numpy.zeros(features.shape[1] + 1), jac=True,
                                       method="L-BFGS-B").x
    weight = solution[:-1] / deviation
    return weight, solution[-1] - weight @ mean


def _move_lids(reading, head, share, predictor):
    """Return a reading whose lids are closed by share (2,), one for each eye, and judged again."""
    points = head.close_lids(torch.from_numpy(reading.points_px)[None],
                             torch.from_numpy(share)[None])[0].numpy()
    return dataclasses.replace(reading, points_px=points, eyes=eyes.read_eyes(
        points, reading.confidence, predictor.scheme, predictor.eyes))
