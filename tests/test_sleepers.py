"""The sleepers benchmark: detected sleeps, false alarms, and a run."""
import cv2
import pytest

from tools import drawn_driver
from tools.benchmark import sleepers
from utils.drowsiness.states import Event
from utils.errors import UserError


@pytest.mark.parametrize(("events", "expected"), [
    ([Event("blink", 1.0, 1.2), Event("sleep", 3.1, 7.0)], ("sleep", False)),
    ([Event("microsleep", 3.1, 4.0), Event("microsleep", 4.2, 7.0)], ("microsleeps", False)),
    ([Event("blink", 4.0, 4.3), Event("not visible", 4.3, 7.0)], ("nothing", False)),
    ([Event("microsleep", 1.0, 2.0), Event("sleep", 3.0, 7.0)], ("sleep", True)),
    ([Event("sleep", 0.0, 3.1)], ("nothing", True)),
    ([], ("nothing", False)),
])
def test_events_are_classified(events, expected):
    assert sleepers.classify(events) == expected


@pytest.fixture
def folder(tmp_path):
    """Two drawn faces with closed eyes, one with open eyes, and one below the smallest size."""
    for state, number, openness in (("open", 0, 1.0), ("closed", 0, 0.0), ("closed", 1, 0.0)):
        (tmp_path / state).mkdir(exist_ok=True)
        image, _ = drawn_driver.face(openness, 0.0, 160, seed=number)
        cv2.imwrite(str(tmp_path / state / f"{number}.png"), image[..., ::-1])
    cv2.imwrite(str(tmp_path / "open" / "small.png"), cv2.resize(image, (60, 60)))
    return tmp_path


def test_photos_are_paired(folder):
    (awake, asleep), = sleepers.pairs(folder, "none", 40)
    assert awake.shape == asleep.shape
    assert (awake != asleep).any()
    video = list(sleepers.frames((awake, asleep)))
    assert len(video) == 210
    assert video[-1][0] == pytest.approx(7, abs=0.05)
    assert all(frame.shape == (360, 640, 3) for _, frame in video)
    assert (video[0][1] != video[15][1]).any(), "the face does not move"


def test_photos_below_the_smallest_size_are_an_error(folder):
    (folder / "open" / "0.png").unlink()
    with pytest.raises(UserError, match="90 px"):
        sleepers.pairs(folder, "none", 40)


def test_the_shipped_model_runs_on_a_video(folder, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["sleepers", str(folder)])
    sleepers.run()
    row, = [line for line in capsys.readouterr().out.splitlines() if "tiny.int8.onnx" in line]
    assert row.split("|")[2].strip() == "1"
