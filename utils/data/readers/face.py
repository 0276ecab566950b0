"""One annotated face, as every reader returns it, and the list it belongs to."""
import dataclasses
import pathlib

import numpy

# What people call the lists, the first of which that is found wins.
SPLITS = {"test": {"test", "testing", "testset"}, "val": {"val", "valid", "validation"},
          "train": {"train", "training", "trainset"}}


@dataclasses.dataclass
class Face:
    """A face of a photo with its landmarks.

    photo: the image file. points (K, 2): pixels, 0-based, x then y. lists: the lists it belongs to,
    "train" or "test" and e.g. "test_common". subset: its row in the count table. group: the photo
    it is from, which the validation split keeps together. name: unique stem for its crop.
    box: the publisher's face box (x_min, y_min, x_max, y_max) in pixels, or None. image: RGB uint8
    (H, W, 3) where the photo is inside a container file (.mat) or was drawn, else None. upright:
    whether points and box are of the photo as its EXIF orientation shows it. hidden (K,): which
    points are covered, so that their place is a guess, or None where the annotation does not say.
    """
    photo: pathlib.Path
    points: numpy.ndarray
    lists: tuple
    subset: str
    group: str
    name: str
    box: numpy.ndarray | None = None
    image: numpy.ndarray | None = None
    upright: bool = False
    hidden: numpy.ndarray | None = None

    @property
    def side(self):
        """The longer side of the box round its points, in pixels."""
        return float((numpy.nanmax(self.points, 0) - numpy.nanmin(self.points, 0)).max())


def split_of(words):
    """The first of the lists "test", "val" and "train" that is meant by one of the names of a
    photo's folders, or the words of a file's name (see SPLITS), letter case aside; None where none
    is.
    """
    words = {word.lower() for word in words}
    return next((split for split, names in SPLITS.items() if words & names), None)
