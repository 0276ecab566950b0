"""Lid head: closes the eyelids of a prediction where the features show a closed eye.

Training photos hardly contain closed eyes, so the predicted lids of a closed eye stay apart,
although the backbone's features separate open from closed eyes. `LidHead` samples the features
along each eye, classifies the eye, and moves the lids together in proportion. It is fitted after
training (main.py --fit-eyes, utils/training/lid_fit.py) and runs after the prediction head.
"""
from __future__ import annotations

import typing

import torch

from utils.landmarks.eyelids import UPPER_LID_WEIGHT, split_contour

if typing.TYPE_CHECKING:
    from utils.landmarks.schemes import Scheme

# Where an eye's features are sampled, from one corner (0) to the other (1).
SAMPLE_POSITIONS = (0.25, 0.5, 0.75)
# Weight of the other eye's logit, because eyes mostly close together. Chosen on faces outside the
# test lists, at 1 % false alarms: 0, 0.3 and 0.5 find 95.5, 96.4 and 96.2 % of the closed eyes with
# `fast`. With 0.5 both eyes get the same probability, so that a wink cannot be seen.
OTHER_EYE_WEIGHT = 0.3
# Lids move by p ** CLOSURE_EXPONENT of the way, p the probability that the eye is closed. An
# exponent above 1 keeps the landmarks of an uncertain eye. On the 12 eye points of LFPW, 1 adds
# 0.033 to the NME and 3 adds 0.011; closed eyes are detected equally well.
CLOSURE_EXPONENT = 3


class LidHead(torch.nn.Module):
    """Closes the lids of closed eyes in landmarks that were trained on open ones.

    A logistic regression on the features at an eye gives the probability p that it is closed. Its
    lid points then move by p ** CLOSURE_EXPONENT of the way to where the lids meet. An open eye
    (p = 0) keeps its landmarks. A new head has a bias of -30, so that it changes nothing until it
    is fitted.

    Args:
        channels: C, width of the feature map.
        scheme: landmark scheme of K points with eye contours.
    """

    def __init__(self, channels: int, scheme: Scheme):
        super().__init__()
        eyes = scheme.eyes
        self.weight = torch.nn.Parameter(torch.zeros(len(eyes), channels * len(SAMPLE_POSITIONS)))
        self.bias = torch.nn.Parameter(torch.full((len(eyes),), -30.0))
        # Index tables over all landmarks, so that all lids move in one step: separate steps for
        # each lid take a tenth of the time of a network as small as `tiny`.
        first, second = torch.tensor([split_contour(contour)[0] for contour in eyes]).T
        opposite, travel = torch.arange(scheme.points), torch.zeros(scheme.points)
        eye_index = torch.zeros(scheme.points, dtype=torch.long)
        for eye, contour in enumerate(eyes):
            for upper, lower in zip(*split_contour(contour)[1:]):
                opposite[upper], opposite[lower] = lower, upper
                travel[upper], travel[lower] = 1 - UPPER_LID_WEIGHT, UPPER_LID_WEIGHT
                eye_index[upper] = eye_index[lower] = eye
        samples = len(SAMPLE_POSITIONS)
        for name, values in (
                ("first_corner", first.repeat_interleave(samples)),
                ("second_corner", second.repeat_interleave(samples)),
                ("positions", torch.tensor(SAMPLE_POSITIONS).repeat(len(eyes))[:, None]),
                ("opposite", opposite), ("travel", travel), ("eye_index", eye_index)):
            self.register_buffer(name, values, persistent=False)

    def eye_features(self, features: torch.Tensor, landmarks: torch.Tensor) -> torch.Tensor:
        """Sample the features along both eyes, interpolated between cells.

        Args:
            features: (N, C, G, G).
            landmarks: (N, K, 2) in crop units.

        Returns:
            (N, 2, P * C), for the P sample positions of the right and the left eye.
        """
        first, second = (landmarks.index_select(1, corner)
                         for corner in (self.first_corner, self.second_corner))
        positions = first + self.positions * (second - first)
        grid = 2 * positions.unflatten(1, (-1, len(SAMPLE_POSITIONS))) - 1
        sampled = torch.nn.functional.grid_sample(features, grid, padding_mode="border",
                                                  align_corners=False)
        return sampled.permute(0, 2, 3, 1).flatten(2)

    def closed_probability(self, eye_features: torch.Tensor) -> torch.Tensor:
        """Classify eye features (N, 2, P * C): probability (N, 2) that each eye is closed."""
        logit = (eye_features * self.weight).sum(-1) + self.bias
        return torch.sigmoid(logit + OTHER_EYE_WEIGHT * (logit.flip(-1) - logit))

    def forward(self, features: torch.Tensor, landmarks: torch.Tensor) -> torch.Tensor:
        """Return landmarks (N, K, 2) with the lids of closed eyes moved together.

        Args:
            features: (N, C, G, G), float32.
            landmarks: (N, K, 2) in crop units.
        """
        closed = self.closed_probability(self.eye_features(features, landmarks))
        return self.close_lids(landmarks, closed ** CLOSURE_EXPONENT)

    def close_lids(self, landmarks: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
        """Move the lids of landmarks (N, K, 2) by share (N, 2) of the way to where they meet."""
        to_opposite = landmarks.index_select(1, self.opposite) - landmarks
        travel = share.index_select(1, self.eye_index) * self.travel
        return landmarks + travel[..., None] * to_opposite
