"""Text files as Excel, PowerShell and other programs write them."""
import codecs

import numpy
import pytest
from helpers.own_sets import FACE, FIVE, prepare

from utils import args, experiment
from utils.data import eye_states, sheet
from utils.data.dataset import PreparedSet, read_mean_face
from utils.data.face_list import read_list
from utils.data.readers.pts import read_lines, read_pts
from utils.data.unlabelled import read_boxes
from utils.errors import UserError
from utils.files import read_table, read_text, split_numbers
from utils.landmarks.schemes import get_scheme

# Ways to write the same text: encodings with their marks, and line ends.
ENCODINGS = {"plain": lambda text: text.encode(),
             "UTF-8 mark": lambda text: codecs.BOM_UTF8 + text.encode(),
             "UTF-16": lambda text: text.encode("utf-16"),
             "UTF-16 big": lambda text: codecs.BOM_UTF16_BE + text.encode("utf-16-be"),
             "Windows": lambda text: codecs.BOM_UTF8 + text.replace("\n", "\r\n").encode(),
             "old Mac": lambda text: text.replace("\n", "\r").encode()}


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_text_file_may_be_written_in_any_way(tmp_path, encoding):
    def write(name, text):
        (tmp_path / name).write_bytes(ENCODINGS[encoding](text))
        return tmp_path / name

    assert read_text(write("a.txt", "ä\nb\n")) == "ä\nb\n"
    boxes = write("boxes.csv", "image,x_min,y_min,x_max,y_max\nä b.jpg,1,2,3,4\n")
    (name, box), = read_boxes(boxes)
    assert (name, box.tolist()) == ("ä b.jpg", [1, 2, 3, 4])
    names, points = read_list(write("train.txt", "images/a b.jpg 0.5 0.25 nan nan\n\n"))
    numpy.testing.assert_equal(points, [[[0.5, 0.25], [numpy.nan] * 2]])
    assert names == ["images/a b.jpg"]
    assert read_mean_face(write("mean.txt", "0.1 0.2\n0.3 0.4\n")).shape == (2, 2)
    assert get_scheme(str(write("five.yaml", FIVE))).names[0] == "right eye"
    assert args.load_args(path=write("recipe.yaml", "epochs: 7\nlr: 0.5\n")).epochs == 7
    pts = write("a.pts", "version: 1\n{\n2 3\n4 5\n}\n")
    assert read_pts(pts, 2).tolist() == [[1, 2], [3, 4]]
    assert read_lines(write("list.txt", "ä 1\n\nb\n")) == [(1, "ä 1"), (3, "b")]
    rows = "exp,data,nme\na,b,3.1\n"
    write("results.csv", rows)
    assert experiment.read_records(tmp_path)[0]["nme"] == "3.1"


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_prepared_set_that_was_edited_and_saved(tmp_path, encoding):
    folder = prepare(tmp_path / "own", FIVE, [("train", FACE + i) for i in range(3)])
    before = PreparedSet(folder)
    for name in ("train.txt", "val.txt", "indices.txt", "sources.csv", "set.yaml"):
        (folder / name).write_bytes(ENCODINGS[encoding]((folder / name).read_text()))
    after = PreparedSet(folder)
    assert after.lists["train"].digest() == before.lists["train"].digest()
    assert after.lists["train"].photos == before.lists["train"].photos
    assert len(sheet.prepared(folder)) == 2


@pytest.mark.parametrize(("line", "fields"), [
    ("a b.jpg 1.5 -2", ["a", "b.jpg", "1.5", "-2"]), ("a b.jpg\t1,5\t-2", ["a b.jpg", "1.5", "-2"]),
    ("a,b.jpg;1,5;2", ["a,b.jpg", "1.5", "2"]), ("a;b.jpg, 1.5,2", ["a;b.jpg", "1.5", "2"]),
    ("a,b.jpg 1 2", ["a,b.jpg", "1", "2"]), ("1,5 2,5", ["1,5", "2,5"]), ("", []),
    ("a.jpg;nan;nan", ["a.jpg", "nan", "nan"])])
def test_lines_of_numbers(line, fields):
    assert split_numbers(line) == fields


@pytest.mark.parametrize("separator", [",", ";", "\t", " "])
def test_tables_and_lists_by_any_separator(tmp_path, separator):
    path = tmp_path / "boxes.csv"
    rows = (("image", "x_min", "y_min", "x_max", "y_max"), ("a b.jpg", "1.5", "2", "3", "4"))
    path.write_text("".join(separator.join(row) + "\n" for row in rows))
    assert [(name, box.tolist()) for name, box in read_boxes(path)] == [("a b.jpg", [1.5, 2, 3, 4])]
    path.write_text(separator.join(rows[1]) + "\n")
    assert read_list(path)[0] == ["a b.jpg"]
    path.write_text("{\n" + separator.join(("2.5", "3")) + "\n}\n")
    assert read_pts(path, 1).tolist() == [[1.5, 2]]
    path.write_text("")
    assert read_table(path) == ([], [])


def test_decimal_commas_and_short_rows(tmp_path):
    path = tmp_path / "boxes.csv"
    path.write_text("image;x_min;y_min;x_max;y_max\n\na,b.jpg;1,5;2;3;4\n")
    assert read_boxes(path)[0][1].tolist() == [1.5, 2, 3, 4]
    path.write_text("image;x_min;y_min;x_max;y_max\n\na.jpg;1,5;2;3\n")
    with pytest.raises(UserError, match="boxes.csv:3: expected an image.*found a.jpg,1.5,2,3,None"):
        read_boxes(path)


@pytest.mark.parametrize("separator", [" ", "\t", ";", ","])
def test_lists_of_names_with_parts(tmp_path, separator):
    name = "a.jpg" if separator == "," else "a,b.jpg"
    for state in eye_states.STATES:
        (tmp_path / state).mkdir()
        (tmp_path / state / name).touch()
    # The list's own name has a colon.
    names = tmp_path / "at 10:30.txt"
    names.write_bytes(codecs.BOM_UTF8 + "".join(
        f"{state}/{name}{separator}train\r\n" for state in eye_states.STATES).encode())
    for chosen in (names, f"{names}:train"):
        assert len(eye_states.list_photos(tmp_path, chosen)) == 2
    with pytest.raises(UserError, match="has no part final; there is train"):
        eye_states.list_photos(tmp_path, f"{names}:final")
