"""Recognise annotation formats that are not read, and say which export to choose instead."""
from __future__ import annotations

import pathlib
import re
from xml.etree import ElementTree

import yaml

from utils.data.readers.pts import walk
from utils.files import read_text

_COCO = "export it as COCO keypoints"
_ADVICE = {
    "Label Studio JSON": f"{_COCO} (in Label Studio: COCO)",
    "VIA": "its exports have each point on its own; write a .csv with a line a face: "
           "image,x1,y1,x2,y2,...",
    "Supervisely": _COCO,
    "CreateML JSON": f"{_COCO} from the tool that wrote it",
    "Pascal VOC XML": f"{_COCO}, or as labelme (RectLabel can do both)",
    "YOLO-pose": f"{_COCO} from the tool that wrote it (CVAT: COCO Keypoints; Roboflow: COCO)",
}


def advice(name: str) -> str:
    """Return that a format is not read, and the export to choose, in one line."""
    return f"{name} is not read; {_ADVICE[name]}"


def name_of(content: object) -> str | None:
    """Return the name of the format of a .json file's content or an XML root, or None."""
    if isinstance(content, ElementTree.Element):
        is_voc = content.tag == "annotation" and content.find("object") is not None
        return "Pascal VOC XML" if is_voc else None
    if isinstance(content, list):
        first = content[0] if content and isinstance(content[0], dict) else {}
        if "data" in first and ("annotations" in first or "completions" in first):
            return "Label Studio JSON"
        if "image" in first and isinstance(first.get("annotations"), list):
            return "CreateML JSON"
        # The small form has the labels directly beside the image.
        values = [row for value in first.values() if isinstance(value, list) for row in value]
        return "Label Studio JSON" if any(isinstance(row, dict) and "keypointlabels" in row
                                          for row in values) else None
    if not isinstance(content, dict):
        return None
    if "_via_img_metadata" in content or {"project", "attribute", "file",
                                          "metadata"} <= content.keys():
        return "VIA"
    entries = list(content.values())
    if entries and all(isinstance(entry, dict) and {"filename", "regions"} <= entry.keys()
                       for entry in entries):
        return "VIA"
    if isinstance(content.get("objects"), list) and isinstance(content.get("size"), dict) \
            or isinstance(content.get("classes"), list) and isinstance(content.get("tags"), list):
        return "Supervisely"
    return None


def name_of_table(header: list[str]) -> str | None:
    """Return the name of the format of a .csv file with these columns, or None."""
    if {"region_shape_attributes", "region_attributes"} & set(header):
        return "VIA"
    return "Label Studio JSON" if {"annotation_id", "annotator"} <= set(header) else None


def yolo_file(folder: pathlib.Path) -> pathlib.Path | None:
    """Return a file of YOLO-pose labels in a folder, or None.

    It is a .yaml with the key kpt_shape, or a .txt whose lines are a class, a box and points, all
    in shares of the photo.
    """
    for path in walk(folder):
        suffix = path.suffix.lower()
        if suffix not in (".txt", ".yaml", ".yml") or path.stat().st_size > 1 << 20:
            continue
        try:
            text = read_text(path)
            if suffix != ".txt":
                found = yaml.safe_load(text)
                if isinstance(found, dict) and "kpt_shape" in found:
                    return path
                continue
        except (OSError, ValueError, yaml.YAMLError):
            continue
        lines = [line.split() for line in text.splitlines() if line.strip()]
        if lines and all(map(_is_pose, lines)):
            return path
    return None


def _is_pose(fields):
    if len(fields) < 9 or not fields[0].isdecimal():
        return False
    if not all(re.fullmatch(r"-?[\d.]+(e-?\d+)?", field) for field in fields):
        return False
    try:
        values = [float(field) for field in fields[1:]]
    except ValueError:
        return False
    points = len(values) - 4
    return all(0 <= value <= 2 for value in values) and max(values[:4]) <= 1 and (
        points % 3 == 0 or points % 2 == 0)
