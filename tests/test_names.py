"""File names and paths: links, long names, equal stems, names that are not valid UTF-8."""
import csv
import os
import pathlib
import subprocess
import sys

import cv2
import numpy
import pytest
from helpers import painted_faces
from helpers.own_sets import FACE, FIVE, write

import demo
from utils import draw
from utils.args import ROOT
from utils.data.dataset import PreparedSet
from utils.data.generator import DataGenerator
from utils.data.readers.pts import unique_name, walk
from utils.errors import UserError
from utils.tracking import output_names, outputs

NO_UTF8 = os.fsdecode(b"f\xe4ce \xff")
PTS = "version: 1\n{\n" + "".join(f"{x + 1} {y + 1}\n" for x, y in FACE) + "}\n"


def photo(path, value=90):
    """Write an image of a single grey value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cv2.imencode(path.suffix, numpy.full((90, 90, 3), value, numpy.uint8))[1])
    return path


def greys(folder):
    """Return the grey value in the middle of each crop of a prepared set, sorted."""
    images = [path for faces in PreparedSet(folder).lists.values() for path in faces.images]
    assert all(len(os.fsencode(path.name)) <= 255 for path in images)
    return sorted(int(cv2.imread(str(path))[51, 51, 0]) for path in images)


def prepare(source, tmp_path, **options):
    (tmp_path / "five.yaml").write_text(FIVE)
    return DataGenerator(source, 64, tmp_path / "set", workers=1,
                         scheme=str(tmp_path / "five.yaml"), **options).run()


def test_linked_folders_are_followed_and_circular_links_are_not(tmp_path):
    (tmp_path / "z").mkdir()
    photo(tmp_path / "elsewhere" / "deep" / "b.png")
    photo(tmp_path / "z" / "own" / "a.png")
    links = {"0-twice": tmp_path / "z" / "own", "linked": tmp_path / "elsewhere",
             "round": tmp_path / "z", "nowhere": tmp_path / "lost"}
    for name, target in links.items():
        (tmp_path / "z" / name).symlink_to(target)
    (tmp_path / "elsewhere" / "deep" / "up").symlink_to(tmp_path / "elsewhere")
    found = [str(path.relative_to(tmp_path / "z")) for path in walk(tmp_path / "z")]
    # A file inside the folder is listed under its real path, even if a link to it sorts first.
    assert found == ["linked/deep/b.png", "own/a.png"]


def test_photos_behind_a_link_are_prepared(tmp_path, monkeypatch):
    photo(tmp_path / "elsewhere" / "b.png").with_suffix(".pts").write_text(PTS)
    photo(tmp_path / "own" / "a.png", 40).with_suffix(".pts").write_text(PTS)
    (tmp_path / "own" / "link").symlink_to(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    assert greys(prepare(pathlib.Path("own"), tmp_path)) == [40, 90]


def test_no_face_is_lost_because_of_its_file_name(tmp_path, capsys):
    long = "ä" * 120
    names = ["a.jpg", "a.png", "A.bmp", "x/a.png", "x_a.png", f"{long}1.png", f"{long}2.png",
             f"{NO_UTF8}.png"]
    source, _ = write(tmp_path / "own", FIVE, [("train", FACE)] * len(names), names[:7] + ["u.png"])
    for number, name in enumerate(names):
        photo(tmp_path / "own" / name, 30 * number)
    photo(tmp_path / "own" / "u.png", 30 * 7)
    found = greys(prepare(source, tmp_path))
    assert all(abs(a - 30 * i) <= 1 for i, a in enumerate(found))
    assert len(found) == 8
    assert "8 faces in" in capsys.readouterr().out


def test_photos_with_names_that_are_not_utf8(tmp_path, capsys):
    path = photo(tmp_path / "own" / f"{NO_UTF8}.png")
    path.with_suffix(".pts").write_text(PTS)
    (tmp_path / "own" / f"alone{NO_UTF8}.pts").write_text(PTS)
    prepared = PreparedSet(prepare(tmp_path / "own", tmp_path))
    assert prepared.lists["train"].photos == [path]
    assert path.is_file()


def test_names_that_are_not_utf8_are_printed_and_drawn():
    done = subprocess.run([sys.executable, "-c", "from utils.errors import run\n"
                           "run(lambda: print('\\udcff.png'))"], cwd=ROOT, capture_output=True,
                          env=os.environ | {"PYTHONIOENCODING": "utf-8"})
    assert (done.returncode, done.stdout) == (0, b"\\udcff.png\n"), done.stderr
    image = numpy.zeros((90, 90, 3), numpy.uint8)
    assert draw.sheet([image], 1, 90, [NO_UTF8]).any()
    assert draw.banner(image, NO_UTF8, (0, 0), 20, (255, 255, 255)).any()


def test_long_names_of_crops_are_cut_and_still_differ():
    taken = set()
    names = [unique_name(text, taken) for text in ("ä" * 200, "ä" * 200, "ä" * 199 + "b")]
    assert len(set(names)) == 3
    assert all(len(name.encode()) <= 110 for name in names)


def test_output_pictures_of_a_folder_have_different_names():
    paths = [pathlib.Path(name) for name in ("a.jpg", "a.png", "a.jpg.png", "b.jpg", "B.png",
                                             "c.jpg", "d" * 251 + ".jpg", "d" * 251 + ".png")]
    names = output_names.picture_names(paths)
    assert [names[path] for path in paths[:6]] == ["a.jpg.png", "a.png.png", "a.jpg_2.png",
                                                   "b.jpg.png", "B.png.png", "c.png"]
    assert len({name.lower() for name in names.values()}) == 8
    assert max(len(name) for name in names.values()) <= 255


@pytest.fixture
def painted(monkeypatch, tmp_path):
    """The demo without a window, with a predictor and a detector for painted faces."""
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "get_predictor", lambda *_: painted_faces.Painted())
    monkeypatch.setattr(demo, "get_detector", lambda name: painted_faces.detector())


def test_the_demo_draws_every_image_of_a_folder(painted, capsys):
    face = painted_faces.paint(painted_faces.background(), (1, 80, 120, 60))
    for name in ("a.jpg", "a.png", "x" * 250 + ".png", f"{NO_UTF8}.png"):
        path = pathlib.Path("in") / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(cv2.imencode(path.suffix, face[..., ::-1])[1])
    demo.main(["--source", "in", "--output", "out", "--landmarks", "faces.csv"])
    assert len(list(pathlib.Path("out").iterdir())) == 4
    with open("faces.csv", encoding="utf-8") as file:
        sources = {row["source"] for row in csv.DictReader(file)}
    assert {"a.jpg", "a.png", "f\\udce4ce \\udcff.png"} <= sources
    # A single image gets an output file named after it.
    demo.main(["--source", f"in/{'x' * 250}.png"])
    assert len(list(pathlib.Path().glob("demo_xxx*.png"))) == 1


def test_videos_that_opencv_cannot_name(painted):
    pathlib.Path(f"{NO_UTF8}.mp4").write_bytes(b"none")
    with pytest.raises(UserError, match="the name is not UTF-8.*rename"):
        demo.main(["--source", f"{NO_UTF8}.mp4"])
    with pytest.raises(UserError, match="the name is not UTF-8"):
        outputs.VideoFile(f"{NO_UTF8}.mp4", 30)


def test_the_demo_names_the_package_for_heic(painted):
    pathlib.Path("a.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))
    with pytest.raises(UserError, match="a.heic: .*pip install -U pillow-heif"):
        demo.main(["--source", "a.heic"])
