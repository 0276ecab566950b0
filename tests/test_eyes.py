"""Eye aspect ratio and openness of eyes with known opening."""
import numpy
import pytest

from utils.drowsiness import eyes
from utils.errors import UserError
from utils.landmarks import eyelids
from utils.landmarks.schemes import SCHEMES, get_scheme, read_scheme


def face(scheme, ratio):
    """Return landmarks whose lid points are ratio / 2 eye widths off the line of the corners."""
    points = numpy.zeros((scheme.points, 2))
    for contour, left in zip(scheme.eyes, (0, 200)):
        half = len(contour) // 2
        for place, point in enumerate(contour):
            along = place if place <= half else 2 * half - place
            height = 0 if place in (0, half) else (-1 if place < half else 1) * ratio / 2
            points[point] = left + 80 * along / half, 80 * height
    return points


@pytest.mark.parametrize("scheme", ["300W", "WFLW", "eyes", "LaPa", "COFW"])
def test_ratio_is_height_over_width_in_any_pose(scheme):
    scheme = get_scheme(scheme)
    points = face(scheme, 0.3)
    turn = numpy.array([[0.8, 0.6], [-0.6, 0.8]])
    for view in (points, points * 3 + 50, points @ turn):
        assert eyelids.aspect_ratios(view, scheme) == pytest.approx((0.3, 0.3))


def test_right_and_left_eye_are_separate():
    scheme = SCHEMES["300W"]
    points = face(scheme, 0.3)
    points[36:42] = face(scheme, 0.1)[36:42]
    assert eyelids.aspect_ratios(points, scheme) == pytest.approx((0.1, 0.3))


def test_schemes_without_eye_contours(tmp_path):
    (tmp_path / "two.yaml").write_text("points: 2\nflip: [[0, 1]]\n")
    for scheme in (SCHEMES["AFLW"].subset(range(12, 19)), read_scheme(str(tmp_path / "two.yaml"))):
        with pytest.raises(UserError, match="no eye|has not"):
            eyelids.aspect_ratios(numpy.zeros((scheme.points, 2)), scheme)


def read(ratios, size=80, **thresholds):
    """Read the eyes of a 300W face with these aspect ratios (right, left), `size` pixels wide."""
    scheme = SCHEMES["300W"]
    points = face(scheme, ratios[1])
    points[36:42] = face(scheme, ratios[0])[36:42]
    thresholds = {"shut": 0.06, "open": 0.32, "closed_below": 0.2} | thresholds
    return eyes.read_eyes(points * size / 80, numpy.full(68, 0.3), scheme,
                          eyelids.EyeThresholds(**thresholds))


def test_openness_is_linear_between_the_thresholds():
    found = read((0.06, 0.32))
    assert found.openness == pytest.approx((0, 1))
    assert found.closed is False
    assert read((0.02, 0.5)).openness == (0, 1)
    assert read((0.2, 0.2), shut=0.1, open=0.3).openness == pytest.approx((0.5, 0.5))


def test_closed_depends_on_the_mean_of_both_eyes():
    assert read((0.07, 0.08)).closed is True
    assert read((0.07, 0.3)).closed is False
    assert read((0.15, 0.15)).closed is False
    assert read((0.15, 0.15), closed_below=0.5).closed is True


def test_an_eye_that_cannot_be_judged_is_none():
    small = read((0.3, 0.3), size=3.9)
    assert small.openness == (None, None)
    assert small.closed is None
    assert read((0.3, 0.3), size=4.5).closed is False
    assert read((0.3, 0.3), min_confidence=0.4).closed is None
    # Part of the face is outside of the image.
    scheme = SCHEMES["300W"]
    points = face(scheme, 0.02) + 10
    for shape, judged in (((50, 300, 3), (True, True)), ((50, 280, 3), (True, False)),
                          ((50, 80, 3), (False, False)), ((9, 300, 3), (False, False))):
        found = eyes.read_eyes(points, numpy.full(68, 0.3), scheme, eyelids.EyeThresholds(), shape)
        assert tuple(value is not None for value in found.openness) == judged
    # One eye of a face that is turned away is too narrow.
    scheme = SCHEMES["300W"]
    points = face(scheme, 0.3)
    points[42:48, 0] = 200 + (points[42:48, 0] - 200) * 0.4
    found = eyes.read_eyes(points, numpy.full(68, 0.3), scheme, eyelids.EyeThresholds())
    assert found.openness[1] is None
    assert found.openness[0] > 0.9
    assert found.closed is False
