"""Reader of annotation tools: COCO keypoints, labelme, CVAT for images and dlib/iBUG.

COCO and labelme write .json, CVAT and dlib .xml; the content of a file tells which tool wrote it.
Each tool has a function in annotation_tools or cvat that yields the annotated faces of a file;
`read` checks them, finds their photos and returns Face objects. Files of other tools are named with
the export to choose (foreign).

A face belongs to the list of a folder test/, val/ (or valid/) or train/ in the photo's path, else
to the list in the file's name (person_keypoints_val.json), else to train. Pixels count from 0, or
from 1 with --one-based. An unlabelled point (COCO visibility 0, no such label, outside in CVAT) is
NaN. An occluded point (COCO visibility 1, occluded in CVAT) is marked as hidden. What the tool
marks as not to be used (ignore in dlib, iscrowd in COCO, a flag `ignore` in labelme or CVAT) is
left out and counted.
"""
from __future__ import annotations

import collections
import contextlib
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator
from xml.etree import ElementTree

import numpy

from utils.data.photo import IMAGE_SUFFIXES
from utils.data.readers import annotation_tools, cvat, foreign
from utils.data.readers import names as point_names
from utils.data.readers.face import MARKED, Face, require_scheme, split_of
from utils.data.readers.pts import other_suffix, shorten, unique_name, walk
from utils.errors import UserError
from utils.files import read_text
from utils.landmarks.schemes import Scheme

NAME = "annotations"
SCHEME = None
LAYOUT = "a .json of COCO keypoints or labelme, or an .xml of CVAT or dlib"
EXPECTED = {}


def matches(folder: pathlib.Path) -> bool:
    """Return True for a .json or .xml file, and for a folder that holds a file of these tools.

    A damaged file counts, so that `read` can report it.
    """
    return any(folder.is_file() or _is_annotation(path) for path in _files(folder))


def _is_annotation(path: pathlib.Path) -> bool:
    try:
        return _tool(_load(path)) is not None
    except ValueError:
        return True


def foreign_format(folder: pathlib.Path) -> str | None:
    """Return the name of a format that is not read and the export to choose, or None."""
    for path in _files(folder):
        with contextlib.suppress(ValueError):
            name = foreign.name_of(_load(path))
            if name is not None:
                return f"{path.name}: {foreign.advice(name)}"
    path = foreign.yolo_file(folder)
    return path and f"{path.name}: {foreign.advice('YOLO-pose')}"


def read(folder: pathlib.Path, problems: list, scheme: Scheme | None = None,
         one_based: bool = False) -> list[Face]:
    """Read all faces of a folder or of an annotation file.

    Args:
        folder: a folder, or the path of an annotation file.
        problems: receives (path, reason) of files and faces that cannot be read.
        scheme: landmark scheme of the annotations; required.
        one_based: True if pixels count from 1.

    Returns:
        The faces; unlabelled points are NaN.

    Raises:
        UserError: there is no scheme, or labels may count from 0 as well as from 1.
    """
    require_scheme(folder, scheme)
    root = folder.parent if folder.is_file() else folder
    entries, labelme_folders = _entries(folder, scheme, problems)
    labels = {str(label) for *_, item in entries for label in item.labels}
    point_of = _point_index(labels, scheme, folder, problems)
    faces, taken, count = [], set(), collections.Counter()
    for path, words, photo, item in entries:
        if item.mark:
            problems.append((path, f"{item.where}: {MARKED} ({item.mark})"))
            continue
        try:
            points, box, hidden = item.parse(point_of)
            if item.image is None:
                raise ValueError("it names no image, or one that the file does not list")
            if not os.path.isfile(photo):
                raise ValueError(f"no image {shorten(str(photo), 200)}")
            if numpy.isnan(points).all():
                raise ValueError("none of its points is labelled")
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            missing = "it has no " * isinstance(error, KeyError)
            problems.append((path, f"{item.where}: {missing}{error}"))
            continue
        group = os.path.relpath(photo, root)
        count[group] += 1
        name = unique_name(f"{photo.stem}-{count[group]}", taken)
        shift = float(one_based)
        folders = os.path.relpath(photo.parent, root).split(os.sep)
        split = split_of(folders) or split_of(words) or "train"
        faces.append(Face(photo, points - shift, (split,), split, group, name,
                          None if box is None else box - shift, hidden=hidden))
    annotated = {os.path.normpath(photo) for _, _, photo, _ in entries}
    problems += _unannotated(labelme_folders, annotated, {path.stem for path in _files(folder)})
    return faces


def _entries(folder, scheme, problems):
    """Return (file, words of its name, photo, Item) of each face, and the folders of labelme."""
    entries, labelme_folders, others = [], set(), set()
    for path in _files(folder):
        try:
            content = _load(path)
        except ValueError as error:
            problems.append((path, str(error)))
            continue
        tool = _tool(content)
        if tool is None:
            other = foreign.name_of(content)
            if other is None:
                problems.append((path, "note: not read: not a COCO, labelme, CVAT or dlib file"))
            elif other not in others:
                problems.append((path, foreign.advice(other)))
            others.add(other)
            continue
        # A labelme file is named after its photo, and the name says nothing about a list.
        is_labelme = tool is annotation_tools.labelme
        words = () if is_labelme else re.split("[^a-z]+", path.stem.lower())
        for item in tool(content, scheme, path, problems):
            photo = _photo(path, str(item.image).replace("\\", "/"))
            entries.append((path, words, photo, item))
            if is_labelme and folder.is_dir():
                labelme_folders.add(photo.parent)
    return entries, labelme_folders


def _photo(path: pathlib.Path, image: str) -> pathlib.Path:
    """Return where the image of an annotation file is, or would be if there is no such image.

    Tools put images beside the file, into a folder images/ beside it, or (COCO) into images/ beside
    the file's folder, perhaps into a subfolder named after the file.
    """
    above = path.parent.parent / "images"
    folders = (path.parent, path.parent / "images", above, above / path.stem)
    # The path may be one of another machine, of which only the name is of use.
    found = [f / name for name in (image, image.rpartition("/")[2]) for f in folders]
    return next((photo for photo in found if photo.is_file()), path.parent / image)


def _unannotated(folders: Iterable[pathlib.Path], annotated: set[str], stems: set[str]
                 ) -> Iterator[tuple[pathlib.Path, str]]:
    """Yield (photo, reason) of the photos in these folders without an annotation file."""
    for folder in sorted(path for path in folders if path.is_dir()):
        files = sorted(folder.iterdir())
        yield from other_suffix(files)
        for photo in files:
            if not (photo.suffix.lower() not in IMAGE_SUFFIXES or photo.name.startswith(".")
                    or photo.stem in stems or os.path.normpath(photo) in annotated):
                yield photo, f"image without {photo.stem}.json"


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    paths = [folder] if folder.is_file() else walk(folder)
    return [p for p in paths if p.suffix.lower() in (".json", ".xml") and p.is_file()
            and not p.name.startswith(".")]


def _load(path: pathlib.Path):
    """Return the content of a .json file, or the root of an XML tree. Raises ValueError."""
    try:
        if path.suffix.lower() == ".json":
            return json.loads(read_text(path))
        return ElementTree.parse(path).getroot()
    except (OSError, ValueError, RecursionError, ElementTree.ParseError) as error:
        raise ValueError(f"it cannot be read; it is damaged or cut off: {error}") from None


def _tool(content) -> Callable[..., Iterator[annotation_tools.Item]] | None:
    """Return the function that yields the faces of a file's content, or None."""
    if isinstance(content, dict):
        if isinstance(content.get("annotations"), list) and isinstance(content.get("images"), list):
            return annotation_tools.coco
        return annotation_tools.labelme if isinstance(content.get("shapes"), list) else None
    if isinstance(content, ElementTree.Element):
        return {"dataset": annotation_tools.dlib, "annotations": cvat.faces}.get(content.tag)
    return None


def _point_index(labels: set[str], scheme: Scheme, folder: pathlib.Path, problems: list
                 ) -> Callable[[object], int]:
    """Return the function from a label to the index of its point.

    A label is a point's name in the scheme (see names.match) or its number. Numbers
    count from 1 if K is among all labels and 0 is not (`problems` gets a note), else from 0. Raises
    UserError if neither 0 nor K is among them.
    """
    found, last = {_number(label) for label in labels} - {None}, scheme.points
    first = int(0 not in found and last in found)
    if first:
        problems.append((folder, f"note: labels count from 1, as there is a {last} and no 0"))
    elif found and 0 not in found:
        raise UserError(f"{folder}: labels are numbers from {min(found)} to {max(found)}: without "
                        f"0 and without {last} they may count from 0 or from 1; label the first or "
                        f"the last point in one photo, or label by the names of the scheme's file")
    names = {label: point_names.match([label], scheme.names or ()).get(label) for label in labels}

    def point_of(label):
        text, number = str(label), _number(str(label))
        point = names.get(text)
        if point is None:
            point = -1 if number is None else number - first
        if not 0 <= point < last:
            raise ValueError(f"point {shorten(label)} is no number from {first} to "
                             f"{first + last - 1} and no name of a point of {scheme.name}")
        return point

    return point_of


def _number(label: str) -> int | None:
    # int() raises for thousands of digits, and no scheme has so many points.
    return int(label) if label.isdecimal() and len(label) < 10 else None
