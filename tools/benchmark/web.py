"""Measure the page's server: frames a second and latency of one and of several viewers.

    python -m tools.benchmark.web [--weights FILE] [--viewers 1 4] [--rounds 5] [--seconds 5]

The frames are a pan over the portrait, 640x480, as JPEGs of quality 90. demo.py --serve runs as a
process of its own; the viewers are WebSockets of this process, which send as the page does: the
next frame after the answer, "30 a second" no more than a camera delivers. Latency is from the
sending of a frame to its answer. demo.py on the same frames as a film is beside them: the
difference of a long and of a short film, so without its start. All variants run once a round, in
random order; the table has medians over the rounds.
"""
import argparse
import asyncio
import json
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import time

import aiohttp
import cv2
import numpy

from tools.benchmark.common import say, table
from tools.benchmark.tracking import pan
from utils.args import ROOT
from utils.data.photo import read_photo
from utils.errors import run as guarded
from utils.tracking import sources
from utils.web import messages

SIZE, FRAMES, QUALITY, RATE = (640, 480), 90, 90, 30
SHORT, LONG = 90, 450  # Frames of the two films.
WARM = 10  # Answers at the start that are not measured: the model is loaded, the face is found.


async def view(url, weights, jpegs, rate, seconds):
    """Send frames for some seconds; return the latencies in seconds and the frames a second."""
    latencies, sent = [], 0
    async with aiohttp.ClientSession() as session, session.ws_connect(
            url + "watch", headers={"Origin": url.rstrip("/")}, max_msg_size=0) as socket:
        await socket.send_str(json.dumps({"weights": weights}))
        await socket.receive()
        start = begun = time.perf_counter()
        while time.perf_counter() - begun < seconds:
            now = time.perf_counter()
            if rate:  # The camera's next frame.
                await asyncio.sleep((1 - (now - start) * rate % 1) / rate)
                now = time.perf_counter()
            await socket.send_bytes(messages.HEADER.pack(messages.FRAME, now - start + 1)
                                    + jpegs[sent % len(jpegs)])
            answer = json.loads(await socket.receive_str())
            while answer["type"] == "events":
                answer = json.loads(await socket.receive_str())
            assert answer["type"] == "frame", answer
            assert answer["faces"], "the face is lost"
            sent += 1
            if sent == WARM:
                begun, latencies = time.perf_counter(), []
            latencies.append(time.perf_counter() - now)
        return latencies, len(latencies) / (time.perf_counter() - begun)


def measure_page(url, weights, jpegs, viewers, rate, seconds):
    """Return frames a second of a viewer, median and 95 % of the latency in ms."""
    async def together():
        # Each viewer begins somewhere else in the pan.
        return await asyncio.gather(*(
            view(url, weights, jpegs[i * 7:] + jpegs[:i * 7], rate, seconds)
            for i in range(viewers)))

    found = asyncio.run(together())
    latencies = numpy.concatenate([one for one, _ in found]) * 1000
    return (numpy.median([rate for _, rate in found]), numpy.percentile(latencies, 50),
            numpy.percentile(latencies, 95))


def measure_demo(folder, weights, flags):
    """Return frames a second of demo.py on a film, without its start."""
    seconds = {}
    for count in (SHORT, LONG):
        start = time.perf_counter()
        subprocess.run([sys.executable, ROOT / "demo.py", "--source", folder / f"{count}.avi",
                        "--weights", weights, "--driver", "--pose", *flags], check=True,
                       capture_output=True)
        seconds[count] = time.perf_counter() - start
    return (LONG - SHORT) / (seconds[LONG] - seconds[SHORT]), None, None


def write_films(folder, frames):
    """Write the short and the long film of the frames."""
    for count in (SHORT, LONG):
        writer = cv2.VideoWriter(str(folder / f"{count}.avi"), cv2.VideoWriter.fourcc(*"MJPG"),
                                 RATE, SIZE)
        for i in range(count):
            writer.write(frames[i % len(frames)][..., ::-1])
        writer.release()


def parse(argv=None):
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.benchmark.web", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default=str(ROOT / "weights" / "tiny.int8.onnx"),
                        metavar="FILE", help="model of the server [tiny.int8.onnx]")
    parser.add_argument("--viewers", nargs="+", type=int, default=[1, 4], metavar="N",
                        help="numbers of viewers [1 4]")
    parser.add_argument("--rounds", type=int, default=5, help="repetitions [5]")
    parser.add_argument("--seconds", type=float, default=5, help="length of a measurement [5]")
    return parser.parse_args(argv)


def main():
    """Measure and print the table."""
    options = parse()
    frames = pan(read_photo(sources.find_source("sample")[1]), SIZE, FRAMES)
    jpegs = [cv2.imencode(".jpg", frame[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[1]
             .tobytes() for frame in frames]
    name = pathlib.Path(options.weights).name
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        write_films(folder, frames)
        server = subprocess.Popen(
            [sys.executable, ROOT / "demo.py", "--serve", "0", "--weights", options.weights,
             "--viewers", str(max(options.viewers))], stdout=subprocess.PIPE, text=True)
        try:
            url = server.stdout.readline().split()[0]
            variants = {
                "demo.py, landmarks to a file": lambda: measure_demo(
                    folder, options.weights, ["--landmarks", folder / "out.json"]),
                "demo.py, drawn film to a file": lambda: measure_demo(
                    folder, options.weights, ["--output", folder / "out.avi"])}
            for count in options.viewers:
                for rate in (RATE, 0):
                    label = f"page, {count} viewer{'s' * (count > 1)}, " + (
                        f"camera of {rate} a second" if rate else "as fast as answered")
                    variants[label] = lambda count=count, rate=rate: measure_page(
                        url, name, jpegs, count, rate, options.seconds)
            found, loads = {label: [] for label in variants}, []
            for number in range(options.rounds):
                say(f"round {number + 1} of {options.rounds}")
                loads.append(os.getloadavg()[0])
                for label in random.Random(number).sample(list(variants), len(variants)):
                    found[label].append(variants[label]())
        finally:
            server.terminate()
            server.wait()
    rows = [[label, *("" if values[0] is None else f"{numpy.median(values):.0f}"
                      for values in zip(*measured))] for label, measured in found.items()]
    head = ["", "frames a second and viewer", "latency, median ms", "latency, 95 % ms"]
    print(f"{name}, {len(os.sched_getaffinity(0))} cores, system load {min(loads):.1f} to "
          f"{max(loads):.1f}, {options.rounds} rounds\n")
    print("\n".join(table(head, rows)))


if __name__ == "__main__":
    guarded(main)
