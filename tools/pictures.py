"""Draws the README's pictures of a shipped model anew: python -m tools.pictures.

assets/driver.jpg: a drawn driver who falls asleep, in three moments. assets/demo.gif: a portrait
that moves before the camera. Flags of demo.py may follow.
"""
import argparse
import pathlib
import tempfile

import cv2
import numpy
import PIL.Image

import demo
from tools import drawn_driver
from utils.args import ROOT
from utils.data.photo import read_photo
from utils.tracking import sources

RATE = 20
# When the driver's eyes are open, in seconds: three blinks, then sleep, late enough for PERCLOS to
# be a number. When pictures are taken.
OPEN, SECONDS = ((0.0, 10.0), (10.2, 20.0), (20.2, 29.0), (29.2, 33.0)), 38
TAKEN = (32.0, 33.8, 37.5)
DRIVER, PORTRAIT = (480, 360), (320, 320)


def driver(time):
    """A frame BGR uint8 of the drawn driver."""
    awake = any(start <= time < end for start, end in OPEN)
    face, _ = drawn_driver.face(float(awake), size=300)
    frame = numpy.full((DRIVER[1], DRIVER[0], 3), (70, 78, 82), numpy.uint8)
    frame[30:330, 90:390] = face
    return cv2.cvtColor(frame, cv2.COLOR_RGB2BGR)


def portrait(time):
    """A frame BGR uint8 of the portrait, which sways once a second and comes a little nearer."""
    photo = cv2.cvtColor(read_photo(sources.find_source("sample")[1]), cv2.COLOR_RGB2BGR)
    turn = 2 * numpy.pi * time
    matrix = cv2.getRotationMatrix2D((260, 240), 4 * numpy.sin(turn), 0.95 - 0.1 * numpy.cos(turn))
    matrix[:, 2] += (160 - 260 + 8 * numpy.sin(turn), 170 - 240)
    return cv2.warpAffine(photo, matrix, PORTRAIT, borderMode=cv2.BORDER_REPLICATE)


def filmed(folder, picture, size, times, argv):
    """The frames BGR uint8 that demo.py makes of a film of picture(time)."""
    source, target = folder / "film.avi", folder / "seen.avi"
    writer = cv2.VideoWriter(str(source), cv2.VideoWriter.fourcc(*"MJPG"), RATE, size)
    for time in times:
        writer.write(picture(time))
    writer.release()
    demo.main(["--source", str(source), "--output", str(target), *argv])
    capture, frames = cv2.VideoCapture(str(target)), []
    while (read := capture.read())[0]:
        frames.append(read[1])
    return frames


def main():
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.pictures", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=pathlib.Path, default=ROOT / "assets")
    given, argv = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        seen = filmed(folder, driver, DRIVER, numpy.arange(0, SECONDS, 1 / RATE),
                      ["--driver", *argv])
        strip = numpy.hstack([seen[round(time * RATE)] for time in TAKEN])
        cv2.imwrite(str(given.output_dir / "driver.jpg"), strip, [cv2.IMWRITE_JPEG_QUALITY, 85])
        # One sway to settle on, and one to show.
        seen = filmed(folder, portrait, PORTRAIT, numpy.arange(0, 2, 1 / RATE), argv)[RATE:]
    frames = [PIL.Image.fromarray(frame[..., ::-1]).quantize(128) for frame in seen]
    frames[0].save(given.output_dir / "demo.gif", save_all=True, append_images=frames[1:],
                   duration=80, loop=0)


if __name__ == "__main__":
    main()
