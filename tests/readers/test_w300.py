"""The reader of 300W."""
import cv2
from helpers.reader_files import DAMAGED, GOOD, face_of, image, pts, reasons, write

from utils.data.readers import w300


def test_w300_lists_groups_and_order(tmp_path):
    for subset, name in (("ibug", "image_003_1.jpg"), ("afw", "7_2.jpg"), ("afw", "7_1.JPG"),
                         ("helen/trainset", "9_1.jpeg"), ("helen/testset", "9_1.jpg"),
                         ("lfpw/trainset", "image_0001.png"), ("lfpw/testset", "image_0001.png")):
        photo = image(tmp_path / subset / name)
        write(photo.with_suffix(".pts"), pts(face_of("300W")))
    problems = []
    faces = w300.read(tmp_path, problems)
    assert problems == []
    assert [(f.subset, f.photo.name, f.lists) for f in faces] == [
        ("afw", "7_1.JPG", ("train",)), ("afw", "7_2.jpg", ("train",)),
        ("helen/trainset", "9_1.jpeg", ("train",)), ("lfpw/trainset", "image_0001.png", ("train",)),
        ("helen/testset", "9_1.jpg", ("test", "test_common")),
        ("lfpw/testset", "image_0001.png", ("test", "test_common")),
        ("ibug", "image_003_1.jpg", ("test", "test_challenge"))]
    assert len({f.name for f in faces}) == 7
    assert all(f.box is None for f in faces)
    # Faces of one photo share a group; the numbers of LFPW are photos.
    assert faces[0].group == faces[1].group == "afw/7"
    assert faces[3].group == "lfpw/trainset/image_0001"
    assert set(w300.EXPECTED) == {f.subset for f in faces}
    assert sum(w300.EXPECTED.values()) == 3837


def test_w300_names_every_bad_item_and_reads_the_rest(tmp_path):
    folder = tmp_path / "afw"
    for name, (content, _) in DAMAGED.items():
        image(folder / f"{name}.jpg")
        write(folder / f"{name}.pts", content)
    good = image(folder / "good.jpg")
    write(folder / "good.pts", GOOD)
    image(folder / "good.png")
    image(folder / "alone.jpg")
    write(folder / "lonely.pts", GOOD)
    # These are ignored without a problem.
    image(folder / "good_mirror.jpg")
    write(folder / "good_mirror.pts", "")
    write(folder / "._good.jpg", "")
    write(folder / "good.mat", "")
    problems = []
    faces = w300.read(tmp_path, problems)
    assert [f.photo for f in faces] == [good]
    found = reasons(problems)
    assert set(found) == {f"{name}.pts" for name in DAMAGED} | {"good.png", "alone.jpg",
                                                                "lonely.pts"}
    assert len(problems) == len(found)
    for name, (_, reason) in DAMAGED.items():
        assert reason in found[f"{name}.pts"]
    assert "alone.pts" in found["alone.jpg"]
    assert "lonely.jpg" in found["lonely.pts"]
    assert "good.jpg" in found["good.png"]


def test_w300_of_shared(shared):
    problems = []
    faces = w300.read(shared / "data" / "300W", problems)
    assert problems == []
    count = {subset: sum(f.subset == subset for f in faces) for subset in w300.EXPECTED}
    assert count == {"afw": 337, "helen/trainset": 870, "lfpw/trainset": 805, "helen/testset": 0,
                     "lfpw/testset": 224, "ibug": 0}
    assert sum("train" in f.lists for f in faces) == 2012
    assert len({f.name for f in faces}) == 2236
    assert all(f.photo.is_file() and f.points.shape == (68, 2) for f in faces)
    by_name = {f.photo.name: f for f in faces if f.subset == "helen/trainset"}
    # These are two people in one photo.
    assert by_name["100040721_1.jpg"].group == by_name["100040721_2.jpg"].group
    photo = cv2.imread(str(faces[0].photo))
    assert (faces[0].points > 0).all()
    assert (faces[0].points < photo.shape[1::-1]).all()
