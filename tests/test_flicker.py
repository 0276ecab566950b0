"""The flicker benchmark: what it calls jitter and lag, and that it runs."""
import numpy
import pytest

from tools.benchmark import flicker

REST = numpy.array([(200., 200.), (440., 210.), (320., 300.)])
MATRICES = [flicker.path(frame) for frame in range(60)]
SIDE = 240.0


def points(late=0):
    return numpy.stack([flicker.carried(REST, flicker.path(i - late)) for i in range(60)])


def test_what_follows_the_path_neither_trembles_nor_lags():
    jitter, lag = flicker.figures(points(), REST, MATRICES, SIDE)
    assert jitter < 1e-9
    assert abs(lag) < 1e-9


@pytest.mark.parametrize("late", [0.5, 1, 2])
def test_lag_is_told_in_frames(late):
    jitter, lag = flicker.figures(points(late), REST, MATRICES, SIDE)
    assert lag == pytest.approx(late, rel=0.03)
    assert jitter < 0.5


def test_jitter_is_the_change_from_frame_to_frame():
    random = numpy.random.default_rng(0)
    noisy = points() + random.normal(0, 0.3, (60, 3, 2))
    jitter, lag = flicker.figures(noisy, REST, MATRICES, SIDE)
    # Differences of two such values, in two directions.
    assert jitter == pytest.approx(100 * 0.3 * 2 / SIDE, rel=0.1)
    assert abs(lag) < 0.1


def test_at_rest_there_is_no_lag():
    still = [numpy.eye(2, 3)] * 60
    jitter, lag = flicker.figures(numpy.stack([REST] * 60), REST, still, SIDE)
    assert jitter == 0
    assert numpy.isnan(lag)


def test_the_shipped_model_is_filmed(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["flicker", "--seconds", "1"])
    flicker.run()
    raw, steady = [[float(cell) for cell in line.split("|")[2:5]]
                   for line in capsys.readouterr().out.splitlines() if "tiny.int8.onnx" in line]
    assert raw[0] > 2 * steady[0] > 0
    assert steady[2] < 2
