"""Prediction of whole lists and what it is worth: NME, FR, AUC, plots of the errors."""
import numpy
import torch

from utils import crop, metrics
from utils.dataset import FaceDataset
from utils.errors import UserError


def predict_list(predict, faces, margin, size, batch=32, workers=0, ranks=None,
                 augmentation=None):
    """Landmarks of a whole FaceList in crop units, (N, K, 2) float64, in its order, on every rank.

    predict: uint8 (n, 3, S, S) tensor to landmarks (n, K, 2). The list is split over the ranks and
    gathered without padding. An image that cannot be read is an error: a score needs every face.
    """
    mine = range(ranks.rank, len(faces), ranks.world) if ranks else range(len(faces))
    dataset = FaceDataset(faces, margin, size, augmentation=augmentation)
    crop.prepare_fork()
    loader = torch.utils.data.DataLoader(torch.utils.data.Subset(dataset, mine), batch,
                                         num_workers=workers)
    found, unreadable = [], []
    for images, _, _, bad in loader:
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


def torch_predict(model, device, flip_test=False):
    """A function for predict_list from a LandmarkNet; flip_test averages with the mirrored face."""
    flip = torch.from_numpy(model.scheme.flip).to(device)

    @torch.inference_mode()
    def predict(images):
        images = images.to(device)
        landmarks, _ = model.predict(images)
        if flip_test:
            mirrored, _ = model.predict(images.flip(3))
            mirrored = mirrored[:, flip]
            mirrored[..., 0] = 1 - mirrored[..., 0]
            landmarks = (landmarks + mirrored) / 2
        return landmarks.float().cpu().numpy()

    return predict


def errors(predicted, faces, scheme, set_scheme):
    """NMEs of each face as fractions: (in photo pixels, in published units), both (N,).

    predicted (N, K, 2): crop units of scheme, set_scheme itself or a subset of it. Published units
    are those of the authors' stretched crop. The divisor is always the whole set's.
    """
    truth = faces.points if scheme.base is None else faces.points[:, list(scheme.indices)]
    truth_px, predicted_px = (crop.to_photo(p, faces.boxes) for p in (truth, predicted))
    whole_px = crop.to_photo(faces.points, faces.boxes)
    norm = metrics.divisors(whole_px, set_scheme.divisor, faces.published)
    nme = metrics.nme(predicted_px, truth_px, norm)
    truth, predicted, whole = (crop.to_crop(p, faces.published)
                               for p in (truth_px, predicted_px, whole_px))
    unit = numpy.tile(numpy.array([0.0, 0, 1, 1]), (len(faces), 1))
    norm = metrics.divisors(whole, set_scheme.divisor, unit)
    return nme, metrics.nme(predicted, truth, norm)


def fits(scheme, whole):
    """Whether scheme is the scheme `whole` or some of its points."""
    if scheme.base is None:
        return scheme.name == whole.name and scheme.points == whole.points
    return scheme.base == whole.name and max(scheme.indices) < whole.points


def fit_scheme(scheme, set_scheme, what):
    """Check that a model of `scheme` can be trained or scored on a set; raises UserError."""
    if not fits(scheme, set_scheme):
        raise UserError(f"{what}: the model has the {scheme.name} scheme ({scheme.points} points), "
                        f"the set {set_scheme.name} ({set_scheme.points} points)")


def score(predict, model, prepared, workers=0):
    """All test lists of a prepared set.

    predict: see predict_list. model: has `scheme` and `input_size`. Returns ({list: numbers},
    {list: (landmarks, NMEs)}); numbers are metrics.summary in photo pixels plus `nme_crop`,
    `fr8_crop` ... in published units.
    """
    numbers, found = {}, {}
    for name, faces in prepared.tests.items():
        predicted = predict_list(predict, faces, prepared.margin, model.input_size,
                                 workers=workers)
        nme, published = errors(predicted, faces, model.scheme, prepared.scheme)
        numbers[name] = summarise(nme, published)
        found[name] = predicted, nme
    return numbers, found


def summarise(nme, published):
    """NMEs of errors(), both (N,), to metrics.summary of each; published units end in `_crop`."""
    return metrics.summary(nme) | {f"{k}_crop": v for k, v in metrics.summary(published).items()
                                   if k != "faces"}


def print_table(way, numbers):
    """Print the numbers of score(), one line a list; published units in the second half."""
    print(f"{way:<12}{'':>7} | photo pixels{'':<33} | published units (stretched crop)")
    columns = f"{'NME %':>8}{'FR8 %':>8}{'AUC8':>8}{'FR10 %':>8}{'AUC10':>8}"
    print(f"{'list':<12}{'faces':>7} |{columns}      |{columns}")
    for name, n in numbers.items():
        if "found" in n:
            print(f"{name:<12}{n['found']:>6.2f} % of the faces were found; of these:")
        cells = ["".join(f"{n[k + unit]:>8.{d}f}" for k, d in
                         (("nme", 3), ("fr8", 2), ("auc8", 4), ("fr10", 2), ("auc10", 4)))
                 for unit in ("", "_crop")]
        print(f"{name:<12}{n['faces']:>7} |{cells[0]}      |{cells[1]}")


def largest_difference(first, second, prepared):
    """Largest difference of a coordinate between two predictions of score(), in photo pixels."""
    return max(float(numpy.abs(crop.to_photo(first[name][0], faces.boxes)
                               - crop.to_photo(second[name][0], faces.boxes)).max())
               for name, faces in prepared.tests.items())


def draw_errors(found, scheme, prepared, weights):
    """Write ced.png and worst.png (the 16 worst faces of the first list) beside the weights.

    Weights at the top of weights/ share their folder, so there the names begin with theirs.
    """
    from utils import draw
    from utils.experiment import plot_ced
    prefix = "" if weights.stem == "best" else f"{weights.stem}-"
    plot_ced({name: nme for name, (_, nme) in found.items()},
             weights.with_name(f"{prefix}ced.png"))
    name, faces = next(iter(prepared.tests.items()))
    predicted, nme = found[name]
    size = prepared.size or 256
    dataset = FaceDataset(faces, prepared.margin, size)
    worst = numpy.argsort(-nme)[:16]
    images = [draw.landmarks(dataset[int(i)][0].numpy(), predicted[i] * size - 0.5, scheme)
              for i in worst]
    captions = [f"{100 * nme[i]:.1f} % {faces.images[i].stem}" for i in worst]
    draw.save(weights.with_name(f"{prefix}worst.png"), draw.sheet(images, 4, 256, captions))
