"""Reader of WFLW: WFLW_images/ and lists with 98 points, box, attributes and image on a line."""
from __future__ import annotations

import collections
import os
import pathlib

import numpy

from utils.data.readers.face import Face
from utils.data.readers.pts import parse_numbers, read_lines, shorten, unique_name
from utils.errors import UserError

NAME = "WFLW"
SCHEME = "WFLW"
LAYOUT = ("WFLW_images/ and WFLW_annotations/list_98pt_rect_attr_train_test/"
          "list_98pt_rect_attr_{train,test}.txt")
EXPECTED = {"train": 7500, "test": 2500}
CROP = {"rule": "box", "scale": 1.2}
SUBSETS = ("largepose", "expression", "illumination", "makeup", "occlusion", "blur")
_POINTS, _BOX, _ATTRIBUTES = 98, 4, 6


def matches(folder: pathlib.Path) -> bool:
    """Return True if the folder holds a WFLW list."""
    return any(_list(folder, split).is_file() for split in EXPECTED)


def read(folder: pathlib.Path, problems: list) -> list[Face]:
    """Read all faces, 98 points and a box each; bad lines go to `problems`.

    A test face also belongs to the subset lists (test_largepose, test_expression, ...) with it.

    Raises:
        UserError: the image folder or both lists are absent, or a list cannot be read.
    """
    images = folder / "WFLW_images"
    if not images.is_dir():
        raise UserError(f"{images}: no such folder; the images of WFLW are expected there")
    if not matches(folder):
        raise UserError(f"{folder}: no list of WFLW found; expected: {LAYOUT}")
    faces, taken, count = [], set(), collections.Counter()
    for split in EXPECTED:
        path = _list(folder, split)
        if not path.is_file():
            problems.append((path, f"note: no such list, so there are no {split} faces"))
            continue
        for line, text in _lines(path):
            try:
                name, points, box = _parse(text)
                photo = images / name
                if not os.path.isfile(photo):
                    raise ValueError(f"no image {shorten(str(photo), 200)}")
            except ValueError as error:
                problems.append((path, f"line {line}: {error}"))
                continue
            count[name] += 1
            faces.append(Face(photo, points, (split,), split, name,
                              unique_name(f"{photo.stem}-{count[name]}", taken), box))
    _mark_subsets(folder, [face for face in faces if face.subset == "test"], problems)
    return faces


def _list(folder: pathlib.Path, split: str) -> pathlib.Path:
    return (folder / "WFLW_annotations" / "list_98pt_rect_attr_train_test"
            / f"list_98pt_rect_attr_{split}.txt")


def _lines(path: pathlib.Path) -> list[tuple[int, str]]:
    try:
        return read_lines(path)
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None


def _parse(text: str) -> tuple[str, numpy.ndarray, numpy.ndarray]:
    """Parse a line to image name, points (98, 2) and box (4,). Raises ValueError."""
    values = 2 * _POINTS + _BOX + _ATTRIBUTES
    # The image name may contain blanks.
    fields = text.split(None, values)
    if len(fields) != values + 1:
        raise ValueError(f"{values + 1} fields expected (196 coordinates, 4 of the box, 6 "
                         f"attributes, image), {len(fields)} found")
    points = parse_numbers(fields[:2 * _POINTS]).reshape(_POINTS, 2)
    box = parse_numbers(fields[2 * _POINTS:2 * _POINTS + _BOX])
    if not (box[2] > box[0] and box[3] > box[1]):
        raise ValueError(f"the box {box.tolist()} is no x_min y_min x_max y_max")
    for attribute in fields[2 * _POINTS + _BOX:values]:
        if attribute not in ("0", "1"):
            raise ValueError(f"attributes are 0 or 1, found {shorten(attribute)}")
    return fields[values], points, box


def _mark_subsets(folder: pathlib.Path, faces: list[Face], problems: list) -> None:
    """Add test_largepose etc. to the lists of the test faces that the subset lists name."""
    by_image = collections.defaultdict(list)
    for face in faces:
        by_image[face.group].append(face)
    for subset in SUBSETS:
        path = (folder / "WFLW_annotations" / "list_98pt_test" / f"list_98pt_test_{subset}.txt")
        if not path.is_file():
            if faces:
                problems.append((path, f"note: no such list, so there is no test_{subset}"))
            continue
        for line, text in _lines(path):
            fields = text.split()
            try:
                if len(fields) <= 2 * _POINTS:
                    raise ValueError(f"196 coordinates and an image expected, {len(fields)} fields "
                                     f"found")
                points = parse_numbers(fields[:2 * _POINTS]).reshape(_POINTS, 2)
            except ValueError as error:
                problems.append((path, f"note: line {line}: {error}"))
                continue
            # An image may have several faces; the line repeats the coordinates of one of them.
            same = [face for face in by_image[fields[-1]]
                    if numpy.abs(face.points - points).max() < 0.5]
            if same:
                same[0].lists += (f"test_{subset}",)
            else:
                problems.append((path, f"note: line {line}: no such test face of "
                                       f"{shorten(fields[-1])}"))
