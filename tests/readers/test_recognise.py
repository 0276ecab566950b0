"""Which reader a folder is for."""
import pytest
from helpers.reader_files import write

from utils.data import readers
from utils.data.readers import aflw, cofw, custom, lapa, w300, wflw
from utils.errors import UserError
from utils.landmarks.schemes import SCHEMES


def test_every_reader_has_the_interface():
    assert list(readers.READERS) == ["300W", "WFLW", "COFW", "AFLW", "LaPa", "custom",
                                      "annotations", "samples"]
    for name, reader in readers.READERS.items():
        assert readers.get(name) is readers.get(name.lower()) is reader
        assert reader.SCHEME is None or reader.SCHEME in SCHEMES
        assert reader.LAYOUT
        assert isinstance(reader.EXPECTED, dict)


def test_get_offers_the_nearest():
    with pytest.raises(UserError, match="unknown layout 'WFWL'.*nearest: WFLW"):
        readers.get("WFWL")


@pytest.mark.parametrize(("file", "reader"), [
    ("ibug/a.pts", w300), ("helen/testset/a.pts", w300),
    ("WFLW_annotations/list_98pt_rect_attr_train_test/list_98pt_rect_attr_test.txt", wflw),
    ("COFW_test_color.mat", cofw), ("AFLWinfo_release.mat", aflw), ("a.csv", custom),
    ("x/y/a.pts", custom)])
def test_recognise(tmp_path, file, reader):
    write(tmp_path / "set" / file, "")
    assert readers.recognise(tmp_path / "set") is reader
    if reader is not custom:
        with pytest.raises(UserError, match=f"layout of {reader.NAME}; give .*set"):
            readers.recognise(tmp_path)


def test_recognise_lapa_and_a_csv_file(tmp_path):
    write(tmp_path / "val" / "images" / "a.jpg", "")
    write(tmp_path / "val" / "landmarks" / "a.txt", "")
    assert readers.recognise(tmp_path) is lapa
    assert readers.recognise(write(tmp_path / "a.csv", "")) is custom


def test_recognise_says_what_it_looked_for(tmp_path):
    write(tmp_path / "photos.zip", "")
    with pytest.raises(UserError) as caught:
        readers.recognise(tmp_path)
    text = str(caught.value)
    assert str(tmp_path) in text
    assert "photos.zip" in text
    for name, reader in readers.READERS.items():
        assert (f"{name}: {reader.LAYOUT}" in text) == (name != "samples")
    for path in (tmp_path / "absent", tmp_path / "photos.zip"):
        with pytest.raises(UserError, match=f"{path.name}: no such folder"):
            readers.recognise(path)


def test_recognise_two_layouts_in_one_folder(tmp_path):
    write(tmp_path / "afw" / "a.pts", "")
    write(tmp_path / "COFW_test_color.mat", "")
    with pytest.raises(UserError, match="holds 300W and COFW; name"):
        readers.recognise(tmp_path)
