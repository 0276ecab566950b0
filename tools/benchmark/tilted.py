"""Measure detection, landmarks and eye states on photos that are rotated in the image plane.

    python -m tools.benchmark.tilted SET [--weights FILE ...] [--angles DEGREES ...]

Each photo of a prepared set's test list is rotated about the middle of its face and processed as
demo.py processes single pictures. The table has for each angle the detected faces, their NME in
photo pixels, the faces with an NME above 10 %, and the faces whose eyes are classified as closed,
of those with a classification. Takes minutes a model.
"""
import math

import cv2
import numpy

from tools.benchmark.common import model_parser, table
from utils.data.dataset import PreparedSet
from utils.data.photo import read_photo
from utils.detection.detector import get_detector
from utils.detection.refine import refine
from utils.drowsiness import eyes
from utils.errors import UserError
from utils.errors import run as guarded
from utils.landmarks import crop, metrics
from utils.predictor import Predictor

ANGLES = (0, 30, 45, 90, 120, 180)
GREY = (80, 80, 80)


def rotate(photo, points_px, degrees):
    """Rotate a photo (H, W, 3) and its landmarks (K, 2) clockwise about the landmarks' middle.

    The image gets a grey border, so that it contains the whole photo at any angle.
    """
    middle = (points_px.min(0) + points_px.max(0)) / 2
    height, width = photo.shape[:2]
    corners = numpy.array([[0, 0], [width, 0], [0, height], [width, height]])
    half = math.ceil(numpy.linalg.norm(corners - middle, axis=1).max())
    matrix = cv2.getRotationMatrix2D(middle.tolist(), -degrees, 1)
    matrix[:, 2] += half - middle
    picture = cv2.warpAffine(photo, matrix, (2 * half, 2 * half), borderValue=GREY)
    return picture, points_px @ matrix[:, :2].T + matrix[:, 2]


def predict_face(predictor, detector, picture, truth):
    """Predict the face of the best detected box that contains the middle of the true landmarks.

    Returns:
        Landmarks (K, 2) in pixels, and whether the eyes are closed (None if unknown); or None if
        no box contains the middle.
    """
    boxes, middle = detector(picture), (truth.min(0) + truth.max(0)) / 2
    inside = ((boxes[:, :2] < middle) & (middle < boxes[:, 2:4])).all(1)
    if not inside.any():
        return None
    start = detector.to_crop(boxes[inside.argmax()], predictor.crop["scale"])
    points, confidence = (found[0] for found in refine(predictor, picture, start)[:2])
    state = eyes.read_eyes(points, confidence, predictor.scheme, predictor.eyes, image=picture)
    return points, state.closed


def measure(predictor, detector, prepared, degrees):
    """Return the table cells of an angle: detected, NME, faces above 10 %, closed eyes.

    Raises:
        UserError: if the set has no test list with photos, or a photo cannot be read.
    """
    faces, errors, closed = prepared.lists.get("test"), [], []
    if faces is None or faces.photos is None:
        raise UserError(f"{prepared.folder}: has no test list with the positions of the faces in "
                        f"their photos (sources.csv); prepare the set again")
    truths = crop.to_photo(faces.points, faces.boxes)
    for path, points, published in zip(faces.photos, truths, faces.published):
        photo = read_photo(path, prepared.upright)
        if photo is None:
            raise UserError(f"{path}: cannot be read; the photos must be where they were when the "
                            f"set was prepared")
        picture, truth = rotate(photo, points, degrees)
        found = predict_face(predictor, detector, picture, truth)
        if found is not None:
            norm = metrics.divisors(truth[None], prepared.scheme.divisor, published[None])
            expected = truth if predictor.scheme.base is None else truth[
                list(predictor.scheme.indices)]
            errors.append(metrics.nme(found[0][None], expected[None], norm)[0])
            closed.append(found[1])
    classified = [state for state in closed if state is not None]
    return [f"{len(errors)} of {len(faces)}", f"{100 * numpy.mean(errors):.2f}" if errors else "",
            int((numpy.array(errors) > 0.1).sum()), f"{sum(classified)} of {len(classified)}"]


def parse(argv=None):
    """Parse the command line."""
    parser = model_parser("tools.benchmark.tilted", __doc__, "to measure")
    parser.add_argument("set", metavar="SET", help="a prepared set with its photos in place")
    parser.add_argument("--angles", nargs="+", type=float, default=ANGLES, metavar="DEGREES",
                        help=f"clockwise rotations [{' '.join(map(str, ANGLES))}]")
    return parser.parse_args(argv)


def run():
    """Run every model at every angle and print a Markdown table."""
    options = parse()
    prepared = PreparedSet(options.set)
    detector = get_detector(options.detector).with_retry()
    rows = [[name, f"{degrees:g}", *measure(predictor, detector, prepared, degrees)]
            for name, predictor in ((name, Predictor(name)) for name in options.weights)
            for degrees in options.angles]
    print("\n".join(table(["model", "degrees", "detected", "NME %", "above 10 %", "closed"], rows)))


if __name__ == "__main__":
    guarded(run)
