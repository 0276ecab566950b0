"""Sources of the demo: cameras, streams, video files and images.

`find_source` tells what a --source means. `open_source` opens a video file as a `Recording`
(`utils.tracking.recording`), which returns every frame with its time in the file, or a camera or
stream as a `Live`, which returns the newest frame with the time of its capture and reconnects when
the source fails.
"""
from __future__ import annotations

import importlib.util
import os
import pathlib
import re
import sys
import threading
import time

import cv2
import numpy
import PIL.Image

from utils.data.photo import IMAGE_SUFFIXES, warn_left_out
from utils.errors import UserError
from utils.machine import check_name
from utils.tracking.recording import Recording, display_size, resized

STREAM = re.compile(r"(rtsps?|rtmps?|https?|udp|tcp|srt)://")
# Seconds that Live.read waits for a frame; the second value holds after a wait without one.
READ_TIMEOUT, NEXT_READ_TIMEOUT = 2.0, 0.5
STALLED_SECONDS = 5.0  # Time without a frame after which a source is opened again.
RETRY_PAUSES = (0.5, 1, 2, 4, 8)  # Seconds before each attempt to open it again.


def find_source(source: str) -> tuple[str, int | str | pathlib.Path | list[pathlib.Path]]:
    """Tell what a --source means; what exists is a path, also if it is called 2023 or sample.

    Returns:
        ("camera", number), ("stream", address), ("image", path), ("folder", image paths) or
        ("video", path).

    Raises:
        UserError: where it does not exist.
    """
    if not source.strip():
        raise UserError("--source is empty: give a camera's number, a path, an address or sample")
    exists = os.path.exists(source)
    if source.isascii() and source.isdecimal() and not exists:
        return "camera", int(source)
    if STREAM.match(source):
        return "stream", source
    if source == "sample" and not exists:
        package = importlib.util.find_spec("matplotlib")
        if package is None:
            raise UserError("source sample: matplotlib is not installed; pip install matplotlib")
        path = pathlib.Path(package.origin).parent / "mpl-data/sample_data/grace_hopper.jpg"
    else:
        path = pathlib.Path(source)
    # A camera's name may be a link, such as /dev/v4l/by-id/...
    device = re.fullmatch(r"/dev/video(\d+)", str(path.resolve()))
    if device:
        return "camera", int(device[1])
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.is_file())
        warn_left_out(path, files)
        paths = [p for p in files if p.suffix.lower() in IMAGE_SUFFIXES]
        if not paths:
            raise UserError(f"source {source}: no images in this folder "
                            f"({', '.join(sorted(IMAGE_SUFFIXES))})")
        return "folder", paths
    if not path.is_file():
        raise UserError(f"source {source}: no such file or folder; give the number of a camera, a "
                        f"video, an image, a folder, a stream's address (rtsp://...) or sample")
    is_image = path.suffix.lower() in IMAGE_SUFFIXES and not _is_animation(path)
    return ("image" if is_image else "video"), path


def _is_animation(path):
    """Return whether a file is a GIF of several frames, which is read as a video."""
    if path.suffix.lower() != ".gif":
        return False
    try:
        with PIL.Image.open(path) as image:
            return image.is_animated
    except (OSError, SyntaxError, ValueError, EOFError):
        return False


def name_of(kind: str, what: int | str | pathlib.Path) -> str:
    """Return the name of a source for messages and files, without the password of an address."""
    if kind == "stream":
        return re.sub(r"//[^/@]*@", "//", what)
    return f"camera {what}" if kind == "camera" else str(what)


def open_source(kind: str, what: int | str | pathlib.Path, size: tuple[int, int] | None = None,
                rate: float | None = None, aspect: float | None = None) -> Recording | Live:
    """Open a camera, stream or video.

    Args:
        kind: camera, stream or video, as `find_source` returns.
        what: its number, address or path.
        size: (width, height) to request from a camera.
        rate: frames a second to request from a camera, or of a file, in place of its time stamps.
        aspect: width to height of the picture, where the source reports a wrong one.

    Raises:
        UserError: where it cannot be opened.
    """
    if kind == "video":
        check_name(what, "a video")
        # FFmpeg would take the name before a colon for a protocol.
        return Recording(os.path.abspath(what), str(what), rate, aspect)
    live = Live(kind, what, size, rate, aspect)
    if kind == "stream" and live.capture.get(cv2.CAP_PROP_FRAME_COUNT) > 0:
        # The address of a file: all of its frames, at their own times.
        live.release()
        return Recording(what, live.name, rate, aspect, STALLED_SECONDS)
    if kind == "stream" and rate:
        live.release()
        raise UserError(f"{live.name}: --camera-rate is for cameras and files; frames of a live "
                        f"stream have the time of their arrival")
    return live


def _rate_of(capture):
    rate = capture.get(cv2.CAP_PROP_FPS)
    return rate if 1 <= rate <= 1000 else 30.0


class Live:
    """A camera or a stream, read by a thread of its own.

    Frames that arrive between two reads are dropped except for the newest one. A source that fails
    or stalls is opened again, with a line on stderr, until all of RETRY_PAUSES are used up.

    Args:
        kind: camera or stream.
        what: its number or address.
        size: (width, height) to request from a camera.
        rate: frames a second to request from a camera.
        aspect: width to height of the picture, where the source reports a wrong one.

    Attributes:
        name: for messages.
        rate: frames a second, as the source reports.
        count: None, as the number of frames is not known.

    Raises:
        UserError: where it cannot be opened.
    """
    live, count = True, None

    def __init__(self, kind: str, what: int | str, size: tuple[int, int] | None = None,
                 rate: float | None = None, aspect: float | None = None):
        self.kind, self.what, self.name = kind, what, name_of(kind, what)
        self._aspect = aspect
        self._requested = size, rate
        self.capture = self._open()
        if self.capture is None:
            hint = ("is it plugged in and free? Else give --source VIDEO, IMAGE, FOLDER or sample"
                    if kind == "camera" else "is the address right and the server up?")
            raise UserError(f"{self.name}: cannot be opened; {hint}")
        self.rate = _rate_of(self.capture)
        self._report_differences()
        self._changed = threading.Condition()
        self._newest, self._ended, self._thread, self._attempts = None, False, None, 0
        self._delivers = True
        self._stop = threading.Event()

    def read(self) -> tuple[numpy.ndarray | None, float] | None:
        """Wait for the newest frame that was not read yet.

        Returns:
            BGR uint8 (H, W, 3) and the seconds from the first read to its capture; (None, seconds)
            where none arrives in time; None when the source has been given up.
        """
        if self._thread is None:
            self._start = time.monotonic()
            # A daemon: a camera driver that hangs must not keep the process alive.
            self._thread = threading.Thread(target=self._capture_frames, daemon=True)
            self._thread.start()
        with self._changed:
            self._delivers = self._changed.wait_for(
                lambda: self._newest is not None or self._ended,
                READ_TIMEOUT if self._delivers else NEXT_READ_TIMEOUT)
            newest, self._newest = self._newest, None
        return newest if self._delivers else (None, time.monotonic() - self._start)

    def release(self) -> None:
        """Close the source; a thread that is reading closes it when it returns."""
        self._stop.set()
        if self._thread is None:
            self.capture.release()
        else:
            self._thread.join(1)

    def _open(self):
        size, rate = self._requested
        if self.kind == "camera":
            capture = cv2.VideoCapture(self.what)
            for setting, value in ((cv2.CAP_PROP_FRAME_WIDTH, size and size[0]),
                                   (cv2.CAP_PROP_FRAME_HEIGHT, size and size[1]),
                                   (cv2.CAP_PROP_FPS, rate)):
                if value:
                    capture.set(setting, value)
        else:
            timeout = round(STALLED_SECONDS * 1000)
            capture = cv2.VideoCapture(self.what, cv2.CAP_FFMPEG, [
                cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, timeout, cv2.CAP_PROP_READ_TIMEOUT_MSEC, timeout])
        return capture if capture.isOpened() else None

    def _report_differences(self):
        """Print where a camera delivers another size or rate than requested."""
        size, rate = self._requested
        delivered = tuple(round(self.capture.get(setting)) for setting in (
            cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT))
        if size and delivered != tuple(size):
            print(f"{self.name}: gives {delivered[0]}x{delivered[1]}, not {size[0]}x{size[1]}",
                  file=sys.stderr)
        if rate and abs(self.rate - rate) > 0.5:
            print(f"{self.name}: gives {self.rate:g} frames a second, not {rate:g}",
                  file=sys.stderr)

    def _capture_frames(self):
        """Keep the newest frame until `release` or until the source is given up; a thread."""
        last_frame = time.monotonic()
        while not self._stop.is_set():
            grabbed, now = self.capture.grab(), time.monotonic()
            decoded, frame = self.capture.retrieve() if grabbed else (False, None)
            if decoded:
                frame = resized(frame, display_size(*frame.shape[1::-1], self._pixel_aspect(),
                                                    self._aspect))
                self._attempts, last_frame = 0, now
                with self._changed:
                    self._newest = frame, now - self._start
                    self._changed.notify()
            # A single frame that cannot be decoded is no reason to open the source again.
            elif not grabbed or now - last_frame > STALLED_SECONDS:
                if not self._reopen():
                    break
                last_frame = time.monotonic()
        self.capture.release()
        with self._changed:
            self._ended = True
            self._changed.notify()

    def _pixel_aspect(self):
        """Return width to height of a pixel, which OpenCV reports and does not apply, or None."""
        across, down = (self.capture.get(setting) for setting in (cv2.CAP_PROP_SAR_NUM,
                                                                  cv2.CAP_PROP_SAR_DEN))
        return across / down if across > 0 and down > 0 else None

    def _reopen(self):
        """Open the source again; return False when it is given up."""
        self.capture.release()
        if not self._attempts:
            print(f"{self.name}: no frame comes; opening it again", file=sys.stderr)
        # An attempt that opens the source but gets no frame counts as well.
        while (self._attempts < len(RETRY_PAUSES)
               and not self._stop.wait(RETRY_PAUSES[self._attempts])):
            self._attempts += 1
            capture = self._open()
            if capture is not None:
                self.capture = capture
                return True
        return False
