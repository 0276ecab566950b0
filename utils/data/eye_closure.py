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

from utils.data.pixel_grid import PixelGrid
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


def pack_closures(closures: list[EyeClosure], size: int) -> dict[str, numpy.ndarray]:
    """Return the numbers of both eyes (N, 2, 15) that close_eyes_torch takes; see _eye_numbers."""
    return {"eyes": numpy.array([[_eye_numbers(closure, side, size) for side in range(2)]
                                 for closure in closures])}


def close_eyes_torch(images: torch.Tensor, packed: dict[str, torch.Tensor],
                     grid: PixelGrid) -> torch.Tensor:
    """Draw the eyelids of a batch together, as close_eyes_opencv; images are (N, 3, S, S) float.

    Both eyes move in one resampling. Their columns overlap in no face that shows both.
    """
    numbers = packed["eyes"]
    (s_x, s_y, s_start, t_x, t_y, t_start, upper_base, upper_skew, lower_base, lower_skew,
     meeting_base, meeting_skew, share) = numbers[..., :13, None, None].unbind(2)
    # Column and height in widths of the eye, from its first corner: (N, 2, S, S).
    s = torch.addcmul(torch.addcmul(s_start, s_x, grid.x), s_y, grid.y)
    t = torch.addcmul(torch.addcmul(t_start, t_x, grid.x), t_y, grid.y)
    inside = s.clamp(0, 1)
    bump = inside * (1 - inside)
    upper = bump * torch.addcmul(upper_base, upper_skew, inside)
    lower = torch.maximum(bump * torch.addcmul(lower_base, lower_skew, inside), upper)
    meeting = bump * torch.addcmul(meeting_base, meeting_skew, inside)
    source = _source_heights(t, upper, lower, meeting, share, torch.where)
    # The bump is 0 in other columns.
    moved = torch.where(bump > 0, source - t, 0)[..., None]
    at = grid.unit + (moved * numbers[:, :, None, None, 13:]).sum(1)
    return torch.nn.functional.grid_sample(images, at, padding_mode="border",
                                           align_corners=False).round_()


def _eye_numbers(closure, side, size):
    """An eyelids.Eye and the share as 15 numbers; zeros, which move nothing, for an unusable eye.

    Column s and height t as linear functions of x and y (factors of x and y, value at the origin);
    base and skew of three lid curves; share; and (x, y) of a step of one in t, in halves of the
    image's side.
    """
    contour = closure.scheme.eyes[side]
    missing = numpy.isnan(closure.points[contour]).any()
    eye = None if missing else eyelids.Eye(closure.points, contour)
    if eye is None or eye.width < 2:
        return numpy.zeros(15)
    along, across = eye.along / eye.width ** 2, eye.across / eye.width ** 2
    return numpy.concatenate([along, [-along @ eye.origin], across, [-across @ eye.origin],
                              eye.upper, eye.lower, eye.meeting, [closure.share],
                              eye.across * 2 / size])
