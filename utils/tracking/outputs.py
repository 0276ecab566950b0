"""Output files of the demo: landmarks, events and videos (their names: tracking.output_names).

`LandmarkFile` and `EventFile` write tables frame by frame, `VideoFile` writes drawn frames. Each
file ends up complete or unchanged: an error or a full disk leaves whole records and playable videos
(`utils.files.OutputFile`). Single images are written by `utils.draw.save`.
"""
from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import os
import pathlib
import shutil
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import cv2
import numpy

from utils.errors import UserError
from utils.files import OutputFile
from utils.machine import check_name

if TYPE_CHECKING:
    from utils.landmarks.schemes import Scheme
    from utils.tracking.tracker import Track

CODECS = {".mp4": "mp4v", ".m4v": "mp4v", ".mov": "mp4v", ".mkv": "mp4v", ".avi": "MJPG"}
MAX_FRAMES_AHEAD = 2  # Frames that a video may run ahead of its source, whose time stamps jitter.


class RecordFile:
    """A text file of records between a start and an end text.

    Each record is written whole or removed again. Nothing is buffered, so that a record can be read
    as soon as it is written.
    """

    def __init__(self, flag, path, start="", end=""):
        self.output, self.start, self.end = OutputFile(path, flag), start, end
        self.count, self._ends = 0, [0]  # Positions after the last two records.
        try:
            self._file = open(self.output.part, "wb", buffering=0)  # noqa: SIM115 - until close().
        except OSError as error:
            raise self.output.error(error) from None
        self.add(start)
        self.count = 0

    def add(self, record: str) -> None:
        """Write a record; after an error, do nothing.

        Raises:
            UserError: where there is no room; the file is complete and closed.
        """
        if self._file.closed:
            return
        try:
            self._write(record)
        except OSError as error:
            note = f"; the first {self.count} records are whole"
            self._repair()
            raise self.output.error(error, note) from None
        self.count += 1
        self._ends = [*self._ends[-1:], self._ends[-1] + len(_encode(record))]

    def close(self) -> None:
        """Complete the file.

        Raises:
            UserError: where there is no room for the end text.
        """
        if self._file.closed:
            return
        try:
            self._write(self.end)
            self._file.close()
            self.output.keep()
        except OSError as error:
            self._repair()
            raise self.output.error(error) from None

    def _write(self, text):
        content = _encode(text)
        while content:
            content = content[self._file.write(content):]

    def _repair(self):
        """Truncate to whole records and add the end text, in place of one record if necessary."""
        for position in reversed(self._ends):
            with contextlib.suppress(OSError):
                self._file.truncate(position)
                self._file.seek(position)
                self._write(self.end)
                break
        self._file.close()
        if self._ends[-1] > len(_encode(self.start)):
            self.output.keep()
        else:
            self.output.drop()


def _encode(text):
    # File names may hold bytes that are not text.
    return text.encode("utf-8", "backslashreplace")


def _row(values):
    line = io.StringIO()
    csv.writer(line).writerow(values)
    return line.getvalue()


POSE = ("yaw", "pitch", "roll")
_IN_IMAGE = ("eye_right", "eye_left", "openness_right", "openness_left", "closed",
             "looks_down")
_OVER_TIME = ("state", "blinks", "blinks_per_minute", "perclos", "unseen")
EYES = _IN_IMAGE + _OVER_TIME


def eye_readings(eyes=None, drowsiness=None) -> dict:
    """Collect what is written about a face's eyes.

    Args:
        eyes: drowsiness.eyes.Eyes of the face, or None.
        drowsiness: drowsiness.states.Drowsiness of the person, or None.

    Returns:
        A value for each name in EYES; None where it is not known.
    """
    readings = dict.fromkeys(EYES)
    if eyes is not None:
        values = [*eyes.ratios, *eyes.openness]
        readings |= zip(_IN_IMAGE, [*(_round(value, 4) for value in values), eyes.closed,
                                    eyes.looks_down])
    if drowsiness is not None:
        readings |= {"state": drowsiness.state, "blinks": drowsiness.blinks,
                     "blinks_per_minute": _round(drowsiness.blinks_per_minute, 2),
                     "perclos": _round(drowsiness.perclos, 4),
                     "unseen": round(drowsiness.window.unseen, 3)}
    return readings


def _round(value, digits):
    return None if value is None else round(value, digits)


class LandmarkFile:
    """Faces of each frame as CSV (a row per face and frame) or as one JSON document.

    Coordinates are pixels of the frame. With `with_pose`, each face has yaw, pitch and roll in
    degrees (landmarks.pose). With `with_eyes`, each face has the readings of its eyes. Where a
    driver is watched, each JSON frame has a `driver` entry, and a CSV frame without a visible
    driver has one row with the time and the driver's state, blinks and PERCLOS.

    Args:
        path: a .csv or .json file.
        scheme: of the landmarks.
        with_eyes: write eye readings.
        with_pose: write head poses.
        with_mirror: write mirror errors, in % of the distance of the outer eye corners.
    """

    def __init__(self, path: str | pathlib.Path, scheme: Scheme, with_eyes: bool,
                 with_pose: bool = False, with_mirror: bool = False):
        self.is_json = pathlib.Path(path).suffix.lower() == ".json"
        self.with_eyes, self.with_pose, self.with_mirror = with_eyes, with_pose, with_mirror
        if self.is_json:
            start = f'{{"scheme": {json.dumps(scheme.name)}, "frames": ['
            self._records = RecordFile("landmarks", path, start, "\n]}\n")
        else:
            self._points = [f"{axis}{i}" for i in range(scheme.points) for axis in "xy"]
            self._records = RecordFile("landmarks", path, _row([
                "frame", "time", "source", "id", "x_min", "y_min", "x_max", "y_max", "confidence",
                *(["mirror_error"] if with_mirror else ()), *(POSE if with_pose else ()),
                *(EYES if with_eyes else ()), *self._points]))

    def write(self, place: tuple[int, float, str], tracks: Sequence[Track],
              readings: Sequence[dict], driver: tuple[int | None, dict] | None = None,
              poses: Sequence[tuple[float, float, float]] = (),
              mirror_errors: Sequence[float] = ()) -> None:
        """Write a frame.

        Args:
            place: (frame number, seconds, name of the source).
            tracks: faces of the frame.
            readings: what `eye_readings` returns for each track.
            driver: (track id or None, readings) of the driver, where one is watched.
            poses: (yaw, pitch, roll) of each track in degrees.
            mirror_errors: of each track, as fractions.

        Raises:
            UserError: where there is no room.
        """
        frame, seconds, source = place
        place = [frame, round(seconds, 4), source]
        faces = []
        for i, (track, eyes) in enumerate(zip(tracks, readings)):
            face = {"id": track.id, "box": track.box.round(2).tolist(),
                    "confidence": round(float(track.confidence.mean()), 4)}
            if self.with_mirror:
                error = 100 * float(mirror_errors[i])
                face["mirror_error"] = round(error, 3) if math.isfinite(error) else None
            if self.with_pose:
                face["pose"] = [round(angle, 2) for angle in poses[i]]
            if self.with_eyes and self.is_json:
                face |= _paired(eyes)
            faces.append(face | {"points": track.points_px.round(2).tolist()})
        if self.is_json:
            line = dict(zip(("frame", "time", "source"), place))
            if driver is not None:
                line["driver"] = {"id": driver[0], **{k: driver[1][k] for k in _OVER_TIME}}
            line["faces"] = faces
            self._records.add(("," if self._records.count else "") + "\n" + json.dumps(line))
            return
        rows = [_row([*place, face["id"], *face["box"], face["confidence"],
                      *([_cell(face["mirror_error"])] if self.with_mirror else ()),
                      *face.get("pose", ()),
                      *(map(_cell, eyes.values()) if self.with_eyes else ()),
                      *sum(face["points"], [])]) for face, eyes in zip(faces, readings)]
        if driver is not None and driver[0] is None:
            rows.append(_row([*place, *[""] * (6 + 3 * self.with_pose + self.with_mirror),
                              *map(_cell, driver[1].values()), *[""] * len(self._points)]))
        self._records.add("".join(rows))

    def close(self) -> None:
        """Complete the file."""
        self._records.close()


def _paired(readings):
    """Return readings for JSON: [right, left] in one list."""
    pairs = {"eyes": [readings["eye_right"], readings["eye_left"]],
             "openness": [readings["openness_right"], readings["openness_left"]]}
    return pairs | {name: readings[name] for name in EYES[4:]}


def _cell(value):
    return "" if value is None else str(value).lower() if isinstance(value, bool) else value


EVENT_HEADER = _row(("event", "id", "start", "end", "seconds"))  # First line of an EventFile.


def event_row(person: int | str, event) -> str:
    """Return the CSV line of a states.Event of a person, a track id or `driver`."""
    return _row([event.kind, person, round(event.start, 3), round(event.end, 3),
                 round(event.end - event.start, 3)])


class EventFile:
    """Events as CSV, written as soon as they have ended; the first line is EVENT_HEADER."""

    def __init__(self, path: str | pathlib.Path):
        self._records = RecordFile("events", path, EVENT_HEADER)

    def write(self, events: Iterable[tuple]) -> None:
        """Write events, given as (track id or `driver`, states.Event) pairs."""
        for person, event in events:
            self._records.add(event_row(person, event))

    def close(self) -> None:
        """Complete the file."""
        self._records.close()


class VideoFile:
    """A video file.

    Args:
        path: file with a suffix in CODECS.
        rate: frames a second.

    Raises:
        UserError: for a name that OpenCV cannot open, a device or a pipe.
    """

    def __init__(self, path: str | pathlib.Path, rate: float):
        check_name(path, "a video")
        self.output, self.rate, self.count, self._writer = OutputFile(path, "output"), rate, 0, None
        # OpenCV deletes what it cannot write to.
        if self.output.part.exists() and not self.output.part.is_file():
            raise UserError(f"output {path}: a video needs a file, and this is a device or a pipe")

    def write(self, image: numpy.ndarray, seconds: float | None = None) -> None:
        """Add a frame, repeated or left out so that the video keeps the time of its source.

        Args:
            image: RGB uint8 (H, W, 3), of the same size for all frames.
            seconds: time of the frame. The frame is repeated until the video has lasted that long,
                and left out where it is more than MAX_FRAMES_AHEAD ahead. None: add it once.

        Raises:
            UserError: where the disk is nearly full; the video so far is kept.
        """
        behind = 0 if seconds is None else round(seconds * self.rate) - self.count
        if behind >= -MAX_FRAMES_AHEAD:
            for _ in range(max(1, behind + 1)):
                self._add(image)

    def _add(self, image):
        if self._writer is None:
            code = cv2.VideoWriter.fourcc(*CODECS[self.output.part.suffix.lower()])
            self._writer = cv2.VideoWriter(os.path.abspath(self.output.part), code, self.rate,
                                           image.shape[1::-1])
            if not self._writer.isOpened():
                self._writer = None
                self.output.drop()
                raise UserError(f"{self.output.name}: OpenCV cannot write this video; is the disk "
                                f"full, or its folder not writable?")
        # OpenCV does not report a frame that did not fit. Beside the frame, the writer's buffers
        # and the index of frames, without which the file is not playable, need room.
        room = image.nbytes // 3 + (1 << 17) + 64 * self.count
        if shutil.disk_usage(self.output.path.parent).free < room:
            self.close()
            raise UserError(f"{self.output.name}: the disk is full; the first {self.count} frames "
                            f"are whole")
        self._writer.write(cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
        self.count += 1

    def close(self) -> None:
        """Complete the file.

        Raises:
            UserError: where it is not a complete video; it is removed.
        """
        if self._writer is None:
            return
        self._writer.release()
        self._writer = None
        written = cv2.VideoCapture(os.path.abspath(self.output.part))
        # Matroska's frame count is computed from its length in milliseconds.
        complete = written.isOpened() and written.get(cv2.CAP_PROP_FRAME_COUNT) >= self.count - 2
        written.release()
        if not complete or not self.count:
            self.output.drop()
            raise UserError(f"{self.output.name}: not written whole and removed; is the disk full?")
        self.output.keep()
