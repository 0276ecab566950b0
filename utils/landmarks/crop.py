"""How a crop is laid around landmarks: the same for prepared sets, test, ONNX and demo."""
import math

import cv2
import numpy

from utils.errors import UserError

RULES = ("square", "stretch", "box")
# The authors' crop, in which published NMEs are measured; sets without set.yaml (LMK.zip and its
# like) were made with it.
PUBLISHED_CROP = {"rule": "stretch", "scale": 1.1}
# Least share of the longer side of the landmarks' box that the shorter one counts as: two points,
# or points in one line, have a box without height.
FLATTEST = 0.1


def face_box(points_px, rule="square", scale=1.2, box=None):
    """The nominal crop (x_min, y_min, x_max, y_max) in pixels around landmarks (K, 2) in pixels.

    rule: `square`, side = the larger side of the landmarks' box, grown by scale (keeps the aspect);
    `stretch`, each side of the landmarks' box, at least FLATTEST of the other, grown by scale (as
    published for 300W); `box`, the publisher's box grown by scale. Points that are NaN are missing
    and do not count. Raises UserError for `box` without a box and for points all at one place.
    """
    if rule == "box":
        if box is None:
            raise UserError("crop rule box: the annotation has no face box; use square or stretch")
        x_min, y_min, x_max, y_max = (float(v) for v in box)
    else:
        known = points_px[numpy.isfinite(points_px).all(1)]
        if not len(known):
            raise UserError("none of its points is labelled: no crop can be laid round it")
        x_min, y_min = (float(v) for v in known.min(0))
        x_max, y_max = (float(v) for v in known.max(0))
    width, height = x_max - x_min, y_max - y_min
    if rule == "square":
        width = height = max(width, height)
    elif rule == "stretch":
        width, height = max(width, FLATTEST * height), max(height, FLATTEST * width)
    elif rule not in RULES:
        raise UserError(f"unknown crop rule {rule!r}; known: {', '.join(RULES)}")
    if not (width > 0 and height > 0):
        raise UserError(f"the face is {width:g} x {height:g} pixels: no crop can be laid round it")
    centre_x, centre_y = (x_min + x_max) / 2, (y_min + y_max) / 2
    half_w, half_h = width * scale / 2, height * scale / 2
    return numpy.array([centre_x - half_w, centre_y - half_h,
                        centre_x + half_w, centre_y + half_h])


def face_boxes(points_px, crop, scheme):
    """`face_box` of many faces as predicted: nominal crops (n, 4) around landmarks (n, K, 2).

    crop: {"rule", "scale"} as a model keeps it. A subset of a scheme, or a publisher's box, says
    nothing of the crop by itself: there it is where the similarity that best fits the mean face to
    the landmarks puts the unit square.
    """
    rule, scale = crop["rule"], crop["scale"]
    if rule != "box" and scheme.base is None:
        low, high = points_px.min(1), points_px.max(1)
        side = numpy.maximum(high - low, 1.0)
        least = 1 if rule == "square" else FLATTEST
        half = numpy.maximum(side, least * side.max(1, keepdims=True)) * (scale / 2)
        middle = (low + high) / 2
        return numpy.concatenate([middle - half, middle + half], 1)
    turn = _fit(points_px, scheme)
    middle = turn * ((0.5 - scheme.mean_face.mean(0)) @ (1, 1j))
    centre = points_px.mean(1) + numpy.stack([middle.real, middle.imag], 1)
    half = numpy.maximum(abs(turn), 1.0)[:, None] / 2
    return numpy.concatenate([centre - half, centre + half], 1)


def _fit(points_px, scheme):
    """The turn and the size of the similarity that best lays the mean face on landmarks (n, K, 2):
    complex numbers z (n,), least squares of z * mean + centre = points; |z| is pixels per crop
    unit.
    """
    mean = scheme.mean_face
    source = (mean - mean.mean(0)) @ (1, 1j)
    target = (points_px - points_px.mean(1)[:, None]) @ (1, 1j)
    return target @ source.conj() / max((abs(source) ** 2).sum(), 1e-12)


def grow(box, factor):
    """Boxes (..., 4) with the same centres, sides times factor."""
    box = numpy.asarray(box, numpy.float64)
    centre = (box[..., :2] + box[..., 2:]) / 2
    half = (box[..., 2:] - box[..., :2]) / 2 * factor
    return numpy.concatenate([centre - half, centre + half], -1)


def to_crop(points_px, box):
    """Photo pixels (..., K, 2) to crop units of box (..., 4)."""
    box = numpy.asarray(box)[..., None, :]
    return (numpy.asarray(points_px) - box[..., :2]) / (box[..., 2:] - box[..., :2])


def to_photo(points, box):
    """Crop units (..., K, 2) to photo pixels; the inverse of to_crop."""
    box = numpy.asarray(box)[..., None, :]
    return numpy.asarray(points) * (box[..., 2:] - box[..., :2]) + box[..., :2]


def crop_matrix(box, size):
    """The 2 x 3 affine map from photo pixels to pixels of a size x size crop of box.

    Crop unit u lies at pixel u * size - 0.5: pixel centres are at whole numbers in both images, and
    a landmark's cell is floor(u * grid) without a shift between scales.
    """
    scale_x, scale_y = size / (box[2] - box[0]), size / (box[3] - box[1])
    return numpy.array([[scale_x, 0, -box[0] * scale_x - 0.5],
                        [0, scale_y, -box[1] * scale_y - 0.5]])


def rolls(points_px, scheme):
    """How far faces with landmarks (n, K, 2) are turned in the picture against the mean face, (n,)
    in radians, clockwise as the picture shows it.
    """
    return numpy.angle(_fit(points_px, scheme))


def turn(points_px, centre, roll):
    """Points (n, K, 2) turned clockwise by roll (n,) in radians about their centre (n, 2)."""
    found = (points_px - centre[:, None]) @ (1, 1j) * numpy.exp(1j * roll)[:, None]
    return numpy.stack([found.real, found.imag], -1) + centre[:, None]


def cut(photo, box, size, roll=0.0):
    """The size x size crop of box from a photo (H, W, 3) uint8; black outside the photo.

    roll: how far the box is turned clockwise about its centre, in radians. One resampling; where
    the crop is less than half as large as the box the photo is averaged down first (pixel area) by
    a whole number, so that large faces do not alias.
    """
    shrink = int(min((box[2] - box[0]), (box[3] - box[1])) / size)
    if shrink >= 2:
        around = grow(box, abs(math.cos(roll)) + abs(math.sin(roll)))
        x_min, y_min = (max(int(v), 0) for v in numpy.floor(around[:2]))
        x_max, y_max = int(numpy.ceil(around[2])) + shrink, int(numpy.ceil(around[3])) + shrink
        part = photo[y_min:y_max, x_min:x_max]
        height, width = (length // shrink for length in part.shape[:2])
        if height and width:
            # By a whole number it takes a fifth of the time, and the landmarks are as good: NME of
            # tiny on LFPW faces, small ones enlarged to 270 px, 3.233; by a broken number 3.237.
            photo = cv2.resize(part[:height * shrink, :width * shrink], (width, height),
                               interpolation=cv2.INTER_AREA)
            # Pixel centres: x lies (x - x_min + 0.5) / shrink - 0.5 in the smaller image.
            box = (numpy.asarray(box) - (x_min, y_min, x_min, y_min) + 0.5) / shrink - 0.5
    matrix = crop_matrix(box, size)
    if roll:
        centre = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
        upright = cv2.getRotationMatrix2D(centre, math.degrees(roll), 1)
        matrix = matrix @ numpy.vstack([upright, (0, 0, 1)])
    return cv2.warpAffine(photo, matrix, (size, size), flags=cv2.INTER_LINEAR)


def prepare_fork():
    """Call before processes are forked that use OpenCV; it then works in one thread each.

    OpenCV's threads do not live on in a fork, and a child that starts or stops them waits for ever.
    """
    cv2.setNumThreads(1)
