"""Training losses of the two heads. Targets stay sparse: landmarks in, cells computed per batch."""
import math

import torch

from utils.errors import UserError


def encode(landmarks, neighbours, grid):
    """Landmarks (N, K, 2) in crop units to the targets of the PIP head on a grid x grid map.

    Returns cell (N, K) int64, row-major; offset (N, K, 2) and neighbour (N, K, M, 2), float, in
    cells from the cell's top-left corner. Cells are clamped to the map, offsets not. PIPNet 3.1.
    """
    at = landmarks * grid
    corner = at.floor().clamp(0, grid - 1)
    cell = (corner[..., 1] * grid + corner[..., 0]).long()
    return cell, at - corner, at[:, neighbours] - corner[:, :, None]


def l1(error):
    """|error|, elementwise."""
    return error.abs()


def smooth_l1(error, beta=0.1):
    """Quadratic below beta, linear above; Fast R-CNN's loss, elementwise."""
    return torch.nn.functional.smooth_l1_loss(error, torch.zeros_like(error), reduction="none",
                                              beta=beta)


def wing(error, width=0.5, curvature=0.1):
    """Wing loss (Feng et al., CVPR 2018), elementwise: logarithmic below width, linear above.

    width and curvature are in the unit of the error; the defaults suit grid cells.
    """
    error = error.abs()
    shift = width - width * math.log1p(width / curvature)
    return torch.where(error < width, width * torch.log1p(error / curvature), error - shift)


OFFSET_LOSSES = {"l1": l1, "smooth_l1": smooth_l1, "wing": wing}


class PIPLoss:
    """cls * score maps + reg * (offset and neighbour terms at the target cells). PIPNet 3.1.

    Called with the head's output, landmarks (N, K, 2) in crop units, the indices (N,) of the faces
    (not needed here), and what counts (see `terms`) it gives the scalar loss. weights (K,): how
    much each landmark counts in every mean, None for all alike. missing: whether landmarks may be
    NaN, which then do not count.
    """

    def __init__(self, neighbours, cls=10.0, reg=1.0, offset_loss="l1", weights=None,
                 missing=False):
        self.neighbours, self.cls, self.reg = neighbours, cls, reg
        self.offset_loss, self.weights = OFFSET_LOSSES[offset_loss], weights
        self.missing = missing

    def terms(self, predicted, landmarks, mask=None, coarse=None):
        """The unweighted terms as a dict of scalars: score, offset_x, offset_y, neighbour_x,
        neighbour_y, and those of the coarse maps.

        predicted: head.Maps or head.CoarseMaps. mask (N, K): which landmarks count, None for all;
        a neighbour counts where both ends do. coarse: the name of a coarse map's term to its mask,
        in the order of CoarseMaps. Every term is a mean over what counts; one without anything is 0
        and still part of the graph, as DDP wants.
        """
        maps, *coarse_maps = predicted if coarse else (predicted,)
        cell, offset, neighbour = encode(landmarks, self.neighbours, maps.score.shape[-1])
        both = None if mask is None else mask[..., None] & mask[:, self.neighbours]
        if self.weights is not None:
            # A neighbour's prediction counts as much as the landmark that is predicted.
            mask = self.weights * (torch.ones_like(cell) if mask is None else mask)
            towards = self.weights[self.neighbours]
            both = towards.expand(len(cell), -1, -1) if both is None else towards * both
        terms = {"score": _score_term(maps.score, landmarks, mask)}
        for axis, name in enumerate("xy"):
            error = _at(getattr(maps, f"offset_{name}"), cell, landmarks.dtype) - offset[..., axis]
            terms[f"offset_{name}"] = _mean(self.offset_loss(error), mask)
        num_nb = self.neighbours.shape[1]
        for axis, name in enumerate("xy"):
            if not num_nb:
                terms[f"neighbour_{name}"] = landmarks.new_zeros(())
                continue
            found = _at(getattr(maps, f"neighbour_{name}"), cell.repeat_interleave(num_nb, 1),
                        landmarks.dtype)
            error = found.view_as(neighbour[..., axis]) - neighbour[..., axis]
            terms[f"neighbour_{name}"] = _mean(self.offset_loss(error), both)
        for (name, counts), score in zip((coarse or {}).items(), coarse_maps):
            terms[name] = _score_term(score, landmarks, counts)
        return terms

    def __call__(self, predicted, landmarks, indices=None, mask=None, coarse=None):
        if self.missing and mask is None:
            mask, landmarks = ~landmarks.isnan().any(-1), landmarks.nan_to_num()
        terms = self.terms(predicted, landmarks, mask, coarse)
        scores = [terms.pop(name) for name in ("score", *(coarse or ()))]
        return self.cls * sum(scores) + self.reg * sum(terms.values())


def _at(maps, cell, dtype):
    """Maps (N, C, G, G) at the cells (N, C) of their landmarks: (N, C).

    They may be half precision under autocast; errors are summed in `dtype`.
    """
    return maps.flatten(2).gather(2, cell[..., None])[..., 0].to(dtype)


def _score_term(score, landmarks, mask):
    """Mean squared error of score maps (N, K, G, G), over the maps that count (N, K)."""
    grid = score.shape[-1]
    at = (landmarks * grid).floor().clamp(0, grid - 1).long()
    score = score.flatten(2).to(landmarks.dtype)
    target = torch.zeros_like(score).scatter_(2, (at[..., 1:] * grid + at[..., :1]), 1.0)
    if mask is None:
        return torch.nn.functional.mse_loss(score, target)
    return _mean((score - target).square().mean(-1), mask)


def _mean(values, mask):
    return values.mean() if mask is None else (values * mask).sum() / mask.sum().clamp(min=1)


class RegressionLoss:
    """reg * a robust loss of coordinates (N, K, 2), measured in the cells of an 8 x 8 grid.

    The unit is that of the PIP head at 256 px, so that the same `reg` and curve suit both heads.
    """

    GRID = 8

    def __init__(self, reg=1.0, offset_loss="wing", missing=False):
        self.reg, self.offset_loss, self.missing = reg, OFFSET_LOSSES[offset_loss], missing

    def __call__(self, predicted, landmarks, indices=None):
        mask = None
        if self.missing:
            mask, landmarks = ~landmarks.isnan(), landmarks.nan_to_num()
        error = (predicted.to(landmarks.dtype) - landmarks) * self.GRID
        return self.reg * _mean(self.offset_loss(error), mask)


def build_loss(model, cls, reg, offset_loss, eye_weight=1.0, missing=False):
    """The loss of a LandmarkNet's head. eye_weight: of the eyes' landmarks against the others, of
    the PIP head. missing: see PIPLoss. Raises UserError for an unknown offset loss.
    """
    if offset_loss not in OFFSET_LOSSES:
        raise UserError(f"offset_loss must be one of {', '.join(OFFSET_LOSSES)}, found "
                        f"{offset_loss!r}")
    if hasattr(model.head, "neighbours"):
        weights = None
        if eye_weight != 1 and model.scheme.eyes is not None:
            weights = torch.ones(model.scheme.points, device=model.head.neighbours.device)
            weights[sum(model.scheme.eyes, [])] = eye_weight
        return PIPLoss(model.head.neighbours, cls, reg, offset_loss, weights, missing)
    return RegressionLoss(reg, offset_loss, missing)
