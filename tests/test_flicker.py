"""The flicker benchmark: jitter and lag of known tracks, and a run."""
import numpy
import pytest

from tools.benchmark import flicker

REST = numpy.array([(200., 200.), (440., 210.), (320., 300.)])
MATRICES = [flicker.path(frame) for frame in range(60)]
EYE_DISTANCE = 240.0


def points(late=0):
    return numpy.stack([flicker.transform(REST, flicker.path(i - late)) for i in range(60)])


def test_an_exact_track_has_no_jitter_and_no_lag():
    jitter, lag = flicker.jitter_and_lag(points(), REST, MATRICES, EYE_DISTANCE)
    assert jitter < 1e-9
    assert abs(lag) < 1e-9


@pytest.mark.parametrize("late", [0.5, 1, 2])
def test_lag_is_measured_in_frames(late):
    jitter, lag = flicker.jitter_and_lag(points(late), REST, MATRICES, EYE_DISTANCE)
    assert lag == pytest.approx(late, rel=0.03)
    assert jitter < 0.5


def test_jitter_is_the_change_from_frame_to_frame():
    random = numpy.random.default_rng(0)
    noisy = points() + random.normal(0, 0.3, (60, 3, 2))
    jitter, lag = flicker.jitter_and_lag(noisy, REST, MATRICES, EYE_DISTANCE)
    # The difference of two such values has twice the variance, in two directions.
    assert jitter == pytest.approx(100 * 0.3 * 2 / EYE_DISTANCE, rel=0.1)
    assert abs(lag) < 0.1


def test_lag_is_undefined_without_movement():
    still = [numpy.eye(2, 3)] * 60
    jitter, lag = flicker.jitter_and_lag(numpy.stack([REST] * 60), REST, still, EYE_DISTANCE)
    assert jitter == 0
    assert numpy.isnan(lag)


def test_the_filter_reduces_the_jitter_of_the_shipped_model(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["flicker", "--seconds", "1"])
    flicker.run()
    raw, filtered = [[float(cell) for cell in line.split("|")[2:5]]
                     for line in capsys.readouterr().out.splitlines() if "tiny.int8.onnx" in line]
    assert raw[0] > 2 * filtered[0] > 0
    assert filtered[2] < 2
