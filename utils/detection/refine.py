"""From face boxes in an image to landmarks: crops laid by the training rule, in passes."""
import math

import numpy

from utils.landmarks import crop
from utils.landmarks.eyelids import EyeThresholds

# Training shifts and scales crops by about a tenth: a crop off by more gets another pass. With two
# passes at most, `fast` loses a face of LFPW from its Haar box and has 3.15 there instead of 3.06,
# and a net for five points, whose first crop is twice too large, has 5.8 instead of 5.6.
TOLERANCE = 0.12
# Crops are turned with a head that is tilted by more than this, in radians. Networks know tilted
# heads, but what tells shut eyes was fitted to upright ones: of 75 open-eyed LFPW faces, turned by
# 30 and 45 degrees, `fast` took 9 and 68 for shut in crops that were not turned.
TILTED = math.radians(8)
# A box says nothing of how the head in it is turned, and on one that lies on its side a network
# lays an upright face. Where it is less than SURE of that, it also sees the crop turned by each of
# TURNS, and is believed where it is SURER: upright heads have 0.55 to 1.03 times as much in the
# best of the turned crops, heads turned by 90 degrees 1.06 to 5.2 times (tiny and fast on LFPW).
# What is no face is often surer turned as well, but has less than OF_FACES times what the weights
# ask of faces. With 90, -90 and 180 degrees alone `eyes` is wrong in 14 instead of 3 of 216 heads
# turned by 120 degrees.
SURE, SURER, OF_FACES = 0.75, 1.05, 1.05
TURNS = numpy.radians([45, -45, 90, -90, 135, -135, 180])
# How far below the middle of a detector's box an upright face's landmarks have theirs, in sides of
# their crop: 0.132 to 0.141, see detector.RELATIONS. Of a turned head it is to another side.
BELOW = 0.137


def predict_boxes(predictor, image, boxes, rolls=None):
    """One batch through the network: image RGB uint8 (H, W, 3), nominal crops (n, 4) in pixels,
    turned about their centres by rolls (n,) in radians, None for none.

    Returns points (n, K, 2) in pixels of image and confidence (n, K).
    """
    boxes = numpy.asarray(boxes, numpy.float64).reshape(-1, 4)
    if not len(boxes):
        points = predictor.scheme.points
        return numpy.zeros((0, points, 2)), numpy.zeros((0, points))
    rolls = numpy.zeros(len(boxes)) if rolls is None else rolls
    crops = numpy.array([crop.cut(image, box, predictor.input_size, roll)
                         for box, roll in zip(boxes, rolls)])
    points, confidence = predictor(crops)
    points = crop.to_photo(points.astype(numpy.float64), boxes)
    if rolls.any():
        points = crop.turn(points, (boxes[:, :2] + boxes[:, 2:]) / 2, rolls)
    return points, confidence


def crop_rolls(points, scheme):
    """How far the crops of faces with landmarks (n, K, 2) are turned, (n,) in radians: by as much
    as a head is tilted beyond TILTED. Of a scheme without eyes none is.
    """
    if scheme.eyes is None:
        return numpy.zeros(len(points))
    rolls = crop.rolls(points, scheme)
    return numpy.sign(rolls) * numpy.maximum(abs(rolls) - TILTED, 0)


def place_crops(predictor, points):
    """Nominal crops (n, 4) around landmarks (n, K, 2) in pixels, and how far they are turned."""
    rolls = crop_rolls(points, predictor.scheme)
    if not rolls.any():
        return crop.face_boxes(points, predictor.crop, predictor.scheme), rolls
    middle = points.mean(1)
    boxes = crop.face_boxes(crop.turn(points, middle, -rolls), predictor.crop, predictor.scheme)
    centre = (boxes[:, None, :2] + boxes[:, None, 2:]) / 2
    shift = (crop.turn(centre, middle, rolls) - centre)[:, 0]
    return boxes + numpy.concatenate([shift, shift], 1), rolls


def refine(predictor, image, boxes, passes=4):
    """Landmarks from rough nominal crops (n, 4) in pixels, as `Detector.to_crop` gives.

    The first pass also tries heads that are turned, however far, where an upright one is doubtful.
    Each pass after it lays the crop again around the landmarks by the training rule, from the third
    one on only where that has just moved it by more than TOLERANCE. Returns points (n, K, 2) in
    pixels, confidence (n, K) and the crops (n, 4) of the last pass.
    """
    boxes = numpy.asarray(boxes, numpy.float64).reshape(-1, 4)
    points, confidence, boxes = _begin(predictor, image, boxes)
    again = numpy.arange(len(boxes))
    for _ in range(passes - 1):
        if not len(again):
            break
        laid, rolls = place_crops(predictor, points[again])
        far = [has_moved(*pair) for pair in zip(boxes[again], laid)]
        boxes[again] = laid
        points[again], confidence[again] = predict_boxes(predictor, image, laid, rolls)
        again = again[far]
    return points, confidence, boxes


def _begin(predictor, image, boxes):
    """landmarks() of rough crops (n, 4), each turned as the network is surest, and those crops."""
    points, confidence = predict_boxes(predictor, image, boxes)
    boxes = boxes.copy()
    if predictor.scheme.eyes is None:
        return points, confidence, boxes
    least = OF_FACES * getattr(predictor, "eyes", EyeThresholds()).face
    for i in numpy.flatnonzero(confidence.mean(1) < SURE):
        crops = _turned(boxes[i])
        turned = predict_boxes(predictor, image, crops, TURNS)
        best = turned[1].mean(1).argmax()
        if turned[1][best].mean() > max(least, SURER * confidence[i].mean()):
            points[i], confidence[i], boxes[i] = turned[0][best], turned[1][best], crops[best]
    return points, confidence, boxes


def _turned(box):
    """The crops (4,) of a detector's box for heads turned by each of TURNS."""
    centre = (box[:2] + box[2:]) / 2
    middle = centre - (0, BELOW * (box[3] - box[1]))
    shift = crop.turn(centre[None, None], middle[None], TURNS)[:, 0] - centre
    return box + numpy.concatenate([shift, shift], 1)


def has_moved(box, other):
    """Whether a face of box (4,) should be looked at again in the crop other (4,)."""
    box, other = box.tolist(), other.tolist()  # Plain numbers: numpy is slow on so few.
    farthest = max(abs(a - b) for a, b in zip(box, other))
    return farthest > TOLERANCE * max(box[2] - box[0], box[3] - box[1])
