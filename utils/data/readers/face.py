"""The annotated face that every reader returns, and helpers for the lists and the scheme of faces.

Readers build `Face` objects from annotation files; utils.data.generator crops each one and writes
it to the lists that `Face.lists` names.
"""
from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterable

import numpy

from utils.errors import UserError
from utils.landmarks.schemes import SCHEMES, Scheme

# Lower-case folder names and words that stand for each list. The first match wins.
SPLITS = {"test": {"test", "testing", "testset"}, "val": {"val", "valid", "validation"},
          "train": {"train", "training", "trainset"}}

# Begins, in the reason of a problem, what the labelling tool marks as not to be used.
MARKED = "marked as not to be used"


@dataclasses.dataclass
class Face:
    """A face in a photo with its landmarks.

    Attributes:
        photo: the image file, or the container file that holds the image.
        points: landmarks (K, 2) in pixels, 0-based, x then y; NaN if not labelled.
        lists: names of its lists: "train", "val" or "test", and subsets such as "test_common".
        subset: its row in the table of counts.
        group: identifies the photo; the validation split keeps the faces of a group together.
        name: file stem of its crop, unique within the data set.
        box: the publisher's face box (4,), x_min, y_min, x_max, y_max in pixels, or None.
        upright: True if points and box refer to the photo with its EXIF orientation applied.
        hidden: bool (K,), True for occluded points, or None if the annotation has no such flags.
    """
    photo: pathlib.Path
    points: numpy.ndarray
    lists: tuple[str, ...]
    subset: str
    group: str
    name: str
    box: numpy.ndarray | None = None
    upright: bool = False
    hidden: numpy.ndarray | None = None

    @property
    def side(self) -> float:
        """Longer side of the landmarks' bounding box, in pixels."""
        return float((numpy.nanmax(self.points, 0) - numpy.nanmin(self.points, 0)).max())


@dataclasses.dataclass
class Source:
    """The annotations of one folder.

    Attributes:
        folder: the folder, or an annotation file.
        layout: name of its layout.
        expected: subset to published number of faces.
        scheme: landmark scheme of the faces.
        faces: the faces that were read.
        problems: (path, reason) of whatever could not be read.
        prefix: begins the file names of the crops, to keep those of merged folders apart.
    """
    folder: pathlib.Path
    layout: str
    expected: dict[str, int]
    scheme: Scheme
    faces: list[Face]
    problems: list[tuple[pathlib.Path, str]]
    prefix: str = ""


def split_of(words: Iterable[str]) -> str | None:
    """Return the first of "test", "val" and "train" that one of the words stands for, or None.

    Args:
        words: folder names of a path, or words of a file name; letter case is ignored.
    """
    words = {word.lower() for word in words}
    return next((split for split, names in SPLITS.items() if words & names), None)


def require_scheme(folder: pathlib.Path, scheme: Scheme | None) -> None:
    """Raise UserError if the user gave no landmark scheme for own data."""
    if scheme is None:
        known = ", ".join(name for name, known in SCHEMES.items() if known.base is None)
        raise UserError(f"{folder}: your own data needs a landmark scheme: {known} or a .yaml file")
