"""Head pose from landmarks of faces whose pose is known."""
import cv2
import numpy
import pytest

from utils.errors import UserError
from utils.landmarks import pose
from utils.landmarks.schemes import SCHEMES, get_scheme

WHOLE = ["300W", "WFLW", "COFW", "AFLW", "LaPa"]


def rotation(axis, degrees):
    return cv2.Rodrigues(numpy.radians(degrees) * numpy.eye(3)["xyz".index(axis)])[0]


def photo(scheme, yaw, pitch, roll, near=0.0):
    """Landmarks (K, 2) of the model's face, 8 pixels a centimetre; near: one over its distance from
    the camera in centimetres.
    """
    indices, model = pose.model_points(scheme)
    # x right, y down, z away: to look right is a turn about -y, to look up one about -x.
    turn = rotation("z", roll) @ rotation("x", -pitch) @ rotation("y", -yaw)
    seen = model @ turn.T
    points = numpy.zeros((scheme.points, 2))
    points[indices] = 8 * seen[:, :2] / (1 + near * seen[:, 2:]) + (343, 223)
    return points


@pytest.mark.parametrize("angles", [(0, 0, 0), (20, 0, 0), (0, 15, 0), (0, 0, -30), (-70, 10, 20),
                                    (88, -20, 5), (40, -25, 170)])
def test_known_angles_come_back(angles):
    for name in WHOLE:
        found = pose.head_pose(photo(SCHEMES[name], *angles), SCHEMES[name])
        numpy.testing.assert_allclose(found, angles, atol=0.1)


def test_the_signs_are_as_written():
    scheme = SCHEMES["300W"]
    right, up, clockwise = (photo(scheme, *a) for a in ((30, 0, 0), (0, 20, 0), (0, 0, 20)))
    # The near cheek is the wide one; lips and chin come forward and up; the left eye goes down.
    assert right[22, 0] - right[42, 0] < right[17, 0] - right[36, 0] + 40
    eyes, mouth = right[[36, 45], 0].mean(), right[[48, 54], 0].mean()
    assert right[57, 0] > eyes
    assert mouth > eyes
    assert clockwise[45, 1] > clockwise[36, 1]
    straight = photo(scheme, 0, 0, 0)
    assert up[57, 1] - up[36, 1] < straight[57, 1] - straight[36, 1]


@pytest.mark.parametrize("name", WHOLE)
def test_published_mean_faces_look_ahead_and_mirror(name):
    scheme = SCHEMES[name]
    yaw, pitch, roll = pose.head_pose(scheme.mean_face * 200, scheme)
    # AFLW's is a mean over profiles of both sides: the face of nobody.
    assert name == "AFLW" or abs(yaw) < 5 and abs(roll) < 3 and abs(pitch) < 25
    turned = photo(scheme, 35, 8, 12)
    mirrored = turned[scheme.flip] * (-1, 1) + (639, 0)
    numpy.testing.assert_allclose(pose.head_pose(mirrored, scheme), (-35, 8, -12), atol=0.1)


def test_neither_size_nor_place_nor_a_subset_changes_anything():
    scheme = SCHEMES["300W"]
    points = photo(scheme, 25, 5, -10)
    expected = pose.head_pose(points, scheme)
    numpy.testing.assert_allclose(pose.head_pose(points * 3 + 50, scheme), expected, atol=1e-3)
    numpy.testing.assert_allclose(expected, (25, 5, -10), atol=0.1)
    part = scheme.subset(range(17, 68))
    found = pose.head_pose(points[17:], part)
    numpy.testing.assert_allclose(found, (25, 5, -10), atol=0.1)


@pytest.mark.parametrize("angles", [(0, 0, 0), (-15, 0, 5), (45, 10, -10), (70, -10, 0)])
def test_a_near_camera_turns_a_face_by_a_few_degrees(angles):
    scheme = SCHEMES["300W"]
    found = pose.head_pose(photo(scheme, *angles, near=1 / 60), scheme)
    numpy.testing.assert_allclose(found, angles, atol=7)


def test_missing_points_are_left_out():
    scheme = SCHEMES["300W"]
    points = photo(scheme, 25, 5, -10)
    points[[36, 57]] = numpy.nan
    numpy.testing.assert_allclose(pose.head_pose(points, scheme), (25, 5, -10), atol=0.1)
    points[17:48] = numpy.nan
    assert numpy.isnan(pose.head_pose(points, scheme)).all()


def test_schemes_without_the_points():
    with pytest.raises(UserError, match="scheme eyes has 4 of the points"):
        pose.head_pose(numpy.zeros((12, 2)), get_scheme("eyes"))
