"""The one-file runner: it stands alone, and gives what the repository's own pipeline gives."""
import pathlib
import re
import subprocess
import sys

import cv2
import matplotlib
import numpy
import onnxruntime
import pytest

from assets import run_onnx
from utils.args import ROOT
from utils.predictor import Predictor
from utils.video import tracker
from utils.video.detector import get_detector

WEIGHTS = ROOT / "weights/fast.onnx"
PORTRAIT = pathlib.Path(matplotlib.get_data_path(), "sample_data/grace_hopper.jpg")


def test_imports_nothing_of_the_repository():
    text = (ROOT / "assets/run_onnx.py").read_text()
    assert set(re.findall(r"^(?:import|from) (\w+)", text, re.M)) == {
        "argparse", "json", "cv2", "numpy", "onnxruntime"}


@pytest.mark.parametrize("detector", ["haar", "yunet"])
def test_landmarks_are_those_of_the_pipeline(detector, request):
    if detector == "yunet":
        detector = str(request.getfixturevalue("shared") / "models/yunet_n_640_640.onnx")
    image = cv2.imread(str(PORTRAIT))
    ours, predictor = get_detector(detector), Predictor(WEIGHTS)
    rgb = image[..., ::-1].copy()
    expected, _, _ = tracker.refine(predictor, rgb, ours.to_crop(ours(rgb)[:1], 1.2))
    session = onnxruntime.InferenceSession(str(WEIGHTS), providers=["CPUExecutionProvider"])
    faces = run_onnx.find_faces(image, detector)
    assert len(faces) >= 1
    points, _ = run_onnx.landmarks(session, image, faces[0])
    low, high = points.min(0), points.max(0)
    points, confidence = run_onnx.landmarks(session, image,
                                            (*(low + high) / 2, (high - low).max()))
    # Their detectors look at other sizes of the photo, so the crops differ a little.
    side = (high - low).max()
    assert numpy.abs(points - expected[0]).mean() < 0.01 * side and confidence.mean() > 0.4


def test_the_command(tmp_path):
    def run(*argv):
        return subprocess.run([sys.executable, "run_onnx.py", *map(str, argv)], text=True,
                              cwd=ROOT / "assets", capture_output=True)

    done = run(WEIGHTS, PORTRAIT, tmp_path / "out.png")
    assert done.returncode == 0, done.stderr
    assert "faces: " in done.stdout and "confidence 0." in done.stdout
    before, after = cv2.imread(str(PORTRAIT)), cv2.imread(str(tmp_path / "out.png"))
    assert (before != after).any(-1).sum() > 68
    (tmp_path / "empty.jpg").touch()
    done = run(WEIGHTS, tmp_path / "empty.jpg", tmp_path / "no.png")
    assert done.returncode == 2 and "is no image" in done.stderr


def test_a_photo_without_a_face():
    black = numpy.zeros((200, 200, 3), numpy.uint8)
    assert run_onnx.find_faces(black).shape == (0, 3)
