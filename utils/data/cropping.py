"""Crop one face of a photo.

The worker processes of utils.data.generator call `write_face` for each face: it reads the photo,
checks the face, writes the crop and returns its box, and the box in which the authors of the data
set measure NME.
"""
from __future__ import annotations

import pathlib
from typing import NamedTuple

import numpy

from utils.data import readers
from utils.data.photo import read_photo, why_unread, write_crop
from utils.data.readers.face import Face
from utils.errors import UserError
from utils.landmarks import crop as crops

# A point farther outside the photo than this share of the face's side is taken for a labelling
# error. The limit of published sets is wide, because their face counts are part of the benchmark.
MAX_OUTSIDE, MAX_OUTSIDE_PUBLISHED = 0.15, 1.0
MIN_SIDE = 8  # Pixels; a smaller face shows no detail.
KEPT = (f"kept: every face whose landmarks' box is {MIN_SIDE} px or longer and reaches out of the "
        f"photo, where the crop is black, by at most {100 * MAX_OUTSIDE:.0f} % of that "
        f"({100 * MAX_OUTSIDE_PUBLISHED:.0f} % in published sets)")


class CroppedFace(NamedTuple):
    """A face whose crop is written.

    Attributes:
        face: the annotated face.
        layout: name of its layout.
        name: file stem of the crop.
        box: nominal crop (4,) in photo pixels.
        published_box: crop (4,) in which the authors measure NME, in photo pixels.
    """
    face: Face
    layout: str
    name: str
    box: numpy.ndarray
    published_box: numpy.ndarray


def image_of(face: Face, layout: str) -> numpy.ndarray | None:
    """Return the photo of a face as RGB uint8 (H, W, 3), or None if it cannot be read."""
    reader = readers.READERS[layout]
    if hasattr(reader, "image_of"):
        return reader.image_of(face)
    return read_photo(face.photo, face.upright)


def write_face(job: tuple[Face, str, str], folder: pathlib.Path, size: int, rule: str,
               scale: float, margin: float) -> tuple[numpy.ndarray, numpy.ndarray] | str:
    """Write the crop of a face as a .jpg file.

    Args:
        job: the face, the name of its layout and the file stem of its crop.
        folder: folder of the crops.
        size: side of the nominal crop in pixels.
        rule: crop rule, see landmarks.crop.face_box.
        scale: side of the nominal crop relative to the face's box.
        margin: side of the stored crop relative to the nominal crop.

    Returns:
        Nominal crop (4,) and published crop (4,) in photo pixels (see CroppedFace), or the reason
        why the face is skipped.
    """
    face, layout, name = job
    try:
        image = image_of(face, layout)
    except UserError as error:
        return str(error)
    if image is None:
        return why_unread(face.photo)
    height, width = image.shape[:2]
    try:
        box = crops.face_box(face.points, rule, scale, face.box)
        published_box = _published_box(face, layout, width, height)
    except UserError as error:
        return str(error)
    if face.side < MIN_SIDE:
        return f"the face has a side of {face.side:.1f} px, less than {MIN_SIDE}"
    reach = face.side * (MAX_OUTSIDE_PUBLISHED if _is_published(layout) else MAX_OUTSIDE)
    outside = _outside(face.points, width, height, reach)
    if outside.any():
        point = int(numpy.flatnonzero(outside.any(1))[0])
        return (f"point {point} at {face.points[point, 0]:.0f}, {face.points[point, 1]:.0f} is far "
                f"outside the photo of {width} x {height}"
                + (_exif_hint(face, image, reach)
                   or "; to keep the face, leave out the points that the photo does not show"))
    stored = crops.cut(image, crops.grow(box, margin), round(size * margin))
    write_crop(folder / f"{name}.jpg", stored)
    return box, published_box


def _outside(points: numpy.ndarray, width: int, height: int, reach: float) -> numpy.ndarray:
    """Return which coordinates (K, 2) are more than `reach` pixels outside the photo."""
    return (points < -reach) | (points > numpy.array([width, height]) - 1 + reach)


def _exif_hint(face: Face, image: numpy.ndarray, reach: float) -> str:
    """Return a hint if all points are inside the photo without its EXIF orientation, else ""."""
    stored = read_photo(face.photo) if face.upright else None
    if stored is None or stored.shape == image.shape:
        return ""
    height, width = stored.shape[:2]
    if _outside(face.points, width, height, reach).any():
        return ""
    return (f" with its EXIF orientation applied, and inside the {width} x {height} that are "
            f"stored: if the labels were made on stored pixels, give exif=\"ignore\" "
            f"(--exif ignore)")


def _is_published(layout: str) -> bool:
    return readers.READERS[layout] in readers.PUBLISHED


def _published_box(face: Face, layout: str, width: int, height: int) -> numpy.ndarray:
    """Return the crop (4,) in which the authors measure NME, in photo pixels.

    The box of published sets is limited to the photo, as in lib/preprocess.py of the authors' code.
    """
    crop = getattr(readers.READERS[layout], "CROP", crops.PUBLISHED_CROP)
    if crop["rule"] == "box" and face.box is None:
        crop = crops.PUBLISHED_CROP
    rule, scale = crop["rule"], crop["scale"]
    box = crops.face_box(face.points, rule, scale, face.box)
    if not _is_published(layout):
        return box
    low = numpy.maximum(box[:2], 0)
    # For 300W their code moves the left and top edges into the photo and keeps width and height.
    high = low + box[2:] - box[:2] if rule == "stretch" else box[2:]
    inside = numpy.concatenate([low, numpy.minimum(high, (width - 1, height - 1))])
    return inside if (inside[2:] - inside[:2] >= 1).all() else box
