"""Where frames come from: cameras, streams and video files, each frame with its time."""
import importlib.util
import pathlib
import re
import sys
import threading
import time

import cv2
import PIL.Image

from utils.data.photo import IMAGE_SUFFIXES
from utils.errors import UserError
from utils.machine import check_name
from utils.tracking.clock import FileClock

STREAM = re.compile(r"(rtsps?|rtmps?|https?|udp|tcp|srt)://")
# Seconds for which a reader waits for a frame of a camera, and for another one after that.
PATIENCE, AFTER = 2.0, 0.5
STALLED = 5.0  # Seconds without a frame after which a stream is opened again.
PAUSES = (0.5, 1, 2, 4, 8)  # Seconds before each try to open it again, until it is given up.


def find_source(source):
    """(kind, what): ("camera", number), ("stream", address), ("image", path), ("folder", paths) or
    ("video", path).

    Raises UserError where there is no such thing.
    """
    if not source.strip():
        raise UserError("--source is empty: give a camera's number, a path, an address or sample")
    if source.isdigit():
        return "camera", int(source)
    if STREAM.match(source):
        return "stream", source
    if source == "sample":
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
        paths = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
        if not paths:
            raise UserError(f"source {source}: no images in this folder "
                            f"({', '.join(sorted(IMAGE_SUFFIXES))})")
        return "folder", paths
    if not path.is_file():
        raise UserError(f"source {source}: no such file or folder; give the number of a camera, a "
                        f"video, an image, a folder, a stream's address (rtsp://...) or sample")
    return ("image" if path.suffix.lower() in IMAGE_SUFFIXES and not _is_film(path) else "video"), path


def _is_film(path):
    """Whether a file is a GIF of more than one picture, which is played."""
    if path.suffix.lower() != ".gif":
        return False
    try:
        with PIL.Image.open(path) as image:
            return image.is_animated
    except (OSError, SyntaxError, ValueError, EOFError):
        return False


def name_of(kind, what):
    """A source as messages and files call it; the password in an address is left out."""
    if kind == "stream":
        return re.sub(r"//[^/@]*@", "//", what)
    return f"camera {what}" if kind == "camera" else str(what)


def open_source(kind, what, size=None, rate=None):
    """A Recording or a Live of a ("camera" | "stream" | "video", what) of find_source.

    size (width, height) and rate (frames a second) are asked of a camera. Raises UserError.
    """
    if kind == "video":
        return Recording(_open_file(what), what)
    live = Live(kind, what, size, rate)
    if kind == "stream" and live.capture.get(cv2.CAP_PROP_FRAME_COUNT) > 0:
        # A file behind an address: all of its frames, at their own times.
        return Recording(live.capture, live.name)
    return live


def _open_file(path):
    check_name(path, "a video")
    capture = cv2.VideoCapture(str(path))
    if not capture.isOpened():
        raise UserError(f"{path}: neither an image nor a video that OpenCV can read (cut off?)")
    return capture


def _rate_of(capture):
    rate = capture.get(cv2.CAP_PROP_FPS)
    return rate if 1 <= rate <= 1000 else 30.0


class Recording:
    """A video file: `read()` gives (frame BGR uint8 (H, W, 3), seconds by the file's own time
    stamps) or None at its end. rate: frames a second by its header; count: of frames, or None;
    missed: of frames so far that could not be decoded, and are left out.
    """
    live = False

    def __init__(self, capture, name):
        self.capture, self.name, self.rate = capture, str(name), _rate_of(capture)
        # A phone held upright stores its videos lying, with a tag that says so.
        capture.set(cv2.CAP_PROP_ORIENTATION_AUTO, 1)
        count = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
        self.count = count if count > 0 else None
        self.missed, self._tries = 0, 0
        self._clock = FileClock(self.rate)

    def read(self):
        """The next frame and its seconds."""
        failed = 0
        # What cannot be decoded is the end only where nothing follows.
        while not failed or self._tries < (self.count or 0):
            self._tries += 1
            if self.capture.grab():
                seconds = self._clock(self.capture.get(cv2.CAP_PROP_POS_MSEC))
                good, frame = self.capture.retrieve()
                if good:
                    self.missed += failed
                    return frame, seconds
            failed += 1
        return None

    def release(self):
        """Close the file."""
        self.capture.release()


class Live:
    """A camera or a stream: `read()` waits for the newest frame that was not read yet and gives
    (frame BGR uint8 (H, W, 3), seconds when it was taken), after PATIENCE (None, seconds), or None
    when the source is given up.

    Frames that come while nobody reads are dropped, not queued. What fails or stalls is opened
    again, with a line on stderr. count is None, rate: frames a second as the source says.
    """
    live, count = True, None

    def __init__(self, kind, what, size=None, rate=None):
        self.kind, self.what, self.name = kind, what, name_of(kind, what)
        self.asked = size, rate
        self.capture = self._open()
        if self.capture is None:
            hint = ("is it plugged in and free? Else give --source VIDEO, IMAGE, FOLDER or sample"
                    if kind == "camera" else "is the address right and the server up?")
            raise UserError(f"{self.name}: cannot be opened; {hint}")
        self.rate = _rate_of(self.capture)
        self._say_what_differs()
        self._ready = threading.Condition()
        self._newest, self._over, self._thread, self._tries = None, False, None, 0
        self._comes = True
        self._stop = threading.Event()

    def read(self):
        """The newest frame and its seconds."""
        if self._thread is None:
            self._start = time.monotonic()
            # A daemon: a driver that hangs in the kernel must not keep the process alive.
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        with self._ready:
            self._comes = self._ready.wait_for(
                lambda: self._newest is not None or self._over, PATIENCE if self._comes else AFTER)
            newest, self._newest = self._newest, None
        return newest if self._comes else (None, time.monotonic() - self._start)

    def release(self):
        """Close the source; the thread that reads it closes it once it returns."""
        self._stop.set()
        if self._thread is None:
            self.capture.release()
        else:
            self._thread.join(1)

    def _open(self):
        size, rate = self.asked
        if self.kind == "camera":
            capture = cv2.VideoCapture(self.what)
            for setting, value in ((cv2.CAP_PROP_FRAME_WIDTH, size and size[0]),
                                   (cv2.CAP_PROP_FRAME_HEIGHT, size and size[1]),
                                   (cv2.CAP_PROP_FPS, rate)):
                if value:
                    capture.set(setting, value)
        else:
            limit = round(STALLED * 1000)
            capture = cv2.VideoCapture(self.what, cv2.CAP_FFMPEG, [
                cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, limit, cv2.CAP_PROP_READ_TIMEOUT_MSEC, limit])
        return capture if capture.isOpened() else None

    def _say_what_differs(self):
        size, rate = self.asked
        given = tuple(round(self.capture.get(setting)) for setting in (
            cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT))
        if size and given != tuple(size):
            print(f"{self.name}: gives {given[0]}x{given[1]}, not {size[0]}x{size[1]}",
                  file=sys.stderr)
        if rate and abs(self.rate - rate) > 0.5:
            print(f"{self.name}: gives {self.rate:g} frames a second, not {rate:g}",
                  file=sys.stderr)

    def _watch(self):
        came = time.monotonic()
        while not self._stop.is_set():
            grabbed, now = self.capture.grab(), time.monotonic()
            good, frame = self.capture.retrieve() if grabbed else (False, None)
            if good:
                self._tries, came = 0, now
                with self._ready:
                    self._newest = frame, now - self._start
                    self._ready.notify()
            # A frame that cannot be decoded may be the only one.
            elif not grabbed or now - came > STALLED:
                if not self._again():
                    break
                came = time.monotonic()
        self.capture.release()
        with self._ready:
            self._over = True
            self._ready.notify()

    def _again(self):
        """Open the source again; False when it is given up."""
        self.capture.release()
        if not self._tries:
            print(f"{self.name}: no frame comes; opening it again", file=sys.stderr)
        # What opens and yet gives no frame has used up a try as well.
        while self._tries < len(PAUSES) and not self._stop.wait(PAUSES[self._tries]):
            self._tries += 1
            capture = self._open()
            if capture is not None:
                self.capture = capture
                return True
        return False
