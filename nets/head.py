"""Heads: features to maps, maps to landmarks and confidence."""
import typing

import torch

from utils.landmarks import neighbours, reverse_neighbours


class Maps(typing.NamedTuple):
    """What the PIP head predicts on a G x G grid, in grid cells from a cell's top-left corner.

    score, offset_x, offset_y: (N, K, G, G); neighbour_x, neighbour_y: (N, K * M, G, G), channel
    i * M + j is neighbour j of landmark i.
    """
    score: torch.Tensor
    offset_x: torch.Tensor
    offset_y: torch.Tensor
    neighbour_x: torch.Tensor
    neighbour_y: torch.Tensor


class PIPHead(torch.nn.Module):
    """Pixel-in-Pixel head: score, offset and neighbour maps by 1x1 convolutions (PIPNet, section 3).

    channels: of the feature map. scheme: a landmarks.Scheme with K points. num_nb: M, 0..K-1.
    merge: how the predictions of one landmark are averaged, `plain` (every predictor weighs the
    same) or `padded` (the published code: lists of predictors are padded to the longest one by
    repetition, so some weigh more; released models were scored with it).
    """

    def __init__(self, channels, scheme, num_nb=10, merge="plain"):
        super().__init__()
        points = scheme.points
        self.points, self.num_nb = points, num_nb
        self.score = torch.nn.Conv2d(channels, points, 1)
        self.offset_x = torch.nn.Conv2d(channels, points, 1)
        self.offset_y = torch.nn.Conv2d(channels, points, 1)
        if num_nb:
            self.neighbour_x = torch.nn.Conv2d(channels, points * num_nb, 1)
            self.neighbour_y = torch.nn.Conv2d(channels, points * num_nb, 1)
        for conv in self.children():
            torch.nn.init.normal_(conv.weight, std=0.001)
            torch.nn.init.zeros_(conv.bias)
        table = torch.from_numpy(neighbours(scheme.mean_face, num_nb))
        # Which of the (K, M) neighbour predictions speak of landmark i, and what each weighs.
        # Derived from the scheme, so they are not part of the weights.
        self.register_buffer("neighbours", table, persistent=False)
        predictors, slots, mask = reverse_neighbours(table.numpy())
        voters = torch.from_numpy(predictors * max(num_nb, 1) + slots)
        votes = torch.from_numpy(mask).float()
        if merge == "padded":
            votes = votes.any(1, keepdim=True).expand_as(votes).float()
        total = 1 + votes.sum(1, keepdim=True)
        self.register_buffer("voters", voters, persistent=False)
        self.register_buffer("votes", votes / total, persistent=False)
        self.register_buffer("own_vote", (1 / total)[:, 0], persistent=False)

    def forward(self, features):
        """Features (N, C, G, G) to Maps."""
        empty = features.new_zeros((features.shape[0], 0, *features.shape[2:]))
        return Maps(self.score(features), self.offset_x(features), self.offset_y(features),
                    self.neighbour_x(features) if self.num_nb else empty,
                    self.neighbour_y(features) if self.num_nb else empty)

    def decode(self, maps):
        """Maps to landmarks (N, K, 2) in crop units and confidence (N, K) in 0..1.

        Per landmark the cell with the best score gives its own position; the mean of that and of
        what other landmarks say of it as their neighbour is the result (PIPNet, section 3.2).
        """
        grid = maps.score.shape[-1]
        score, cell = maps.score.flatten(2).max(-1)
        corner_x, corner_y = cell % grid, cell // grid
        merged = [self._merge(*axis, cell, grid) for axis in (
            (maps.offset_x, maps.neighbour_x, corner_x), (maps.offset_y, maps.neighbour_y, corner_y))]
        return torch.stack(merged, -1), score.clamp(0, 1)

    def _merge(self, offset, neighbour, corner, cell, grid):
        own = offset.flatten(2).gather(2, cell[..., None])[..., 0] + corner
        if not self.num_nb:
            return own / grid
        at = cell.repeat_interleave(self.num_nb, 1)[..., None]
        others = neighbour.flatten(2).gather(2, at)[..., 0]
        others = others + corner.repeat_interleave(self.num_nb, 1)
        others = others[:, self.voters.flatten()].unflatten(1, self.voters.shape)
        return (own * self.own_vote + (others * self.votes).sum(-1)) / grid


class RegressionHead(torch.nn.Module):
    """Global pooling and one linear layer to K x 2 coordinates in crop units.

    It starts at the mean face, so that the first steps learn the pose and not the face.
    """

    def __init__(self, channels, scheme):
        super().__init__()
        self.points = scheme.points
        self.linear = torch.nn.Linear(channels, scheme.points * 2)
        torch.nn.init.normal_(self.linear.weight, std=0.001)
        with torch.no_grad():
            self.linear.bias.copy_(torch.from_numpy(scheme.mean_face).flatten())

    def forward(self, features):
        """Features (N, C, G, G) to landmarks (N, K, 2) in crop units."""
        return self.linear(features.mean((2, 3))).unflatten(1, (self.points, 2))

    def decode(self, landmarks):
        """Landmarks as they are, with confidence 1 (N, K): a regression has no score."""
        return landmarks, torch.ones_like(landmarks[..., 0])
