"""Training losses of the PIP head and the regression head.

Targets are sparse: losses take landmarks, and compute cells and offsets for a whole batch on its
device. To add a loss of offsets, write an elementwise function here, list it in OFFSET_LOSSES, and
add its name to the choices of `offset_loss` in utils/args.py. To replace a whole loss, return
another callable from `build_loss`.
"""
from __future__ import annotations

import functools
import math
import operator
from collections.abc import Mapping

import torch

from nets.head import CoarseMaps, Maps
from nets.model import LandmarkNet
from utils.errors import UserError


def encode(landmarks: torch.Tensor, neighbours: torch.Tensor,
           grid: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute the targets of the PIP head (PIPNet, section 3.1).

    Args:
        landmarks: (N, K, 2) in crop units.
        neighbours: (K, M) int64, the neighbours of each landmark.
        grid: cells on a side of the maps.

    Returns:
        cell (N, K) int64, row-major, of the cell that contains each landmark, clamped to the map;
        offset (N, K, 2) of the landmark and neighbour (N, K, M, 2) of its neighbours from the
        cell's top-left corner, in cells, not clamped.
    """
    cell, at, corner = _cell(landmarks, grid)
    return cell, at - corner, at[:, neighbours] - corner[:, :, None]


def l1(error: torch.Tensor) -> torch.Tensor:
    """Compute the absolute error, elementwise."""
    return error.abs()


def smooth_l1(error: torch.Tensor, beta: float = 0.1) -> torch.Tensor:
    """Compute the smooth L1 loss (Girshick, Fast R-CNN, 2015), elementwise.

    It is quadratic below beta, in the unit of the error, and linear above.
    """
    return torch.nn.functional.smooth_l1_loss(error, torch.zeros_like(error), reduction="none",
                                              beta=beta)


def wing(error: torch.Tensor, width: float = 0.5, curvature: float = 0.1) -> torch.Tensor:
    """Compute the wing loss (Feng et al., CVPR 2018), elementwise.

    It is logarithmic below width and linear above. width and curvature are in the unit of the
    error; the defaults suit grid cells.
    """
    error = error.abs()
    shift = width - width * math.log1p(width / curvature)
    return torch.where(error < width, width * torch.log1p(error / curvature), error - shift)


OFFSET_LOSSES = {"l1": l1, "smooth_l1": smooth_l1, "wing": wing}


class PIPLoss:
    """Loss of the PIP head (PIPNet, section 3.1).

    The loss is cls * score term + reg * (offset terms + neighbour terms at the target cells).

    Args:
        neighbours: (K, M) int64, the neighbours of each landmark.
        cls: weight of the score maps.
        reg: weight of the offset and neighbour terms.
        offset_loss: key of OFFSET_LOSSES.
        weights: (K,) weight of each landmark in every mean; None for equal weights.
        missing: whether landmarks may be NaN; these do not count.
    """

    def __init__(self, neighbours: torch.Tensor, cls: float = 10.0, reg: float = 1.0,
                 offset_loss: str = "l1", weights: torch.Tensor | None = None,
                 missing: bool = False):
        self.neighbours, self.cls, self.reg = neighbours, cls, reg
        self.offset_loss, self.weights = OFFSET_LOSSES[offset_loss], weights
        self.missing = missing

    def terms(self, predicted: Maps | CoarseMaps, landmarks: torch.Tensor,
              mask: torch.Tensor | None = None,
              coarse: Mapping[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
        """Compute the unweighted terms.

        Each is the mean over the landmarks that count. A term without any is 0 and remains in the
        graph, as DDP requires.

        Args:
            predicted: output of the head.
            landmarks: (N, K, 2) in crop units, without NaN.
            mask: (N, K) bool, which landmarks count; None for all. A neighbour counts if both of
                its landmarks do.
            coarse: for CoarseMaps: mask (N, K) by the name of the coarse map's term, in the order
                of the maps.

        Returns:
            Scalars by name: score, offset_x, offset_y, neighbour_x, neighbour_y and the coarse
            maps' terms.
        """
        maps, *coarse_maps = predicted if coarse else (predicted,)
        cell, offset, neighbour = encode(landmarks, self.neighbours, maps.score.shape[-1])
        both = None if mask is None else mask[..., None] & mask[:, self.neighbours]
        if self.weights is not None:
            # A neighbour's prediction has the weight of the landmark that is predicted.
            mask = self.weights * (torch.ones_like(cell) if mask is None else mask)
            neighbour_weights = self.weights[self.neighbours]
            both = (neighbour_weights.expand(len(cell), -1, -1) if both is None
                    else neighbour_weights * both)
        terms = {"score": _score_term(maps.score, cell, landmarks.dtype, mask)}
        for axis, name in enumerate("xy"):
            error = _error(getattr(maps, f"offset_{name}"), cell, offset[..., axis])
            terms[f"offset_{name}"] = _mean(self.offset_loss(error), mask)
        num_nb = self.neighbours.shape[1]
        for axis, name in enumerate("xy"):
            if not num_nb:
                terms[f"neighbour_{name}"] = landmarks.new_zeros(())
                continue
            error = _error(getattr(maps, f"neighbour_{name}"), cell, neighbour[..., axis])
            terms[f"neighbour_{name}"] = _mean(self.offset_loss(error), both)
        for (name, coarse_mask), score in zip((coarse or {}).items(), coarse_maps):
            terms[name] = _score_term(score, _cell(landmarks, score.shape[-1])[0], landmarks.dtype,
                                      coarse_mask)
        return terms

    def __call__(self, predicted: Maps | CoarseMaps, landmarks: torch.Tensor,
                 indices: torch.Tensor | None = None, mask: torch.Tensor | None = None,
                 coarse: Mapping[str, torch.Tensor] | None = None) -> torch.Tensor:
        """Compute the scalar loss; `indices` is unused, other arguments as in `terms`."""
        if self.missing and mask is None:
            mask, landmarks = ~landmarks.isnan().any(-1), landmarks.nan_to_num()
        terms = self.terms(predicted, landmarks, mask, coarse)
        scores = [terms.pop(name) for name in ("score", *(coarse or ()))]
        return _scaled(_sum(scores), self.cls) + _scaled(_sum(terms.values()), self.reg)


def _cell(landmarks, grid):
    """Compute the cell (N, K) int64, the position (N, K, 2) in cells and the cell's corner."""
    at = landmarks * grid
    corner = at.floor().clamp(0, grid - 1)
    return (corner[..., 1] * grid + corner[..., 0]).long(), at, corner


# Without additions to zero and products with one: each is a kernel, forward and backward.

def _sum(values):
    return functools.reduce(operator.add, values)


def _scaled(value, factor):
    return value if factor == 1 else factor * value


def _error(maps, cell, target):
    """Compute the error of maps (N, K * M, G, G) at one cell (N, K) of each landmark.

    Maps may be half precision under autocast; errors have the dtype of the target, (N, K, M), or
    (N, K) where M is 1.
    """
    maps = maps.flatten(2).unflatten(1, (cell.shape[1], -1))
    found = maps.gather(3, cell[..., None, None].expand(-1, -1, maps.shape[2], 1))
    # A view, whose backward pass is a view too; that of an index fills a tensor.
    return found.view(target.shape).to(target.dtype) - target


def _score_term(score, cell, dtype, mask):
    """Compute the mean squared error of score maps (N, K, G, G) over those in the mask (N, K)."""
    score = score.flatten(2).to(dtype)
    target = torch.zeros_like(score).scatter_(2, cell[..., None], 1.0)
    if mask is None:
        return torch.nn.functional.mse_loss(score, target)
    return _mean((score - target).square().mean(-1), mask)


def _mean(values, mask):
    return values.mean() if mask is None else (values * mask).sum() / mask.sum().clamp(min=1)


class RegressionLoss:
    """Loss of the regression head: reg * mean robust loss of the coordinates.

    Errors are in cells of an 8 x 8 grid, the unit of the PIP head at 256 px, so that the same `reg`
    and offset loss suit both heads.

    Args:
        reg: weight of the loss.
        offset_loss: key of OFFSET_LOSSES.
        missing: whether landmarks may be NaN; these do not count.
    """

    GRID = 8

    def __init__(self, reg: float = 1.0, offset_loss: str = "wing", missing: bool = False):
        self.reg, self.offset_loss, self.missing = reg, OFFSET_LOSSES[offset_loss], missing

    def __call__(self, predicted: torch.Tensor, landmarks: torch.Tensor,
                 indices: torch.Tensor | None = None) -> torch.Tensor:
        """Compute the scalar loss of predicted and true landmarks (N, K, 2) in crop units."""
        mask = None
        if self.missing:
            mask, landmarks = ~landmarks.isnan(), landmarks.nan_to_num()
        error = (predicted.to(landmarks.dtype) - landmarks) * self.GRID
        return self.reg * _mean(self.offset_loss(error), mask)


def build_loss(model: LandmarkNet, cls: float, reg: float, offset_loss: str,
               eye_weight: float = 1.0, missing: bool = False) -> PIPLoss | RegressionLoss:
    """Build the loss of a network's head.

    Args:
        model: network.
        cls: weight of the score maps, of the PIP head only.
        reg: weight of offsets and neighbours, or of the regression.
        offset_loss: key of OFFSET_LOSSES.
        eye_weight: weight of the eyes' landmarks relative to others, of the PIP head only.
        missing: whether landmarks may be NaN; these do not count.

    Returns:
        A callable of (output of the head, landmarks (N, K, 2), indices (N,)) that returns a scalar.

    Raises:
        UserError: for an unknown offset loss.
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
