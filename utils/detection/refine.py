"""Crop refinement: from rough face boxes in an image to landmarks.

A detector's box gives a rough crop. The network predicts landmarks in it, a new crop is computed
from these landmarks by the training rule, and the network runs again, until the crop stops moving.
Crops are rotated with tilted heads.
"""
from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy

from utils.landmarks import crop, metrics
from utils.landmarks.eyelids import EyeThresholds

if TYPE_CHECKING:
    from utils.landmarks.schemes import Scheme
    from utils.predictor import Predictor

# Largest shift of a crop's edge, in crop sides, that needs no further pass: training shifts and
# scales crops by about a tenth. With two passes at most, `fast` loses one LFPW face from its Haar
# box (NME 3.15 instead of 3.06), and a five-point model, whose first crop is twice too large, has
# an NME of 5.8 instead of 5.6.
TOLERANCE = 0.12
# Head roll in radians up to which crops stay upright. Models handle tilted heads, but eye
# thresholds are fitted to upright ones: of 75 open-eyed LFPW faces rotated by 30 and 45 degrees,
# `fast` reads 9 and 68 as closed in upright crops.
MAX_UPRIGHT_ROLL = math.radians(8)
# A detector's box does not tell the head's roll, and in an upright crop of a head on its side a
# network predicts an upright face. Below a mean confidence of MIN_UPRIGHT_CONFIDENCE, crops rotated
# by TRIAL_ROLLS are tried too. One replaces the upright crop if its confidence is more than
# MIN_GAIN times as high and more than FACE_MARGIN times the model's face threshold. The best
# rotated crop of an upright head has 0.55 to 1.03 times the upright confidence, that of a head
# rotated by 90 degrees 1.06 to 5.2 times (`tiny` and `fast` on LFPW). Other objects also often gain
# confidence, but stay below FACE_MARGIN. With rolls of 90, -90 and 180 degrees alone, `eyes` fails
# on 14 instead of 3 of 216 heads rotated by 120 degrees.
MIN_UPRIGHT_CONFIDENCE, MIN_GAIN, FACE_MARGIN = 0.75, 1.05, 1.05
TRIAL_ROLLS = numpy.radians([45, -45, 90, -90, 135, -135, 180])
# Distance from the centre of a detector's box down to that of the landmarks of an upright face, in
# sides of their crop: 0.132 to 0.141 for the three detectors, see detector.CROP_TRANSFORMS.
CENTRE_SHIFT = 0.137


def predict_boxes(predictor: Predictor, image: numpy.ndarray, boxes: numpy.ndarray,
                  rolls: numpy.ndarray | None = None) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Predict landmarks in crops of an image, as one batch.

    Args:
        predictor: model that takes RGB uint8 crops.
        image: RGB uint8 (H, W, 3).
        boxes: nominal crops (n, 4) in pixels.
        rolls: clockwise rotation (n,) of each crop about its centre in radians; None: upright.

    Returns:
        Landmarks (n, K, 2) in pixels of image, and confidence (n, K).
    """
    boxes = numpy.asarray(boxes, numpy.float64).reshape(-1, 4)
    if not len(boxes):
        count = predictor.scheme.points
        return numpy.zeros((0, count, 2)), numpy.zeros((0, count))
    rolls = numpy.zeros(len(boxes)) if rolls is None else rolls
    crops = numpy.array([crop.cut(image, box, predictor.input_size, roll)
                         for box, roll in zip(boxes, rolls)])
    points, confidence = predictor(crops)
    points_px = crop.to_photo(points.astype(numpy.float64), boxes)
    if rolls.any():
        points_px = crop.rotate(points_px, (boxes[:, :2] + boxes[:, 2:]) / 2, rolls)
    return points_px, confidence


def mirror_errors(predictor: Predictor, image: numpy.ndarray,
                  points_px: numpy.ndarray) -> numpy.ndarray:
    """Compute the mirror error of faces: how much a prediction differs from that of its mirror.

    The crop of each face is predicted twice more, as it is and mirrored.

    Args:
        predictor: the model.
        image: RGB uint8 (H, W, 3).
        points_px: predicted landmarks (n, K, 2) in pixels, which place the crops.

    Returns:
        See metrics.mirror_error, (n,); NaN for a scheme without eyes.
    """
    if not len(points_px):
        return numpy.zeros(0)
    crops = numpy.array([crop.cut(image, box, predictor.input_size, roll)
                         for box, roll in zip(*place_crops(predictor, points_px))])
    both = predictor.predict_both(crops)
    return metrics.mirror_error(both[:, 0], both[:, 1], predictor.scheme)


def crop_rolls(points_px: numpy.ndarray, scheme: Scheme) -> numpy.ndarray:
    """Compute how far the crops of faces are rotated.

    Args:
        points_px: landmarks (n, K, 2) in pixels.
        scheme: their scheme. Without eyes, crops stay upright.

    Returns:
        Clockwise rolls (n,) in radians: the part of the head's roll beyond MAX_UPRIGHT_ROLL.
    """
    if scheme.eyes is None:
        return numpy.zeros(len(points_px))
    rolls = crop.roll_angles(points_px, scheme)
    return numpy.sign(rolls) * numpy.maximum(abs(rolls) - MAX_UPRIGHT_ROLL, 0)


def place_crops(predictor: Predictor,
                points_px: numpy.ndarray) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Compute the crops around landmarks by the training rule.

    Args:
        predictor: model whose crop rule and scheme apply.
        points_px: landmarks (n, K, 2) in pixels.

    Returns:
        Nominal crops (n, 4) in pixels and their clockwise rolls (n,) in radians.
    """
    rolls = crop_rolls(points_px, predictor.scheme)
    if not rolls.any():
        return crop.face_boxes(points_px, predictor.crop, predictor.scheme), rolls
    centroid = points_px.mean(1)
    upright = crop.rotate(points_px, centroid, -rolls)
    boxes = crop.face_boxes(upright, predictor.crop, predictor.scheme)
    centre = (boxes[:, None, :2] + boxes[:, None, 2:]) / 2
    shift = (crop.rotate(centre, centroid, rolls) - centre)[:, 0]
    return boxes + numpy.concatenate([shift, shift], 1), rolls


def has_moved(box: numpy.ndarray, other: numpy.ndarray) -> bool:
    """Return whether crop `other` (4,) differs from `box` (4,) by more than TOLERANCE."""
    box, other = box.tolist(), other.tolist()  # NumPy is slow on four numbers.
    largest_shift = max(abs(a - b) for a, b in zip(box, other))
    return largest_shift > TOLERANCE * max(box[2] - box[0], box[3] - box[1])


def refine(predictor: Predictor, image: numpy.ndarray, boxes: numpy.ndarray, passes: int = 4,
           ) -> tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]:
    """Predict landmarks from rough crops, refining the crops.

    The first pass also tries rotated crops where the confidence in an upright face is low. The
    second pass computes each crop from the landmarks; further passes do so where the crop has just
    moved by more than TOLERANCE.

    Args:
        predictor: the model.
        image: RGB uint8 (H, W, 3).
        boxes: rough crops (n, 4) in pixels, as `Detector.to_crop` returns.
        passes: largest number of passes.

    Returns:
        Landmarks (n, K, 2) in pixels, confidence (n, K) and the crops (n, 4) of the last pass.
    """
    boxes = numpy.asarray(boxes, numpy.float64).reshape(-1, 4)
    points_px, confidence, boxes = _predict_first(predictor, image, boxes)
    active = numpy.arange(len(boxes))
    for _ in range(passes - 1):
        if not len(active):
            break
        crops, rolls = place_crops(predictor, points_px[active])
        moved = [has_moved(*pair) for pair in zip(boxes[active], crops)]
        boxes[active] = crops
        points_px[active], confidence[active] = predict_boxes(predictor, image, crops, rolls)
        active = active[moved]
    return points_px, confidence, boxes


def _predict_first(predictor, image, boxes):
    """Return what `refine` does after its first pass, with the best roll of each crop."""
    points_px, confidence = predict_boxes(predictor, image, boxes)
    boxes = boxes.copy()
    if predictor.scheme.eyes is None:
        return points_px, confidence, boxes
    min_confidence = FACE_MARGIN * getattr(predictor, "eyes", EyeThresholds()).face
    for i in numpy.flatnonzero(confidence.mean(1) < MIN_UPRIGHT_CONFIDENCE):
        crops = _trial_crops(boxes[i])
        trial_points, trial_confidence = predict_boxes(predictor, image, crops, TRIAL_ROLLS)
        best = trial_confidence.mean(1).argmax()
        if trial_confidence[best].mean() > max(min_confidence, MIN_GAIN * confidence[i].mean()):
            points_px[i], confidence[i] = trial_points[best], trial_confidence[best]
            boxes[i] = crops[best]
    return points_px, confidence, boxes


def _trial_crops(box):
    """Return the crops of a detector's crop (4,) for heads rotated by each of TRIAL_ROLLS."""
    centre = (box[:2] + box[2:]) / 2
    box_centre = centre - (0, CENTRE_SHIFT * (box[3] - box[1]))
    shift = crop.rotate(centre[None, None], box_centre[None], TRIAL_ROLLS)[:, 0] - centre
    return box + numpy.concatenate([shift, shift], 1)
