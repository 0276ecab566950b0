"""Measure which crops count as faces: by the confidence of a model, and by the face score too.

    python -m tools.benchmark.face_scores --faces FOLDER ... --scenes FOLDER ... [--weights F ...]

The photos are those that the fit of the face score left out (utils/training/face_fit.py). Faces
are searched by the detector and refined as in the demo; they are also covered below the eyes,
blurred, darkened and reduced. Crops without a face are squares beside the faces, and squares and
Haar's boxes in scenes that show nobody. --sheet writes a picture of the crops on the wrong side.
"""
import pathlib

import cv2
import numpy
import tqdm

from tools.benchmark.common import model_parser, table
from utils.data.photo import read_photo
from utils.detection.detector import get_detector, iou
from utils.detection.face_score import MIN_SCORE, cut_grey, face_score
from utils.detection.refine import place_crops, refine
from utils.errors import run as guarded
from utils.landmarks.eyelids import EyeThresholds
from utils.predictor import Predictor
from utils.training import face_fit

SMALL = 24  # Side in pixels of the crop of a reduced face.
CELL = 96  # Side in pixels of a crop of the sheet.


def variants(image, crop):
    """Yield (name, image, crop (4,)) of a photo with the crop of a face."""
    side = crop[2] - crop[0]
    yield "face", image, crop
    covered = image.copy()
    covered[max(0, round(crop[1] + 0.5 * side)):] = image.mean((0, 1))
    yield "lower half covered", covered, crop
    yield "blurred", cv2.GaussianBlur(image, (0, 0), side / 25), crop
    yield "dark", (image * 0.15).astype(numpy.uint8), crop
    scale = min(1, SMALL / side)
    yield f"{SMALL} px", cv2.resize(image, None, fx=scale, fy=scale,
                                    interpolation=cv2.INTER_AREA), crop * scale


def pictures(options):
    """Yield (source, kind, image, start crops (n, 4)) of all crops to judge."""
    detector, haar = get_detector(options.detector), get_detector("haar")
    for folder in options.faces:
        found = face_fit.photos(folder, held_out=True)
        for i, path in enumerate(tqdm.tqdm(found[::-(-len(found) // options.photos)],
                                           desc=folder.name)):
            image, rng = read_photo(path, upright=True), numpy.random.default_rng([2, i])
            crops = detector.to_crop(detector(image))
            middle = numpy.array(image.shape[1::-1]) / 2
            holds = ((crops[:, :2] < middle) & (middle < crops[:, 2:])).all(1)
            if not holds.any():
                continue
            face = crops[holds.argmax()]
            for kind, varied, crop in variants(image, face):
                yield folder.name, kind, varied, crop[None]
            beside = face_fit.squares_beside(face, rng)
            yield folder.name, "beside", image, beside[iou(beside, crops).max(1) < 0.05]
    for folder in options.scenes:
        for i, path in enumerate(tqdm.tqdm(face_fit.photos(folder, held_out=True),
                                           desc=folder.name)):
            image = read_photo(path, upright=True)
            yield folder.name, "Haar's boxes", image, haar.to_crop(haar(image))
            yield folder.name, "squares", image, face_fit.squares_of_scene(
                image, numpy.random.default_rng([3, i]))[:40]


def judge(predictor, image, start, kind):
    """Return rows (confident, score, crop (CELL, CELL)) of start crops; moved ones are left out."""
    limit = getattr(predictor, "eyes", EyeThresholds()).face
    points, confidence, _ = refine(predictor, image, start)
    scores = face_score(predictor, image, points, confidence)
    crops, rolls = place_crops(predictor, points)
    # A square that moved onto a face beside it shows one.
    kept = iou(crops, start).diagonal() > 0.1 if kind == "beside" else numpy.ones(len(start), bool)
    return [(confidence[i].mean() >= limit, scores[i], cut_grey(image, crops[i], rolls[i],
                                                                side=CELL))
            for i in numpy.flatnonzero(kept)]


def write_sheet(path, rows):
    """Write the crops (CELL, CELL) of rows (source, kind, score, crop) to an image file."""
    columns, cells = 14, []
    for _, _, score, crop in rows:
        cell = crop.copy()
        cv2.putText(cell, f"{score:.2f}", (2, CELL - 4), cv2.FONT_HERSHEY_SIMPLEX, 0.45, 255, 1)
        cells.append(cell)
    cells += [numpy.zeros((CELL, CELL), numpy.uint8)] * (-len(cells) % columns)
    cv2.imwrite(str(path), numpy.vstack([numpy.hstack(cells[i:i + columns])
                                         for i in range(0, len(cells), columns)]))


def parse(argv=None):
    """Parse the command line."""
    parser = model_parser("tools.benchmark.face_scores", __doc__, "to measure")
    parser.add_argument("--faces", nargs="+", type=pathlib.Path, default=[], metavar="FOLDER",
                        help="photos with a face in the middle")
    parser.add_argument("--scenes", nargs="+", type=pathlib.Path, default=[], metavar="FOLDER",
                        help="photos that show nobody")
    parser.add_argument("--photos", type=int, default=200, help="at most, of each folder [200]")
    parser.add_argument("--sheet", type=pathlib.Path, metavar="FILE.png",
                        help="picture of the faces rejected and other crops accepted by the score")
    return parser.parse_args(argv)


def run():
    """Judge all crops with all models and print a Markdown table."""
    options, wrong = parse(), []
    predictors = {pathlib.Path(name).name: Predictor(name) for name in options.weights}
    found = {}
    for source, kind, image, start in pictures(options):
        for name, predictor in predictors.items():
            rows = judge(predictor, image, start, kind) if len(start) else []
            found.setdefault((name, source, kind), []).extend(row[:2] for row in rows)
            none = kind in ("beside", "squares", "Haar's boxes")
            wrong += [(source, kind, score, crop) for confident, score, crop in rows
                      if confident and (score >= MIN_SCORE) == none]
    rows = [[*key, len(judged), sum(confident for confident, _ in judged),
             sum(confident and score >= MIN_SCORE for confident, score in judged)]
            for key, judged in sorted(found.items())]
    print("\n".join(table(["model", "photos", "kind", "crops", "faces by confidence",
                           "and by the score"], rows)))
    if options.sheet and wrong:
        write_sheet(options.sheet, wrong)


if __name__ == "__main__":
    guarded(run)
