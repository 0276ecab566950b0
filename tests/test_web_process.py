"""demo.py --serve as a process: its address, its end, its files, and its memory after attacks."""
import asyncio
import contextlib
import csv
import pathlib
import signal
import socket
import subprocess
import sys
import time

import cv2
import pytest
from helpers import lid_film

import demo

aiohttp = pytest.importorskip("aiohttp", reason="needs aiohttp (requirements-web.txt)")
from helpers.web_client import Client, jpeg  # noqa: E402

ROOT = pathlib.Path(demo.__file__).parent
WEIGHTS = "tiny.int8.onnx"


@contextlib.contextmanager
def serving(*flags, cwd=ROOT):
    """Run demo.py --serve on a free port; give the process with its address as `url`."""
    process = subprocess.Popen([sys.executable, ROOT / "demo.py", "--serve", *flags], text=True,
                               cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        process.url = process.stdout.readline().split(" ")[0]
        assert process.url, process.stderr.read()
        yield process
    finally:
        process.kill()
        process.communicate()


def end(process, number=signal.SIGINT):
    """Send a signal; return the exit code and what was printed since the address."""
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def resident(process):
    """Return the resident memory of a process in MB."""
    status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    return lid_film.write(tmp_path_factory.mktemp("film") / "film.y4m")


def frames():
    """JPEGs of the film, each with its time."""
    return [(jpeg(image), i / lid_film.RATE) for i, image in enumerate(lid_film.images())]


async def watch(url, count=None):
    """Send the film's first frames as a viewer; return the answers."""
    async with Client(url, WEIGHTS) as client:
        return [await client.ask(*one) for one in frames()[:count]]


def test_a_film_is_served_and_its_events_are_those_of_the_demo(film, tmp_path):
    demo.main(["--source", str(film), "--driver", "--detector", "haar", "--events",
               str(tmp_path / "demo.csv")])

    async def lines(url):
        found = []
        async with Client(url, weights=None) as client:
            while len(found) < 2:
                message = await client.receive()
                found += message.get("lines", [])
            assert "jpeg" in message or message["type"] == "events"
        return found

    with serving("0", "--source", str(film), "--events", "seen.csv", "--landmarks", "seen.json",
                 "--detector", "haar",
                 cwd=tmp_path) as process:
        seen = asyncio.run(lines(process.url))
        code, out, err = end(process)
    assert code == 0
    assert err == ""
    assert "faces: seen.json, seen.csv" in out
    expected = (tmp_path / "demo.csv").read_bytes().decode().splitlines(keepends=True)
    assert seen == expected[1:3]
    written = (tmp_path / "seen.csv").read_bytes().decode().splitlines(keepends=True)
    assert written[:3] == expected[:3]
    assert (tmp_path / "seen.json").read_text().endswith("\n]}\n")
    assert {path.name for path in tmp_path.iterdir()} == {"demo.csv", "seen.csv", "seen.json"}


def test_a_signal_in_the_middle_of_a_film_completes_the_files(film, tmp_path):
    async def until_asleep(url):
        async with Client(url, weights=None) as client:
            while True:
                message = await client.receive()
                if message["type"] == "frame" and message["person"]["state"] == "asleep":
                    return

    with serving("0", "--source", str(film), "--events", "seen.csv", cwd=tmp_path) as process:
        asyncio.run(until_asleep(process.url))
        code, out, _ = end(process, signal.SIGTERM)
    assert code == 128 + signal.SIGTERM
    assert "seen.csv" in out
    with open(tmp_path / "seen.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert rows[-1]["event"] == "sleep", "the one that had not ended"
    assert float(rows[-1]["end"]) < lid_film.SHUT[1][1]


def test_a_token_is_made_for_other_hosts():
    with serving("0.0.0.0:0") as process:
        assert "/?token=" in process.url
        local = process.url.replace(socket.gethostname(), "127.0.0.1")
        answers = asyncio.run(watch(local, 2))
        assert len(answers[-1]["faces"]) == 1
        with pytest.raises(aiohttp.WSServerHandshakeError, match="403"):
            asyncio.run(watch(local.partition("?")[0], 1))
        code, out, err = end(process)
    assert (code, out) == (0, "2 frames\n")
    assert "https and localhost only" in err


async def attack(url, port):
    """Everything that a viewer may do wrong, at the same time."""
    async def run(weights, *sent, leave=False):
        with contextlib.suppress(ConnectionError, aiohttp.ClientError, asyncio.TimeoutError):
            async with Client(url, weights) as client:
                for one in sent:
                    await client.send(*one)
                while not leave and (await client.receive())["type"] != "closed":
                    pass

    good = jpeg(next(iter(lid_film.images())))
    big = jpeg(cv2.resize(next(iter(lid_film.images())), (4096, 3072)), 90)
    half_open = [await asyncio.open_connection("127.0.0.1", port) for _ in range(20)]
    for i, (_, writer) in enumerate(half_open):
        writer.write((b"GET /watch HTTP/1.1\r\nHost: localhost\r\n", b"\x16\x03\x01\0\xee" * 9,
                      b"GET / HTTP/9.9\r\n\r\n", b"A" * 20000)[i % 4])
    for _ in range(2):
        await asyncio.gather(
            # Most find no place; the others leave in the middle of a frame.
            *(run(WEIGHTS, (good, 0.0), leave=True) for _ in range(50)),
            *(run(WEIGHTS, *[(good, i / 10) for i in range(100)]) for _ in range(4)),
            *(run(WEIGHTS, (bytes(9 << 20), 0.0)) for _ in range(4)),
            *(run(WEIGHTS, (bytes(5 << 20), 0.0), leave=True) for _ in range(4)),
            *(run(None, *[("x" * 1000,)] * 50) for _ in range(4)))
        await run(WEIGHTS, (big, 0.0), (b"junk", 1.0), leave=True)
    for _, writer in half_open:
        writer.close()


@pytest.mark.skipif(not pathlib.Path("/proc/self/status").is_file(), reason="needs /proc")
def test_the_server_and_its_memory_survive_attacks():
    with serving("0") as process:
        port = int(process.url.rstrip("/").rpartition(":")[2])
        expected = asyncio.run(watch(process.url, 20))
        # Once before the measurement: allocators keep some of what a first attack needed.
        asyncio.run(attack(process.url, port))
        time.sleep(3)  # The server returns memory within two seconds.
        before = after = resident(process)
        asyncio.run(attack(process.url, port))
        answers = asyncio.run(watch(process.url, 20))
        for _ in range(60):
            time.sleep(0.5)
            after = resident(process)
            if after < 1.1 * before:
                break
        assert [one["faces"] for one in answers] == [one["faces"] for one in expected]
        code, _, err = end(process)
    assert code == 0
    assert "Traceback" not in err
    assert after < 1.1 * before, f"{before:.0f} and {after:.0f} MB"
