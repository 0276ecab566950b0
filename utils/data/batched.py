"""The training loader for `cache: device`: crops are stored and augmented on the device.

It takes batches of keys from an EpochSampler, draws their augmentation on the host, and applies it
to the stored crops of a DeviceCache with BatchAugment. It needs no loader processes.
"""
from __future__ import annotations

from collections.abc import Iterator

import numpy
import torch

from utils.data.augment import BatchAugment
from utils.data.cache import DeviceCache
from utils.data.dataset import EpochSampler, FaceDataset


class BatchedLoader:
    """Iterates over the batches that a DataLoader of the same FaceDataset gives.

    Faces and landmarks are the same; images are equal but for rounding and noise (BatchAugment).

    Args:
        dataset: a FaceDataset with an Augment.
        sampler: the order of the faces.
        cache: the stored crops of `dataset`.
    """

    def __init__(self, dataset: FaceDataset, sampler: EpochSampler, cache: DeviceCache):
        self.dataset, self.sampler, self.cache = dataset, sampler, cache
        self.device = cache.crops.device
        self.augment = BatchAugment(dataset.size, self.device)

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Yield batches of n faces.

        Yields:
            images (n, S, S, 3) uint8 on the device; landmarks (n, K, 2) float32, indices (n,) and
            `unreadable` (n,) int64, all on the host, as FaceDataset has them.
        """
        data = self.dataset
        for keys in self.sampler:
            requested = [sample % len(data) for _, sample in keys]
            found = [data.first_readable(index, self._side) for index in requested]
            unreadable = [-1 if index == asked else asked
                          for asked, (index, _) in zip(requested, found)]
            params = [data.augmentation.draw_params(
                data.points[index], data.margin, side, data.size,
                data.generator(epoch, sample - asked + index))
                for (epoch, sample), asked, (index, side) in zip(keys, requested, found)]
            indices = [index for index, _ in found]
            crops = self.cache.crops[self.augment.grid.send(numpy.array(indices))]
            landmarks = torch.from_numpy(numpy.stack([face.landmarks for face in params]))
            if self.device.type == "cuda":
                landmarks = landmarks.pin_memory()
            yield (self.augment(crops, params), landmarks, torch.tensor(indices),
                   torch.tensor(unreadable))

    def _side(self, index):
        """Side of a stored crop in pixels; None where it cannot be read."""
        return self.cache.sides[index] or None
