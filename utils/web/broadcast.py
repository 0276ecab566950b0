"""A source of the server, watched by any number of viewers.

A thread reads the camera, stream or film, processes each frame with one pipeline and encodes it
once. Each viewer gets the newest frame when the one before has been sent.
"""
from __future__ import annotations

import asyncio
import collections
import contextlib
import pathlib
import threading
import time

import cv2
from aiohttp import WSMsgType, web

from utils.errors import UserError
from utils.pipeline import Pipeline
from utils.tracking import outputs
from utils.tracking.sources import Live, Recording
from utils.web import messages
from utils.web.viewer import SEND_SECONDS

MAX_SIDE, QUALITY = 1280, 80  # Of the JPEGs; longer side in pixels.
MAX_EVENTS = 5000  # Latest events, which a new viewer gets; a blink every 3 s makes 1200 an hour.


class Broadcast:
    """The frames of a source, processed and encoded once.

    A film starts with its first viewer, runs at its own pace and shows its last frame at its end.

    Args:
        source: the opened Recording or Live.
        pipeline: processes the frames and writes the files that were asked for.

    Attributes:
        name: of the source, for viewers.
        encoded: number of frames that were encoded.
        error: the UserError that ended it, or None.
    """

    def __init__(self, source: Recording | Live, pipeline: Pipeline):
        self.source, self.pipeline = source, pipeline
        # Viewers see a file's name, not the folders of this machine.
        self.name = source.name if source.live else pathlib.PurePath(source.name).name
        self.encoded, self.error = 0, None
        self._latest = self._loop = None
        self._ended = False  # Whether a film is over.
        self._events, self._count = collections.deque(maxlen=MAX_EVENTS), 0
        self._watching = set()  # An asyncio.Event for each viewer.
        self._begin, self._stop, self._lock = threading.Event(), threading.Event(), threading.Lock()
        self._on_error = None
        # A daemon: a camera driver that hangs must not keep the process alive.
        self._thread = threading.Thread(target=self._run, name="source", daemon=True)

    def start(self, loop: asyncio.AbstractEventLoop, on_error) -> None:
        """Start reading; `on_error` is called in the loop when the source ends with an error."""
        self._loop, self._on_error = loop, on_error
        if self.source.live:
            self._begin.set()
        self._thread.start()

    def stop(self) -> None:
        """Stop reading and complete the files.

        Raises:
            UserError: where a file cannot be written.
        """
        self._stop.set()
        self._begin.set()
        # Nothing is processed after this, even where the thread hangs in a camera's driver.
        with self._lock:
            self.pipeline.close()
        self._thread.join(0.2)
        if self._thread.is_alive():
            self.source.release()  # Wakes a thread that waits for a frame.

    async def watch(self, socket: web.WebSocketResponse) -> str:
        """Send frames and events until the viewer leaves; return why the server ends it, or ""."""
        changed, sent_events, sent, told = asyncio.Event(), 0, None, False
        self._watching.add(changed)
        changed.set()
        self._begin.set()
        reader = asyncio.ensure_future(_until_closed(socket))
        try:
            predictor = self.pipeline.predictor
            await socket.send_str(messages.text(messages.model(predictor.path.name,
                                                               predictor.scheme)))
            while not reader.done():
                waiting = asyncio.ensure_future(changed.wait())
                await asyncio.wait({waiting, reader}, return_when=asyncio.FIRST_COMPLETED)
                waiting.cancel()
                changed.clear()
                new = self._count - sent_events
                if new:
                    rows = list(self._events)[-new:]
                    await asyncio.wait_for(
                        socket.send_str(messages.text(messages.events(rows))), SEND_SECONDS)
                    sent_events += new
                if self._latest is not None and self._latest is not sent:
                    sent = self._latest
                    send = socket.send_str if isinstance(sent, str) else socket.send_bytes
                    await asyncio.wait_for(send(sent), SEND_SECONDS)
                if self._ended and not told:
                    told = True
                    await socket.send_str(messages.text(
                        {"type": "ended", "reason": f"{self.name}: the film has ended"}))
            return reader.result()
        except (ConnectionError, asyncio.TimeoutError):
            return ""
        finally:
            reader.cancel()
            self._watching.discard(changed)

    def _run(self):
        """Read and process until the end of the source or `stop`; the thread."""
        try:
            self._begin.wait()
            start = None
            while not self._stop.is_set():
                taken = self.source.read()
                if taken is None:
                    break
                frame, seconds = taken
                start = time.monotonic() - seconds if start is None else start
                if not self.source.live:
                    self._stop.wait(max(start + seconds - time.monotonic(), 0))
                with self._lock:
                    if self._stop.is_set():
                        break
                    self._process(frame, seconds)
            if not self._stop.is_set():
                self._end()
        except UserError as error:
            self._fail(error)
        finally:
            self.source.release()

    def _process(self, frame, seconds):
        begun = time.perf_counter()
        if frame is None:
            seen, shape = self.pipeline.wait(seconds), None
        else:
            image = cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
            seen, shape = self.pipeline.observe(image, seconds, self.source.name), image.shape
        message = messages.frame("frame", seen, seconds, shape)
        message["ms"] = round(1000 * (time.perf_counter() - begun), 1)
        rows = [outputs.event_row(*event) for event in seen.events]
        # Without viewers a picture would be encoded for nobody.
        if frame is not None and self._watching:
            self._publish(messages.with_picture(message, self._encode(frame)), rows)
        else:
            self._publish(messages.text(message) if frame is None else None, rows)

    def _encode(self, frame):
        scale = MAX_SIDE / max(frame.shape[:2])
        if scale < 1:
            size = [max(1, round(side * scale)) for side in frame.shape[1::-1]]
            frame = cv2.resize(frame, size, interpolation=cv2.INTER_AREA)
        self.encoded += 1
        return cv2.imencode(".jpg", frame, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[1].tobytes()

    def _publish(self, latest, rows=()):
        def publish():
            self._events.extend(rows)
            self._count += len(rows)
            self._latest = latest or self._latest
            for changed in self._watching:
                changed.set()

        with contextlib.suppress(RuntimeError):  # The loop is closed: the server has ended.
            self._loop.call_soon_threadsafe(publish)

    def _end(self):
        """Complete the files of a film and say so; a camera that is gone is an error."""
        if self.source.live:
            raise UserError(f"{self.source.name}: gives no more frames; the camera or the server "
                            f"went away")
        if not self.pipeline.frames:
            raise UserError(f"{self.source.name}: no frame could be read; the file is damaged")
        with self._lock:
            rows = [outputs.event_row(*event) for event in self.pipeline.close()]
        self._ended = True
        self._publish(None, rows)

    def _fail(self, error):
        self.error = error
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._on_error)


async def _until_closed(socket):
    """Read what a viewer sends, which is nothing; return why the server ends it, or ""."""
    async for message in socket:
        if message.type in (WSMsgType.TEXT, WSMsgType.BINARY):
            return "this page shows the server's own source and takes no frames"
    return ""
