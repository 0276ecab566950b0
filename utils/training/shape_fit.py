"""Fit the shape head: a linear correction of a trained network's landmarks (nets/shape.py).

`main.py --fit-shape` predicts the training faces, regresses the residuals on the predicted shapes,
and chooses the ridge penalty on the validation list. The head is stored in the .pt if it lowers the
validation NME.
"""
from __future__ import annotations

import argparse

import numpy
import torch

from nets.model import LandmarkNet
from nets.shape import ShapeHead
from utils import checkpoint, experiment, machine
from utils.data.augment import Augment
from utils.data.dataset import FaceDataset, PreparedSet
from utils.data.sets import set_folder
from utils.errors import UserError
from utils.evaluation import predict
from utils.landmarks import crop, schemes

# Ridge penalties to try, per face.
RIDGES = tuple(10.0 ** power for power in numpy.arange(-7, -2.9, 0.5))
# Augmented views of each training face. More views do not lower the NME.
VIEWS = 2


def fit_weights(args: argparse.Namespace) -> bool:
    """Fit a shape head to a .pt; store it if it lowers the validation NME.

    Args:
        args: resolved settings: `exp` names the weights, `data_dir` the set with training and
            validation faces.

    Returns:
        Whether the .pt was changed and an ONNX file lies beside it, which must be exported again.

    Raises:
        UserError: where weights or faces are missing or do not fit each other.
    """
    path = experiment.find_weights(args.exp).with_suffix(".pt")
    prepared = PreparedSet(set_folder(args))
    model = checkpoint.load_model(path, machine.choose_device(args.device), lids=False, shape=False)
    model.flip_test = False  # Fit to the prediction of one image.
    schemes.check_scheme(model.scheme, prepared.scheme, str(path))
    lists = [prepared.lists.get(name) for name in ("train", "val")]
    if not all(lists):
        raise UserError(f"{prepared.folder}: has no {'train' if not lists[0] else 'validation'} "
                        f"faces; --fit-shape needs both")
    head, before, after = fit_head(model, prepared, args.workers)
    if head is None:
        print(f"shape head of {path}: not stored, it does not lower the validation NME "
              f"({100 * before:.3f} %, {100 * after:.3f} % with it)")
        return False
    print(f"shape head of {path}: validation NME {100 * after:.3f} %, {100 * before:.3f} % "
          f"without it")
    checkpoint.save(checkpoint.with_head(checkpoint.read(path), "shape", head), path)
    experiment.record_fit(path, 100 * after, experiment.data_name(args, prepared.folder))
    return path.with_suffix(".onnx").is_file()


def fit_head(model: LandmarkNet, prepared: PreparedSet,
             workers: int = 0) -> tuple[ShapeHead | None, float, float]:
    """Fit a shape head on the training list and choose its penalty on the validation list.

    Args:
        model: of checkpoint.load_model, without fitted heads.
        prepared: the set.
        workers: processes of the data loader.

    Returns:
        The head, or None where it does not lower the validation NME; this NME without and with the
        head, as fractions.

    Raises:
        UserError: where no training face has all landmarks.
    """
    function = predict.torch_predict(model, next(model.parameters()).device)
    indices = None if model.scheme.base is None else list(model.scheme.indices)
    train, val = prepared.lists["train"], prepared.lists["val"]
    points = train.points if indices is None else train.points[:, indices]
    complete = train.select(numpy.flatnonzero(numpy.isfinite(points).all((1, 2))))
    if not len(complete):
        raise UserError(f"{prepared.folder}: no training face has all landmarks, which --fit-shape "
                        f"needs")
    # Errors under an occlusion say nothing of the other landmarks. Without mirroring, the head can
    # learn a left-right bias of the labels, which a network trained on mirrored faces averages out.
    settings = argparse.Namespace(**{**vars(model.args), "occlusion": 0.0, "shut": 0.0})
    augment = Augment(settings, flip=None)
    predicted, truth = [], []
    crop.disable_opencv_threads()
    for view in range(VIEWS):
        dataset = FaceDataset(complete, prepared.margin, model.input_size, indices, augment, view)
        loader = torch.utils.data.DataLoader(dataset, 32, num_workers=workers)
        for images, landmarks, *_ in machine.start_workers(loader):
            predicted.append(function(images.permute(0, 3, 1, 2)))
            truth.append(landmarks.numpy())
    shapes, residuals = _normalise(numpy.concatenate(predicted), numpy.concatenate(truth))
    plain = predict.predict_list(function, val, prepared.margin, model.input_size, workers=workers)

    def nme(landmarks):
        return float(numpy.nanmean(predict.list_nme(landmarks, val, model.scheme,
                                                    prepared.scheme)[0]))

    heads = [ridge_regression(shapes, residuals, ridge) for ridge in RIDGES]
    with torch.no_grad():
        scores = [nme(head(torch.from_numpy(plain).float()).double().numpy()) for head in heads]
    before, best = nme(plain), int(numpy.argmin(scores))
    return heads[best] if scores[best] < before else None, before, scores[best]


def ridge_regression(shapes: numpy.ndarray, residuals: numpy.ndarray, ridge: float) -> ShapeHead:
    """Fit a ShapeHead by least squares from shapes to residuals, both (n, 2K) float64."""
    mean, offset = shapes.mean(0), residuals.mean(0)
    centred = shapes - mean
    penalty = ridge * len(shapes) * numpy.eye(shapes.shape[1])
    weight = numpy.linalg.solve(centred.T @ centred + penalty, centred.T @ (residuals - offset))
    head = ShapeHead(shapes.shape[1] // 2)
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(weight))
        head.bias.copy_(torch.from_numpy(offset - mean @ weight))
    return head


def _normalise(predicted, truth):
    """Return shapes about their mean and residuals, (n, 2K) float64, both over the shape's norm."""
    predicted, truth = (landmarks.astype(numpy.float64) for landmarks in (predicted, truth))
    shapes = predicted - predicted.mean(1, keepdims=True)
    norm = numpy.sqrt((shapes ** 2).sum((1, 2), keepdims=True))
    return ((values / norm).reshape(len(predicted), -1) for values in (shapes, truth - predicted))
