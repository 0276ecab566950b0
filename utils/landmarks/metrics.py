"""Normalised mean error, failure rate, area under the CED curve. Numbers in, numbers out."""
import numpy
import scipy.integrate

STEP = 1e-4


def nme(predicted, truth, norm):
    """Normalised mean error of each face, (N,), as a fraction.

    predicted, truth: (N, K, 2). norm: (N,), in the same unit. 300W protocol: the mean distance of
    the points divided by the distance of the outer eye corners. Points of truth that are NaN are
    missing and do not count; NaN where none counts or the norm is not above 0, infinite where a
    prediction is no number.
    """
    distance = numpy.linalg.norm(numpy.asarray(predicted, numpy.float64) - truth, axis=-1)
    known = numpy.isfinite(truth).all(-1)
    distance = numpy.where(known & ~numpy.isfinite(distance), numpy.inf, distance)
    norm = numpy.where(numpy.asarray(norm) > 0, norm, numpy.nan)
    if known.all():
        return distance.mean(-1) / norm
    total = numpy.where(known, distance, 0).sum(-1)
    return total / numpy.where(known.any(-1), known.sum(-1), numpy.nan) / norm


def divisors(points, divisor, box):
    """What NME is divided by for each face, (N,): the distance of two points, or the box's size.

    points (N, K, 2); divisor: two point indices, None for sqrt(width * height) of box (N, 4), or
    "diagonal" for its diagonal.
    """
    if divisor is None:
        return numpy.sqrt((box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1]))
    if divisor == "diagonal":
        return numpy.hypot(box[:, 2] - box[:, 0], box[:, 3] - box[:, 1])
    return numpy.linalg.norm(points[:, divisor[0]] - points[:, divisor[1]], axis=-1)


def fr_auc(errors, threshold):
    """Failure rate and AUC of NMEs (N,) at a threshold, both 0..1.

    FR: the share of faces above the threshold. AUC: Simpson's rule over the cumulative error
    distribution in steps of 1e-4 up to the threshold, divided by it; as the authors' code. An NME
    that is NaN is a failure in both; of no face, both are NaN.
    """
    errors = numpy.sort(numpy.asarray(errors, numpy.float64))
    if not len(errors):
        return float("nan"), float("nan")
    grid = numpy.linspace(0, threshold, max(2, round(threshold / STEP) + 1))
    ced = numpy.searchsorted(errors, grid, side="right") / len(errors)
    auc = scipy.integrate.simpson(ced, x=grid) / threshold
    return float((~(errors <= threshold)).mean()), float(auc)


def summary(errors):
    """NMEs (N,) to a dict: faces, nme and fr in %, auc 0..1, at 8 and 10 %.

    A face whose NME is NaN cannot be scored: it is in none of these, and counted as `unscored`.
    """
    errors = numpy.asarray(errors, numpy.float64)
    scored = errors[~numpy.isnan(errors)]
    if len(scored) < len(errors) or not len(errors):
        none = dict.fromkeys(("nme", "fr8", "auc8", "fr10", "auc10"), float("nan"))
        return {**(summary(scored) if len(scored) else {"faces": 0, **none}),
                **({"unscored": len(errors) - len(scored)} if len(errors) else {})}
    fr8, auc8 = fr_auc(errors, 0.08)
    fr10, auc10 = fr_auc(errors, 0.10)
    return {"faces": len(errors), "nme": 100 * float(errors.mean()), "fr8": 100 * fr8, "auc8": auc8,
            "fr10": 100 * fr10, "auc10": auc10}
