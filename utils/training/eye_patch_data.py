"""Faces for the eye-patch network: which photos, their landmarks, and patches of their eyes.

`list_faces` reads the lists of tools/splits, `find_landmarks` finds the faces, `cut_patches` cuts
the eyes with a margin, and `augment` makes a training patch of one of them.
"""
from __future__ import annotations

import dataclasses
import pathlib
from typing import TYPE_CHECKING

import cv2
import numpy
import tqdm

from utils.data.photo import IMAGE_SUFFIXES, read_photo
from utils.drowsiness import eye_patch
from utils.errors import UserError
from utils.files import read_text
from utils.tracking.tracker import Tracker, largest

if TYPE_CHECKING:
    from utils.detection.detector import Detector
    from utils.landmarks.schemes import Scheme
    from utils.predictor import Predictor

STATES = eye_patch.STATES
# Photos of these folders that no list names have open eyes: the eye aspect ratios of the labels or
# the openness that two models predict are high.
OPEN_FOLDERS = ("faces-wild", "300W/afw", "300W/helen/trainset", "300W/lfpw/trainset",
                "300W-small/helen/trainset")
# Parts of the list of closed and open eyes that are trained on, by our name for them.
PARTS = {"train": "train", "lfw": "train", "choose": "choose"}
# Size and width, in widths of the eye, of a stored patch: more than a network sees, for shifts.
STORED, STORED_SPAN = (96, 72), 2.7
# Eyes narrower than this share of the other one are turned away.
MIN_WIDTH_RATIO = 0.45


@dataclasses.dataclass(frozen=True)
class Face:
    """A photo of known eye state.

    Attributes:
        name: SET/PATH, as the lists have it.
        path: of the photo.
        state: open, down or shut.
        part: train, choose or final.
        listed: whether it is in the list of labels, so that a model confused it or might.
    """
    name: str
    path: pathlib.Path
    state: str
    part: str
    listed: bool


def list_faces(folder: pathlib.Path, eyes: pathlib.Path | str, labels: pathlib.Path | str
               ) -> list[Face]:
    """List the faces to train on and to choose and score with.

    Args:
        folder: has the folders eyes, lfw, faces-wild, 300W and 300W-small.
        eyes: list of `closed/NAME PART` and `open/NAME PART`; photos of the parts lfw are in lfw/.
        labels: list of `SET/PATH STATE PART`; it overrides the other one. Faces of the state
            `unclear` are left out.

    Raises:
        UserError: a list or a photo is missing, or a line is wrong.
    """
    faces = {}
    for state, part, name in _rows(eyes, 2, lambda a, b: (a.split("/")[0], b, a)):
        if part in PARTS:
            name = f"lfw/{name.split('/')[1]}" if part == "lfw" else f"eyes/{name}"
            faces[name] = "shut" if state == "closed" else "open", PARTS[part], False
    labelled = {name: (state, part) for name, state, part in
                _rows(labels, 3, lambda *row: row)}
    for place in OPEN_FOLDERS:
        if not (folder / place).is_dir():
            raise UserError(f"{folder}: has no folder {place}")
        faces |= {f"{place}/{path.name}": ("open", "train", False)
                  for path in sorted((folder / place).iterdir())
                  if path.suffix.lower() in IMAGE_SUFFIXES}
    faces |= {name: (*row, True) for name, row in labelled.items()}
    found = [Face(name, folder / name, *row) for name, row in sorted(faces.items())
             if row[0] in STATES]
    missing = next((face.path for face in found if not face.path.is_file()), None)
    if missing:
        raise UserError(f"{missing}: no such photo, though a list names it")
    return found


def _rows(path, columns, order):
    """Yield order(*words) of each line of a list."""
    try:
        lines = read_text(path).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    for number, line in enumerate(lines, 1):
        words = line.split()
        if len(words) != columns and line.strip() and not line.startswith("#"):
            raise UserError(f"{path}:{number}: expected {columns} words, found {line[:60]!r}")
        if words and not line.startswith("#"):
            yield order(*words)


def is_labelled(face: Face) -> bool:
    """Return whether the landmarks of a face are labelled, in a .pts file beside the photo."""
    return face.path.with_suffix(".pts").is_file()


def find_landmarks(faces: list[Face], predictor: Predictor, detector: Detector
                   ) -> dict[str, numpy.ndarray]:
    """Return the landmarks (68, 2) in pixels of each face that is found, by name.

    The labels of a .pts file beside the photo are taken where there are any.
    """
    detector, found = detector.with_retry(), {}
    for face in tqdm.tqdm(faces, desc="landmarks", leave=False):
        if is_labelled(face):
            labels = face.path.with_suffix(".pts")
            numbers = labels.read_text().partition("{")[2].partition("}")[0].split()
            found[face.name] = numpy.array(numbers, numpy.float64).reshape(-1, 2) - 1
            continue
        image = read_photo(face.path, upright=True)
        track = largest(Tracker(predictor, detector, filter_min_cutoff=0).update(image, 0.0))
        if track is not None:
            found[face.name] = track.raw_px
    return found


def cut_patches(image: numpy.ndarray, points_px: numpy.ndarray, scheme: Scheme
                ) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Cut both eyes with a margin.

    Returns:
        RGB patches (2, 72, 96, 3) uint8, the left one mirrored, and which of them show an eye that
        is not turned away, (2,) bool.
    """
    patches = eye_patch.cut_eyes(image, points_px, scheme, STORED, STORED_SPAN, grey=False)
    corners = points_px[[[contour[0], contour[len(contour) // 2]] for contour in scheme.eyes]]
    widths = numpy.linalg.norm(corners[:, 1] - corners[:, 0], axis=1)
    return patches.round().astype(numpy.uint8), widths >= MIN_WIDTH_RATIO * widths.max()


def plain(patch: numpy.ndarray) -> numpy.ndarray:
    """Return a stored patch (72, 96, 3) as the network sees it, without augmentation."""
    return _place(patch @ numpy.array([0.299, 0.587, 0.114], numpy.float32))


def augment(patch: numpy.ndarray, rng: numpy.random.Generator) -> numpy.ndarray:
    """Make a training patch (32, 48) float32 of a stored one (72, 96, 3).

    Landmarks are off, cameras are dark, grey, blurred or of low resolution, light comes from a
    side, and glasses or hair hide a part.
    """
    weights = rng.dirichlet([2, 3, 1.5]) if rng.random() < 0.7 else (0.299, 0.587, 0.114)
    out = _place(patch @ numpy.array(weights, numpy.float32), numpy.radians(rng.normal(0, 6)),
                 numpy.exp(rng.normal(0, 0.1)), numpy.exp(rng.normal(0, 0.06)),
                 rng.normal(0, 0.06, 2))
    height, width = out.shape
    kind = rng.random()
    if kind < 0.3:
        out = cv2.GaussianBlur(out, (0, 0), rng.uniform(0.5, 2.0))
    elif kind < 0.6:
        share = rng.uniform(0.25, 0.8)
        small = cv2.resize(out, None, fx=share, fy=share, interpolation=cv2.INTER_AREA)
        if rng.random() < 0.3:
            small += rng.normal(0, rng.uniform(1, 5), small.shape).astype(numpy.float32)
        out = cv2.resize(small, (width, height), interpolation=cv2.INTER_LINEAR)
    if rng.random() < 0.5:
        out = 255 * (out.clip(0, 255) / 255) ** numpy.exp(rng.normal(0, 0.35))
    if rng.random() < 0.3:
        out = out * (1 + numpy.linspace(-1, 1, width) * rng.normal(0, 0.3)
                     + numpy.linspace(-1, 1, height)[:, None] * rng.normal(0, 0.3))
    if rng.random() < 0.5:
        out = out + rng.normal(0, rng.uniform(0, 0.12), out.shape) * (out.std() + 4)
    if rng.random() < 0.2:
        out = numpy.round(out * rng.uniform(0.1, 0.4))
    if rng.random() < 0.15:
        high, wide = rng.integers(4, 14), rng.integers(4, 18)
        y, x = rng.integers(0, height - high), rng.integers(0, width - wide)
        out = numpy.array(out)
        out[y:y + high, x:x + wide] = rng.uniform(out.min(), out.max() + 1)
    return numpy.asarray(out, numpy.float32)


def _place(grey, angle=0.0, scale=1.0, stretch=1.0, shift=(0.0, 0.0)):
    """Resample a grey stored patch at the network's size, moved by `shift` widths of the eye."""
    stored = STORED[0] / STORED_SPAN  # Pixels in a width of the eye.
    step = stored / (eye_patch.SIZE[0] / eye_patch.SPAN) * scale
    cos, sin = step * numpy.cos(angle), step * numpy.sin(angle)
    matrix = numpy.array([[cos * stretch, -sin], [sin * stretch, cos]])
    centre = (numpy.array(STORED) - 1) / 2 + stored * numpy.asarray(shift)
    start = centre - matrix @ ((numpy.array(eye_patch.SIZE) - 1) / 2)
    return cv2.warpAffine(grey, numpy.hstack([matrix, start[:, None]]), eye_patch.SIZE,
                          flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
                          borderMode=cv2.BORDER_REPLICATE)
