"""Draw contact sheets: faces of a prepared set, drawn faces or the landmark schemes.

`python -m utils.data.sheet SET` shows whether images and landmarks of a prepared set belong
together; preparing a set ends with such a sheet (`overview`).
"""
from __future__ import annotations

import argparse
import pathlib
import random
from collections.abc import Sequence

import cv2
import numpy
import yaml

from utils import draw
from utils.data.drawn_faces.render import render
from utils.data.photo import read_photo
from utils.errors import UserError, run
from utils.files import read_text, split_numbers
from utils.landmarks.schemes import SCHEMES, Scheme


def prepared(folder: str | pathlib.Path, name: str = "train", count: int = 40,
             stored_size: int = 256, numbered: bool = False) -> list[numpy.ndarray]:
    """Draw the landmarks of faces of a prepared set.

    Args:
        folder: the prepared set.
        name: one of its lists.
        count: number of faces.
        stored_size: side in pixels to which the crops are enlarged before drawing.
        numbered: draw the points' numbers too, and take random faces (the same every time) instead
            of the first ones.

    Returns:
        RGB uint8 images (stored_size, stored_size, 3).

    Raises:
        UserError: set.yaml, the list or an image cannot be read.
    """
    folder = pathlib.Path(folder)
    try:
        description = yaml.safe_load(read_text(folder / "set.yaml"))
        scheme, margin = Scheme.from_state(description["scheme"]), float(description["margin"])
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder / 'set.yaml'}: not the description of a prepared set "
                        f"({' '.join(repr(error).split())[:80]}); prepare one with "
                        f"DataGenerator") from None
    listing = folder / f"{name}.txt"
    if not listing.is_file():
        found = sorted(p.stem for p in folder.glob("*.txt") if p.stem != "indices")
        raise UserError(f"{listing}: no such list; the set has {', '.join(found) or 'none'}")
    images = []
    lines = list(enumerate(read_text(listing).splitlines(), 1))
    if numbered:
        random.Random(0).shuffle(lines)
    for number, line in lines[:count]:
        words = split_numbers(line)
        # The path may hold blanks.
        path = " ".join(words[:-2 * scheme.points])
        try:
            points = numpy.array(words[-2 * scheme.points:], numpy.float64)
            points = points.reshape(scheme.points, 2)
            image = read_photo(folder / path, upright=True) if path else None
        except (ValueError, IndexError):
            raise UserError(f"{listing}:{number}: expected an image and {scheme.points} pairs of "
                            f"numbers") from None
        if image is None:
            raise UserError(f"{listing}:{number}: {path} cannot be read as an image")
        image = cv2.resize(image, (stored_size, stored_size))
        points_px = ((points - 0.5) / margin + 0.5) * stored_size - 0.5
        images.append(draw.landmarks(image, points_px, scheme, radius=stored_size / 140))
        for i in numpy.flatnonzero(numpy.isfinite(points_px).all(1)) if numbered else ():
            at = tuple(int(v) for v in numpy.round(points_px[i] + stored_size / 100))
            cv2.putText(images[-1], str(i), at, cv2.FONT_HERSHEY_SIMPLEX, stored_size / 1000,
                        (255, 255, 255), 1, cv2.LINE_AA)
    if not images:
        raise UserError(f"{listing}: the list is empty")
    return images


def overview(folder: str | pathlib.Path) -> pathlib.Path:
    """Draw 36 random faces with numbered points into the sheet.png of a prepared set.

    They are of the training list, or of the first list if there is none.

    Returns:
        Path of the picture.

    Raises:
        UserError: the set cannot be read, or the picture not be written.
    """
    folder = pathlib.Path(folder)
    lists = sorted(path.stem for path in folder.glob("*.txt")
                   if path.stem not in ("indices", "problems"))
    name = "train" if "train" in lists else lists[0]
    draw.save(folder / "sheet.png",
              draw.sheet(prepared(folder, name, 36, 480, numbered=True), 6, 480))
    return folder / "sheet.png"


def drawn(count: int) -> list[numpy.ndarray]:
    """Return `count` drawn faces with their landmarks, RGB uint8 images without the outer 15 %."""
    images, size = [], 320
    edge = round(size * 0.15)
    for i in range(count):
        image, points = render((2, i), size)
        image = draw.landmarks(image, points, SCHEMES["300W"], radius=size / 270)
        images.append(image[edge:size - edge, edge:size - edge])
    return images


def main(arguments: Sequence[str] | None = None) -> pathlib.Path:
    """Run the command line and return the path of the picture. Raises UserError."""
    parser = argparse.ArgumentParser(prog="python -m utils.data.sheet",
                                     description=__doc__.splitlines()[0])
    parser.add_argument("set", nargs="?", help="folder of a prepared set")
    parser.add_argument("--list", default="train", help="name of one of its lists [train]")
    parser.add_argument("--count", type=int, default=40, help="number of faces [40]")
    parser.add_argument("--columns", type=int, default=8, help="faces per row [8]")
    parser.add_argument("--size", type=int, default=160, help="side of a face in pixels [160]")
    parser.add_argument("--output", default="sheet.png", help="file of the picture [sheet.png]")
    parser.add_argument("--schemes", metavar="FILE", help="draw the landmark schemes to FILE")
    parser.add_argument("--samples", type=int, metavar="N", help="show N drawn faces")
    options = parser.parse_args(arguments)
    samples = 1 if options.samples is None else options.samples
    if min(options.count, options.columns, options.size, samples) < 1:
        raise UserError("--count, --columns, --size and --samples must be 1 or more")
    if [options.set, options.schemes, options.samples].count(None) != 2:
        raise UserError("give the folder of a prepared set, --schemes FILE or --samples N")
    output = options.schemes or options.output
    if options.schemes is not None:
        page = draw.sheet([draw.scheme_picture(s, 480) for s in SCHEMES.values()], 3, 480)
    elif options.samples is not None:
        page = draw.sheet(drawn(options.samples), options.columns, options.size)
    else:
        page = draw.sheet(prepared(options.set, options.list, options.count), options.columns,
                          options.size)
    draw.save(output, page)
    print(f"{output}: {page.shape[1]} x {page.shape[0]} pixels")
    return pathlib.Path(output)


if __name__ == "__main__":
    run(main)
