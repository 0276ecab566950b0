"""Make the pictures of the README with demo.py and a shipped model.

    python -m tools.pictures [--output-dir FOLDER] [flags of demo.py]

assets/driver.jpg shows a drawn driver who falls asleep, at three moments. assets/demo.gif shows a
portrait that moves in front of the camera. Takes about a minute.
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

RATE = 20  # Frames a second.
# Intervals of open eyes in seconds: three blinks, then sleep. PERCLOS needs the time before.
OPEN, SECONDS = ((0.0, 10.0), (10.2, 20.0), (20.2, 29.0), (29.2, 33.0)), 38
PICTURE_TIMES = (32.0, 33.8, 37.5)  # Seconds.
DRIVER, PORTRAIT = (480, 360), (320, 320)  # Frame sizes in pixels.


def driver(time):
    """Return the frame of the drawn driver at a time in seconds, BGR uint8 (360, 480, 3)."""
    awake = any(start <= time < end for start, end in OPEN)
    face, _ = drawn_driver.face(float(awake), size=300)
    frame = numpy.full((DRIVER[1], DRIVER[0], 3), (70, 78, 82), numpy.uint8)
    frame[30:330, 90:390] = face
    return cv2.cvtColor(frame, cv2.COLOR_RGB2BGR)


def portrait(time):
    """Return the frame of the moving portrait at a time in seconds, BGR uint8 (320, 320, 3)."""
    photo = cv2.cvtColor(read_photo(sources.find_source("sample")[1]), cv2.COLOR_RGB2BGR)
    phase = 2 * numpy.pi * time
    matrix = cv2.getRotationMatrix2D((260, 240), 4 * numpy.sin(phase),
                                     0.95 - 0.1 * numpy.cos(phase))
    matrix[:, 2] += (160 - 260 + 8 * numpy.sin(phase), 170 - 240)
    return cv2.warpAffine(photo, matrix, PORTRAIT, borderMode=cv2.BORDER_REPLICATE)


def run_demo(folder, draw, size, times, argv):
    """Run demo.py on a video of draw(time) and return the frames of its output, BGR uint8."""
    source, target = folder / "input.avi", folder / "output.avi"
    writer = cv2.VideoWriter(str(source), cv2.VideoWriter.fourcc(*"MJPG"), RATE, size)
    for time in times:
        writer.write(draw(time))
    writer.release()
    demo.main(["--source", str(source), "--output", str(target), *argv])
    capture, frames = cv2.VideoCapture(str(target)), []
    while (read := capture.read())[0]:
        frames.append(read[1])
    return frames


def main():
    """Parse the command line and write both pictures."""
    parser = argparse.ArgumentParser(prog="python -m tools.pictures", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=pathlib.Path, default=ROOT / "assets")
    options, argv = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        frames = run_demo(folder, driver, DRIVER, numpy.arange(0, SECONDS, 1 / RATE),
                          ["--driver", *argv])
        strip = numpy.hstack([frames[round(time * RATE)] for time in PICTURE_TIMES])
        cv2.imwrite(str(options.output_dir / "driver.jpg"), strip, [cv2.IMWRITE_JPEG_QUALITY, 85])
        # The first period lets the tracker settle.
        frames = run_demo(folder, portrait, PORTRAIT, numpy.arange(0, 2, 1 / RATE), argv)[RATE:]
    images = [PIL.Image.fromarray(frame[..., ::-1]).quantize(128) for frame in frames]
    images[0].save(options.output_dir / "demo.gif", save_all=True, append_images=images[1:],
                   duration=80, loop=0)


if __name__ == "__main__":
    main()
