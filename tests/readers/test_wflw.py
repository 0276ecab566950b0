"""The reader of WFLW."""
import shutil

import numpy
import pytest
from helpers.reader_files import face_of, image, reasons, write

from utils.data.readers import wflw
from utils.errors import UserError
from utils.landmarks import schemes as landmarks
from utils.landmarks.schemes import SCHEMES


def wflw_line(points, name, box=(1, 2, 30, 40), attributes="0 0 0 0 0 0"):
    coordinates = " ".join(f"{v:.6f}" for v in points.ravel())
    return f"{coordinates} {' '.join(map(str, box))} {attributes} {name}"


def wflw_tree(folder, train, test):
    lists = folder / "WFLW_annotations" / "list_98pt_rect_attr_train_test"
    (folder / "WFLW_images").mkdir(exist_ok=True)
    write(lists / "list_98pt_rect_attr_train.txt", "\n".join(train))
    return write(lists / "list_98pt_rect_attr_test.txt", "\n".join(test) + "\n")


def test_wflw_lists_subsets_and_names(tmp_path):
    image(tmp_path / "WFLW_images" / "0--P" / "a.jpg")
    image(tmp_path / "WFLW_images" / "0--P" / "b c.jpg")
    faces = [face_of("WFLW", seed) for seed in range(4)]
    test = [wflw_line(faces[1], "0--P/a.jpg"), wflw_line(faces[2], "0--P/a.jpg", (5, 6, 7, 8))]
    wflw_tree(tmp_path, [wflw_line(faces[0], "0--P/a.jpg"), wflw_line(faces[3], "0--P/b c.jpg")],
              test)
    subset = tmp_path / "WFLW_annotations" / "list_98pt_test"
    # The published subset lists have no box and no attributes; both forms are read.
    bare = " ".join(test[1].split()[:196]) + " 0--P/a.jpg"
    write(subset / "list_98pt_test_blur.txt", bare)
    write(subset / "list_98pt_test_makeup.txt", test[1] + "\r\n" + test[0] + "\r\n")
    write(subset / "list_98pt_test_occlusion.txt",
          wflw_line(faces[0], "0--P/a.jpg") + "\n1 2 x.jpg\nnan " + bare.split(" ", 1)[1])
    problems = []
    read = wflw.read(tmp_path, problems)
    assert [(f.name, f.lists) for f in read] == [
        ("a-1", ("train",)), ("b_c-1", ("train",)), ("a-2", ("test", "test_makeup")),
        ("a-3", ("test", "test_makeup", "test_blur"))]
    assert read[0].group == read[2].group != read[1].group
    assert read[3].box.tolist() == [5, 6, 7, 8]
    for face, points in zip(read, [faces[0], faces[3], faces[1], faces[2]]):
        assert numpy.allclose(face.points, points)
    texts = [reason for _, reason in problems]
    assert sum(text.startswith("note: no such list") for text in texts) == 3
    # A bad line of a subset list costs no face.
    assert [text[:12] for text in texts if "note: line" in text] == ["note: line 1", "note: line 2",
                                                                     "note: line 3"]
    assert all(text.startswith("note:") for text in texts)


@pytest.mark.parametrize(("line", "reason"), [
    (wflw_line(face_of("WFLW")[:97], "a.jpg"), "207 fields expected"),
    (wflw_line(face_of("WFLW"), "").strip(), "206 found"),
    ("a.jpg", "1 found"),
    (wflw_line(face_of("WFLW") * numpy.nan, "a.jpg"), "'nan' is no finite number"),
    (wflw_line(face_of("WFLW"), "a.jpg", (1, 2, "x", 4)), "'x' is no number"),
    (wflw_line(face_of("WFLW"), "a.jpg", (9, 2, 3, 4)), "no x_min y_min x_max y_max"),
    (wflw_line(face_of("WFLW"), "a.jpg", attributes="0 0 0 0 2 0"), "attributes are 0 or 1"),
    (wflw_line(face_of("WFLW"), "absent.jpg"), "absent.jpg"),
    (wflw_line(face_of("WFLW"), "x" * 5000), "no image"),
    (wflw_line(face_of("WFLW"), "x\0y"), "no image"),
    ("\x00\xff\xfe", "1 found")])
def test_wflw_names_the_bad_line(tmp_path, line, reason):
    image(tmp_path / "WFLW_images" / "a.jpg")
    good = wflw_line(face_of("WFLW"), "a.jpg")
    path = wflw_tree(tmp_path, [good], [good, "", line, good])
    problems = []
    faces = wflw.read(tmp_path, problems)
    assert [f.subset for f in faces] == ["train", "test", "test"]
    (where, text), = [p for p in problems if not p[1].startswith("note:")]
    assert where == path
    assert text.startswith("line 3: ")
    assert reason in text
    assert len(text) < 300
    assert "\0" not in text


def test_wflw_without_lists_or_images(tmp_path):
    path = wflw_tree(tmp_path, [""], [""])
    with pytest.raises(UserError, match=r"train.txt: cannot be read: the file is empty"):
        wflw.read(tmp_path, [])
    (tmp_path / "WFLW_images").rmdir()
    with pytest.raises(UserError, match="WFLW_images: no such folder"):
        wflw.read(tmp_path, [])
    shutil.rmtree(path.parent)
    (tmp_path / "WFLW_images").mkdir()
    with pytest.raises(UserError, match="no list of WFLW"):
        wflw.read(tmp_path, [])


def test_wflw_of_shared_and_as_68_points(shared):
    problems = []
    faces = wflw.read(shared / "data" / "samples" / "WFLW", problems)
    assert reasons(problems) == {}
    assert len(faces) == 4
    assert len({f.group for f in faces}) == 2
    assert len({f.name for f in faces}) == 4
    mean = SCHEMES["300W"].mean_face
    # The WFLW points of each of the 68, listed independently of wflw_to_300w.
    sources = {i: [2 * i] for i in range(17)}
    sources |= {17: [33], 18: [34, 41], 19: [35, 40], 20: [36, 39], 21: [37, 38], 22: [42, 50],
                23: [43, 49], 24: [44, 48], 25: [45, 47], 26: [46]}
    sources |= {27 + i: [51 + i] for i in range(9)}
    sources |= {36: [60], 37: [61, 62], 38: [62, 63], 39: [64], 40: [65, 66], 41: [66, 67],
                42: [68], 43: [69, 70], 44: [70, 71], 45: [72], 46: [73, 74], 47: [74, 75]}
    sources |= {48 + i: [76 + i] for i in range(20)}
    for face in faces:
        low, high = face.points.min(0), face.points.max(0)
        assert (low >= face.box[:2] - 20).all()
        assert (high <= face.box[2:] + 20).all()
        mapped = landmarks.wflw_to_300w(face.points)
        for i, source in sources.items():
            near = face.points[source]
            assert (mapped[i] >= near.min(0) - 1e-9).all(), i
            assert (mapped[i] <= near.max(0) + 1e-9).all(), i
        # Order and side: the points of each contour run in the direction of the mean face.
        matrix, *_ = numpy.linalg.lstsq(numpy.c_[mapped, numpy.ones(68)], mean, rcond=None)
        upright = numpy.c_[mapped, numpy.ones(68)] @ matrix
        for stroke in ([0, 4, 8, 12, 16], [17, 21, 22, 26], [27, 30, 33], [36, 39, 42, 45],
                       [31, 33, 35], [48, 51, 54], [57, 48], [60, 64], [37, 41], [44, 46]):
            steps = numpy.diff(upright[stroke], axis=0), numpy.diff(mean[stroke], axis=0)
            assert ((steps[0] * steps[1]).sum(1) > 0).all(), stroke
        right, left = (upright[SCHEMES["300W"].regions[f"{side} eye"], 0] for side in
                       ("right", "left"))
        assert right.max() < left.min()
