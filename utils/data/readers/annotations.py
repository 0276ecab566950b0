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

from utils.data.photo import IMAGE_SUFFIXES
from utils.data.readers.face import Face, split_of
from utils.data.readers.pts import numbers, short, unique_name, walk
from utils.errors import UserError

NAME = "annotations"
SCHEME = None
LAYOUT = "a .json of COCO keypoints or labelme, or an .xml of CVAT or dlib"
EXPECTED = {}


def matches(folder):
    """Whether the path (pathlib.Path) is a .json or .xml file, or a folder that holds one of these
    tools or a damaged one, of which read() says what is wrong.
    """
    return any(folder.is_file() or _is_annotation(path) for path in _files(folder))


def _is_annotation(path):
    try:
        return _kind(_parse(path)) is not None
    except ValueError:
        return True


def read(folder, problems, scheme=None, one_based=False):
    """All faces with the points of `scheme` (a landmarks.Scheme); bad items go to `problems`.

    one_based: whether pixels count from 1. Raises UserError without a scheme.
    """
    if scheme is None:
        raise UserError(f"{folder}: your own data needs a landmark scheme: 300W, WFLW, COFW, AFLW, "
                        f"LaPa or a .yaml file")
    root = folder.parent if folder.is_file() else folder
    entries, beside = [], set()
    for path in _files(folder):
        try:
            content = _parse(path)
        except ValueError as error:
            problems.append((path, str(error)))
            continue
        kind = _kind(content)
        if kind is None:
            problems.append((path, "note: not read: it is of none of the tools that are known"))
            continue
        # The file of labelme is one photo's, and so is its name.
        words = () if kind is _labelme else re.split("[^a-z]+", path.stem.lower())
        for where, image, *rest in kind(content, scheme):
            photo = _photo(path, str(image).replace("\\", "/"))
            entries.append((path, words, photo, image, where, *rest))
            if kind is _labelme and folder.is_dir():
                beside.add(photo.parent)
    point_of = _labels({str(label) for *_, labels, _ in entries for label in labels}, scheme,
                       folder, problems)
    faces, taken, count = [], set(), collections.Counter()
    for path, words, photo, image, where, _, make in entries:
        try:
            points, box, hidden = make(point_of)
            if image is None:
                raise ValueError("it does not say of which image it is, or of one that is unknown")
            if not os.path.isfile(photo):
                raise ValueError(f"no image {short(str(photo), 200)}")
            if numpy.isnan(points).all():
                raise ValueError("none of its points is labelled")
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            missing = "it has no " * isinstance(error, KeyError)
            problems.append((path, f"{where}: {missing}{error}"))
            continue
        group = os.path.relpath(photo, root)
        count[group] += 1
        name = unique_name(f"{photo.stem}-{count[group]}", taken)
        shift = float(one_based)
        folders = os.path.relpath(photo.parent, root).split(os.sep)
        split = split_of(folders) or split_of(words) or "train"
        faces.append(Face(photo, points - shift, (split,), split, group, name,
                          None if box is None else box - shift,
                          hidden=hidden))
    named = {os.path.normpath(photo) for _, _, photo, *_ in entries}
    problems += _forgotten(beside, named, {path.stem for path in _files(folder)})
    return faces


def _photo(path, image):
    """Where the image of an annotation file lies: beside it, or in a folder images beside it or, as
    COCO has it, beside its folder, perhaps in one called as the file.
    """
    above = path.parent.parent / "images"
    places = (path.parent, path.parent / "images", above, above / path.stem)
    # Another machine's path says no more than the name.
    found = [p / name for name in (image, image.rpartition("/")[2]) for p in places]
    return next((photo for photo in found if photo.is_file()), path.parent / image)


def _forgotten(folders, named, stems):
    """(photo, reason) of the photos in these folders that are not among the named ones and for
    which there is no file of these stems.
    """
    for folder in sorted(path for path in folders if path.is_dir()):
        for photo in sorted(folder.iterdir()):
            if not (photo.suffix.lower() not in IMAGE_SUFFIXES or photo.name.startswith(".")
                    or photo.stem in stems or os.path.normpath(photo) in named):
                yield photo, f"image without {photo.stem}.json"


def _files(folder):
    paths = [folder] if folder.is_file() else walk(folder)
    return [p for p in paths if p.suffix.lower() in (".json", ".xml") and p.is_file()
            and not p.name.startswith(".")]


def _parse(path):
    """The content of a file: what JSON holds, or the root of an XML tree. Raises ValueError."""
    try:
        if path.suffix.lower() == ".json":
            return json.loads(path.read_bytes().decode("utf-8-sig"))
        return ElementTree.parse(path).getroot()
    except (OSError, ValueError, RecursionError, ElementTree.ParseError) as error:
        raise ValueError(f"it cannot be read, for it is damaged or cut off: {error}") from None


def _kind(content):
    """The function that reads such content; None where it is of none of the four.

    It yields (which item, image, labels of its points, make) of each face; make(point_of), with the
    function of _labels, gives points (K, 2), box (4,) or None and hidden (K,) or None, or raises
    what a wrong item raises.
    """
    if isinstance(content, dict):
        if isinstance(content.get("annotations"), list) and isinstance(content.get("images"), list):
            return _coco
        return _labelme if isinstance(content.get("shapes"), list) else None
    if isinstance(content, ElementTree.Element):
        return {"dataset": _dlib, "annotations": _cvat}.get(content.tag)
    return None


def _labels(labels, scheme, folder, problems):
    """The function from a label to its point: a name of the scheme's, letter case, blanks, - and _
    aside, or a number.

    Numbers count from 0, and from 1 where among all labels (strings) is K and no 0, which gets a
    note. Raises UserError where neither is, for then nobody can tell.
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
            raise ValueError(f"point {short(label)} is no number from {first} to {first + last - 1}"
                             f" and no name of a point of {scheme.name}")
        return point

    return point_of


def _number(label):
    # What is longer numbers no point, and int() refuses it where it is very long.
    return int(label) if label.isdecimal() and len(label) < 10 else None


def _plain(name):
    return re.sub(r"[\s_-]+", "", name.lower())


def _coco(content, scheme):
    images = {image.get("id"): image.get("file_name") for image in content["images"]
              if isinstance(image, dict)}
    named = {category.get("id"): category.get("keypoints") for category
             in content.get("categories") or () if isinstance(category, dict)}
    for number, entry in enumerate(content["annotations"]):
        def make(point_of, entry=entry):
            rows = numpy.array(entry["keypoints"], numpy.float64).reshape(-1, 3)
            rows = _in_order(rows, named.get(entry.get("category_id")), point_of, scheme)
            box = entry.get("bbox")
            box = None if not box else numpy.array([*box[:2], box[0] + box[2], box[1] + box[3]],
                                                   numpy.float64)
            return numpy.where(rows[:, 2:] > 0, rows[:, :2], numpy.nan), box, rows[:, 2] == 1
        image = images.get(entry.get("image_id")) if isinstance(entry, dict) else None
        yield f"annotation {number}", image, (), make


def _in_order(rows, names, point_of, scheme):
    """COCO's rows (n, 3) as the scheme's K: by the names (n) that their category gives them, in
    their own order where the scheme has no names or none of these.
    """
    known = {_plain(name) for name in scheme.names or ()}
    if not isinstance(names, list) or known.isdisjoint(_plain(str(name)) for name in names):
        _check_count(len(rows), scheme)
        return rows
    if len(rows) != len(names):
        raise ValueError(f"{len(rows)} points found, its category names {len(names)}")
    # A person has keypoints that are none of the scheme.
    found = _by_label([(name, row) for name, row in zip(names, rows)
                       if _plain(str(name)) in known], point_of, scheme, 3)
    found[:, 2] = numpy.nan_to_num(found[:, 2])
    return found


def _labelme(content, scheme):
    """A group_id tells faces of one photo apart."""
    groups = collections.defaultdict(list)
    for shape in content["shapes"]:
        if isinstance(shape, dict) and shape.get("shape_type") == "point":
            groups[shape.get("group_id")].append((shape.get("label"), shape.get("points")))
    if content["shapes"] and not groups:
        groups[None] = []  # Lines or areas alone: that no point is labelled will be said of it.
    for group, found in groups.items():
        def make(point_of, found=found):
            points = _by_label([(label, place[0]) for label, place in found], point_of, scheme)
            return points, None, None
        yield _group(group), content.get("imagePath"), [label for label, _ in found], make


def _cvat(content, scheme):
    """A skeleton's labelled points, one shape of all points in the scheme's order, or a labelled
    shape for each point, of which a group_id tells faces of one photo apart.
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
            def make(point_of, parts=parts, whole=whole):
                covered = whole.get("occluded") == "1"
                if parts is None:
                    rows = [numbers(place.split(",")) for place in whole.get("points").split(";")]
                    _check_count(len(rows), scheme)
                    return numpy.array(rows), None, numpy.full(len(rows), covered)
                for part in parts:
                    point_of(part.get("label"))  # One that is outside may be wrong as well.
                labelled = [part for part in parts if part.get("outside") != "1"]
                points = _by_label([(part.get("label"), numbers(part.get("points").split(",")))
                                    for part in labelled], point_of, scheme)
                hidden = numpy.full(scheme.points, covered)
                hidden[[point_of(part.get("label")) for part in labelled
                        if part.get("occluded") == "1"]] = True
                return points, None, hidden
            yield (f"image {short(image.get('name'))} {name}", image.get("name"),
                   [part.get("label") for part in parts or ()], make)


def _group(group):
    return "points without a group_id" if group is None else f"group {group}"


def _dlib(content, scheme):
    for image in content.iter("image"):
        for number, face in enumerate(image.iter("box")):
            parts = list(face.iter("part"))

            def make(point_of, face=face, parts=parts):
                points = _by_label([(part.get("name"), numbers([part.get("x"), part.get("y")]))
                                    for part in parts], point_of, scheme)
                left, top, width, height = numbers([face.get(key) for key in
                                                    ("left", "top", "width", "height")])
                return points, numpy.array([left, top, left + width, top + height]), None
            yield (f"image {short(image.get('file'))} box {number}", image.get("file"),
                   [part.get("name") for part in parts], make)


def _by_label(found, point_of, scheme, size=2):
    """Points (K, size) of (label, place) pairs; NaN for absent ones. Raises ValueError."""
    points = numpy.full((scheme.points, size), numpy.nan)
    for label, place in found:
        point = point_of(label)
        if numpy.isfinite(points[point]).any():
            raise ValueError(f"point {label} is there twice")
        points[point] = place
    return points


def _check_count(count, scheme):
    if count != scheme.points:
        raise ValueError(f"{count} points found, {scheme.points} expected")
