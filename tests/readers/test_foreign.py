"""Formats that are not read are recognised, and the message names the export to choose."""
import json

import pytest
from helpers.reader_files import image, write

from utils.data import readers
from utils.data.generator import DataGenerator
from utils.errors import UserError

KEYPOINT = {"x": 1.0, "y": 2.0, "keypointlabels": ["nose"]}
FOREIGN = {
    "Label Studio JSON": ("a.json", json.dumps([{"id": 1, "data": {"img": "a.jpg"},
                                                 "annotations": []}])),
    "Label Studio JSON ": ("a.json", json.dumps([{"img": "a.jpg", "kp-1": [KEYPOINT]}])),
    "VIA": ("a.json", json.dumps({"a.jpg123": {"filename": "a.jpg", "regions": []}})),
    "VIA ": ("a.json", json.dumps({"_via_settings": {}, "_via_img_metadata": {}})),
    "VIA  ": ("a.csv", "filename,file_size,region_shape_attributes,region_attributes\na,1,2,3\n"),
    "Supervisely": ("ds/ann/a.jpg.json", json.dumps({"size": {"height": 8}, "objects": []})),
    "CreateML JSON": ("a.json", json.dumps([{"image": "a.jpg", "annotations": []}])),
    "Pascal VOC XML": ("a.xml", "<annotation><object><name>x</name></object></annotation>"),
    "YOLO-pose": ("labels/a.txt", "0 0.5 0.5 0.2 0.2 0.4 0.4 2 0.6 0.4 2 0.5 0.5 0\n"),
    "YOLO-pose ": ("data.yaml", "kpt_shape: [5, 3]\n"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_the_tool_and_the_export_are_named(tmp_path, name):
    file, text = FOREIGN[name]
    image(tmp_path / "own" / "a.jpg")
    path = write(tmp_path / "own" / file, text)
    scheme = write(tmp_path / "two.yaml", "points: 2\n")
    # The file itself may be given too, except where files are not recognised by their suffix.
    for source in (tmp_path / "own", path)[:1 if "YOLO" in name else 2]:
        with pytest.raises(UserError, match=f"{name.strip()} is not read; .*(COCO|line a face)"):
            DataGenerator(source, 64, tmp_path / "set", scheme=str(scheme), workers=1).run()


@pytest.mark.parametrize(("file", "text"), [
    ("list.txt", "0 1 2 3 4 5 6 7 8\n"), ("list.txt", "a.jpg 0.1 0.2 0.1 0.2 0.1 0.2 0.1 0.2\n"),
    ("data.yaml", "kpt: [5\n"), ("a.json", "[1, 2]"), ("a.json", "{}"), ("a.xml", "<annotation/>")])
def test_other_files_are_no_format(tmp_path, file, text):
    write(tmp_path / file, text)
    with pytest.raises(UserError, match="no known layout"):
        readers.recognise(tmp_path)
