"""Faces with closed and open eyes: the photos, their labels, and the set they are added to."""
import csv
import shutil

import cv2
import numpy
import pytest
from helpers import painted_faces

from utils.args import load_args
from utils.data import eye_states, pseudo_labels
from utils.data.dataset import PreparedSet
from utils.data.generator import DataGenerator
from utils.errors import UserError
from utils.landmarks import eyelids
from utils.landmarks.schemes import SCHEMES
from utils.training import trainer


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """closed/ and open/ with painted faces, a photo without a face, a broken photo and a text."""
    folder = tmp_path_factory.mktemp("photos") / "lids"
    for state in eye_states.STATES:
        (folder / state).mkdir(parents=True)
    for i, name in enumerate(("closed/a.png", "closed/b b.png", "open/c.png", "open/none.png")):
        image = painted_faces.background(i)
        if "none" not in name:
            # The larger of the two faces is labelled.
            image = painted_faces.paint(image, (3 + i, 150, 120, 90), (12, 280, 60, 40))
        assert cv2.imwrite(str(folder / name), image[..., ::-1])
    (folder / "closed" / "broken.jpg").write_bytes(b"no image")
    (folder / "closed" / "notes.txt").write_text("no photo")
    return folder


class Consistent(painted_faces.Painted):
    """A teacher that predicts mirrored landmarks in a mirrored photo."""
    path, doubtful = "teacher.pt", None

    def __init__(self, path=None):
        super().__init__()
        shape = self.shape
        self.shape = (shape + shape[self.scheme.flip] * (-1, 1) + (1, 0)) / 2


@pytest.fixture
def painted(monkeypatch):
    monkeypatch.setattr(pseudo_labels.predictors, "Predictor", Consistent)
    monkeypatch.setattr(pseudo_labels, "get_detector", lambda name: painted_faces.detector())


@pytest.fixture(scope="module")
def labelled(drawn_set, tmp_path_factory):
    """A copy of the drawn set, to which faces are added."""
    return shutil.copytree(drawn_set, tmp_path_factory.mktemp("sets") / "faces-64")


def test_the_faces_are_added_to_the_training_list(photos, labelled, painted, capsys, weights):
    before = PreparedSet(labelled)
    output = DataGenerator(photos, labelled=labelled, teacher="teacher.pt").run()
    assert output == labelled.with_name("faces+lids-64")
    assert "2 faces with closed eyes, each listed 2 times, and 1 with open eyes added; 2 left out" \
        in capsys.readouterr().out
    problems = (output / "problems.txt").read_text()
    assert "broken.jpg: it cannot be read" in problems
    assert "none.png: no face was found" in problems
    assert "notes" not in problems
    joined = PreparedSet(output)
    added = joined.lists["train"].points[len(before.lists["train"]):]
    assert len(added) == 2 * pseudo_labels.REPEAT + 1
    ratio = numpy.array([eyelids.aspect_ratios(face, SCHEMES["300W"]) for face in added]).mean(1)
    assert (ratio[:-1] < 0.06).all()
    assert ratio[-1] > 0.2
    # The nominal crop is around the larger face by the set's crop rule, and the image shows it.
    low, high = added[-1].min(0), added[-1].max(0)
    assert (high - low).max() == pytest.approx(1 / before.crop["scale"], abs=0.01)
    crop = cv2.imread(str(output / "images" / "eyes_open_c.jpg"))
    assert crop[len(crop) // 2, len(crop) // 2, 0] > 200
    assert [len(joined.lists[name]) for name in ("val", "test")] == [
        len(before.lists[name]) for name in ("val", "test")]
    with open(output / "sources.csv", newline="", encoding="utf-8") as file:
        rows = [row for row in csv.reader(file) if row[2] == "eyes"]
    assert len(rows) == 3
    assert rows[0][1].endswith("a.png")
    # The set can be trained on.
    folder = trainer.train(load_args({
        "data_dir": str(output), "exp": "joined", "backbone": "mobilenetv3_small_050",
        "input_size": 32, "epochs": 1, "batch_size": 8, "effective_batch": 8, "workers": 0,
        "device": "cpu", "shut": 0.5, "eye_weight": 3.0}))
    assert (folder / "best.pt").is_file()


def test_a_face_whose_mirrored_landmarks_differ_is_left_out(photos, labelled, painted,
                                                                   monkeypatch, tmp_path):
    def inconsistent(self, images):
        points, confidence = painted_faces.Painted.__call__(self, images)
        return points + (0.2, 0), confidence  # To the right in both views.

    monkeypatch.setattr(Consistent, "__call__", inconsistent)
    with pytest.raises(UserError, match="no face could be labelled"):
        pseudo_labels.prepare(photos, labelled, ["teacher.pt"], output_dir=tmp_path / "out")
    assert (tmp_path / "out" / "problems.txt").read_text().count("predictions disagree") == 3


def test_a_second_run_replaces_the_output_not_the_labelled_set(photos, labelled, painted, tmp_path):
    output = tmp_path / "out"
    for _ in range(2):
        pseudo_labels.prepare(photos, labelled, ["teacher.pt"], output_dir=output)
    assert (output / "train.txt").read_text().count("eyes_closed_a") == pseudo_labels.REPEAT
    assert "eyes_" not in (labelled / "train.txt").read_text()
    with pytest.raises(UserError, match="is the set itself"):
        pseudo_labels.prepare(photos, labelled, ["teacher.pt"], output_dir=labelled)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match="exists and is no prepared set"):
        pseudo_labels.prepare(photos, labelled, ["teacher.pt"], output_dir=tmp_path / "mine")


def test_names_choose_photos(photos, tmp_path):
    assert [(path.name, closed) for path, closed in eye_states.list_photos(photos)] == [
        ("a.png", True), ("b b.png", True), ("broken.jpg", True), ("c.png", False),
        ("none.png", False)]
    names = tmp_path / "names.txt"
    names.write_text("closed/a.png train\n\nopen/c.png train\nopen/none.png final\n")
    found = eye_states.list_photos(photos, f"{names}:train")
    assert [path.name for path, _ in found] == ["a.png", "c.png"]
    both = eye_states.list_photos(photos, f"{names}:train,final")
    assert both == eye_states.list_photos(photos, names)
    assert len(both) == 3
    for text, part, message in (
            ("closed/a.png x y\n", "", "names.txt:1: expected closed/NAME"),
            ("a.png\n", "", "names.txt:1: expected closed/NAME"),
            ("closed/a.png one\n", ":two", "has no part two; there is one"),
            ("closed/a.png one\n", ":one,two", "has no part two; there is one"),
            ("closed/a.png one\n", ":one", "no photo in open/ is named"),
            ("closed/a.png\nopen/gone.png\n", "", "gone.png: no such photo")):
        names.write_text(text)
        with pytest.raises(UserError, match=message):
            eye_states.list_photos(photos, f"{names}{part}")
    with pytest.raises(UserError, match="cannot be read"):
        eye_states.list_photos(photos, tmp_path / "none.txt")


def test_wrong_arguments_are_reported(photos, labelled, painted, tmp_path, monkeypatch):
    (tmp_path / "closed").mkdir()
    with pytest.raises(UserError, match="has no folder open"):
        eye_states.list_photos(tmp_path)
    (tmp_path / "open").mkdir()
    with pytest.raises(UserError, match="no photo in closed/"):
        eye_states.list_photos(tmp_path)
    with pytest.raises(UserError, match="need labelled=SET"):
        DataGenerator(photos, teacher="teacher.pt")
    monkeypatch.setattr(pseudo_labels.predictors, "Predictor", lambda path: type("Other", (), {
        "scheme": SCHEMES["WFLW"], "path": path}))
    with pytest.raises(UserError, match="has the WFLW scheme, the set 300W"):
        pseudo_labels.prepare(photos, labelled, ["teacher.pt"])
