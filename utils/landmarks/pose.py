"""Head pose: yaw, pitch and roll from landmarks, by fitting a 3-D mean face.

The 3-D points come from the Anthropometric 3D Model of the Institute of Systems and Robotics,
Coimbra (glAnthropometric3DModel), in centimetres, made symmetric. `_POINTS` lists the matching
landmarks of each scheme; a scheme without an entry has no head pose.
"""
from __future__ import annotations

import typing

import numpy

from utils.errors import UserError

if typing.TYPE_CHECKING:
    from utils.landmarks.schemes import Scheme

# x to the right of the image, y up, z towards the viewer. In this order: right brow's outer and
# inner end, left brow's inner and outer end; right eye's outer and inner corner, left eye's inner
# and outer corner; nostrils, mouth corners, lower lip, chin. Right and left are the person's.
_MODEL = numpy.array([
    (-6.826, 6.761, 4.402), (-1.330, 7.122, 6.904), (1.330, 7.122, 6.904), (6.826, 6.761, 4.402),
    (-5.311, 5.485, 3.988), (-1.790, 5.394, 4.413), (1.790, 5.394, 4.413), (5.311, 5.485, 3.988),
    (-2.006, 1.410, 6.166), (2.006, 1.410, 6.166), (-2.774, -2.081, 5.049), (2.774, -2.081, 5.049),
    (0.0, -3.116, 6.098), (0.0, -7.416, 4.070)])
# Indices of these points in each scheme; None if the scheme has no such point.
_POINTS = {
    "300W": (17, 21, 22, 26, 36, 39, 42, 45, 31, 35, 48, 54, 57, 8),
    "WFLW": (33, 37, 42, 46, 60, 64, 68, 72, 55, 59, 76, 82, 85, 16),
    "COFW": (0, 2, 3, 1, 8, 10, 11, 9, 18, 19, 22, 23, 27, 28),
    "AFLW": (0, 2, 3, 5, 6, 8, 9, 11, 12, 14, 15, 17, None, 18),
    "LaPa": (33, 37, 42, 46, 66, 70, 75, 79, 58, 62, 84, 90, 93, 16)}
# From HIDDEN_YAW degrees of yaw, landmarks farther from the face's middle than HIDDEN_FROM of its
# width are hidden on the far side.
HIDDEN_YAW, HIDDEN_FROM = 38.0, 0.1
# Fewer points, such as those of the eyes alone, do not determine the depth.
MIN_POINTS = 6


def model_points(scheme: Scheme) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Match a scheme's landmarks with the points of the 3-D mean face.

    Returns:
        Landmark indices (n,), and their 3-D positions (n, 3) in centimetres, x right, y down, z
        away from the viewer.

    Raises:
        UserError: fewer than MIN_POINTS matches.
    """
    known = _points(scheme)
    rows = [row for row, point in enumerate(known) if point is not None]
    if len(rows) < MIN_POINTS:
        raise UserError(f"head pose: scheme {scheme.name} has {len(rows)} of the points that it "
                        f"needs, at least {MIN_POINTS} are needed; use weights of "
                        f"{', '.join(_POINTS)}")
    return numpy.array([known[row] for row in rows]), _MODEL[rows] * (1, -1, -1)


def _points(scheme):
    """Return a scheme's index of each row of _MODEL, None where it has no such point."""
    known = _POINTS.get(scheme.base or scheme.name, ())
    if scheme.indices is None:
        return known
    index_of = {point: i for i, point in enumerate(scheme.indices)}
    return [index_of.get(point) for point in known]


def is_known(scheme: Scheme) -> bool:
    """Return whether head_pose can be computed for a scheme."""
    return sum(point is not None for point in _points(scheme)) >= MIN_POINTS


def head_pose(points_px: numpy.ndarray, scheme: Scheme) -> tuple[float, float, float]:
    """Estimate the head pose from landmarks.

    Least squares under scaled orthographic projection, as for the poses of 300W-LP and AFLW2000-3D.
    A perspective model would need the focal length; a wrong one halves the yaw.

    Args:
        points_px: landmarks (K, 2) in pixels; NaN points are ignored.
        scheme: landmark scheme of the K points.

    Returns:
        Yaw, pitch and roll in degrees, applied in this order. Yaw is positive towards the right of
        the image, pitch is positive upwards, roll is positive clockwise in the image. All are 0 for
        a face that looks straight ahead. All are NaN if fewer than MIN_POINTS points are known.

    Raises:
        UserError: see model_points.
    """
    indices, model = model_points(scheme)
    points = numpy.asarray(points_px, numpy.float64)[indices]
    known = numpy.isfinite(points).all(1)
    if known.sum() < MIN_POINTS:
        return (numpy.nan,) * 3
    points, model = points[known], model[known]
    affine = numpy.linalg.lstsq(model - model.mean(0), points - points.mean(0), rcond=None)[0]
    left, _, right = numpy.linalg.svd(affine.T, full_matrices=False)
    x, y = left @ right
    z = numpy.cross(x, y)
    yaw = numpy.arctan2(z[0], z[2])
    pitch = -numpy.arcsin(numpy.clip(z[1], -1, 1))
    roll = numpy.arctan2(-x[1], y[1])
    return tuple(float(v) for v in numpy.degrees([yaw, pitch, roll]))


def hidden_half(yaw: float, scheme: Scheme) -> numpy.ndarray:
    """Return which landmarks (K,) the head hides, as bools: those of the far half in profile.

    Args:
        yaw: in degrees, as head_pose returns it; NaN hides nothing.
        scheme: of the landmarks.
    """
    if not abs(yaw) > HIDDEN_YAW:
        return numpy.zeros(scheme.points, bool)
    x = numpy.asarray(scheme.mean_face, float)[:, 0]
    # A face turned to the right of the image hides the points at the right of the mean face.
    side = (x - (x.min() + x.max()) / 2) * numpy.sign(yaw)
    return side > HIDDEN_FROM * numpy.ptp(x)
