"""CVAT for video: tracks, and photos by the numbers of frames."""
import numpy
import pytest
from helpers.reader_files import image, write

from utils.data import readers
from utils.data.generator import DataGenerator
from utils.data.readers import annotations
from utils.errors import UserError
from utils.landmarks import schemes as landmarks

THREE = landmarks.Scheme("three", numpy.array([1, 0, 2]), numpy.zeros((3, 2)), None, {},
                         names=("right eye", "left eye", "nose"))
POINTS = '<points frame="{}" keyframe="{}" outside="{}" occluded="{}" points="1,2;3,4;{},6"/>'


def track(*shapes, attributes=""):
    return f'<track id="0" label="face"{attributes}>{"".join(shapes)}</track>'


def video(folder, *tracks, size=3, photos=("frame_000000.PNG", "frame_000001.PNG",
                                           "frame_000002.PNG")):
    for name in photos:
        image(folder / "x.png").rename(folder / name)
    return write(folder / "annotations.xml", "<annotations><meta><task><size>"
                 f"{size}</size></task></meta>{''.join(tracks)}</annotations>")


def read(folder):
    problems = []
    faces = annotations.read(folder, problems, THREE)
    return faces, [text for _, text in problems]


def test_frames_beside_the_file(tmp_path):
    # The second frame lies between two keyframes, and in the third the face has left.
    video(tmp_path, track(POINTS.format(0, 1, 0, 0, 5), POINTS.format(1, 0, 0, 1, 7),
                          POINTS.format(2, 1, 1, 0, 9)))
    assert readers.recognise(tmp_path) is annotations
    faces, problems = read(tmp_path)
    assert not problems
    assert [(face.photo.name, face.points[2, 0]) for face in faces] == [
        ("frame_000000.PNG", 5), ("frame_000001.PNG", 7)]
    assert [face.hidden.all() for face in faces] == [False, True]


def test_skeletons_points_and_boxes_of_groups(tmp_path):
    point = '<points label="{}" frame="0" outside="{}" occluded="0" points="{},2"/>'
    skeleton = ('<skeleton frame="0" keyframe="1">' + point.format("R_eye", 0, 1)
                + point.format("leye", 1, 3) + point.format("Nose", 0, 5) + "</skeleton>")
    single = '<track label="{}" group_id="4"><points frame="1" outside="0" points="{},2"/></track>'
    boxes = ('<box frame="1" outside="0" keyframe="0" xtl="0" ytl="1" xbr="8" ybr="9"/>'
             '<box frame="2" outside="1" xtl="0" ytl="1" xbr="8" ybr="9"/>')
    gone = skeleton.replace('outside="0"', 'outside="1"').replace('frame="0"', 'frame="2"')
    video(tmp_path, track(skeleton, gone),
          *(single.format(name, x) for name, x in (("right eye", 1), ("left eye", 3), ("nose", 5))),
          track(boxes, attributes=' group_id="4"'))
    faces, problems = read(tmp_path)
    assert not problems
    assert faces[0].points[[0, 2], 0].tolist() == [1, 5]
    assert numpy.isnan(faces[0].points[1]).all()
    assert faces[1].points[:, 0].tolist() == [1, 3, 5]
    assert faces[0].box is None
    assert faces[1].box.tolist() == [0, 1, 8, 9]
    assert len(faces) == 2


@pytest.mark.parametrize(("photos", "size", "found"), [
    (("clip-00.jpg", "clip-02.jpg"), 3, {0: "clip-00.jpg", 2: "clip-02.jpg"}),
    (("1.png", "2.png", "3.png"), 3, {0: "1.png", 1: "2.png", 2: "3.png"}),
    (("frame_000002.jpg",), 3, {2: "frame_000002.jpg"}), (("5.png", "6.png"), 9, {})])
def test_photos_by_the_numbers_of_frames(tmp_path, photos, size, found):
    video(tmp_path, track(*(POINTS.format(i, 1, 0, 0, 5 + i) for i in range(3))), size=size,
          photos=photos)
    faces, problems = read(tmp_path)
    assert {int(face.points[2, 0]) - 5: face.photo.name for face in faces} == found
    if "1.png" in photos:
        assert problems == [
            "note: CVAT counts frames from 0, the photos from 1: frame 0 is 1.png"]
    elif not found:
        assert "the first photo is 5.png: extract the frames as frame_000000.png" in problems[0]
    else:
        assert len(problems) == 3 - len(found)
        assert all("no photo of this frame" in text for text in problems)


def test_without_frames_one_line_names_the_export(tmp_path):
    video(tmp_path, track(POINTS.format(12, 1, 0, 0, 5)), photos=())
    scheme = write(tmp_path / "three.yaml", "points: 3\n")
    with pytest.raises(UserError, match='(?s)frame_000012.png and so on, or export the task as '
                                        '"CVAT for images"'):
        DataGenerator(tmp_path, 64, tmp_path / "set", scheme=str(scheme), workers=1).run()
    # Two photos of one number are ambiguous.
    for name in ("a_12.png", "b_12.png"):
        image(tmp_path / name)
    faces, (problem,) = read(tmp_path)
    assert not faces
    assert "a_12.png and b_12.png have the same frame number" in problem
