"""The benchmark of face detectors: what counts as found and as false, and its table."""
import cv2
import numpy
import pytest

from tools.benchmark import detectors
from utils.data.drawn_faces.render import render
from utils.errors import UserError

FACE = numpy.array([0, 0, 10, 10])
POINT = numpy.array([5, 5, 5, 5])


@pytest.mark.parametrize(("crops", "face", "reference", "expected"), [
    ([[0, 0, 10, 10], [40, 40, 50, 50]], FACE, None, (1, 1, 1)),
    ([[0, 0, 10, 10], [40, 40, 50, 50]], FACE, [[41, 41, 51, 51]], (1, 1, 0)),
    ([[8, 8, 18, 18]], FACE, None, (1, 0, 1)),
    ([[2, 2, 30, 30]], POINT, None, (1, 1, 0)),
    ([], POINT, None, (1, 0, 0)),
    ([[0, 0, 10, 10]], None, [[0, 0, 10, 10], [20, 20, 30, 30]], (2, 1, 0)),
    ([[0, 0, 10, 10]], None, None, (0, 0, 1)),
    ([[0, 0, 10, 10]], None, [], (0, 0, 1)),
])
def test_found_and_false(crops, face, reference, expected):
    reference = None if reference is None else numpy.reshape(reference, (-1, 4)).astype(float)
    found = detectors.score_picture(numpy.reshape(crops, (-1, 4)).astype(float), face, reference)
    assert found == expected


def test_the_table_of_drawn_faces(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "drawn"
    folder.mkdir()
    for seed in range(3):
        image, points = render([5, seed])
        cv2.imwrite(str(folder / f"{seed}.png"), image[..., ::-1])
        rows = "\n".join(f"{x + 1} {y + 1}" for x, y in points)
        (folder / f"{seed}.pts").write_text(f"version: 1\nn_points: 68\n{{\n{rows}\n}}\n")
    monkeypatch.setattr("sys.argv", ["detectors", str(folder), "--detectors", "haar"])
    threads = cv2.getNumThreads()
    detectors.run()
    cv2.setNumThreads(threads)
    head, _, row = capsys.readouterr().out.strip().splitlines()
    assert head.startswith("| source | detector |")
    source, name, pictures, faces, found, false, _ = (cell.strip() for cell in row.split("|")[1:-1])
    assert (source, name, pictures, faces) == ("drawn", "haar", "3", "3")
    assert float(found) >= 33
    assert int(false) >= 0


def test_a_source_without_pictures(tmp_path):
    with pytest.raises(UserError, match="no photo or frame"):
        list(detectors.pictures(tmp_path, 1))


def test_large_frames_are_reduced_to_the_timed_size():
    frame = detectors.timed_frame(numpy.zeros((1000, 1000, 3), numpy.uint8))
    assert frame.shape == (360, 640, 3)
    assert (frame == 0).all(2).sum() == 360 * 360
