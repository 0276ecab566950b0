"""The demo on a drawn video of a driver whose eyelids follow a script, and a passenger."""
import csv
import json
import pathlib

import cv2
import numpy
import pytest
from helpers import lid_script, mp4, painted_faces

import demo
from tools import drawn_driver
from utils import pipeline
from utils.tracking import tracker

# Drawn eyes are no eyes for the network that was trained on photos.
pytestmark = pytest.mark.usefixtures("no_patches")
RATE, SIZE, HAND = 30, 160, (90, 70, 60)
TURNS = ((4.0, 5.0, 35), (11.0, 12.0, -35), (27.0, 28.5, 35))  # start, end, yaw


def driver_at(time):
    """Return openness (in steps of 0.05) and yaw of the driver at a time in seconds."""
    yaw = next((yaw for start, end, yaw in TURNS if start <= time < end), 0)
    return round(float(lid_script.openness(time)) * 20) / 20, yaw


def picture(time):
    """Return the frame at a time, and landmarks (68, 2) of driver and passenger.

    The frame is RGB uint8 (160, 280, 3). The driver's landmarks are None behind a hand.
    """
    image, points = drawn_driver.face(*driver_at(time), SIZE)
    other, theirs = drawn_driver.face(1.0, 0.0, 120, seed=29)
    frame = numpy.zeros((SIZE, 280, 3), numpy.uint8)
    frame[:, :SIZE], frame[40:, SIZE:] = image, other
    seen = bool(lid_script.seen(time))
    if not seen:
        cv2.circle(frame, (80, 80), 50, HAND, -1)
    return frame, points if seen else None, theirs + (SIZE, 40)


class Script:
    """Stands in for Tracker; knows the landmarks of each frame by its number."""

    def __init__(self, times):
        self.times, self.frame = times, 0

    def update(self, image, time):
        """As Tracker.update; after the hand, the driver has another id."""
        truth, points, theirs = picture(self.times[self.frame])
        assert abs(image.astype(int) - truth).mean() < 12  # The right frame, but for the codec.
        self.frame += 1
        faces = [(2, theirs)]
        if points is not None:
            faces.append((1 if self.times[self.frame - 1] < lid_script.HAND[0] else 3, points))
        return [self._track(number, one, time) for number, one in faces]

    @staticmethod
    def _track(number, points, time):
        low, high = points.min(0), points.max(0)
        side = 1.2 * (high - low).max()
        box = numpy.concatenate([low + high - side, low + high + side]) / 2
        return tracker.Track(number, points, points, numpy.full(68, 0.5), box, time, None)


def film(path, times):
    """Write the frames of these times as a video with RATE frames a second."""
    code = "MJPG" if path.suffix == ".avi" else "mp4v"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*code), RATE, (280, SIZE))
    for time in times:
        writer.write(cv2.cvtColor(picture(time)[0], cv2.COLOR_RGB2BGR))
    writer.release()


def watch(monkeypatch, path, times, *flags):
    """Run demo.py on a video of these times; return the rows of events.csv."""
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.setattr(demo, "get_predictor", lambda weights, device: painted_faces.Painted())
    monkeypatch.setattr(demo, "get_detector", lambda name: None)
    monkeypatch.setattr(pipeline, "Tracker", lambda *settings, **more: Script(times))
    demo.main(["--source", str(path), "--output", str(path.with_name("out.avi")), "--events",
               str(path.with_name("events.csv")), *flags])
    with open(path.with_name("events.csv"), encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_driver_is_watched(tmp_path, monkeypatch, capsys):
    times = numpy.arange(0, lid_script.SECONDS, 1 / RATE)
    film(tmp_path / "trip.avi", times)
    rows = watch(monkeypatch, tmp_path / "trip.avi", times, "--driver", "--alarm", "line",
                 "--landmarks", str(tmp_path / "trip.json"))
    true = lid_script.events()
    assert [row["event"] for row in rows] == [event[0] for event in true]
    assert {row["id"] for row in rows} == {"driver"}
    for row, (_, start, end) in zip(rows, true):
        assert abs(float(row["start"]) - start) <= 2 / RATE
        assert abs(float(row["end"]) - end) <= 2 / RATE
        assert float(row["seconds"]) == pytest.approx(float(row["end"]) - float(row["start"]),
                                                      abs=2e-3)
    frames = json.loads(pathlib.Path(tmp_path / "trip.json").read_text())["frames"]
    assert len(frames) == len(times)
    numbers = [(frame["time"], frame["driver"]["perclos"]) for frame in frames[::5]]
    assert sum(value is not None for _, value in numbers) > 200
    for time, value in numbers:
        if value is not None:
            assert value == pytest.approx(lid_script.perclos(time), abs=0.02)
    states = {round(frame["time"], 1): frame["driver"]["state"] for frame in frames}
    assert [states[t] for t in (10, 18, 30, 37.5, 48, 57, 70, 80)] == [
        "awake", "not visible", "awake", "microsleep", "awake", "microsleep", "asleep", "drowsy"]
    # Only the driver has a state; the passenger's eyes are read as well.
    for frame in frames:
        face = {one["id"]: one for one in frame["faces"]}
        assert face[2]["state"] is None
        assert face[2]["closed"] is False
        assert len(face) == 1 or face[frame["driver"]["id"]]["state"] == frame["driver"]["state"]
    printed = capsys.readouterr().err
    assert printed.count("driver microsleep") >= 2
    assert printed.count("driver asleep") >= 17
    assert "driver drowsy" in printed
    assert "passenger" not in printed
    assert all(" s: driver " in line for line in printed.splitlines()), "no bar beside the lines"


def test_a_video_of_variable_rate_is_timed_by_its_stamps(tmp_path, monkeypatch):
    """17 to 40 frames a second, and a gap of four seconds; the nominal rate would be wrong."""
    steps = numpy.random.default_rng(0).uniform(0.025, 0.06, 500)
    steps[300] = 4.0
    times = numpy.concatenate([[0], steps[:-1].cumsum()]) + 28  # From the second 28 of the script.
    film(tmp_path / "even.mp4", times)
    (tmp_path / "trip.mp4").write_bytes(mp4.retime((tmp_path / "even.mp4").read_bytes(), steps))
    rows = watch(monkeypatch, tmp_path / "trip.mp4", times, "--driver",
                 "--landmarks", str(tmp_path / "trip.csv"))
    with open(tmp_path / "trip.csv", encoding="utf-8") as file:
        faces = list(csv.DictReader(file))
    found = {int(row["frame"]): float(row["time"]) for row in faces}
    assert [found[i] for i in range(500)] == pytest.approx(times - 28, abs=1e-3)
    cut = times[300] - 28, times[301] - 28
    true = [(kind, start - 28, end - 28) for kind, start, end in lid_script.events()
            if start >= 28 and end < times[-1]]
    true = [event for event in true if event[2] < cut[0] or event[1] > cut[1]]
    true = sorted([*true, ("not visible", *cut)], key=lambda event: event[2])
    assert [row["event"] for row in rows] == [event[0] for event in true]
    for row, (_, start, end) in zip(rows, true):
        assert abs(float(row["start"]) - start) <= 0.12
        assert abs(float(row["end"]) - end) <= 0.12
    last = faces[-1]
    assert float(last["unseen"]) == pytest.approx(4, abs=0.1)
    # Less than MIN_SEEN was seen.
    assert last["perclos"] == ""
    assert last["state"] in ("awake", "drowsy")
