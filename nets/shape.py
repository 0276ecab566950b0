"""Shape head: a linear residual correction over all landmarks of a face.

It runs after the prediction head and is fitted after training (main.py --fit-shape,
utils/training/shape_fit.py).
"""
from __future__ import annotations

import torch


class ShapeHead(torch.nn.Module):
    """Linear residual correction of the landmarks, from all landmarks together.

    The PIP head uses a landmark and its neighbours only. The whole shape constrains each landmark,
    as in active shape models (Cootes et al., 1995). For landmarks x about their mean, of norm |x|,
    the correction is x W + |x| b, which is equivariant to translation and scale. The bias also
    corrects labels with a left-right bias, as those of 300W, which training with mirrored faces
    averages out. W and b are zero until they are fitted.

    Args:
        points: K.
    """

    def __init__(self, points: int):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(2 * points, 2 * points))
        self.bias = torch.nn.Parameter(torch.zeros(2 * points))

    def forward(self, landmarks: torch.Tensor) -> torch.Tensor:
        """Correct landmarks (N, K, 2) in any unit; returns (N, K, 2) in the same unit."""
        shape = (landmarks - landmarks.mean(1, keepdim=True)).flatten(1)
        size = shape.square().sum(1, keepdim=True).sqrt()
        return landmarks + (shape @ self.weight + size * self.bias).unflatten(1, (-1, 2))
