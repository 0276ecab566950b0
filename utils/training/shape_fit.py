"""The shape head (nets/shape.py) fitted to what a trained network gets wrong of its training faces.
"""
import argparse

import numpy
import torch

from nets.shape import ShapeHead
from utils import checkpoint, experiment, machine
from utils.data.augment import Augment
from utils.data.dataset import FaceDataset, PreparedSet
from utils.data.sets import set_folder
from utils.errors import UserError
from utils.evaluation import predict
from utils.landmarks import crop, schemes

# Ridges tried, a face; the validation list chooses.
RIDGES = tuple(10.0 ** power for power in numpy.arange(-7, -2.9, 0.5))
# How often each training face is shown, augmented each time: more changes nothing.
VIEWS = 2


def fit_weights(args):
    """Fit a shape head to a .pt on the training list of the set that args mean, and keep it where
    the validation list gains.

    Returns whether an ONNX file beside it is to be exported anew. Raises UserError.
    """
    path = experiment.find_weights(args.exp).with_suffix(".pt")
    prepared = PreparedSet(set_folder(args))
    model = checkpoint.load_model(path, machine.choose_device(args.device), lids=False, shape=False)
    model.flip_test = False  # It is fitted to what is seen in one image.
    schemes.fit_scheme(model.scheme, prepared.scheme, str(path))
    lists = [prepared.lists.get(name) for name in ("train", "val")]
    if not all(lists):
        raise UserError(f"{prepared.folder}: has no {'train' if not lists[0] else 'validation'} "
                        f"faces, of which --fit-shape takes both")
    head, before, after = fit(model, prepared, args.workers)
    if head is None:
        print(f"shape head of {path}: nothing is changed, the validation list gains nothing "
              f"({100 * before:.3f} %, {100 * after:.3f} % with it)")
        return False
    print(f"shape head of {path}: validation NME {100 * after:.3f} %, {100 * before:.3f} % "
          f"without it")
    keep(head, path)
    experiment.record_fit(path, 100 * after, experiment.data_name(args, prepared.folder))
    return path.with_suffix(".onnx").is_file()


def fit(model, prepared, workers=0):
    """(a ShapeHead, or None where it gains nothing; validation NME without it; with it), as
    fractions. model: a LandmarkNet of load_model without heads fitted after training; prepared: a
    PreparedSet with faces to train and to validate on. Raises UserError where no face is whole.
    """
    function = predict.torch_predict(model, next(model.parameters()).device)
    indices = None if model.scheme.base is None else list(model.scheme.indices)
    train, val = prepared.lists["train"], prepared.lists["val"]
    points = train.points if indices is None else train.points[:, indices]
    whole = train.take(numpy.flatnonzero(numpy.isfinite(points).all((1, 2))))
    if not len(whole):
        raise UserError(f"{prepared.folder}: no training face has all landmarks, of which "
                        f"--fit-shape learns what they have to do with each other")
    # What hides a part of a face, or changes it, makes errors that say nothing of the others. Where
    # labels lie to one side of what they mean in every photo, mirrored faces taught the network to
    # lay landmarks in the middle of both, and would hide that from the fit as well.
    settings = argparse.Namespace(**{**vars(model.args), "occlusion": 0.0, "shut": 0.0})
    augment = Augment(settings, flip=None)
    found, truth = [], []
    crop.prepare_fork()
    for view in range(VIEWS):
        dataset = FaceDataset(whole, prepared.margin, model.input_size, indices, augment, view)
        for images, landmarks, *_ in torch.utils.data.DataLoader(dataset, 32, num_workers=workers):
            found.append(function(images.permute(0, 3, 1, 2)))
            truth.append(landmarks.numpy())
    shapes, wrong = _normalised(numpy.concatenate(found), numpy.concatenate(truth))
    plain = predict.predict_list(function, val, prepared.margin, model.input_size, workers=workers)

    def nme(landmarks):
        return float(numpy.nanmean(predict.errors(landmarks, val, model.scheme,
                                                  prepared.scheme)[0]))

    heads = [regress(shapes, wrong, ridge) for ridge in RIDGES]
    with torch.no_grad():
        scores = [nme(head(torch.from_numpy(plain).float()).double().numpy()) for head in heads]
    before, best = nme(plain), int(numpy.argmin(scores))
    return heads[best] if scores[best] < before else None, before, scores[best]


def regress(shapes, wrong, ridge):
    """The ShapeHead of least squares from shapes to what is wrong of them, both (n, 2K)."""
    mean, offset = shapes.mean(0), wrong.mean(0)
    centred = shapes - mean
    penalty = ridge * len(shapes) * numpy.eye(shapes.shape[1])
    weight = numpy.linalg.solve(centred.T @ centred + penalty, centred.T @ (wrong - offset))
    head = ShapeHead(shapes.shape[1] // 2)
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(weight))
        head.bias.copy_(torch.from_numpy(offset - mean @ weight))
    return head


def _normalised(found, truth):
    """Landmarks (n, K, 2) and the true ones to shapes about their mean and what is wrong of them,
    both (n, 2K) float64 in sizes of the shape.
    """
    found, truth = (landmarks.astype(numpy.float64) for landmarks in (found, truth))
    shapes = found - found.mean(1, keepdims=True)
    size = numpy.sqrt((shapes ** 2).sum((1, 2), keepdims=True))
    return ((values / size).reshape(len(found), -1) for values in (shapes, truth - found))


def keep(head, path):
    """Write a ShapeHead into a .pt in the place of the one before."""
    checkpoint.save(checkpoint.with_head(checkpoint.read(path), "shape", head), path)
