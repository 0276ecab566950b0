"""The page's server: answers, addresses, and what it refuses."""
import argparse
import asyncio
import contextlib
import pathlib
import re
import socket

import numpy
import pytest
from helpers import painted_faces

import demo
from utils.errors import UserError
from utils.pipeline import Pipeline
from utils.tracking import sources
from utils.web import messages, start
from utils.web.address import Address, is_loopback, same_origin
from utils.web.models import Models, watch_all

aiohttp = pytest.importorskip("aiohttp", reason="needs aiohttp (requirements-web.txt)")
from helpers.web_client import Client, jpeg, running  # noqa: E402

from utils.web import server as web  # noqa: E402
from utils.web import viewer as viewers  # noqa: E402
from utils.web.broadcast import Broadcast  # noqa: E402

PAGE = web.PAGE


def face(i=0):
    return painted_faces.paint(painted_faces.background(), (1, 100 + i, 120, 80))


class PaintedModels:
    """Stands in for Models: a pipeline of painted faces."""
    paths = {"tiny": None, "other": None}
    default = "tiny"

    def __init__(self):
        self.pipelines = []

    def pipeline(self, name, still=False):
        if name not in self.paths:
            raise messages.Refused(f"weights {name}: not one of the server's")
        predictor = painted_faces.Painted()
        options = argparse.Namespace(eyes=False, driver=False, pose=False, landmarks=None,
                                     events=None, alarm=None, detector="painted")
        watch_all(options, predictor.scheme)
        options.driver = not still
        self.pipelines.append(Pipeline(predictor, painted_faces.detector(), options, {}, False))
        return self.pipelines[-1]


@pytest.fixture
def url():
    with running(models=PaintedModels(), viewers=2) as server:
        yield server.address.url()


def test_addresses():
    assert Address.parse("8000") == Address("127.0.0.1", 8000, None)
    assert Address.parse("[::1]:80").url() == "http://localhost:80/"
    outside = Address.parse("192.168.0.7:8000")
    assert len(outside.token) >= 20
    assert outside.token != Address.parse("192.168.0.7:8000").token
    assert outside.url() == f"http://192.168.0.7:8000/?token={outside.token}"
    assert Address.parse("0.0.0.0:8000").url().startswith(f"http://{socket.gethostname()}:8000/?")
    assert Address.parse("8000", "a-long-enough-one").token == "a-long-enough-one"
    for text in ("", "host:", "http://x", "70000", "8e3", "²"):
        with pytest.raises(UserError, match="expected .HOST:.PORT"):
            Address.parse(text)
    for token in ("short", "with spaces in it", "semi;colon;semi;colon"):
        with pytest.raises(UserError, match="at least 12 letters"):
            Address.parse("8000", token)
    assert is_loopback("localhost")
    assert is_loopback("127.8.8.8")
    assert not is_loopback("0.0.0.0")
    assert not is_loopback("localhost.example.org")


def test_requests_need_the_token_or_the_name_of_this_machine():
    local, outside = Address("127.0.0.1", 80), Address("0.0.0.0", 80, "abcdefghijkl")
    assert local.why_refused({"Host": "localhost:9000"}, {}, {}) is None
    assert local.why_refused({"Host": "[::1]:80"}, {}, {}) is None
    # A foreign page whose name leads to 127.0.0.1 sends its own name.
    assert "evil.example" in local.why_refused({"Host": "evil.example:80"}, {}, {})
    assert "missing" in local.why_refused({}, {}, {})
    assert outside.why_refused({"Host": "box"}, {"token": "abcdefghijkl"}, {}) is None
    assert outside.why_refused({"Host": "box"}, {}, {"pipnet_80": "abcdefghijkl"}) is None
    for query, cookies in (({}, {}), ({"token": "abcdefghijk"}, {}), ({}, {"pipnet_80": "é"})):
        assert "token" in outside.why_refused({"Host": "box"}, query, cookies)
    assert same_origin({"Origin": "https://Box:80", "Host": "box:80"})
    for origin in ("http://box", "http://evil.example", "null", "", "http://box:80.evil.example"):
        assert not same_origin({"Origin": origin, "Host": "box:80"})
    assert not same_origin({"Host": "box"})


@pytest.mark.parametrize(("content", "reason"), [
    (b"", "not a JPEG"), (b"\xff\xd8\xff" + b"x" * 500, "not a JPEG"),
    (b"GIF89a" + bytes(50), "not a JPEG"), (bytes(5 << 20), "5.0 MB; at most 4 MB"),
    (jpeg(numpy.zeros((20, 4100, 3), numpy.uint8)), "4100x20"),
    (jpeg(numpy.zeros((8, 40, 3), numpy.uint8)), "40x8"),
    (jpeg(face(), 90, 2, 1), "progressive"), (jpeg(face())[:-600], "cut off"),
    # Without quantization tables.
    (jpeg(face()).replace(b"\xff\xdb", b"\xff\xe6"), "damaged")],
    ids=lambda value: value if isinstance(value, str) else "")
def test_pictures_that_are_refused(content, reason):
    with pytest.raises(messages.Refused, match=re.escape(reason)):
        messages.decode(content)


def test_a_picture_keeps_its_pixels_whatever_its_tags_say():
    exif = bytes.fromhex("ffe1 0022 457869660000 4d4d002a00000008 0001 0112 0003 00000001 0006 0000"
                         "00000000")
    plain = jpeg(face())
    turned = plain[:2] + exif + plain[2:]
    assert (messages.decode(turned) == messages.decode(plain)).all()
    assert abs(messages.decode(plain).astype(int) - face()).mean() < 3


def test_the_page_has_no_inline_code_and_no_outside_host():
    html = (PAGE / "index.html").read_text("utf-8")
    assert "style=" not in html
    assert not re.search(r"\son\w+=", html)
    assert not re.search(r"<script[^>]*>\s*\S[^<]*</script>", html)
    scripts = list(PAGE.glob("*.js"))
    assert sum(len(path.read_text("utf-8").splitlines()) for path in scripts) <= 300
    for path in PAGE.iterdir():
        text = path.read_text("utf-8").replace("http://www.w3.org/2000/svg", "")
        assert set(re.findall(r"https?://[\w.]*", text)) <= {"https://", "http://localhost"}
        assert path.suffix in web.TYPES
    assert {p.name for p in PAGE.iterdir()} == {"index.html", "style.css", *(
        p.name for p in scripts)}


def test_files(url):
    async def check():
        async with aiohttp.ClientSession() as session:
            for path in PAGE.iterdir():
                async with session.get(url + path.name) as answer:
                    assert await answer.read() == path.read_bytes()
                    policy = answer.headers["Content-Security-Policy"]
                    assert policy.startswith("default-src 'none'; script-src 'self'; ")
                    assert "unsafe" not in policy
                    assert answer.content_type == web.TYPES[path.suffix]
            async with session.get(url + "about") as answer:
                about = await answer.json()
            assert about["weights"] == ["tiny", "other"]
            assert about["source"] is None
            assert about["states"]["asleep"]["closed"] is True
            assert about["header"] == "event,id,start,end,seconds\r\n"
            for path in ("../server.py", "%2e%2e/server.py", "server.py", "..%2f__init__.py", "x"):
                async with session.get(aiohttp.client.URL(url + path, encoded=True)) as answer:
                    assert answer.status == 404
                    assert "Content-Security-Policy" in answer.headers
            async with session.get(url, headers={"Host": "evil.example"}) as answer:
                assert answer.status == 403
    asyncio.run(check())


def test_a_viewer_gets_what_the_pipeline_finds(url):
    async def check():
        async with Client(url) as client:
            assert client.model["points"] == 68
            assert len(client.model["regions"]) == 9
            return [await client.ask(jpeg(face(i)), i / 10) for i in range(4)]

    pipeline = PaintedModels().pipeline("tiny")
    for i, answer in enumerate(asyncio.run(check())):
        seen = pipeline.observe(messages.decode(jpeg(face(i))), i / 10, "test")
        expected = messages.frame("frame", seen, i / 10, (240, 320, 3))
        assert answer.pop("ms") > 0
        assert answer == expected
        assert len(answer["faces"][0]["points"]) == 136
        assert abs(answer["faces"][0]["pose"][0]) < 30
        assert answer["person"]["state"] == "awake"
        assert answer["size"] == [320, 240]


def test_stop_and_other_weights_end_the_events(url):
    async def check():
        async with Client(url) as client:
            for i in range(12):
                await client.ask(jpeg(face() if i < 3 else painted_faces.background()), i / 10)
            await client.send({"weights": "other"})
            ended = await client.receive()
            assert ended["lines"] == ["not visible,driver,0.2,1.1,0.9\r\n"]
            assert (await client.receive())["name"] == "other"
            for i in range(12):
                await client.ask(jpeg(painted_faces.background()), 2 + i / 10)
            await client.send({"stop": True})
            assert (await client.receive())["lines"] == ["not visible,driver,2.0,3.1,1.1\r\n"]
            assert (await client.receive())["type"] == "stopped"
            still = await client.ask(jpeg(face()), 0.0, messages.STILL)
            assert still["type"] == "still"
            assert len(still["faces"]) == 1
            assert still["person"] is None
    asyncio.run(check())


def test_a_message_that_is_refused_does_not_end_the_viewer(url):
    async def check():
        async with Client(url, weights=None) as client:
            for message, reason in (
                    ((jpeg(face()), 0.0), "before the weights"), (("{",), "not a JSON object"),
                    (("[1]",), "not a JSON object"), (("[" * 100000,), "not a JSON object"),
                    (({"weights": 3},), "without weights or stop"),
                    (({"weights": "../x.pt"},), "not one of the server's")):
                answer = await client.ask(*message)
                assert answer["type"] == "refused"
                assert reason in answer["reason"]
            await client.ask({"weights": "tiny"})
            await client.ask(jpeg(face()), 1.0)
            for message, reason in (
                    ((b"\0\0",), "message of 2 bytes"), ((jpeg(face()), -1.0), "unknown kind"),
                    ((jpeg(face()), float("nan")), "unknown kind"),
                    ((jpeg(face()), 2.0, 7), "unknown kind"), ((b"junk", 2.0), "not a JPEG"),
                    ((jpeg(face()), 1.0), "not later"), ((bytes(5 << 20), 2.0), "at most 4 MB")):
                answer = await client.ask(*message)
                assert answer["type"] == "refused"
                assert reason in answer["reason"]
            assert (await client.ask(jpeg(face()), 2.0))["type"] == "frame"
    asyncio.run(check())


def test_foreign_pages_are_refused():
    with running(models=PaintedModels(), address=Address("127.0.0.1", 0, "abcdefghijkl")) as server:
        url = server.address.url()

        async def check():
            for origin in ("http://evil.example", "null", ""):
                with pytest.raises(aiohttp.WSServerHandshakeError, match="403"):
                    await Client(url, Origin=origin).__aenter__()
            for address in (url.replace("?token=abcdefghijkl", ""), url + "x"):
                with pytest.raises(aiohttp.WSServerHandshakeError, match="403"):
                    await Client(address).__aenter__()
            async with aiohttp.ClientSession(
                    cookie_jar=aiohttp.CookieJar(unsafe=True)) as session:
                for path, status in (("main.js", 403), ("about", 403), ("?token=wrong", 403),
                                     ("?token=abcdefghijkl", 200), ("main.js", 200)):
                    async with session.get(url.partition("?")[0] + path) as answer:
                        assert answer.status == status, path
                        assert status == 200 or "token is missing or wrong" in await answer.text()
                cookie = next(iter(session.cookie_jar))
                assert cookie["httponly"]
                assert cookie["samesite"] == "Strict"
            async with Client(url) as client:
                assert (await client.ask(jpeg(face()), 0.0))["type"] == "frame"
        asyncio.run(check())


def test_more_viewers_than_places_are_told(url):
    async def check():
        async with Client(url), Client(url) as second:
            async with Client(url, weights=None) as third:
                told = await third.receive()
                assert told["code"] == 1013
                assert "all 2 places are taken" in told["reason"]
            assert (await second.ask(jpeg(face()), 0.0))["type"] == "frame"
        for _ in range(100):  # The server notices soon that they left.
            async with Client(url, weights=None) as client:
                with contextlib.suppress(ConnectionError):
                    if (await client.ask({"weights": "tiny"}))["type"] == "model":
                        return
            await asyncio.sleep(0.05)
        raise AssertionError("no place became free")
    asyncio.run(check())


def test_a_flood_is_ended_and_no_frame_waits(url):
    async def check():
        async with Client(url) as client:
            with contextlib.suppress(ConnectionError):
                for i in range(200):
                    await client.send(jpeg(face()), i / 10)
            answers = []
            while not answers or answers[-1]["type"] != "closed":
                answers.append(await client.receive())
            assert answers[-1]["code"] == 1008
            assert "refused" in answers[-1]["reason"]
            assert any("one frame at a time" in one.get("reason", "") for one in answers)
        async with Client(url) as client:
            with contextlib.suppress(ConnectionError):
                await client.send(bytes(9 << 20), 0.0)
            assert (await client.receive())["code"] in (1009, 1006)
        async with Client(url) as client:
            assert (await client.ask(jpeg(face()), 0.0))["type"] == "frame"
    asyncio.run(check())


def test_half_open_connections_are_closed(url, monkeypatch):
    monkeypatch.setattr(web, "REQUEST_SECONDS", 0.1)
    monkeypatch.setattr(viewers, "IDLE_SECONDS", 0.1)
    monkeypatch.setattr(web, "MAX_CONNECTIONS", 4)
    port = int(re.search(r":(\d+)/", url)[1])

    async def check():
        opened = [await asyncio.open_connection("127.0.0.1", port) for _ in range(4)]
        opened[0][1].write(b"GET / HTTP/1.1\r\nHost: local")
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        assert b"503" in await reader.read()
        writer.close()
        for reader, writer in opened:
            with contextlib.suppress(ConnectionError):
                assert await asyncio.wait_for(reader.read(), 30) == b""
            writer.close()
        async with Client(url, weights=None) as client:
            assert "no frame for" in (await client.receive())["reason"]
    asyncio.run(check())


def test_a_pipeline_that_fails_does_not_end_the_server(url, monkeypatch, capsys):
    def fail(*_):
        raise ZeroDivisionError("on purpose")

    async def check():
        async with Client(url) as client:
            monkeypatch.setattr(Pipeline, "observe", fail)
            assert "failed to process" in (await client.ask(jpeg(face()), 0.0))["reason"]
            monkeypatch.undo()
            assert (await client.ask(jpeg(face()), 1.0))["type"] == "frame"
    asyncio.run(check())
    assert "on purpose" in capsys.readouterr().err


class Film:
    """Stands in for a Recording: a face that is away from the second 1 to 3."""
    live, rate, name = False, 10, "/some/where/film.avi"

    def __init__(self, frames=40):
        self.frames, self.released = iter(range(frames)), False

    def read(self):
        i = next(self.frames, None)
        image = face() if i is not None and not 10 <= i < 30 else painted_faces.background()
        return None if i is None else (numpy.ascontiguousarray(image[..., ::-1]), i / 1000)

    def release(self):
        self.released = True


def test_a_source_is_encoded_once_for_all_viewers(monkeypatch):
    pipeline = PaintedModels().pipeline("tiny")
    pipeline.predictor.path = pathlib.Path("weights/tiny.int8.onnx")
    film = Film()
    broadcast = Broadcast(film, pipeline)

    async def watch(url, ready):
        async with Client(url, weights=None) as client:
            ready.append(client)
            got = [await client.receive()]
            while got[-1]["type"] != "ended":
                got.append(await client.receive())
            return got

    async def check(url):
        ready = []
        return await asyncio.gather(*(watch(url, ready) for _ in range(3))), await watch(url, ready)

    with running(broadcast=broadcast) as server:
        together, late = asyncio.run(check(server.address.url()))
    assert broadcast.encoded <= 40
    assert film.released
    assert pipeline.frames == 40
    for got in (*together, late):
        assert got[0]["name"] == "tiny.int8.onnx"
        assert got[-1]["reason"] == "film.avi: the film has ended"
        frames = [one for one in got if one["type"] == "frame"]
        assert messages.decode(frames[-1]["jpeg"]).shape == (240, 320, 3)
        assert [one["time"] for one in frames] == sorted({one["time"] for one in frames})
    last = [[one for one in got if one["type"] == "frame"][-1] for got in (*together, late)]
    assert all(one == last[0] for one in last), "the same JPEG"
    assert last[0]["time"] == 0.039


def test_viewers_of_a_source_send_nothing():
    pipeline = PaintedModels().pipeline("tiny")
    pipeline.predictor.path = pathlib.Path("tiny.onnx")

    async def check(url):
        async with Client(url, weights=None) as client:
            await client.send({"weights": "tiny"})
            while (message := await client.receive())["type"] != "closed":
                pass
            assert "takes no frames" in message["reason"]

    with running(broadcast=Broadcast(Film(), pipeline)) as server:
        asyncio.run(check(server.address.url()))


def test_an_error_of_the_source_ends_the_server():
    class Gone(Film):
        live = True

    pipeline = PaintedModels().pipeline("tiny")
    server = web.Server(Address("127.0.0.1", 0), broadcast=Broadcast(Gone(3), pipeline))
    server.start()
    server.wait()
    with pytest.raises(UserError, match="gives no more frames"):
        server.stop()
    assert pipeline.frames == 3


def test_an_address_in_use_is_an_error(url):
    port = int(re.search(r":(\d+)/", url)[1])
    with pytest.raises(UserError, match=f"--serve 127.0.0.1:{port}"):
        web.Server(Address("127.0.0.1", port), models=PaintedModels()).start()


@pytest.mark.parametrize(("flags", "reason"), [
    (["--output", "x.mp4"], "--output"), (["--events", "x.csv"], "--events needs --source"),
    (["--camera-size", "64x48"], "--camera-size needs --source"),
    (["--source", "sample"], "a camera, a stream or a video"),
    (["--weights", "none.onnx"], "no such file"), (["--token", "short"], "at least 12")])
def test_mistakes_in_the_command_line(flags, reason):
    with pytest.raises(UserError, match=reason):
        demo.main(["--serve", "0", *flags])


def test_a_missing_aiohttp_is_one_line(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "aiohttp", None)
    monkeypatch.delitem(__import__("sys").modules, "utils.web.server")
    monkeypatch.delattr("utils.web.server")
    with pytest.raises(UserError, match="pip install -r requirements-web.txt"):
        start.serve(demo.parse(["--serve", "0"]), pathlib.Path("x"), {})


def test_the_choice_of_weights(tmp_path):
    shipped = demo.find_weights(None)
    for name in ("a.onnx", "a.raw.onnx", "b.pt", "b.md", "run/best.onnx", "run/last.pt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"none")
    models = Models(shipped, "haar", None, {}, tmp_path)
    assert list(models.paths) == [shipped.name, "a.onnx", "run/best.onnx", "b.pt"]
    assert models.default == shipped.name
    pipeline = models.pipeline(models.default)
    assert pipeline.predictor is models.pipeline(models.default, still=True).predictor
    assert pipeline.options.driver
    assert pipeline.options.pose
    with pytest.raises(messages.Refused, match="^a.onnx: cannot be used"):
        models.pipeline("a.onnx")
    # A viewer gives a name of the list and never a path.
    with pytest.raises(messages.Refused, match="not one of"):
        models.pipeline(str(shipped))
    assert sources.find_source("0") == ("camera", 0)
