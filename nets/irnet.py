"""IRNet-18, 50 and 100: the improved residual network of ArcFace (arXiv 1801.07698).

The layout is that of the released PIPNet checkpoints: batch norm before the first convolution of a
block, and no activation after the sum. `IRNet` gives feature maps at strides 4, 8, 16 and 32;
nets/backbone.py selects one of them for the head.
"""
from __future__ import annotations

import torch

DEPTHS = {18: (2, 2, 2, 2), 50: (3, 4, 14, 3), 100: (3, 13, 30, 3)}
WIDTHS = (64, 64, 128, 256, 512)
ACTIVATIONS = ("prelu", "relu")


class ConvNorm(torch.nn.Module):
    """Convolution without bias, batch norm and activation.

    Args:
        in_channels: width of the input.
        out_channels: width of the output.
        kernel: kernel size, odd.
        stride: stride of the convolution.
        activation: "prelu", "relu" or None.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int = 1,
                 activation: str | None = None):
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

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (N, in, H, W) to (N, out, H / stride, W / stride), sizes rounded up."""
        return self.act(self.norm(self.conv(x)))


class Block(torch.nn.Module):
    """Residual block: BN, 3x3 conv + BN + activation, 3x3 conv + BN, plus the shortcut.

    The sum is not activated.

    Args:
        in_channels: width of the input.
        out_channels: width of the output.
        stride: stride of the second convolution and of the shortcut.
        activation: "prelu" or "relu".
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, activation: str):
        super().__init__()
        self.norm = torch.nn.BatchNorm2d(in_channels)
        self.first = ConvNorm(in_channels, out_channels, 3, 1, activation)
        self.second = ConvNorm(out_channels, out_channels, 3, stride)
        if in_channels != out_channels:
            self.shortcut = ConvNorm(in_channels, out_channels, 1, stride)
        elif stride > 1:
            # A max-pool of size 1 is a subsampling without weights.
            self.shortcut = torch.nn.MaxPool2d(1, stride)
        else:
            self.shortcut = torch.nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (N, in, H, W) to (N, out, H / stride, W / stride), sizes rounded up."""
        return self.second(self.first(self.norm(x))) + self.shortcut(x)


class IRNet(torch.nn.Module):
    """IRNet with random weights and four feature maps.

    Args:
        depth: 18, 50 or 100.
        activation: "prelu" (published) or "relu" (faster on CPU).

    Attributes:
        channels: width of each feature map.
        strides: stride of each feature map.

    Raises:
        ValueError: another depth or activation.
    """

    channels = WIDTHS[1:]
    strides = (4, 8, 16, 32)

    def __init__(self, depth: int, activation: str = "prelu"):
        super().__init__()
        if depth not in DEPTHS:
            raise ValueError(f"IRNet depth is {depth}, expected one of {sorted(DEPTHS)}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation is {activation!r}, expected one of {ACTIVATIONS}")
        self.stem = ConvNorm(3, WIDTHS[0], 3, 2, activation)
        self.stages = torch.nn.ModuleList()
        for in_channels, out_channels, blocks in zip(WIDTHS[:-1], WIDTHS[1:], DEPTHS[depth]):
            self.stages.append(torch.nn.Sequential(
                Block(in_channels, out_channels, 2, activation),
                *(Block(out_channels, out_channels, 1, activation) for _ in range(blocks - 1))))
        self.apply(_initialise)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Compute the feature maps of normalised images.

        Args:
            x: (N, 3, S, S), S a multiple of 32.

        Returns:
            Four maps (N, channels[i], S / strides[i], S / strides[i]).
        """
        x = self.stem(x)
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return features


def _initialise(module):
    """Kaiming fan-out for convolutions; norms and PReLU keep torch's defaults."""
    if isinstance(module, torch.nn.Conv2d):
        torch.nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
