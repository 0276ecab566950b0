"""Eye aspect ratio and openness of eyes whose opening is known."""
import numpy
import pytest

from utils.drowsiness import eyes
from utils.errors import UserError
from utils.landmarks.schemes import SCHEMES, get_scheme, read_scheme


def face(scheme, ratio):
    """Landmarks whose eyes are diamonds, flat on top: each lid point ratio / 2 off the line."""
    points = numpy.zeros((scheme.points, 2))
    for contour, left in zip(scheme.eyes, (0, 200)):
        half = len(contour) // 2
        for place, point in enumerate(contour):
            along = place if place <= half else 2 * half - place
            height = 0 if place in (0, half) else (-1 if place < half else 1) * ratio / 2
            points[point] = left + 80 * along / half, 80 * height
    return points


@pytest.mark.parametrize("scheme", ["300W", "WFLW", "eyes", "LaPa", "COFW"])
def test_ratio_is_height_over_width_whatever_the_pose(scheme):
    scheme = get_scheme(scheme)
    points = face(scheme, 0.3)
    turn = numpy.array([[0.8, 0.6], [-0.6, 0.8]])
    for view in (points, points * 3 + 50, points @ turn):
        assert eyes.aspect_ratios(view, scheme) == pytest.approx((0.3, 0.3))


def test_right_and_left_are_told_apart():
    scheme = SCHEMES["300W"]
    points = face(scheme, 0.3)
    points[36:42] = face(scheme, 0.1)[36:42]
    assert eyes.aspect_ratios(points, scheme) == pytest.approx((0.1, 0.3))


def test_schemes_without_eye_contours(tmp_path):
    (tmp_path / "two.yaml").write_text("points: 2\nflip: [[0, 1]]\n")
    for scheme in (SCHEMES["AFLW"].subset(range(12, 19)), read_scheme(str(tmp_path / "two.yaml"))):
        with pytest.raises(UserError, match="no eye|has not"):
            eyes.aspect_ratios(numpy.zeros((scheme.points, 2)), scheme)


def look(ratios, size=80, **limits):
    """eyes.look at a face of 300W with eyes of these ratios (right, left), so many pixels wide."""
    scheme = SCHEMES["300W"]
    points = face(scheme, ratios[1])
    points[36:42] = face(scheme, ratios[0])[36:42]
    limits = {"shut": 0.06, "open": 0.32, "closed_below": 0.2} | limits
    return eyes.look(points * size / 80, numpy.full(68, 0.3), scheme, eyes.EyeThresholds(**limits))


def test_openness_lies_between_the_limits():
    found = look((0.06, 0.32))
    assert found.openness == pytest.approx((0, 1))
    assert found.closed is False
    assert look((0.02, 0.5)).openness == (0, 1)
    assert look((0.2, 0.2), shut=0.1, open=0.3).openness == pytest.approx((0.5, 0.5))


def test_closed_is_of_both_eyes():
    assert look((0.07, 0.08)).closed is True
    assert look((0.07, 0.3)).closed is False
    assert look((0.15, 0.15)).closed is False
    assert look((0.15, 0.15), closed_below=0.5).closed is True


def test_an_eye_that_cannot_be_judged_is_none():
    small = look((0.3, 0.3), size=3.9)
    assert small.openness == (None, None)
    assert small.closed is None
    assert look((0.3, 0.3), size=4.5).closed is False
    assert look((0.3, 0.3), min_confidence=0.4).closed is None
    # Half of the face is outside of the picture.
    scheme = SCHEMES["300W"]
    points = face(scheme, 0.02) + 10
    for shape, judged in (((50, 300, 3), (True, True)), ((50, 280, 3), (True, False)),
                          ((50, 80, 3), (False, False)), ((9, 300, 3), (False, False))):
        found = eyes.look(points, numpy.full(68, 0.3), scheme, eyes.EyeThresholds(), shape)
        assert tuple(value is not None for value in found.openness) == judged
    # A face turned away shows one eye.
    scheme = SCHEMES["300W"]
    points = face(scheme, 0.3)
    points[42:48, 0] = 200 + (points[42:48, 0] - 200) * 0.4
    found = eyes.look(points, numpy.full(68, 0.3), scheme, eyes.EyeThresholds())
    assert found.openness[1] is None
    assert found.openness[0] > 0.9
    assert found.closed is False
