"""Drawn faces in place of a publisher's: nothing is read; a face's name tells its seed."""
import pathlib

from utils.data.drawn_faces import render
from utils.data.readers.face import Face
from utils.errors import UserError

NAME = "samples"
SCHEME = "300W"
LAYOUT = "no files: asked for by name, never recognised"
EXPECTED = {}
COUNTS = {"train": 1200, "test": 120}
SIZE = 320
# Seeds are (split number, i): no face of one split is drawn in another.
_SPLITS = {"train": 0, "test": 1}


def matches(folder):
    """False: no folder holds drawn faces."""
    return False


def read(folder, problems):
    """The Faces of draw with the default counts; folder and problems are the readers' interface."""
    return draw()


def draw(counts=None):
    """Faces of the lists "train" and "test", as many as counts tells (default COUNTS).

    Only landmarks are computed; `image` is None and image_of draws it. Raises UserError.
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


def image_of(face):
    """The picture, RGB uint8 (SIZE, SIZE, 3), of a Face of draw; the same in every process."""
    split, number = face.photo.parts[-2:]
    return render.render((_SPLITS[split], int(number)), SIZE)[0]
