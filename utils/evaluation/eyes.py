"""Score how well a model separates closed from open eyes on photos of known eye state.

The photos lie in closed/ and open/, and those of people who look down in down/. Each is read
exactly as demo.py reads a single picture: a detector finds the face, the network predicts its
landmarks, and eye aspect ratios and patches of the eyes give the openness. `main.py --test-eyes`
scores these readings here; `main.py --fit-eyes` (utils/training/lid_fit.py) fits the eye thresholds
and the lid head to the eye aspect ratios.
"""
from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib

import numpy
import tqdm

from utils import draw, experiment, plots
from utils.data.eye_states import DOWN, STATES, list_down, list_photos
from utils.data.photo import read_photo
from utils.detection.detector import Detector, get_detector
from utils.drowsiness import eyes
from utils.errors import UserError, as_note
from utils.files import OutputFile
from utils.landmarks import eyelids
from utils.landmarks.schemes import Scheme
from utils.predictor import Predictor
from utils.tracking.tracker import Tracker, largest

# False-alarm rates at which recall is reported, by their name in percent.
FALSE_ALARM_RATES = {"1": 0.01, "0.1": 0.001}


@dataclasses.dataclass(frozen=True)
class EyeReading:
    """A photo of known eye state and what the model predicts in it.

    Attributes:
        photo: path of the photo.
        closed: whether the eyes are closed, from the folder's name; False in down/.
        points_px: landmarks (K, 2) of the largest face in pixels; None where no face was found.
        confidence: their confidence (K,), or None.
        eyes: the state of both eyes, or None.
    """

    photo: pathlib.Path
    closed: bool
    points_px: numpy.ndarray | None
    confidence: numpy.ndarray | None
    eyes: eyes.Eyes | None

    @property
    def down(self) -> bool:
        """Whether the photo shows a person who looks down."""
        return self.photo is not None and self.photo.parent.name == DOWN


def predict_labelled(args: argparse.Namespace, lids: bool = True, patches: bool = True
                     ) -> tuple[pathlib.Path, Predictor, list[EyeReading]]:
    """Predict the eyes in the photos of known eye state that the settings name.

    Args:
        args: resolved settings: `exp` names the weights, `data_dir` and `names` the photos, `boxes`
            the detector (`none`: Haar).
        lids: whether to apply the lid head that the weights hold.
        patches: whether to read the eyes in the image too, as the demo does, and to read the photos
            of down/. Else the eyes are read from the landmarks alone.

    Returns:
        The path of the weights, their Predictor and one EyeReading a photo.

    Raises:
        UserError: where weights, photos or detector are missing or the scheme has no eye contours.
    """
    path = experiment.find_weights(args.exp)
    photos = list_photos(args.data_dir, args.names)
    if patches:
        photos += [(path, False) for path in list_down(args.data_dir, args.names)]
    detector = get_detector("haar" if args.boxes == "none" else args.boxes)
    predictor = Predictor(path, args.device, lids=lids)
    # Fails at once where the scheme has no eye contours.
    eyelids.aspect_ratios(predictor.scheme.mean_face, predictor.scheme)
    return path, predictor, predict_photos(predictor, detector, photos, patches)


def predict_photos(predictor: Predictor, detector: Detector,
                   photos: list[tuple[pathlib.Path, bool]], patches: bool = True
                   ) -> list[EyeReading]:
    """Predict the eyes of the largest face in each of photos [(path, closed)]; see above."""
    detector, readings = detector.with_retry(), []
    for path, closed in tqdm.tqdm(photos, desc="photos", leave=False):
        image = read_photo(path, upright=True)
        if image is None:
            raise UserError(f"{path}: cannot be read as an image")
        tracker = Tracker(predictor, detector, filter_min_cutoff=0)
        face = largest(tracker.update(image, 0.0))
        if face is None:
            readings.append(EyeReading(path, closed, None, None, None))
            continue
        state = eyes.read_eyes(face.raw_px, face.confidence, predictor.scheme, predictor.eyes,
                               image.shape, image if patches else None)
        readings.append(EyeReading(path, closed, face.raw_px, face.confidence, state))
    return readings


def with_face(readings: list[EyeReading]) -> list[EyeReading]:
    """Return the readings in which a face was found."""
    return [r for r in readings if r.eyes is not None]


def score(readings: list[EyeReading]) -> dict:
    """Score the separation of closed and open eyes.

    Returns:
        Plain numbers by name. `closed`, `open` and `down`: {faces, not_found, not_judged,
        called_down in %}, `down` also {called_closed in %}. `recall` and `false_alarms`: of the
        model's own thresholds, in % of all faces; a face that is not found or whose eyes cannot be
        judged counts as open. `auc`, `recall_at_1` and `recall_at_0.1`: see separation, of the
        rating of the faces found; `eye_auc` ...: of single eyes. Photos of down/ count in `down`
        only.
    """
    numbers, down = {}, [r for r in readings if r.down]
    readings = [r for r in readings if not r.down]
    for state, closed in zip(STATES, (True, False)):
        states = [r.eyes for r in readings if r.closed == closed]
        numbers[state] = _counts(states)
        numbers["recall" if closed else "false_alarms"] = _share(states, "closed")
    states = [r.eyes for r in down]
    numbers[DOWN] = _counts(states) | {"called_closed": _share(states, "closed")}
    readings = with_face(readings)
    closed = numpy.array([r.closed for r in readings], bool)
    for prefix, values in (("", [rating(r) for r in readings]),
                           ("eye_", [_levels(r) for r in readings])):
        values = numpy.array(values, numpy.float64)
        numbers |= {prefix + name: value for name, value in
                    separation(values[closed].ravel(), values[~closed].ravel()).items()}
    return numbers


def rating(reading: EyeReading) -> float:
    """Rate how open the eyes of a face are, by the mean of both eyes; not limited to 0..1."""
    return float(numpy.mean(_levels(reading)))


def _levels(reading):
    return reading.eyes.ratios if reading.eyes.levels is None else reading.eyes.levels


def _counts(states):
    """Count faces, those not found or judged, and the % of all that are called looking down."""
    found = [eye for eye in states if eye is not None]
    return {"faces": len(states), "not_found": len(states) - len(found),
            "not_judged": [eye.closed for eye in found].count(None),
            "called_down": _share(states, "looks_down")}


def _share(states, name):
    """Return the % of eyes.Eyes (None: not found) whose attribute is true; None of none."""
    if not states:
        return None
    return 100 * sum(eye is not None and getattr(eye, name) is True for eye in states) / len(states)


def separation(closed: numpy.ndarray, opened: numpy.ndarray) -> dict[str, float]:
    """Measure how well a value separates closed eyes, where it is lower, from open ones.

    Args:
        closed: values (n,) of closed eyes.
        opened: values (m,) of open eyes.

    Returns:
        `auc`, the area under the ROC curve, and `recall_at_1`, `recall_at_0.1`: the % of closed
        eyes found at 1 and 0.1 % false alarms. NaN where either array is empty.
    """
    if not len(closed) or not len(opened):
        return {"auc": float("nan"),
                **{f"recall_at_{name}": float("nan") for name in FALSE_ALARM_RATES}}
    ordered = numpy.sort(opened)
    below = numpy.searchsorted(ordered, closed, "right")
    ties = below - numpy.searchsorted(ordered, closed, "left")
    auc = 1 - float((below - ties / 2).mean()) / len(opened)
    return {"auc": auc, **{
        f"recall_at_{name}": 100 * float((closed < ordered[int(rate * len(opened))]).mean())
        for name, rate in FALSE_ALARM_RATES.items()}}


def run_test(args: argparse.Namespace) -> None:
    """Score a model on photos of closed and open eyes; print, plot and write the report.

    Args:
        args: resolved settings, see predict_labelled; `report` names a .json to write, or none.

    Raises:
        UserError: see predict_labelled; also where the report's folder is missing.
    """
    if args.report != "none" and not pathlib.Path(args.report).parent.is_dir():
        raise UserError(f"--report {args.report}: there is no such folder")
    path, predictor, readings = predict_labelled(args)
    numbers = score(readings)
    print_numbers(numbers)
    if args.report != "none":
        OutputFile(args.report, "--report").write(json.dumps(numbers, indent=2).encode())
    draw_readings(readings, predictor.scheme, path)


def print_numbers(numbers: dict) -> None:
    """Print the numbers of score."""
    for state in (*STATES, DOWN):
        if numbers[state]["faces"]:
            print(f"{state:<8}{{faces}} faces, {{not_found}} not found, {{not_judged}} not judged"
                  .format(**numbers[state]))
    print(f"rule    recall {numbers['recall']:.1f} %, false alarms {numbers['false_alarms']:.1f} %")
    recall = "recall {called_down:.1f} %, called closed {called_closed:.1f} %, ".format(
        **numbers[DOWN]) if numbers[DOWN]["faces"] else ""
    print(f"down    {recall}false alarms {numbers['open']['called_down']:.1f} % of open, "
          f"{numbers['closed']['called_down']:.1f} % of closed")
    for name, prefix in (("faces", ""), ("eyes", "eye_")):
        print(f"{name:<8}AUC {numbers[prefix + 'auc']:.4f}, recall "
              + ", ".join(f"{numbers[f'{prefix}recall_at_{rate}']:.1f} % at {rate} %"
                          for rate in FALSE_ALARM_RATES) + " false alarms")


def draw_readings(readings: list[EyeReading], scheme: Scheme, weights: pathlib.Path) -> None:
    """Write eyes-roc.png and eyes-worst.png beside the weights.

    eyes-worst.png shows the 16 faces of each state whose openness fits it least. Beside
    weights that are no best.* the names begin with the name of the weights. A note is printed on a
    file that cannot be written.
    """
    prefix = "" if weights.stem == "best" else f"{weights.stem}-"
    rated = [(rating(r), r) for r in with_face(readings) if not r.down]
    closed, opened = ([ratio for ratio, r in rated if r.closed == state] for state in (True, False))
    with as_note(roc := weights.with_name(f"{prefix}eyes-roc.png")):
        plots.plot_roc(closed, opened, roc)
    images, captions = [], []
    for state, sign in ((True, -1), (False, 1)):
        faces = [pair for pair in rated if pair[1].closed == state]
        for ratio, r in sorted(faces, key=lambda pair: sign * pair[0])[:16]:
            image = read_photo(r.photo, upright=True)
            images.append(draw.landmarks(image, r.points_px, scheme))
            captions.append(f"{r.photo.parent.name} {r.photo.stem} {ratio:.2f}")
    with as_note(worst := weights.with_name(f"{prefix}eyes-worst.png")):
        draw.save(worst, draw.sheet(images, 8, 200, captions))
