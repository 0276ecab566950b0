"""The test from end to end: faces are found by a detector, not given by the annotation."""
import numpy
import tqdm

from utils.data.photo import read_photo
from utils.detection.refine import refine
from utils.errors import UserError
from utils.evaluation import predict
from utils.landmarks import crop


def score(predictor, detector, prepared):
    """All test lists from detected boxes, as score.score; numbers also hold `found`, in %.

    NME, FR and AUC are over the faces found. Raises UserError where the set keeps no photos.
    """
    numbers, details = {}, {}
    photos = {}
    for name, faces, (predicted, found) in predict.once(prepared.tests, lambda faces: _predict(
            predictor, detector, faces, photos, prepared.upright)):
        if not found.any():
            raise UserError(f"{detector.name} finds no face of {name}")
        kept = faces.take(numpy.flatnonzero(found))
        nme, published = predict.errors(predicted[found], kept, predictor.scheme,
                                           prepared.scheme)
        numbers[name] = predict.summarise(nme, published)
        numbers[name]["found"] = 100 * float(found.mean())
        details[name] = predicted, numpy.where(found, 0.0, numpy.nan)
        details[name][1][found] = nme
    return numbers, details


def _predict(predictor, detector, faces, photos, upright):
    """Landmarks (N, K, 2) in crop units of the annotated crop, and which faces were found (N,).

    upright: whether the annotation is of the photos as their EXIF orientation shows them.
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
        if photo not in photos:
            photos[photo] = detector(image)
        truth = numpy.concatenate([numpy.nanmin(points_px[i], 0), numpy.nanmax(points_px[i], 0)])
        box = detector.same_face(photos[photo], truth)
        if box is None:
            continue
        start = detector.to_crop(box, predictor.crop["scale"])
        predicted[i] = crop.to_crop(refine(predictor, image, start)[0], faces.boxes[[i]])[0]
        found[i] = True
    return predicted, found
