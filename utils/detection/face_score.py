"""Face score: does a crop that landmarks gave show a face?

The confidence of a landmark network tells how sure it is of points, not that there is a face:
leaves, ears and hands reach that of a covered face. `face_score` combines it with the agreement of
the prediction and that of the mirrored crop, and with `FaceScore`: a network of four convolutions
on a grey crop of SIDE pixels, fitted to faces and to what becomes of crops without a face when they
are refined (utils/training/face_fit.py). That network needs NumPy alone.
"""
from __future__ import annotations

import functools
import pathlib
from typing import TYPE_CHECKING

import cv2
import numpy

from utils.detection.refine import mirror_errors, place_crops
from utils.errors import UserError
from utils.files import refuse_lfs_pointer
from utils.landmarks import crop
from utils.landmarks.eyelids import EyeThresholds

if TYPE_CHECKING:
    from utils.predictor import Predictor

PATH = pathlib.Path(__file__).resolve().parents[2] / "weights" / "face_score.npz"
# Side of the crop in pixels, and of the box around it in sides of the nominal crop: it holds ears,
# hair and the forehead.
SIDE, GROWTH = 40, 1.3
STRIDES = (2, 2, 1, 2)  # Of the convolutions, all 3 x 3 with a border of zeros.
# The score is a logistic regression on three features: where the mean confidence lies between the
# model's face threshold and 1; the logarithm of the mirror error (metrics.mirror_error); and the
# logit of the network's score. The weights are those that keep most faces and their variants (half
# of faces-wild, `tiny` and `fast`) while no scene, head from behind or blurred foliage passes.
WEIGHTS, BIAS = (10.0, -2.2, 0.5), -11.5
MIN_SCORE = 0.5  # Below it, there is no face.
# A tracked face is lost below KEEP_SCORE: blur and turned heads lower the score for a while.
KEEP_SCORE = 0.3
# The mirror error takes two predictions. From this share of the confidence on, it is taken to be
# that of most faces.
SURE_SHARE, TYPICAL_MIRROR, MIN_MIRROR = 0.45, 0.021, 0.005
LIMITS = (0.05, 0.982)  # Of the network's score: beyond, it tells no more.
# Contrast in grey levels below which a crop is not amplified further.
FLOOR = 8.0


def normalise(grey: numpy.ndarray) -> numpy.ndarray:
    """Bring grey crops (n, S, S), uint8, to mean 0 and unit contrast, float32."""
    grey = grey.astype(numpy.float32)
    grey -= grey.mean((1, 2), keepdims=True)
    return grey / (grey.std((1, 2), keepdims=True) + FLOOR)


class FaceScore:
    """Scores crops, from 0 (no face) to 1.

    Args:
        path: an .npz of utils/training/face_fit.py.

    Raises:
        UserError: where the file is missing or of another kind.
    """

    def __init__(self, path: pathlib.Path | str = PATH):
        path = pathlib.Path(path)
        if not path.is_file():
            raise UserError(f"{path}: no such file; it comes with the repository, or is made by "
                            f"python -m utils.training.face_fit")
        refuse_lfs_pointer(path)
        names = [f"{kind}{i}" for i in range(len(STRIDES) + 1) for kind in ("weight", "bias")]
        try:
            with numpy.load(path, allow_pickle=False) as file:
                arrays = [file[name].astype(numpy.float32) for name in names]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: not a face score ({error}); fetch it again from the "
                            f"repository") from None
        self.layers = list(zip(arrays[::2], arrays[1::2]))

    def __call__(self, image: numpy.ndarray, boxes: numpy.ndarray,
                 rolls: numpy.ndarray) -> numpy.ndarray:
        """Score nominal crops of an image.

        Args:
            image: RGB uint8 (H, W, 3).
            boxes: nominal crops (n, 4) in pixels.
            rolls: their clockwise rotations (n,) in radians.

        Returns:
            Scores (n,), 0..1.
        """
        if not len(boxes):
            return numpy.zeros(0)
        return self.of_grey(numpy.stack([cut_grey(image, box, roll)
                                         for box, roll in zip(boxes, rolls)]))

    def of_grey(self, grey: numpy.ndarray) -> numpy.ndarray:
        """Score grey crops (n, SIDE, SIDE), uint8, as cut_grey returns them."""
        maps = normalise(grey)[..., None]
        for stride, (weight, bias) in zip(STRIDES, self.layers):
            maps = numpy.maximum(_windows(maps, stride) @ weight + bias, 0)
        weight, bias = self.layers[-1]
        logit = maps.reshape(len(maps), -1) @ weight + bias
        return 1 / (1 + numpy.exp(-logit[:, 0].astype(numpy.float64)))


def _windows(maps, stride):
    """Return the 3 x 3 surroundings of every stride-th cell: (n, S, S, C) to (n, s, s, 9 C)."""
    count, side, _, channels = maps.shape
    padded = numpy.zeros((count, side + 2, side + 2, channels), numpy.float32)
    padded[:, 1:-1, 1:-1] = maps
    cells = (side - 1) // stride + 1
    image, row, column, channel = padded.strides
    views = numpy.lib.stride_tricks.as_strided(
        padded, (count, cells, cells, 3, 3, channels),
        (image, row * stride, column * stride, row, column, channel), writeable=False)
    return views.reshape(count, cells, cells, 9 * channels)


def cut_grey(image: numpy.ndarray, box: numpy.ndarray, roll: float,
             growth: float = GROWTH, side: int = SIDE) -> numpy.ndarray:
    """Cut the grey crop (side, side) around a nominal crop (4,) of an RGB image."""
    return cv2.cvtColor(crop.cut(image, crop.grow(box, growth), side, roll), cv2.COLOR_RGB2GRAY)


@functools.cache
def shipped() -> FaceScore:
    """Load the face score of the repository, once."""
    return FaceScore()


def face_score(predictor: Predictor, image: numpy.ndarray, points_px: numpy.ndarray,
               confidence: numpy.ndarray) -> numpy.ndarray:
    """Score whether landmarks lie on faces.

    Args:
        predictor: the model that gave the landmarks. Without a fitted face threshold (main.py
            --fit-eyes) it may be one of other objects, whose scores are 1.
        image: RGB uint8 (H, W, 3).
        points_px: its landmarks (n, K, 2) in pixels of image.
        confidence: of the landmarks (n, K), 0..1.

    Returns:
        Scores (n,), 0 (no face) to 1.
    """
    threshold = getattr(predictor, "eyes", EyeThresholds()).face
    if not len(points_px) or not threshold:
        return numpy.ones(len(points_px))
    network = shipped()(image, *place_crops(predictor, points_px)).clip(*LIMITS)
    share = (confidence.mean(1) - threshold) / (1 - threshold)
    mirror = numpy.full(len(points_px), TYPICAL_MIRROR)
    doubtful = share < SURE_SHARE
    # An .onnx that averages with the mirrored crop has no mirror error.
    if doubtful.any() and not (predictor.flip_test and predictor.model is None):
        errors = mirror_errors(predictor, image, points_px[doubtful])
        mirror[doubtful] = numpy.where(numpy.isfinite(errors), errors, TYPICAL_MIRROR)
    features = [share, numpy.log(mirror.clip(MIN_MIRROR)), numpy.log(network / (1 - network))]
    return 1 / (1 + numpy.exp(-(numpy.array(WEIGHTS) @ features + BIAS)))
