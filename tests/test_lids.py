"""Eyelid geometry, and closing the eyes of an image and its landmarks."""
from types import SimpleNamespace

import numpy
import pytest

from tools import drawn_driver
from utils.data import eye_closure
from utils.data.augment import Augment
from utils.errors import UserError
from utils.landmarks import eyelids
from utils.landmarks.schemes import SCHEMES, get_scheme

SCHEME = SCHEMES["300W"]


def close_eyes(image, points, share=1.0):
    """The image and the landmarks with the eyelids drawn together."""
    closure = eye_closure.EyeClosure(points, share, SCHEME)
    return eye_closure.close_eyes_opencv(image, closure), eyelids.close(points, SCHEME, share)


@pytest.fixture(scope="module")
def opened():
    """A drawn face with open eyes: RGB uint8 (160, 160, 3) and 68 landmarks in pixels."""
    return drawn_driver.face(1.0)


def test_closed_lids_meet_between_the_open_ones_and_no_other_point_moves(opened):
    _, points = opened
    closed = eyelids.close(points, SCHEME)
    assert max(eyelids.aspect_ratios(closed, SCHEME)) < 0.06
    assert min(eyelids.aspect_ratios(points, SCHEME)) > 0.06
    moved = numpy.linalg.norm(closed - points, axis=1) > 1e-9
    upper, lower = [37, 38, 43, 44], [40, 41, 46, 47]
    assert numpy.flatnonzero(moved).tolist() == sorted(upper + lower)
    # The upper lid moves down, further than the lower lid moves up.
    down = (closed - points)[:, 1]
    assert (down[upper] > 0).all()
    assert (down[lower] < 0).all()
    assert down[upper].mean() > 1.5 * -down[lower].mean()


@pytest.mark.parametrize("name", ["300W", "WFLW", "LaPa"])
def test_lid_points_of_a_contour_lie_opposite_each_other(name):
    scheme = SCHEMES[name]
    for contour in scheme.eyes:
        corners, upper, lower = eyelids.split_contour(contour)
        assert sorted([*corners, *upper, *lower]) == sorted(contour)
        first, second = scheme.mean_face[corners]
        for over, under in zip(scheme.mean_face[upper], scheme.mean_face[lower], strict=True):
            assert over[1] < under[1]
            assert abs(over[0] - under[0]) < 0.1 * abs(second[0] - first[0])


@pytest.mark.parametrize("scheme", ["300W", "WFLW", "LaPa", "eyes"])
def test_share_is_proportional_to_openness_in_any_pose_and_mirrored(scheme):
    scheme = get_scheme(scheme)
    points = scheme.mean_face * 200
    turn = numpy.array([[0.8, 0.6], [-0.6, 0.8]])
    for view in (points, points @ turn, points[scheme.flip] * (-1, 1) + (200, 0)):
        ratio = numpy.array(eyelids.aspect_ratios(view, scheme))
        assert numpy.allclose(eyelids.close(view, scheme, 0.0), view)
        half = numpy.array(eyelids.aspect_ratios(eyelids.close(view, scheme, 0.5), scheme))
        shut = numpy.array(eyelids.aspect_ratios(eyelids.close(view, scheme), scheme))
        assert (shut < 0.35 * ratio).all()
        assert (abs(half - (ratio + shut) / 2) < 0.03).all()
    mirrored = eyelids.close(points[scheme.flip] * (-1, 1), scheme)
    assert numpy.allclose(mirrored[scheme.flip] * (-1, 1), eyelids.close(points, scheme), atol=1e-6)


def test_an_eye_with_a_missing_landmark_is_unchanged(opened):
    image, points = opened
    points = points.copy()
    points[41] = numpy.nan
    changed, closed = close_eyes(image, points)
    assert numpy.array_equal(closed[36:42], points[36:42], equal_nan=True)
    assert eyelids.aspect_ratios(closed, SCHEME)[1] < 0.06
    middle = int(points[27, 0])
    assert numpy.array_equal(changed[:, :middle - 12], image[:, :middle - 12])
    assert not numpy.array_equal(changed[:, middle:], image[:, middle:])


def test_the_image_follows_the_landmarks(opened):
    image, points = opened
    changed, closed = close_eyes(image, points)
    drawn, _ = drawn_driver.face(0.0)
    # Skin replaces the bright eyeball, as in the face that is drawn with closed eyes.
    for contour in SCHEME.eyes:
        x, y = points[contour].mean(0).round().astype(int)
        was, now, skin = (one[y - 1:y + 2, x - 5:x + 6].astype(float) for one in (image, changed,
                                                                                   drawn))
        assert abs(now - skin).mean() < 0.6 * abs(was - skin).mean()
    # Nothing moves beyond brow and cheek.
    far = numpy.ones(image.shape[:2], bool)
    for contour in SCHEME.eyes:
        x, y = points[contour].mean(0)
        reach = 0.9 * numpy.linalg.norm(points[contour[3]] - points[contour[0]])
        rows, columns = numpy.mgrid[:160, :160]
        far &= (abs(rows - y) > reach) | (abs(columns - x) > reach)
    assert numpy.array_equal(changed[far], image[far])
    same, untouched = close_eyes(image, points, 0.0)
    assert numpy.allclose(untouched, points)
    assert abs(same.astype(int) - image).max() <= 2


def test_eyes_at_the_edge_of_one_pixel_and_outside(opened):
    image, points = opened
    for moved in (points - points[36:48].mean(0), points * 0.01 + 80, points + 1000):
        changed, closed = close_eyes(image, moved)
        assert changed.shape == image.shape
        assert numpy.isfinite(closed).all()


def test_augmentation_closes_eyes_with_the_configured_probability(opened):
    image, points = opened
    still = dict.fromkeys(("rotation", "scaling", "shift", "aspect", "flip", "colour", "grey",
                           "blur", "occlusion"), 0.0)
    found = {}
    for share in (0.0, 0.5, 1.0):
        augment = Augment(SimpleNamespace(**still, shut=share, occlusion_size=0.4), SCHEME.flip,
                          SCHEME)
        ratios = [eyelids.aspect_ratios(augment(image, points / 160, 1.0, 160,
                                             numpy.random.default_rng(i))[1], SCHEME)[0]
                  for i in range(60)]
        found[share] = numpy.array(ratios)
    assert numpy.ptp(found[0.0]) < 1e-6
    whole = found[0.0][0]
    assert 15 < (found[0.5] < 0.9 * whole).sum() < 45
    # Most of them completely, some partly.
    shut = found[1.0] < 0.05
    assert 30 < shut.sum() < 55
    assert numpy.ptp(found[1.0][~shut]) > 0.05


def test_thresholds_round_trip_and_damaged_ones_are_refused():
    thresholds = eyelids.EyeThresholds(0.1, 0.3, 0.25, 0.15)
    assert eyelids.EyeThresholds.from_state(thresholds.state()) == thresholds
    assert eyelids.EyeThresholds.from_state(None) == eyelids.EyeThresholds()
    assert thresholds.openness(numpy.array([0.0, 0.2, 0.9])) == pytest.approx([0, 0.5, 1])
    for damaged in ({"shut": 0.3, "open": 0.1}, {"shut": "x"}, {"other": 1}, 7, [1, 2]):
        with pytest.raises(UserError, match="thresholds of closed and open eyes are damaged"):
            eyelids.EyeThresholds.from_state(damaged)
