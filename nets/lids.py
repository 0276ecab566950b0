"""Lids that meet: whether an eye is shut, read from the features under it, as landmarks."""
import torch

# Where the features of an eye are read: shares of the way from one of its corners to the other.
PLACES = (0.25, 0.5, 0.75)
# How much the other eye has to say in whether an eye is shut: eyes mostly shut together. Chosen on
# faces that were not scored: at 0, 0.3 and 0.5 fast finds 95.5, 96.4 and 96.2 % of the shut ones at
# 1 % false alarms, and half would make a wink a coin's toss.
OTHER_EYE = 0.3
# Lids are drawn together by p ** SURE of the way, p the probability that the eye is shut: a doubt
# moves nothing. On LFPW's 12 points 1 costs 0.033 of NME, 3 costs 0.011, and shut eyes are told as
# well.
SURE = 3
# Where shut lids meet, between the open lids; the same as utils.landmarks.eyelids.UPPER_SHARE.
UPPER_SHARE = 0.3


class LidHead(torch.nn.Module):
    """Draws the lids of shut eyes together in landmarks that were trained on open ones.

    Landmarks of a shut eye lie between shut and open, because the photos that they were learnt from
    show next to no shut eyes, while the backbone's features tell them apart: a logistic regression
    on them gives an eye's probability p of being shut, and its lids are moved by p ** SURE of the
    way to where they meet. An open eye (p = 0) keeps its landmarks, and so the NME. An eye counts
    for OTHER_EYE in what is said of the other.

    channels: of the feature map. scheme: a Scheme with eyes, the contours of the right and the left
    one.
    """

    def __init__(self, channels, scheme):
        super().__init__()
        eyes = scheme.eyes
        self.weight = torch.nn.Parameter(torch.zeros(len(eyes), channels * len(PLACES)))
        # Nothing is shut as long as nothing was fitted.
        self.bias = torch.nn.Parameter(torch.full((len(eyes),), -30.0))
        # All lids move in one step: a few steps for each were a tenth of the time of a network as
        # small as `tiny`.
        one, two = torch.tensor([(c[0], c[len(c) // 2]) for c in eyes]).T
        self._constant("one", one.repeat_interleave(len(PLACES)))
        self._constant("two", two.repeat_interleave(len(PLACES)))
        self._constant("places", torch.tensor(PLACES).repeat(len(eyes))[:, None])
        opposite, way = torch.arange(scheme.points), torch.zeros(scheme.points)
        eye_of = torch.zeros(scheme.points, dtype=torch.long)
        for eye, contour in enumerate(eyes):
            for over, under in lid_pairs(contour):
                opposite[over], opposite[under] = under, over
                way[over], way[under] = 1 - UPPER_SHARE, UPPER_SHARE
                eye_of[over] = eye_of[under] = eye
        self._constant("opposite", opposite)
        self._constant("way", way)
        self._constant("eye_of", eye_of)

    def _constant(self, name, values):
        self.register_buffer(name, values, persistent=False)

    def features_at(self, features, landmarks):
        """Features (N, C, G, G) under the eyes of landmarks (N, K, 2) in crop units: (N, 2, P * C)
        for the P PLACES of each eye, interpolated between cells.
        """
        one, two = (landmarks.index_select(1, corner) for corner in (self.one, self.two))
        spots = (one + self.places * (two - one)).unflatten(1, (-1, len(PLACES)))
        at = torch.nn.functional.grid_sample(features, 2 * spots - 1, padding_mode="border",
                                             align_corners=False)
        return at.permute(0, 2, 3, 1).flatten(2)

    def probability(self, values):
        """What features_at gives, (N, 2, P * C), to the probability (N, 2) that an eye is shut."""
        own = (values * self.weight).sum(-1) + self.bias
        return torch.sigmoid(own + OTHER_EYE * (own.flip(-1) - own))

    def forward(self, features, landmarks):
        """Features (N, C, G, G), landmarks (N, K, 2): landmarks with shut lids drawn together."""
        shut = self.probability(self.features_at(features, landmarks))
        return self.draw(landmarks, shut ** SURE)

    def draw(self, landmarks, share):
        """Landmarks (N, K, 2) with lids moved by share (N, 2) of the way to where they meet."""
        across = landmarks.index_select(1, self.opposite) - landmarks
        way = share.index_select(1, self.eye_of) * self.way
        return landmarks + way[..., None] * across


def lid_pairs(contour):
    """[(upper, lower)] of the landmarks of an eye's lids that lie opposite each other."""
    half = len(contour) // 2
    return list(zip(contour[1:half], contour[:half:-1]))
