"""IRNet-18/50/100: the residual network of face recognition ("improved ResNet", ArcFace, arXiv
1801.07698), in the layout that PIPNet repositories release (BN first, no activation after the
sum). It reads alone: a convolution, a block, the network.
"""

import torch

DEPTHS = {18: (2, 2, 2, 2), 50: (3, 4, 14, 3), 100: (3, 13, 30, 3)}
WIDTHS = (64, 64, 128, 256, 512)
ACTIVATIONS = ("prelu", "relu")


class ConvNorm(torch.nn.Module):
    """k x k convolution without bias, batch norm, activation ("prelu", "relu" or None):
    (N, in, H, W) -> (N, out, H / stride, W / stride), rounded up.
    """

    def __init__(self, in_channels, out_channels, kernel, stride=1, activation=None):
        super().__init__()
        self.conv = torch.nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2,
                                    bias=False)
        self.norm = torch.nn.BatchNorm2d(out_channels)
        if activation == "prelu":
            self.act = torch.nn.PReLU(out_channels)
        elif activation == "relu":
            self.act = torch.nn.ReLU(inplace=True)
        else:
            self.act = torch.nn.Identity()

    def forward(self, x):
        """(N, in, H, W) -> (N, out, H / stride, W / stride)."""
        return self.act(self.norm(self.conv(x)))


class Block(torch.nn.Module):
    """BN, 3x3 conv + BN + activation, 3x3 conv (stride) + BN; plus the shortcut. The sum is not
    activated. (N, in, H, W) -> (N, out, H / stride, W / stride), rounded up.
    """

    def __init__(self, in_channels, out_channels, stride, activation):
        super().__init__()
        self.norm = torch.nn.BatchNorm2d(in_channels)
        self.first = ConvNorm(in_channels, out_channels, 3, 1, activation)
        self.second = ConvNorm(out_channels, out_channels, 3, stride)
        if in_channels != out_channels:
            self.shortcut = ConvNorm(in_channels, out_channels, 1, stride)
        elif stride > 1:
            # A max-pool of size 1 only picks every stride-th pixel: a shortcut without weights.
            self.shortcut = torch.nn.MaxPool2d(1, stride)
        else:
            self.shortcut = torch.nn.Identity()

    def forward(self, x):
        """(N, in, H, W) -> (N, out, H / stride, W / stride)."""
        return self.second(self.first(self.norm(x))) + self.shortcut(x)


class IRNet(torch.nn.Module):
    """IRNet of depth 18, 50 or 100, random weights; activation "prelu" (published) or "relu"
    (faster on CPU). Gives features at four strides: `channels` and `strides` say which.
    ValueError for another depth or activation.
    """

    channels = WIDTHS[1:]
    strides = (4, 8, 16, 32)

    def __init__(self, depth, activation="prelu"):
        super().__init__()
        if depth not in DEPTHS:
            raise ValueError(f"IRNet depth is {depth}, expected one of {sorted(DEPTHS)}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation is {activation!r}, expected one of {ACTIVATIONS}")
        self.stem = ConvNorm(3, WIDTHS[0], 3, 2, activation)
        self.stages = torch.nn.ModuleList()
        for before, after, blocks in zip(WIDTHS[:-1], WIDTHS[1:], DEPTHS[depth]):
            self.stages.append(torch.nn.Sequential(
                Block(before, after, 2, activation),
                *(Block(after, after, 1, activation) for _ in range(blocks - 1))))
        self.apply(_initialise)

    def forward(self, x):
        """Normalised images (N, 3, S, S) -> list of features (N, channels[i], S / strides[i],
        S / strides[i]) for i = 0..3; S a multiple of 32.
        """
        x = self.stem(x)
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return features


def _initialise(module):
    """Kaiming fan-out for convolutions; norms and PReLU keep torch's own start."""
    if isinstance(module, torch.nn.Conv2d):
        torch.nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
