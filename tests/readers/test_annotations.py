"""Files of labelling tools."""
import json

import numpy
import pytest
from reader_files import image, write

from utils.data import readers
from utils.data.readers import annotations
from utils.landmarks import schemes as landmarks

THREE = landmarks.Scheme("three", numpy.array([1, 0, 2]), numpy.zeros((3, 2)), None, {})
SHAPE = {"shape_type": "point", "group_id": None}
GOOD = {
    "coco.json": json.dumps({
        "images": [{"id": 7, "file_name": "a.jpg"}],
        "annotations": [{"image_id": 7, "keypoints": [1, 2, 2, 0, 0, 0, 5, 6, 1],
                         "bbox": [1, 2, 8, 9]}]}),
    "labelme.json": json.dumps({"imagePath": "a.jpg", "shapes": [
        {**SHAPE, "label": "2", "points": [[5, 6]]}, {**SHAPE, "label": "0", "points": [[1, 2]]}]}),
    "cvat.xml": '<annotations><image name="a.jpg"><skeleton label="face">'
                '<points label="0" outside="0" points="1,2"/><points label="1" outside="1" '
                'points="9,9"/><points label="2" outside="0" points="5,6"/></skeleton></image>'
                '</annotations>',
    "dlib.xml": '<dataset><images><image file="a.jpg"><box left="1" top="2" width="8" height="9">'
                '<part name="00" x="1" y="2"/><part name="02" x="5" y="6"/></box></image></images>'
                '</dataset>'}


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize("one_based", [False, True])
def test_each_tool(tmp_path, name, one_based):
    image(tmp_path / "a.jpg")
    path = write(tmp_path / name, GOOD[name])
    assert readers.recognise(path) is annotations and readers.recognise(tmp_path) is annotations
    problems = []
    face, = annotations.read(tmp_path, problems, THREE, one_based)
    assert not problems and face.photo == tmp_path / "a.jpg"
    assert (face.points + one_based)[[0, 2]].tolist() == [[1, 2], [5, 6]]
    assert numpy.isnan(face.points[1]).all()
    if name in ("coco.json", "dlib.xml"):
        assert (face.box + one_based).tolist() == [1, 2, 9, 11]


@pytest.mark.parametrize("name, old, new, reason", [
    ("coco.json", "[1, 2, 2, ", "[", "2 points found, 3 expected"),
    ("coco.json", '"image_id": 7', '"image_id": 8', "no image"),
    ("labelme.json", '"label": "2"', '"label": "nose"', "point 'nose' is no number from 0 to 2"),
    ("labelme.json", '"label": "2"', '"label": "0"', "point 0 is there twice"),
    ("cvat.xml", 'points="5,6"', 'points="5,x"', "'x' is no number"),
    ("dlib.xml", 'name="02"', 'name="03"', "is no number from 0 to 2"),
    ("dlib.xml", "a.jpg", "b.jpg", "no image")])
def test_bad_entries_are_named(tmp_path, name, old, new, reason):
    image(tmp_path / "a.jpg")
    assert old in GOOD[name]
    path = write(tmp_path / name, GOOD[name].replace(old, new))
    problems = []
    assert annotations.read(path, problems, THREE) == []
    (where, text), = problems
    assert where == path and reason in text


def test_one_shape_of_all_points(tmp_path):
    image(tmp_path / "a.jpg")
    path = write(tmp_path / "cvat.xml", '<annotations><image name="a.jpg"><points label="face" '
                                        'points="1,2;3,4;5,6"/></image></annotations>')
    face, = annotations.read(path, [], THREE)
    assert face.points.tolist() == [[1, 2], [3, 4], [5, 6]]


@pytest.mark.parametrize("file, photo, split", [
    ("labels.json", "a.jpg", "train"), ("labels.json", "test/a.jpg", "test"),
    ("labels.json", "x/Valid/y/a.jpg", "val"), ("test/labels.json", "a.jpg", "test"),
    ("marks/labels.json", "../photos/val/a.jpg", "val"),
    ("person_keypoints_val2017.json", "a.jpg", "val"), ("TEST.json", "a.jpg", "test"),
    ("person_keypoints_val.json", "a.jpg", "val"), ("test_labels.json", "a.jpg", "test"),
    ("contest.json", "a.jpg", "train"), ("labels_test.json", "train/a.jpg", "train")])
def test_lists_by_folders_else_by_the_name_of_the_file(tmp_path, file, photo, split):
    path = write(tmp_path / file, GOOD["coco.json"].replace("a.jpg", photo))
    image(path.parent / photo)
    face, = annotations.read(tmp_path, [], THREE)
    assert (face.lists, face.subset) == ((split,), split)


@pytest.mark.parametrize("name", GOOD)
def test_lists_of_each_tool(tmp_path, name):
    image(tmp_path / "test" / "a.jpg")
    write(tmp_path / "test" / name, GOOD[name])
    image(tmp_path / "a.jpg")
    write(tmp_path / name.replace(".", "_test."), GOOD[name])
    # A file of labelme has the name of its photo.
    splits = ["train" if name == "labelme.json" else "test", "test"]
    assert [face.subset for face in annotations.read(tmp_path, [], THREE)] == splits
