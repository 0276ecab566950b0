"""The benchmark of rotated photos: the rotation, missing faces and photos, and a run."""
import cv2
import numpy
import pytest

from tools.benchmark import tilted
from utils.data.dataset import PreparedSet
from utils.detection.detector import Detector
from utils.errors import UserError
from utils.landmarks.schemes import SCHEMES


@pytest.mark.parametrize("degrees", [0, 30, 90, 180])
def test_a_photo_and_its_landmarks_are_rotated_alike(degrees):
    photo = numpy.zeros((120, 200, 3), numpy.uint8)
    points = numpy.array([[60.0, 40.0], [100.0, 40.0], [80.0, 90.0]])
    for point, colour in zip(points.astype(int).tolist(), ((255, 0, 0), (0, 255, 0), (0, 0, 255))):
        cv2.circle(photo, point, 4, colour, -1)
    picture, moved = tilted.rotate(photo, points, degrees)
    for channel, point in enumerate(moved):
        seen = numpy.argwhere((picture[..., channel] > 128) & (picture.max(2) != 80))[:, ::-1]
        numpy.testing.assert_allclose(seen.mean(0), point, atol=0.6)
    # The first two points are on a horizontal line; y points down, so angles are clockwise.
    line = moved[1] - moved[0]
    assert numpy.degrees(numpy.arctan2(line[1], line[0])) % 360 == pytest.approx(degrees, abs=1e-6)
    # Nothing of the photo is cut off.
    assert (picture[..., 0] != 80).sum() == pytest.approx(120 * 200, rel=0.03)


def test_an_undetected_face_is_none():
    nothing = Detector("nothing", lambda image: numpy.zeros((0, 5)), (0, 0, 1))
    truth = SCHEMES["300W"].mean_face * 100
    image = numpy.zeros((100, 100, 3), numpy.uint8)
    assert tilted.predict_face(None, nothing, image, truth) is None


def test_a_set_without_photos_is_an_error(photo_set):
    (photo_set.folder / "sources.csv").unlink()
    with pytest.raises(UserError, match="has no test list with the positions"):
        tilted.measure(None, None, PreparedSet(photo_set.folder), 90)


def test_a_shipped_model_finds_rotated_faces(photo_set, shared, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", [
        "tilted", str(photo_set.folder), "--weights", "weights/tiny.int8.onnx", "--detector",
        str(shared / "models/yunet_n_640_640.onnx"), "--angles", "0", "90"])
    tilted.run()
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines() if "int8.onnx" in line]
    assert [row[2].strip() for row in rows] == ["0", "90"]
    assert [row[3].strip() for row in rows] == ["3 of 3"] * 2
    assert all(float(row[4]) < 6 for row in rows)
