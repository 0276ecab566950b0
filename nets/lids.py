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
# Where shut lids meet, between the open lids; the same as utils.landmarks.lids.UPPER_SHARE.
UPPER_SHARE = 0.3


class LidHead(torch.nn.Module):
    """Draws the lids of shut eyes together in landmarks that were trained on open ones.

    Landmarks of a shut eye lie between shut and open, because the photos that they were learnt from
    show next to no shut eyes, while the backbone's features tell them apart: a logistic regression
    on them gives an eye's probability p of being shut, and its lids are moved by p ** SURE of the
    way to where they meet. An open eye (p = 0) keeps its landmarks, and so the NME. An eye counts
    for OTHER_EYE in what is said of the other.

    channels: of the feature map. eyes: the contours of the right and left eye, indices of landmarks
    from one corner round, as Scheme.eyes has them.
    """

    def __init__(self, channels, eyes):
        super().__init__()
        self.contours = [list(contour) for contour in eyes]
        self.weight = torch.nn.Parameter(torch.zeros(len(eyes), channels * len(PLACES)))
        # Nothing is shut as long as nothing was fitted.
        self.bias = torch.nn.Parameter(torch.full((len(eyes),), -30.0))

    def features_at(self, features, landmarks):
        """Features (N, C, G, G) under the eyes of landmarks (N, K, 2) in crop units: (N, 2, P * C)
        for the P PLACES of each eye, interpolated between cells."""
        # No tensor made here: a GPU would wait for it.
        ends = [(landmarks[:, c[0]], landmarks[:, c[len(c) // 2]]) for c in self.contours]
        spots = torch.stack([torch.stack([one + share * (two - one) for share in PLACES], 1)
                             for one, two in ends], 1)
        at = torch.nn.functional.grid_sample(features, 2 * spots - 1, padding_mode="border",
                                             align_corners=False)
        return at.permute(0, 2, 3, 1).flatten(2)

    def probability(self, values):
        """What features_at gives, (N, 2, P * C), to the probability (N, 2) that an eye is shut."""
        own = (values * self.weight).sum(-1) + self.bias
        return torch.sigmoid(torch.lerp(own, own.flip(-1), OTHER_EYE))

    def forward(self, features, landmarks):
        """Features (N, C, G, G), landmarks (N, K, 2): landmarks with shut lids drawn together."""
        shut = self.probability(self.features_at(features, landmarks))
        return self.draw(landmarks, shut ** SURE)

    def draw(self, landmarks, share):
        """Landmarks (N, K, 2) with lids moved by share (N, 2) of the way to where they meet."""
        points = list(landmarks.unbind(1))
        for eye, contour in enumerate(self.contours):
            for over, under in lid_pairs(contour):
                upper, lower = landmarks[:, over], landmarks[:, under]
                meeting = UPPER_SHARE * upper + (1 - UPPER_SHARE) * lower
                points[over] = torch.lerp(upper, meeting, share[:, eye, None])
                points[under] = torch.lerp(lower, meeting, share[:, eye, None])
        return torch.stack(points, 1)


def lid_pairs(contour):
    """[(upper, lower)] of the landmarks of an eye's lids that lie opposite each other."""
    half = len(contour) // 2
    return list(zip(contour[1:half], contour[:half:-1]))
