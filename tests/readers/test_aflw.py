"""The reader of AFLW."""
import numpy
import pytest
import scipy.io
from helpers.reader_files import face_of, image

from utils.data.readers import aflw
from utils.errors import UserError


def write_aflw(folder, names, faces, order, **change):
    """AFLWinfo_release.mat as published: cells of names, x_min x_max y_min y_max, 19 x 19 y."""
    cells = numpy.empty((len(names), 1), object)
    cells[:, 0] = names
    data = numpy.array([numpy.r_[p[:, 0], p[:, 1]] + 1 for p in faces])
    boxes = numpy.array([[p[:, 0].min(), p[:, 0].max(), p[:, 1].min(), p[:, 1].max()]
                         for p in faces]) + 1
    fields = {"nameList": cells, "bbox": boxes, "data": data,
              "mask_new": numpy.ones((len(names), 19)), "ra": numpy.array([order])} | change
    scipy.io.savemat(folder / "AFLWinfo_release.mat",
                     {key: value for key, value in fields.items() if value is not None})
    (folder / "flickr").mkdir(exist_ok=True)


def test_aflw_split_names_and_points(tmp_path, monkeypatch):
    monkeypatch.setitem(aflw.EXPECTED, "train", 3)
    names = ["0/image1.jpg", "2/image2.jpg", "0/image1.jpg", "3/image9.jpg"]
    points = [face_of("AFLW", seed) for seed in range(4)]
    for name in names:
        image(tmp_path / "flickr" / name)
    write_aflw(tmp_path, names, points, [4, 3, 1, 2])
    problems = []
    faces = aflw.read(tmp_path, problems)
    assert problems == []
    assert [(f.name, f.lists, f.group) for f in faces] == [
        ("3_image9-1", ("train",), "3/image9.jpg"), ("0_image1-2", ("train",), "0/image1.jpg"),
        ("0_image1-1", ("train",), "0/image1.jpg"), ("2_image2-1", ("test",), "2/image2.jpg")]
    for face, p in zip(faces, [points[i] for i in (3, 2, 0, 1)]):
        assert numpy.allclose(face.points, p)
        assert numpy.allclose(face.box, [*p.min(0), *p.max(0)])


def test_aflw_names_bad_faces_and_reads_the_rest(tmp_path):
    names = [f"{i}.jpg" for i in range(5)]
    points = [face_of("AFLW", seed) for seed in range(5)]
    for name in names[:4]:
        image(tmp_path / "flickr" / name)
    points[0][3] = numpy.inf
    points[3][2, 0] = -2
    points[1][4, 1] = numpy.nan
    boxes = numpy.tile([1., 9, 1, 9], (5, 1))
    boxes[2] = [9, 1, 1, 9]
    write_aflw(tmp_path, names, points, [1, 2, 3, 4, 5], bbox=boxes)
    problems = []
    assert [f.name for f in aflw.read(tmp_path, problems)] == ["3-1"]
    texts = [reason for _, reason in problems]
    assert "face 1 ('0.jpg'): a landmark is absent" in texts[0]
    assert "face 2 ('1.jpg'): a landmark is absent" in texts[1]
    assert "face 3 ('2.jpg'): no x_min x_max y_min y_max" in texts[2]
    assert problems[3][0].name == "4.jpg"
    assert len(problems) == 4


@pytest.mark.parametrize(("field", "value", "reason"), [
    ("ra", None, "no field ra"), ("data", None, "no field data"), ("bbox", None, "no field bbox"),
    ("nameList", None, "no field nameList"),
    ("ra", numpy.array([[1, 1]]), "ra is no permutation"),
    ("ra", numpy.array([[1, 2, 3]]), r"ra is \(3,\); nameList has 2"),
    ("data", numpy.zeros((2, 36)), r"data is \(2, 36\)"),
    ("bbox", numpy.zeros((3, 4)), r"bbox is \(3, 4\)"),
    ("data", "words", "data does not hold numbers")])
def test_aflw_names_the_bad_field(tmp_path, field, value, reason):
    write_aflw(tmp_path, ["a.jpg", "b.jpg"], [face_of("AFLW")] * 2, [1, 2], **{field: value})
    with pytest.raises(UserError, match=f"AFLWinfo_release.mat: {reason}"):
        aflw.read(tmp_path, [])


def test_aflw_without_images(tmp_path):
    write_aflw(tmp_path, ["a.jpg"], [face_of("AFLW")], [1])
    (tmp_path / "flickr").rmdir()
    with pytest.raises(UserError, match="flickr: no such folder"):
        aflw.read(tmp_path, [])
