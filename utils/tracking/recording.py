"""Video files, read with PyAV: upright frames of square pixels, and their times.

Times come from the time stamps. Frame rates and counts of headers are often wrong: browsers write
1000 frames a second into WebM, Matroska has no count, AVI counts frames that were dropped. A rate
that agrees with the stamps is used, and a count serves to show progress only.

Cameras and live streams are read with OpenCV (`utils.tracking.sources`).
"""
from __future__ import annotations

import itertools
import sys
import threading
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING

import cv2
import numpy

from utils.errors import UserError
from utils.tracking.clock import FileClock

if TYPE_CHECKING:
    import av

LOOK_AHEAD = 30  # Packets whose stamps give the rate before the first frame is decoded.
MAX_PIXEL_ASPECT = 4  # A wider or narrower pixel is a mistake of the header.
MISSING_SECONDS = 0.5  # A file that ends this much before its length is cut off.
MAX_READ_ERRORS = 8  # Damaged places in a row after which a file is given up.
_TURNS = {1: cv2.ROTATE_90_COUNTERCLOCKWISE, 2: cv2.ROTATE_180, 3: cv2.ROTATE_90_CLOCKWISE}


def display_size(width: int, height: int, pixel_aspect: float | None = None,
                 aspect: float | None = None) -> tuple[int, int]:
    """Return the size at which a picture has square pixels, stretched rather than shrunk.

    Args:
        width: of the stored picture.
        height: of the stored picture.
        pixel_aspect: width to height of a pixel as the source reports it; None or 0: unknown.
        aspect: width to height of the whole picture, where the source reports a wrong one.

    Returns:
        (width, height) in pixels.
    """
    if aspect:
        pixel_aspect = aspect * height / width
    elif not pixel_aspect or not 1 / MAX_PIXEL_ASPECT <= pixel_aspect <= MAX_PIXEL_ASPECT:
        pixel_aspect = 1
    if pixel_aspect >= 1:
        return round(width * pixel_aspect), height
    return width, round(height / pixel_aspect)


def resized(image: numpy.ndarray, size: tuple[int, int]) -> numpy.ndarray:
    """Return an image (H, W, 3) at size (width, height); the image itself where it has it."""
    return image if image.shape[1::-1] == tuple(size) else cv2.resize(image, size)


def typical_rate(stamps: Sequence[float], claimed: Sequence[float]) -> float | None:
    """Return frames a second from the first time stamps of a film.

    The first of the claimed rates that agrees with the shorter steps is returned, because the
    stamps of many files are rounded to milliseconds; without one, the rate of these steps.

    Args:
        stamps: in seconds, in any order.
        claimed: rates from the header.

    Returns:
        The rate, 1 to 1000; None without two different stamps.
    """
    steps = numpy.diff(sorted(set(stamps)))
    if not len(steps):
        return None
    # Dropped frames make longer steps.
    step = float(numpy.percentile(steps, 25))
    found = next((rate for rate in claimed if 0.8 < rate * step < 1.25), 1 / step)
    return min(max(found, 1.0), 1000.0)


class Recording:
    """A video file, or one at an address.

    Args:
        path: of the file, or its address.
        name: for messages; default: the path.
        rate: frames a second to use in place of the time stamps.
        aspect: width to height of the upright picture, where the file reports a wrong one.
        timeout: seconds that an address may take to answer.

    Attributes:
        name: for messages.
        rate: frames a second.
        count: number of frames as its header gives it, which may be wrong, or None.
        missed: frames so far that could not be decoded and are left out.

    Raises:
        UserError: where it cannot be opened, or has no time stamps and no rate is given.
    """
    live = False

    def __init__(self, path: str, name: str | None = None, rate: float | None = None,
                 aspect: float | None = None, timeout: float | None = None):
        # Only videos need it, and the import takes some 50 ms.
        import av
        # FFmpeg's own messages; a level for PyAV's Python logging can deadlock its threads.
        av.logging.set_libav_level(av.logging.PANIC)
        self.name, self.missed = name or path, 0
        self._av_error, self._damaged = av.FFmpegError, av.error.InvalidDataError
        self._aspect, self._size = aspect, None
        self._lock, self._closing, self._broken = threading.Lock(), False, False
        try:
            self._container = av.open(path, timeout=timeout, metadata_errors="ignore")
        except (av.FFmpegError, OSError, ValueError) as error:
            raise UserError(f"{self.name}: neither an image nor a video that can be read; is it "
                            f"cut off? ({getattr(error, 'strerror', None) or error})") from None
        self._stream = self._container.streams.best("video")
        if self._stream is None:
            self._container.close()
            raise UserError(f"{self.name}: a file without pictures (sound only?)")
        self._stream.thread_type = "AUTO"
        # AVI numbers its frames in coding order; times for showing would be guesses.
        self._in_coding_order = self._container.format.name == "avi"
        packets = self._packets()
        ahead = list(itertools.islice(packets, LOOK_AHEAD))
        self.rate = self._choose_rate(ahead, rate)
        self._clock = FileClock(self.rate)
        self._uses_stamps = rate is None
        self._first = self._last = self._end = None  # In seconds of the file's own time.
        self._length = self._stated_length()
        self.count = self._stream.frames or (round(self._length * self.rate)
                                             if self._length else None)
        self._frames = self._decode(itertools.chain(ahead, packets))

    def read(self) -> tuple[numpy.ndarray, float] | None:
        """Read the next frame.

        Returns:
            BGR uint8 (H, W, 3), of the same size for all frames, and its time in seconds from the
            first frame; None at the end.
        """
        with self._lock:
            taken = None if self._closing else self._next()
            if self._closing:
                self._container.close()
        return taken

    def release(self) -> None:
        """Close the file; where another thread is reading, at the end of its frame."""
        self._closing = True
        if self._lock.acquire(blocking=False):
            self._container.close()
            self._lock.release()

    def cut_off(self) -> tuple[float, float] | None:
        """Tell, after the last frame, whether the file ends too early.

        Returns:
            (seconds read, seconds that it should have), the latter at least the former; None where
            it is complete or its length is not known.
        """
        read = 0.0 if self._end is None else self._end - self._first
        if self._length and self._length - read > MISSING_SECONDS:
            return read, self._length
        return (read, max(read, self._length or 0.0)) if self._broken else None

    def _next(self):
        frame = next(self._frames, None)
        if frame is None:
            return None
        stamp = self._stamp(frame)
        if stamp is not None:
            self._first = stamp if self._first is None else self._first
            self._end = stamp + max(self._seconds(frame.duration) or 0.0, 1 / self.rate)
        return self._upright(frame), self._clock(stamp if self._uses_stamps else None)

    def _choose_rate(self, packets, requested):
        """Return the rate: the requested one, else that of the time stamps.

        Raises:
            UserError: where there is neither.
        """
        import av
        # Of formats such as MJPEG, FFmpeg makes up the stamps.
        stream, flag = self._stream, av.format.Flags.no_timestamps.value
        claimed = [float(rate) for rate in (stream.average_rate, stream.guessed_rate) if rate]
        stamps = [] if self._container.format.flags & flag else [
            stamp for stamp in map(self._stamp, packets) if stamp is not None]
        found = requested or typical_rate(stamps, claimed)
        if found is None and len(packets) > 2:
            self._container.close()
            raise UserError(f"{self.name}: has no time stamps, as raw H.264 and MJPEG; give its "
                            f"frames a second with --camera-rate N")
        return found or 30.0

    def _stamp(self, part):
        """Return the time of a packet or frame in the file's own time, or None."""
        stamp = part.dts if self._in_coding_order or part.pts is None else part.pts
        return self._seconds(stamp)

    def _seconds(self, ticks):
        return None if ticks is None else float(ticks * self._stream.time_base)

    def _stated_length(self):
        """Return the seconds from the first frame to the end that the header states, or None."""
        stream, container = self._stream, self._container
        if self._in_coding_order and stream.frames and stream.average_rate:
            return float(stream.frames / stream.average_rate)
        if stream.duration:
            return self._seconds(stream.duration)
        # The length of the whole file may be that of its sound. Matroska's counts from 0.
        if container.duration and len(container.streams) == 1:
            return container.duration / 1e6 - max((container.start_time or 0) / 1e6, 0.0)
        return None

    def _packets(self) -> Iterator[av.Packet]:
        """Yield the packets of the film, also those after damaged parts."""
        errors = 0
        while errors < MAX_READ_ERRORS:
            try:
                for packet in self._container.demux(self._stream):
                    errors = 0
                    yield packet
                return
            except self._damaged:
                errors += 1
            except self._av_error:
                break  # Such as a server that does not answer.
        self._broken = True

    def _decode(self, packets) -> Iterator[av.VideoFrame]:
        for packet in packets:
            try:
                frames = packet.decode()
            except EOFError:
                return
            except self._av_error:
                self.missed += 1
                continue
            yield from frames

    def _upright(self, frame):
        """Return a frame as BGR uint8 (H, W, 3), turned as its tag says, with square pixels."""
        image = frame.to_ndarray(format="bgr24")
        # Phones store upright videos rotated, with a tag.
        turns = round(frame.rotation / 90) % 4
        if turns:
            image = cv2.rotate(image, _TURNS[turns])
        if self._size is None:
            ratio = self._stream.sample_aspect_ratio or Fraction(0)
            pixel = float(1 / ratio if ratio and turns % 2 else ratio)
            self._size = display_size(*image.shape[1::-1], pixel, self._aspect)
        # Films of video calls change their size.
        return resized(image, self._size)


def report_damage(recording: Recording) -> None:
    """Print what is missing of a Recording that has been read to its end."""
    if recording.missed:
        print(f"{recording.name}: {recording.missed} frames could not be decoded and were left out",
              file=sys.stderr)
    cut = recording.cut_off()
    if cut:
        print(f"{recording.name}: ended after {cut[0]:.1f} of {cut[1]:.1f} s; the file is cut off "
              f"or damaged there", file=sys.stderr)
