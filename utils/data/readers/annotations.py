"""Files of the common labelling tools: COCO keypoints (.json), labelme (.json beside each photo),
CVAT for images and dlib/iBUG (.xml), told apart by what is in them.

A photo's list is that of a folder test/, val/ (or valid/) or train/ in its path, else the one that
a word of the file's name says (person_keypoints_val.json), else train. Pixels count from 0, from 1
with --one-based. A point that a tool left out (COCO's visibility 0, a label that is absent, outside
in CVAT) is NaN; one that is covered (COCO's visibility 1, occluded in CVAT) is marked as hidden.
"""
import collections
import json
import os
import re
from xml.etree import ElementTree

import numpy

from utils.data.readers.face import Face, split_of
from utils.data.readers.pts import numbers, short, unique_name, walk
from utils.errors import UserError

NAME = "annotations"
SCHEME = None
LAYOUT = "a .json of COCO keypoints or labelme, or an .xml of CVAT or dlib"
EXPECTED = {}


def matches(folder):
    """Whether the path (pathlib.Path) is such a file or a folder that holds some."""
    return any(_kind(path) for path in _files(folder))


def read(folder, problems, scheme=None, one_based=False):
    """All faces with the points of `scheme` (a landmarks.Scheme); bad items go to `problems`.

    one_based: whether pixels count from 1. Raises UserError without a scheme.
    """
    if scheme is None:
        raise UserError(f"{folder}: your own data needs a landmark scheme: 300W, WFLW, COFW, AFLW, "
                        f"LaPa or a .yaml file")
    faces, taken, count = [], set(), collections.Counter()
    root = folder.parent if folder.is_file() else folder
    for path in _files(folder):
        kind = _kind(path)
        if kind is None:
            continue
        # The file of labelme is one photo's, and so is its name.
        words = () if kind is _labelme else re.split("[^a-z]+", path.stem.lower())
        for where, image, make in kind(_parse(path), scheme):
            try:
                points, box, *hidden = make()
                photo = path.parent / str(image).replace("\\", "/")
                if not os.path.isfile(photo):
                    raise ValueError(f"no image {short(str(photo), 200)}")
                if numpy.isnan(points).all():
                    raise ValueError("none of its points is labelled")
            except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
                problems.append((path, f"{where}: {error}"))
                continue
            group = os.path.normpath(photo)
            count[group] += 1
            name = unique_name(f"{photo.stem}-{count[group]}", taken)
            shift = float(one_based)
            folders = os.path.relpath(photo.parent, root).split(os.sep)
            split = split_of(folders) or split_of(words) or "train"
            faces.append(Face(photo, points - shift, (split,), split, group, name,
                              None if box is None else box - shift,
                              hidden=hidden[0] if hidden else None))
    return faces


def _files(folder):
    paths = [folder] if folder.is_file() else walk(folder)
    return [p for p in paths if p.suffix.lower() in (".json", ".xml") and p.is_file()]


def _parse(path):
    """The content of a file: what JSON holds, or the root of an XML tree; None where neither."""
    try:
        if path.suffix.lower() == ".json":
            return json.loads(path.read_bytes().decode("utf-8-sig"))
        return ElementTree.parse(path).getroot()
    except (OSError, ValueError, RecursionError, ElementTree.ParseError):
        return None


def _kind(path):
    """The function that reads the file, by its content; None where it is none of the four."""
    content = _parse(path)
    if isinstance(content, dict):
        if isinstance(content.get("annotations"), list) and isinstance(content.get("images"), list):
            return _coco
        return _labelme if isinstance(content.get("shapes"), list) else None
    if isinstance(content, ElementTree.Element):
        return {"dataset": _dlib, "annotations": _cvat}.get(content.tag)
    return None


def _coco(content, scheme):
    images = {image.get("id"): image.get("file_name") for image in content["images"]
              if isinstance(image, dict)}
    for number, entry in enumerate(content["annotations"]):
        def make(entry=entry):
            rows = numpy.array(entry["keypoints"], numpy.float64).reshape(-1, 3)
            _check_count(len(rows), scheme)
            box = entry.get("bbox")
            box = None if not box else numpy.array([*box[:2], box[0] + box[2], box[1] + box[3]],
                                                   numpy.float64)
            return numpy.where(rows[:, 2:] > 0, rows[:, :2], numpy.nan), box, rows[:, 2] == 1
        image = images.get(entry.get("image_id")) if isinstance(entry, dict) else None
        yield f"annotation {number}", image, make


def _labelme(content, scheme):
    """Labels are the points' numbers from 0; a group_id tells faces of one photo apart."""
    groups = collections.defaultdict(list)
    for shape in content["shapes"]:
        if isinstance(shape, dict) and shape.get("shape_type") == "point":
            groups[shape.get("group_id")].append((shape.get("label"), shape.get("points")))
    for group, found in groups.items():
        def make(found=found):
            return _by_label([(label, place[0]) for label, place in found], scheme), None
        yield f"group {group}", content.get("imagePath"), make


def _cvat(content, scheme):
    """A skeleton's labelled points, or one shape of all of them in the scheme's order."""
    for image in content.iter("image"):
        for number, shape in enumerate([*image.iter("points"), *image.iter("skeleton")]):
            if shape.tag == "points" and shape.get("label", "").isdecimal():
                continue  # Of a skeleton.

            def make(shape=shape):
                covered = shape.get("occluded") == "1"
                if shape.tag == "skeleton":
                    labelled = [p for p in shape.iter("points") if p.get("outside") != "1"]
                    points = _by_label([(p.get("label"), numbers(p.get("points").split(",")))
                                        for p in labelled], scheme)
                    hidden = numpy.full(scheme.points, covered)
                    hidden[[int(p.get("label")) for p in labelled
                            if p.get("occluded") == "1"]] = True
                    return points, None, hidden
                rows = [numbers(place.split(",")) for place in shape.get("points").split(";")]
                _check_count(len(rows), scheme)
                return numpy.array(rows), None, numpy.full(len(rows), covered)
            yield f"image {short(image.get('name'))} shape {number}", image.get("name"), make


def _dlib(content, scheme):
    for image in content.iter("image"):
        for number, face in enumerate(image.iter("box")):
            def make(face=face):
                points = _by_label([(part.get("name"), numbers([part.get("x"), part.get("y")]))
                                    for part in face.iter("part")], scheme)
                left, top, width, height = numbers([face.get(key) for key in
                                                    ("left", "top", "width", "height")])
                return points, numpy.array([left, top, left + width, top + height])
            yield f"image {short(image.get('file'))} box {number}", image.get("file"), make


def _by_label(found, scheme):
    """Points (K, 2) of (number from 0, place) pairs; NaN for absent ones. Raises ValueError."""
    points = numpy.full((scheme.points, 2), numpy.nan)
    for label, place in found:
        if not str(label).isdecimal() or int(label) >= scheme.points:
            raise ValueError(f"point {short(label)} is no number from 0 to {scheme.points - 1} "
                             f"(the points of {scheme.name})")
        if numpy.isfinite(points[int(label)]).any():
            raise ValueError(f"point {label} is there twice")
        points[int(label)] = place
    return points


def _check_count(count, scheme):
    if count != scheme.points:
        raise ValueError(f"{count} points found, {scheme.points} expected")
