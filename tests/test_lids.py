"""Lids as landmarks, and lids of a picture drawn together: exact, local, and as a share says."""
from types import SimpleNamespace

import numpy
import pytest

from tools import drawn_driver
from utils.data import shutting
from utils.data.augment import Augment
from utils.errors import UserError
from utils.landmarks import eyelids
from utils.landmarks.schemes import SCHEMES, get_scheme

SCHEME = SCHEMES["300W"]


@pytest.fixture(scope="module")
def opened():
    """A drawn face with open eyes: RGB uint8 (160, 160, 3) and 68 landmarks in pixels."""
    return drawn_driver.face(1.0)


def test_shut_lids_meet_between_the_open_ones_and_nothing_else_moves(opened):
    _, points = opened
    closed = eyelids.close(points, SCHEME)
    assert max(eyelids.aspect_ratios(closed, SCHEME)) < 0.06 < min(eyelids.aspect_ratios(points, SCHEME))
    moved = numpy.linalg.norm(closed - points, axis=1) > 1e-9
    upper, lower = [37, 38, 43, 44], [40, 41, 46, 47]
    assert numpy.flatnonzero(moved).tolist() == sorted(upper + lower)
    # The upper lid does most of the way, down; the lower comes up.
    down = (closed - points)[:, 1]
    assert (down[upper] > 0).all()
    assert (down[lower] < 0).all()
    assert down[upper].mean() > 1.5 * -down[lower].mean()


@pytest.mark.parametrize("scheme", ["300W", "WFLW", "LaPa", "eyes"])
def test_half_way_is_half_as_open_in_any_pose_and_mirrored(scheme):
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


def test_an_eye_without_all_its_landmarks_stays(opened):
    image, points = opened
    points = points.copy()
    points[41] = numpy.nan
    changed, closed = shutting.shut(image, points, SCHEME)
    assert numpy.array_equal(closed[36:42], points[36:42], equal_nan=True)
    assert eyelids.aspect_ratios(closed, SCHEME)[1] < 0.06
    middle = int(points[27, 0])
    assert numpy.array_equal(changed[:, :middle - 12], image[:, :middle - 12])
    assert not numpy.array_equal(changed[:, middle:], image[:, middle:])


def test_the_picture_follows_the_landmarks(opened):
    image, points = opened
    changed, closed = shutting.shut(image, points, SCHEME)
    drawn, _ = drawn_driver.face(0.0)
    # Between the lids was the bright eyeball; it goes, as in the face that is drawn shut.
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
    same, untouched = shutting.shut(image, points, SCHEME, 0.0)
    assert numpy.allclose(untouched, points)
    assert abs(same.astype(int) - image).max() <= 2


def test_an_eye_at_the_edge_and_one_of_a_pixel(opened):
    image, points = opened
    for moved in (points - points[36:48].mean(0), points * 0.01 + 80, points + 1000):
        changed, closed = shutting.shut(image, moved, SCHEME)
        assert changed.shape == image.shape
        assert numpy.isfinite(closed).all()


def test_augmentation_shuts_as_often_as_it_is_told(opened):
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
    # Most of them wholly, some on the way.
    shut = found[1.0] < 0.05
    assert 30 < shut.sum() < 55
    assert numpy.ptp(found[1.0][~shut]) > 0.05


def test_limits_are_kept_as_plain_numbers():
    limits = eyelids.EyeThresholds(0.1, 0.3, 0.25, 0.15)
    assert eyelids.EyeThresholds.from_state(limits.state()) == limits
    assert eyelids.EyeThresholds.from_state(None) == eyelids.EyeThresholds()
    assert limits.openness(numpy.array([0.0, 0.2, 0.9])) == pytest.approx([0, 0.5, 1])
    for damaged in ({"shut": 0.3, "open": 0.1}, {"shut": "x"}, {"other": 1}, 7, [1, 2]):
        with pytest.raises(UserError, match="limits of shut and open eyes are damaged"):
            eyelids.EyeThresholds.from_state(damaged)
