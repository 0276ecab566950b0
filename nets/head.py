"""Prediction heads: backbone features to maps, maps to landmarks and confidence.

`PIPHead` is the Pixel-in-Pixel head of PIPNet (Jin, Liao and Shao, IJCV 2021, arXiv 2003.03771);
`RegressionHead` predicts coordinates directly. Both have the same three methods: `forward` gives
what the loss compares with the labels, `decode` turns that into landmarks, and `predict` does both
for inference. A new head goes into this file and into `nets.model.LandmarkNet`.
"""
from __future__ import annotations

import contextlib
import typing

import numpy
import torch

from utils.errors import UserError

if typing.TYPE_CHECKING:
    from utils.landmarks.schemes import Scheme


class Maps(typing.NamedTuple):
    """Output maps of the PIP head on a G x G grid.

    Offsets are in grid cells, from the top-left corner of a cell. Channel i * M + j of the
    neighbour maps belongs to neighbour j of landmark i.

    Attributes:
        score: (N, K, G, G).
        offset_x: (N, K, G, G).
        offset_y: (N, K, G, G).
        neighbour_x: (N, K * M, G, G).
        neighbour_y: (N, K * M, G, G).
    """
    score: torch.Tensor
    offset_x: torch.Tensor
    offset_y: torch.Tensor
    neighbour_x: torch.Tensor
    neighbour_y: torch.Tensor


class CoarseMaps(typing.NamedTuple):
    """Maps and the two coarser score maps of PIPNet's self-training curriculum (section 3.5).

    Attributes:
        maps: the maps of the G x G grid.
        half: scores (N, K, G / 2, G / 2).
        quarter: scores (N, K, G / 4, G / 4).
    """
    maps: Maps
    half: torch.Tensor
    quarter: torch.Tensor


class PIPHead(torch.nn.Module):
    """Pixel-in-Pixel head: score, offset and neighbour maps by 1x1 convolutions (PIPNet, 3).

    Each landmark predicts itself and its M neighbours, the nearest other landmarks on the mean
    face. The predictions of one landmark are merged to their weighted mean.

    Args:
        channels: width of the feature map.
        scheme: landmark scheme of K points. Its mean face defines the neighbours.
        num_nb: M, number of neighbours, 0..K-1.
        merge: weights of the predictions of one landmark. `plain`: equal weights. `padded`: as in
            the published code, which pads lists of predictors to the length of the longest one by
            repetition, so that a repeated prediction counts more than once; the published results
            use it. `confidence`: the best score of the predictor, so that a covered landmark
            counts less.

    Attributes:
        coarse: return CoarseMaps in training mode. The coarse scores are the score layer on
            max-pooled features (see utils/training/gssl.py).
        neighbours: (K, M), indices of the neighbours of each landmark, nearest first.
        predictors: (K, P + 1), `predictors[i]` lists who predicts landmark i, itself first.
        prediction_index: (K, P + 1), where those predictions are among all K * (M + 1).
        merge_weights: (K, P + 1), their weights without confidence; each row sums to 1.
    """

    coarse = False

    def __init__(self, channels: int, scheme: Scheme, num_nb: int = 10, merge: str = "plain"):
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
        table = nearest_neighbours(scheme.mean_face, num_nb)
        predictors, slots, mask = (torch.from_numpy(v) for v in reverse_neighbours(table))
        own = torch.arange(points)[:, None]
        weights = mask.any(1, keepdim=True).expand_as(mask) if merge == "padded" else mask
        weights = torch.cat([torch.ones_like(own), weights], 1).float()
        predictors = torch.cat([own, predictors], 1)
        # The predictions of a landmark are itself (slot 0) and its neighbours (slots 1..M).
        slots = torch.cat([torch.zeros_like(own), slots + 1], 1)
        # These follow from the scheme, so checkpoints do not store them.
        self.register_buffer("neighbours", torch.from_numpy(table), persistent=False)
        self.register_buffer("predictors", predictors, persistent=False)
        self.register_buffer("prediction_index", predictors * (num_nb + 1) + slots,
                             persistent=False)
        self.register_buffer("merge_weights", weights / weights.sum(1, keepdim=True),
                             persistent=False)

    def forward(self, features: torch.Tensor) -> Maps | CoarseMaps:
        """Predict the maps of features (N, C, G, G); CoarseMaps if `coarse` and in training."""
        empty = features.new_zeros((features.shape[0], 0, *features.shape[2:]))
        maps = Maps(self.score(features), self.offset_x(features), self.offset_y(features),
                    self.neighbour_x(features) if self.num_nb else empty,
                    self.neighbour_y(features) if self.num_nb else empty)
        if not (self.coarse and self.training):
            return maps
        half = torch.nn.functional.max_pool2d(features, 2)
        return CoarseMaps(maps, self.score(half),
                          self.score(torch.nn.functional.max_pool2d(half, 2)))

    def decode(self, maps: Maps) -> tuple[torch.Tensor, torch.Tensor]:
        """Decode PIP maps to landmarks (PIPNet, section 3.2).

        The best-scoring cell of a landmark gives its own prediction; the result is the mean of that
        and of its neighbours' predictions of it. Half-precision maps are decoded in float32.

        Args:
            maps: maps of a G x G grid, see Maps.

        Returns:
            Landmarks (N, K, 2) in crop units, and confidence (N, K) in 0..1.
        """
        grid = maps.score.shape[-1]
        maps = Maps(*(to_float32(values) for values in maps))
        score, cell = maps.score.flatten(2).max(-1)
        predictions = torch.cat([torch.stack([_at_cell(x, cell), _at_cell(y, cell)], -1)
                                 for x, y in self._xy_pairs(maps)], 2)
        return self._merge(score, cell, predictions, grid)

    def predict(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Predict landmarks of features, the same as `decode(forward(features))` but faster.

        Offsets and neighbours are computed only at the best-scoring cell of each landmark.
        Half-precision features, as autocast produces them, are decoded in float32.

        Args:
            features: (N, C, G, G).

        Returns:
            Landmarks (N, K, 2) in crop units, and confidence (N, K) in 0..1.
        """
        with autocast_disabled(features):
            return self._predict(to_float32(features))

    def _predict(self, features):
        score, cell = self.score(features).flatten(2).max(-1)
        # One matrix product per landmark: its features (K, N, C) times its own rows of the
        # offset and neighbour layers (K, C, 2 * (M + 1)), x and y of each prediction in turn.
        at = features.flatten(2).gather(2, cell[:, None].expand(-1, features.shape[1], -1))
        pairs = self._xy_pairs(self)
        weight = torch.cat([torch.stack([conv.weight.view(self.points, -1, features.shape[1])
                                         for conv in pair], 2) for pair in pairs], 1)
        bias = torch.cat([torch.stack([conv.bias.view(self.points, -1) for conv in pair], 2)
                          for pair in pairs], 1)
        predictions = torch.baddbmm(bias.flatten(1)[:, None], at.permute(2, 0, 1),
                                    weight.flatten(1, 2).transpose(1, 2))
        return self._merge(score, cell, predictions.transpose(0, 1).unflatten(2, (-1, 2)),
                           features.shape[-1])

    def _xy_pairs(self, source):
        """(x, y) of the offsets, then of any neighbours, of Maps or of this head's layers."""
        offset = [(source.offset_x, source.offset_y)]
        return offset + [(source.neighbour_x, source.neighbour_y)] if self.num_nb else offset

    def _merge(self, score, cell, predictions, grid):
        """Merge the predictions of each landmark.

        Args:
            score: best score of each landmark, (N, K).
            cell: index of the cell with that score, (N, K).
            predictions: predictions at that cell, (N, K, M + 1, 2), in grid cells from its corner.
            grid: G.

        Returns:
            Landmarks (N, K, 2) in crop units, and confidence (N, K).
        """
        # Whole numbers as floats: an integer division is eight nodes of an exported graph.
        cell = cell.to(predictions.dtype)
        row = torch.floor((cell + 0.5) / grid)
        corner = torch.stack([cell - grid * row, row], -1)
        predictions = (predictions + corner[:, :, None]).flatten(1, 2)
        predictions = predictions.index_select(1, self.prediction_index.flatten()).unflatten(
            1, self.prediction_index.shape)
        landmarks = (predictions * self._merge_weights(score)[..., None]).sum(2) / grid
        return landmarks, score.clamp(0, 1)

    def _merge_weights(self, score):
        """Weights (K, P + 1), or (N, K, P + 1) by confidence; they sum to 1 over the last axis."""
        if self.merge != "confidence":
            return self.merge_weights
        # The lower limit keeps the mean defined where all scores are 0.
        weights = score.clamp(0.01, 1.0)[:, self.predictors.flatten()]
        weights = weights.unflatten(1, self.predictors.shape) * (self.merge_weights > 0)
        return weights / weights.sum(-1, keepdim=True)


def _at_cell(values, cell):
    """Values (N, K, m) of maps (N, K * m, G, G) at one cell (N, K) of each landmark."""
    values = values.flatten(2).unflatten(1, (cell.shape[1], values.shape[1] // cell.shape[1]))
    return values.gather(3, cell[..., None, None].expand(*values.shape[:3], 1))[..., 0]


class RegressionHead(torch.nn.Module):
    """Regression head: global average pooling and one linear layer to K x 2 coordinates.

    The bias starts at the mean face, so that the first steps learn the pose and not the face.

    Args:
        channels: width of the feature map.
        scheme: landmark scheme of K points.
    """

    def __init__(self, channels: int, scheme: Scheme):
        super().__init__()
        self.points = scheme.points
        self.linear = torch.nn.Linear(channels, scheme.points * 2)
        torch.nn.init.normal_(self.linear.weight, std=0.001)
        with torch.no_grad():
            self.linear.bias.copy_(torch.from_numpy(scheme.mean_face).flatten())

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Predict landmarks (N, K, 2) in crop units from features (N, C, G, G)."""
        return self.linear(features.mean((2, 3))).unflatten(1, (self.points, 2))

    def decode(self, landmarks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return landmarks (N, K, 2) as they are, with confidence 1: a regression has no score."""
        return landmarks, torch.ones_like(landmarks[..., 0])

    def predict(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Predict landmarks (N, K, 2) and confidence (N, K) from features (N, C, G, G)."""
        with autocast_disabled(features):
            return self.decode(self(to_float32(features)))


def to_float32(values: torch.Tensor) -> torch.Tensor:
    """Convert half precision to float32; leave float32 and float64 unchanged.

    bfloat16 has 8 bits of precision. They do not hold a cell's corner plus an offset: the sum would
    be rounded to half a pixel or more of a 256 px crop.
    """
    return values.to(torch.promote_types(values.dtype, torch.float32))


def autocast_disabled(values: torch.Tensor) -> contextlib.AbstractContextManager:
    """Return a context that disables autocast on the device of a tensor."""
    kind = values.device.type
    # The exporter would keep an autocast node in its graph, hence no context where it is off.
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else \
        contextlib.nullcontext()


def nearest_neighbours(mean_face: numpy.ndarray, num_nb: int) -> numpy.ndarray:
    """Find the nearest other points of each point on the mean face (PIPNet, section 3.2).

    Args:
        mean_face: (K, 2).
        num_nb: M, number of neighbours.

    Returns:
        Indices (K, M), nearest first.

    Raises:
        UserError: num_nb is not in 0..K-1, or the mean face is not finite.
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


def reverse_neighbours(
        table: numpy.ndarray) -> tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]:
    """Invert a neighbour table: list which points predict each point.

    Rows shorter than the longest one (P) are padded by repetition from their start, as in the
    published code.

    Args:
        table: neighbour indices (K, M).

    Returns:
        predictors (K, P) and slots (K, P), with table[predictors[i, p], slots[i, p]] == i, and mask
        (K, P), False on the padding. A point without predictors has a row of False.
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
