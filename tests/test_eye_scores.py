"""Scores of closed and open eyes, the thresholds fitted to them, and the files that hold them."""
import json
import pathlib
import shutil

import cv2
import numpy
import pytest
from helpers import painted_faces

import main
from utils import args, checkpoint
from utils.deploy.export import export_weights
from utils.detection.refine import refine
from utils.drowsiness import eyes
from utils.errors import UserError
from utils.evaluation import eyes as scores
from utils.landmarks import eyelids
from utils.landmarks.schemes import SCHEMES
from utils.predictor import Predictor
from utils.tracking import tracker
from utils.training import lid_fit

SCHEME = SCHEMES["300W"]


def reading(closed, ratio, judged=True, called=None):
    """An EyeReading of a face with this eye aspect ratio; None: it was not found."""
    if ratio is None:
        return scores.EyeReading(None, closed, None, None, None)
    called = (ratio < 0.2 if called is None else called) if judged else None
    return scores.EyeReading(None, closed, None, numpy.full(68, 0.4),
                          eyes.Eyes((0.5, 0.5), called, (ratio - 0.01, ratio + 0.01)))


def test_separation_counts_pairs_and_ties():
    rng = numpy.random.default_rng(0)
    shut, opened = rng.integers(0, 8, 37) / 10, rng.integers(3, 12, 200) / 10
    found = scores.separation(shut, opened)
    pairs = (shut[:, None] < opened).mean() + (shut[:, None] == opened).mean() / 2
    assert found["auc"] == pytest.approx(pairs)
    # At 1 %, two of 200 open eyes may be false alarms, so the threshold is the third lowest.
    assert found["recall_at_1"] == pytest.approx(100 * (shut < numpy.sort(opened)[2]).mean())
    assert found["recall_at_0.1"] == pytest.approx(100 * (shut < opened.min()).mean())
    assert scores.separation(numpy.array([1.0]), numpy.array([2.0]))["auc"] == 1
    assert numpy.isnan(scores.separation(numpy.array([]), numpy.array([2.0]))["auc"])


def test_a_face_that_is_not_found_or_not_judged_counts_as_open():
    readings = [reading(True, 0.1), reading(True, 0.1), reading(True, None),
                reading(True, 0.1, judged=False), reading(False, 0.3), reading(False, 0.15),
                reading(False, None), reading(False, 0.3)]
    found = scores.score(readings)
    assert found["closed"] == {"faces": 4, "not_found": 1, "not_judged": 1, "called_down": 0}
    assert found["open"] == {"faces": 4, "not_found": 1, "not_judged": 0, "called_down": 0}
    assert found["recall"] == 50
    assert found["false_alarms"] == 25
    assert found["auc"] == 1
    assert found["eye_auc"] == 1


def test_faces_that_look_down_have_a_row_of_their_own(capsys):
    looking = eyes.Eyes((0.6, 0.6), False, (0.02, 0.02), (0.9, 0.9), True)
    shut = eyes.Eyes((0.0, 0.0), True, (0.02, 0.02), (0.3, 0.3), False)
    readings = [reading(True, 0.1), reading(False, 0.3)]
    before = scores.score(readings)
    assert before["down"]["called_down"] is None
    scores.print_numbers(before)
    assert "down    false alarms 0.0 % of open, 0.0 % of closed" in capsys.readouterr().out
    for name, state in (("a", looking), ("b", looking), ("c", shut), ("d", None)):
        readings.append(scores.EyeReading(pathlib.Path("down") / name, False, None, None, state))
    found = scores.score(readings)
    assert found["down"] == {"faces": 4, "not_found": 1, "not_judged": 0, "called_down": 50,
                             "called_closed": 25}
    # Nothing else changes: they are neither open nor closed.
    assert {name: value for name, value in found.items() if name != "down"} == {
        name: value for name, value in before.items() if name != "down"}
    readings.append(scores.EyeReading(pathlib.Path("open/e"), False, None, None, looking))
    assert scores.score(readings)["open"]["called_down"] == 50
    scores.print_numbers(found)
    assert "down    4 faces, 1 not found, 0 not judged" in (text := capsys.readouterr().out)
    assert "down    recall 50.0 %, called closed 25.0 %, false alarms 0.0 % of open" in text


def test_fitted_thresholds_separate_the_states_and_avoid_false_alarms():
    rng = numpy.random.default_rng(1)
    shut, opened = rng.normal(0.08, 0.02, 200), rng.normal(0.3, 0.03, 300)
    readings = [reading(True, r) for r in shut] + [reading(False, r) for r in opened]
    limits = lid_fit.fit_thresholds(readings, SCHEME)
    assert limits.shut == pytest.approx(numpy.median(shut), abs=1e-3)
    assert limits.open == pytest.approx(numpy.median(opened), abs=1e-3)
    assert limits.min_confidence == pytest.approx(0.2)
    border = limits.shut + limits.closed_below * (limits.open - limits.shut)
    # Three times as far from the open side as from the closed one.
    assert border == pytest.approx(shut.max() + (opened.min() - shut.max()) / 4, abs=1e-3)
    # Where the states overlap, ten false alarms cost more than seven missed eyes.
    readings += [reading(False, 0.12) for _ in range(10)] + [reading(True, 0.14) for _ in range(7)]
    border = (limits := lid_fit.fit_thresholds(readings, SCHEME)).shut + limits.closed_below * (
        limits.open - limits.shut)
    assert border < 0.12


def test_the_face_threshold_is_fitted_to_faces_covered_below_the_eyes(tmp_path):
    def seen(image):
        # A covered row has one colour; any other row shows face and background.
        return (image.std(1).max(1) > 5).mean()

    class Seeing(painted_faces.Painted):
        shares = []

        def __call__(self, images):
            self.shares.append(seen(images[0]))
            points, confidence = super().__call__(images)
            return points, confidence * self.shares[-1]

    predictor, readings = Seeing(), [reading(False, None)]
    for i in range(20):
        image = painted_faces.paint(painted_faces.background(), (1, 140 + i, 110, 80))
        path = tmp_path / f"{i:02d}.png"
        cv2.imwrite(str(path), image[..., ::-1])
        points, confidence, _ = refine(predictor, image, [[100 + i, 70, 180 + i, 150]])
        eye = eyes.read_eyes(points[0], confidence[0], SCHEME, eyelids.EyeThresholds())
        readings.append(scores.EyeReading(path, False, points[0], confidence[0], eye))
    assert min(predictor.shares) > 0.95
    predictor.shares.clear()
    found = lid_fit.fit_face_confidence(predictor, readings)
    # The eyes, above the middle of a crop, stay visible; the mouth does not.
    assert all(0.3 < share < 0.55 for share in predictor.shares)
    assert found == pytest.approx(0.9 * numpy.percentile(predictor.shares, 5))


def test_too_few_faces_and_a_model_that_cannot_separate_are_errors():
    many = [reading(True, 0.1)] * 20 + [reading(False, 0.3)] * 20
    with pytest.raises(UserError, match="20 faces with eyes open, 19 were found"):
        lid_fit.fit_thresholds(many[:-1], SCHEME)
    with pytest.raises(UserError, match="20 faces with eyes closed, 19 were found"):
        lid_fit.fit_thresholds([reading(True, None), *many[1:]], SCHEME)
    with pytest.raises(UserError, match="predicts closed eyes as open as open ones"):
        lid_fit.fit_thresholds([reading(closed, 0.3 - 0.1 * (not closed))
                                for closed in [True, False] * 20], SCHEME)


@pytest.fixture
def shipped(tiny_weights, weights):
    """mine.pt in weights/ and its ONNX file beside it."""
    path = weights / "mine.pt"
    shutil.copy(tiny_weights, path)
    export_weights(path)
    return path


@pytest.mark.parametrize("suffix", [".pt", ".onnx"])
def test_thresholds_are_stored_with_the_weights(shipped, suffix):
    file = shipped.with_suffix(suffix)
    assert Predictor(file).eyes == eyelids.EyeThresholds()
    limits = eyelids.EyeThresholds(0.125, 0.25, 0.5, 0.0625)
    lid_fit.store(limits, None, file)
    assert Predictor(file).eyes == limits
    assert [path.name for path in shipped.parent.glob("*.tmp")] == []


def test_a_later_export_has_the_thresholds(shipped):
    limits, before = eyelids.EyeThresholds(0.125, 0.25, 0.5, 0.0625), checkpoint.read(shipped)
    lid_fit.store(limits, None, shipped)
    after = checkpoint.read(shipped)
    assert {name for name in after if name not in before or name == "eyes"} == {"eyes"}
    assert set(before) <= set(after)
    export_weights(shipped)
    assert Predictor(shipped.with_suffix(".onnx")).eyes == limits


def test_the_command(shipped, tmp_path, monkeypatch, capsys, no_patches):
    """The stand-in network predicts closed eyes for painted face 1 and open ones for face 5."""
    folder = tmp_path / "faces"
    for state, number in (("closed", 1), ("open", 5)):
        (folder / state).mkdir(parents=True)
        for i in range(21):
            image = painted_faces.background(i)
            if i:
                image = painted_faces.paint(image, (number, 150 + i, 110, 80 + i))
            cv2.imwrite(str(folder / state / f"{i:02d}.png"), image[..., ::-1])

    class Seeing(painted_faces.Painted):
        def __init__(self, path, device, lids=True):
            super().__init__()
            self.eyes, self.model = Predictor(path).eyes, None

        def __call__(self, images):
            points, confidence = super().__call__(images)
            for i, image in enumerate(images):
                if image[len(image) // 2, len(image) // 2, 0] < 70:
                    points[i] = eyelids.close(points[i], self.scheme)
            return points, confidence

    monkeypatch.setattr(scores, "Predictor", Seeing)
    monkeypatch.setattr(scores, "get_detector", lambda name: painted_faces.detector())
    # To the face score, painted squares are none.
    monkeypatch.setattr(tracker, "face_score", lambda predictor, image, points, confidence:
                        numpy.ones(len(points)))
    report = tmp_path / "report.json"
    main.dispatch(args.parse(["--fit-eyes", "--test-eyes", "--exp", str(shipped), "--data-dir",
                              str(folder), "--report", str(report)]))
    text, numbers = capsys.readouterr().out, json.loads(report.read_text())
    assert numbers["recall"] == pytest.approx(100 * 20 / 21)
    assert numbers["false_alarms"] == 0
    assert numbers["closed"]["not_found"] == numbers["open"]["not_found"] == 1
    assert numbers["auc"] == 1
    assert "recall 95.2 %, false alarms 0.0 %" in text
    assert Predictor(shipped).eyes != eyelids.EyeThresholds()
    drawn = {path.name for path in shipped.parent.glob("mine-eyes-*.png")}
    assert drawn == {"mine-eyes-roc.png", "mine-eyes-worst.png"}
    assert cv2.imread(str(shipped.with_name("mine-eyes-worst.png"))).shape[:2] == (800, 1600)


def test_a_face_that_fills_the_picture_is_detected_with_a_border():
    seen = []

    class Shy:
        """Finds a face of 60 px only with a border around it, with more confidence."""

        def __call__(self, image):
            seen.append(image.shape)
            height, width = image.shape[:2]
            if width == 100:
                return self.first
            return [[50, 55, 140, 150, 0.9]]

    shy = Shy()
    shy.first = []
    detector = painted_faces.Detector("shy", shy, (0, 0, 1)).with_retry()
    image = numpy.zeros((80, 100, 3), numpy.uint8)
    assert detector(image).tolist() == [[0, 5, 90, 100, 0.9]]
    assert seen == [(80, 100, 3), (180, 200, 3)]
    shy.first = [[10, 10, 95, 75, 0.5]]  # Large and uncertain: a second pass.
    assert detector(image)[0, 4] == 0.9
    shy.first = [[10, 10, 95, 75, 0.95]]  # More confident in the first pass.
    assert detector(image)[0, :2].tolist() == [10, 10]
    shy.first, seen[:] = [[10, 10, 60, 60, 0.5]], []  # Small: one pass.
    assert detector(image)[0, 4] == 0.5
    assert len(seen) == 1
