""".pts files, whole and damaged, and file names of crops."""
import re

import numpy
import pytest
from helpers.reader_files import DAMAGED, face_of, pts, write

from utils.data.readers.pts import read_pts, unique_name


def test_pts_counts_from_one(tmp_path):
    points = face_of("300W")
    assert numpy.allclose(read_pts(write(tmp_path / "a.pts", pts(points)), 68), points)


@pytest.mark.parametrize("change", [
    lambda text: text.replace("\n", "\r\n"),
    lambda text: text.replace("\n", "\r"),
    lambda text: text.replace("\n", "\n\n  \n"),
    lambda text: text.replace("version", "\xe9"),
    lambda text: text.replace("n_points: 68", "n_points:   68  "),
    lambda text: text.replace(" ", "\t").replace("n_points:\t", "n_points: "),
    lambda text: text[text.index("{"):],
    lambda text: text.rstrip("\n") + "\nanything"])
def test_pts_as_other_tools_write_them(tmp_path, change):
    points = face_of("300W")
    path = write(tmp_path / "a.pts", change(pts(points)).encode("latin-1"))
    assert numpy.allclose(read_pts(path, 68), points)


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_pts(tmp_path, name):
    content, reason = DAMAGED[name]
    with pytest.raises(ValueError, match=re.escape(reason)) as caught:
        read_pts(write(tmp_path / "a.pts", content), 68)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 120


def test_unique_names_have_plain_characters_and_differ():
    taken = set()
    names = [unique_name(text, taken) for text in ("a/b", "a_b", "A b", "image_092 _01", "a_b")]
    assert names == ["a_b", "a_b_2", "A_b_3", "image_092__01", "a_b_4"]
