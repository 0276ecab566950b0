"""Whole lists to landmarks, and the landmarks' errors as numbers."""
import numpy
import torch

from utils.data.dataset import FaceDataset
from utils.errors import UserError
from utils.landmarks import crop, metrics

# Crops of a list that is predicted again and again are kept in memory up to so many bytes.
KEPT = 1 << 30


def predict_list(predict, faces, margin, size, batch=32, workers=0, ranks=None,
                 augmentation=None, kept=None):
    """Landmarks of a whole FaceList in crop units, (N, K, 2) float64, in its order, on every rank.

    predict: uint8 (n, 3, S, S) tensor to landmarks (n, K, 2). The list is split over the ranks and
    gathered without padding. An image that cannot be read is an error: a score needs every face.
    kept: a list, empty at first, that keeps this rank's crops for the next call with the same faces
    where they take up to a gigabyte.
    """
    mine = range(ranks.rank, len(faces), ranks.world) if ranks else range(len(faces))
    dataset = FaceDataset(faces, margin, size, augmentation=augmentation)
    crop.prepare_fork()
    loader = torch.utils.data.DataLoader(torch.utils.data.Subset(dataset, mine), batch,
                                         num_workers=workers)
    if kept == [] and len(mine) * 3 * size**2 <= KEPT:
        kept += list(loader)
    found, unreadable = [], []
    for images, _, _, bad in kept or loader:
        unreadable += bad[bad >= 0].tolist()
        found.append(numpy.asarray(predict(images.permute(0, 3, 1, 2)), numpy.float64))
    part = list(mine), found, unreadable
    parts = ranks.collect(part) if ranks else [part]
    for *_, unreadable in parts:
        # After all ranks have met, so that none waits for one that gave up.
        if unreadable:
            raise UserError(f"{faces.images[unreadable[0]]}: cannot be read; prepare the set again")
    first = next(p for _, chunks, _ in parts for p in chunks)
    out = numpy.empty((len(faces), *first.shape[1:]))
    for indices, chunks, _ in parts:
        if indices:
            out[indices] = numpy.concatenate(chunks)
    return out


def once(lists, predict):
    """(name, FaceList, predictions) of each of lists {name: FaceList}: what predict(FaceList)
    gives, arrays of one entry a face. Lists overlap, as 300W's common and challenging faces are its
    full list: a face that was in an earlier one is not predicted again.
    """
    known = {}
    for name, faces in lists.items():
        new = [i for i, image in enumerate(faces.images) if image not in known]
        if new:
            known.update(zip([faces.images[i] for i in new], zip(*predict(faces.take(new)))))
        yield name, faces, [numpy.array(part) for part in
                            zip(*(known[image] for image in faces.images))]


def torch_predict(model, device):
    """A function for predict_list from a LandmarkNet."""
    @torch.inference_mode()
    def predict(images):
        landmarks, _ = model.predict(images.to(device))
        return landmarks.float().cpu().numpy()

    return predict


def errors(predicted, faces, scheme, set_scheme, counts=None):
    """NMEs of each face as fractions: (in photo pixels, in published units), both (N,).

    predicted (N, K, 2): crop units of scheme, set_scheme itself or a subset of it. Published units
    are those of the authors' stretched crop. The divisor is always the whole set's. counts: which
    of the set's points count, (N, all of the set's); None: all that are labelled.
    """
    truth = faces.points if counts is None else numpy.where(counts[..., None], faces.points,
                                                            numpy.nan)
    truth = truth if scheme.base is None else truth[:, list(scheme.indices)]
    truth_px, predicted_px = (crop.to_photo(p, faces.boxes) for p in (truth, predicted))
    whole_px = crop.to_photo(faces.points, faces.boxes)
    norm = metrics.divisors(whole_px, set_scheme.divisor, faces.published)
    nme = metrics.nme(predicted_px, truth_px, norm)
    truth, predicted, whole = (crop.to_crop(p, faces.published)
                               for p in (truth_px, predicted_px, whole_px))
    unit = numpy.tile(numpy.array([0.0, 0, 1, 1]), (len(faces), 1))
    norm = metrics.divisors(whole, set_scheme.divisor, unit)
    return nme, metrics.nme(predicted, truth, norm)


def summarise(nme, published):
    """NMEs of errors(), both (N,), to metrics.summary of each; published units end in `_crop`."""
    return metrics.summary(nme) | {f"{k}_crop": v for k, v in metrics.summary(published).items()
                                   if k != "faces"}
