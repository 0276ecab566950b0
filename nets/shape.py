"""The shape of a whole face: what its landmarks, taken together, say of each one's error."""
import torch


class ShapeHead(torch.nn.Module):
    """Moves landmarks by a linear function of all of them.

    The PIP head places each landmark by itself and its neighbours; where one lies wrong, others
    that lie right give it away (as in active shape models, Cootes et al. 1995). On landmarks x
    about their mean and of size |x|, the correction is x W + |x| b: the same for a face elsewhere
    or of another size. It also holds by how much labels lie to one side, as those of 300W do, which
    mirrored faces hide from a network. Until it is fitted (main.py --fit-shape) it is none.

    points: K.
    """

    def __init__(self, points):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(2 * points, 2 * points))
        self.bias = torch.nn.Parameter(torch.zeros(2 * points))

    def forward(self, landmarks):
        """Landmarks (N, K, 2) in any unit to landmarks (N, K, 2)."""
        shape = (landmarks - landmarks.mean(1, keepdim=True)).flatten(1)
        size = shape.square().sum(1, keepdim=True).sqrt()
        return landmarks + (shape @ self.weight + size * self.bias).unflatten(1, (-1, 2))
