"""Self-training on faces without landmarks: rounds, their tasks, pseudo-labels and losses.

A round is a training with another list and loss: the labelled faces, and the unlabelled ones as the
network of the round before labels them. The curriculum is PIPNet's (arXiv 2003.03771, section 3.5).
"""
import argparse
import dataclasses
import math

import cv2
import numpy
import torch

from utils import checkpoint, draw, experiment
from utils.data import unlabelled
from utils.data.augment import pixel_matrix
from utils.data.dataset import FaceDataset, FaceList, PreparedSet
from utils.data.sets import set_folder
from utils.errors import UserError
from utils.evaluation import predict
from utils.landmarks.schemes import model_scheme
from utils.training.ddp import Ranks

# What the unlabelled faces teach: only the 2x2 score map of an 8x8 grid, only the 4x4 one, or all
# that labelled faces teach.
PAPER = ("cls3", "cls2", "std", "std", "std")
COARSE = {"cls2": 2, "cls3": 4}  # How many cells of the grid are one cell of the coarse map.
# (mirrored, degrees): the copies of a face whose mean is its pseudo-label in the default preset.
VIEWS = ((False, 0), (True, 0), (False, 15), (True, -15), (False, -15), (True, 15))
# In the default preset labelled faces are repeated until they are this share of a round's list,
# and a step has so many times the faces: as many labelled ones as before, and others beside them.
LABELLED, LARGER = 1 / 2, 2
SHEET_SIZE = 224  # Side in pixels of a face on the sheet of pseudo-labels.


@dataclasses.dataclass(frozen=True)
class Round:
    """One training of the plan.

    task: `supervised`, or what the unlabelled faces teach (std, cls2, cls3). epochs: its length.
    first: its first epoch in the numbering through all rounds. fresh: whether it starts from new
    weights and not from the round before. views: of the pseudo-labels. keep: share of them, see
    `agreed`. labelled: least share of labelled faces. start_epoch, cosine_epochs: epochs of
    its learning-rate cosine that are before it, and all of them (None: its own; 0: no cosine, the
    rate stays at its peak and the next rounds bring it down). batches: how many times the faces of
    effective_batch are in a step.
    """
    number: int
    task: str
    epochs: int
    first: int
    fresh: bool = True
    views: tuple = VIEWS[:1]
    keep: float = 1.0
    labelled: float = 0.0
    start_epoch: int = 0
    cosine_epochs: int | None = None
    batches: int = 1

    def args(self, args):
        """The args of this round: its epochs, of which the warm-up is the same share in all
        rounds that start anew, and a seed so that no two draw alike.
        """
        warm_up = args.warmup_epochs * self.epochs / args.epochs if self.fresh else 0.0
        return argparse.Namespace(**{
            **vars(args), "epochs": self.epochs, "seed": args.seed + 100003 * self.number,
            "effective_batch": self.batches * args.effective_batch,
            "warmup_epochs": warm_up,
            "min_lr": args.lr if self.cosine_epochs == 0 else args.min_lr})


def plan(args):
    """The Rounds that args ask for; a single one without gssl. Raises UserError."""
    rounds = [Round(0, "supervised", args.epochs, 0)]
    if not args.gssl:
        return rounds
    if args.head != "pip":
        raise UserError(f"--gssl trains the maps of the pip head, not head: {args.head}")
    grid = args.input_size // args.stride
    if args.gssl_preset == "paper" and grid % 4:
        raise UserError(f"gssl_preset: paper needs score maps of a half and a quarter of the grid; "
                        f"input_size {args.input_size} with stride {args.stride} gives {grid} x "
                        f"{grid} cells, which 4 does not divide")
    if args.gssl_preset == "paper":
        epochs = args.gssl_epochs or args.epochs
        return rounds + [Round(i, task, epochs, args.epochs + (i - 1) * epochs)
                         for i, task in enumerate(PAPER, 1)]
    half = math.ceil(args.epochs / 2)
    epochs = args.gssl_epochs or math.ceil(half / args.gssl_rounds)
    number = args.gssl_rounds if args.gssl_epochs else math.ceil(half / epochs)
    # One training in all but its labels, which are made anew often: in equal steps, few long rounds
    # that began from the average learned less, and so did rounds with a cosine each.
    return [dataclasses.replace(rounds[0], cosine_epochs=0)] + [
        Round(i, "std", epochs, args.epochs + (i - 1) * epochs, False, VIEWS, args.gssl_keep,
              LABELLED, (i - 1) * epochs, number * epochs, LARGER)
        for i in range(1, number + 1)]


# What is known of a face without labels, in the order of `label`.
LABELS = ("points", "confidence", "spread")


class RoundLoss:
    """The PIP loss of a round: labelled faces have the standard task, the others the round's.

    loss: a loss.PIPLoss. labelled: how many faces of the list, its first, have labels. A landmark
    that is NaN is unknown and teaches nothing.
    """

    def __init__(self, loss, task, labelled):
        self.loss, self.task, self.labelled = loss, task, labelled

    def terms(self, predicted, landmarks, indices):
        """The unweighted terms as a dict of scalars, see loss.PIPLoss.terms.

        predicted: head.Maps or head.CoarseMaps. landmarks (N, K, 2). indices (N,): in the list.
        """
        return self.loss.terms(predicted, landmarks.nan_to_num(),
                               *self._masks(predicted, landmarks, indices))

    def __call__(self, predicted, landmarks, indices):
        return self.loss(predicted, landmarks.nan_to_num(), indices,
                         *self._masks(predicted, landmarks, indices))

    def _masks(self, predicted, landmarks, indices):
        """Which landmarks count (N, K), and for which coarse map, where there are such maps."""
        known = ~landmarks.isnan().any(-1)
        pseudo = (indices.to(landmarks.device, non_blocking=True) >= self.labelled)[:, None]
        coarse = None
        if hasattr(predicted, "maps"):
            coarse = {task: known & pseudo if task == self.task else torch.zeros_like(known)
                      for task in COARSE}
        return known & ~pseudo if self.task in COARSE else known, coarse


class View:
    """A fixed mirroring and rotation of the nominal crop, in the place of FaceDataset's augment."""

    def __init__(self, mirror, degrees):
        self.mirror = mirror
        cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        self.linear = numpy.array([[cos, -sin], [sin, cos]]) @ numpy.diag([-1 if mirror else 1, 1])

    def __call__(self, stored, landmarks, margin, size, rng):
        """A stored crop (T, T, 3) to the view (size, size, 3); landmarks (K, 2) are not moved."""
        matrix = pixel_matrix(self.linear, numpy.zeros(2), margin, stored.shape[0], size)
        image = cv2.warpAffine(stored, matrix, (size, size), flags=cv2.INTER_LINEAR)
        return image, landmarks.astype(numpy.float32)

    def back(self, landmarks, flip):
        """Landmarks (N, K, 2) found in the view, in crop units of the nominal crop."""
        landmarks = (landmarks - 0.5) @ numpy.linalg.inv(self.linear).T + 0.5
        return landmarks[:, flip] if self.mirror else landmarks


def label(model, faces, margin, size, views, ranks, workers=0):
    """Pseudo-labels of a FaceList, on every rank: (points (N, K, 2) in crop units, confidence
    (N, K), spread (N, K): mean distance of the views' landmarks from their mean, in crop units).

    model: a LandmarkNet in evaluation mode, on the ranks' device.
    """
    flip = model.scheme.flip

    @torch.inference_mode()
    def function(images):
        landmarks, confidence = model.predict(images.to(ranks.device))
        return torch.cat([landmarks, confidence[..., None]], -1).float().cpu().numpy()

    found, confidence = [], []
    for mirror, degrees in views:
        if mirror and not model.scheme.mirrors:
            continue
        view = View(mirror, degrees)
        out = predict.predict_list(function, faces, margin, size, workers=workers, ranks=ranks,
                                      augmentation=view)
        found.append(view.back(out[..., :2], flip))
        confidence.append(out[:, flip, 2] if mirror else out[..., 2])
    points = numpy.mean(found, 0)
    spread = numpy.linalg.norm(numpy.array(found) - points, axis=-1).mean(0)
    return points, numpy.mean(confidence, 0), spread


def round_faces(folder, round, labeller, labelled, unlabelled, prepared, scheme, args, ranks):
    """The list that a Round trains on: (FaceList, how many of its first faces have labels).

    labeller: the LandmarkNet that labels the unlabelled faces, or None in a resumed round, which
    goes on with the labels it began with. args: the round's. Raises UserError.
    """
    make = None if labeller is None else lambda: label(
        labeller.to(ranks.device).eval(), unlabelled, prepared.margin, args.input_size, round.views,
        ranks, args.workers)
    path = folder / f"pseudo-{round.number}.pt"
    points, confidence, spread = pseudo_labels(path, make, unlabelled, ranks)
    if args.dump_pseudo:
        path = ranks.share(dump, folder, unlabelled, prepared.margin, scheme, args.dump_pseudo)
        if ranks.first:
            print(f"{path}: the least confident faces and their pseudo-labels")
    known = agreed(points, confidence, spread, round.keep)
    return join(labelled, unlabelled, known, scheme.indices, round.labelled)


def pseudo_labels(path, make, faces, ranks):
    """(points, confidence, spread) of `label`, from the file at path, or made and written there.

    make: gives them; None where the file must be there. A round's labels are written once, so that
    it goes on with the same ones when it is resumed. Raises UserError where the file is of other
    faces, or gone.
    """
    names = [image.name for image in faces.images]
    state = ranks.share(lambda: checkpoint.read(path) if path.is_file() else None)
    if state is None:
        if make is None:
            raise UserError(f"{path}: is gone, and this round trains on it; train anew with "
                            f"another --exp")
        # Single precision, as it is in the file: a resumed round must see the very same numbers.
        values = [torch.from_numpy(value).float() for value in make()]
        state = {"format": checkpoint.FORMAT, "images": names, **dict(zip(LABELS, values))}
        ranks.share(checkpoint.save, state, path)
    if state.get("images") != names:
        raise UserError(f"{path}: has labels of other faces than --unlabelled-dir has now; train "
                        f"anew with another --exp")
    return [state[name].double().numpy() for name in LABELS]


def agreed(points, confidence, spread, keep):
    """Points (N, K, 2) with NaN where the views agree least and are least confident.

    Spread (N, K) and confidence (N, K) count alike, each against its landmark's mean. Of each
    landmark the share `keep` of the faces is kept, so that the hard landmarks, whose spread is
    always larger, are taught as often as the easy ones.
    """
    doubt = spread / _positive(spread.mean(0)) - confidence / _positive(confidence.mean(0))
    limit = numpy.sort(doubt, 0)[math.ceil(keep * len(doubt)) - 1]
    return numpy.where((doubt <= limit)[..., None], points, numpy.nan)


def _positive(values):
    return numpy.where(values > 0, values, 1)


def join(labelled, unlabelled, points, indices=None, share=0.0):
    """(one FaceList, how many of its first faces have labels).

    The labelled faces come first, repeated a whole number of times until they are at least `share`
    of the list; the unlabelled ones follow with `points` (N, K, 2), which are the points `indices`
    of the set (None: all).
    """
    count = len(labelled) * repeats(len(labelled), len(unlabelled), share)
    first = labelled.take(numpy.resize(numpy.arange(len(labelled)), count))
    known = unlabelled.points.copy()
    known[:, slice(None) if indices is None else list(indices)] = points
    faces = FaceList([*first.images, *unlabelled.images],
                     numpy.concatenate([first.points, known]),
                     numpy.concatenate([first.boxes, unlabelled.boxes]),
                     numpy.concatenate([first.published, unlabelled.published]), None)
    return faces, count


def repeats(labelled, unlabelled, share):
    """How often so many labelled faces stand in a list to be at least `share` of it, or once."""
    return max(1, math.ceil(share / (1 - share) * unlabelled / labelled))


def dump(folder, faces, margin, scheme, count):
    """Write pseudo-<round>.jpg of the experiment's newest pseudo-labels; returns its path.

    It shows `count` faces, the least confident first, with their mean confidence and the mean
    distance between the views in % of the crop. scheme: the model's. Raises UserError where no
    round has labelled them yet.
    """
    found = sorted(folder.glob("pseudo-*.pt"), key=lambda p: int(p.stem.split("-")[1]))
    if not found:
        raise UserError(f"{folder}: has no pseudo-labels yet; train it with --gssl")
    points, confidence, spread = pseudo_labels(found[-1], None, faces, Ranks())
    size, dataset = SHEET_SIZE, FaceDataset(faces, margin, SHEET_SIZE)
    worst = numpy.argsort(confidence.mean(1), kind="stable")[:count]
    images = [draw.landmarks(dataset[int(i)][0].numpy(), points[i] * size - 0.5, scheme,
                             confidence[i], radius=2) for i in worst]
    captions = [f"{confidence[i].mean():.2f} +-{100 * spread[i].mean():.1f} {faces.images[i].stem}"
                for i in worst]
    path = found[-1].with_suffix(".jpg")
    draw.save(path, draw.sheet(images, 8, size, captions))
    return path


def dump_pseudo(args):
    """Draw the newest pseudo-labels of an experiment; args: those it was trained with."""
    folder = experiment.find_experiment(args.exp)
    prepared = PreparedSet(set_folder(args))
    scheme = model_scheme(args.scheme, prepared.scheme)
    faces = unlabelled.read(args.unlabelled_dir, prepared)
    print(dump(folder, faces, prepared.margin, scheme, args.dump_pseudo))
