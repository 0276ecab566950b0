"""A film of a drawn driver who blinks, sleeps and has a microsleep, for a browser's fake camera."""
import functools

import cv2
import numpy

from tools import drawn_driver

RATE, SIZE, SECONDS = 10, (640, 480), 9
SHUT = ((1.0, 1.3), (2.2, 6.0), (6.8, 7.8))  # Intervals of closed eyes in seconds.
KINDS = "blink", "sleep", "microsleep"  # What they are.


@functools.lru_cache(None)
def image(openness):
    """Return the driver as RGB uint8 (480, 640, 3)."""
    frame = numpy.full((SIZE[1], SIZE[0], 3), (70, 78, 82), numpy.uint8)
    frame[60:460, 120:520] = drawn_driver.face(openness, size=400)[0]
    return frame


def images():
    """Yield the frames of the film."""
    for i in range(RATE * SECONDS):
        shut = any(start - 1e-6 <= i / RATE < end - 1e-6 for start, end in SHUT)
        yield image(0.0 if shut else 1.0)


def write(path):
    """Write the film as uncompressed YUV4MPEG2, which Chromium and OpenCV read; return path."""
    with open(path, "wb") as file:
        file.write(b"YUV4MPEG2 W%d H%d F%d:1 Ip A1:1 C420jpeg\n" % (*SIZE, RATE))
        for frame in images():
            file.write(b"FRAME\n" + cv2.cvtColor(frame, cv2.COLOR_RGB2YUV_I420).tobytes())
    return path
