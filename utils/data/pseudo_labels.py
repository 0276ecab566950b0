"""Photos without landmarks to training faces, with the landmarks that trained models lay there.

A folder of any photos, or one with photos in closed/ and open/ whose eyes are known to be shut or
open (see eye_states): of shut eyes models know too little, so there the lids are moved to where
they meet.
"""
import csv
import os
import pathlib
import shutil

import numpy
import tqdm

from utils import predictor as predictors
from utils.data import eye_states
from utils.data.dataset import PreparedSet
from utils.data.photo import read_photo, write_crop
from utils.data.readers.pts import unique_name
from utils.data.unlabelled import photos_in
from utils.detection.detector import get_detector
from utils.detection.refine import place_crops, predict_boxes, refine
from utils.errors import UserError
from utils.landmarks import crop as crops
from utils.landmarks import eyelids, metrics, schemes

# A face is left out where landmarks of the mirrored photo, or of another teacher, lie further off,
# as NME: on faces of 300W it is at 0.01 to 0.03, above this limit on the wrong one or on none.
DOUBT = 0.1
# How often a shut face is listed: they are few, and each is one kind of shut eye.
REPEAT = 2
LISTS = ("train.txt", "val.txt", "test.txt", "test_*.txt")


class Teachers:
    """Landmarks of the faces of a photo: the mean over models and over the photo and its mirror
    image.

    paths: weights (.pt or .onnx) that lay all points of scheme. Raises UserError for others.
    """

    def __init__(self, paths, scheme):
        self.scheme, self.models = scheme, [predictors.Predictor(path) for path in paths]
        for model in self.models:
            if not schemes.fits(scheme, model.scheme) or scheme.base is not None:
                raise UserError(f"teacher {model.path}: has the {model.scheme.name} scheme, the "
                                f"set {scheme.name}; the teacher lays all points of the set")

    def __call__(self, image, boxes, detector):
        """A photo (H, W, 3) and boxes (n, 4) of its detector to landmarks (n, K, 2) in pixels, and
        how far one of the means' parts lies from the first (n,), as NME.
        """
        width, found = image.shape[1], []
        mirrored = numpy.ascontiguousarray(image[:, ::-1])
        for model in self.models:
            points, _, _ = refine(model, image, detector.to_crop(boxes, model.crop["scale"]))
            laid, rolls = place_crops(model, points)
            other = laid * (-1, 1, -1, 1) + (width - 1, 0, width - 1, 0)
            again, _ = predict_boxes(model, mirrored, other[:, [2, 1, 0, 3]], -rolls)
            found += [points, again[:, self.scheme.flip] * (-1, 1) + (width - 1, 0)]
        first = found[0]
        sizes = metrics.divisors(first, self.scheme.divisor, laid)
        doubt = numpy.max([metrics.nme(points, first, sizes) for points in found[1:]], 0)
        return numpy.mean(found, 0), doubt


def prepare(folder, labelled, teachers, detector="haar", names="none", output_dir=None):
    """A copy of a prepared set with the faces of folder in its training list; returns its folder.

    Every face of a photo joins; of a photo in closed/ or open/ the largest one. labelled: the
    prepared set (its folder). teachers: see Teachers. detector: haar or an .onnx. names: see
    eye_states.list_photos. Raises UserError.
    """
    folder, prepared = pathlib.Path(folder), PreparedSet(labelled)
    photos = _photos(folder, names)
    if prepared.size is None:
        raise UserError(f"{prepared.folder}: has no set.yaml, so the crop is not known; prepare it "
                        f"with util.DataGenerator")
    if not prepared.scheme.mirrors:
        raise UserError(f"{prepared.folder}: its scheme has flip: none, so that mirrored faces "
                        f"cannot say how sure a teacher is")
    teachers = Teachers(teachers, prepared.scheme)
    known = photos[0][1] is not None
    source = "eyes" if known else folder.name
    if known:
        eyelids.aspect_ratios(prepared.scheme.mean_face, prepared.scheme)  # Or say: it has no eyes.
    name = f"{prepared.folder.name.removesuffix(f'-{prepared.size}')}+{folder.name}"
    output = pathlib.Path(output_dir or prepared.folder.with_name(f"{name}-{prepared.size}"))
    _copy(prepared.folder, output)
    detector, problems, rows, lines = get_detector(detector).thorough(), [], [], []
    # A name that is there may be a link to the labelled set's own crop.
    taken = {path.stem.lower() for path in (output / "images").glob("*")}
    for path, closed in tqdm.tqdm(photos, desc="photos", unit="photo"):
        image = read_photo(path, upright=True)
        for points in (["it cannot be read"] if image is None else
                       _label(image, teachers, detector, known)):
            if isinstance(points, str):
                problems.append(f"{path}: {points}\n")
                continue
            points = eyelids.close(points, prepared.scheme) if closed else points
            where = f"{path.parent.name}_{path.stem}" if known else path.stem
            target = f"images/{unique_name(f'{source}_{where}', taken)}.jpg"
            box = crops.face_box(points, prepared.crop["rule"], prepared.crop["scale"])
            write_crop(output / target, crops.cut(image, crops.grow(box, prepared.margin),
                                                  round(prepared.size * prepared.margin)))
            numbers = " ".join(f"{v:.7f}" for v in crops.to_crop(points, box).flatten())
            lines += [f"{target} {numbers}\n"] * (REPEAT if closed else 1)
            # Nothing is published of these photos: both boxes are ours.
            rows.append([target, path.resolve(), source, *(f"{v:.4f}" for v in (*box, *box))])
    (output / "problems.txt").write_text("".join(problems), encoding="utf-8", errors="replace")
    if not rows:
        raise UserError(f"{folder}: no face could be labelled ({problems[0].strip()})")
    with open(output / "sources.csv", "a", newline="", encoding="utf-8",
              errors="surrogateescape") as file:
        csv.writer(file).writerows(rows)
    texts = {path.name: path.read_text(encoding="utf-8") for name in LISTS
             for path in prepared.folder.glob(name)}
    texts["train.txt"] = texts.get("train.txt", "") + "".join(lines)
    # Last, so that a set which was interrupted has no list and is not taken for whole.
    for name, text in texts.items():
        (output / name).write_text(text, encoding="utf-8")
    shut = sum(row[0].startswith("images/eyes_closed") for row in rows) if known else 0
    kinds = f"{len(rows)} faces" if not known else (
        f"{shut} faces with shut eyes, each listed {REPEAT} times, and {len(rows) - shut} with "
        f"open ones")
    print(f"{output}: {kinds} join; {len(problems)} left out, see problems.txt")
    return output


def _photos(folder, names):
    """[(path, whether its eyes are shut, None where that is not known)], one at least."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of photos")
    if any((folder / state).is_dir() for state in eye_states.STATES):
        return eye_states.list_photos(folder, names)
    if names != "none":
        raise UserError(f"{folder}: names choose photos of closed/ and open/, which it has not")
    found = [(path, None) for path in photos_in(folder)]
    if not found:
        raise UserError(f"{folder}: holds no photo")
    return found


def _label(image, teachers, detector, largest):
    """Landmarks (K, 2) in pixels of each face of a photo, or of the largest alone; instead of
    them, why a face or the photo is left out.
    """
    boxes = detector(image)[:, :4]
    if not len(boxes):
        return ["no face was found"]
    if largest:
        boxes = boxes[[(boxes[:, 2:] - boxes[:, :2]).max(1).argmax()]]
    return [points if doubt <= DOUBT else
            f"its landmarks mirrored, or of another teacher, lie {100 * doubt:.0f} % off, measured "
            f"as NME" for points, doubt in zip(*teachers(image, boxes, detector))]


def _copy(folder, output):
    """Make output, a copy of a prepared set without its lists. Raises UserError."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        if not (output / "set.yaml").is_file():
            raise UserError(f"{output}: exists and is no prepared set; give another "
                            f"output_dir=FOLDER (--output-dir FOLDER) or empty it")
        if output.resolve() == folder.resolve():
            raise UserError(f"{output}: is the set itself; give another output_dir=FOLDER "
                            f"(--output-dir FOLDER)")
        shutil.rmtree(output)
    output.mkdir(parents=True, exist_ok=True)
    (output / "set.yaml").touch()  # What is interrupted from here on is a set of ours.
    # Crops are never written to again: links save the room where the disk can have them.
    shutil.copytree(folder, output, copy_function=_link, dirs_exist_ok=True,
                    ignore=shutil.ignore_patterns(*LISTS))


def _link(source, target):
    if pathlib.Path(source).suffix != ".jpg":
        return shutil.copy2(source, target)
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return target
