"""The readers' protocol, and which reader a folder gets."""
import pathlib

import pytest
from helpers.reader_files import write

from utils.data import readers
from utils.data.readers import aflw, annotations, cofw, custom, lapa, w300, wflw
from utils.errors import UserError
from utils.landmarks import crop
from utils.landmarks.schemes import SCHEMES

HELPERS = {"__init__", "face", "pts", "names", "annotation_tools", "cvat", "foreign"}


def test_every_module_is_registered():
    modules = {path.stem for path in pathlib.Path(readers.__file__).parent.glob("*.py")}
    registered = [reader.__name__.rpartition(".")[2] for reader in readers.READERS.values()]
    assert sorted(registered) == sorted(modules - HELPERS)
    assert list(readers.READERS)[:5] == ["300W", "WFLW", "COFW", "AFLW", "LaPa"]
    assert {"custom", "annotations", "samples"} <= readers.READERS.keys()


@pytest.mark.parametrize("name", readers.READERS)
def test_every_reader_follows_the_protocol(tmp_path, name):
    reader = readers.READERS[name]
    assert readers.get(name) is readers.get(name.lower()) is reader
    assert reader.SCHEME is None or reader.SCHEME in SCHEMES
    assert reader.LAYOUT
    assert isinstance(reader.EXPECTED, dict)
    assert reader.matches(tmp_path) is False
    assert callable(reader.read)
    if hasattr(reader, "CROP"):
        assert reader.CROP.keys() == crop.PUBLISHED_CROP.keys()
        assert reader.CROP["rule"] in crop.RULES


def test_published_sets_own_data_and_crops_of_published_nmes():
    assert readers.PUBLISHED[:5] == (w300, wflw, cofw, aflw, lapa)
    assert readers.OWN_DATA[:2] == (custom, annotations)
    assert wflw.CROP == {"rule": "box", "scale": 1.2}
    assert cofw.CROP == aflw.CROP == {"rule": "box", "scale": 1.0}
    assert not hasattr(w300, "CROP")
    assert not hasattr(lapa, "CROP")


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


def test_recognise_lists_the_known_layouts(tmp_path):
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
