"""Heads that are tilted, and cameras on their side: python -m tools.benchmark.tilted SET.

Each photo of a prepared set's test list is turned about the middle of its face; the detector finds
the face, whose landmarks and lids are read as demo.py does of single pictures. Told for each angle
are the faces found, their NME in photo pixels, how many of them are off by more than 10 %, and how
many of those whose eyes can be judged are called shut.
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


def turned(photo, points_px, degrees):
    """A photo (H, W, 3) and landmarks (K, 2) in it, turned clockwise about the landmarks' middle:
    the picture, with a grey border, which holds all of the photo at any angle.
    """
    middle = (points_px.min(0) + points_px.max(0)) / 2
    height, width = photo.shape[:2]
    corners = numpy.array([[0, 0], [width, 0], [0, height], [width, height]])
    half = math.ceil(numpy.linalg.norm(corners - middle, axis=1).max())
    matrix = cv2.getRotationMatrix2D(middle.tolist(), -degrees, 1)
    matrix[:, 2] += half - middle
    picture = cv2.warpAffine(photo, matrix, (2 * half, 2 * half), borderValue=GREY)
    return picture, points_px @ matrix[:, :2].T + matrix[:, 2]


def read(predictor, detector, picture, truth):
    """(landmarks (K, 2), whether the eyes are called shut: a bool, or None where that cannot be
    judged) of the detector's best box over the middle of landmarks `truth`; None where none is.
    """
    boxes, middle = detector(picture), (truth.min(0) + truth.max(0)) / 2
    inside = ((boxes[:, :2] < middle) & (middle < boxes[:, 2:4])).all(1)
    if not inside.any():
        return None
    start = detector.to_crop(boxes[inside.argmax()], predictor.crop["scale"])
    points, confidence = (found[0] for found in refine(predictor, picture, start)[:2])
    return points, eyes.look(points, confidence, predictor.scheme, predictor.eyes,
                             picture.shape).closed


def measure(predictor, detector, prepared, degrees):
    """The cells of an angle: faces found, NME, faces beyond 10 %, called shut of those judged."""
    faces, errors, closed = prepared.lists.get("test"), [], []
    if faces is None or faces.photos is None:
        raise UserError(f"{prepared.folder}: has no test list of which it is known where in their "
                        f"photos the faces lie; prepare one")
    truths = crop.to_photo(faces.points, faces.boxes)
    for path, points, published in zip(faces.photos, truths, faces.published):
        photo = read_photo(path, prepared.upright)
        if photo is None:
            raise UserError(f"{path}: cannot be read; the photos must lie where they were prepared")
        picture, truth = turned(photo, points, degrees)
        found = read(predictor, detector, picture, truth)
        if found is not None:
            norm = metrics.divisors(truth[None], prepared.scheme.divisor, published[None])
            known = truth if predictor.scheme.base is None else truth[
                list(predictor.scheme.indices)]
            errors.append(metrics.nme(found[0][None], known[None], norm)[0])
            closed.append(found[1])
    judged = [shut for shut in closed if shut is not None]
    return [f"{len(errors)} of {len(faces)}", f"{100 * numpy.mean(errors):.2f}" if errors else "",
            int((numpy.array(errors) > 0.1).sum()), f"{sum(judged)} of {len(judged)}"]


def parse(argv=None):
    """The command line as a namespace."""
    parser = model_parser("tools.benchmark.tilted", __doc__, "that look")
    parser.add_argument("set", metavar="SET", help="a prepared set, whose photos are at hand")
    parser.add_argument("--angles", nargs="+", type=float, default=ANGLES, metavar="DEGREES",
                        help=f"clockwise [{' '.join(map(str, ANGLES))}]")
    return parser.parse_args(argv)


def run():
    """Turn, look, and print the Markdown table."""
    options = parse()
    prepared = PreparedSet(options.set)
    detector = get_detector(options.detector).thorough()
    rows = [[name, f"{degrees:g}", *measure(predictor, detector, prepared, degrees)]
            for name, predictor in ((name, Predictor(name)) for name in options.weights)
            for degrees in options.angles]
    print("\n".join(table(["", "turned by", "found", "NME %", "beyond 10 %", "called shut"], rows)))


if __name__ == "__main__":
    guarded(run)
