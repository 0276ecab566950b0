"""Contact sheets: faces of a prepared set or drawn ones with their landmarks, and the schemes."""
import argparse
import pathlib
import random

import cv2
import numpy
import yaml

from utils import draw
from utils.data.drawn_faces.render import render
from utils.data.photo import read_photo
from utils.errors import UserError, run
from utils.landmarks.schemes import SCHEMES, Scheme


def prepared(folder, name="train", count=40, stored_size=256, numbered=False):
    """The first `count` faces of a list of a prepared set, each with its landmarks: RGB images.

    Each is enlarged to stored_size before drawing. numbered: `count` random faces (the same every
    time), with the points' numbers. Raises UserError.
    """
    folder = pathlib.Path(folder)
    try:
        description = yaml.safe_load((folder / "set.yaml").read_text(encoding="utf-8"))
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
    lines = list(enumerate(listing.read_text(encoding="utf-8").splitlines(), 1))
    if numbered:
        random.Random(0).shuffle(lines)
    for number, line in lines[:count]:
        words = line.split()
        try:
            points = numpy.array(words[1 - len(words):], numpy.float64).reshape(scheme.points, 2)
            image = read_photo(folder / words[0], upright=True)
        except (ValueError, IndexError):
            raise UserError(f"{listing}:{number}: expected an image and {scheme.points} pairs of "
                            f"numbers") from None
        if image is None:
            raise UserError(f"{listing}:{number}: {words[0]} cannot be read as an image")
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


def overview(folder):
    """Draw 36 random faces of a prepared set with numbered points into its sheet.png; its path.

    Of the training list, or of the first there is. Raises UserError, OSError.
    """
    folder = pathlib.Path(folder)
    lists = sorted(path.stem for path in folder.glob("*.txt")
                   if path.stem not in ("indices", "problems"))
    name = "train" if "train" in lists else lists[0]
    draw.save(folder / "sheet.png",
              draw.sheet(prepared(folder, name, 36, 480, numbered=True), 6, 480))
    return folder / "sheet.png"


def drawn(count=40, size=320, first=0):
    """Drawn faces with their landmarks, cut to the faces' surroundings: RGB images."""
    images = []
    for i in range(first, first + count):
        image, points = render((2, i), size)
        edge = round(size * 0.15)
        image = draw.landmarks(image, points, SCHEMES["300W"], radius=size / 270)
        images.append(image[edge:size - edge, edge:size - edge])
    return images


def main(arguments=None):
    """The command line, see --help. Returns the picture's path. Raises UserError."""
    parser = argparse.ArgumentParser(prog="python -m utils.data.sheet", description=__doc__)
    parser.add_argument("set", nargs="?", help="folder of a prepared set")
    parser.add_argument("--list", default="train", help="which of its lists [train]")
    parser.add_argument("--count", type=int, default=40, help="faces to show [40]")
    parser.add_argument("--columns", type=int, default=8, help="faces a row [8]")
    parser.add_argument("--size", type=int, default=160, help="side of a face on a sheet [160]")
    parser.add_argument("--output", default="sheet.png", help="the picture's file [sheet.png]")
    parser.add_argument("--schemes", metavar="FILE", help="draw the landmark schemes into FILE")
    parser.add_argument("--samples", type=int, metavar="N", help="show N faces drawn from nothing")
    given = parser.parse_args(arguments)
    asked = 1 if given.samples is None else given.samples
    if min(given.count, given.columns, given.size, asked) < 1:
        raise UserError("--count, --columns, --size and --samples must be 1 or more")
    if sum([given.set is not None, given.schemes is not None, given.samples is not None]) != 1:
        raise UserError("give the folder of a prepared set, --schemes FILE or --samples N")
    output = given.schemes or given.output
    if given.schemes is not None:
        page = draw.sheet([draw.scheme_picture(s, 480) for s in SCHEMES.values()], 3, 480)
    elif given.samples is not None:
        page = draw.sheet(drawn(given.samples), given.columns, given.size)
    else:
        page = draw.sheet(prepared(given.set, given.list, given.count), given.columns, given.size)
    draw.save(output, page)
    print(f"{output}: {page.shape[1]} x {page.shape[0]} pixels")
    return pathlib.Path(output)


if __name__ == "__main__":
    run(main)
