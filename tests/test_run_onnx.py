"""examples/run_onnx.py: needs no module of the repository and gives the same landmarks."""
import pathlib
import re
import subprocess
import sys

import cv2
import matplotlib
import numpy
import onnx
import onnxruntime
import pytest

from examples import run_onnx
from utils import checkpoint
from utils.args import ROOT
from utils.deploy.export import export_onnx
from utils.deploy.raw import export_raw
from utils.detection import refine
from utils.detection.detector import get_detector
from utils.landmarks import crop
from utils.landmarks.schemes import SCHEMES
from utils.predictor import Predictor

WEIGHTS = ROOT / "weights/tiny.int8.onnx"
PORTRAIT = pathlib.Path(matplotlib.get_data_path(), "sample_data/grace_hopper.jpg")


def test_imports_nothing_of_the_repository():
    text = (ROOT / "examples/run_onnx.py").read_text()
    assert set(re.findall(r"^(?:import|from) (\w+)", text, re.M)) == {
        "argparse", "json", "pathlib", "sys", "cv2", "numpy", "onnxruntime"}


def find(session, image, square):
    """Landmarks (K, 2) and confidence (K,) from a square of find_faces."""
    crop, scheme, _ = run_onnx.read_metadata(session)
    return run_onnx.refine(session, image, square[:2], square[2] * crop["scale"], crop, scheme)


@pytest.fixture(scope="module", params=["fast", "eyes"])
def weights(request, tmp_path_factory):
    """A published .onnx, or one exported from the published .pt."""
    shipped = ROOT / f"weights/{request.param}.onnx"
    if shipped.is_file():
        return shipped
    return export_onnx(checkpoint.load_model(shipped.with_suffix(".pt")),
                       tmp_path_factory.mktemp("made") / shipped.name)


@pytest.mark.parametrize("detector", ["haar", "yunet"])
def test_landmarks_are_those_of_the_pipeline(detector, weights, request):
    if detector == "yunet":
        detector = str(request.getfixturevalue("shared") / "models/yunet_n_640_640.onnx")
    image = cv2.imread(str(PORTRAIT))
    ours, predictor = get_detector(detector), Predictor(weights)
    rgb = image[..., ::-1].copy()
    expected, _, boxes = refine.refine(predictor, rgb, ours.to_crop(ours(rgb)[:1], 1.2))
    session = onnxruntime.InferenceSession(str(weights), providers=["CPUExecutionProvider"])
    faces = run_onnx.find_faces(image, detector)
    assert len(faces) >= 1
    points, confidence = find(session, image, faces[0])
    # The detectors run at other sizes of the photo, so the crops differ a little.
    side = (boxes[0, 2:] - boxes[0, :2]).max()
    assert numpy.abs(points - expected[0]).mean() < 0.01 * side
    assert confidence.mean() > 0.4


@pytest.mark.parametrize(("scheme", "rule"), [
    ("300W", "square"), ("300W", "stretch"), ("300W", "box"), ("eyes", "square")])
def test_crops_are_placed_as_in_training(scheme, rule):
    scheme, described = SCHEMES[scheme], {"rule": rule, "scale": 1.2}
    points = numpy.random.default_rng(0).normal(scheme.mean_face, 0.05) * 90 + (30, 50)
    centre, size = run_onnx.place_crop(points, described, scheme.state())
    expected, = crop.face_boxes(points[None], described, scheme)
    assert numpy.concatenate([centre - size / 2, centre + size / 2]) == pytest.approx(expected)


def test_the_command(tmp_path):
    def run(*argv):
        return subprocess.run([sys.executable, "run_onnx.py", *map(str, argv)], text=True,
                              cwd=ROOT / "examples", capture_output=True)

    done = run(WEIGHTS, PORTRAIT, tmp_path / "out.png")
    assert done.returncode == 0, done.stderr
    assert "faces: " in done.stdout
    assert "confidence 0." in done.stdout
    before, after = cv2.imread(str(PORTRAIT)), cv2.imread(str(tmp_path / "out.png"))
    assert (before != after).any(-1).sum() > 68
    (tmp_path / "empty.jpg").touch()
    done = run(WEIGHTS, tmp_path / "empty.jpg", tmp_path / "no.png")
    assert done.returncode == 2
    assert "empty.jpg: is empty" in done.stderr
    done = run(WEIGHTS, PORTRAIT, tmp_path / "no.png", "--detector", WEIGHTS)
    assert done.returncode == 2
    assert "cannot use it as a YuNet" in done.stderr
    pixel = tmp_path / "pixel.png"
    cv2.imwrite(str(pixel), numpy.zeros((1, 1500, 3), numpy.uint8))
    done = run(WEIGHTS, pixel, tmp_path / "none.png")
    assert done.returncode == 0, done.stderr
    assert done.stdout == (f"0 faces: {tmp_path / 'none.png'} (the detector found none; YuNet "
                           f"finds more than Haar: --detector yunet.onnx)\n")


def foreign(path):
    """Write an .onnx of another project."""
    node = onnx.helper.make_node("Identity", ["a"], ["b"])
    values = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [1]) for n in "ab"]
    graph = onnx.helper.make_graph([node], "strange", values[:1], values[1:])
    onnx.save(onnx.helper.make_model(graph, ir_version=8, opset_imports=[
        onnx.helper.make_opsetid("", 18)]), path)


def described(path, **metadata):
    """Write a copy of the shipped .onnx with other metadata."""
    model = onnx.load(WEIGHTS)
    onnx.helper.set_model_props(model, {p.key: p.value for p in model.metadata_props} | metadata)
    onnx.save(model, path)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"
# By name of the file: how it is made, and what is printed about it.
WRONG = {
    "gone.onnx": (lambda path: None, "no such file"),
    "folder.onnx": (lambda path: path.mkdir(), "is a folder or a device"),
    "empty.onnx": (lambda path: path.touch(), "is empty"),
    "pointer.onnx": (lambda path: path.write_bytes(POINTER), "is a pointer of Git LFS; `git lfs"),
    "cut.onnx": (lambda path: path.write_bytes(WEIGHTS.read_bytes()[:9999]), "cannot load it: "),
    "text.onnx": (lambda path: path.write_text("hello"), "cannot load it: "),
    "net.pt": (lambda path: path.write_bytes(b"PK"), "is a checkpoint; main.py --export"),
    "foreign.onnx": (foreign, "is no .onnx of main.py --export"),
    "json.onnx": (lambda path: described(path, crop="{"), "its metadata is damaged"),
    "scheme.onnx": (lambda path: described(path, scheme="{}"), "its metadata is damaged"),
    "eyes.onnx": (lambda path: described(path, eyes="3"), "its metadata is damaged"),
    "gone.jpg": (lambda path: None, "no such file"),
    "pointer.jpg": (lambda path: path.write_bytes(POINTER), "is a pointer of Git LFS"),
    "text.jpg": (lambda path: path.write_text("hello"), "is no image that OpenCV can read"),
    "cut.png": (lambda path: path.write_bytes(b"\x89PNG\r\n"), "is no image that OpenCV can read"),
}


def fails(capfd, monkeypatch, *argv):
    """The only line that run_onnx prints to stderr, where it ends with exit code 2."""
    monkeypatch.setattr(sys, "argv", ["run_onnx.py", *map(str, argv)])
    with pytest.raises(SystemExit) as end:
        run_onnx.main()
    assert end.value.code == 2
    line, = capfd.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_file_is_one_line(name, tmp_path, monkeypatch, capfd):
    make, expected = WRONG[name]
    make(tmp_path / name)
    files = [tmp_path / name, PORTRAIT] if name.endswith((".onnx", ".pt")) else [
        WEIGHTS, tmp_path / name]
    line = fails(capfd, monkeypatch, *files, tmp_path / "out.png")
    assert line.startswith(f"error: {tmp_path / name}: ")
    assert expected in line
    assert not (tmp_path / "out.png").exists()


@pytest.mark.parametrize(("name", "expected"), [
    ("none/out.png", "cannot be written: No such file"), ("out.xyz", "give a .png or .jpg"),
    ("out", "give a .png or .jpg"), ("photo.jpg", "is the photo itself")])
def test_an_output_that_cannot_be_written(name, expected, tmp_path, monkeypatch, capfd):
    photo = tmp_path / "photo.jpg"
    photo.write_bytes(PORTRAIT.read_bytes())
    line = fails(capfd, monkeypatch, WEIGHTS, photo, tmp_path / name)
    assert line.startswith(f"error: {tmp_path / name}: ")
    assert expected in line
    assert photo.read_bytes() == PORTRAIT.read_bytes()


def test_a_wrong_detector_and_an_opencv_without_haar(tmp_path, monkeypatch, capfd):
    (tmp_path / "pointer.onnx").write_bytes(POINTER)
    out = tmp_path / "out.png"
    assert "is a pointer of Git LFS" in fails(capfd, monkeypatch, WEIGHTS, PORTRAIT, out,
                                              "--detector", tmp_path / "pointer.onnx")
    assert "cannot use it as a YuNet" in fails(capfd, monkeypatch, WEIGHTS, PORTRAIT, out,
                                               "--detector", WEIGHTS)
    monkeypatch.delattr(cv2, "CascadeClassifier")
    assert "has no Haar detector; pip install 'opencv-python<5'" in fails(
        capfd, monkeypatch, WEIGHTS, PORTRAIT, out)


def test_a_raw_onnx_is_refused(tmp_path, monkeypatch, capfd):
    raw = export_raw(checkpoint.load_model(ROOT / "weights/tiny.pt"), tmp_path / "t.raw.onnx", 17)
    assert not capfd.readouterr().err, "onnxsim's warnings look like a failure"
    assert "decode_maps.py" in fails(capfd, monkeypatch, raw, PORTRAIT, "out.png")


def test_a_large_face_is_reduced_by_averaging():
    session = onnxruntime.InferenceSession(str(WEIGHTS), providers=["CPUExecutionProvider"])
    image = cv2.imread(str(PORTRAIT))
    square, = run_onnx.find_faces(image)
    rng = numpy.random.default_rng(0)
    large = cv2.resize(image, None, fx=8, fy=8, interpolation=cv2.INTER_CUBIC)
    # Pixel noise, which averaging removes and interpolation between four pixels does not.
    noisy = cv2.add(large, rng.normal(0, 100, large.shape), dtype=cv2.CV_8U)
    points, _ = find(session, image, square)
    enlarged, _ = find(session, noisy, (square + (0.5, 0.5, 0)) * 8 - (0.5, 0.5, 0))
    assert numpy.abs((enlarged + 0.5) / 8 - 0.5 - points).mean() < 0.005 * square[2]


def test_a_photo_without_a_face():
    black = numpy.zeros((200, 200, 3), numpy.uint8)
    assert run_onnx.find_faces(black).shape == (0, 3)


def test_faces_do_not_depend_on_the_size_of_the_photo():
    image = cv2.imread(str(PORTRAIT))
    small, large = (run_onnx.find_faces(photo) for photo in (image, cv2.resize(
        image, None, fx=6, fy=6, interpolation=cv2.INTER_CUBIC)))
    assert len(small) == len(large) == 1
    # Pixel centres: x lies 6 * (x + 0.5) - 0.5 in the larger photo.
    assert numpy.abs((large[0] + (0.5, 0.5, 0)) / 6 - small[0] - (0.5, 0.5, 0)).max() < 15


def test_a_false_detection_is_not_drawn(tmp_path, monkeypatch, capsys):
    square = run_onnx.find_faces(cv2.imread(str(PORTRAIT)))
    monkeypatch.setattr(run_onnx, "find_faces", lambda *_: [*square, [60, 500, 80]])
    monkeypatch.setattr(sys, "argv", ["run_onnx.py", str(WEIGHTS), str(PORTRAIT),
                                      str(tmp_path / "out.png")])
    run_onnx.main()
    assert "1 faces: " in capsys.readouterr().out
