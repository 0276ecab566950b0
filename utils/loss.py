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
    """cls * MSE(score map) + reg * (offset and neighbour terms at the target cells). PIPNet 3.1.

    Called with Maps and landmarks (N, K, 2) in crop units it gives the scalar loss; `terms` gives
    its five means: score, offset_x, offset_y, neighbour_x, neighbour_y. indices (N,) of the faces
    are for losses that tell them apart (gssl.RoundLoss).
    """

    def __init__(self, neighbours, cls=10.0, reg=1.0, offset_loss="l1"):
        self.neighbours, self.cls, self.reg = neighbours, cls, reg
        self.offset_loss = OFFSET_LOSSES[offset_loss]

    def terms(self, maps, landmarks):
        """The five unweighted loss terms, each a mean, as a list of scalars."""
        num_nb = self.neighbours.shape[1]
        # The maps may be half precision under autocast; squared errors are summed in float32.
        score = maps.score.flatten(2).to(landmarks.dtype)
        cell, offset, neighbour = encode(landmarks, self.neighbours, maps.score.shape[-1])
        target = torch.zeros_like(score).scatter_(2, cell[..., None], 1.0)
        terms = [torch.nn.functional.mse_loss(score, target)]
        at = cell[..., None]
        for axis, predicted in enumerate((maps.offset_x, maps.offset_y)):
            predicted = predicted.flatten(2).gather(2, at)[..., 0].to(landmarks.dtype)
            terms.append(self.offset_loss(predicted - offset[..., axis]).mean())
        at = cell.repeat_interleave(num_nb, 1)[..., None]
        for axis, predicted in enumerate((maps.neighbour_x, maps.neighbour_y)):
            if not num_nb:
                terms.append(score.new_zeros(()))
                continue
            predicted = predicted.flatten(2).gather(2, at)[..., 0].to(landmarks.dtype)
            error = predicted - neighbour[..., axis].flatten(1)
            terms.append(self.offset_loss(error).mean())
        return terms

    def __call__(self, maps, landmarks, indices=None):
        score, *rest = self.terms(maps, landmarks)
        return self.cls * score + self.reg * sum(rest)


class RegressionLoss:
    """reg * a robust loss of coordinates (N, K, 2), measured in the cells of an 8 x 8 grid.

    The unit is that of the PIP head at 256 px, so that the same `reg` and curve suit both heads.
    """

    GRID = 8

    def __init__(self, reg=1.0, offset_loss="wing"):
        self.reg, self.offset_loss = reg, OFFSET_LOSSES[offset_loss]

    def __call__(self, predicted, landmarks, indices=None):
        error = (predicted.to(landmarks.dtype) - landmarks) * self.GRID
        return self.reg * self.offset_loss(error).mean()


def build_loss(model, cls, reg, offset_loss):
    """The loss of a LandmarkNet's head. Raises UserError for an unknown offset loss."""
    if offset_loss not in OFFSET_LOSSES:
        raise UserError(f"offset_loss must be one of {', '.join(OFFSET_LOSSES)}, found "
                        f"{offset_loss!r}")
    if hasattr(model.head, "neighbours"):
        return PIPLoss(model.head.neighbours, cls, reg, offset_loss)
    return RegressionLoss(reg, offset_loss)
