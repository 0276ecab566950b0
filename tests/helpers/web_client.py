"""Clients of the page's server: a viewer's WebSocket, and a server in this process."""
import contextlib
import json

import aiohttp
import cv2

from utils.web import messages
from utils.web.address import Address
from utils.web.server import Server


@contextlib.contextmanager
def running(**settings):
    """Run a Server on a free port of this machine."""
    server = Server(settings.pop("address", Address("127.0.0.1", 0)), **settings)
    server.start()
    try:
        yield server
    finally:
        server.stop()


def jpeg(image, quality=95, *flags):
    """Return an RGB image as JPEG."""
    return cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality,
                                                   *flags])[1].tobytes()


class Client:
    """A page's side of a WebSocket; use it as an async context manager.

    Args:
        url: of the page.
        weights: to choose at the start; None: do not.
        headers: that replace the page's own.
    """

    def __init__(self, url, weights="tiny", **headers):
        self.base, self.weights = url.partition("?")[0], weights
        self.url, self.headers = url.replace("/?", "/watch?") if "?" in url else url + "watch", {
            "Origin": self.base.rstrip("/"), **headers}

    async def __aenter__(self):
        self.session = aiohttp.ClientSession()
        try:
            self.socket = await self.session.ws_connect(self.url, headers=self.headers,
                                                        max_msg_size=0)
            if self.weights:
                self.model = await self.ask({"weights": self.weights})
        except BaseException:
            await self.session.close()
            raise
        return self

    async def __aexit__(self, *_):
        await self.session.close()

    async def send(self, message, seconds=None, kind=messages.FRAME):
        """Send a JPEG (bytes) or a command (dict); seconds None: bytes as they are."""
        if isinstance(message, dict):
            await self.socket.send_str(json.dumps(message))
        elif isinstance(message, str):
            await self.socket.send_str(message)
        else:
            header = b"" if seconds is None else messages.HEADER.pack(kind, seconds)
            await self.socket.send_bytes(header + message)

    async def receive(self):
        """Return the next message as a dict; of a closed socket type, code and reason."""
        got = await self.socket.receive(30)
        if got.type == aiohttp.WSMsgType.TEXT:
            return json.loads(got.data)
        if got.type == aiohttp.WSMsgType.BINARY:
            length = int.from_bytes(got.data[:4], "little")
            return {**json.loads(got.data[4:4 + length]), "jpeg": got.data[4 + length:]}
        return {"type": "closed", "code": self.socket.close_code, "reason": got.extra or ""}

    async def ask(self, *message):
        """Send a message and return the answer, after any events."""
        await self.send(*message)
        answer = await self.receive()
        while answer["type"] == "events":
            answer = await self.receive()
        return answer
