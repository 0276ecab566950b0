"""Eyelid geometry: eye aspect ratio, openness, and closing the lids of a set of landmarks.

The functions take landmarks and the eye contours of a scheme (`Scheme.eyes`). `close` produces the
labels of closed eyes for training; `aspect_ratios` and `EyeThresholds` turn predictions into open
and closed (utils/drowsiness/eyes.py). This module does not import torch.
"""
from __future__ import annotations

import dataclasses
import typing

import numpy

from utils.errors import UserError

if typing.TYPE_CHECKING:
    import torch

    from utils.landmarks.schemes import Scheme

# Closed lids meet on 0.3 of the open upper lid plus 0.7 of the open lower lid: the upper lid covers
# most of the distance. Chosen on photos of closed eyes.
UPPER_LID_WEIGHT = 0.3
# Eye aspect ratio below which an annotated eye counts as closed or nearly closed: 4.3 % of the 4024
# eyes in 2012 training photos of 300W.
NEARLY_SHUT = 0.15


@dataclasses.dataclass(frozen=True)
class EyeThresholds:
    """Thresholds of a model for open eyes, closed eyes and the presence of a face.

    They are fitted to a model's predictions (main.py --fit-eyes) and stored in its file, because
    predicted aspect ratios differ from annotated ones. The defaults suit a model that was trained
    with closed eyes and has no lid head.

    Attributes:
        shut: predicted eye aspect ratio of a closed eye.
        open: predicted eye aspect ratio of an open eye.
        closed_below: openness (0 at `shut`, 1 at `open`) below which an eye is closed.
        min_confidence: mean confidence of the eye landmarks below which the state is unknown.
        face: mean confidence of all landmarks below which there is no face; 0 if not fitted.
    """
    shut: float = 0.06
    open: float = 0.31
    closed_below: float = 0.4
    min_confidence: float = 0.0
    face: float = 0.0

    @classmethod
    def from_state(cls, state: dict[str, float] | None) -> EyeThresholds:
        """Build from what `state` returns, as files store it; None gives the defaults.

        Raises:
            UserError: other fields, values that are not numbers, or `shut` not below `open`.
        """
        if state is None:
            return cls()
        try:
            thresholds = cls(**{name: float(value) for name, value in dict(state).items()})
        except (TypeError, ValueError):
            thresholds = None
        if thresholds is None or not thresholds.shut < thresholds.open:
            raise UserError(f"its thresholds of closed and open eyes are damaged: {state!r}; fit "
                            f"them again with main.py --fit-eyes")
        return thresholds

    def state(self) -> dict[str, float]:
        """Return the fields as a dict of plain numbers; the inverse of from_state."""
        return dataclasses.asdict(self)

    def openness(self, ratio: numpy.ndarray) -> numpy.ndarray:
        """Convert eye aspect ratios to openness, 0 (closed) to 1 (open)."""
        return numpy.clip((ratio - self.shut) / (self.open - self.shut), 0.0, 1.0)


def aspect_ratios(points: numpy.ndarray, scheme: Scheme) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Compute the eye aspect ratios of landmarks (Soukupova and Cech, 2016).

    Args:
        points: (..., K, 2), in any unit.
        scheme: landmark scheme of the K points.

    Returns:
        The ratios of the right and of the left eye, each (...).

    Raises:
        UserError: the scheme has no eye contours.
    """
    if scheme.eyes is None:
        raise UserError(f"scheme {scheme.name} has no eye contours; use weights of 68, 98, 106 or "
                        f"12 (eyes) points, or a scheme file with regions right eye and left eye")
    points = numpy.asarray(points, numpy.float64)
    return tuple(aspect_ratio(points, contour) for contour in scheme.eyes)


def aspect_ratio(points: numpy.ndarray | torch.Tensor,
                 contour: list[int]) -> numpy.ndarray | torch.Tensor:
    """Compute the aspect ratio of one eye: mean lid distance over corner distance.

    Args:
        points: (..., K, 2), float64, in any unit.
        contour: indices of the eye's landmarks, see split_contour.

    Returns:
        The ratios, (...), of the same type as points.
    """
    # Points are indexed one at a time: a list as an index would make a GPU wait for its transfer.
    def distance(one, two):
        return ((points[..., one, :] - points[..., two, :]) ** 2).sum(-1) ** 0.5

    corners, upper, lower = split_contour(contour)
    height = sum(map(distance, upper, lower)) / len(upper)
    return height / distance(*corners).clip(1e-9)


def split_contour(contour: list[int]) -> tuple[list[int], list[int], list[int]]:
    """Split an eye contour into corners, upper lid and lower lid.

    Args:
        contour: indices around the eye from a corner, as in Scheme.eyes; an even number.

    Returns:
        The two corners, the upper lid and the lower lid. Both lids run from the first corner to the
        second, so that points at the same place of both lists lie opposite each other.
    """
    half = len(contour) // 2
    return [contour[0], contour[half]], list(contour[1:half]), list(contour[:half:-1])


class Eye:
    """One eye in its own coordinates: s along the corners, t across, in eye widths.

    Each lid is a curve t = s (1 - s) (a + b s), fitted by least squares; both end in the corners.

    Args:
        points: all landmarks (K, 2) in pixels, y down.
        contour: indices of the eye's landmarks, see split_contour.

    Attributes:
        corners: indices of the two corners.
        lids: indices of the upper and of the lower lid.
        origin: the first corner, (2,).
        along: vector from the first corner to the second, (2,).
        across: the same vector turned by 90 degrees, from the upper towards the lower lid.
        width: distance of the corners.
        upper: coefficients (a, b) of the upper lid.
        lower: coefficients (a, b) of the lower lid.
    """

    def __init__(self, points: numpy.ndarray, contour: list[int]):
        self.corners, *self.lids = split_contour(contour)
        self.origin = points[self.corners[0]]
        self.along = points[self.corners[1]] - self.origin
        self.width = max(float(numpy.linalg.norm(self.along)), 1e-6)
        across = numpy.array([-self.along[1], self.along[0]])
        down = points[self.lids[1]].mean(0) - points[self.lids[0]].mean(0)
        # The contour of a mirrored face runs the other way round.
        self.across = across if across @ down >= 0 else -across
        self.upper, self.lower = (self._curve(points[lid]) for lid in self.lids)

    def to_local(self, points: numpy.ndarray) -> numpy.ndarray:
        """Convert points (..., 2) in pixels to (s, t)."""
        relative = points - self.origin
        return numpy.stack([relative @ self.along, relative @ self.across], -1) / self.width ** 2

    def from_local(self, local: numpy.ndarray) -> numpy.ndarray:
        """Convert (s, t), (..., 2), to pixels; the inverse of to_local."""
        return self.origin + local[..., :1] * self.along + local[..., 1:] * self.across

    def _curve(self, lid):
        s, t = self.to_local(lid).T
        shape = (s * (1 - s))[:, None] * numpy.stack([numpy.ones_like(s), s], 1)
        return numpy.linalg.lstsq(shape, t, rcond=None)[0]

    @staticmethod
    def height(curve: numpy.ndarray, s: numpy.ndarray) -> numpy.ndarray:
        """Evaluate t of a lid's curve at s; 0 beyond the corners."""
        s = numpy.clip(s, 0, 1)
        return s * (1 - s) * (curve[0] + curve[1] * s)

    @property
    def meeting(self) -> numpy.ndarray:
        """Coefficients (a, b) of the curve on which closed lids lie."""
        return UPPER_LID_WEIGHT * self.upper + (1 - UPPER_LID_WEIGHT) * self.lower


def close(points: numpy.ndarray, scheme: Scheme, share: float = 1.0) -> numpy.ndarray:
    """Move the lids of both eyes by `share` of the way to where they meet.

    Args:
        points: landmarks (K, 2), y down. An eye with a missing (NaN) point stays as it is.
        scheme: landmark scheme of the K points, with eye contours.
        share: 0 (unchanged) to 1 (closed).

    Returns:
        Landmarks (K, 2), float64.
    """
    points = numpy.array(points, numpy.float64)
    for contour in scheme.eyes:
        if numpy.isnan(points[contour]).any():
            continue
        eye = Eye(points, contour)
        lids = sum(eye.lids, [])
        local = eye.to_local(points[lids])
        local[:, 1] += share * (eye.height(eye.meeting, local[:, 0]) - local[:, 1])
        points[lids] = eye.from_local(local)
    return points
