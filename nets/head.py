"""Heads: features to maps, maps to landmarks and confidence."""
import contextlib
import typing

import numpy
import torch

from utils.errors import UserError


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


class CoarseMaps(typing.NamedTuple):
    """Maps, and the score maps (N, K, G/2, G/2) and (N, K, G/4, G/4) of PIPNet's curriculum."""
    maps: Maps
    half: torch.Tensor
    quarter: torch.Tensor


class PIPHead(torch.nn.Module):
    """Pixel-in-Pixel head: score, offset and neighbour maps by 1x1 convolutions (PIPNet, 3).

    channels: of the feature map. scheme: a landmarks.Scheme with K points. num_nb: M, 0..K-1.
    merge: how the predictions of one landmark are averaged, `plain` (every predictor weighs the
    same), `padded` (the published code: lists of predictors are padded to the longest one by
    repetition, so some weigh more; released models were scored with it) or `confidence` (every
    predictor weighs its own best score, so that a covered landmark says less of its neighbours).

    coarse, an attribute: whether training also gets the coarse score maps, which are the same score
    layer on max-pooled features (see utils/training/gssl.py).
    """

    coarse = False

    def __init__(self, channels, scheme, num_nb=10, merge="plain"):
        super().__init__()
        points = scheme.points
        self.points, self.num_nb, self.merge = points, num_nb, merge
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
        # Each landmark says M + 1 things, its own place first. Who speaks of landmark i, itself
        # first: `predictors` (K, P + 1), what of all that is said, `voters`, and what it weighs.
        # Derived from the scheme, so they are not part of the weights.
        self.register_buffer("neighbours", table, persistent=False)
        predictors, slots, mask = (torch.from_numpy(v) for v in reverse_neighbours(table.numpy()))
        own = torch.arange(points)[:, None]
        votes = mask.any(1, keepdim=True).expand_as(mask) if merge == "padded" else mask
        votes = torch.cat([torch.ones_like(own), votes], 1).float()
        predictors = torch.cat([own, predictors], 1)
        slots = torch.cat([torch.zeros_like(own), slots + 1], 1)
        self.register_buffer("predictors", predictors, persistent=False)
        self.register_buffer("voters", predictors * (num_nb + 1) + slots, persistent=False)
        self.register_buffer("votes", votes / votes.sum(1, keepdim=True), persistent=False)

    def forward(self, features):
        """Features (N, C, G, G) to Maps, or to CoarseMaps in a training that wants them."""
        empty = features.new_zeros((features.shape[0], 0, *features.shape[2:]))
        maps = Maps(self.score(features), self.offset_x(features), self.offset_y(features),
                    self.neighbour_x(features) if self.num_nb else empty,
                    self.neighbour_y(features) if self.num_nb else empty)
        if not (self.coarse and self.training):
            return maps
        half = torch.nn.functional.max_pool2d(features, 2)
        return CoarseMaps(maps, self.score(half),
                          self.score(torch.nn.functional.max_pool2d(half, 2)))

    def decode(self, maps):
        """Maps to landmarks (N, K, 2) in crop units and confidence (N, K) in 0..1.

        Per landmark the cell with the best score gives its own position; the mean of that and of
        what other landmarks say of it as their neighbour is the result (PIPNet, section 3.2).
        """
        grid = maps.score.shape[-1]
        maps = Maps(*(precise(values) for values in maps))
        score, cell = maps.score.flatten(2).max(-1)
        said = torch.cat([torch.stack([_at(x, cell), _at(y, cell)], -1)
                          for x, y in self._pairs(maps)], 2)
        return self._merge(score, cell, said, grid)

    def predict(self, features):
        """Features (N, C, G, G) to what `decode` gives of their maps, in less time.

        All but the scores is computed only at the cell of each landmark, not on the whole map.
        Features of half precision, as autocast makes them, are decoded in float32.
        """
        with full_precision(features):
            return self._predict(precise(features))

    def _predict(self, features):
        score, cell = self.score(features).flatten(2).max(-1)
        # Each landmark has its own feature vectors and its own small matrix: (K, N, C) x
        # (K, C, 2 * (M + 1)), which gives x and y of the first thing it says, of the second and on.
        at = features.flatten(2).gather(2, cell[:, None].expand(-1, features.shape[1], -1))
        pairs = self._pairs(self)
        weight = torch.cat([torch.stack([conv.weight.view(self.points, -1, features.shape[1])
                                         for conv in pair], 2) for pair in pairs], 1)
        bias = torch.cat([torch.stack([conv.bias.view(self.points, -1) for conv in pair], 2)
                          for pair in pairs], 1)
        said = torch.baddbmm(bias.flatten(1)[:, None], at.permute(2, 0, 1),
                             weight.flatten(1, 2).transpose(1, 2))
        return self._merge(score, cell, said.transpose(0, 1).unflatten(2, (-1, 2)),
                           features.shape[-1])

    def _pairs(self, whose):
        """The (x, y) for a landmark's own place, and for its neighbours where it has any, of Maps
        or of this head's layers.
        """
        own = [(whose.offset_x, whose.offset_y)]
        return own + [(whose.neighbour_x, whose.neighbour_y)] if self.num_nb else own

    def _merge(self, score, cell, said, grid):
        """Landmarks and confidence, from the best score (N, K) and its cell (N, K) of each, and
        what each says there (N, K, M + 1, 2), in cells from the corner of its own.
        """
        # Whole numbers, in floats: division of integers is eight steps of an exported graph.
        cell = cell.to(said.dtype)
        row = torch.floor((cell + 0.5) / grid)
        corner = torch.stack([cell - grid * row, row], -1)
        said = (said + corner[:, :, None]).flatten(1, 2)
        said = said.index_select(1, self.voters.flatten()).unflatten(1, self.voters.shape)
        landmarks = (said * self._votes(score)[..., None]).sum(2) / grid
        return landmarks, score.clamp(0, 1)

    def _votes(self, score):
        """Weights ((N,) K, P + 1) of all predictions of a landmark; each landmark's sum to 1."""
        if self.merge != "confidence":
            return self.votes
        # A face without any score still has a mean.
        votes = score.clamp(0.01, 1.0)[:, self.predictors.flatten()]
        votes = votes.unflatten(1, self.predictors.shape) * (self.votes > 0)
        return votes / votes.sum(-1, keepdim=True)


def _at(values, cell):
    """Maps (N, K * m, G, G) at the cell (N, K) of each landmark, as (N, K, m)."""
    values = values.flatten(2).unflatten(1, (cell.shape[1], values.shape[1] // cell.shape[1]))
    return values.gather(3, cell[..., None, None].expand(*values.shape[:3], 1))[..., 0]


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

    def predict(self, features):
        """Features (N, C, G, G) to landmarks and confidence, as decode gives them."""
        with full_precision(features):
            return self.decode(self(precise(features)))


def precise(values):
    """Half precision to float32; anything wider as it is.

    A corner of the grid and an offset in it do not both fit into the 8 bits of a bfloat16: the sum
    would be rounded to half a pixel of 256 and more.
    """
    return values.to(torch.promote_types(values.dtype, torch.float32))


def full_precision(values):
    """A context without autocast on the device of a tensor."""
    kind = values.device.type
    # Not where there is nothing to turn off: the exporter would keep it in its graph.
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else \
        contextlib.nullcontext()


def neighbours(mean_face, num_nb):
    """Indices (K, num_nb) of each point's nearest others on the mean face (K, 2), nearest first.

    PIPNet section 3.2. Raises UserError unless 0 <= num_nb < K.
    """
    mean_face = numpy.asarray(mean_face, numpy.float64).reshape(-1, 2)
    points = len(mean_face)
    if not 0 <= num_nb < points:
        raise UserError(f"num_nb must be 0..{points - 1} for {points} landmarks, found {num_nb}")
    if num_nb and not numpy.isfinite(mean_face).all():
        raise UserError("the mean face has no finite coordinates; set mean_face to data or a file")
    distance = ((mean_face[:, None] - mean_face[None]) ** 2).sum(-1)
    numpy.fill_diagonal(distance, numpy.inf)
    return numpy.argsort(distance, axis=1, kind="stable")[:, :num_nb]


def reverse_neighbours(table):
    """Who predicts whom. table (K, M) to (predictors, slots), each (K, P), and a mask (K, P).

    predictors[i, p] is a point j with table[j, slots[i, p]] == i; rows shorter than the longest (P)
    are padded by repeating them from their start, as the published code does, and mask is False on
    the padding. A point that nobody predicts has an all-False row.
    """
    points, num_nb = table.shape
    found = [[] for _ in range(points)]
    for j in range(points):
        for slot in range(num_nb):
            found[table[j, slot]].append((j, slot))
    longest = max((len(f) for f in found), default=0)
    predictors = numpy.zeros((points, longest), numpy.int64)
    slots = numpy.zeros((points, longest), numpy.int64)
    mask = numpy.zeros((points, longest), bool)
    for i, row in enumerate(found):
        for p in range(longest if row else 0):
            predictors[i, p], slots[i, p] = row[p % len(row)]
            mask[i, p] = p < len(row)
    return predictors, slots, mask
