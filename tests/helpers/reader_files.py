"""Write valid and damaged files of the published layouts, for the tests of the readers."""
import pathlib

import cv2
import numpy

from utils.landmarks.schemes import SCHEMES


def image(path):
    """Write a small image file; readers do not open it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), numpy.zeros((8, 8, 3), numpy.uint8))
    return path


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def face_of(name, seed=0):
    """Return the mean face of a scheme in pixels, 0-based, at a random position: (K, 2)."""
    shift = numpy.random.default_rng(seed).uniform(5, 50, 2)
    return numpy.round(SCHEMES[name].mean_face * 100 + shift, 3)


def pts(points, count=None):
    """Return the text of a .pts file with 0-based points (K, 2)."""
    rows = "\n".join(f"{x + 1:.3f} {y + 1:.3f}" for x, y in points)
    return f"version: 1\nn_points: {count or len(points)}\n{{\n{rows}\n}}\n"


def reasons(problems):
    """Return {file name: reason} of problems without notes."""
    return {pathlib.Path(path).name: reason for path, reason in problems
            if not reason.startswith("note:")}


GOOD = pts(face_of("300W"))
LINE = GOOD.split("\n")[8]  # line 9 of the file
DAMAGED = {
    "short": (pts(face_of("300W")[:67]), "67 points found, 68 expected"),
    "long": (pts(numpy.vstack([face_of("300W")] * 2)), "136 points found, 68 expected"),
    "count": (pts(face_of("300W"), 70), "n_points says '70', 68 points found"),
    "nan": (GOOD.replace(LINE, "nan 5"), "line 9: 'nan' is no finite number"),
    "inf": (GOOD.replace(LINE, "1 -inf"), "line 9: '-inf' is no finite number"),
    "words": (GOOD.replace(LINE, "left eye"), "line 9: 'left' is no number"),
    "one": (GOOD.replace(LINE, "12.5"), "line 9: x y expected, found '12.5'"),
    "comma": (GOOD.replace(LINE, "12,5 3"), "line 9: '12,5' is no number"),
    "underscore": (GOOD.replace(LINE, "12_5 3"), "line 9: '12_5' is no number"),
    "latin": (GOOD.replace(LINE, "1\xe9 3").encode("latin-1"), "line 9: '1\\xe9' is no number"),
    "cut": (GOOD[:GOOD.index("}")], "cut off"),
    "empty": (b"", "the file is empty"),
    "blank": (b"\r\n  \n", "the file is empty"),
    "zeros": (bytes(5000), "no line { found"),
    "binary": (bytes(range(256)) * 40, "no line { found"),
    "brackets": ("}\n{\n", "cut off"),
    "none": ("n_points: 0\n{\n}\n", "0 points found, 68 expected"),
}
