"""Eyelids as landmarks: how far an eye is open, and where its lids lie when they meet."""
import dataclasses

import numpy

from utils.errors import UserError

# Where shut lids meet, between the open lids: the upper lid does most of the way. Chosen on the
# shut faces of ../shared/data/eyes, see README.
UPPER_SHARE = 0.3
# Eye aspect ratio below which an annotated eye counts as shut, or on the way: 4.3 % of the 4024
# eyes in 2012 training photos of 300W.
NEARLY_SHUT = 0.15


@dataclasses.dataclass(frozen=True)
class EyeThresholds:
    """What a model sees where eyes are shut, where they are open, and of any face; see --fit-eyes.

    shut, open: eye aspect ratios as the model predicts them. closed_below: the openness, from 0 at
    shut to 1 at open, below which eyes are closed. min_confidence: of the eyes' landmarks, below
    which nothing is said. face: mean confidence of all landmarks below which there is no face, 0
    where that is not known. The defaults are those of a network that has seen shut eyes and has no
    lid head.
    """
    shut: float = 0.06
    open: float = 0.31
    closed_below: float = 0.4
    min_confidence: float = 0.0
    face: float = 0.0

    @classmethod
    def from_state(cls, state):
        """Of plain numbers by name, as files keep them; None gives the defaults. Raises UserError
        where they are not of these fields.
        """
        if state is None:
            return cls()
        try:
            limits = cls(**{name: float(value) for name, value in dict(state).items()})
        except (TypeError, ValueError):
            limits = None
        if limits is None or not limits.shut < limits.open:
            raise UserError(f"its limits of shut and open eyes are damaged: {state!r}; fit them "
                            f"again with main.py --fit-eyes")
        return limits

    def state(self):
        """The inverse of from_state."""
        return dataclasses.asdict(self)

    def openness(self, ratio):
        """Eye aspect ratios to openness, 0 (shut) to 1."""
        return numpy.clip((ratio - self.shut) / (self.open - self.shut), 0.0, 1.0)


def aspect_ratios(points, scheme):
    """Eye aspect ratio (right, left) of landmarks (..., K, 2), in any unit: two arrays (...).

    Mean distance of opposite lid points over the distance of the corners (Soukupova and Cech,
    2016). Raises UserError where the scheme has no eye contours.
    """
    if scheme.eyes is None:
        raise UserError(f"the eyes need contours, which scheme {scheme.name} has not; use weights "
                        f"of 68, 98, 106 or 12 (eyes) points, or a scheme file with regions right "
                        f"eye and left eye")
    points = numpy.asarray(points, numpy.float64)
    return tuple(aspect_ratio(points, contour) for contour in scheme.eyes)


def aspect_ratio(points, contour):
    """That of one eye's contour, as `parts` takes it, for a float64 array or tensor of landmarks.

    One point at a time: a list of them as an index would make a GPU wait for the list.
    """
    def distance(one, two):
        return ((points[..., one, :] - points[..., two, :]) ** 2).sum(-1) ** 0.5

    corners, upper, lower = parts(contour)
    height = sum(map(distance, upper, lower)) / len(upper)
    return height / distance(*corners).clip(1e-9)


def parts(contour):
    """An eye's contour (indices, from a corner round) as (corners, upper lid, lower lid); the lids
    run from the first corner to the second.
    """
    half = len(contour) // 2
    return [contour[0], contour[half]], list(contour[1:half]), list(contour[:half:-1])


class Eye:
    """An eye's own axes: along its corners and down across, both in widths of the eye.

    points (K, 2): all landmarks, y down. contour: indices, as in Scheme.eyes. `upper` and `lower`
    are the lids as curves a + b s of s (1 - s), which meet in the corners.
    """

    def __init__(self, points, contour):
        self.corners, *self.lids = parts(contour)
        self.origin = points[self.corners[0]]
        self.along = points[self.corners[1]] - self.origin
        self.width = max(float(numpy.linalg.norm(self.along)), 1e-6)
        across = numpy.array([-self.along[1], self.along[0]])
        down = points[self.lids[1]].mean(0) - points[self.lids[0]].mean(0)
        # A mirrored face's contour goes round the other way.
        self.across = across if across @ down >= 0 else -across
        self.upper, self.lower = (self._curve(points[lid]) for lid in self.lids)

    def local(self, points):
        """Points (..., 2) in the axes of the eye."""
        away = points - self.origin
        return numpy.stack([away @ self.along, away @ self.across], -1) / self.width ** 2

    def outer(self, local):
        """The inverse of `local`."""
        return self.origin + local[..., :1] * self.along + local[..., 1:] * self.across

    def _curve(self, lid):
        s, t = self.local(lid).T
        shape = (s * (1 - s))[:, None] * numpy.stack([numpy.ones_like(s), s], 1)
        return numpy.linalg.lstsq(shape, t, rcond=None)[0]

    @staticmethod
    def height(curve, s):
        """A lid's curve at s; the corners' line beyond them."""
        s = numpy.clip(s, 0, 1)
        return s * (1 - s) * (curve[0] + curve[1] * s)

    @property
    def meeting(self):
        """The curve on which the shut lids lie."""
        return UPPER_SHARE * self.upper + (1 - UPPER_SHARE) * self.lower


def close(points, scheme, share=1.0):
    """Landmarks (K, 2), y down, with the lids moved by `share` of the way to where they meet."""
    points = numpy.array(points, numpy.float64)
    for contour in scheme.eyes:
        if numpy.isnan(points[contour]).any():
            continue
        eye = Eye(points, contour)
        lids = sum(eye.lids, [])
        local = eye.local(points[lids])
        local[:, 1] += share * (eye.height(eye.meeting, local[:, 0]) - local[:, 1])
        points[lids] = eye.outer(local)
    return points
