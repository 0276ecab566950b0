"""Train the network that tells open, looking-down and shut eyes apart (nets/eye_patch.py).

Few faces that look down are labelled. A landmark network has seen many more eyes: a linear
classifier on its backbone's features under the eye (as nets/lids.py has) generalises better than a
small network from random weights. The small network therefore also learns to predict these
features and the classifier's probabilities (distillation, Hinton et al., 2015; FitNets, Romero et
al., 2015).
"""
from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy
import scipy.optimize
import torch
import tqdm

from nets.eye_patch import EyePatchNet
from nets.lids import LidHead
from utils.data.photo import read_photo
from utils.detection.refine import place_crops
from utils.drowsiness.eye_patch import standardise
from utils.errors import UserError
from utils.landmarks import crop
from utils.training.eye_patch_data import STATES, Face, augment, cut_patches, plain

if TYPE_CHECKING:
    from utils.predictor import Predictor

EPOCHS, BATCH, RATE, WEIGHT_DECAY, LABEL_SMOOTHING = 36, 100, 4e-3, 0.02, 0.05
# Eyes drawn in an epoch: open ones, open ones that a model might confuse, looking down, shut. Eyes
# whose lids a script moves (--shut), partly or until they meet, add nothing: 15 instead of 12 % of
# the faces that look down and 1.6 instead of 2.1 % of the open ones are called shut.
DRAWN = (1500, 900, 1800, 1800)
# Principal components of the teacher's features, folds of its classifier, and its L2 penalty.
COMPONENTS, FOLDS, PENALTY = 48, 4, 0.01
# Share of the unlisted open eyes that the teacher's classifier is fitted to.
OPEN_SHARE = 0.15


@dataclasses.dataclass
class Eyes:
    """Eyes of faces, one row each.

    Attributes:
        faces: the Face of each.
        patches: (n, 72, 96, 3) uint8, see eye_patch_data.cut_patches.
        states: (n,) indices in STATES.
        sides: (n,) 0 for a right and 1 for a left eye.
        features: (n, D) of the teacher.
    """
    faces: list[Face]
    patches: numpy.ndarray
    states: numpy.ndarray
    sides: numpy.ndarray
    features: numpy.ndarray

    def part(self, name: str) -> Eyes:
        """Return the eyes of a part."""
        rows = [i for i, face in enumerate(self.faces) if face.part == name]
        return Eyes([self.faces[i] for i in rows], *(array[rows] for array in (
            self.patches, self.states, self.sides, self.features)))


def collect(faces: list[Face], landmarks: dict[str, numpy.ndarray], teacher: Predictor,
            features: dict[str, numpy.ndarray]) -> Eyes:
    """Cut the eyes of all faces with landmarks; see teacher_features for `features`."""
    rows, patches = [], []
    for face in tqdm.tqdm(faces, desc="patches", leave=False):
        if face.name in landmarks:
            both, usable = cut_patches(read_photo(face.path, upright=True), landmarks[face.name],
                                       teacher.scheme)
            rows += [(face, side) for side in numpy.flatnonzero(usable)]
            patches += [both[side] for side in numpy.flatnonzero(usable)]
    return Eyes([face for face, _ in rows], numpy.stack(patches),
                numpy.array([STATES.index(face.state) for face, _ in rows]),
                numpy.array([side for _, side in rows]),
                numpy.stack([features[face.name][side] for face, side in rows]))


def teacher_features(faces: list[Face], landmarks: dict[str, numpy.ndarray], teacher: Predictor
                     ) -> dict[str, numpy.ndarray]:
    """Return the features (2, D) under both eyes of each face with landmarks, by name.

    Raises:
        UserError: an .onnx, which gives no features.
    """
    if teacher.model is None:
        raise UserError(f"{teacher.path}: the teacher must be a .pt")
    model, found = teacher.model, {}
    head = LidHead(model.backbone.channels, teacher.scheme)
    for face in tqdm.tqdm(faces, desc="features", leave=False):
        if face.name not in landmarks:
            continue
        (box,), (roll,) = place_crops(teacher, landmarks[face.name][None])
        image = crop.cut(read_photo(face.path, upright=True), box, teacher.input_size, roll)
        with torch.inference_mode():
            maps = model.backbone(model.normalise(
                torch.from_numpy(image.transpose(2, 0, 1).copy())[None]))
            points, _ = model.predict_without_lids(maps)
            found[face.name] = head.eye_features(maps, points)[0].numpy().astype(numpy.float16)
    return found


def train(eyes: Eyes, seed: int = 0, epochs: int = EPOCHS,
          report: Callable[[int, float, EyePatchNet], None] | None = None) -> EyePatchNet:
    """Train a network on eyes.

    Args:
        eyes: to train on.
        seed: of everything random.
        epochs: number of epochs.
        report: is called after each epoch with its number, its mean loss and the network.

    Returns:
        The network in evaluation mode.
    """
    torch.manual_seed(seed)
    rng = numpy.random.default_rng(seed)
    components, probabilities = _teach(eyes, rng)
    network = EyePatchNet(components.shape[1])
    optimizer = torch.optim.AdamW(network.parameters(), RATE, weight_decay=WEIGHT_DECAY)
    listed = numpy.array([face.listed for face in eyes.faces])
    groups = [numpy.flatnonzero(group) for group in (
        eyes.states == 0, (eyes.states == 0) & listed, eyes.states == 1, eyes.states == 2)]
    if not all(len(group) for group in groups):
        raise UserError("the training faces lack a state: open, listed as open, down and shut are "
                        "needed")
    steps = sum(DRAWN) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=epochs * steps)
    for epoch in range(epochs):
        network.train()
        drawn = rng.permutation(numpy.concatenate(
            [rng.choice(group, count) for group, count in zip(groups, DRAWN)]))
        total = 0.0
        for start in range(0, steps * BATCH, BATCH):
            rows = drawn[start:start + BATCH]
            patches = standardise(numpy.stack([augment(eyes.patches[i], rng) for i in rows]))
            loss = _loss(network(torch.from_numpy(patches)), torch.from_numpy(eyes.states[rows]),
                         components[rows], probabilities[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() / steps
        network.eval()
        if report:
            report(epoch + 1, total, network)
    return network


def _loss(outputs, states, components, probabilities):
    """Cross-entropy with the labels and with the teacher, and the error of its components."""
    logits, predicted = outputs
    function = torch.nn.functional
    return (function.cross_entropy(logits, states, label_smoothing=LABEL_SMOOTHING)
            + function.cross_entropy(logits, probabilities)
            + function.smooth_l1_loss(predicted, components))


def _teach(eyes, rng):
    """Return the teacher's components (n, COMPONENTS) and probabilities (n, 3) as tensors.

    The probabilities of a face are of classifiers that were fitted to other faces.
    """
    features = eyes.features.astype(numpy.float32)
    features = (features - features.mean(0)) / (features.std(0) + 1e-3)
    sample = features[rng.choice(len(features), min(4000, len(features)), replace=False)]
    _, values, axes = numpy.linalg.svd(sample, full_matrices=False)
    count = min(COMPONENTS, len(values))
    components = features @ axes[:count].T / (values[:count] / len(sample) ** 0.5 + 1e-6)
    fold = numpy.array([zlib.crc32(face.name.encode()) % FOLDS for face in eyes.faces])
    listed = numpy.array([face.listed for face in eyes.faces])
    used = (eyes.states > 0) | listed | (rng.random(len(listed)) < OPEN_SHARE)
    logits = numpy.zeros((len(features), len(STATES)), numpy.float32)
    for side in (0, 1):
        for held_out in range(FOLDS):
            rows = (eyes.sides == side) & (fold != held_out) & used
            weight = _softmax_regression(features[rows], eyes.states[rows])
            rows = (eyes.sides == side) & (fold == held_out)
            logits[rows] = features[rows] @ weight[:, :-1].T + weight[:, -1]
    return (torch.from_numpy(components.astype(numpy.float32)),
            torch.softmax(torch.from_numpy(logits), 1))


def _softmax_regression(features, states):
    """Return weights (3, D + 1) of a classifier; each state has the same total weight."""
    rows, count = numpy.arange(len(states)), len(STATES)
    share = (1 / numpy.maximum(numpy.bincount(states, minlength=count), 1))[states] / count
    labels = numpy.eye(count, dtype=numpy.float32)[states]

    def loss(parameters):
        weight = parameters.reshape(count, -1)
        logits = features @ weight[:, :-1].T + weight[:, -1]
        logits -= logits.max(1, keepdims=True)
        probability = numpy.exp(logits)
        probability /= probability.sum(1, keepdims=True)
        error = (probability - labels) * share[:, None]
        gradient = numpy.concatenate([error.T @ features + PENALTY * weight[:, :-1],
                                      error.sum(0)[:, None]], 1)
        return (-(share * numpy.log(probability[rows, states] + 1e-12)).sum()
                + PENALTY / 2 * (weight[:, :-1] ** 2).sum(), gradient.ravel())

    start = numpy.zeros(count * (features.shape[1] + 1))
    return scipy.optimize.minimize(loss, start, jac=True, method="L-BFGS-B",
                                   options={"maxiter": 40}).x.reshape(count, -1)


def score(network: EyePatchNet, eyes: Eyes) -> dict[str, float]:
    """Score faces by the mean logits of their eyes.

    Returns:
        In %: `down_called_shut` and `open_called_shut` at the threshold that finds 97 % of the shut
        faces, and `accuracy_open` ... of the largest logit.
    """
    with torch.no_grad():
        logits = network(torch.from_numpy(standardise(numpy.stack(
            [plain(patch) for patch in eyes.patches]))))[0].numpy()
    names = numpy.array([face.name for face in eyes.faces])
    _, first, index = numpy.unique(names, return_index=True, return_inverse=True)
    means = numpy.zeros((len(first), len(STATES)))
    numpy.add.at(means, index, logits)
    means /= numpy.bincount(index)[:, None]
    states = eyes.states[first]
    shut = means[:, 2] - numpy.logaddexp(means[:, 0], means[:, 1])
    limit = numpy.percentile(shut[states == 2], 3)
    return {f"{name}_called_shut": 100 * float((shut[states == i] > limit).mean())
            for i, name in enumerate(STATES[:2])} | {
        f"accuracy_{name}": 100 * float((means[states == i].argmax(1) == i).mean())
        for i, name in enumerate(STATES)}
