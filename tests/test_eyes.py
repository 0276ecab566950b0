"""Eye aspect ratio, blinks and PERCLOS on eyes whose opening is known."""
import numpy
import pytest

from utils.errors import UserError
from utils.landmarks.schemes import SCHEMES, get_scheme, read_scheme
from utils.video import eyes

RATE = 30


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


def watch(ratio_of, seconds, rate=RATE):
    state = eyes.Drowsiness()
    for i in range(int(seconds * rate)):
        state.update((ratio_of(i / rate),) * 2, i / rate)
    return state


def test_open_eyes():
    state = watch(lambda t: 0.31 + 0.02 * numpy.sin(9 * t), 60)
    assert state.blinks == 0 and state.perclos == 0 and state.blinks_per_minute == 0


@pytest.mark.parametrize("open_ratio", [0.22, 0.3, 0.4])
@pytest.mark.parametrize("rate", [15, 30, 60])
def test_blinks_are_counted(open_ratio, rate):
    """A blink of 0.2 s every 4 s, whoever's eyes they are and whatever the camera's rate."""
    state = watch(lambda t: 0.07 if t % 4 > 3.8 else open_ratio, 90, rate)
    assert state.blinks == 22
    assert state.blinks_per_minute == pytest.approx(15, abs=1.1)
    assert state.perclos == pytest.approx(0.05, abs=0.02)


def test_perclos_is_the_share_of_the_last_minute():
    # Ten minutes of open eyes are forgotten; then shut for 2 s of every 8.
    state = watch(lambda t: 0.06 if t > 600 and t % 8 > 6 else 0.32, 680, 10)
    assert state.perclos == pytest.approx(0.25, abs=0.03)
    # Two seconds are no blink.
    assert state.blinks == 0


def test_half_shut_eyes_are_not_closed():
    assert watch(lambda t: 0.19 if t > 30 else 0.32, 60).perclos == 0


def test_sleep_does_not_become_the_norm():
    assert watch(lambda t: 0.32 if t < 5 else 0.06, 120).perclos > 0.95


def test_time_out_of_sight_does_not_count():
    state = eyes.Drowsiness()
    for i in range(300):
        state.update((0.06,) * 2 if i < 30 else (0.32,) * 2, i / RATE + (0 if i < 30 else 20))
    assert state.perclos == pytest.approx(0.1, abs=0.01)
