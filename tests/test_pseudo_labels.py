"""Pseudo-labels of teachers: which faces are added to a set, and their landmarks."""
import cv2
import numpy
import pytest
from helpers import painted_faces

from utils.data import pseudo_labels
from utils.data.dataset import PreparedSet
from utils.data.generator import DataGenerator, main
from utils.errors import UserError
from utils.landmarks import crop
from utils.landmarks.schemes import SCHEMES


class Teacher(painted_faces.Painted):
    """A model whose landmarks are int(path) / 100 of the face too far right, mirrored or not."""

    def __init__(self, path):
        super().__init__()
        self.path = path
        shape = self.shape
        self.shape = (shape + shape[self.scheme.flip] * (-1, 1) + (1, 0)) / 2
        self.shift = int(path) / 100

    def __call__(self, images):
        points, confidence = super().__call__(images)
        return points + numpy.float32((self.shift, 0)), confidence


@pytest.fixture(autouse=True)
def painted(monkeypatch):
    monkeypatch.setattr(pseudo_labels.predictors, "Predictor", Teacher)
    monkeypatch.setattr(pseudo_labels, "get_detector", lambda name: painted_faces.detector())


@pytest.fixture
def photos(tmp_path):
    """Three photos: two of one name in two folders, with two faces and one; one without a face."""
    folder = tmp_path / "people"
    for i, (name, faces) in enumerate((("a.png", [(3, 150, 120, 90), (12, 280, 60, 40)]),
                                       ("more/a.png", [(5, 100, 100, 80)]), ("none.png", []))):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        image = painted_faces.paint(painted_faces.background(i), *faces)
        assert cv2.imwrite(str(folder / name), image[..., ::-1])
    return folder


def added(labelled, output):
    """Image names, points and boxes of the faces that were added to the training list."""
    count = len(PreparedSet(labelled).lists["train"])
    faces = PreparedSet(output).lists["train"]
    return [path.name for path in faces.images[count:]], faces.points[count:], faces.boxes[count:]


def test_every_face_of_every_photo_is_added(photos, drawn_set, tmp_path, capsys):
    output = DataGenerator(photos, labelled=drawn_set, teacher="0",
                           output_dir=tmp_path / "out").run()
    assert "3 faces added; 1 left out" in capsys.readouterr().out
    assert "none.png: no face was found" in (output / "problems.txt").read_text()
    names, points, boxes = added(drawn_set, output)
    assert sorted(names) == ["people_a.jpg", "people_a_2.jpg", "people_a_3.jpg"]
    # Each box is where the face was painted, and the landmarks fill it.
    middles = (boxes[:, :2] + boxes[:, 2:]) / 2
    assert sorted(map(tuple, middles.round(-1).tolist())) == [(100, 100), (150, 120), (280, 60)]
    scale = PreparedSet(output).crop["scale"]
    assert numpy.allclose((points.max(1) - points.min(1)).max(1), 1 / scale, atol=0.02)


def test_landmarks_are_the_mean_of_the_teachers(photos, drawn_set, tmp_path):
    found = {}
    for teachers in ("0", "4"), ("0",):
        main([str(photos), "--labelled", str(drawn_set), "--output-dir", str(tmp_path / "out"),
              "--teacher", *teachers])
        _, points, boxes = added(drawn_set, tmp_path / "out")
        found[teachers] = crop.to_photo(points, boxes)
    # An error to the right in the photo and in its mirror image cancels in the mean.
    assert numpy.allclose(found["0", "4"], found["0",], atol=0.6)


def test_faces_on_which_teachers_differ_are_left_out(photos, drawn_set, tmp_path):
    main([str(photos), "--labelled", str(drawn_set), "--output-dir", str(tmp_path / "few"),
          "--teacher", "0", "-3"])
    assert len(added(drawn_set, tmp_path / "few")[0]) == 3
    with pytest.raises(UserError, match="no face could be labelled .*NME of [0-9]+ %"):
        main([str(photos), "--labelled", str(drawn_set), "--output-dir", str(tmp_path / "none"),
              "--teacher", "0", "25"])


def test_labelling_the_same_photos_twice_keeps_the_first_crops(photos, drawn_set, tmp_path):
    people = photos.rename(tmp_path / "People")  # Names differ by more than letter case.
    first = DataGenerator(people, labelled=drawn_set, teacher="0", output_dir=tmp_path / "1").run()
    before = {path.name: path.read_bytes() for path in (first / "images").iterdir()}
    (people / "none.png").unlink()
    image = painted_faces.paint(painted_faces.background(9), (9, 150, 120, 90), (2, 280, 60, 40))
    assert cv2.imwrite(str(people / "a.png"), image[..., ::-1])
    second = DataGenerator(people, labelled=first, teacher="0", output_dir=tmp_path / "2").run()
    assert {path.name: path.read_bytes() for path in (first / "images").iterdir()} == before
    for name, expected in (("1", 3), ("2", 6)):
        images = [path.name for path in PreparedSet(tmp_path / name).lists["train"].images
                  if path.name.startswith("People")]
        assert len(images) == len(set(images)) == expected
    assert len(added(first, second)[0]) == 3


@pytest.mark.parametrize("stopped", ["write_crop", "_link", "_label"])
def test_an_interrupted_set_has_no_list_and_is_replaced(photos, drawn_set, tmp_path,
                                                                  monkeypatch, stopped):
    def label():
        return DataGenerator(photos, labelled=drawn_set, teacher="0",
                             output_dir=tmp_path / "out").run()

    (tmp_path / "out").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(pseudo_labels, stopped,
                      lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            label()
    with pytest.raises(UserError, match="no prepared set"):
        PreparedSet(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(pseudo_labels, "_label", lambda *_: ["no face was found"])
        with pytest.raises(UserError, match="no face could be labelled"):
            label()
    with pytest.raises(UserError, match="no prepared set"):
        PreparedSet(tmp_path / "out")
    joined = PreparedSet(label())
    assert len(added(drawn_set, joined.folder)[0]) == 3
    for name, faces in PreparedSet(drawn_set).lists.items():
        assert len(joined.lists[name]) == len(faces) + 3 * (name == "train")


def test_wrong_arguments_are_reported(photos, drawn_set, tmp_path, monkeypatch):
    def label(folder=photos, **options):
        DataGenerator(folder, labelled=drawn_set, teacher=["0"], output_dir=tmp_path / "out",
                      **options).run()

    with pytest.raises(UserError, match="the detector finds the faces"):
        label(boxes="boxes.csv")
    with pytest.raises(UserError, match="names choose photos of closed/ and open/"):
        label(names="list.txt")
    with pytest.raises(UserError, match="gone: no such folder of photos"):
        label(tmp_path / "gone")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: holds no photo"):
        label(tmp_path / "empty")
    monkeypatch.setattr(pseudo_labels.predictors, "Predictor", lambda path: type("Other", (), {
        "scheme": SCHEMES["WFLW"], "path": path}))
    with pytest.raises(UserError, match="has the WFLW scheme, the set 300W"):
        label()
