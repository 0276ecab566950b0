"""Scores from detected boxes."""
import pathlib

import numpy
import pytest
from helpers import own_sets

from utils.data import unlabelled
from utils.data.dataset import PreparedSet
from utils.detection.detector import Detector
from utils.errors import UserError
from utils.evaluation import boxes, score
from utils.landmarks import crop
from utils.landmarks.schemes import SCHEMES


class Oracle:
    """A predictor that returns the mean face for every crop, so that only the crop matters."""

    input_size, crop = 64, {"rule": "square", "scale": 1.2}

    def __init__(self, scheme):
        self.scheme = scheme

    def __call__(self, images):
        points = numpy.repeat(self.scheme.mean_face[None], len(images), 0).astype(numpy.float32)
        return points, numpy.ones(points.shape[:2], numpy.float32)


def test_faces_are_matched_by_overlap_and_missed_ones_are_left_out(photo_set):
    faces = photo_set.test_lists["test"]
    truth_px = crop.to_photo(faces.points, faces.boxes)
    order = iter(range(3))

    def find(image):
        i = next(order)
        box = numpy.concatenate([truth_px[i].min(0), truth_px[i].max(0)])
        far = numpy.array([0, 0, 12, 12, 0.9])
        # The second face is missed; the others come second after a false box.
        return [far] if i == 1 else [far, [*box, 0.5]]

    predictor = Oracle(photo_set.scheme)
    photo_set.lists.pop("test_common")
    numbers, details = boxes.score_detected(predictor, Detector("test", find, (0, 0, 1)), photo_set)
    assert numbers["test"]["faces"] == 2
    assert numbers["test"]["found"] == pytest.approx(200 / 3)
    predicted, nme = details["test"]
    assert numpy.isnan(nme).tolist() == [False, True, False]
    # Two passes of the mean face inside the face's own box: about where the face is.
    assert nme[0] < 0.5
    assert numbers["test"]["nme"] == pytest.approx(100 * numpy.nanmean(nme))
    assert abs(predicted[0].mean(0) - photo_set.scheme.mean_face.mean(0)).max() < 0.1


def test_landmarks_that_cover_part_of_a_face_are_matched(tmp_path):
    faces = [(split, own_sets.FACE) for split in ("train", "train", "test")]
    prepared = PreparedSet(own_sets.prepare(tmp_path, own_sets.FIVE, faces, val=0))
    # The overlap of five landmarks with a face box: 0.23.
    find = Detector("test", lambda image: [[0, 0, 12, 12, 0.9], [0, 0, 80, 88, 0.5]], (0, 0, 1))
    numbers, _ = boxes.score_detected(Oracle(prepared.scheme), find, prepared)
    assert numbers["test"]["found"] == 100
    transform = unlabelled.fit_labelled(find, prepared)
    side = (80 * 88) ** 0.5
    assert transform.shift == pytest.approx([0, -4 / side])
    assert transform.size * side == pytest.approx(48)


def test_no_face_at_all_is_an_error(photo_set):
    nothing = Detector("blind", lambda image: numpy.zeros((0, 5)), (0, 0, 1))
    with pytest.raises(UserError, match="blind finds no face"):
        boxes.score_detected(Oracle(photo_set.scheme), nothing, photo_set)


def test_a_set_without_photos_is_an_error(drawn_set):
    with pytest.raises(UserError, match="photos"):
        boxes.score_detected(Oracle(SCHEMES["300W"]), Detector("d", lambda i: [], (0, 0, 1)),
                             PreparedSet(drawn_set))


def test_file_names_differ_by_detector_and_flip_test():
    assert [score._output_prefix(pathlib.Path(path), detector, flip) for path, detector, flip in (
        ("weights/a/best.pt", "none", False), ("weights/a/best.pt", "haar", False),
        ("weights/a/best.pt", "none", True), ("weights/tiny.pt", "none", False),
        ("weights/tiny.pt", "haar", True))] == [
            "weights/a/", "weights/a/boxes-", "weights/a/flip-", "weights/tiny-",
            "weights/tiny-boxes-flip-"]
