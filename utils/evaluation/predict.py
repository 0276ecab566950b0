"""Predict the landmarks of whole lists of a prepared set, and compute their errors.

A list (FaceList) names stored crops and their annotation. predict_list runs a network over the
crops; list_nme maps prediction and annotation back to photo pixels, and to the published crop,
and divides their distance by the set's norm; summarise reduces the NMEs to the numbers of a report.
Validation, test, export checks and self-training all use these functions.
"""
from __future__ import annotations

import contextlib
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy
import torch

from utils import machine
from utils.data.dataset import FaceDataset
from utils.data.face_list import FaceList
from utils.errors import UserError
from utils.landmarks import crop, metrics
from utils.landmarks.schemes import Scheme

# Crops of one list that are kept in memory at most.
MAX_CACHE_BYTES = 1 << 30


def predict_list(predict: Callable[[torch.Tensor], typing.Any], faces: FaceList, margin: float,
                 size: int, batch: int = 32, workers: int = 0, ranks: typing.Any = None,
                 augmentation: Callable | None = None, cache: list | None = None) -> numpy.ndarray:
    """Predict the landmarks of all faces of a list.

    Args:
        predict: maps uint8 crops (n, 3, S, S) to landmarks (n, K, 2).
        faces: the list.
        margin: of the stored crops, see PreparedSet.
        size: S, input size in pixels.
        batch: crops a call of predict.
        workers: processes of the data loader.
        ranks: of a distributed run (training.ddp). The faces are split over the ranks without
            padding, and every rank gets the whole result.
        augmentation: of FaceDataset.
        cache: a list that is empty at the first call. It then keeps this rank's crops for further
            calls with the same faces, unless they exceed MAX_CACHE_BYTES.

    Returns:
        Landmarks (N, K, 2) in crop units, float64, in the order of the list.

    Raises:
        UserError: where an image cannot be read, because a score must include every face.
    """
    mine = range(ranks.rank, len(faces), ranks.world) if ranks else range(len(faces))
    dataset = FaceDataset(faces, margin, size, augmentation=augmentation)
    crop.disable_opencv_threads()
    loader = torch.utils.data.DataLoader(torch.utils.data.Subset(dataset, mine), batch,
                                         num_workers=workers)
    if cache == [] and len(mine) * 3 * size**2 <= MAX_CACHE_BYTES:
        cache += machine.start_workers(loader)
    landmarks, unreadable = [], []
    for images, _, _, bad in cache or machine.start_workers(loader):
        unreadable += bad[bad >= 0].tolist()
        landmarks.append(numpy.asarray(predict(images.permute(0, 3, 1, 2)), numpy.float64))
    part = list(mine), landmarks, unreadable
    parts = ranks.all_gather(part) if ranks else [part]
    # Raised after the gather on every rank, so that no rank waits for one that has failed.
    for *_, unreadable in parts:
        if unreadable:
            raise UserError(f"{faces.images[unreadable[0]]}: cannot be read; prepare the set again")
    first = next(chunk for _, chunks, _ in parts for chunk in chunks)
    out = numpy.empty((len(faces), *first.shape[1:]))
    for indices, chunks, _ in parts:
        if indices:
            out[indices] = numpy.concatenate(chunks)
    return out


def predict_lists(lists: Mapping[str, FaceList],
                  predict: Callable[[FaceList], Sequence[numpy.ndarray]]
                  ) -> Iterator[tuple[str, FaceList, list[numpy.ndarray]]]:
    """Predict several lists, each face once: 300W's common and challenging faces are its full list.

    Args:
        lists: by name.
        predict: maps a FaceList of n faces to arrays (n, ...).

    Yields:
        Name and faces of each list, and the arrays of predict for it.
    """
    cache = {}
    for name, faces in lists.items():
        new = [i for i, image in enumerate(faces.images) if image not in cache]
        if new:
            cache.update(zip([faces.images[i] for i in new], zip(*predict(faces.select(new)))))
        yield name, faces, [numpy.array(part) for part in
                            zip(*(cache[image] for image in faces.images))]


def torch_predict(model: torch.nn.Module,
                  device: torch.device | str) -> Callable[[torch.Tensor], numpy.ndarray]:
    """Return the function for predict_list that runs a LandmarkNet on a device."""
    @torch.inference_mode()
    def predict(images):
        with without_tf32():
            landmarks, _ = model.predict(images.to(device))
        return landmarks.float().cpu().numpy()

    return predict


@contextlib.contextmanager
def without_tf32() -> Iterator[None]:
    """Multiply float32 exactly on GPUs, so that a score does not depend on the GPU's generation."""
    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = False
    try:
        yield
    finally:
        for backend, allowed in zip(backends, before):
            backend.allow_tf32 = allowed


def list_nme(predicted: numpy.ndarray, faces: FaceList, scheme: Scheme, set_scheme: Scheme,
             counted: numpy.ndarray | None = None,
             norm_of: Callable | None = None) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Compute the NME of each face of a list.

    Args:
        predicted: landmarks (N, K, 2) in crop units.
        faces: the list with its annotation.
        scheme: of the predicted landmarks: set_scheme or a subset of it.
        set_scheme: of the annotation; the norm is always that of its landmarks.
        counted: which annotated landmarks count, bool (N, K of set_scheme); None: all that are
            annotated.
        norm_of: maps annotated landmarks (N, K, 2), face boxes (N, 4) and set_scheme to the norm
            (N,); None: by the divisor of set_scheme. See metrics.NORMALISATIONS.

    Returns:
        Two arrays (N,), as fractions: NME in photo pixels, and in the units of published results,
        which are those of the stretched crop of the PIPNet authors.
    """
    truth = faces.points if counted is None else numpy.where(counted[..., None], faces.points,
                                                             numpy.nan)
    truth = truth if scheme.base is None else truth[:, list(scheme.indices)]
    truth_px, predicted_px = (crop.to_photo(p, faces.boxes) for p in (truth, predicted))
    whole_px = crop.to_photo(faces.points, faces.boxes)
    norm_of = norm_of or (lambda points, box, scheme: metrics.divisors(points, scheme.divisor, box))
    norm = norm_of(whole_px, faces.published, set_scheme)
    nme = metrics.nme(predicted_px, truth_px, norm)
    truth, predicted, whole = (crop.to_crop(p, faces.published)
                               for p in (truth_px, predicted_px, whole_px))
    unit = numpy.tile(numpy.array([0.0, 0, 1, 1]), (len(faces), 1))
    norm = norm_of(whole, unit, set_scheme)
    return nme, metrics.nme(predicted, truth, norm)


def normalised(predicted: numpy.ndarray, faces: FaceList, scheme: Scheme,
               set_scheme: Scheme) -> dict[str, dict[str, float]]:
    """Compute the mean NME of a list by each of metrics.NORMALISATIONS.

    The arguments are those of list_nme.

    Returns:
        By normalisation, `nme` in photo pixels and `nme_crop` in published units, in %; NaN where
        no face can be divided so.
    """
    numbers = {}
    for name, norm_of in metrics.NORMALISATIONS.items():
        both = (values[~numpy.isnan(values)] for values in list_nme(
            predicted, faces, scheme, set_scheme, norm_of=norm_of))
        numbers[name] = dict(zip(("nme", "nme_crop"), (
            100 * float(values.mean()) if len(values) else float("nan") for values in both)))
    return numbers


def summarise(nme: numpy.ndarray, published: numpy.ndarray) -> dict[str, float]:
    """Return metrics.summary of both NMEs (N,) of list_nme; published units end in `_crop`."""
    return metrics.summary(nme) | {f"{k}_crop": v for k, v in metrics.summary(published).items()
                                   if k != "faces"}
