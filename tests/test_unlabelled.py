"""Unlabelled sets: the BoxTransform, boxes from a table or a detector, wrong arguments."""
import csv
import shutil

import cv2
import numpy
import pytest
import yaml
from helpers import painted_faces

from utils.data import unlabelled
from utils.data.dataset import PreparedSet
from utils.data.generator import DataGenerator
from utils.errors import UserError
from utils.landmarks import crop
from utils.landmarks.schemes import SCHEMES

SQUARES = ((3, 90, 100, 80), (7, 230, 120, 100))


def _boxes(rng, count=200):
    corner = rng.uniform(0, 300, (count, 2))
    return numpy.concatenate([corner, corner + rng.uniform(30, 200, (count, 2))], 1)


def test_a_transform_is_recovered_despite_ten_percent_outliers():
    rng = numpy.random.default_rng(0)
    known = unlabelled.BoxTransform(numpy.array([0.02, 0.14]), numpy.array([1.1, 1.2]))
    boxes = _boxes(rng)
    nominal = known(boxes)
    nominal[:20] = _boxes(rng, 20)
    fitted = unlabelled.fit_transform(boxes, nominal)
    assert fitted.shift == pytest.approx(known.shift, abs=0.01)
    assert fitted.size == pytest.approx(known.size, abs=0.02)
    # By hand: side 40 = root of 20 x 80, centre (10, 40).
    assert known(numpy.array([0.0, 0, 20, 80])) == pytest.approx(
        [10 + 0.8 - 22, 40 + 5.6 - 24, 10 + 0.8 + 22, 40 + 5.6 + 24])


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Two photos with two painted faces each, one of them in a subfolder, and a broken photo."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "below").mkdir()
    for seed, name in enumerate(("a.png", "below/a.png")):
        image = painted_faces.paint(painted_faces.background(seed), *SQUARES)
        cv2.imwrite(str(folder / name), image[..., ::-1])
    (folder / "broken.jpg").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """A prepared set of painted squares whose landmarks fill the square of its face."""
    folder = tmp_path_factory.mktemp("labelled") / "squares"
    folder.mkdir()
    mean = SCHEMES["300W"].mean_face
    mean = (mean - mean.min(0)) / numpy.ptp(mean, 0)
    for i in range(6):
        face = (4 + i, 100 + 10 * i, 110, 60 + 8 * i)
        image = painted_faces.paint(painted_faces.background(9 + i), face)
        cv2.imwrite(str(folder / f"{i}.png"), image[..., ::-1])
        points = mean * face[3] + (face[1] - face[3] / 2, face[2] - face[3] / 2)
        rows = "\n".join(f"{x + 1} {y + 1}" for x, y in points)
        (folder / f"{i}.pts").write_text(f"version: 1\nn_points: 68\n{{\n{rows}\n}}\n")
    (folder / "afw").mkdir()
    for path in list(folder.glob("?.*")):
        path.rename(folder / "afw" / path.name)
    return PreparedSet(DataGenerator(folder, 64, layout="300W", workers=1).run())


def test_crops_of_detected_faces_are_like_those_of_labelled_faces(photos, labelled, tmp_path):
    output = unlabelled.prepare(photos, labelled, None, painted_faces.detector(), tmp_path / "set")
    faces = unlabelled.read(output, labelled)
    assert sorted(p.name for p in faces.images) == ["a.jpg", "a_2.jpg", "below_a.jpg",
                                                    "below_a_2.jpg"]
    assert faces.points.shape == (4, 68, 2)
    assert numpy.isnan(faces.points).all()
    with open(output / "sources.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for _, x, y, side in SQUARES:
        expected = crop.grow([x - side / 2 - 0.5, y - side / 2 - 0.5, x + side / 2 - 0.5,
                            y + side / 2 - 0.5], 1.2)
        nearest = min(numpy.abs(expected - [float(r[c]) for c in unlabelled.COLUMNS[1:]]).max()
                      for r in rows)
        assert nearest < 3
    # The square fills 1 / (1.2 * 1.6) of the stored crop's side.
    image = cv2.imread(str(faces.images[0]))[..., ::-1]
    assert image.shape == (102, 102, 3)
    red = ((image[..., 2] > 150) & (image[..., 1] < 90)).any(0).mean()
    assert red == pytest.approx(1 / 1.92, abs=0.04)


def test_boxes_of_another_source_give_the_same_crops(photos, labelled, tmp_path):
    boxes = [[name, x - side, y - side / 4, x + side / 2, y + side / 4]
             for name in ("a.png", "below/a.png") for _, x, y, side in SQUARES]
    boxes += [["broken.jpg", 0, 0, 50, 50], ["gone.jpg", 0, 0, 50, 50], ["a.png", 0, 0, 9, 9],
              ["a.png", -90, 0, 40, 50]]
    table = tmp_path / "boxes.csv"
    table.write_text("image,x_min,y_min,x_max,y_max\n"
                     + "".join(",".join(map(str, row)) + "\n" for row in boxes))
    output = unlabelled.prepare(photos, labelled, table, painted_faces.detector(), tmp_path / "set")
    with open(output / "sources.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4
    for row, (_, x, y, side) in zip(rows, SQUARES * 2):
        found = numpy.array([float(row[c]) for c in unlabelled.COLUMNS[1:]])
        expected = crop.grow([x - side / 2 - 0.5, y - side / 2 - 0.5, x + side / 2 - 0.5,
                            y + side / 2 - 0.5], 1.2)
        assert numpy.abs(found - expected).max() < 3
    problems = (output / "problems.txt").read_text()
    for reason in ("broken.jpg: it cannot be read", "gone.jpg: no such file", "9 x 9 pixels",
                   "31 % of it"):
        assert reason in problems


def test_real_faces_with_published_boxes(shared, tmp_path):
    source = tmp_path / "300W" / "afw"
    source.mkdir(parents=True)
    for path in sorted((shared / "data" / "300W" / "afw").iterdir())[:24]:
        shutil.copy(path, source)
    labelled = DataGenerator(tmp_path / "300W", 64, layout="300W", workers=1).run()
    lfw = shared / "data" / "unlabelled" / "lfw"
    lines = (lfw / "boxes.csv").read_text().splitlines()
    (tmp_path / "boxes.csv").write_text("\n".join([lines[0], *lines[1:3000:500]]) + "\n")
    detector = shared / "models" / "yunet_n_640_640.onnx"
    output = DataGenerator(lfw, labelled=labelled, boxes=tmp_path / "boxes.csv",
                           detector=detector, output_dir=tmp_path / "set").run()
    faces = unlabelled.read(output, PreparedSet(labelled))
    assert len(faces) == 6
    assert all(cv2.imread(str(image)).shape == (102, 102, 3) for image in faces.images)
    description = yaml.safe_load((output / "set.yaml").read_text())
    # All of 300W gives 0.00, 0.14 and 1.10; these are twelve photos of it.
    assert description["shift"] == pytest.approx([0, 0.14], abs=0.05)
    assert description["box_to_crop"] == pytest.approx([1.1, 1.1], abs=0.08)


@pytest.mark.parametrize(("text", "message"), [
    ("image,x,y\na.png,1,2\n", "no column x_min; expected image,x_min.*found 'image,x,y'"),
    ("", "no column image.*an empty file"),
    ("image,x_min,y_min,x_max,y_max\n", "no box"),
    ("image,x_min,y_min,x_max,y_max\na.png,5,5,nan,9\n", "boxes.csv:2: expected an image.*nan"),
    ("image,x_min,y_min,x_max,y_max\na.png,5,5,4,9\n", "boxes.csv:2: expected an image and a"),
    ("image,x_min,y_min,x_max,y_max\na.png,5\n", "boxes.csv:2: expected an image and a"),
    ("image,x_min,y_min,x_max,y_max\n,5,5,9,9\n", "boxes.csv:2: expected an image and a"),
])
def test_a_bad_table_of_boxes_is_named(tmp_path, text, message):
    (tmp_path / "boxes.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        unlabelled.read_boxes(tmp_path / "boxes.csv")


def test_an_interrupted_set_is_replaced(photos, labelled, tmp_path, monkeypatch):
    def prepare():
        return unlabelled.prepare(photos, labelled, None, painted_faces.detector(),
                                  tmp_path / "set")

    for stopped in ("_cut_all", "_write"):
        with monkeypatch.context() as patch:
            patch.setattr(unlabelled, stopped, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                prepare()
        with pytest.raises(UserError, match="damaged unlabelled set.*prepare it again"):
            unlabelled.read(tmp_path / "set", labelled)
        assert len(unlabelled.read(prepare(), labelled)) == 4


def test_wrong_arguments_are_reported(photos, labelled, drawn_set, tmp_path):
    detector = painted_faces.detector()
    with pytest.raises(UserError, match="no such folder"):
        unlabelled.prepare(tmp_path / "none", labelled, None, detector)
    with pytest.raises(UserError, match="painted found no face of the labelled photos"):
        unlabelled.fit_labelled(detector, PreparedSet(drawn_set))
    (tmp_path / "boxes.csv").write_text("image,x_min,y_min,x_max,y_max\na.png,0,0,30,30\n")
    with pytest.raises(UserError, match="do the boxes belong"):
        unlabelled.prepare(photos, labelled, tmp_path / "boxes.csv", detector)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="exists and is no unlabelled set"):
        unlabelled.prepare(photos, labelled, None, detector, tmp_path / "full")
    with pytest.raises(UserError, match="--gssl needs --unlabelled-dir.*--labelled"):
        unlabelled.read("none", labelled)
    with pytest.raises(UserError, match="no unlabelled set"):
        unlabelled.read(drawn_set, labelled)


def test_a_set_of_another_crop_is_refused(photos, labelled, tmp_path):
    output = unlabelled.prepare(photos, labelled, None, painted_faces.detector(), tmp_path / "set")
    text = (output / "set.yaml").read_text()
    (output / "set.yaml").write_text(text.replace("margin: 1.6", "margin: 1.5"))
    with pytest.raises(UserError, match="margin 1.5.*prepare it again"):
        unlabelled.read(output, labelled)
    (output / "set.yaml").write_text("size: 3\n")
    with pytest.raises(UserError, match="damaged unlabelled set"):
        unlabelled.read(output, labelled)
    (output / "set.yaml").write_text(text)
    with pytest.raises(UserError, match="unlabelled set.*--unlabelled-dir"):
        PreparedSet(output)
