"""The reader of own data: .pts files and CSV files."""
import numpy
import pytest
from helpers.reader_files import image, pts, reasons, write

from utils.data.readers import custom
from utils.errors import UserError
from utils.landmarks import schemes as landmarks

THREE = landmarks.Scheme("three", numpy.array([1, 0, 2]), numpy.zeros((3, 2)), None, {})
HEADER = "image,x1,y1,x2,y2,x3,y3"


def test_custom_folder(tmp_path):
    points = numpy.array([[1, 2], [3, 4], [5, 6.5]])
    for name in ("a.jpg", "sub/a.png", "sub/Test/b.jpg", "val/a.jpg", "valid/a.jpg",
                 "bad.jpg", "alone.jpg"):
        photo = image(tmp_path / name)
        write(photo.with_suffix(".pts"), pts(points))
    write(tmp_path / "bad.pts", pts(points[:2]))
    (tmp_path / "alone.pts").rename(tmp_path / "lonely.PTS")
    problems = []
    faces = custom.read(tmp_path, problems, THREE)
    assert [(f.name, f.lists, f.group) for f in faces] == [
        ("a", ("train",), "a"), ("sub_a", ("train",), "sub/a"),
        ("sub_Test_b", ("test",), "sub/Test/b"), ("val_a", ("val",), "val/a"),
        ("valid_a", ("val",), "valid/a")]
    assert all(numpy.allclose(f.points, points) for f in faces)
    assert set(reasons(problems)) == {"bad.pts", "alone.jpg", "lonely.PTS"}
    assert "2 points found, 3 expected" in reasons(problems)["bad.pts"]


def test_custom_csv(tmp_path):
    for name in ("a.jpg", "p/b.png"):
        image(tmp_path / name)
    path = write(tmp_path / "faces.csv", (
        "\ufeffsplit, image,x1,y1,x2,y2,x3,y3,x_min,y_min,x_max,y_max\r\n"
        "train,a.jpg,1,2,3,4,5,6,,,,\r\n\r\n"
        "val,./p/b.png,1,2,3,4,5,6.5,0,0,9,9\r\n"
        ',"a.jpg", 7,8 ,9,10,11,12,,,,\r\n'))
    for source in (path, tmp_path):
        problems = []
        faces = custom.read(source, problems, THREE)
        assert problems == []
        assert [(f.name, f.lists, f.group) for f in faces] == [
            ("a-1", ("train",), "a.jpg"), ("p_b-1", ("val",), "p/b.png"),
            ("a-2", ("train",), "a.jpg")]
        assert faces[0].box is None
        assert faces[1].box.tolist() == [0, 0, 9, 9]
        assert faces[1].points.tolist() == [[1, 2], [3, 4], [5, 6.5]]
        assert all(f.photo.is_file() for f in faces)


@pytest.mark.parametrize(("line", "reason"), [
    ("a.jpg,1,2,3,4,5", "7 fields expected, 6 found"),
    ("a.jpg,1,2,3,4,5,6,7", "7 fields expected, 8 found"),
    ("a.jpg,1,2,3,4,5,inf", "'inf' is no finite number"),
    ("a.jpg,1,2,3,4,5,six", "'six' is no number"),
    (",1,2,3,4,5,6", "no image named"),
    ("b.jpg,1,2,3,4,5,6", "no image"),
    ('"a"jpg,1,2,3,4,5,6', "expected after"),
    ('"a.jpg,1,2,3,4,5,6', "unexpected end"),
    ("x" * 200000, "field larger"),
    ("a\0.jpg,1,2,3,4,5,6", "")])
def test_custom_csv_names_the_bad_line(tmp_path, line, reason):
    image(tmp_path / "a.jpg")
    good = "a.jpg,1,2,3,4,5,6"
    path = write(tmp_path / "faces.csv", f"{HEADER}\n{good}\n{line}\n{good}")
    problems = []
    assert len(custom.read(path, problems, THREE)) == 2
    (where, text), = problems
    assert where == path
    assert text.startswith("line 3: ")
    assert reason in text


def test_custom_csv_folders_give_the_list_without_a_split_column(tmp_path):
    names = ["train/a.jpg", "test/a.jpg", "b.jpg", "val/c.jpg"]
    for name in names:
        image(tmp_path / name)
    lines = [f"{name},1,2,3,4,5,6" for name in names]
    path = write(tmp_path / "faces.csv", "\n".join([HEADER, *lines]))
    assert [face.lists for face in custom.read(path, [], THREE)] == [
        ("train",), ("test",), ("train",), ("val",)]
    path = write(tmp_path / "split.csv", f"{HEADER},split\ntest/a.jpg,1,2,3,4,5,6,train")
    assert [face.lists for face in custom.read(path, [], THREE)] == [("train",)]


def test_custom_csv_bad_split_and_box(tmp_path):
    image(tmp_path / "a.jpg")
    path = write(tmp_path / "faces.csv", "\n".join([
        HEADER + ",split,x_min,y_min,x_max,y_max", "a.jpg,1,2,3,4,5,6,dev,,,,",
        "a.jpg,1,2,3,4,5,6,test,0,0,,", "a.jpg,1,2,3,4,5,6,test,9,0,1,1",
        "a.jpg,1,2,3,4,5,6,test,0,0,1,1"]))
    problems = []
    assert len(custom.read(path, problems, THREE)) == 1
    assert [reason.split(":")[0] for _, reason in problems] == ["line 2", "line 3", "line 4"]
    assert "found 'dev'" in problems[0][1]
    assert "x_min" in problems[2][1]


@pytest.mark.parametrize(("content", "reason"), [
    (b"", "no column image"),
    (b"image,x1,y1,x2,y2\na.jpg,1,2,3,4\n", "no column x3.*3 points of three"),
    (b"image;x1;y1;x2;y2\n", "no column x3"),
    (HEADER.encode() + b",x4,y4\n", "unknown column 'x4'"),
    (HEADER.encode() + b",x1\n", "column 'x1' is there twice"),
    (HEADER.encode() + b",x_min\n", "needs all of x_min"),
    (HEADER.encode() + b"\n\xff\xfe\n", "UTF-8"),
    (bytes(range(256)), "UTF-8"),
    ('"open' + HEADER, "CSV")])
def test_custom_csv_with_a_wrong_header(tmp_path, content, reason):
    path = write(tmp_path / "faces.csv", content)
    with pytest.raises(UserError, match=f"faces.csv: .*{reason}") as caught:
        custom.read(path, [], THREE)
    assert "\n" not in str(caught.value)


def test_custom_errors_name_what_is_missing(tmp_path):
    with pytest.raises(UserError, match="needs a landmark scheme"):
        custom.read(tmp_path, [])
    with pytest.raises(UserError, match="no .pts and no .csv"):
        custom.read(tmp_path, [], THREE)
    write(tmp_path / "a.csv", HEADER)
    write(tmp_path / "b.csv", HEADER)
    with pytest.raises(UserError, match="a.csv, b.csv; give the path"):
        custom.read(tmp_path, [], THREE)
    (tmp_path / "b.csv").unlink()
    write(tmp_path / "sub" / "a.pts", "")
    with pytest.raises(UserError, match="a.csv and .pts files; give the path"):
        custom.read(tmp_path, [], THREE)


@pytest.mark.parametrize("left_out", ["-1,-1", "0,0", "nan,NaN", ",", "nan,5"])
def test_unlabelled_points_are_nan(tmp_path, left_out):
    image(tmp_path / "a.jpg")
    path = write(tmp_path / "faces.csv", f"image,x1,y1,x2,y2,x3,y3\na.jpg,1,2,{left_out},5,6\n")
    problems = []
    face, = custom.read(path, problems, THREE)
    assert not problems
    assert numpy.isnan(face.points[1]).all()
    assert face.points[[0, 2]].tolist() == [[1, 2], [5, 6]]


def test_missing_points_of_a_pts_file(tmp_path):
    image(tmp_path / "a.jpg")
    # In the file: 10 20, 0 0, 30 40.
    write(tmp_path / "a.pts", pts([[9, 19], [-1, -1], [29, 39]]))
    problems = []
    face, = custom.read(tmp_path, problems, THREE)
    assert numpy.isnan(face.points[1]).all()
    assert face.points[[0, 2]].tolist() == [[9, 19], [29, 39]]


@pytest.mark.parametrize("content", [
    HEADER.replace(",", ";") + "\na.jpg;1,5;2;3;4;5;6\n",
    HEADER.replace(",", "\t") + "\r\na.jpg\t1,5\t2\t3\t4\t5\t6\r\n",
    "\ufeffa.jpg;1.5;2;3;4;5;6", "a.jpg,1.5,2,3,4,5,6\n"])
def test_csv_variants_of_spreadsheets(tmp_path, content):
    image(tmp_path / "a.jpg")
    path = write(tmp_path / "faces.csv", content)
    for one_based in (False, True):
        problems = []
        face, = custom.read(path, problems, THREE, one_based)
        assert not problems
        assert (face.points + one_based).tolist() == [[1.5, 2], [3, 4], [5, 6]]


def test_short_row_of_a_csv_without_header_has_its_number(tmp_path):
    image(tmp_path / "a.jpg")
    path = write(tmp_path / "faces.csv", "a.jpg;1;2;3;4;5;6\na.jpg;1;2;3;4;5\n")
    problems = []
    assert len(custom.read(path, problems, THREE)) == 1
    assert problems == [(path, "line 2: 7 fields expected, 6 found")]
