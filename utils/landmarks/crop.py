"""Crop geometry: the box around a face, and the maps between photo pixels and crop units.

Prepared sets, evaluation, ONNX files and the demo all crop by the same rule: `face_box` gives the
nominal box, `cut` resamples the photo, and `to_crop` and `to_photo` convert landmarks. A landmark
in crop units is 0..1 inside the box. `roll_angles`, `rotate` and `face_boxes` serve the refinement
of detected faces (utils/detection/refine.py).
"""
from __future__ import annotations

import math
import typing

import cv2
import numpy

from utils.errors import UserError

if typing.TYPE_CHECKING:
    from utils.landmarks.schemes import Scheme

RULES = ("square", "stretch", "box")
# The crop of the authors' code, in which published NMEs are measured. Sets without set.yaml, such
# as LMK.zip, use it.
PUBLISHED_CROP = {"rule": "stretch", "scale": 1.1}
# Lower limit of the shorter side of the landmarks' box, as a share of the longer one: points on one
# line have a box without height.
MIN_ASPECT = 0.1


def face_box(points_px: numpy.ndarray, rule: str = "square", scale: float = 1.2,
             box: numpy.ndarray | None = None) -> numpy.ndarray:
    """Compute the nominal crop of a face from its landmarks.

    Args:
        points_px: landmarks (K, 2) in pixels; NaN points are ignored.
        rule: `square`: a square with the longer side of the landmarks' box. `stretch`: the
            landmarks' box itself, each side at least MIN_ASPECT of the other (published for 300W).
            `box`: the publisher's face box.
        scale: factor of the sides.
        box: the publisher's face box, for rule `box`.

    Returns:
        (x_min, y_min, x_max, y_max) in pixels.

    Raises:
        UserError: an unknown rule, rule `box` without a box, or a box without area.
    """
    if rule == "box":
        if box is None:
            raise UserError("crop rule box: the annotation has no face box; use square or stretch")
        x_min, y_min, x_max, y_max = (float(v) for v in box)
    else:
        known = points_px[numpy.isfinite(points_px).all(1)]
        if not len(known):
            raise UserError("none of its points is labelled, so that it has no crop")
        x_min, y_min = (float(v) for v in known.min(0))
        x_max, y_max = (float(v) for v in known.max(0))
    width, height = x_max - x_min, y_max - y_min
    if rule == "square":
        width = height = max(width, height)
    elif rule == "stretch":
        width, height = max(width, MIN_ASPECT * height), max(height, MIN_ASPECT * width)
    elif rule not in RULES:
        raise UserError(f"unknown crop rule {rule!r}; known: {', '.join(RULES)}")
    if not (width > 0 and height > 0):
        raise UserError(f"the face is {width:g} x {height:g} pixels, so that it has no crop")
    centre_x, centre_y = (x_min + x_max) / 2, (y_min + y_max) / 2
    half_w, half_h = width * scale / 2, height * scale / 2
    return numpy.array([centre_x - half_w, centre_y - half_h,
                        centre_x + half_w, centre_y + half_h])


def face_boxes(points_px: numpy.ndarray, crop: dict, scheme: Scheme) -> numpy.ndarray:
    """Compute the nominal crops of many predicted faces.

    For a subset of a scheme and for rule `box`, the landmarks' box does not determine the crop.
    There the crop is the unit square under the similarity that fits the mean face to the landmarks.

    Args:
        points_px: landmarks (n, K, 2) in pixels.
        crop: {"rule", "scale"} of the model.
        scheme: landmark scheme of the K points.

    Returns:
        Boxes (n, 4) in pixels.
    """
    rule, scale = crop["rule"], crop["scale"]
    if rule != "box" and scheme.base is None:
        low, high = points_px.min(1), points_px.max(1)
        side = numpy.maximum(high - low, 1.0)
        min_aspect = 1 if rule == "square" else MIN_ASPECT
        half = numpy.maximum(side, min_aspect * side.max(1, keepdims=True)) * (scale / 2)
        middle = (low + high) / 2
        return numpy.concatenate([middle - half, middle + half], 1)
    similarity = _fit_similarity(points_px, scheme)
    middle = similarity * ((0.5 - scheme.mean_face.mean(0)) @ (1, 1j))
    centre = points_px.mean(1) + numpy.stack([middle.real, middle.imag], 1)
    half = numpy.maximum(abs(similarity), 1.0)[:, None] / 2
    return numpy.concatenate([centre - half, centre + half], 1)


def _fit_similarity(points_px, scheme):
    """Fit the mean face to landmarks (n, K, 2): z * mean + centre = points, by least squares.

    z (n,) is complex: |z| is in pixels per crop unit, and its angle is the rotation.
    """
    mean = scheme.mean_face
    source = (mean - mean.mean(0)) @ (1, 1j)
    target = (points_px - points_px.mean(1)[:, None]) @ (1, 1j)
    return target @ source.conj() / max((abs(source) ** 2).sum(), 1e-12)


def grow(box: numpy.ndarray, factor: float) -> numpy.ndarray:
    """Scale the sides of boxes (..., 4) about their centres."""
    box = numpy.asarray(box, numpy.float64)
    centre = (box[..., :2] + box[..., 2:]) / 2
    half = (box[..., 2:] - box[..., :2]) / 2 * factor
    return numpy.concatenate([centre - half, centre + half], -1)


def to_crop(points_px: numpy.ndarray, box: numpy.ndarray) -> numpy.ndarray:
    """Convert photo pixels (..., K, 2) to crop units of box (..., 4)."""
    box = numpy.asarray(box)[..., None, :]
    return (numpy.asarray(points_px) - box[..., :2]) / (box[..., 2:] - box[..., :2])


def to_photo(points: numpy.ndarray, box: numpy.ndarray) -> numpy.ndarray:
    """Convert crop units (..., K, 2) of box (..., 4) to photo pixels; the inverse of to_crop."""
    box = numpy.asarray(box)[..., None, :]
    return numpy.asarray(points) * (box[..., 2:] - box[..., :2]) + box[..., :2]


def crop_matrix(box: numpy.ndarray, size: int) -> numpy.ndarray:
    """Return the 2 x 3 affine map from photo pixels to pixels of a size x size crop of box (4,).

    Crop unit u lies at pixel u * size - 0.5. Pixel centres are at whole numbers in both images, and
    a landmark's cell is floor(u * grid) at every crop size.
    """
    scale_x, scale_y = size / (box[2] - box[0]), size / (box[3] - box[1])
    return numpy.array([[scale_x, 0, -box[0] * scale_x - 0.5],
                        [0, scale_y, -box[1] * scale_y - 0.5]])


def roll_angles(points_px: numpy.ndarray, scheme: Scheme) -> numpy.ndarray:
    """Compute the in-plane rotation of faces against the mean face.

    Args:
        points_px: landmarks (n, K, 2) in pixels.
        scheme: landmark scheme of the K points.

    Returns:
        Angles (n,) in radians, clockwise in the image.
    """
    return numpy.angle(_fit_similarity(points_px, scheme))


def rotate(points_px: numpy.ndarray, centre: numpy.ndarray, roll: numpy.ndarray) -> numpy.ndarray:
    """Rotate points (n, K, 2) clockwise by roll (n,) in radians about centre (n, 2)."""
    rotated = (points_px - centre[:, None]) @ (1, 1j) * numpy.exp(1j * roll)[:, None]
    return numpy.stack([rotated.real, rotated.imag], -1) + centre[:, None]


def cut(photo: numpy.ndarray, box: numpy.ndarray, size: int, roll: float = 0.0) -> numpy.ndarray:
    """Resample a box of a photo to a square crop; black outside the photo.

    Pixels are resampled once. If the crop is less than half as large as the box, the photo is first
    averaged down by a whole number, so that large faces do not alias.

    Args:
        photo: (H, W, 3), uint8.
        box: (x_min, y_min, x_max, y_max) in pixels.
        size: side of the crop in pixels.
        roll: rotation of the box about its centre in radians, clockwise.

    Returns:
        (size, size, 3), uint8.
    """
    shrink = int(min((box[2] - box[0]), (box[3] - box[1])) / size)
    if shrink >= 2:
        around = grow(box, abs(math.cos(roll)) + abs(math.sin(roll)))
        x_min, y_min = (max(int(v), 0) for v in numpy.floor(around[:2]))
        x_max, y_max = int(numpy.ceil(around[2])) + shrink, int(numpy.ceil(around[3])) + shrink
        part = photo[y_min:y_max, x_min:x_max]
        height, width = (length // shrink for length in part.shape[:2])
        if height and width:
            # A whole number takes a fifth of the time of a fraction, with the same accuracy: NME
            # of `tiny` on LFPW faces, small ones enlarged to 270 px, 3.233 against 3.237.
            photo = cv2.resize(part[:height * shrink, :width * shrink], (width, height),
                               interpolation=cv2.INTER_AREA)
            # Pixel centres: x maps to (x - x_min + 0.5) / shrink - 0.5 in the smaller image.
            box = (numpy.asarray(box) - (x_min, y_min, x_min, y_min) + 0.5) / shrink - 0.5
    matrix = crop_matrix(box, size)
    if roll:
        centre = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
        upright = cv2.getRotationMatrix2D(centre, math.degrees(roll), 1)
        matrix = matrix @ numpy.vstack([upright, (0, 0, 1)])
    return cv2.warpAffine(photo, matrix, (size, size), flags=cv2.INTER_LINEAR)


def disable_opencv_threads() -> None:
    """Run OpenCV in one thread; call this before forking processes that use OpenCV.

    OpenCV's threads do not survive a fork, and a child that starts or stops them hangs.
    """
    cv2.setNumThreads(1)
