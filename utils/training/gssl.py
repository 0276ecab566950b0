"""Self-training on faces without landmarks: pseudo-labels, training lists and losses of rounds.

A supervised stage trains on the labelled faces. Each round after it (stages.py) adds the unlabelled
faces, with pseudo-labels that the network of the stage before predicts. PIPNet (arXiv 2003.03771),
section 3.5, gives the curriculum of `--gssl-preset paper`.
"""
from __future__ import annotations

import argparse
import math
import pathlib
import typing
from collections.abc import Callable, Sequence

import cv2
import numpy
import torch

from nets.head import CoarseMaps, Maps
from nets.model import LandmarkNet
from utils import checkpoint, draw, experiment
from utils.data import unlabelled
from utils.data.augment import pixel_matrix
from utils.data.dataset import FaceDataset, PreparedSet
from utils.data.face_list import FaceList
from utils.data.sets import set_folder
from utils.errors import UserError
from utils.evaluation import predict
from utils.landmarks.schemes import Scheme, model_scheme
from utils.training.ddp import Ranks
from utils.training.loss import PIPLoss
from utils.training.stages import Stage

COARSE = {"cls2": 2, "cls3": 4}  # Grid cells on a side of one cell of the coarse map.
# Arrays of a pseudo-label file, in the order of `label`.
LABELS = ("points", "confidence", "spread")
SHEET_SIZE = 224  # Side in pixels of a face on the sheet of pseudo-labels.


class RoundLoss:
    """PIP loss of a round: labelled faces train all maps, unlabelled ones those of the task.

    Landmarks that are NaN do not count.

    Attributes:
        loss: PIPLoss.
        task: of the round.
        labelled: number of faces with labels, which are the first of the training list.
    """

    def __init__(self, loss: PIPLoss, task: str, labelled: int):
        self.loss, self.task, self.labelled = loss, task, labelled

    def terms(self, predicted: Maps | CoarseMaps, landmarks: torch.Tensor,
              indices: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the unweighted terms as scalars, see PIPLoss.terms.

        Args:
            predicted: output of the head.
            landmarks: (N, K, 2) in crop units.
            indices: (N,) of the faces in the training list.
        """
        return self.loss.terms(predicted, landmarks.nan_to_num(),
                               *self._masks(predicted, landmarks, indices))

    def __call__(self, predicted: Maps | CoarseMaps, landmarks: torch.Tensor,
                 indices: torch.Tensor) -> torch.Tensor:
        """Return the scalar loss; arguments as in `terms`."""
        return self.loss(predicted, landmarks.nan_to_num(), indices,
                         *self._masks(predicted, landmarks, indices))

    def _masks(self, predicted, landmarks, indices):
        """Return masks (N, K) of the landmarks that count: for the fine and each coarse map."""
        known = ~landmarks.isnan().any(-1)
        pseudo = (indices.to(landmarks.device, non_blocking=True) >= self.labelled)[:, None]
        coarse = None
        if hasattr(predicted, "maps"):
            coarse = {task: known & pseudo if task == self.task else torch.zeros_like(known)
                      for task in COARSE}
        return known & ~pseudo if self.task in COARSE else known, coarse


class View:
    """A fixed mirroring and rotation of the nominal crop, in place of FaceDataset's augmentation.

    Args:
        mirror: whether to mirror horizontally.
        degrees: rotation.
    """

    def __init__(self, mirror: bool, degrees: float):
        self.mirror = mirror
        cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        self.linear = numpy.array([[cos, -sin], [sin, cos]]) @ numpy.diag([-1 if mirror else 1, 1])

    def __call__(self, stored: numpy.ndarray, landmarks: numpy.ndarray, margin: float, size: int,
                 rng: typing.Any) -> tuple[numpy.ndarray, numpy.ndarray]:
        """Warp a stored crop (T, T, 3) to the view (size, size, 3); landmarks stay in place."""
        matrix = pixel_matrix(self.linear, numpy.zeros(2), margin, stored.shape[0], size)
        image = cv2.warpAffine(stored, matrix, (size, size), flags=cv2.INTER_LINEAR)
        return image, landmarks.astype(numpy.float32)

    def invert(self, landmarks: numpy.ndarray, flip: Sequence[int]) -> numpy.ndarray:
        """Map landmarks (N, K, 2) from the view to crop units of the nominal crop.

        Args:
            landmarks: predicted in the view.
            flip: index of each landmark's mirror image (Scheme.flip).
        """
        landmarks = (landmarks - 0.5) @ numpy.linalg.inv(self.linear).T + 0.5
        return landmarks[:, flip] if self.mirror else landmarks


def label(model: LandmarkNet, faces: FaceList, margin: float, size: int, views: Sequence,
          ranks: Ranks, workers: int = 0) -> tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]:
    """Predict pseudo-labels of a list. All ranks must call this.

    Args:
        model: network in evaluation mode, on the ranks' device.
        faces: list to label.
        margin: of its stored crops.
        size: side of the network's input in pixels.
        views: (mirrored, degrees) of the views to average over.
        ranks: process group.
        workers: loader processes.

    Returns:
        On every rank: points (N, K, 2) in crop units, confidence (N, K), and spread (N, K), the
        mean distance of the views' landmarks from their mean in crop units.
    """
    flip = model.scheme.flip

    @torch.inference_mode()
    def landmarks_and_confidence(images):
        landmarks, confidence = model.predict(images.to(ranks.device))
        return torch.cat([landmarks, confidence[..., None]], -1).float().cpu().numpy()

    found, confidence = [], []
    for mirror, degrees in views:
        if mirror and not model.scheme.mirrors:
            continue
        view = View(mirror, degrees)
        out = predict.predict_list(landmarks_and_confidence, faces, margin, size, workers=workers,
                                   ranks=ranks, augmentation=view)
        found.append(view.invert(out[..., :2], flip))
        confidence.append(out[:, flip, 2] if mirror else out[..., 2])
    points = numpy.mean(found, 0)
    spread = numpy.linalg.norm(numpy.array(found) - points, axis=-1).mean(0)
    return points, numpy.mean(confidence, 0), spread


def round_faces(folder: pathlib.Path, stage: Stage, labeller: LandmarkNet | None,
                labelled: FaceList, unlabelled: FaceList, prepared: PreparedSet, scheme: Scheme,
                args: argparse.Namespace, ranks: Ranks) -> tuple[FaceList, int]:
    """Build the training list of a round of self-training. All ranks must call this.

    Args:
        folder: of the experiment, which keeps the pseudo-labels.
        stage: the round.
        labeller: network that labels the unlabelled faces. None in a resumed round, which reads
            the labels it started with.
        labelled: labelled training faces.
        unlabelled: faces without labels.
        prepared: set of the labelled faces.
        scheme: landmarks to train.
        args: settings of the round.
        ranks: process group.

    Returns:
        The list, and how many of its first faces have labels.

    Raises:
        UserError: if the pseudo-labels of a resumed round are missing or of other faces.
    """
    make = None if labeller is None else lambda: label(
        labeller.to(ranks.device).eval(), unlabelled, prepared.margin, args.input_size, stage.views,
        ranks, args.workers)
    path = folder / f"pseudo-{stage.number}.pt"
    points, confidence, spread = load_or_create_labels(path, make, unlabelled, ranks)
    if args.dump_pseudo:
        path = ranks.broadcast_result(dump, folder, unlabelled, prepared.margin, scheme,
                                      args.dump_pseudo)
        if ranks.is_main:
            print(f"{path}: the least confident faces and their pseudo-labels")
    known = reject_doubtful(points, confidence, spread, stage.keep_share)
    return join(labelled, unlabelled, known, scheme.indices, stage.labelled_share)


def load_or_create_labels(path: pathlib.Path, make: Callable | None, faces: FaceList,
                          ranks: Ranks) -> list[numpy.ndarray]:
    """Read pseudo-labels from a file, or make and write them. All ranks must call this.

    A round's labels are written once, so that a resumed round continues with the same ones.

    Args:
        path: pseudo-<round>.pt.
        make: computes the labels (see `label`), called on all ranks if there is no file; None if
            the file must exist.
        faces: the unlabelled faces, whose file names must be those in the file.
        ranks: process group.

    Returns:
        points, confidence and spread as `label` returns them.

    Raises:
        UserError: if the file has the labels of other faces, or is missing without `make`.
    """
    names = [image.name for image in faces.images]
    state = ranks.broadcast_result(lambda: checkpoint.read(path) if path.is_file() else None)
    if state is None:
        if make is None:
            raise UserError(f"{path}: is missing, and this round trains on it; train anew with "
                            f"another --exp")
        # float32 as in the file, because a resumed round must see the same numbers.
        values = [torch.from_numpy(value).float() for value in make()]
        state = {"format": checkpoint.FORMAT, "images": names, **dict(zip(LABELS, values))}
        ranks.broadcast_result(checkpoint.save, state, path)
    if state.get("images") != names:
        raise UserError(f"{path}: has labels of other faces than --unlabelled-dir has now; train "
                        f"anew with another --exp")
    return [state[name].double().numpy() for name in LABELS]


def reject_doubtful(points: numpy.ndarray, confidence: numpy.ndarray, spread: numpy.ndarray,
                    keep_share: float) -> numpy.ndarray:
    """Set the most doubtful pseudo-labels to NaN.

    Doubt is spread minus confidence, each relative to its landmark's mean. The share is kept of
    each landmark, so that hard landmarks, whose spread is always larger, remain as frequent as easy
    ones.

    Args:
        points: (N, K, 2).
        confidence: (N, K).
        spread: (N, K) in crop units.
        keep_share: share of the faces to keep of each landmark, above 0 to 1.

    Returns:
        Points (N, K, 2).
    """
    doubt = spread / _positive(spread.mean(0)) - confidence / _positive(confidence.mean(0))
    limit = numpy.sort(doubt, 0)[math.ceil(keep_share * len(doubt)) - 1]
    return numpy.where((doubt <= limit)[..., None], points, numpy.nan)


def _positive(values):
    return numpy.where(values > 0, values, 1)


def join(labelled: FaceList, unlabelled: FaceList, points: numpy.ndarray,
         indices: Sequence[int] | None = None, share: float = 0.0) -> tuple[FaceList, int]:
    """Join labelled and pseudo-labelled faces to one list.

    Args:
        labelled: come first, repeated a whole number of times up to `share` of the list.
        unlabelled: follow.
        points: pseudo-labels (N, K, 2) of the unlabelled faces.
        indices: which of the set's landmarks these are; None for all.
        share: least share of labelled faces.

    Returns:
        The list, and how many of its first faces have labels.
    """
    count = len(labelled) * repeats(len(labelled), len(unlabelled), share)
    first = labelled.select(numpy.resize(numpy.arange(len(labelled)), count))
    known = unlabelled.points.copy()
    known[:, slice(None) if indices is None else list(indices)] = points
    faces = FaceList([*first.images, *unlabelled.images],
                     numpy.concatenate([first.points, known]),
                     numpy.concatenate([first.boxes, unlabelled.boxes]),
                     numpy.concatenate([first.published, unlabelled.published]), None)
    return faces, count


def repeats(labelled: int, unlabelled: int, share: float) -> int:
    """Return how often labelled faces are repeated to be at least `share` of a list, 1 or more."""
    return max(1, math.ceil(share / (1 - share) * unlabelled / labelled))


def dump(folder: pathlib.Path, faces: FaceList, margin: float, scheme: Scheme,
         count: int) -> pathlib.Path:
    """Draw an experiment's newest pseudo-labels to pseudo-<round>.jpg; return its path.

    Captions are the mean confidence and the spread in % of the crop.

    Args:
        folder: of the experiment.
        faces: the unlabelled list.
        margin: of its stored crops.
        scheme: of the model.
        count: number of faces to draw, least confident first.

    Raises:
        UserError: if there are no pseudo-labels yet.
    """
    found = sorted(folder.glob("pseudo-*.pt"), key=lambda p: int(p.stem.split("-")[1]))
    if not found:
        raise UserError(f"{folder}: has no pseudo-labels yet; train it with --gssl")
    points, confidence, spread = load_or_create_labels(found[-1], None, faces, Ranks())
    size, dataset = SHEET_SIZE, FaceDataset(faces, margin, SHEET_SIZE)
    worst = numpy.argsort(confidence.mean(1), kind="stable")[:count]
    images = [draw.landmarks(dataset[int(i)][0].numpy(), points[i] * size - 0.5, scheme,
                             confidence[i], radius=2) for i in worst]
    captions = [f"{confidence[i].mean():.2f} +-{100 * spread[i].mean():.1f} {faces.images[i].stem}"
                for i in worst]
    path = found[-1].with_suffix(".jpg")
    draw.save(path, draw.sheet(images, 8, size, captions))
    return path


def dump_pseudo(args: argparse.Namespace) -> None:
    """Draw the newest pseudo-labels of an experiment, given the settings it was trained with.

    Raises:
        UserError: if there are none, or of other faces.
    """
    folder = experiment.find_experiment(args.exp)
    prepared = PreparedSet(set_folder(args))
    scheme = model_scheme(args.scheme, prepared.scheme)
    faces = unlabelled.read(args.unlabelled_dir, prepared)
    print(dump(folder, faces, prepared.margin, scheme, args.dump_pseudo))
