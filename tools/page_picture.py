"""Make the screenshot of the page in the README, with Chromium.

    python -m tools.page_picture [--output assets/page.jpg] [--size 1280x800] [--dark]

A drawn driver, whose eyes and head follow a script for a minute, is the camera of the browser; the
picture is taken while he sleeps. Takes a minute and a half. Needs chromium and playwright
(requirements-dev.txt).
"""
import argparse
import functools
import math
import pathlib
import shutil
import subprocess
import sys
import tempfile

import cv2
import numpy

from tools import drawn_driver
from utils.args import ROOT
from utils.errors import UserError
from utils.errors import run as guarded

RATE, SIZE = 30, (640, 480)  # Chromium plays an .mjpeg file at 30 frames a second.
# Seconds of closed eyes: blinks, a microsleep, and the sleep of the picture.
SHUT = ((4, 4.2), (9.5, 9.7), (13, 13.2), (19.6, 19.8), (26, 26.2), (29, 29.3), (35, 35.2),
        (41, 41.3), (44, 45.4), (49, 49.3), (54.5, 64))
TURNS = ((15, 18, 30), (31, 34, -35))  # Start, end and degrees of yaw.
PICTURE = 61.0  # Seconds.


def openness(time):
    """Return how open the eyes are: lids move within 0.07 s, and droop before the sleep."""
    closing = min(min(abs(time - a), abs(time - b)) * (-1 if a < time < b else 1) for a, b in SHUT)
    droop = 0.3 * min(max(time - 46, 0) / 8, 1)
    return round(20 * (1 - droop) * min(max(0.5 + closing / 0.14, 0), 1)) / 20


def yaw(time):
    """Return the yaw of the head in whole degrees."""
    sway = 4 * math.sin(time / 3)
    turn = sum(angle * math.sin(math.pi * (time - a) / (b - a)) ** 0.5
               for a, b, angle in TURNS if a < time < b)
    return float(round(sway + turn))


@functools.lru_cache(None)
def jpeg(*driver):
    """Return the frame of a driver (openness, yaw) as JPEG."""
    frame = numpy.full((SIZE[1], SIZE[0], 3), (70, 78, 82), numpy.uint8)
    frame[40:480, 100:540] = drawn_driver.face(*driver, size=440)[0]
    return cv2.imencode(".jpg", frame[..., ::-1])[1].tobytes()


def take(film, output, size, dark):
    """Serve the page, open it with the film as camera, and take the picture."""
    try:
        from playwright.sync_api import expect, sync_playwright
    except ImportError:
        raise UserError("playwright is not installed; pip install playwright") from None
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        raise UserError("chromium is not installed; apt-get install chromium")
    server = subprocess.Popen([sys.executable, ROOT / "demo.py", "--serve", "0"], text=True,
                              stdout=subprocess.PIPE)
    try:
        with sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=chromium, args=[
                "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream",
                f"--use-file-for-fake-video-capture={film}"])
            page = browser.new_page(viewport={"width": size[0], "height": size[1]},
                                    color_scheme="dark" if dark else "light")
            page.goto(server.stdout.readline().split()[0])
            page.click("#start")
            page.wait_for_timeout(1000 * PICTURE)
            expect(page.locator("#word")).to_have_text("asleep")
            page.screenshot(path=output, type="jpeg", quality=88)
            browser.close()
    finally:
        server.terminate()
        server.wait()


def main():
    """Parse the command line and make the picture."""
    parser = argparse.ArgumentParser(prog="python -m tools.page_picture", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=pathlib.Path, default=ROOT / "assets" / "page.jpg",
                        help="a .jpg file [assets/page.jpg]")
    parser.add_argument("--size", default="1280x800", metavar="WxH",
                        help="of the browser's window [1280x800]")
    parser.add_argument("--dark", action="store_true", help="the dark colours")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        film = pathlib.Path(folder) / "film.mjpeg"
        with open(film, "wb") as file:
            for i in range(round((PICTURE + 3) * RATE)):
                file.write(jpeg(openness(i / RATE), yaw(i / RATE)))
        take(film, options.output, [int(side) for side in options.size.split("x")], options.dark)


if __name__ == "__main__":
    guarded(main)
