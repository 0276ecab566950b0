"""A viewer whose browser sends the frames of its camera: JPEGs in, landmarks and states out.

One frame is in flight: the page sends the next one after the answer. Frames are decoded and
processed in a thread of the viewer, with a pipeline of the viewer.
"""
from __future__ import annotations

import asyncio
import concurrent.futures
import json
import sys
import time
import traceback

from aiohttp import WSMsgType, web

from utils.errors import UserError
from utils.tracking import outputs
from utils.web import messages
from utils.web.messages import Refused
from utils.web.models import Models

IDLE_SECONDS = 60.0  # A viewer who sends nothing for so long gives his place to another.
SEND_SECONDS = 10.0  # A viewer who takes no answer for so long is gone.
MAX_REFUSED = 20  # A viewer with this many refused messages more than answers is disconnected.
MIN_STEP = 1e-3  # Seconds between two frames at least, which bounds what is kept of a minute.


class Viewer:
    """One WebSocket of a page that sends frames.

    Args:
        socket: the prepared WebSocket.
        models: makes the pipelines.

    Attributes:
        frames: number of frames that were answered.
    """

    def __init__(self, socket: web.WebSocketResponse, models: Models):
        self.socket, self.models = socket, models
        self.frames, self._refused, self._last = 0, 0, -1.0
        self._pipeline = self._still = self._name = None
        self._executor = concurrent.futures.ThreadPoolExecutor(1, "viewer")
        self._task = None  # The message in flight.

    async def run(self) -> str:
        """Answer messages until the viewer leaves; return why the server ends it, or "".

        The caller closes the socket.
        """
        try:
            while True:
                try:
                    message = await self.socket.receive(IDLE_SECONDS)
                except asyncio.TimeoutError:
                    return f"no frame for {IDLE_SECONDS:.0f} s"
                if message.type not in (WSMsgType.BINARY, WSMsgType.TEXT):
                    return ""
                if self._refused >= MAX_REFUSED:
                    return "too many messages that were refused"
                if self._task is not None and not self._task.done():
                    await self._refuse("one frame at a time: wait for the answer")
                    continue
                # What is in flight does not hold up the reading, so that a flood is noticed.
                self._task = asyncio.ensure_future(self._answer(message.data))
        except (ConnectionError, asyncio.TimeoutError):
            return ""
        finally:
            if self._task is not None:
                self._task.cancel()
            self._executor.shutdown(wait=False, cancel_futures=True)
            # A frame in the thread keeps the pipeline until it is done.
            self._pipeline = self._still = None

    async def _answer(self, data):
        loop = asyncio.get_running_loop()
        try:
            for answer in await loop.run_in_executor(self._executor, self._process, data):
                await self._send(answer)
            self._refused = max(0, self._refused - 1)
        except Refused as error:
            await self._refuse(str(error))
        except ConnectionError:
            pass  # The viewer has left; the reader notices.
        except Exception:
            traceback.print_exc(file=sys.stderr)
            await self._refuse("the server failed to process this")

    async def _refuse(self, reason):
        self._refused += 1
        await self._send({"type": "refused", "reason": reason})

    async def _send(self, message):
        await asyncio.wait_for(self.socket.send_str(messages.text(message)), SEND_SECONDS)

    def _process(self, data):
        """Return the answers to a message; in the viewer's thread.

        Raises:
            Refused: where it is not processed.
        """
        return self._command(data) if isinstance(data, str) else self._picture(data)

    def _command(self, data):
        """Process {"weights": name}, with which a page starts, or {"stop": true}."""
        try:
            command = json.loads(data)
            name, stop = command.get("weights"), command.get("stop")
        except (ValueError, AttributeError, RecursionError):
            raise Refused("a text that is not a JSON object") from None
        if stop:
            return [*self._finish(), {"type": "stopped"}]
        if not isinstance(name, str):
            raise Refused("a command without weights or stop")
        pipeline, finished = self.models.pipeline(name), self._finish()
        self._name, self._pipeline, self._still = name, pipeline, None
        return [*finished, messages.model(name, pipeline.predictor.scheme)]

    def _finish(self):
        """End what the pipeline watches; the next frame starts anew."""
        pipeline, self._pipeline = self._pipeline, None
        rows = [outputs.event_row(*event) for event in pipeline.close()] if pipeline else []
        return [messages.events(rows)] if rows else []

    def _picture(self, data):
        if self._name is None:
            raise Refused("a picture before the weights were chosen")
        kind, seconds, jpeg = messages.split(data)
        if kind == messages.FRAME and seconds < self._last + MIN_STEP:
            raise Refused("a frame that is not later than the one before")
        start = time.perf_counter()
        image = messages.decode(jpeg)
        if kind == messages.STILL:
            if self._still is None:
                self._still = self.models.pipeline(self._name, still=True)
            self._still.restart(still=True)
            seen, name = self._observe(self._still, image, 0.0), "still"
        else:
            if self._pipeline is None:
                self._pipeline = self.models.pipeline(self._name)
            seen, name, self._last = self._observe(self._pipeline, image, seconds), "frame", seconds
            self.frames += 1
        answer = messages.frame(name, seen, seconds, image.shape)
        answer["ms"] = round(1000 * (time.perf_counter() - start), 1)
        rows = [outputs.event_row(*event) for event in seen.events]
        return [messages.events(rows), answer] if rows else [answer]

    @staticmethod
    def _observe(pipeline, image, seconds):
        try:
            return pipeline.observe(image, seconds, "browser")
        except UserError as error:
            raise Refused(str(error)) from None
