"""Eyes in one picture, read from landmarks: how open each is, and whether both are shut."""
import dataclasses

import numpy

from utils.landmarks.eyelids import EyeThresholds, aspect_ratios

__all__ = ["Eyes", "EyeThresholds", "aspect_ratios", "look"]

# An eye of fewer pixels from corner to corner is not judged: on 209 faces of ../shared/data/eyes,
# reduced, the area under the ROC curve falls from 0.996 (10 px) over 0.994 (8 px) and 0.986 (6 px)
# to 0.958 (4 px), which still beats saying nothing of a small face. Nor is one judged that is so
# much narrower than the other: the face is turned away from it.
SMALLEST, NARROWEST = 4.0, 0.45


@dataclasses.dataclass(frozen=True)
class Eyes:
    """What one picture says of a face's eyes.

    openness (right, left): 0 (shut) to 1, or None where the eye cannot be judged. closed: whether
    they are shut; None where neither can be judged. ratios (right, left): eye aspect ratios.
    """
    openness: tuple
    closed: bool | None
    ratios: tuple


def look(points_px, confidence, scheme, limits, shape=None):
    """The Eyes of a face: landmarks (K, 2) as predicted, in pixels, and their confidence (K,).

    shape (H, W, ...): of the picture, outside of which no eye is judged; None where that is not
    known. Raises UserError where the scheme has no eye contours.
    """
    ratios = tuple(float(ratio) for ratio in aspect_ratios(points_px, scheme))
    ends = [[contour[0], contour[len(contour) // 2]] for contour in scheme.eyes]
    widths = [float(numpy.linalg.norm(points_px[b] - points_px[a])) for a, b in ends]
    least = max(SMALLEST, NARROWEST * max(widths))
    openness = tuple(
        float(limits.openness(ratio))
        if width >= least and confidence[contour].mean() >= limits.min_confidence
        and (shape is None or _is_inside(points_px[contour], shape)) else None
        for ratio, width, contour in zip(ratios, widths, scheme.eyes))
    judged = [value for value in openness if value is not None]
    closed = bool(sum(judged) / len(judged) <= limits.closed_below) if judged else None
    return Eyes(openness, closed, ratios)


def _is_inside(points_px, shape):
    return bool((points_px >= 0).all() and (points_px <= (shape[1] - 1, shape[0] - 1)).all())
