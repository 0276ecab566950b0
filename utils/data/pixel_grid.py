"""Pixel coordinates of a batch of square images on a device, and sampling at other coordinates.

The torch implementations of the augmentations are written with it. Parameters are drawn on the host
and sent to the device without blocking, so that a GPU never waits for the host.
"""
from __future__ import annotations

import numpy
import torch


class PixelGrid:
    """The pixels of square images on a device.

    Attributes:
        size: side of the images in pixels.
        device: the torch.device of the images.
        y: row of each pixel, (size, size) int64.
        x: column of each pixel, (size, size) int64.
    """

    def __init__(self, size: int, device: torch.device | str = "cpu"):
        self.size, self.device = size, torch.device(device)
        line = torch.arange(size, device=self.device)
        self.y, self.x = torch.meshgrid(line, line, indexing="ij")

    def send(self, array: numpy.ndarray) -> torch.Tensor:
        """Copy an array to the device; float64 becomes float32."""
        tensor = torch.from_numpy(numpy.ascontiguousarray(array))
        if tensor.dtype is torch.float64:
            tensor = tensor.float()
        if self.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)


def sample_bilinear(images: torch.Tensor, x: torch.Tensor, y: torch.Tensor,
                    outside: str) -> torch.Tensor:
    """Sample images at pixel coordinates, bilinearly.

    Args:
        images: (N, C, H, W) float.
        x: columns to sample, (N, S, S) in pixels.
        y: rows to sample, (N, S, S) in pixels.
        outside: value of pixels outside the image: `zeros`, or `border` for the nearest pixel.

    Returns:
        (N, C, S, S) float.
    """
    height, width = images.shape[2:]
    grid = torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], -1)
    return torch.nn.functional.grid_sample(images, grid, padding_mode=outside, align_corners=False)
