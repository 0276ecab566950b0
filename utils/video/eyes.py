"""Eyes in one picture, read from landmarks: how open each is, and whether both are shut."""
import dataclasses

import numpy

from utils.errors import UserError

# An eye of fewer pixels from corner to corner is not judged, nor one so much narrower than the
# other: the face is turned away from it.
SMALLEST, NARROWEST = 6.0, 0.45


@dataclasses.dataclass(frozen=True)
class Limits:
    """Eye aspect ratios of shut and open eyes, and the openness below which eyes are closed.

    The defaults are of annotations: median 0.327 and second percentile 0.057 of the 4024 eyes in
    2012 training photos of 300W; closed as in PERCLOS P80, shut by 80 % or more.
    """
    shut: float = 0.06
    open: float = 0.32
    closed_below: float = 0.2
    min_confidence: float = 0.0


@dataclasses.dataclass(frozen=True)
class Eyes:
    """What one picture says of a face's eyes.

    openness (right, left): 0 (shut) to 1, or None where the eye cannot be judged. closed: whether
    they are shut; None where neither can be judged. ratios (right, left): eye aspect ratios.
    """
    openness: tuple
    closed: bool | None
    ratios: tuple


def look(points_px, confidence, scheme, limits):
    """The Eyes of a face: landmarks (K, 2) as predicted, in pixels, and their confidence (K,).

    Raises UserError where the scheme has no eye contours.
    """
    ratios = aspect_ratios(points_px, scheme)
    ends = [[contour[0], contour[len(contour) // 2]] for contour in scheme.eyes]
    widths = [float(numpy.linalg.norm(points_px[b] - points_px[a])) for a, b in ends]
    least = max(SMALLEST, NARROWEST * max(widths))
    openness = tuple(
        min(max((ratio - limits.shut) / (limits.open - limits.shut), 0.0), 1.0)
        if width >= least and confidence[contour].mean() >= limits.min_confidence else None
        for ratio, width, contour in zip(ratios, widths, scheme.eyes))
    judged = [value for value in openness if value is not None]
    closed = sum(judged) / len(judged) <= limits.closed_below if judged else None
    return Eyes(openness, closed, ratios)


def aspect_ratios(points, scheme):
    """Eye aspect ratios (right, left) of landmarks (K, 2), in any unit.

    Mean distance of opposite lid points over the distance of the corners (Soukupova and Cech,
    2016). Raises UserError where the scheme has no eye contours.
    """
    if scheme.eyes is None:
        raise UserError(f"the eyes need contours, which scheme {scheme.name} has not; use weights "
                        f"of 68, 98, 106 or 12 (eyes) points")
    ratios = []
    for contour in scheme.eyes:
        eye = numpy.asarray(points, numpy.float64)[contour]
        half = len(eye) // 2
        upper, lower = eye[1:half], eye[:half:-1]
        width = max(numpy.linalg.norm(eye[half] - eye[0]), 1e-9)
        ratios.append(float(numpy.linalg.norm(upper - lower, axis=1).mean() / width))
    return tuple(ratios)
