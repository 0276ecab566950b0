"""Pixel coordinates of a batch of square images on a device, and arrays that go there together.

The torch implementations of the augmentations are written with it. Parameters are drawn and packed
on the host, and sent to the device in one copy without blocking, so that a GPU never waits for the
host.
"""
from __future__ import annotations

from collections.abc import Mapping

import numpy
import torch


class PixelGrid:
    """The pixels of square images on a device.

    Attributes:
        size: side S of the images in pixels.
        y: row of each pixel, (S, S) float32.
        x: column of each pixel, (S, S) float32.
        unit: (x, y) of each pixel for grid_sample, in which images go from -1 to 1, (S, S, 2).
        pixel: number of each pixel, (S * S,) int64.
        value: number of each value of an image (3, S, S), int64.
    """

    def __init__(self, size: int, device: torch.device | str = "cpu"):
        self.size = size
        line = torch.arange(size, dtype=torch.float32, device=device)
        self.y, self.x = (part.contiguous() for part in torch.meshgrid(line, line, indexing="ij"))
        self.unit = (2 * torch.stack([self.x, self.y], -1) + 1) / size - 1
        self.value = torch.arange(3 * size * size, device=device).view(3, size, size)
        self.pixel = self.value[0].flatten()


class Packed:
    """Named arrays in one buffer, as loader processes hand them over and devices receive them.

    Args:
        arrays: of numbers or bools; float64 becomes float32.

    Attributes:
        buffer: the bytes of all arrays, (B,) uint8.
        places: (name, first byte, dtype's name, shape) of each array.
    """

    def __init__(self, arrays: Mapping[str, numpy.ndarray]):
        parts, self.places, end = [], [], 0
        for name, array in arrays.items():
            array = numpy.asarray(array)
            if array.dtype == numpy.float64:
                array = array.astype(numpy.float32)
            # Tensors of eight bytes a number need starts at multiples of eight.
            part = numpy.zeros(-(-array.nbytes // 8) * 8, numpy.uint8)
            part[:array.nbytes] = numpy.ascontiguousarray(array).reshape(-1).view(numpy.uint8)
            parts.append(part)
            self.places.append((name, end, array.dtype.name, array.shape))
            end += len(part)
        self.buffer = torch.from_numpy(numpy.concatenate(parts))

    def on_host(self) -> dict[str, torch.Tensor]:
        """Return the arrays by name, as views of the buffer."""
        return self._views(self.buffer)

    def send(self, device: torch.device) -> dict[str, torch.Tensor]:
        """Copy the buffer to a device and return the arrays by name, as views of the copy."""
        buffer = self.buffer.pin_memory() if device.type == "cuda" else self.buffer
        return self._views(buffer.to(device, non_blocking=True))

    def _views(self, buffer):
        found = {}
        for name, start, dtype, shape in self.places:
            dtype = getattr(torch, dtype)
            end = start + int(numpy.prod(shape)) * dtype.itemsize
            found[name] = buffer[start:end].view(dtype).view(shape)
        return found
