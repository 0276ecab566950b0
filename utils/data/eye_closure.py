"""Augmentation that closes the eyes of a face: eyelids and their landmarks are moved together.

Each column of an eye is stretched so that the skin above and below the eye covers the eyeball up to
the line where the lids meet. The landmarks follow the same curves (eyelids.close), so they are
exact.
"""
from __future__ import annotations

import typing
from collections.abc import Callable

import cv2
import numpy
import torch

from utils.data.pixel_grid import PixelGrid, sample_bilinear
from utils.landmarks import eyelids
from utils.landmarks.schemes import Scheme

# How far above the upper and below the lower lid skin is stretched, in widths of the eye: up to the
# brow, and half way down to the cheekbone.
ABOVE, BELOW = 0.55, 0.4
# Height in widths of the eye of the dark edge with the lashes, which moves with the upper lid.
LASHES = 0.04
# Share of the faces whose eyes are closed completely. The others are closed partly, so that a model
# sees half-closed eyes too.
FULLY_CLOSED = 0.7


class EyeClosure(typing.NamedTuple):
    """Parameters of the operation.

    Attributes:
        points: landmarks before closing, (K, 2) float64 in pixels.
        share: how far the lids move, 0 (not at all) to 1 (until they meet).
        scheme: the landmarks' Scheme, which has eye contours.
    """
    points: numpy.ndarray
    share: float
    scheme: Scheme


def draw_closure(landmarks: numpy.ndarray, size: int, scheme: Scheme, rng: numpy.random.Generator
                 ) -> tuple[EyeClosure, numpy.ndarray]:
    """Draw how far the eyes of a face are closed.

    Args:
        landmarks: (K, 2) float64 in crop units.
        size: side of the image in pixels.
        scheme: the landmarks' Scheme.
        rng: generator of the sample.

    Returns:
        The EyeClosure, and the landmarks with closed eyes, (K, 2) float64 in crop units.
    """
    share = 1.0 if rng.random() < FULLY_CLOSED else rng.random()
    points = landmarks * size - 0.5
    return (EyeClosure(points, share, scheme),
            (eyelids.close(points, scheme, share) + 0.5) / size)


def close_eyes_opencv(image: numpy.ndarray, closure: EyeClosure) -> numpy.ndarray:
    """Draw the eyelids of a face together.

    Nothing moves beyond brow and cheek. An eye with a missing landmark (NaN) is left as it is.

    Args:
        image: (S, S, 3) uint8; it is not modified.
        closure: the landmarks and how far their lids move.

    Returns:
        (S, S, 3) uint8.
    """
    for contour in closure.scheme.eyes:
        if not numpy.isnan(closure.points[contour]).any():
            image = _close_eye(image, eyelids.Eye(closure.points, contour), closure.share)
    return image


def _close_eye(image, eye, share):
    height, width = image.shape[:2]
    middle = eye.origin + eye.along / 2
    reach = eye.width * 1.2
    left, top = numpy.maximum(numpy.floor(middle - reach), 0).astype(int)
    right, bottom = numpy.minimum(numpy.ceil(middle + reach) + 1, (width, height)).astype(int)
    if right - left < 2 or bottom - top < 2 or eye.width < 2:
        return image
    grid = numpy.stack(numpy.meshgrid(numpy.arange(left, right), numpy.arange(top, bottom)), -1)
    local = eye.to_local(grid.astype(numpy.float64))
    s, t = local[..., 0], local[..., 1]
    upper, lower, meeting = (eye.height(curve, s)
                             for curve in (eye.upper, eye.lower, eye.meeting))
    source = _source_heights(t, upper, numpy.maximum(lower, upper), meeting, share, numpy.where)
    local[..., 1] = numpy.where((s > 0) & (s < 1), source, t)
    at = eye.from_local(local).astype(numpy.float32)
    image = image.copy()
    image[top:bottom, left:right] = cv2.remap(image, at[..., 0], at[..., 1], cv2.INTER_LINEAR,
                                              borderMode=cv2.BORDER_REPLICATE)
    return image


def _source_heights(t, upper, lower, meeting, share, where: Callable):
    """Height in the open eye that each pixel of the closed eye shows; arrays or tensors.

    Heights are in widths of the eye, downwards from the line through its corners. t: of the pixels;
    upper, lower, meeting: of the lids and of the line where they meet, in the pixels' columns.
    """
    # Pixels of a column move between these two heights only.
    first, last = upper - ABOVE, lower + BELOW
    lashes = ((lower - upper) / 2).clip(max=LASHES)
    new_upper = upper + share * (meeting - upper)
    new_lower = lower + share * (meeting - lower)
    from_upper = upper + share * lashes
    above = first + (t - first) * (from_upper - first) / (new_upper - first).clip(min=1e-6)
    below = last - (last - t) * (last - lower) / (last - new_lower).clip(min=1e-6)
    between = from_upper + (t - new_upper) * (lower - from_upper) \
        / (new_lower - new_upper).clip(min=1e-6)
    moved = where(t < new_upper, above, where(t > new_lower, below, between))
    return where((t > first) & (t < last), moved, t)


def close_eyes_torch(images: torch.Tensor, closures: list[EyeClosure],
                     grid: PixelGrid) -> torch.Tensor:
    """Draw the eyelids of a batch together, as close_eyes_opencv; images are (N, 3, S, S) float."""
    for side in range(2):
        rows = numpy.array([_eye_numbers(closure, side) for closure in closures])
        (x, y, along_x, along_y, across_x, across_y, scale, upper_base, upper_skew, lower_base,
         lower_skew, meeting_base, meeting_skew, share) = grid.send(rows)[..., None, None].unbind(1)
        offset_x, offset_y = grid.x - x, grid.y - y
        # Column and height in widths of the eye, from its first corner.
        s = (offset_x * along_x + offset_y * along_y) * scale
        t = (offset_x * across_x + offset_y * across_y) * scale
        upper = _lid_height(upper_base, upper_skew, s)
        lower = torch.maximum(_lid_height(lower_base, lower_skew, s), upper)
        meeting = _lid_height(meeting_base, meeting_skew, s)
        source = _source_heights(t, upper, lower, meeting, share, torch.where)
        moved = torch.where((s > 0) & (s < 1), source, t) - t
        images = sample_bilinear(images, grid.x + moved * across_x, grid.y + moved * across_y,
                                 "border").round_()
    return images


def _eye_numbers(closure, side):
    """An eyelids.Eye and the share as 14 numbers; zeros, which move nothing, for an unusable eye.

    x and y of origin, along and across; 1 / width^2; base and skew of three lid curves; share.
    """
    contour = closure.scheme.eyes[side]
    missing = numpy.isnan(closure.points[contour]).any()
    eye = None if missing else eyelids.Eye(closure.points, contour)
    if eye is None or eye.width < 2:
        return numpy.zeros(14)
    return numpy.concatenate([eye.origin, eye.along, eye.across, [eye.width ** -2], eye.upper,
                              eye.lower, eye.meeting, [closure.share]])


def _lid_height(base, skew, s):
    """Height of a lid at columns s, as Eye.height."""
    s = s.clamp(0, 1)
    return s * (1 - s) * (base + skew * s)
