"""Reader of annotation tools: COCO keypoints, labelme, CVAT for images and dlib/iBUG.

COCO and labelme write .json, CVAT and dlib .xml; the content of a file tells which tool wrote it.
Each tool has a function that yields the annotated faces of a file as `_Item`; `read` checks them,
finds their photos and returns Face objects.

A face belongs to the list of a folder test/, val/ (or valid/) or train/ in the photo's path, else
to the list in the file's name (person_keypoints_val.json), else to train. Pixels count from 0, or
from 1 with --one-based. An unlabelled point (COCO visibility 0, no such label, outside in CVAT) is
NaN. An occluded point (COCO visibility 1, occluded in CVAT) is marked as hidden.
"""
from __future__ import annotations

import collections
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple
from xml.etree import ElementTree

import numpy

from utils.data.photo import IMAGE_SUFFIXES
from utils.data.readers.face import Face, require_scheme, split_of
from utils.data.readers.pts import parse_numbers, shorten, unique_name, walk
from utils.errors import UserError
from utils.landmarks.schemes import Scheme

NAME = "annotations"
SCHEME = None
LAYOUT = "a .json of COCO keypoints or labelme, or an .xml of CVAT or dlib"
EXPECTED = {}


class _Item(NamedTuple):
    """An annotated face in a file.

    Attributes:
        where: names the face within the file, for messages.
        image: image path as written in the file, or None.
        labels: labels of its points.
        parse: takes the function of `_point_index` and returns points (K, 2), box (4,) or None and
            hidden (K,) or None; raises if the annotation is wrong.
    """
    where: str
    image: str | None
    labels: list
    parse: Callable


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
    entries, labelme_folders = [], set()
    for path in _files(folder):
        try:
            content = _load(path)
        except ValueError as error:
            problems.append((path, str(error)))
            continue
        tool = _tool(content)
        if tool is None:
            problems.append((path, "note: not read: not a COCO, labelme, CVAT or dlib file"))
            continue
        # A labelme file is named after its photo, and the name says nothing about a list.
        words = () if tool is _labelme else re.split("[^a-z]+", path.stem.lower())
        for item in tool(content, scheme):
            photo = _photo(path, str(item.image).replace("\\", "/"))
            entries.append((path, words, photo, item))
            if tool is _labelme and folder.is_dir():
                labelme_folders.add(photo.parent)
    labels = {str(label) for *_, item in entries for label in item.labels}
    point_of = _point_index(labels, scheme, folder, problems)
    faces, taken, count = [], set(), collections.Counter()
    for path, words, photo, item in entries:
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
        for photo in sorted(folder.iterdir()):
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
            return json.loads(path.read_bytes().decode("utf-8-sig"))
        return ElementTree.parse(path).getroot()
    except (OSError, ValueError, RecursionError, ElementTree.ParseError) as error:
        raise ValueError(f"it cannot be read; it is damaged or cut off: {error}") from None


def _tool(content) -> Callable[[object, Scheme], Iterator[_Item]] | None:
    """Return the function that yields the faces of a file's content, or None."""
    if isinstance(content, dict):
        if isinstance(content.get("annotations"), list) and isinstance(content.get("images"), list):
            return _coco
        return _labelme if isinstance(content.get("shapes"), list) else None
    if isinstance(content, ElementTree.Element):
        return {"dataset": _dlib, "annotations": _cvat}.get(content.tag)
    return None


def _point_index(labels: set[str], scheme: Scheme, folder: pathlib.Path, problems: list
                 ) -> Callable[[object], int]:
    """Return the function from a label to the index of its point.

    A label is a point's name in the scheme (ignoring case, blanks, - and _) or its number. Numbers
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
    names = {_plain(name): point for point, name in enumerate(scheme.names or ())}
    names.update({name: point for point, name in enumerate(scheme.names or ())})

    def point_of(label):
        text, number = str(label), _number(str(label))
        point = names.get(text, names.get(_plain(text), -1 if number is None else number - first))
        if not 0 <= point < last:
            raise ValueError(f"point {shorten(label)} is no number from {first} to "
                             f"{first + last - 1} and no name of a point of {scheme.name}")
        return point

    return point_of


def _number(label: str) -> int | None:
    # int() raises for thousands of digits, and no scheme has so many points.
    return int(label) if label.isdecimal() and len(label) < 10 else None


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", "", name.lower())


def _coco(content, scheme):
    images = {image.get("id"): image.get("file_name") for image in content["images"]
              if isinstance(image, dict)}
    names = {category.get("id"): category.get("keypoints") for category
             in content.get("categories") or () if isinstance(category, dict)}
    for number, entry in enumerate(content["annotations"]):
        def parse(point_of, entry=entry):
            rows = numpy.array(entry["keypoints"], numpy.float64).reshape(-1, 3)
            rows = _in_order(rows, names.get(entry.get("category_id")), point_of, scheme)
            box = entry.get("bbox")
            box = None if not box else numpy.array([*box[:2], box[0] + box[2], box[1] + box[3]],
                                                   numpy.float64)
            return numpy.where(rows[:, 2:] > 0, rows[:, :2], numpy.nan), box, rows[:, 2] == 1
        image = images.get(entry.get("image_id")) if isinstance(entry, dict) else None
        yield _Item(f"annotation {number}", image, [], parse)


def _in_order(rows, names, point_of, scheme):
    """Return COCO keypoints (n, 3) in the order of the scheme, (K, 3).

    The category's names (n) give the order. If it has none, or the scheme has none of them, the
    keypoints are in the scheme's order already.
    """
    known = {_plain(name) for name in scheme.names or ()}
    if not isinstance(names, list) or known.isdisjoint(_plain(str(name)) for name in names):
        _check_count(len(rows), scheme)
        return rows
    if len(rows) != len(names):
        raise ValueError(f"{len(rows)} points found, its category names {len(names)}")
    # A category such as a whole person has keypoints that the scheme does not have.
    found = _by_label([(name, row) for name, row in zip(names, rows)
                       if _plain(str(name)) in known], point_of, scheme, 3)
    found[:, 2] = numpy.nan_to_num(found[:, 2])
    return found


def _labelme(content, scheme):
    """Yield the faces of a labelme file; a group_id separates the faces of a photo."""
    groups = collections.defaultdict(list)
    for shape in content["shapes"]:
        if isinstance(shape, dict) and shape.get("shape_type") == "point":
            groups[shape.get("group_id")].append((shape.get("label"), shape.get("points")))
    if content["shapes"] and not groups:
        groups[None] = []  # Only lines or areas: reported as a face without labelled points.
    for group, found in groups.items():
        def parse(point_of, found=found):
            points = _by_label([(label, place[0]) for label, place in found], point_of, scheme)
            return points, None, None
        yield _Item(_group(group), content.get("imagePath"), [label for label, _ in found], parse)


def _cvat(content, scheme):
    """Yield the faces of a CVAT file.

    A face is a skeleton with labelled points, one shape with all points in the scheme's order, or
    a labelled shape for each point, where a group_id separates the faces of a photo.
    """
    for image in content.findall("image"):
        faces, groups = [], collections.defaultdict(list)
        for number, shape in enumerate([*image.findall("points"), *image.findall("skeleton")]):
            if shape.tag == "skeleton":
                faces.append((f"shape {number}", shape.findall("points"), shape))
            elif scheme.points > 1 and ";" not in shape.get("points"):
                groups[shape.get("group_id")].append(shape)
            else:
                faces.append((f"shape {number}", None, shape))
        faces += [(_group(group), parts, {}) for group, parts in groups.items()]
        for name, parts, whole in faces:
            def parse(point_of, parts=parts, whole=whole):
                occluded = whole.get("occluded") == "1"
                if parts is None:
                    rows = [parse_numbers(xy.split(",")) for xy in whole.get("points").split(";")]
                    _check_count(len(rows), scheme)
                    return numpy.array(rows), None, numpy.full(len(rows), occluded)
                for part in parts:
                    point_of(part.get("label"))  # Checks the labels of points outside as well.
                labelled = [part for part in parts if part.get("outside") != "1"]
                points = _by_label([(part.get("label"),
                                     parse_numbers(part.get("points").split(",")))
                                    for part in labelled], point_of, scheme)
                hidden = numpy.full(scheme.points, occluded)
                hidden[[point_of(part.get("label")) for part in labelled
                        if part.get("occluded") == "1"]] = True
                return points, None, hidden
            yield _Item(f"image {shorten(image.get('name'))} {name}", image.get("name"),
                        [part.get("label") for part in parts or ()], parse)


def _group(group) -> str:
    return "points without a group_id" if group is None else f"group {group}"


def _dlib(content, scheme):
    for image in content.iter("image"):
        for number, face in enumerate(image.iter("box")):
            parts = list(face.iter("part"))

            def parse(point_of, face=face, parts=parts):
                points = _by_label([(part.get("name"),
                                     parse_numbers([part.get("x"), part.get("y")]))
                                    for part in parts], point_of, scheme)
                left, top, width, height = parse_numbers([face.get(key) for key in
                                                          ("left", "top", "width", "height")])
                return points, numpy.array([left, top, left + width, top + height]), None
            yield _Item(f"image {shorten(image.get('file'))} box {number}", image.get("file"),
                        [part.get("name") for part in parts], parse)


def _by_label(found, point_of, scheme, size=2):
    """Return points (K, size) of (label, coordinates) pairs, NaN where absent.

    Raises ValueError for a point that is there twice.
    """
    points = numpy.full((scheme.points, size), numpy.nan)
    for label, coordinates in found:
        point = point_of(label)
        if numpy.isfinite(points[point]).any():
            raise ValueError(f"point {label} is there twice")
        points[point] = coordinates
    return points


def _check_count(count: int, scheme: Scheme) -> None:
    if count != scheme.points:
        raise ValueError(f"{count} points found, {scheme.points} expected")
