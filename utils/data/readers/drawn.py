"""Reader of drawn faces, which stand in for a published set where none is at hand.

Nothing is read: utils.data.drawn_faces computes the landmarks of each face from its seed, and draws
the picture when the crop is written.
"""
from __future__ import annotations

import pathlib

import numpy

from utils.args import SAMPLES
from utils.data.drawn_faces import render
from utils.data.readers.face import Face
from utils.errors import UserError

NAME = SAMPLES
SCHEME = "300W"
LAYOUT = "no files: asked for by name, never recognised"
EXPECTED = {}
COUNTS = {"train": 1200, "test": 120}
SIZE = 320
# A seed is (number of the split, index), so the splits share no face.
_SPLITS = {"train": 0, "test": 1}


def matches(folder: pathlib.Path) -> bool:
    """Return False: no folder holds drawn faces."""
    return False


def read(folder: pathlib.Path, problems: list) -> list[Face]:
    """Return the faces of `draw` with the default counts; the arguments are not used."""
    return draw()


def draw(counts: dict[str, int] | None = None) -> list[Face]:
    """Return drawn faces of the lists "train" and "test", without their pictures.

    Args:
        counts: number of faces of each list; default: COUNTS.

    Raises:
        UserError: a list is unknown or a count is not a whole number.
    """
    faces = []
    for split, count in (COUNTS if counts is None else counts).items():
        if split not in _SPLITS or count != int(count) or count < 0:
            raise UserError(f"drawn faces: {split!r}: {count!r} asked for; give whole numbers for "
                            f"{' and '.join(_SPLITS)}")
        for i in range(int(count)):
            name = f"{split}_{i:06d}"
            _, points = render.render((_SPLITS[split], i), SIZE, rasterise=False)
            faces.append(Face(photo=pathlib.Path("drawn", split, f"{i:06d}"), points=points,
                              lists=(split,), subset=split, group=name, name=name))
    return faces


def image_of(face: Face) -> numpy.ndarray:
    """Draw the picture of a face from `draw`, RGB uint8 (SIZE, SIZE, 3)."""
    split, number = face.photo.parts[-2:]
    return render.render((_SPLITS[split], int(number)), SIZE)[0]
