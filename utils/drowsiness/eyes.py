"""Eye state in one image: how open each eye is, and whether both are closed.

`read_eyes` turns the landmarks of a face into eye aspect ratios, converts these to openness with
the thresholds that come with the model, and leaves out eyes that are too small, turned away,
uncertain or outside the image. `utils.drowsiness.states` follows the result over time.
"""
from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy

from utils.landmarks.eyelids import aspect_ratios

if TYPE_CHECKING:
    from utils.landmarks.eyelids import EyeThresholds
    from utils.landmarks.schemes import Scheme

# Smallest width of an eye between its corners in pixels. On 209 faces with open and closed eyes,
# reduced in size, the area under the ROC curve falls from 0.996 (10 px) over 0.994 (8 px) and 0.986
# (6 px) to 0.958 (4 px), which is still useful for a small face.
MIN_WIDTH = 4.0
# Smallest width of an eye as a share of the other one's: a narrower eye is turned away.
MIN_WIDTH_RATIO = 0.45


@dataclasses.dataclass(frozen=True)
class Eyes:
    """The eyes of a face in one image.

    Attributes:
        openness: of the right and left eye, 0 (closed) to 1; None for an eye that cannot be judged.
        closed: whether the eyes are closed; None where neither can be judged.
        ratios: eye aspect ratios of the right and left eye.
        down: probability that the right and left eye look down, with the lid lowered and the iris
            in sight; None for an eye that cannot be judged, or where this was not asked for.
        looks_down: whether the face looks down, `closed` is False then; None where not known.
    """
    openness: tuple[float | None, float | None]
    closed: bool | None
    ratios: tuple[float, float]
    down: tuple[float | None, float | None] = (None, None)
    looks_down: bool | None = None


def read_eyes(points_px: numpy.ndarray, confidence: numpy.ndarray, scheme: Scheme,
              thresholds: EyeThresholds, shape: tuple[int, ...] | None = None,
              image: numpy.ndarray | None = None) -> Eyes:
    """Read the eyes of a face from its landmarks.

    The openness is a linear function of the eye aspect ratio (Soukupova and Cech, "Real-Time Eye
    Blink Detection using Facial Landmarks", 2016), see EyeThresholds.

    Args:
        points_px: landmarks (K, 2) in pixels, without smoothing.
        confidence: (K,).
        scheme: of the landmarks.
        thresholds: of the model that predicted them.
        shape: (H, W, ...) of the image; eyes outside of it are not judged. None: not known.
        image: RGB uint8 (H, W, 3), in which eyes that look down are told from closed ones; None:
            `down` and `looks_down` are not known.

    Raises:
        UserError: where the scheme has no eye contours.
    """
    ratios = tuple(float(ratio) for ratio in aspect_ratios(points_px, scheme))
    corners = [[contour[0], contour[len(contour) // 2]] for contour in scheme.eyes]
    widths = [float(numpy.linalg.norm(points_px[b] - points_px[a])) for a, b in corners]
    min_width = max(MIN_WIDTH, MIN_WIDTH_RATIO * max(widths))
    openness = tuple(
        float(thresholds.openness(ratio))
        if width >= min_width and confidence[contour].mean() >= thresholds.min_confidence
        and (shape is None or _is_inside(points_px[contour], shape)) else None
        for ratio, width, contour in zip(ratios, widths, scheme.eyes))
    judged = [value for value in openness if value is not None]
    closed = bool(sum(judged) / len(judged) <= thresholds.closed_below) if judged else None
    return Eyes(openness, closed, ratios)


def _is_inside(points_px, shape):
    return bool((points_px >= 0).all() and (points_px <= (shape[1] - 1, shape[0] - 1)).all())
