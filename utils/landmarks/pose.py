"""Head pose: yaw, pitch and roll from landmarks, by the fit of a 3-D mean face.

Source of the 3-D points: the Anthropometric 3D Model of the Institute of Systems and Robotics,
Coimbra (glAnthropometric3DModel), in centimetres, made symmetric.
"""
import numpy

from utils.errors import UserError

# x to the right of a face's image, y up, z towards the viewer. In this order: right brow's outer
# and inner end, left brow's inner and outer; right eye's outer and inner corner, left eye's inner
# and outer; nostrils, mouth corners, lower lip, chin. Right and left are the person's.
_MODEL = numpy.array([
    (-6.826, 6.761, 4.402), (-1.330, 7.122, 6.904), (1.330, 7.122, 6.904), (6.826, 6.761, 4.402),
    (-5.311, 5.485, 3.988), (-1.790, 5.394, 4.413), (1.790, 5.394, 4.413), (5.311, 5.485, 3.988),
    (-2.006, 1.410, 6.166), (2.006, 1.410, 6.166), (-2.774, -2.081, 5.049), (2.774, -2.081, 5.049),
    (0.0, -3.116, 6.098), (0.0, -7.416, 4.070)])
# Which points of a scheme those are; None where it has no such point.
_POINTS = {
    "300W": (17, 21, 22, 26, 36, 39, 42, 45, 31, 35, 48, 54, 57, 8),
    "WFLW": (33, 37, 42, 46, 60, 64, 68, 72, 55, 59, 76, 82, 85, 16),
    "COFW": (0, 2, 3, 1, 8, 10, 11, 9, 18, 19, 22, 23, 27, 28),
    "AFLW": (0, 2, 3, 5, 6, 8, 9, 11, 12, 14, 15, 17, None, 18),
    "LaPa": (33, 37, 42, 46, 66, 70, 75, 79, 58, 62, 84, 90, 93, 16)}
# Fewer points, or points of the eyes alone, say little of the depth.
FEWEST = 6


def model_points(scheme):
    """Indices (n,) of a scheme's points that the pose is fitted to, and their 3-D places (n, 3) in
    centimetres, x right, y down, z away from the viewer. Raises UserError where they are too few.
    """
    known = _POINTS.get(scheme.base or scheme.name, ())
    if scheme.indices is not None:
        place = {point: i for i, point in enumerate(scheme.indices)}
        known = [place.get(point) for point in known]
    rows = [row for row, point in enumerate(known) if point is not None]
    if len(rows) < FEWEST:
        raise UserError(f"head pose: scheme {scheme.name} has {len(rows)} of the points it is "
                        f"fitted to, {FEWEST} are needed; it is known for {', '.join(_POINTS)}")
    return numpy.array([known[row] for row in rows]), _MODEL[rows] * (1, -1, -1)


def head_pose(points_px, scheme):
    """(yaw, pitch, roll) in degrees of a face with landmarks (K, 2) in pixels.

    yaw: positive where the face looks to the right of the image; pitch: positive upwards; roll:
    positive clockwise in the image; the head is turned by yaw, then pitch, then roll. All are 0 for
    a face that looks into the camera, wherever it is in the picture. Least squares for a camera
    that is far away (scaled orthographic projection, as the poses of 300W-LP and AFLW2000-3D are):
    what a lens does is not in one picture, and a wrong one halves the yaw. Points that are NaN are
    left out; of fewer than FEWEST all three are NaN. Raises UserError, see model_points.
    """
    indices, model = model_points(scheme)
    points = numpy.asarray(points_px, numpy.float64)[indices]
    known = numpy.isfinite(points).all(1)
    if known.sum() < FEWEST:
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
