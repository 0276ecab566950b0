"""What a demo writes: videos, pictures, landmarks and events. Whole, or not at all."""
import collections
import contextlib
import csv
import io
import json
import os
import pathlib
import shutil
import tempfile

import cv2

from utils.errors import UserError
from utils.machine import check_name

CODECS = {".mp4": "mp4v", ".m4v": "mp4v", ".mov": "mp4v", ".mkv": "mp4v", ".avi": "MJPG"}
# Bytes of a stem: names may have 255, suffix and all.
LONGEST = 240
TABLES = {"landmarks": (".csv", ".json"), "events": (".csv",)}


def check_suffix(flag, path):
    """Raise UserError where landmarks or events are not written as files of that name."""
    suffix = pathlib.Path(path).suffix
    if suffix.lower() not in TABLES[flag]:
        raise UserError(f"{flag} {path}: written as {' or '.join(TABLES[flag])}, not "
                        f"{suffix or 'a name without suffix'}")


def refuse_sources(outputs, sources):
    """Raise UserError where an output is a source, or another output, by whatever link or name.

    outputs: (flag, path) pairs; sources: paths.
    """
    known = {key: "this is the source" for path in sources for key in _identities(path)}
    for flag, path in outputs:
        keys = _identities(path)
        for key in keys:
            if key in known:
                raise UserError(f"{flag} {path}: {known[key]}; give another name")
        # A device, such as /dev/null, may take more than one.
        if path.is_file() or not path.exists():
            known |= dict.fromkeys(keys, f"this is written as {flag} already")


def _identities(path):
    """What tells a file: its resolved path and, where it exists, its device and inode."""
    names = [path.resolve()]
    with contextlib.suppress(OSError):
        found = os.stat(path)
        names.append((found.st_dev, found.st_ino))
    return names


class Target:
    """A file on its way: written to `part`, which takes the place of an existing `path` at once,
    by `keep`, or leaves it as it was, by `drop`. A new file is written where it belongs.

    flag: which option names the file, for messages.
    """

    def __init__(self, flag, path):
        self.flag, self.name = flag, path
        # Behind a link lies what is to be replaced; a device or a pipe is written to directly.
        self.path = self.part = pathlib.Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.is_file():
                self.path = self.path.resolve()
                handle, part = tempfile.mkstemp(self.part.suffix, ".part-", self.path.parent)
                os.close(handle)
                shutil.copymode(self.path, part)
                self.part = pathlib.Path(part)
        except OSError as error:
            raise self.error(error) from None

    def error(self, error, note=""):
        """The UserError that says why the file could not be written."""
        return UserError(f"{self.flag} {self.name}: cannot be written: "
                         f"{error.strerror or error}{note}")

    def keep(self):
        """Put what was written in its place."""
        if self.part != self.path:
            os.replace(self.part, self.path)

    def drop(self):
        """Remove what was written."""
        if self.part.is_file():
            self.part.unlink()


class Records:
    """A text file of records, each written whole or cut off again; start and end stand around them.

    Nothing is buffered: a record that was written can be read, whatever happens next.
    """

    def __init__(self, flag, path, start="", end=""):
        self.target, self.start, self.end = Target(flag, path), start, end
        self.count, self._marks = 0, [0]
        try:
            self._file = open(self.target.part, "wb", buffering=0)
        except OSError as error:
            raise self.target.error(error) from None
        self.add(start)
        self.count = 0

    def add(self, record):
        """Write a record. Raises UserError, once, with the file closed and whole, where there is no
        room.
        """
        if self._file.closed:
            return
        try:
            self._write(record)
        except OSError as error:
            note = f"; the first {self.count} records are whole"
            self._repair()
            raise self.target.error(error, note) from None
        self.count += 1
        self._marks = [*self._marks[-1:], self._marks[-1] + len(_bytes(record))]

    def close(self):
        """Finish the file. Raises UserError where the end has no room."""
        if self._file.closed:
            return
        try:
            self._write(self.end)
            self._file.close()
            self.target.keep()
        except OSError as error:
            self._repair()
            raise self.target.error(error) from None

    def _write(self, text):
        content = _bytes(text)
        while content:
            content = content[self._file.write(content):]

    def _repair(self):
        """Cut the file back to whole records; one more goes where the end needs its room."""
        for mark in reversed(self._marks):
            with contextlib.suppress(OSError):
                self._file.truncate(mark)
                self._file.seek(mark)
                self._write(self.end)
                break
        self._file.close()
        if self._marks[-1] > len(_bytes(self.start)):
            self.target.keep()
        else:
            self.target.drop()


def _bytes(text):
    # Names of files may hold bytes that are no text.
    return text.encode("utf-8", "backslashreplace")


def _row(values):
    line = io.StringIO()
    csv.writer(line).writerow(values)
    return line.getvalue()


POSE = ("yaw", "pitch", "roll")
EYES = ("eye_right", "eye_left", "openness_right", "openness_left", "closed", "state", "blinks",
        "blinks_per_minute", "perclos", "unseen")


def readings(eyes, drowsiness):
    """What is told of a face's eyes, by name: the values of EYES, None where there is nothing.

    eyes: eyes.Eyes, or None. drowsiness: the Drowsiness of its person, or None.
    """
    told = dict.fromkeys(EYES)
    if eyes is not None:
        told.update(zip(EYES[:4], (*(round(v, 4) for v in eyes.ratios),
                                   *(None if v is None else round(v, 4) for v in eyes.openness))))
        told["closed"] = eyes.closed
    if drowsiness is not None:
        told |= {"state": drowsiness.state, "blinks": drowsiness.blinks,
                 "blinks_per_minute": _round(drowsiness.blinks_per_minute, 2),
                 "perclos": _round(drowsiness.perclos, 4),
                 "unseen": round(drowsiness.minute.unseen, 3)}
    return told


def _round(value, digits):
    return None if value is None else round(value, digits)


class LandmarkFile:
    """Faces of each frame as CSV (a row a face and frame) or JSON (a line a frame), by suffix.

    Coordinates are pixels of the frame. With pose, each face has yaw, pitch and roll in degrees
    (see landmarks.pose). With eyes, a frame without the driver has a row of his state alone, and
    each JSON line has a `driver` where one is followed.
    """

    def __init__(self, path, scheme, with_eyes, with_pose=False):
        self.is_json = pathlib.Path(path).suffix.lower() == ".json"
        self.with_eyes, self.with_pose = with_eyes, with_pose
        if self.is_json:
            start = f'{{"scheme": {json.dumps(scheme.name)}, "frames": ['
            self._records = Records("landmarks", path, start, "\n]}\n")
        else:
            self._points = [f"{axis}{i}" for i in range(scheme.points) for axis in "xy"]
            self._records = Records("landmarks", path, _row([
                "frame", "time", "source", "id", "x_min", "y_min", "x_max", "y_max", "confidence",
                *(POSE if with_pose else ()), *(EYES if with_eyes else ()), *self._points]))

    def write(self, place, tracks, told, driver=None, poses=()):
        """One frame. place: (frame, seconds, source); told: what `readings` gives for each of
        tracks, poses: their (yaw, pitch, roll); driver: (id or None, readings) where one is
        followed.
        """
        poses = [[round(angle, 2) for angle in pose] for pose in poses]
        frame, seconds, source = place
        faces = []
        for i, (track, eyes) in enumerate(zip(tracks, told)):
            face = {"id": track.id, "box": track.box.round(2).tolist(),
                    "confidence": round(float(track.confidence.mean()), 4)}
            face |= {"pose": poses[i]} if self.with_pose else {}
            faces.append(face | (_nested(eyes) if self.with_eyes and self.is_json else {})
                         | {"points": track.points_px.round(2).tolist()})
        if self.is_json:
            line = {"frame": frame, "time": round(seconds, 4), "source": source}
            if driver is not None:
                line["driver"] = {"id": driver[0], **{k: driver[1][k] for k in EYES[5:]}}
            line["faces"] = faces
            self._records.add(("," if self._records.count else "") + "\n" + json.dumps(line))
            return
        rows = [_row([frame, round(seconds, 4), source, face["id"], *face["box"],
                      face["confidence"], *face.get("pose", ()),
                      *(map(_cell, eyes.values()) if self.with_eyes else ()),
                      *sum(face["points"], [])]) for face, eyes in zip(faces, told)]
        if driver is not None and driver[0] is None:
            rows.append(_row([frame, round(seconds, 4), source,
                              *[""] * (9 if self.with_pose else 6),
                              *map(_cell, driver[1].values()), *[""] * len(self._points)]))
        self._records.add("".join(rows))

    def close(self):
        """Finish the file."""
        self._records.close()


def _nested(eyes):
    """Readings as JSON has them: right and left of a kind in one list."""
    pairs = {"eyes": [eyes["eye_right"], eyes["eye_left"]],
             "openness": [eyes["openness_right"], eyes["openness_left"]]}
    return pairs | {name: eyes[name] for name in EYES[4:]}


def _cell(value):
    return "" if value is None else str(value).lower() if isinstance(value, bool) else value


class EventFile:
    """Events as CSV, one a row as soon as it is over: event, id, start, end and seconds."""

    def __init__(self, path):
        self._records = Records("events", path, _row(["event", "id", "start", "end", "seconds"]))

    def write(self, events):
        """events: (person, drowsiness.Event) pairs; a person is the id of a face, or driver."""
        for person, event in events:
            self._records.add(_row([event.kind, person, round(event.start, 3), round(event.end, 3),
                                    round(event.end - event.start, 3)]))

    def close(self):
        """Finish the file."""
        self._records.close()


AHEAD = 2  # Frames by which a video may run ahead of its source, whose time stamps jitter.


class VideoFile:
    """A video of RGB frames (H, W, 3), all of one size, at `rate` frames a second."""

    def __init__(self, path, rate):
        check_name(path, "a video")
        self.target, self.rate, self.count, self._writer = Target("output", path), rate, 0, None
        # What OpenCV cannot write to, it removes.
        if self.target.part.exists() and not self.target.part.is_file():
            raise UserError(f"output {path}: a video needs a file, and this is a device or a pipe")

    def write(self, image, seconds=None):
        """Add a frame, and again until the video has lasted to `seconds`, as frames of a camera are
        dropped; one for which it has lasted too long by AHEAD is left out. None: once. Raises
        UserError when the disk is nearly full; the video so far is kept.
        """
        late = 0 if seconds is None else round(seconds * self.rate) - self.count
        if late >= -AHEAD:
            for _ in range(max(1, late + 1)):
                self._add(image)

    def _add(self, image):
        if self._writer is None:
            code = cv2.VideoWriter.fourcc(*CODECS[self.target.part.suffix.lower()])
            self._writer = cv2.VideoWriter(str(self.target.part), code, self.rate,
                                           image.shape[1::-1])
            if not self._writer.isOpened():
                self._writer = None
                self.target.drop()
                raise UserError(f"output {self.target.name}: OpenCV cannot write this video; is "
                                f"the disk full, or its folder none to write into?")
        # OpenCV does not say when a frame finds no room. A frame, the writer's buffers and the
        # table of frames, without which the file is not a video, must still fit.
        room = image.nbytes // 3 + (1 << 17) + 64 * self.count
        if shutil.disk_usage(self.target.path.parent).free < room:
            self.close()
            raise UserError(f"output {self.target.name}: the disk is full; the first {self.count} "
                            f"frames are whole")
        self._writer.write(cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
        self.count += 1

    def close(self):
        """Finish the file. Raises UserError where it did not become a whole video."""
        if self._writer is None:
            return
        self._writer.release()
        self._writer = None
        written = cv2.VideoCapture(str(self.target.part))
        # Matroska counts frames by its length in milliseconds.
        whole = written.isOpened() and written.get(cv2.CAP_PROP_FRAME_COUNT) >= self.count - 2
        written.release()
        if not whole or not self.count:
            self.target.drop()
            raise UserError(f"output {self.target.name}: not written whole and removed; is the "
                            f"disk full?")
        self.target.keep()


def picture_names(paths):
    """What the pictures drawn of images of one folder are called: {path: name}, all different.

    The stem and .png; the whole name and .png where stems are equal, letter case aside.
    """
    count, names = collections.Counter(path.stem.lower() for path in paths), {}
    taken = set()
    for path in paths:
        name = stem = fitting(path.name if count[path.stem.lower()] > 1 else path.stem)
        number = 2
        while name.lower() in taken:
            name, number = f"{stem}_{number}", number + 1
        taken.add(name.lower())
        names[path] = f"{name}.png"
    return names


def fitting(stem):
    """A file's stem, cut off where with a suffix and a number it would be too long for a disk."""
    return os.fsdecode(os.fsencode(stem)[:LONGEST])


def write_picture(path, image):
    """Write an RGB image (H, W, 3) to path by its suffix. Raises UserError."""
    path = pathlib.Path(path)
    # The smallest file of a photo of twelve megapixels takes 17 s, this one, a third larger, 0.7 s.
    settings = [cv2.IMWRITE_PNG_COMPRESSION, 3] if path.suffix.lower() == ".png" else []
    good, content = cv2.imencode(path.suffix, image[..., ::-1], settings)
    if not good:
        raise UserError(f"output {path}: OpenCV cannot write this kind of picture")
    target = Target("output", path)
    try:
        target.part.write_bytes(content)
        target.keep()
    except OSError as error:
        with contextlib.suppress(OSError):
            target.drop()
        raise target.error(error) from None
