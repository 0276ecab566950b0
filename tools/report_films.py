"""Checks of the reported films for tools.reports: events, written films, messages and headline.

Each film goes through demo.py --driver with the shipped weights and the detector that needs no
file.
"""
from __future__ import annotations

import contextlib
import csv
import functools
import io
import pathlib
from collections.abc import Callable, Sequence

import cv2
import numpy

import demo
from utils import draw
from utils.drowsiness.states import STATES
from utils.errors import UserError
from utils.tracking.sources import open_source

Row = tuple[str, float, float]  # Kind, start and end in seconds of an event.
TOLERANCE = 0.07  # Seconds; two frames at 30 frames a second.


def _run(path, output, *flags):
    """Run the demo; return the events, the size, rate and seconds of the film, and stderr."""
    output.mkdir(parents=True, exist_ok=True)
    film, table, errors = output / "film.mp4", output / "events.csv", io.StringIO()
    with contextlib.redirect_stderr(errors):
        demo.main(["--source", str(path), "--driver", "--events", str(table), "--output",
                   str(film), *flags])
    with open(table, newline="", encoding="utf-8") as file:
        events = [(row["event"], float(row["start"]), float(row["end"]))
                  for row in csv.DictReader(file)]
    capture = cv2.VideoCapture(str(film))
    rate, count = capture.get(cv2.CAP_PROP_FPS), capture.get(cv2.CAP_PROP_FRAME_COUNT)
    size = tuple(round(capture.get(side)) for side in (cv2.CAP_PROP_FRAME_WIDTH,
                                                       cv2.CAP_PROP_FRAME_HEIGHT))
    capture.release()
    return events, size, rate, count / rate, errors.getvalue()


def _shown(path, output, events: Sequence[Row], size: tuple[int, int], seconds: float,
           rate: float, flags: Sequence[str] = ()) -> str:
    """Check the events, the written film and that the file is not called cut off."""
    found, *written, messages = _run(path, output, *flags)
    is_right = len(found) == len(events) and all(
        kind == wanted and abs(start - begin) <= TOLERANCE and abs(end - finish) <= TOLERANCE
        for (kind, start, end), (wanted, begin, finish) in zip(found, events))
    if not is_right:
        raise UserError(f"found {found}, expected {list(events)}")
    _written(written, size, seconds, rate)
    _quiet(messages)
    return ", ".join(f"{kind} {start:g} to {end:g} s" for kind, start, end in found)


def _written(written, size, seconds, rate):
    if written[0] != size or abs(written[1] - rate) > 0.1 or abs(written[2] - seconds) > 0.15:
        raise UserError(f"the written film has {written[0]}, {written[1]:.2f} frames/s and "
                        f"{written[2]:.2f} s, expected {size}, {rate} and {seconds}")


def _quiet(messages):
    for words in ("cut off", "could not be decoded", "2 s apart"):
        if words in messages:
            raise UserError(f"the demo says: {messages.splitlines()[-1]}")


def _without_times(path, output):
    try:
        open_source("video", path).release()
    except UserError as error:
        if "--camera-rate" not in str(error):
            raise
        text = _shown(path, output, N30, (640, 480), 8.33, 30, ("--camera-rate", "30"))
        return f"needs --camera-rate; with 30: {text}"
    raise UserError("opened without a rate, though it has no time stamps")


def _dropped_frames(path, output):
    """Eighty-eight frames with a gap of 4.55 s after the first; nothing is cut off."""
    recording = open_source("video", path)
    times = [seconds for _, seconds in iter(recording.read, None)]
    if len(times) != 88 or abs(times[1] - 4.55) > 0.01 or abs(times[-1] - 11) > 0.01:
        raise UserError(f"{len(times)} frames, to {times[-1]} s; expected 88, to 11.0 s")
    events, *written, messages = _run(path, output)
    _written(written, (2880, 1620), 11.05, 20)
    _quiet(messages)
    if events[:1] != [("not visible", 0.0, 4.55)]:
        raise UserError(f"found {events}; expected to begin with not visible, 0.0 to 4.55 s")
    return "88 frames to 11.0 s, the gap is not visible"


def _headline(path, output):
    """Every state fits the width of the film."""
    recording = open_source("video", path)
    image = recording.read()[0]
    recording.release()
    for state in STATES:
        plain = numpy.full_like(image, 128)
        drawn = draw.banner(plain, state, (0, image.shape[0]), image.shape[0] / 10,
                            (255, 255, 255), tuple(STATES))
        columns = numpy.flatnonzero((drawn > 128).any((0, 2)))
        if columns.max() >= image.shape[1] - 3:
            raise UserError(f"the headline {state} does not fit {image.shape[1]} px")
    return f"headlines fit {image.shape[1]} px"


N30 = (("microsleep", 3.0, 5.7),)
_slept = functools.partial(_shown, events=(("sleep", 3.0, 6.0),), size=(640, 480), seconds=8.0,
                           rate=25)
_gap = functools.partial(_shown, events=(("not visible", 0.634, 2.336),), size=(640, 360),
                         seconds=2.37, rate=29.97)
FILMS: dict[str, Callable[[pathlib.Path, pathlib.Path], str]] = {
    "sar/square.mp4": _slept,
    "sar/sar2.mp4": _slept,
    "film/gap.mp4": _gap,
    "film/gap.mkv": _gap,
    "film/n30.mp4": functools.partial(_shown, events=N30, size=(640, 480), seconds=8.33, rate=30),
    "film/raw30.h264": _without_times,
    "../films/vertical_headline.mp4": _headline,
    "../films/avi_dropped_frames.avi": _dropped_frames,
}
