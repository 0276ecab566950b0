"""Patches of eyes, the network that classifies them, and what it changes in the eyes' state."""
import cv2
import numpy
import pytest
import torch

from nets.eye_patch import EyePatchNet
from utils.args import ROOT
from utils.detection.detector import get_detector
from utils.drowsiness import eye_patch, eyes
from utils.errors import UserError
from utils.evaluation import eyes as scores
from utils.landmarks import eyelids
from utils.landmarks.schemes import SCHEMES, get_scheme
from utils.predictor import Predictor
from utils.training import eye_patch_data, eye_patch_fit

SCHEME = SCHEMES["300W"]
THRESHOLDS = eyelids.EyeThresholds(shut=0.0, open=0.3, closed_below=0.2)


def drawn(state, width=40.0, angle=0.0, size=(240, 320), gap=None):
    """Draw a face of two eyes: an image, and its landmarks (68, 2) with the lids at `gap` widths.

    An open eye has a large white opening with an iris in its middle, one that looks down a narrow
    opening with the iris, a shut one a line.
    """
    image = numpy.full((*size, 3), 170, numpy.uint8)
    turn = numpy.array([[numpy.cos(angle), numpy.sin(angle)],
                        [-numpy.sin(angle), numpy.cos(angle)]])
    middle = numpy.array([size[1] / 2, size[0] / 2])
    shape = SCHEME.mean_face[:68].astype(float)
    opening = {"open": 0.3, "down": 0.13, "shut": 0.0}[state]
    for contour in SCHEME.eyes:
        shape[contour] = _lids(shape[contour], opening if gap is None else gap)
    scale = width / numpy.linalg.norm(shape[36] - shape[39])
    points = (shape - shape[sum(SCHEME.eyes, [])].mean(0)) * scale @ turn + middle
    for contour in SCHEME.eyes:
        centre = points[[contour[0], contour[3]]].mean(0)
        axes = (round(width / 2), max(round(width * opening / 1.6), 0))
        degrees = float(numpy.degrees(angle))
        place = tuple(int(v) for v in centre.round())
        if state != "shut":
            cv2.ellipse(image, place, axes, degrees, 0, 360, (250, 250, 250), -1)
            cv2.ellipse(image, place, (round(width / 6), axes[1]), degrees, 0, 360, (40, 30, 30),
                        -1)
        cv2.ellipse(image, place, (axes[0], max(axes[1], 1)), degrees, 0, 360, (60, 40, 40),
                    max(round(width / 16), 1))
    return cv2.GaussianBlur(image, (0, 0), width / 40), points


def _lids(contour, opening):
    first, last = contour[0], contour[3]
    across = numpy.array([-(last - first)[1], (last - first)[0]])
    across = across if across[1] > 0 else -across
    out = numpy.array(contour)
    for index, (share, sign) in enumerate(((0, 0), (1 / 3, -1), (2 / 3, -1), (1, 0), (2 / 3, 1),
                                           (1 / 3, 1))):
        out[index] = first + share * (last - first) + sign * across * opening / 2
    return out


def test_patches_are_upright_and_alike_at_any_size_and_angle():
    plain = eye_patch.cut_eyes(*drawn("open"), SCHEME)
    assert plain.shape == (2, 32, 48)
    assert plain.dtype == numpy.float32
    # The left eye is mirrored, so that both look alike.
    assert abs(plain[0] - plain[1]).mean() < 8
    for width, angle in ((40, 0.5), (40, -2.0), (90, 0.2), (30, 0.0)):
        image, points = drawn("open", width, angle, (600, 800))
        other = eye_patch.cut_eyes(image, points, SCHEME)
        assert abs(other - plain).mean() < 12
        assert numpy.corrcoef(other.ravel(), plain.ravel())[0, 1] > 0.85


def test_patches_at_the_border_of_an_image_are_filled():
    image, points = drawn("open")
    for shift in ((-150, 0), (0, -120), (170, 130), (4000, 0)):
        patches = eye_patch.cut_eyes(image, points + shift, SCHEME)
        assert patches.shape == (2, 32, 48)
        assert numpy.isfinite(patches).all()
    # Landmarks in one place, as a network gives for noise.
    assert eye_patch.cut_eyes(image, numpy.full((68, 2), 50.0), SCHEME).shape == (2, 32, 48)


def test_brightness_and_contrast_do_not_matter():
    patches = eye_patch.cut_eyes(*drawn("open"), SCHEME)
    bright = eye_patch.standardise(patches)
    dark = eye_patch.standardise(patches * 0.5 + 80)
    assert abs(dark - bright).max() < 0.4
    assert numpy.corrcoef(dark.ravel(), bright.ravel())[0, 1] > 0.999
    assert eye_patch.standardise(numpy.full((2, 32, 48), 9.0)).max() == 0


def test_the_onnx_file_gives_the_logits_of_the_network(tmp_path):
    torch.manual_seed(0)
    network = EyePatchNet(extra=5)
    for norm in network.norms:
        torch.nn.init.uniform_(norm.running_mean, -0.1, 0.1)
        torch.nn.init.uniform_(norm.running_var, 0.3, 1.2)
        torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    path = tmp_path / "eye.onnx"
    path.write_bytes(network.eval().to_onnx())
    patches = eye_patch.cut_eyes(*drawn("down"), SCHEME)
    with torch.no_grad():
        expected, extra = network(torch.from_numpy(eye_patch.standardise(patches)))
    assert extra.shape == (2, 5)
    assert eye_patch.EyePatchModel(path)(patches) == pytest.approx(expected.numpy(), abs=1e-4)


@pytest.mark.parametrize("content", [b"", b"no model", None])
def test_a_damaged_file_is_one_line(tmp_path, content):
    path = tmp_path / "eye.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match="eye.onnx: (no such file|not the weights of the eye)"):
        eye_patch.EyePatchModel(path)


def test_the_shipped_file_is_small():
    assert eye_patch.WEIGHTS.stat().st_size < 300e3
    assert eye_patch.shipped()(numpy.zeros((4, 32, 48), numpy.float32)).shape == (4, 3)


@pytest.fixture
def says(monkeypatch):
    """Let the patches show logits of open, down and shut: one row, or one for each eye."""
    def set_logits(*rows):
        rows = numpy.array(rows * 2 if len(rows) == 1 else rows, numpy.float32)
        monkeypatch.setattr(eye_patch, "shipped", lambda: lambda patches: rows.copy())
    return set_logits


def read(state, gap=None, scheme=SCHEME, **where):
    image, points = drawn(state, gap=gap)
    points = points if scheme is SCHEME else points[sum(SCHEME.eyes, [])]
    return eyes.read_eyes(points, numpy.full(len(points), 0.8), scheme, THRESHOLDS,
                          **{"image": image} | where)


def test_without_an_image_nothing_but_the_landmarks_counts():
    found = read("shut", image=None)
    assert (found.closed, found.down, found.looks_down) == (True, (None, None), None)
    assert found.openness == (0, 0)


def test_lids_that_landmarks_call_shut_are_not_where_the_patches_show_an_iris(says):
    says((-1.0, 2.0, -1.0))
    found = read("down", gap=0.0)
    assert (found.closed, found.looks_down) == (False, True)
    assert found.openness == (eyes.DOWN_OPENNESS, eyes.DOWN_OPENNESS)
    assert found.down[0] > 0.9
    # Narrowed by a laugh: neither closed nor looking down.
    says((2.0, -1.0, -1.0))
    found = read("open", gap=0.0)
    assert (found.closed, found.looks_down) == (False, False)
    assert min(found.openness) > THRESHOLDS.closed_below
    says((-3.0, -1.0, 3.0))
    found = read("shut", gap=0.0)
    assert (found.closed, found.looks_down, found.openness) == (True, False, (0, 0))


def test_make_up_that_hides_closed_lids_from_the_landmarks(says):
    says((-2.0, -0.5, 1.5))
    assert read("shut", gap=0.17).closed is True
    # Landmarks of wide open eyes are believed.
    says((-4.0, -4.0, 4.0))
    assert read("open", gap=0.3).closed is False


def test_one_shut_eye_is_a_wink(says):
    says((-3.0, -1.0, 3.0), (3.0, -1.0, -3.0))
    found = read("open", gap=0.15)
    assert found.closed is False
    assert found.openness[0] == pytest.approx(0)
    assert found.openness[1] == pytest.approx(0.5)


def test_a_head_pitched_down_is_evidence_of_looking_down(says, monkeypatch):
    says((-3.0, 0.0, 0.5))
    for pitch, closed in ((0.0, True), (-9.0, True), (-40.0, False), (float("nan"), True)):
        monkeypatch.setattr(eyes.pose, "head_pose", lambda *_, p=pitch: (0.0, p, 0.0))
        found = read("shut", gap=0.0)
        assert found.closed is closed
        assert found.looks_down is not closed


def test_twelve_eye_points_have_no_pitch(says):
    says((-3.0, 0.0, 2.0))
    found = read("shut", gap=0.0, scheme=get_scheme("eyes"))
    assert found.closed is True
    assert found.looks_down is False


def test_an_eye_that_cannot_be_judged_has_no_probability(says):
    says((-1.0, 2.0, -1.0))
    image, points = drawn("down")
    found = read("down", shape=(image.shape[0], int(points[45, 0]) - 3, 3))
    assert found.openness[1] is None
    assert found.down[1] is None
    assert found.looks_down is True
    assert read("down", shape=(3, 3)).looks_down is None


def test_held_out_photos_of_people_who_look_down(shared):
    """Ten faces of the part final that look down, and ten with shut eyes."""
    model = Predictor(ROOT / "weights/tiny.int8.onnx", threads=1)
    detector = get_detector(str(shared / "models/yunet_n_640_640.onnx"))
    listed = [line.split() for line in (ROOT / "tools/splits/down.txt").read_text().splitlines()]
    down = [shared / "data" / name for name, state, part in
            (row for row in listed if len(row) == 3)
            if name.startswith("faces-wild") and (state, part) == ("down", "final")][:10]
    shut = [shared / "data/eyes" / line.split()[0]
            for line in (ROOT / "tools/splits/eyes.txt").read_text().splitlines()
            if line.startswith("closed") and line.endswith(" final")][1:11]
    assert len(down) == len(shut) == 10
    readings = scores.predict_photos(model, detector, [(path, False) for path in down]
                                     + [(path, True) for path in shut])
    states = [r.eyes and (r.eyes.closed, r.eyes.looks_down) for r in readings]
    # Landmarks alone call two of the first ten closed, and none looking down.
    assert sum(state == (False, True) for state in states[:10]) >= 5
    assert sum(state == (True, False) for state in states[:10]) <= 2
    assert sum(state == (True, False) for state in states[10:]) >= 9


def faces(tmp_path, count=24):
    """Photos of drawn faces in the folders that list_faces reads, with both lists."""
    rng, lines, eye_lines = numpy.random.default_rng(0), [], []
    for folder in (*eye_patch_data.OPEN_FOLDERS, "eyes/closed", "eyes/open", "lfw"):
        (tmp_path / folder).mkdir(parents=True)

    def write(name, state):
        image, points = drawn(state, rng.uniform(25, 60), rng.uniform(-0.2, 0.2))
        cv2.imwrite(str(tmp_path / name), image[..., ::-1])
        text = "\n".join(f"{x + 1} {y + 1}" for x, y in points)
        (tmp_path / name).with_suffix(".pts").write_text(f"version: 1\n{{\n{text}\n}}\n")

    for i in range(count):
        state = eye_patch_data.STATES[i % 3]
        write(f"faces-wild/{i:02d}.png", state)
        lines.append(f"faces-wild/{i:02d}.png {state} {('train', 'choose')[i % 4 == 3]}")
        write(f"eyes/closed/{i:02d}.png", "shut")
        eye_lines.append(f"closed/{i:02d}.png {('train', 'final')[i % 2]}")
    write("300W/afw/a.png", "open")
    write("lfw/b.png", "open")
    lines.append("lfw/b.png unclear train")
    eye_lines.append("open/b.png lfw")
    (tmp_path / "down.txt").write_text("# a comment\n" + "\n".join(lines))
    (tmp_path / "eyes.txt").write_text("\n".join(eye_lines))
    return eye_patch_data.list_faces(tmp_path, tmp_path / "eyes.txt", tmp_path / "down.txt")


def test_faces_are_listed_once_with_the_label_that_was_given_by_eye(tmp_path):
    found = {face.name: face for face in faces(tmp_path)}
    assert found["faces-wild/01.png"].state == "down"
    assert found["faces-wild/03.png"].part == "choose"
    assert found["300W/afw/a.png"].state == "open"
    assert not found["300W/afw/a.png"].listed
    assert "lfw/b.png" not in found  # It is unclear.
    assert "eyes/closed/01.png" not in found  # Of the part final.
    assert found["eyes/closed/00.png"].state == "shut"


@pytest.mark.parametrize(("text", "message"), [
    ("faces-wild/01.png down\n", "down.txt:1: expected 3 words"),
    ("faces-wild/99.png down train\n", "99.png: no such photo")])
def test_wrong_lists_are_one_line(tmp_path, text, message):
    faces(tmp_path)
    (tmp_path / "down.txt").write_text(text)
    with pytest.raises(UserError, match=message):
        eye_patch_data.list_faces(tmp_path, tmp_path / "eyes.txt", tmp_path / "down.txt")


def test_a_few_epochs_separate_drawn_eyes(tmp_path, monkeypatch):
    monkeypatch.setattr(eye_patch_fit, "DRAWN", (100, 60, 100, 100))
    monkeypatch.setattr(eye_patch_fit, "COMPONENTS", 4)
    listed = faces(tmp_path)
    landmarks = eye_patch_data.find_landmarks(listed, None, _NoDetector())
    assert len(landmarks) == len(listed)
    rng = numpy.random.default_rng(0)
    features = {face.name: rng.normal(eye_patch_data.STATES.index(face.state), 1, (2, 8))
                for face in listed}

    class Teacher:
        scheme = SCHEME

    eye_rows = eye_patch_fit.collect(listed, landmarks, Teacher, features)
    network = eye_patch_fit.train(eye_rows.part("train"), epochs=5)
    found = eye_patch_fit.score(network, eye_rows.part("choose"))
    assert found["accuracy_open"] == 100
    assert found["down_called_shut"] == 0


class _NoDetector:
    """Faces with labels need none."""

    def with_retry(self):
        return self
