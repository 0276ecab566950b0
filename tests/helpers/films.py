"""Films that are written with PyAV: time stamps, codecs, containers and pixel shapes at will."""
from fractions import Fraction

import av
import numpy

SIZE = 160, 120  # Width and height in pixels.


def numbered(i, size=SIZE):
    """Return a BGR frame that shows its number, below 64, as six stripes."""
    stripes = numpy.array([255 * (i >> bit & 1) for bit in range(6)], numpy.uint8)
    columns = numpy.arange(size[0]) * 6 // size[0]
    return numpy.broadcast_to(stripes[columns][None, :, None], (size[1], size[0], 3)).copy()


def number_of(frame):
    """Return the number that a frame shows."""
    middle = frame[frame.shape[0] // 2, :, 0]
    return sum((int(middle[round((bit + 0.5) * len(middle) / 6)]) > 128) << bit
               for bit in range(6))


def write(path, frames, stamps=None, rate=25, codec="mpeg4", container=None, sar=None, **options):
    """Write BGR frames to a film.

    Args:
        path: of the file.
        frames: BGR uint8, all of one size.
        stamps: milliseconds of each frame; default: from the rate.
        rate: frames a second that the header states.
        codec: of FFmpeg.
        container: format of FFmpeg; default: by the suffix.
        sar: width to height of a pixel, such as "2:1".
        options: of the container, with _ for -.
    """
    base = Fraction(1, 1000) if stamps is not None else 1 / Fraction(rate)
    with av.open(str(path), "w", format=container, options=options) as film:
        fast = {"deadline": "realtime", "cpu-used": "8"} if codec == "libvpx" else {}
        stream = film.add_stream(codec, rate=rate, options=fast)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.codec_context.time_base = base
        if sar:
            stream.codec_context.sample_aspect_ratio = Fraction(sar.replace(":", "/"))
        for i, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(image, format="bgr24")
            frame.pts, frame.time_base = i if stamps is None else stamps[i], base
            film.mux(stream.encode(frame))
        film.mux(stream.encode(None))
