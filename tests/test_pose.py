"""Head pose from landmarks of faces of known pose."""
import cv2
import numpy
import pytest

from utils.errors import UserError
from utils.landmarks import pose
from utils.landmarks.schemes import SCHEMES, get_scheme

SCHEME_NAMES = ["300W", "WFLW", "COFW", "AFLW", "LaPa"]


def rotation(axis, degrees):
    return cv2.Rodrigues(numpy.radians(degrees) * numpy.eye(3)["xyz".index(axis)])[0]


def photo(scheme, yaw, pitch, roll, near=0.0):
    """Landmarks (K, 2) of the 3-D mean face at 8 pixels a centimetre.

    near: one over the distance of the camera in centimetres; 0 for orthographic projection.
    """
    indices, model = pose.model_points(scheme)
    # x right, y down, z away: looking right is a rotation about -y, looking up about -x.
    turn = rotation("z", roll) @ rotation("x", -pitch) @ rotation("y", -yaw)
    seen = model @ turn.T
    points = numpy.zeros((scheme.points, 2))
    points[indices] = 8 * seen[:, :2] / (1 + near * seen[:, 2:]) + (343, 223)
    return points


@pytest.mark.parametrize("angles", [(0, 0, 0), (20, 0, 0), (0, 15, 0), (0, 0, -30), (-70, 10, 20),
                                    (88, -20, 5), (40, -25, 170)])
def test_known_angles_are_recovered(angles):
    for name in SCHEME_NAMES:
        found = pose.head_pose(photo(SCHEMES[name], *angles), SCHEMES[name])
        numpy.testing.assert_allclose(found, angles, atol=0.1)


def test_signs_of_the_angles():
    scheme = SCHEMES["300W"]
    right, up, clockwise = (photo(scheme, *a) for a in ((30, 0, 0), (0, 20, 0), (0, 0, 20)))
    # Right: the mouth is further right than the eyes. Up: the lower lip is nearer to the eyes.
    # Clockwise: the left eye is lower than the right one.
    assert right[22, 0] - right[42, 0] < right[17, 0] - right[36, 0] + 40
    eyes, mouth = right[[36, 45], 0].mean(), right[[48, 54], 0].mean()
    assert right[57, 0] > eyes
    assert mouth > eyes
    assert clockwise[45, 1] > clockwise[36, 1]
    straight = photo(scheme, 0, 0, 0)
    assert up[57, 1] - up[36, 1] < straight[57, 1] - straight[36, 1]


@pytest.mark.parametrize("name", SCHEME_NAMES)
def test_published_mean_faces_look_straight_ahead_and_mirror(name):
    scheme = SCHEMES[name]
    yaw, pitch, roll = pose.head_pose(scheme.mean_face * 200, scheme)
    # AFLW's mean face averages profiles of both sides and has no meaningful pose.
    assert name == "AFLW" or abs(yaw) < 5 and abs(roll) < 3 and abs(pitch) < 25
    turned = photo(scheme, 35, 8, 12)
    mirrored = turned[scheme.flip] * (-1, 1) + (639, 0)
    numpy.testing.assert_allclose(pose.head_pose(mirrored, scheme), (-35, 8, -12), atol=0.1)


def test_pose_is_invariant_to_scale_translation_and_subset():
    scheme = SCHEMES["300W"]
    points = photo(scheme, 25, 5, -10)
    expected = pose.head_pose(points, scheme)
    numpy.testing.assert_allclose(pose.head_pose(points * 3 + 50, scheme), expected, atol=1e-3)
    numpy.testing.assert_allclose(expected, (25, 5, -10), atol=0.1)
    part = scheme.subset(range(17, 68))
    found = pose.head_pose(points[17:], part)
    numpy.testing.assert_allclose(found, (25, 5, -10), atol=0.1)


@pytest.mark.parametrize("angles", [(0, 0, 0), (-15, 0, 5), (45, 10, -10), (70, -10, 0)])
def test_perspective_changes_the_angles_by_a_few_degrees(angles):
    scheme = SCHEMES["300W"]
    found = pose.head_pose(photo(scheme, *angles, near=1 / 60), scheme)
    numpy.testing.assert_allclose(found, angles, atol=7)


def test_missing_points_are_ignored():
    scheme = SCHEMES["300W"]
    points = photo(scheme, 25, 5, -10)
    points[[36, 57]] = numpy.nan
    numpy.testing.assert_allclose(pose.head_pose(points, scheme), (25, 5, -10), atol=0.1)
    points[17:48] = numpy.nan
    assert numpy.isnan(pose.head_pose(points, scheme)).all()


def test_scheme_without_enough_points():
    with pytest.raises(UserError, match="scheme eyes has 4 of the points"):
        pose.head_pose(numpy.zeros((12, 2)), get_scheme("eyes"))


@pytest.mark.parametrize("name", ["300W", "WFLW", "LaPa"])
def test_a_head_in_profile_hides_its_far_half(name):
    scheme = get_scheme(name)
    right, left = scheme.eyes
    assert not pose.hidden_half(30.0, scheme).any()
    assert not pose.hidden_half(float("nan"), scheme).any()
    # Turned to the right of the image, the person's left eye is hidden.
    turned = pose.hidden_half(60.0, scheme)
    assert turned[left].all()
    assert not turned[right].any()
    other = pose.hidden_half(-60.0, scheme)
    assert other[right].all()
    assert not other[left].any()
    assert 0.3 < turned.mean() < 0.5
