"""The faces in a file of COCO keypoints, labelme or dlib, for utils.data.readers.annotations.

Each function takes the file's content, the scheme, the file's path and the list of problems, and
yields the annotated faces as `Item`. utils.data.readers.cvat does so for CVAT.
"""
from __future__ import annotations

import collections
import pathlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy

from utils.data.readers import names as point_names
from utils.data.readers.pts import parse_numbers, shorten
from utils.landmarks.schemes import Scheme

# Flags and attributes by which people mark what must not be used; most tools have no fixed name.
_UNUSED = {"ignore", "ignored", "skip", "skipped", "exclude", "excluded", "unusable", "donotuse",
           "reject", "rejected"}


class Item(NamedTuple):
    """An annotated face in a file.

    Attributes:
        where: names the face within the file, for messages.
        image: image path as written in the file, or None.
        labels: labels of its points.
        parse: takes the function of `annotations.point_index` and returns points (K, 2), box (4,)
            or None and hidden (K,) or None; raises if the annotation is wrong.
        mark: by what the tool marks the face as not to be used, or None.
    """
    where: str
    image: str | None
    labels: list
    parse: Callable
    mark: str | None = None


def unused_mark(flags: object) -> str | None:
    """Return the name of a flag that is set and says that something is not to be used, or None.

    Args:
        flags: name to value; anything else has no flags.
    """
    for name, value in flags.items() if isinstance(flags, dict) else ():
        is_set = str(value).strip().lower() in ("true", "1", "yes", "1.0")
        if is_set and point_names.plain(name) in _UNUSED:
            return str(name)
    return None


def is_unused(name: object) -> bool:
    """Return True for the name of a flag or label that says that something is not to be used."""
    return point_names.plain(str(name)) in _UNUSED


def by_label(found: list, point_of: Callable, scheme: Scheme, size: int = 2) -> numpy.ndarray:
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


def check_count(count: int, scheme: Scheme) -> None:
    """Raise ValueError if a face has another number of points than the scheme."""
    if count != scheme.points:
        raise ValueError(f"{count} points found, {scheme.points} expected")


def coco(content: dict, scheme: Scheme, path: pathlib.Path, problems: list) -> Iterator[Item]:
    """Yield the faces of a file of COCO keypoints."""
    images = {image.get("id"): image.get("file_name") for image in content["images"]
              if isinstance(image, dict)}
    orders = {category.get("id"): _order(category, scheme, path, problems)
              for category in content.get("categories") or () if isinstance(category, dict)}
    for number, entry in enumerate(content["annotations"]):
        def parse(point_of, entry=entry):
            rows = numpy.array(entry["keypoints"], numpy.float64).reshape(-1, 3)
            rows = _in_order(rows, orders.get(entry.get("category_id")), scheme)
            box = entry.get("bbox")
            box = None if not box else numpy.array([*box[:2], box[0] + box[2], box[1] + box[3]],
                                                   numpy.float64)
            return numpy.where(rows[:, 2:] > 0, rows[:, :2], numpy.nan), box, rows[:, 2] == 1
        entry_is_face = isinstance(entry, dict)
        image = images.get(entry.get("image_id")) if entry_is_face else None
        marks = {} if not entry_is_face else {
            "iscrowd": "iscrowd" if entry.get("iscrowd") in (1, True) else None,
            "flag": unused_mark({"ignore": entry.get("ignore")}),
            "attribute": unused_mark(entry.get("attributes"))}
        yield Item(f"annotation {number}", image, [], parse, next(filter(None, marks.values()),
                                                                 None))


def _order(category, scheme, path, problems):
    """Return [(name, point or None)] of a category's keypoints, or None where the order counts.

    Appends a note to `problems` where names do not decide alone.
    """
    names = category.get("keypoints")
    if not isinstance(names, list) or not names:
        return None
    names = [str(name) for name in names]
    known = list(scheme.names or ())
    found = point_names.match(names, known)
    if not found:
        order = point_names.numbers(names)
        if order is not None and len(order) == scheme.points:
            return list(zip(names, order))
        if len(names) == scheme.points:
            pairs = [(name, known[i] if known else f"point {i}") for i, name in enumerate(names)]
            problems.append((path, f"note: none of the {len(names)} keypoint names of the category "
                                   f"is one of scheme {scheme.name}: they are taken in their "
                                   f"order, {_pairs(pairs)}; if that is wrong, give the points of "
                                   f"the scheme these names"))
        return None
    pairs = [(name, known[point]) for name, point in found.items()
             if point_names.plain(name) != point_names.plain(known[point])]
    if pairs:
        problems.append((path, f"note: keypoints are matched by name: {_pairs(pairs)}"))
    missing = [name for i, name in enumerate(known) if i not in found.values()]
    left_out = [name for name in names if name not in found]
    if missing and left_out:
        problems.append((path, f"note: no keypoint is {shorten(missing[0])}; left out as none of "
                               f"scheme {scheme.name}: {', '.join(map(shorten, left_out[:3]))}"))
    return [(name, found.get(name)) for name in names]


def _pairs(pairs):
    """Return the first three pairs (name in the file, point of the scheme) as text."""
    return ", ".join(f"{shorten(name)} = {point}" for name, point in pairs[:3]) + (
        ", ..." if len(pairs) > 3 else "")


def _in_order(rows, order, scheme):
    """Return COCO keypoints (n, 3) in the order of the scheme, (K, 3)."""
    if order is None:
        check_count(len(rows), scheme)
        return rows
    if len(rows) != len(order):
        raise ValueError(f"{len(rows)} points found, its category names {len(order)}")
    # A category such as a whole person has keypoints that the scheme does not have.
    points = {name: point for name, point in order if point is not None}
    found = by_label([(name, row) for (name, point), row in zip(order, rows) if point is not None],
                     points.get, scheme, 3)
    found[:, 2] = numpy.nan_to_num(found[:, 2])
    return found


def labelme(content: dict, scheme: Scheme, path: pathlib.Path, problems: list) -> Iterator[Item]:
    """Yield the faces of a labelme file; a group_id separates the faces of a photo."""
    groups, marked = collections.defaultdict(list), 0
    for shape in content["shapes"]:
        if isinstance(shape, dict) and shape.get("shape_type") == "point":
            group = groups[shape.get("group_id")]
            if unused_mark(shape.get("flags")):
                marked += 1
            else:
                group.append((shape.get("label"), shape.get("points")))
    if marked:
        problems.append((path, f"note: {marked} points are marked as not to be used, and missing"))
    if content["shapes"] and not groups:
        groups[None] = []  # Only lines or areas: reported as a face without labelled points.
    for group, found in groups.items():
        def parse(point_of, found=found):
            points = by_label([(label, place[0]) for label, place in found], point_of, scheme)
            return points, None, None
        yield Item(group_name(group), content.get("imagePath"), [label for label, _ in found],
                   parse, unused_mark(content.get("flags")))


def group_name(group: object) -> str:
    """Return how messages name the points of a group_id, which may be None."""
    return "points without a group_id" if group is None else f"group {group}"


def dlib(content, scheme: Scheme, path: pathlib.Path, problems: list) -> Iterator[Item]:
    """Yield the faces of an XML file of dlib's imglab or of iBUG."""
    for image in content.iter("image"):
        for number, face in enumerate(image.iter("box")):
            parts = list(face.iter("part"))

            def parse(point_of, face=face, parts=parts):
                points = by_label([(part.get("name"),
                                    parse_numbers([part.get("x"), part.get("y")]))
                                   for part in parts], point_of, scheme)
                left, top, width, height = parse_numbers([face.get(key) for key in
                                                          ("left", "top", "width", "height")])
                return points, numpy.array([left, top, left + width, top + height]), None
            yield Item(f"image {shorten(image.get('file'))} box {number}", image.get("file"),
                       [part.get("name") for part in parts], parse,
                       unused_mark({"ignore": face.get("ignore")}))
