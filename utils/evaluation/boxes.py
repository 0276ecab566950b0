"""Score from detected boxes: a detector, not the annotation, says where each face is.

Each photo of a test list goes through the detector. The box that matches the annotated face becomes
a crop, the crop is refined as in the demo, and the landmarks are scored as in score.py. A face that
the detector misses has no NME and lowers `found`.
"""
from __future__ import annotations

import numpy
import tqdm

from utils.data.dataset import PreparedSet
from utils.data.photo import read_photo
from utils.detection.detector import Detector
from utils.detection.refine import refine
from utils.errors import UserError
from utils.evaluation import predict
from utils.landmarks import crop
from utils.predictor import Predictor


def score_detected(predictor: Predictor, detector: Detector,
                   prepared: PreparedSet) -> tuple[dict, dict]:
    """Score all test lists from detected boxes.

    Args:
        predictor: the model.
        detector: finds the faces.
        prepared: a set that keeps the paths of its photos.

    Returns:
        As score.score_lists. The numbers are of the faces found and include `found`, their share in
        %; the NME of other faces is NaN.

    Raises:
        UserError: where the set names no photos, one cannot be read, or no face of a list is found.
    """
    numbers, results = {}, {}
    boxes = {}
    for name, faces, (predicted, found) in predict.predict_lists(
            prepared.test_lists,
            lambda faces: _predict(predictor, detector, faces, boxes, prepared.upright)):
        if not found.any():
            raise UserError(f"{detector.name} finds no face of {name}")
        of_found = (predicted[found], faces.select(numpy.flatnonzero(found)), predictor.scheme,
                    prepared.scheme)
        nme, published = predict.list_nme(*of_found)
        numbers[name] = predict.summarise(nme, published) | {
            "found": 100 * float(found.mean()), "normalised": predict.normalised(*of_found)}
        all_nme = numpy.full(len(faces), numpy.nan)
        all_nme[found] = nme
        results[name] = predicted, all_nme
    return numbers, results


def _predict(predictor, detector, faces, boxes, upright):
    """Return landmarks (N, K, 2) in units of the annotated crops, and which faces were found (N,).

    boxes caches detections by photo. upright: whether the annotation refers to the photos as their
    EXIF orientation shows them.
    """
    if faces.photos is None:
        raise UserError("--boxes needs a set whose sources.csv names the photos; prepare it again")
    predicted = numpy.zeros((len(faces), predictor.scheme.points, 2))
    found = numpy.zeros(len(faces), bool)
    points_px = crop.to_photo(faces.points, faces.boxes)
    for i, photo in enumerate(tqdm.tqdm(faces.photos, desc="photos", leave=False)):
        image = read_photo(photo, upright) if photo.is_file() else None
        if image is None:
            raise UserError(f"{photo}: cannot be read; --boxes needs the photos where they were "
                            f"when the set was prepared")
        if photo not in boxes:
            boxes[photo] = detector(image)
        truth = numpy.concatenate([numpy.nanmin(points_px[i], 0), numpy.nanmax(points_px[i], 0)])
        box = detector.box_of_face(boxes[photo], truth)
        if box is None:
            continue
        start = detector.to_crop(box, predictor.crop["scale"])
        predicted[i] = crop.to_crop(refine(predictor, image, start)[0], faces.boxes[[i]])[0]
        found[i] = True
    return predicted, found
