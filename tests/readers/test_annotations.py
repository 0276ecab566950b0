"""The reader of annotation tools."""
import dataclasses
import json
import re

import numpy
import pytest
from helpers.reader_files import image, reasons, write

from utils.data import readers, table
from utils.data.cropping import CroppedFace
from utils.data.readers import annotations
from utils.data.readers.face import MARKED, Source
from utils.errors import UserError
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
    assert readers.recognise(path) is annotations
    assert readers.recognise(tmp_path) is annotations
    problems = []
    face, = annotations.read(tmp_path, problems, THREE, one_based)
    assert not problems
    assert face.photo == tmp_path / "a.jpg"
    assert (face.points + one_based)[[0, 2]].tolist() == [[1, 2], [5, 6]]
    assert numpy.isnan(face.points[1]).all()
    if name in ("coco.json", "dlib.xml"):
        assert (face.box + one_based).tolist() == [1, 2, 9, 11]


@pytest.mark.parametrize(("name", "old", "new", "reason"), [
    ("coco.json", "[1, 2, 2, ", "[", "2 points found, 3 expected"),
    ("coco.json", '"image_id": 7', '"image_id": 8', "one that the file does not list"),
    ("coco.json", '"keypoints"', '"points"', "it has no 'keypoints'"),
    ("labelme.json", '"label": "2"', '"label": "nose"', "point 'nose' is no number from 0 to 2"),
    ("labelme.json", '"label": "2"', '"label": "0"', "point 0 is there twice"),
    ("labelme.json", '"shape_type": "point"', '"shape_type": "line"', "none of its points is"),
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
    assert where == path
    assert reason in text


def test_one_shape_of_all_points(tmp_path):
    image(tmp_path / "a.jpg")
    path = write(tmp_path / "cvat.xml", '<annotations><image name="a.jpg"><points label="face" '
                                        'points="1,2;3,4;5,6"/></image></annotations>')
    face, = annotations.read(path, [], THREE)
    assert face.points.tolist() == [[1, 2], [3, 4], [5, 6]]


@pytest.mark.parametrize(("file", "photo", "split"), [
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
    # A labelme file is named after its photo, so its name gives no list.
    splits = ["train" if name == "labelme.json" else "test", "test"]
    assert [face.subset for face in annotations.read(tmp_path, [], THREE)] == splits


NAMED = dataclasses.replace(THREE, names=("right eye", "left_eye", "nose"))


def labelled(name, labels):
    """GOOD[name] with other labels of its points, which are 0, 1 (left out) and 2."""
    return re.sub('("label": "|<points label="|<part name=")0?([012])"',
                  lambda found: f'{found[1]}{labels[int(found[2])]}"', GOOD[name])


@pytest.mark.parametrize("name", ["labelme.json", "cvat.xml", "dlib.xml"])
def test_labels_are_the_names_of_the_scheme_or_numbers(tmp_path, name):
    image(tmp_path / "a.jpg")
    for labels in ("012", ("right eye", "left_eye", "nose"), ("Right_Eye", "LEFT eye", "NOSE")):
        path, problems = write(tmp_path / name, labelled(name, labels)), []
        face, = annotations.read(path, problems, NAMED)
        assert not problems
        assert face.points[[0, 2]].tolist() == [[1, 2], [5, 6]]
        assert numpy.isnan(face.points[1]).all()
    problems = []
    write(path, labelled(name, ("right eye", "left eye", "mouth")))
    assert annotations.read(path, problems, NAMED) == []
    assert [text.partition(": ")[2] for _, text in problems] == [
        "point 'mouth' is no number from 0 to 2 and no name of a point of three"]


def test_coco_keypoints_by_the_names_of_their_category(tmp_path):
    image(tmp_path / "a.jpg")
    scheme = dataclasses.replace(THREE, names=("left eye", "right eye", "nose"))

    def read(names, keypoints):
        content = json.loads(GOOD["coco.json"])
        content["categories"] = [{"id": 1, "name": "face", "keypoints": names}]
        content["annotations"][0].update(category_id=1, keypoints=keypoints)
        problems = []
        faces = annotations.read(write(tmp_path / "coco.json", json.dumps(content)), problems,
                                 scheme)
        return [face.points.tolist() for face in faces], [text for _, text in problems]

    six = [1, 2, 2, 3, 4, 2, 5, 6, 1]
    assert read(["nose", "Left_Eye", "right-eye"], six) == ([[[3, 4], [5, 6], [1, 2]]], [])
    (points,), problems = read(["nose", "left eye"], six[:6])
    assert points[0] == [3, 4]
    assert points[2] == [1, 2]
    assert not problems
    assert numpy.isnan(points[1]).all()
    # Other keypoints of a person are ignored.
    numpy.testing.assert_equal(read(["nose", "left eye", "right eye", "elbow"], [*six, 7, 7, 2]),
                               read(["nose", "left eye", "right eye"], six))
    # Where a point of the scheme has no keypoint, that is said.
    found, problems = read(["nose", "left eye", "elbow"], six)
    numpy.testing.assert_equal(found, read(["nose", "left eye"], six[:6])[0])
    assert problems == [
        "note: no keypoint is 'right eye'; left out as none of scheme three: 'elbow'"]
    # If no name is known, the keypoints are in the order of the scheme, with a note.
    found, problems = read(["a", "b", "c"], six)
    assert found == [[[1, 2], [3, 4], [5, 6]]]
    assert "in their order, 'a' = left eye, 'b' = right eye, 'c' = nose; if that" in problems[0]
    # Numbers are no names: they give the order.
    assert read(["p2", "p3", "p1"], six) == ([[[5, 6], [1, 2], [3, 4]]], [])
    for names, keypoints, reason in (
            (["nose", "left eye"], six, "3 points found, its category names 2"),
            (["nose", "nose", "left eye"], six, "point nose is there twice")):
        faces, (text,) = read(names, keypoints)
        assert faces == []
        assert reason in text


@pytest.mark.parametrize(("file", "photo"), [
    ("annotations/train.json", "images/a.jpg"), ("annotations/val.json", "images/val/a.jpg"),
    ("coco.json", "images/a.jpg")])
def test_coco_images_in_a_separate_folder(tmp_path, file, photo):
    image(tmp_path / photo)
    write(tmp_path / file, GOOD["coco.json"])
    problems = []
    face, = annotations.read(tmp_path, problems, THREE)
    assert face.photo == tmp_path / photo
    assert not problems
    assert face.lists == (("val",) if "val" in file else ("train",))


@pytest.mark.parametrize("name", ["labelme.json", "cvat.xml", "dlib.xml"])
def test_labels_that_count_from_1(tmp_path, name):
    image(tmp_path / "a.jpg")
    path, problems = write(tmp_path / name, labelled(name, "123")), []
    face, = annotations.read(path, problems, THREE)
    assert face.points[[0, 2]].tolist() == [[1, 2], [5, 6]]
    assert numpy.isnan(face.points[1]).all()
    assert [text for _, text in problems] == ["note: labels count from 1, as there is a 3 and no 0"]
    # Without 0 and 3, the labels 1 and 2 are ambiguous.
    write(path, labelled(name, "122"))
    with pytest.raises(UserError, match="from 1 to 2: without 0 and without 3 they may count"):
        annotations.read(tmp_path, [], THREE)


def test_the_label_of_a_point_outside_counts(tmp_path):
    image(tmp_path / "a.jpg")
    parts = ('<points label="1" outside="0" points="1,2"/>'
             '<points label="2" outside="0" points="3,4"/>'
             '<points label="3" outside="1" points="9,9"/>')
    skeleton = f'<skeleton label="face">{parts}</skeleton>'
    path = write(tmp_path / "a.xml", f'<annotations><image name="a.jpg">{skeleton}</image>'
                                     '</annotations>')
    face, = annotations.read(path, [], THREE)
    assert face.points[:2].tolist() == [[1, 2], [3, 4]]
    assert numpy.isnan(face.points[2]).all()
    # Beside labels from 0, the label 3 is an error.
    write(tmp_path / "b.xml", GOOD["cvat.xml"])
    problems = []
    assert len(annotations.read(tmp_path, problems, THREE)) == 1
    (where, text), = problems
    assert where == path
    assert "point '3' is no number from 0 to 2" in text


def test_damaged_files_are_named(tmp_path):
    image(tmp_path / "a.jpg")
    for name, text in GOOD.items():
        write(tmp_path / "cut" / name, text[:len(text) // 2])
    write(tmp_path / "cut" / "empty.json", "")
    write(tmp_path / "cut" / "latin.json", b'{"shapes": ["\xff"]}')
    write(tmp_path / "cut" / "._labels.json", b"\0\5\26\7")  # Metadata file of macOS.
    write(tmp_path / "other.json", '{"names": []}')
    write(tmp_path / "labels.xml", GOOD["dlib.xml"])
    problems = []
    assert len(annotations.read(tmp_path, problems, THREE)) == 1
    assert reasons(problems).keys() == {"empty.json", "latin.json", *GOOD}
    assert all("damaged or cut off: " in reason for reason in reasons(problems).values())
    assert [path.name for path, text in problems if text.startswith("note: not read")] == [
        "other.json"]
    # Damaged files are recognised, so that reading them gives the reason.
    for source in (tmp_path / "cut", tmp_path / "cut" / "coco.json", tmp_path / "other.json"):
        assert readers.recognise(source) is annotations


def test_photos_without_a_labelme_file_are_reported(tmp_path):
    for name in ("a.jpg", "b.jpg", "c.png", "d.jpg", "other/e.jpg", ".f.jpg"):
        image(tmp_path / name)
    path = write(tmp_path / "a.json", GOOD["labelme.json"])
    write(tmp_path / "x.json", GOOD["labelme.json"].replace("a.jpg", "b.jpg"))
    write(tmp_path / "d.json", "{")
    problems = []
    assert len(annotations.read(tmp_path, problems, THREE)) == 2
    assert reasons(problems).keys() == {"c.png", "d.json"}
    assert reasons(problems)["c.png"] == "image without c.json"
    # If one file is read, photos without a file are not reported.
    problems = []
    assert len(annotations.read(path, problems, THREE)) == 1
    assert not problems


MARKS = {
    "coco.json": [('"bbox"', '"iscrowd": 1, "bbox"'), ('"bbox"', '"ignore": 1, "bbox"'),
                  ('"bbox"', '"attributes": {"Ignore": true}, "bbox"')],
    "labelme.json": [('{"imagePath"', '{"flags": {"do not use": true}, "imagePath"')],
    "cvat.xml": [('<skeleton label="face">',
                  '<skeleton label="face"><attribute name="skip">true</attribute>'),
                 ("<skeleton", '<tag label="ignore"/><skeleton')],
    "dlib.xml": [("<box ", '<box ignore="1" ')]}


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize("is_set", [True, False])
def test_what_a_tool_marks_as_not_to_be_used(tmp_path, name, is_set):
    image(tmp_path / "a.jpg")
    for old, new in MARKS[name]:
        if not is_set:
            # The same flags, not set, and flags of another meaning.
            new = re.sub('1, "bbox', '0, "bbox', new).replace("true", "false").replace(
                'ignore="1"', 'ignore="0"').replace('tag label="ignore"', 'tag label="dark"')
        assert old in GOOD[name]
        path, problems = write(tmp_path / name, GOOD[name].replace(old, new, 1)), []
        faces = annotations.read(path, problems, THREE)
        assert len(faces) == (not is_set)
        assert [MARKED in text for _, text in problems] == [True] * is_set


def test_marked_faces_and_points_are_counted(tmp_path, capsys):
    image(tmp_path / "a.jpg")
    content = json.loads(GOOD["labelme.json"])
    content["shapes"][0]["flags"] = {"ignore": True, "blurred": False}
    problems = []
    face, = annotations.read(write(tmp_path / "a.json", json.dumps(content)), problems, THREE)
    assert numpy.isfinite(face.points).all(1).tolist() == [True, False, False]
    assert [text for _, text in problems] == [
        "note: 1 points are marked as not to be used, and missing"]
    marked = [(tmp_path / "a.xml", f"image 'a.jpg' box {i}: {MARKED} (ignore)") for i in range(2)]
    source = Source(tmp_path, "annotations", {}, THREE, [face], marked)
    box = numpy.array([0.0, 0, 9, 9])
    table.print_counts([source], [CroppedFace(face, "annotations", "a", box, box)], [], tmp_path)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["annotations", "train", "1", "-", "0", "1"] in rows
    assert ["annotations", "marked", "2", "-", "2", "0"] in rows


@pytest.mark.parametrize("name", ["labelme.json", "cvat.xml", "dlib.xml"])
def test_short_forms_of_labels(tmp_path, name):
    image(tmp_path / "a.jpg")
    path, problems = write(tmp_path / name, labelled(name, ("R_eye", "leye", "nose_tip"))), []
    face, = annotations.read(path, problems, NAMED)
    assert not problems
    assert face.points[[0, 2]].tolist() == [[1, 2], [5, 6]]
