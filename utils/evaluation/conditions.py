"""NME of a model by condition: head yaw, size of the face, blur, darkness, covered share.

`main.py --test --by yaw,size,blur,dark,covered,mirror` prints one table. Yaw splits the faces of a
list by their annotation. Size, blur, darkness and cover are synthetic: every crop is degraded in
the way that CONDITIONS states, and the whole list is predicted again. `mirror` splits the faces by
their mirror error, which needs no labels (metrics.mirror_error), and scores the mirrored images:
the mean of both NMEs is without the side that labels lie on, which a model learns from faces that
are not mirrored.
"""
from __future__ import annotations

import functools
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence

import cv2
import numpy
import torch

from utils.data.augment import nominal_crop
from utils.data.dataset import PreparedSet
from utils.data.face_list import FaceList
from utils.errors import UserError
from utils.evaluation import predict
from utils.landmarks import crop, metrics, pose
from utils.predictor import Predictor

# By name: values, and the text of a row.
CONDITIONS = {
    # The photo is reduced so that the longer side of the face's box has so many pixels.
    "size": ((120, 80, 60, 40), "face of {} px"),
    # Standard deviation of a Gaussian in % of the side of the crop.
    "blur": ((1, 2, 4), "blur of {} %"),
    # Factor by which the light is reduced, at gamma 2.2; then noise of DARK_NOISE grey levels.
    "dark": ((4, 16, 64), "light / {}"),
    # Share in % of the face's box behind a grey square at a random place in the box.
    "covered": ((10, 25, 50), "{} % covered"),
}
DARK_NOISE = 5
# |yaw| in degrees, by the text of a row.
YAWS = {"yaw 0-15": (0, 15), "yaw 15-30": (15, 30), "yaw 30 and more": (30, numpy.inf)}
MIRROR_PARTS = ("lowest", "middle", "highest")
KINDS = ("yaw", *CONDITIONS, "mirror")


def parse_kinds(text: str) -> list[str]:
    """Split the value of --by, `none` or names of KINDS; raises UserError for another name."""
    kinds = [] if text == "none" else [kind.strip() for kind in text.split(",")]
    for kind in kinds:
        if kind not in KINDS:
            raise UserError(f"--by {text}: expected names out of {','.join(KINDS)}, found {kind!r}")
    return kinds


def degrade(stored: numpy.ndarray, landmarks: numpy.ndarray, margin: float, size: int,
            rng: numpy.random.Generator, *, kind: str, value: float,
            scale: float) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Cut the nominal crop out of a stored one and degrade it; `augmentation` of FaceDataset.

    Args:
        stored: (T, T, 3) uint8.
        landmarks: (K, 2) in crop units.
        margin: side of the stored crop over that of the nominal crop.
        size: side of the result in pixels.
        rng: generator of the face.
        kind: of CONDITIONS.
        value: of CONDITIONS.
        scale: side of the nominal crop over that of the face's box.

    Returns:
        Image (size, size, 3) uint8, and the landmarks, which stay where they are.
    """
    side = stored.shape[0]
    if kind == "size":
        reduced = round(value * scale * margin)
        if reduced < side:
            stored = cv2.resize(stored, (reduced, reduced), interpolation=cv2.INTER_AREA)
    elif kind == "blur":
        stored = cv2.GaussianBlur(stored, (0, 0), value / 100 * side / margin)
    image = nominal_crop(stored, margin, size)
    if kind == "dark":
        dark = image * value ** (-1 / 2.2) + rng.normal(0, DARK_NOISE, image.shape)
        image = dark.round().clip(0, 255).astype(numpy.uint8)
    elif kind == "covered":
        box = size / scale
        square = box * (value / 100) ** 0.5
        start = (size - box) / 2 + rng.random(2) * (box - square)
        (left, top), (right, bottom) = (numpy.round(edge).astype(int)
                                        for edge in (start, start + square))
        image = image.copy()
        image[top:bottom, left:right] = 128
    return image, landmarks.astype(numpy.float32)


def true_yaws(prepared: PreparedSet) -> dict[str, numpy.ndarray]:
    """Return |yaw| in degrees (N,) of each test list, fitted to its annotation.

    Raises:
        UserError: where head pose is not defined for the set's scheme.
    """
    pose.model_points(prepared.scheme)
    return {name: numpy.abs([pose.head_pose(points, prepared.scheme)[0] for points in
                             crop.to_photo(faces.points, faces.boxes)])
            for name, faces in prepared.test_lists.items()}


def by_conditions(kinds: Sequence[str], function: Callable, model: typing.Any,
                  prepared: PreparedSet, nmes: Mapping[str, numpy.ndarray],
                  workers: int = 0) -> dict[str, dict[str, dict]]:
    """Compute the NME of all test lists by condition.

    Args:
        kinds: names of KINDS.
        function: predicts crops, see predict.predict_list.
        model: LandmarkNet or Predictor.
        prepared: the set.
        nmes: NMEs (N,) of the crops as they are, by list.
        workers: processes of the data loader.

    Returns:
        By list and text of a row, `faces` and their mean `nme` in photo pixels in %, None where
        there are none. The row `mirror error, rank correlation` has `correlation` instead.
    """
    rows = {name: {"as it is": _mean(nme)} for name, nme in nmes.items()}
    if "yaw" in kinds:
        for name, yaw in true_yaws(prepared).items():
            rows[name] |= {text: _mean(nmes[name][(yaw >= low) & (yaw < high)])
                           for text, (low, high) in YAWS.items()}
    for kind in CONDITIONS:
        for value in CONDITIONS[kind][0] if kind in kinds else ():
            augmentation = functools.partial(degrade, kind=kind, value=value,
                                             scale=prepared.crop["scale"])
            for name, faces, (predicted,) in predict.predict_lists(
                    prepared.test_lists, lambda faces, change=augmentation: [predict.predict_list(
                        function, faces, prepared.margin, model.input_size, workers=workers,
                        augmentation=change)]):
                nme, _ = predict.list_nme(predicted, faces, model.scheme, prepared.scheme)
                rows[name][CONDITIONS[kind][1].format(value)] = _mean(nme)
    if "mirror" in kinds:
        for name, faces, predicted in predict_mirrored(model, prepared, workers):
            mirrored, _ = predict.list_nme(predicted[:, 1], faces, model.scheme, prepared.scheme)
            error = metrics.mirror_error(predicted[:, 0], predicted[:, 1], model.scheme)
            rows[name] |= {"mirrored": _mean(mirrored),
                           "mean of both": _mean((nmes[name] + mirrored) / 2),
                           **by_mirror_error(nmes[name], error)}
    return rows


def predict_mirrored(model: typing.Any, prepared: PreparedSet, workers: int = 0
                     ) -> Iterator[tuple[str, FaceList, numpy.ndarray]]:
    """Predict the test lists and their mirrored images.

    Yields:
        Name and faces of each list, and landmarks (N, 2, K, 2) from the image and from its mirror
        image, both in crop units of the image.

    Raises:
        UserError: where the model averages both predictions in an .onnx, or has no mirrored faces.
    """
    check_mirror(model)

    @torch.inference_mode()
    def both(images):
        if isinstance(model, Predictor):
            return model.predict_both(images.permute(0, 2, 3, 1).numpy())
        return model.predict_both(images.to(model.mean.device)).float().cpu().numpy()

    for name, faces, (predicted,) in predict.predict_lists(
            prepared.test_lists, lambda faces: [predict.predict_list(
                both, faces, prepared.margin, model.input_size, workers=workers)]):
        yield name, faces, predicted


def check_mirror(model: typing.Any) -> None:
    """Check that the scheme of a model has mirrored faces and eyes; raises UserError."""
    scheme = model.scheme
    if not scheme.mirrors or not numpy.isfinite(
            metrics.inter_ocular(scheme.mean_face[None], scheme)).all():
        raise UserError(f"mirror error: scheme {scheme.name} needs a flip table and the regions "
                        f"right eye and left eye")


def by_mirror_error(nme: numpy.ndarray, error: numpy.ndarray) -> dict[str, dict]:
    """Split the NME of a list into thirds by mirror error, and correlate both.

    Args:
        nme: of each face (N,), as a fraction.
        error: mirror error of each face (N,).

    Returns:
        Rows of by_conditions.
    """
    known = numpy.flatnonzero(numpy.isfinite(nme) & numpy.isfinite(error))
    order = known[numpy.argsort(error[known], kind="stable")]
    rows = {f"mirror error, {part} third": _mean(nme[third])
            for part, third in zip(MIRROR_PARTS, numpy.array_split(order, 3))}
    return rows | {"mirror error, rank correlation": {
        "correlation": metrics.rank_correlation(error[known], nme[known])}}


def _mean(nme):
    nme = nme[numpy.isfinite(nme)]
    return {"faces": len(nme), "nme": 100 * float(nme.mean()) if len(nme) else None}


def print_conditions(rows: Mapping[str, Mapping[str, Mapping]]) -> None:
    """Print the result of by_conditions: a line for each condition, two columns for each list."""
    print(f"{'NME % by condition':<32}" + "".join(f"{name:>12}{'faces':>7}" for name in rows))
    for text in next(iter(rows.values())):
        cells = ""
        for row in (found[text] for found in rows.values()):
            value = row.get("nme", row.get("correlation"))
            cells += f"{'-' if value is None else f'{value:.3f}':>12}{row.get('faces', ''):>7}"
        print(f"{text:<32}{cells}".rstrip())
