"""The server of the page: HTTP, WebSockets, and what they refuse.

`Server` runs aiohttp's loop in a thread of its own. It serves the files in page/, and at /watch the
WebSocket of a `Viewer` or of a `Broadcast`. Every answer carries a content security policy that
allows this host alone.
"""
from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import logging
import pathlib
import sys
import threading
import traceback
import weakref

from aiohttp import WSCloseCode, web

from utils.errors import UserError
from utils.machine import trim_malloc
from utils.web import messages
from utils.web.address import Address, same_origin
from utils.web.broadcast import Broadcast
from utils.web.models import Models
from utils.web.viewer import Viewer

PAGE = pathlib.Path(__file__).parent / "page"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "Permissions-Policy": "camera=(self), microphone=(), geolocation=()",
    "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin", "Cache-Control": "no-store"}
MAX_CONNECTIONS = 256
REQUEST_SECONDS = 10.0  # A connection without a complete request for so long is closed.
HEARTBEAT_SECONDS = 20.0  # Pings that a viewer has to answer within half of it.
# Time in which a viewer answers the closing, without which its reason may be lost; less when the
# server ends.
CLOSE_SECONDS, END_SECONDS = 5.0, 0.5
REASON_BYTES = 123  # Longest reason of a closed WebSocket (RFC 6455, section 5.5).


class Server:
    """Serves the page until `stop`.

    Args:
        address: where; `start` replaces port 0 by the one it got.
        models: of viewers who send frames. Exactly one of models and broadcast is given.
        broadcast: the server's own source.
        viewers: who may send frames at the same time.

    Attributes:
        frames: number of viewers' frames that were answered.
    """

    def __init__(self, address: Address, models: Models | None = None,
                 broadcast: Broadcast | None = None, viewers: int = 4):
        self.address, self.models, self.broadcast = address, models, broadcast
        self.max_viewers, self.viewers, self.frames = viewers, 0, 0
        self._trims = 0
        self._sockets = weakref.WeakSet()
        self._connections = {}  # RequestHandler to the time of its last request, or None: at work.
        self._started, self._ended = threading.Event(), threading.Event()
        self._error = self._loop = self._stop = None
        self._thread = threading.Thread(target=self._run, name="server")

    def start(self) -> None:
        """Start to listen.

        Raises:
            UserError: where the address cannot be used.
        """
        self._thread.start()
        self._started.wait()
        if self._error:
            self._thread.join()
            raise self._error

    def wait(self) -> None:
        """Wait until the server has ended: after `stop`, or after an error of its source."""
        # With a timeout Ctrl-C ends the wait on every system.
        while not self._ended.wait(0.5):
            pass

    def stop(self) -> None:
        """End the server and complete the files.

        Raises:
            UserError: where its source failed or a file cannot be written.
        """
        with contextlib.suppress(RuntimeError):  # The loop has ended by itself.
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
        if self.broadcast:
            self.broadcast.stop()
            if self.broadcast.error:
                raise self.broadcast.error

    def _run(self):
        try:
            asyncio.run(self._serve())
        except OSError as error:
            self._error = UserError(f"--serve {self.address.host}:{self.address.port}: "
                                    f"{error.strerror or error}; give another host or port")
        finally:
            self._ended.set()
            self._started.set()

    async def _serve(self):
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        app = web.Application(middlewares=[self._guard])
        app.add_routes([web.get("/", self._file), web.get("/about", self._about),
                        web.get("/watch", self._watch), web.get("/{name}", self._file)])
        # aiohttp would log a traceback for each request that is no HTTP.
        runner = web.AppRunner(app, access_log=None, logger=_silent_logger(),
                               handle_signals=False, shutdown_timeout=0.1)
        await runner.setup()
        listener = await self._loop.create_server(
            lambda: self._accept(runner.server()), self.address.host, self.address.port)
        self.address = dataclasses.replace(self.address,
                                           port=listener.sockets[0].getsockname()[1])
        if self.broadcast:
            self.broadcast.start(self._loop, self._stop.set)
        self._started.set()
        sweep = asyncio.ensure_future(self._sweep())
        await self._stop.wait()
        sweep.cancel()
        listener.close()
        await asyncio.gather(*(
            self._close(socket, WSCloseCode.GOING_AWAY, "the server has ended", END_SECONDS)
            for socket in self._sockets), return_exceptions=True)
        for handler in list(self._connections):
            if handler.transport is not None:
                handler.transport.abort()
        await runner.cleanup()

    def _accept(self, handler):
        """Count a connection; one too many is closed as soon as it is made."""
        self._drop_closed()
        if len(self._connections) >= MAX_CONNECTIONS:
            return _Refusing()
        self._connections[handler] = self._loop.time()
        return handler

    def _drop_closed(self):
        # A new connection has no transport either, for a moment.
        now = self._loop.time()
        self._connections = {handler: since for handler, since in self._connections.items()
                             if handler.transport is not None
                             or since is not None and now - since < 1}

    async def _sweep(self):
        """Close connections that make no request: half-open ones, and those kept alive in vain."""
        while True:
            await asyncio.sleep(1)
            self._drop_closed()
            # glibc would keep what the frames of a viewer needed.
            if self._trims:
                self._trims -= 1
                gc.collect()
                trim_malloc()
            for handler, since in self._connections.items():
                if since is not None and self._loop.time() - since > REQUEST_SECONDS \
                        and handler.transport is not None:
                    handler.transport.abort()

    @web.middleware
    async def _guard(self, request, handler):
        """Refuse foreign requests; add the headers to every answer."""
        self._connections[request.protocol] = None
        try:
            reason = self.address.why_refused(request.headers, request.query, request.cookies)
            if reason is None and request.path == "/watch" and not same_origin(request.headers):
                reason = (f"Origin is {request.headers.get('Origin', 'missing')[:200]}, expected "
                          f"that of the page")
            if reason is not None:
                answer = web.Response(status=403, text=f"refused: {reason}\n")
            else:
                try:
                    answer = await handler(request)
                except web.HTTPException as error:
                    answer = web.Response(status=error.status, text=f"{error.reason}\n")
                except Exception:
                    traceback.print_exc(file=sys.stderr)
                    answer = web.Response(status=500, text="the server failed\n")
            if not answer.prepared:
                answer.headers.update(HEADERS)
                if reason is None and "token" in request.query:
                    answer.set_cookie(self.address.cookie, request.query["token"],
                                      httponly=True, samesite="Strict")
            return answer
        finally:
            self._connections[request.protocol] = self._loop.time()

    async def _file(self, request):
        path = PAGE / (request.match_info.get("name") or "index.html")
        if path.parent != PAGE or path.suffix not in TYPES or not path.is_file():
            raise web.HTTPNotFound
        return web.Response(body=path.read_bytes(), content_type=TYPES[path.suffix],
                            charset="utf-8")

    async def _about(self, _):
        source = self.broadcast.name if self.broadcast else None
        names = self.models.paths if self.models else [self.broadcast.pipeline.predictor.path.name]
        return web.json_response(messages.about(source, names))

    async def _watch(self, request):
        # Above the size that gets a reason from the viewer, aiohttp closes with code 1009.
        socket = web.WebSocketResponse(heartbeat=HEARTBEAT_SECONDS, compress=False, autoclose=False,
                                       timeout=CLOSE_SECONDS, max_msg_size=2 * messages.MAX_BYTES)
        if not socket.can_prepare(request):
            raise web.HTTPBadRequest
        socket.headers.update(HEADERS)
        await socket.prepare(request)
        self._sockets.add(socket)
        code, reason = WSCloseCode.OK, ""
        try:
            if self.broadcast:
                code, reason = WSCloseCode.POLICY_VIOLATION, await self.broadcast.watch(socket)
            elif self.viewers >= self.max_viewers:
                code = WSCloseCode.TRY_AGAIN_LATER
                reason = f"all {self.max_viewers} places are taken; try again later"
            else:
                code, reason = WSCloseCode.POLICY_VIOLATION, await self._view(socket)
        finally:
            await self._close(socket, code if reason else WSCloseCode.OK, reason)
            if request.transport is not None:
                request.transport.abort()
        return socket

    async def _view(self, socket):
        viewer = Viewer(socket, self.models)
        self.viewers += 1
        try:
            return await viewer.run()
        finally:
            self.viewers -= 1
            self._trims = 2  # At the first one, the viewer's last frame may still be at work.
            self.frames += viewer.frames

    @staticmethod
    async def _close(socket, code, reason, seconds=CLOSE_SECONDS):
        """Close a WebSocket with a reason, even where its other end no longer reads."""
        text = reason.encode()[:REASON_BYTES].decode(errors="ignore").encode()
        with contextlib.suppress(Exception):
            await asyncio.wait_for(socket.close(code=code, message=text), seconds)


def _silent_logger():
    logger = logging.getLogger("pipnet.web")
    logger.disabled = True
    return logger


class _Refusing(asyncio.Protocol):
    """A connection beyond MAX_CONNECTIONS."""

    def connection_made(self, transport):
        transport.write(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 21\r\n"
                        b"Connection: close\r\n\r\ntoo many connections\n")
        transport.close()


def serve(server: Server) -> None:
    """Run a server until Ctrl-C or the end of its source; print its address.

    Raises:
        UserError: where the address cannot be used, the source failed or a file cannot be written.
    """
    server.start()
    print(f"{server.address.url()} (Ctrl-C ends)", flush=True)
    if server.address.token and not server.broadcast:
        print("note: browsers give their camera to https and localhost only; from another machine "
              f"use ssh -L {server.address.port}:localhost:{server.address.port} and --serve "
              f"{server.address.port}", file=sys.stderr)
    try:
        server.wait()
    except KeyboardInterrupt:
        pass  # The user quits; the files are completed.
    finally:
        server.stop()
