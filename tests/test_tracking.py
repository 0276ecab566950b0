"""The tracking benchmark: its video, its table, and a run."""
import sys

import cv2
import numpy
import pytest

from tools.benchmark import tracking
from utils.errors import UserError


def test_a_pan_ends_where_it_begins():
    photo = numpy.random.default_rng(0).integers(0, 255, (60, 50, 3), numpy.uint8)
    photo = cv2.resize(photo, (500, 600))
    video = tracking.pan(photo, (320, 180), 30)
    assert len(video) == 30
    assert video[0].shape == (180, 320, 3)
    assert video[0].dtype == numpy.uint8
    steps = [abs(a.astype(int) - b).mean() for a, b in zip(video, video[1:] + video[:1])]
    assert min(steps) > 0
    assert steps[-1] < 1.5 * max(steps[:-1])


def test_a_video_is_played_forwards_and_backwards(tmp_path):
    writer = cv2.VideoWriter(str(tmp_path / "a.avi"), cv2.VideoWriter.fourcc(*"MJPG"), 30, (64, 48))
    for grey in range(0, 200, 20):
        writer.write(numpy.full((48, 64, 3), grey, numpy.uint8))
    writer.release()
    video = tracking.load_video(str(tmp_path / "a.avi"), (32, 24), 4, 2)
    assert video[0].shape == (24, 32, 3)
    assert [round(frame.mean() / 20) for frame in video] == [2, 3, 4, 5, 4, 3]
    with pytest.raises(UserError, match="no frame after its first 99"):
        tracking.load_video(str(tmp_path / "a.avi"), (32, 24), 4, 99)
    with pytest.raises(UserError, match="expected a photo"):
        tracking.load_video("0", (32, 24), 4, 0)


def test_rows_of_the_table():
    seconds = {("a", "network alone"): [2, 2, 4], ("a", tracking.NO_DETECTOR): [3, 3, 5],
               ("a", "tracked"): [4, 5, 8], ("MediaPipe", "face mesh"): [4, 4, 4]}
    found = {name: (numpy.tile(numpy.array(values)[:, None] / 1000, (1, 10)), 1.0)
             for name, values in seconds.items()}
    rows = {row[2]: row[3:] for row in tracking.make_rows((640, 360), found)}
    assert rows["tracked"] == ["5.00", "5.00", "8.00", "2.00", "2.00", "1.25", "100%"]
    assert rows["face mesh"] == ["4.00", "4.00", "4.00", "-", "-", "1.00", "100%"]
    del found["MediaPipe", "face mesh"]
    assert tracking.make_rows((640, 360), found)[0][7:9] == ["1.00", "-"]


def test_it_runs_without_mediapipe(capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setitem(sys.modules, "mediapipe", None)
    monkeypatch.setattr("sys.argv", ["tracking", "--rounds", "1", "--block", "10",
                                     "--frames", "10"])
    tracking.run()
    printed = capsys.readouterr()
    assert printed.err.count("MediaPipe is left out") == 1
    rows = [line.split("|") for line in printed.out.splitlines() if "tiny.int8.onnx" in line]
    assert len(rows) == 6
    assert all(float(row[4]) > 0 and row[10].strip() == "100%" for row in rows)
