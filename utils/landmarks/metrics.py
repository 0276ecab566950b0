"""Metrics of landmark detection: normalised mean error, failure rate and area under the CED curve.

`divisors` gives the normalisation of each face, `nme` its error, and `summary` the figures of a
list of faces. NORMALISATIONS are the three divisors of published results. `mirror_error` needs no
labels. All functions take and return arrays; files and tables are in utils/evaluation.
"""
from __future__ import annotations

import typing

import numpy

if typing.TYPE_CHECKING:
    from utils.landmarks.schemes import Scheme

# Sampling step of the cumulative error distribution, as in the authors' code.
STEP = 1e-4


def nme(predicted: numpy.ndarray, truth: numpy.ndarray, norm: numpy.ndarray) -> numpy.ndarray:
    """Compute the normalised mean error of each face.

    Args:
        predicted: landmarks (N, K, 2).
        truth: landmarks (N, K, 2) in the same unit; NaN points are missing and ignored.
        norm: normalising distance of each face (N,), in the same unit. The 300W protocol uses the
            distance of the outer eye corners.

    Returns:
        Mean point distance over norm, (N,), as a fraction. NaN if no point is labelled or norm is
        not above 0; infinite if a prediction is not finite.
    """
    distance = numpy.linalg.norm(numpy.asarray(predicted, numpy.float64) - truth, axis=-1)
    known = numpy.isfinite(truth).all(-1)
    distance = numpy.where(known & ~numpy.isfinite(distance), numpy.inf, distance)
    norm = numpy.where(numpy.asarray(norm) > 0, norm, numpy.nan)
    if known.all():
        return distance.mean(-1) / norm
    total = numpy.where(known, distance, 0).sum(-1)
    return total / numpy.where(known.any(-1), known.sum(-1), numpy.nan) / norm


def divisors(points: numpy.ndarray, divisor: tuple[int, int] | str | None,
             box: numpy.ndarray | None) -> numpy.ndarray:
    """Compute the normalising distance of each face, for `nme`.

    Args:
        points: landmarks (N, K, 2).
        divisor: two point indices for their distance, None for sqrt(width * height) of the box,
            "diagonal" for its diagonal; see Scheme.divisor.
        box: face boxes (N, 4) in the same unit; unused for two points.

    Returns:
        Distances (N,).
    """
    if divisor is None:
        return numpy.sqrt((box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1]))
    if divisor == "diagonal":
        return numpy.hypot(box[:, 2] - box[:, 0], box[:, 3] - box[:, 1])
    return numpy.linalg.norm(points[:, divisor[0]] - points[:, divisor[1]], axis=-1)


def inter_ocular(points: numpy.ndarray, scheme: Scheme) -> numpy.ndarray:
    """Compute the distance of the outer eye corners.

    The corners are the two points of the eyes that are farthest from each other on the mean face.

    Args:
        points: landmarks (N, K, 2).
        scheme: of the K points.

    Returns:
        Distances (N,); NaN where a corner is missing or the scheme has no eyes.
    """
    right, left = (scheme.regions.get(f"{side} eye", []) for side in ("right", "left"))
    apart = [(float(numpy.linalg.norm(scheme.mean_face[i] - scheme.mean_face[j])), i, j)
             for i in right for j in left]
    if not apart:
        return numpy.full(len(points), numpy.nan)
    _, i, j = max(apart)
    return numpy.linalg.norm(points[:, i] - points[:, j], axis=-1)


def inter_pupil(points: numpy.ndarray, scheme: Scheme) -> numpy.ndarray:
    """Compute the distance of the eye centres, each the mean of the eye's points.

    Args:
        points: landmarks (N, K, 2).
        scheme: of the K points.

    Returns:
        Distances (N,); NaN where a point of an eye is missing or the scheme has no eyes.
    """
    eyes = [scheme.regions.get(f"{side} eye") for side in ("right", "left")]
    if not all(eyes):
        return numpy.full(len(points), numpy.nan)
    right, left = (points[:, eye].mean(1) for eye in eyes)
    return numpy.linalg.norm(right - left, axis=-1)


# Name in a report to the normalising distance (N,) of landmarks (N, K, 2) and face boxes (N, 4).
NORMALISATIONS = {
    "inter_ocular": lambda points, box, scheme: inter_ocular(points, scheme),
    "inter_pupil": lambda points, box, scheme: inter_pupil(points, scheme),
    "box_diagonal": lambda points, box, scheme: divisors(points, "diagonal", box),
}


def mirror_error(landmarks: numpy.ndarray, mirrored: numpy.ndarray,
                 scheme: Scheme) -> numpy.ndarray:
    """Compute how much two predictions of a face differ, one of them made on its mirror image.

    It needs no labels, and is large where a network is unsure (Yang and Patras, "Mirror, mirror on
    the wall, tell me, is the error small?", CVPR 2015).

    Args:
        landmarks: (N, K, 2).
        mirrored: predictions (N, K, 2) of the mirrored faces, mirrored back; see mirror_back.
        scheme: of the K points.

    Returns:
        Mean point distance over the distance of the outer eye corners (N,), as a fraction.
    """
    landmarks, mirrored = (numpy.asarray(p, numpy.float64) for p in (landmarks, mirrored))
    return nme(landmarks, mirrored, inter_ocular((landmarks + mirrored) / 2, scheme))


def mirror_back(landmarks: numpy.ndarray, scheme: Scheme) -> numpy.ndarray:
    """Map landmarks (N, K, 2) of mirrored crops, in crop units, to the crops themselves."""
    return landmarks[:, scheme.flip] * (-1, 1) + (1, 0)


def rank_correlation(first: numpy.ndarray, second: numpy.ndarray) -> float:
    """Compute Spearman's rank correlation of two arrays (N,); NaN where one is constant."""
    from scipy import stats
    first, second = (stats.rankdata(values) for values in (first, second))
    first, second = first - first.mean(), second - second.mean()
    norm = float(numpy.sqrt((first @ first) * (second @ second)))
    return float(first @ second) / norm if norm else float("nan")


def fr_auc(errors: numpy.ndarray, threshold: float) -> tuple[float, float]:
    """Compute the failure rate and the area under the cumulative error distribution.

    The area is Simpson's rule in steps of STEP up to the threshold, divided by the threshold, as in
    the authors' code.

    Args:
        errors: NMEs (N,) as fractions; NaN counts as a failure.
        threshold: NME above which a face is a failure.

    Returns:
        Failure rate and AUC, both 0..1; NaN for no faces.
    """
    # Slow to import, and the demo needs no AUC.
    import scipy.integrate
    errors = numpy.sort(numpy.asarray(errors, numpy.float64))
    if not len(errors):
        return float("nan"), float("nan")
    grid = numpy.linspace(0, threshold, max(2, round(threshold / STEP) + 1))
    ced = numpy.searchsorted(errors, grid, side="right") / len(errors)
    auc = scipy.integrate.simpson(ced, x=grid) / threshold
    return float((~(errors <= threshold)).mean()), float(auc)


def summary(errors: numpy.ndarray) -> dict[str, int | float]:
    """Summarise the NMEs of a list of faces.

    Args:
        errors: NMEs (N,) as fractions; NaN for a face that cannot be scored.

    Returns:
        `faces`, the number of scored faces; `nme`, `fr8` and `fr10` in %; `auc8` and `auc10`, 0..1;
        and `unscored`, the number of NaNs, if there are any.
    """
    errors = numpy.asarray(errors, numpy.float64)
    valid = errors[~numpy.isnan(errors)]
    fr8, auc8 = fr_auc(valid, 0.08)
    fr10, auc10 = fr_auc(valid, 0.10)
    result = {"faces": len(valid), "nme": 100 * float(valid.mean()) if len(valid) else float("nan"),
              "fr8": 100 * fr8, "auc8": auc8, "fr10": 100 * fr10, "auc10": auc10}
    return {**result, "unscored": len(errors) - len(valid)} if len(valid) < len(errors) else result
