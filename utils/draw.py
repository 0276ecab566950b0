"""Drawing: landmarks and text on images, contact sheets, pictures of the landmark schemes.

Functions take RGB uint8 images and return new ones; `save` writes an image to a file. The colour of
a landmark follows from its region in the scheme.
"""
from __future__ import annotations

import colorsys
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import cv2
import numpy

from utils.errors import UserError, printable
from utils.files import OutputFile

if TYPE_CHECKING:
    from utils.landmarks.schemes import Scheme

Colour = tuple[int, int, int]
# The right and left region of a pair have similar hues.
_COLOURS = {"jaw": (80, 200, 255), "right brow": (255, 190, 60), "left brow": (255, 140, 40),
            "nose bridge": (150, 240, 90), "nose": (60, 210, 120), "right eye": (255, 110, 200),
            "left eye": (215, 110, 255), "lips": (255, 80, 80), "inner lips": (255, 150, 150),
            "right pupil": (255, 255, 120), "left pupil": (235, 255, 170)}
_CLOSED_CONTOURS = ("eye", "lips")
_FONT = cv2.FONT_HERSHEY_SIMPLEX


def colour_of(region: str) -> Colour:
    """Return the colour (R, G, B) of a region; one of an unknown name depends on its letters."""
    if region not in _COLOURS:
        hue = sum(region.encode()) * 0.381966 % 1
        return tuple(int(255 * v) for v in colorsys.hsv_to_rgb(hue, 0.6, 1))
    return _COLOURS[region]


def is_closed(region: str, indices: Sequence[int]) -> bool:
    """Return whether the landmarks of a region surround it, as those of eyes and lips do."""
    return len(indices) > 3 and any(region.endswith(word) for word in _CLOSED_CONTOURS)


def colours(scheme: Scheme) -> numpy.ndarray:
    """Return one colour per landmark, (K, 3) uint8; landmarks without a region are white."""
    table = numpy.full((scheme.points, 3), 255, numpy.uint8)
    for region, points in scheme.regions.items():
        table[points] = colour_of(region)
    return table


def landmarks(image: numpy.ndarray, points_px: numpy.ndarray, scheme: Scheme,
              confidence: numpy.ndarray | None = None, box: Sequence[float] | None = None,
              label: str | None = None, radius: float | None = None,
              colour: Colour = (255, 255, 255)) -> numpy.ndarray:
    """Draw the landmarks of a face.

    Args:
        image: RGB uint8 (H, W, 3).
        points_px: landmarks (K, 2) in pixels; NaN is left out.
        scheme: of the landmarks.
        confidence: (K,). Makes landmarks smaller and darker in proportion to the highest one of
            the face, because its absolute value depends on the grid of the model. Landmarks with a
            confidence of 0 are left out: they are hidden.
        box: (x_min, y_min, x_max, y_max) in pixels, to draw as well.
        label: text above the face.
        radius: of the landmarks in pixels; default: from the size of the face.
        colour: of box and label.

    Returns:
        A copy of image with the face on it.
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
    for i in numpy.flatnonzero(finite & (weight > 0)):
        centre = tuple(int(v) for v in numpy.round(points[i] * 16))
        size = radius * (0.5 + 0.5 * weight[i])
        shade = [int(v * (0.35 + 0.65 * weight[i])) for v in table[i]]
        # A dark rim keeps landmarks visible on skin and on teeth.
        cv2.circle(image, centre, round((size + max(0.5, radius / 4)) * 16), (20, 20, 20), -1,
                   cv2.LINE_AA, 4)
        cv2.circle(image, centre, round(size * 16), shade, -1, cv2.LINE_AA, 4)
    if label:
        _write(image, label, (low[0], low[1] - 3 * radius), max(0.35, radius / 5), colour)
    return image


def banner(image: numpy.ndarray, text: str, position: tuple[float, float], height: float,
           colour: Colour, alternatives: Sequence[str] = ()) -> numpy.ndarray:
    """Draw text on a dark background.

    Args:
        image: RGB uint8 (H, W, 3).
        text: one line.
        position: (x, y) of the upper left corner in pixels, moved so that the text is inside.
        height: of the letters in pixels, reduced so that the text fits the width of the image.
        colour: of the letters.
        alternatives: texts that are drawn in other frames; all of them fit, at the same height.

    Returns:
        A copy of image with the text on it.
    """
    image, text = numpy.ascontiguousarray(image).copy(), printable(text)
    (_, unit_height), _ = cv2.getTextSize(text, _FONT, 1, 2)
    # Text and margins grow with the height, but for rounding.
    width = max(cv2.getTextSize(printable(one), _FONT, 1, 2)[0][0] for one in (text, *alternatives))
    height = min(height, (image.shape[1] - 4) / (width / unit_height + 0.8))
    scale = height / unit_height
    thickness = max(1, round(scale * 2))
    (text_width, _), baseline = cv2.getTextSize(text, _FONT, scale, thickness)
    margin = round(height * 0.4)
    box_height, box_width = round(height + baseline + margin), text_width + 2 * margin
    x = int(max(min(position[0], image.shape[1] - box_width), 0))
    y = int(max(min(position[1], image.shape[0] - box_height), 0))
    image[y:y + box_height, x:x + box_width] //= 4
    cv2.putText(image, text, (x + margin, round(y + height + margin / 2)), _FONT, scale, colour,
                thickness, cv2.LINE_AA)
    return image


def rings(image: numpy.ndarray, points_px: numpy.ndarray, colour: Colour,
          radius: float | None = None) -> numpy.ndarray:
    """Draw rings around points.

    Args:
        image: RGB uint8 (H, W, 3).
        points_px: (K, 2) in pixels; NaN is left out.
        colour: of the rings.
        radius: in pixels; default: 1 % of the image's height.

    Returns:
        A copy of image with the rings on it.
    """
    image = numpy.ascontiguousarray(image).copy()
    radius = image.shape[0] / 100 if radius is None else radius
    for point in numpy.asarray(points_px)[numpy.isfinite(points_px).all(1)]:
        centre = tuple(int(v) for v in numpy.round(point * 16))
        cv2.circle(image, centre, round(radius * 16), colour, max(1, round(radius / 2)),
                   cv2.LINE_AA, 4)
    return image


def text_lines(image: numpy.ndarray, texts: Sequence[str]) -> numpy.ndarray:
    """Draw lines of text at the top left of an image; long ones are wrapped.

    Lines that would cover more than a quarter of the height are replaced by their number.

    Args:
        image: RGB uint8 (H, W, 3).
        texts: the lines.

    Returns:
        A copy of image with the lines on it; the image itself where there are none.
    """
    image = image.copy() if texts else image
    # The scale fits the longest line, in steps of ten letters (180 px wide at scale 1), so that the
    # text does not change its size with each reading; in a portrait format on two rows.
    tens = -(-max(map(len, texts), default=1) // 10)
    height, width = image.shape[:2]
    per_row = tens if width >= height else tens / 2
    scale = max(0.4, min(height / 900, (width - 16) / (180 * per_row)))
    max_rows = max(2, int(height / 4 / (30 * scale)))
    blocks = [_wrap(printable(text), width - 16, scale) for text in texts]
    shown = len(blocks)
    while shown > 1 and sum(map(len, blocks[:shown])) + (shown < len(blocks)) > max_rows:
        shown -= 1
    rows = sum(blocks[:shown], [])
    if shown < len(blocks):
        rows.append(f"and {len(blocks) - shown} more")
    for number, row in enumerate(rows, 1):
        _write(image, row, (8, 30 * scale * number), scale)
    return image


def _wrap(text, width, scale):
    """Split a text at spaces into rows of at most `width` pixels; all but the first are indented.

    A word that does not fit has a row of its own.
    """
    thickness, rows = max(1, round(scale * 1.5)) + 2, []
    for word in text.split(" "):
        longer = f"{rows[-1]} {word}" if rows else word
        if rows and cv2.getTextSize(longer, _FONT, scale, thickness)[0][0] > width:
            rows.append(f"  {word}")
        else:
            rows[-1:] = [longer]
    return rows


def _write(image, text, position, scale, colour=(255, 255, 255)):
    """Draw text with a black outline on the image itself, moved so that it is inside if it fits."""
    text = printable(text)
    thickness = max(1, round(scale * 1.5))
    outline = thickness + max(2, round(2 * scale))
    room = image.shape[1] - outline - cv2.getTextSize(text, _FONT, scale, thickness)[0][0]
    position = int(max(0, min(position[0], room))), int(max(22 * scale, position[1]))
    cv2.putText(image, text, position, _FONT, scale, (0, 0, 0), outline, cv2.LINE_AA)
    cv2.putText(image, text, position, _FONT, scale, colour, thickness, cv2.LINE_AA)


def sheet(images: Sequence[numpy.ndarray], columns: int = 8, size: int = 160,
          captions: Sequence[str] | None = None) -> numpy.ndarray:
    """Arrange images on a contact sheet.

    Args:
        images: RGB uint8, of any size; each is resized to fit its cell.
        columns: largest number of columns.
        size: side of a cell in pixels.
        captions: text at the bottom of each image.

    Returns:
        RGB uint8 (rows * size, columns * size, 3); empty cells are grey.
    """
    columns = max(1, min(columns, len(images)))
    rows = -(-len(images) // columns)
    page = numpy.full((rows * size, columns * size, 3), 40, numpy.uint8)
    for i, image in enumerate(images):
        scale = size / max(image.shape[:2])
        shape = [max(1, round(side * scale)) for side in image.shape[1::-1]]
        interpolation = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
        small = cv2.resize(image, shape, interpolation=interpolation)
        y, x = i // columns * size, i % columns * size
        page[y:y + shape[1], x:x + shape[0]] = small
        if captions is not None:
            text, scale = printable(captions[i]), size / 420
            # Reduce long captions to the width of the cell.
            scale *= min(1.0, (size - 8) / cv2.getTextSize(text, _FONT, scale, 1)[0][0])
            _write(page[y:y + size, x:x + size], text, (4, size - 6), scale)
    return page


def _number_direction(region, place, count, outwards):
    """Return the direction from a landmark to its number, away from contours and other regions."""
    if region == "nose bridge" or "pupil" in region:
        return numpy.array([(1, 0), (-1, 0)][place % 2 if "pupil" in region else 0])
    length = numpy.linalg.norm(outwards)
    if length < 1e-6:
        return numpy.array([0, -1])
    # Outer and inner lips have nearly the same corners: the numbers of the inner ones go inside.
    inner_corner = region == "inner lips" and count > 4 and place % (count // 2) == 0
    return outwards / length * (-1 if inner_corner else 1)


def scheme_picture(scheme: Scheme, size: int = 480) -> numpy.ndarray:
    """Draw the contours and numbered landmarks of a scheme's mean face, RGB (size, size, 3)."""
    image = numpy.full((size, size, 3), 24, numpy.uint8)
    mean = scheme.mean_face
    low, high = mean.min(0), mean.max(0)
    title = size / 14
    points = (mean - (low + high) / 2) / (high - low).max() * size * 0.84 + (size / 2,
                                                                            size / 2 + title / 2)
    for region, indices in scheme.regions.items():
        path = [numpy.round(points[indices] * 16).astype(numpy.int32)]
        closed = is_closed(region, indices)
        dim = [int(v * 0.45) for v in colour_of(region)]
        cv2.polylines(image, path, closed, dim, max(1, size // 320), cv2.LINE_AA, 4)
    image = landmarks(image, points, scheme, radius=max(1.5, size / 220))
    scale = size / 1400 if scheme.points > 12 else size / 900
    for region, indices in scheme.regions.items():
        for place, i in enumerate(indices):
            direction = _number_direction(region, place, len(indices),
                                          points[i] - points[indices].mean(0))
            (width, height), _ = cv2.getTextSize(str(i), _FONT, scale, 1)
            position = points[i] + direction * (size / 70 + width / 3) + (-width / 2, height / 2)
            cv2.putText(image, str(i), tuple(int(round(v)) for v in position), _FONT, scale,
                        colour_of(region), 1, cv2.LINE_AA)
    _write(image, f"{scheme.name}: {scheme.points} points, numbered from 0",
           (size / 40, title * 0.8), size / 900)
    return image


def save(path: str | pathlib.Path, image: numpy.ndarray) -> None:
    """Write an image to a .png or .jpg file, whole or not at all.

    Args:
        path: the file. Its folder is made.
        image: RGB uint8 (H, W, 3).

    Raises:
        UserError: for another suffix, and where the file cannot be written.
    """
    path = pathlib.Path(path)
    # The smallest PNG of a 12-megapixel photo takes 17 s to encode. This one is a third larger and
    # takes 0.7 s.
    settings = [cv2.IMWRITE_PNG_COMPRESSION, 3] if path.suffix.lower() == ".png" else []
    try:
        encoded, content = cv2.imencode(path.suffix or ".", image[..., ::-1], settings)
    except cv2.error:
        encoded = False
    if not encoded:
        raise UserError(f"{path}: cannot be written; give the path of a .png or .jpg file")
    OutputFile(path).write(content.tobytes())
