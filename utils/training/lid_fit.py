"""The lid head (nets/lids.py) fitted to faces whose state is known, and readings that it never saw.
"""
import dataclasses

import numpy
import scipy.optimize
import scipy.special
import torch
import tqdm

from nets.lids import SURE, LidHead
from utils.data.photo import read_photo
from utils.detection.refine import place_crops
from utils.drowsiness import eyes
from utils.landmarks import crop

# Each face is shown a few times, as a tracker's crops would have it: shifts as shares of the crop,
# and its size. The first is the crop by the rule.
JITTERS = ((0.0, 0.0, 1.0), (0.04, 0.03, 1.06), (-0.04, -0.03, 0.95))
# Of the weights, for features of deviation 1 and the mean loss; ten times as much or a tenth
# changes the area under the ROC curve by less than 0.001.
DECAY = 0.01
FOLDS = 10


def fit(predictor, readings):
    """(head, readings): a LidHead for the network of predictor, and the same readings as heads see
    them that were fitted without them, from which limits follow.

    predictor: of a .pt, without its lid head. readings: of testing.eyes.read_eyes with it. Faces
    next to each other in the list, often of one person, fall into one fold.
    """
    found = [i for i, r in enumerate(readings) if r.seen is not None]
    shut = numpy.array([readings[i].closed for i in found], bool)
    values = _features(predictor, [readings[i] for i in found])
    folds = numpy.zeros(len(found), int)
    for state in (True, False):
        which = numpy.flatnonzero(shut == state)
        folds[which] = numpy.arange(len(which)) * FOLDS // max(len(which), 1)
    head = LidHead(predictor.model.backbone.channels, predictor.scheme)
    unseen = numpy.zeros((len(found), len(head.bias)))
    with torch.no_grad():
        for fold in tqdm.tqdm(range(FOLDS), desc="folds", leave=False):
            known = folds != fold
            _regress(head, values[known], shut[known])
            unseen[~known] = head.probability(torch.from_numpy(values[~known, 0])).numpy()
        _regress(head, values, shut)
    drawn = list(readings)
    for i, shut in zip(found, unseen):
        drawn[i] = _drawn(readings[i], head, shut ** SURE, predictor)
    return head, drawn


def _features(predictor, readings):
    """What a LidHead reads of each face: (n, 2 * JITTERS, 2, D), as it is and mirrored."""
    model, size = predictor.model, predictor.input_size
    device = next(model.parameters()).device
    head = LidHead(model.backbone.channels, predictor.scheme).to(device)
    rows = []
    for reading in tqdm.tqdm(readings, desc="features", leave=False):
        photo = read_photo(reading.photo, upright=True)
        (box,), (roll,) = place_crops(predictor, reading.points_px[None])
        side = numpy.tile(box[2:] - box[:2], 2)
        crops = [crop.cut(photo, crop.grow(box + side * (dx, dy, dx, dy), grown), size, roll)
                 for dx, dy, grown in JITTERS]
        images = torch.from_numpy(numpy.stack([*crops, *(c[:, ::-1] for c in crops)]))
        with torch.inference_mode():
            features = model.backbone(model.normalise(images.permute(0, 3, 1, 2).to(device)))
            landmarks, _ = model.locate(features)
            rows.append(head.features_at(features, landmarks).cpu().numpy())
    return numpy.stack(rows)


def _regress(head, values, shut):
    """Fit head to features (n, views, 2, D) of faces that are shut (n,)."""
    for eye in range(values.shape[2]):
        weight, bias = _regression(values[:, :, eye], shut)
        head.weight[eye] = torch.from_numpy(weight)
        head.bias[eye] = float(bias)


def _regression(values, shut):
    """The weight (D,) and bias of one eye; each state counts as much as the other."""
    labels = numpy.repeat(shut, values.shape[1])
    values = values.reshape(len(labels), -1).astype(numpy.float64)
    mean, deviation = values.mean(0), values.std(0) + 1e-6
    values = (values - mean) / deviation
    share = numpy.where(labels, 0.5 / labels.sum(), 0.5 / (~labels).sum())
    sign = numpy.where(labels, 1.0, -1.0)

    def loss(parameters):
        margin = sign * (values @ parameters[:-1] + parameters[-1])
        slope = -share * sign * scipy.special.expit(-margin)
        gradient = numpy.append(values.T @ slope + DECAY * parameters[:-1], slope.sum())
        return (share @ numpy.logaddexp(0, -margin)
                + DECAY / 2 * (parameters[:-1] ** 2).sum()), gradient

    found = scipy.optimize.minimize(loss, numpy.zeros(values.shape[1] + 1), jac=True,
                                    method="L-BFGS-B").x
    weight = found[:-1] / deviation
    return weight, found[-1] - weight @ mean


def _drawn(reading, head, share, predictor):
    """A reading with its lids drawn together by share (2,)."""
    points = head.draw(torch.from_numpy(reading.points_px)[None], torch.from_numpy(share)[None])[0]
    points = points.numpy()
    return dataclasses.replace(reading, points_px=points, seen=eyes.look(
        points, reading.confidence, predictor.scheme, predictor.eyes))
