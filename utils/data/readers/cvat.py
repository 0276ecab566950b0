"""The faces in an XML file of CVAT, for images and for video.

A face is a skeleton with labelled points, one shape with all points in the scheme's order, or a
labelled shape for each point, where a group_id separates the faces of a photo. A box of the same
group is the face's box.

"CVAT for video" has tracks instead of images, and numbers of frames instead of names. The photos
are those beside the file whose names end in these numbers. Frames between keyframes, which CVAT
interpolates, are read like others; what is outside of a frame is not there.
"""
from __future__ import annotations

import collections
import os
import pathlib
import re
from collections.abc import Iterator
from xml.etree import ElementTree

import numpy

from utils.data.photo import IMAGE_SUFFIXES
from utils.data.readers.annotation_tools import (
    Item,
    by_label,
    check_count,
    group_name,
    is_unused,
    unused_mark,
)
from utils.data.readers.pts import parse_numbers, shorten
from utils.landmarks.schemes import Scheme

ADVICE = "or export the task as \"CVAT for images\""


def faces(content: ElementTree.Element, scheme: Scheme, path: pathlib.Path, problems: list
          ) -> Iterator[Item]:
    """Yield the faces of a CVAT file; see annotation_tools."""
    for image in content.findall("image"):
        tags = [tag.get("label") for tag in image.findall("tag")]
        mark = next((f"tag {tag}" for tag in tags if is_unused(tag)), None)
        where = f"image {shorten(image.get('name'))}"
        for item, _ in _faces(image, scheme, where, image.get("name")):
            yield item._replace(mark=item.mark or mark)
    if content.find("track") is not None:
        yield from _video_faces(content, scheme, path, problems)


def _faces(image, scheme, where, name):
    """Yield each face of an element `image`, and whether it is outside of the picture."""
    found, groups = [], collections.defaultdict(list)
    shapes = [*image.findall("points"), *image.findall("skeleton")]
    boxes = collections.defaultdict(list)
    for box in image.findall("box"):
        if box.get("group_id") is not None and box.get("outside") != "1":
            boxes[box.get("group_id")].append(box)
    for number, shape in enumerate(shapes):
        if shape.tag == "skeleton":
            found.append((f"shape {number}", shape.findall("points"), shape))
        elif scheme.points > 1 and ";" not in (shape.get("points") or ""):
            groups[shape.get("group_id")].append(shape)
        else:
            found.append((f"shape {number}", None, shape))
    found += [(group_name(group), parts, {"group_id": group}) for group, parts in groups.items()]
    of_group = collections.Counter(whole.get("group_id") for _, _, whole in found)
    for label, parts, whole in found:
        group = whole.get("group_id")
        own = boxes[group] if of_group[group] == 1 and len(boxes[group]) == 1 else []

        def parse(point_of, parts=parts, whole=whole, own=own):
            points, hidden = _points(parts, whole, point_of, scheme)
            return points, parse_numbers([own[0].get(key) for key in ("xtl", "ytl", "xbr", "ybr")]
                                         ) if own else None, hidden
        mark = next(filter(None, map(_mark, [*([] if isinstance(whole, dict) else [whole]), *own])),
                    None)
        is_outside = whole.get("outside") == "1" or bool(parts) and all(
            part.get("outside") == "1" for part in parts)
        yield Item(f"{where} {label}", name, [part.get("label") for part in parts or ()], parse,
                   mark), is_outside


def _points(parts, whole, point_of, scheme):
    """Return points (K, 2) and hidden (K,) of a shape, or of its parts."""
    occluded = whole.get("occluded") == "1"
    if parts is None:
        rows = [parse_numbers(xy.split(",")) for xy in whole.get("points").split(";")]
        check_count(len(rows), scheme)
        return numpy.array(rows), numpy.full(len(rows), occluded)
    for part in parts:
        point_of(part.get("label"))  # Checks the labels of points outside as well.
    labelled = [part for part in parts if part.get("outside") != "1" and not _mark(part)]
    points = by_label([(part.get("label"), parse_numbers(part.get("points").split(",")))
                       for part in labelled], point_of, scheme)
    hidden = numpy.full(scheme.points, occluded)
    hidden[[point_of(part.get("label")) for part in labelled if part.get("occluded") == "1"]] = True
    return points, hidden


def _mark(shape):
    """Return the name of an attribute of a shape that says that it is not to be used, or None."""
    return unused_mark({attribute.get("name"): attribute.text
                        for attribute in shape.findall("attribute")})


def _video_faces(content, scheme, path, problems):
    """Yield the faces of the tracks, frame by frame."""
    frames = collections.defaultdict(lambda: ElementTree.Element("image"))
    for track in content.findall("track"):
        common = {key: track.get(key) for key in ("label", "group_id") if track.get(key)}
        for shape in track:
            number = shape.get("frame", "")
            if shape.tag not in ("points", "skeleton", "box") or not number.isdecimal():
                continue
            copy = ElementTree.SubElement(frames[int(number)], shape.tag,
                                          {**shape.attrib, **common})
            copy.extend(shape)
    photos, reason = _frame_photos(content, path, frames)
    if reason:
        problems.append((path, reason))
    for number in sorted(frames) if photos else ():
        for item, is_outside in _faces(frames[number], scheme, f"frame {number}", None):
            if is_outside:
                continue
            if number not in photos:
                yield item._replace(parse=_no_photo)
            else:
                yield item._replace(image=os.path.abspath(photos[number]))


def _no_photo(point_of):
    raise ValueError(f"no photo of this frame beside the file; extract it, {ADVICE}")


def _frame_photos(content, path, frames):
    """Return {frame number: photo} of the photos beside a file for video, and a note or reason."""
    folders = (path.parent, path.parent / "images", path.parent.parent / "images")
    for folder in folders:
        found = _numbered(folder)
        if found:
            break
    else:
        return {}, (f"\"CVAT for video\" names no photos, and none whose name ends in a frame's "
                    f"number is beside the file: extract frame_{min(frames, default=0):06d}.png "
                    f"and so on, {ADVICE}")
    twice = next((paths for paths in found.values() if len(paths) > 1), None)
    if twice:
        return {}, (f"{twice[0].name} and {twice[1].name} have the same frame number; keep one of "
                    f"them, {ADVICE}")
    photos = {number: paths[0] for number, paths in found.items()}
    of_cvat = all(re.fullmatch(r"frame_\d{6}", photo.stem) for photo in photos.values())
    size = next((text for text in (content.findtext(f"meta/{kind}/size") for kind in (
        "task", "job")) if text), "")
    if 0 in photos or 0 not in frames:
        return photos, None
    if min(photos) == 1 and max(photos) == (int(size) if size.isdecimal() else max(frames) + 1):
        return ({number - 1: photo for number, photo in photos.items()},
                f"note: CVAT counts frames from 0, the photos from 1: frame 0 is {photos[1].name}")
    if of_cvat:
        return photos, None
    return {}, (f"CVAT counts frames from 0, and the first photo is {photos[min(photos)].name}: "
                f"extract the frames as frame_000000.png and so on, {ADVICE}")


def _numbered(folder):
    """Return {number at the end of the name: photos} of a folder."""
    found = collections.defaultdict(list)
    for photo in sorted(folder.iterdir()) if folder.is_dir() else ():
        number = re.search(r"(\d{1,9})$", photo.stem)
        if number and photo.suffix.lower() in IMAGE_SUFFIXES and not photo.name.startswith("."):
            found[int(number[1])].append(photo)
    return found
