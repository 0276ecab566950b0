"""Landmarks drawn on faces, contact sheets, pictures of the schemes."""
import colorsys
import pathlib
import runpy

import cv2
import numpy

from utils.errors import UserError, printable

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


def landmarks(image, points_px, scheme, confidence=None, box=None, label=None, radius=None,
              colour=(255, 255, 255)):
    """A copy of image, RGB uint8 (H, W, 3), with landmarks (K, 2) in pixels on it.

    confidence (K,) shrinks and dims points against the surest one of the face, because its height
    depends on how fine the grid is; box (x_min, y_min, x_max, y_max) in pixels; label: a text above
    the face; radius in pixels, by default from the size of the face; colour of box and label.
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
        cv2.rectangle(image, *corners, colour, max(1, round(radius / 2)), cv2.LINE_AA)
    table = colours(scheme)
    for i in numpy.flatnonzero(finite):
        at = tuple(int(v) for v in numpy.round(points[i] * 16))
        size = radius * (0.5 + 0.5 * weight[i])
        tone = [int(v * (0.35 + 0.65 * weight[i])) for v in table[i]]
        # A dark rim keeps points visible on skin and on teeth alike.
        cv2.circle(image, at, round((size + max(0.5, radius / 4)) * 16), (20, 20, 20), -1,
                   cv2.LINE_AA, 4)
        cv2.circle(image, at, round(size * 16), tone, -1, cv2.LINE_AA, 4)
    if label:
        _write(image, label, (low[0], low[1] - 3 * radius), max(0.35, radius / 5), colour)
    return image


def headline(image, text, at, height, colour):
    """A copy of image, RGB uint8 (H, W, 3), with text in letters of so many pixels on a dark
    ground; at: (x, y) in pixels of its upper left corner, moved so that it lies within.
    """
    image, text = numpy.ascontiguousarray(image).copy(), printable(text)
    (_, tall), _ = cv2.getTextSize(text, _FONT, 1, 2)
    scale = height / tall
    thick = max(1, round(scale * 2))
    (wide, _), below = cv2.getTextSize(text, _FONT, scale, thick)
    margin = round(height * 0.4)
    high, wide = round(height + below + margin), wide + 2 * margin
    x = int(max(min(at[0], image.shape[1] - wide), 0))
    y = int(max(min(at[1], image.shape[0] - high), 0))
    image[y:y + high, x:x + wide] //= 4
    cv2.putText(image, text, (x + margin, round(y + height + margin / 2)), _FONT, scale, colour,
                thick, cv2.LINE_AA)
    return image


def points(image, points_px, colour, radius=None):
    """A copy of image, RGB uint8 (H, W, 3), with rings of one colour around points (K, 2) in
    pixels; points that are NaN are left out.
    """
    image = numpy.ascontiguousarray(image).copy()
    radius = image.shape[0] / 100 if radius is None else radius
    for point in numpy.asarray(points_px)[numpy.isfinite(points_px).all(1)]:
        at = tuple(int(v) for v in numpy.round(point * 16))
        cv2.circle(image, at, round(radius * 16), colour, max(1, round(radius / 2)), cv2.LINE_AA, 4)
    return image


def lines(image, texts):
    """A copy of an RGB uint8 image with lines of text at its top left; without any, itself.

    What would cover more than a quarter of its height is left out, and said to be.
    """
    image = image.copy() if texts else image
    # A portrait film is narrow. Ten letters are 200 px wide at scale 1; by tens, or they would
    # change with each reading.
    tens = -(-max(map(len, texts), default=1) // 10)
    scale = max(0.4, min(image.shape[0] / 900, (image.shape[1] - 16) / (200 * tens)))
    most = max(2, int(image.shape[0] / 4 / (30 * scale)))
    if len(texts) > most:
        texts = [*texts[:most - 1], f"and {len(texts) - most + 1} more"]
    for row, text in enumerate(texts, 1):
        _write(image, text, (8, 30 * scale * row), scale)
    return image


def _write(image, text, at, scale, colour=(255, 255, 255)):
    text = printable(text)
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
            text, scale = printable(captions[i]), size / 420
            # Whole, smaller if need be.
            scale *= min(1.0, (size - 8) / cv2.getTextSize(text, _FONT, scale, 1)[0][0])
            _write(page[y:y + size, x:x + size], text, (4, size - 6), scale)
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


def save(path, image):
    """Write an RGB image (H, W, 3) to a .png or .jpg file. Raises UserError."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    settings = [cv2.IMWRITE_PNG_COMPRESSION, 3] if path.suffix.lower() == ".png" else []
    try:
        written, content = cv2.imencode(path.suffix or ".", image[..., ::-1], settings)
    except cv2.error:
        written = False
    if not written:
        raise UserError(f"{path}: cannot be written; give the path of a .png or .jpg file")
    try:
        path.write_bytes(content)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None


if __name__ == "__main__":
    # The command of earlier READMEs.
    runpy.run_module("utils.data.sheet", run_name="__main__")
