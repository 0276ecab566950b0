"""Landmarks drawn on faces, contact sheets of prepared or drawn faces, pictures of the schemes."""
import argparse
import colorsys
import pathlib

import cv2
import numpy
import yaml

from utils import samples
from utils.errors import UserError, run
from utils.landmarks import SCHEMES, Scheme

# Right and left of a pair share a hue; a name that is not here gets one from its letters.
_COLOURS = {"jaw": (80, 200, 255), "right brow": (255, 190, 60), "left brow": (255, 140, 40),
            "nose bridge": (150, 240, 90), "nose": (60, 210, 120), "right eye": (255, 110, 200),
            "left eye": (215, 110, 255), "lips": (255, 80, 80), "inner lips": (255, 150, 150),
            "right pupil": (255, 255, 120), "left pupil": (235, 255, 170)}
_CLOSED = ("eye", "lips")
_FONT = cv2.FONT_HERSHEY_SIMPLEX


def colour_of(region):
    """The colour (R, G, B) of a region's name, the same in every picture and scheme."""
    if region not in _COLOURS:
        hue = sum(region.encode()) * 0.381966 % 1
        return tuple(int(255 * v) for v in colorsys.hsv_to_rgb(hue, 0.6, 1))
    return _COLOURS[region]


def colours(scheme):
    """One colour a point: (K, 3) uint8; points of no region are white."""
    table = numpy.full((scheme.points, 3), 255, numpy.uint8)
    for region, points in scheme.regions.items():
        table[points] = colour_of(region)
    return table


def landmarks(image, points_px, scheme, confidence=None, box=None, label=None, radius=None):
    """A copy of image, RGB uint8 (H, W, 3), with landmarks (K, 2) in pixels on it.

    confidence (K,) shrinks and dims points against the surest one of the face, because its height
    depends on how fine the grid is; box (x_min, y_min, x_max, y_max) in pixels; label: a text above
    the face; radius in pixels, by default from the size of the face.
    """
    image = numpy.ascontiguousarray(image).copy()
    points = numpy.asarray(points_px, numpy.float64)
    finite = numpy.isfinite(points).all(1)
    if finite.any():
        low, high = points[finite].min(0), points[finite].max(0)
        side = (high - low).max()
    else:
        low, side = numpy.zeros(2), 0
    radius = max(1.0, side / 90) if radius is None else radius
    weight = numpy.ones(len(points))
    if confidence is not None:
        weight = numpy.clip(confidence / max(numpy.max(confidence), 1e-6), 0, 1)
    if box is not None:
        low = numpy.asarray(box[:2])
        corners = [tuple(int(round(v)) for v in pair) for pair in (box[:2], box[2:])]
        cv2.rectangle(image, *corners, (255, 255, 255), max(1, round(radius / 2)), cv2.LINE_AA)
    table = colours(scheme)
    for i in numpy.flatnonzero(finite):
        at = tuple(int(v) for v in numpy.round(points[i] * 16))
        size = radius * (0.5 + 0.5 * weight[i])
        colour = [int(v * (0.35 + 0.65 * weight[i])) for v in table[i]]
        # A dark rim keeps points visible on skin and on teeth alike.
        cv2.circle(image, at, round((size + max(0.5, radius / 4)) * 16), (20, 20, 20), -1,
                   cv2.LINE_AA, 4)
        cv2.circle(image, at, round(size * 16), colour, -1, cv2.LINE_AA, 4)
    if label:
        _write(image, label, (low[0], low[1] - 3 * radius), max(0.35, radius / 5))
    return image


def _write(image, text, at, scale, colour=(255, 255, 255)):
    at = int(max(0, at[0])), int(max(22 * scale, at[1]))
    thick = max(1, round(scale * 1.5))
    cv2.putText(image, text, at, _FONT, scale, (0, 0, 0), thick + 2, cv2.LINE_AA)
    cv2.putText(image, text, at, _FONT, scale, colour, thick, cv2.LINE_AA)


def sheet(images, columns=8, size=160, captions=None):
    """A contact sheet, RGB uint8 (rows * size, columns * size, 3), of RGB images of any size.

    The last row is filled with grey; with fewer images than columns the sheet is as wide as needed.
    """
    columns = max(1, min(columns, len(images)))
    rows = -(-len(images) // columns)
    page = numpy.full((rows * size, columns * size, 3), 40, numpy.uint8)
    for i, image in enumerate(images):
        scale = size / max(image.shape[:2])
        shape = [max(1, round(side * scale)) for side in image.shape[1::-1]]
        way = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
        small = cv2.resize(image, shape, interpolation=way)
        y, x = i // columns * size, i % columns * size
        page[y:y + shape[1], x:x + shape[0]] = small
        if captions is not None:
            _write(page[y:y + size, x:x + size], str(captions[i]), (4, size - 6), size / 420)
    return page


def _away(region, place, count, outwards):
    """Direction in which a point's number stands, clear of contours and of other regions."""
    if region == "nose bridge" or "pupil" in region:
        return numpy.array([(1, 0), (-1, 0)][place % 2 if "pupil" in region else 0])
    length = numpy.linalg.norm(outwards)
    if length < 1e-6:
        return numpy.array([0, -1])
    # The corners of the lips coincide: the inner ones' numbers stand inside.
    inner_corner = region == "inner lips" and count > 4 and place % (count // 2) == 0
    return outwards / length * (-1 if inner_corner else 1)


def scheme_picture(scheme, size=480):
    """The scheme's mean face, RGB uint8 (size, size, 3): contours, and points numbered from 0."""
    image = numpy.full((size, size, 3), 24, numpy.uint8)
    mean = scheme.mean_face
    low, high = mean.min(0), mean.max(0)
    title = size / 14
    points = (mean - (low + high) / 2) / (high - low).max() * size * 0.84 + (size / 2,
                                                                            size / 2 + title / 2)
    for region, indices in scheme.regions.items():
        path = [numpy.round(points[indices] * 16).astype(numpy.int32)]
        closed = len(indices) > 3 and any(region.endswith(word) for word in _CLOSED)
        dim = [int(v * 0.45) for v in colour_of(region)]
        cv2.polylines(image, path, closed, dim, max(1, size // 320), cv2.LINE_AA, 4)
    image = landmarks(image, points, scheme, radius=max(1.5, size / 220))
    scale = size / 1400 if scheme.points > 12 else size / 900
    for region, indices in scheme.regions.items():
        for place, i in enumerate(indices):
            away = _away(region, place, len(indices), points[i] - points[indices].mean(0))
            (wide, high_px), _ = cv2.getTextSize(str(i), _FONT, scale, 1)
            at = points[i] + away * (size / 70 + wide / 3) + (-wide / 2, high_px / 2)
            cv2.putText(image, str(i), tuple(int(round(v)) for v in at), _FONT, scale,
                        colour_of(region), 1, cv2.LINE_AA)
    _write(image, f"{scheme.name}: {scheme.points} points, numbered from 0",
           (size / 40, title * 0.8), size / 900)
    return image


def prepared(folder, name="train", count=40, stored_size=256):
    """The first `count` faces of a list of a prepared set, each with its landmarks: RGB images.

    Each is enlarged to stored_size before drawing. Raises UserError.
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
    for number, line in enumerate(listing.read_text(encoding="utf-8").splitlines()[:count], 1):
        words = line.split()
        try:
            points = numpy.array(words[1 - len(words):], numpy.float64).reshape(scheme.points, 2)
            image = cv2.imread(str(folder / words[0]), cv2.IMREAD_COLOR)
        except (ValueError, IndexError):
            raise UserError(f"{listing}:{number}: expected an image and {scheme.points} pairs of "
                            f"numbers") from None
        if image is None:
            raise UserError(f"{listing}:{number}: {words[0]} cannot be read as an image")
        image = cv2.resize(image[..., ::-1], (stored_size, stored_size))
        points_px = ((points - 0.5) / margin + 0.5) * stored_size - 0.5
        images.append(landmarks(image, points_px, scheme, radius=stored_size / 140))
    if not images:
        raise UserError(f"{listing}: the list is empty")
    return images


def drawn(count=40, size=320, first=0):
    """Drawn faces with their landmarks, cut to the faces' surroundings: RGB images."""
    images = []
    for i in range(first, first + count):
        image, points = samples.render((2, i), size)
        edge = round(size * 0.15)
        image = landmarks(image, points, SCHEMES["300W"], radius=size / 270)
        images.append(image[edge:size - edge, edge:size - edge])
    return images


def save(path, image):
    """Write an RGB image (H, W, 3) to a .png or .jpg file. Raises UserError."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    settings = [cv2.IMWRITE_PNG_COMPRESSION, 9] if path.suffix.lower() == ".png" else []
    try:
        written = cv2.imwrite(str(path), image[..., ::-1], settings)
    except cv2.error:
        written = False
    if not written:
        raise UserError(f"{path}: cannot be written; give the path of a .png or .jpg file")


def main(arguments=None):
    """The command line, see --help. Returns the picture's path. Raises UserError."""
    parser = argparse.ArgumentParser(prog="python -m utils.draw", description=__doc__)
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
        page = sheet([scheme_picture(s, 480) for s in SCHEMES.values()], 3, 480)
    elif given.samples is not None:
        page = sheet(drawn(given.samples), given.columns, given.size)
    else:
        page = sheet(prepared(given.set, given.list, given.count), given.columns, given.size)
    save(output, page)
    print(f"{output}: {page.shape[1]} x {page.shape[0]} pixels")
    return pathlib.Path(output)


if __name__ == "__main__":
    run(main)
