"""The training loader for `cache: device`: crops are stored and augmented on the device.

Loader processes draw the augmentation of the faces that an EpochSampler names, and pack it with the
landmarks into one buffer a batch (AugmentationDraws). BatchedLoader sends the buffer to the device
and applies it to the stored crops of a DeviceCache, one batch ahead of the training step.
"""
from __future__ import annotations

from collections.abc import Iterator

import numpy
import torch

from utils.data.augment import BatchAugment, pack_params
from utils.data.cache import DeviceCache
from utils.data.dataset import FaceDataset
from utils.data.operations import AugmentParams
from utils.data.pixel_grid import Packed


class AugmentationDraws(torch.utils.data.Dataset):
    """The random part of a FaceDataset's samples, without pixels.

    Args:
        dataset: a FaceDataset with an Augment.
        sides: side of each stored crop in pixels; 0 for one that cannot be read.
    """

    def __init__(self, dataset: FaceDataset, sides: list[int]):
        self.dataset, self.sides = dataset, sides

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> tuple[AugmentParams, int, int]:
        """Draw a sample.

        Returns:
            Its parameters, index of the face, and index of the unreadable image that it replaces,
            else -1.
        """
        (epoch, sample), data = key, self.dataset
        asked = sample % len(data)
        index, side = data.first_readable(asked, lambda i: self.sides[i] or None)
        params = data.augmentation.draw_params(
            data.points[index], data.margin, side, data.size,
            data.generator(epoch, sample - asked + index))
        return params, index, -1 if index == asked else asked

    def pack(self, samples: list[tuple[AugmentParams, int, int]]) -> Packed:
        """Pack a batch: arrays of pack_params, `landmarks`, `index` and `unreadable`."""
        params, indices, unreadable = zip(*samples)
        return Packed({"landmarks": numpy.stack([face.landmarks for face in params]),
                       "index": numpy.array(indices), "unreadable": numpy.array(unreadable),
                       **pack_params(params, max(self.sides), self.dataset.size)})


class BatchedLoader:
    """Iterates over the batches that a DataLoader of a FaceDataset gives.

    Faces and landmarks are the same; images are equal but for rounding and noise (BatchAugment).

    Args:
        batches: a DataLoader of AugmentationDraws that collates with its `pack`.
        cache: the stored crops of these faces.
    """

    def __init__(self, batches: torch.utils.data.DataLoader, cache: DeviceCache):
        self.batches, self.cache = batches, cache
        self.device = cache.crops.device
        self.augment = BatchAugment(batches.dataset.dataset.size, self.device)
        # Kernels on another stream run beside those of the training step.
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Yield batches of n faces; each is launched before the one before it is yielded.

        Yields:
            images (n, S, S, 3) uint8 and landmarks (n, K, 2) float32 on the device, indices (n,)
            and `unreadable` (n,) int64 on the host, as FaceDataset has them.
        """
        # Started here and not at the first batch, so that loader processes start together.
        return self._one_ahead(iter(self.batches))

    def _one_ahead(self, batches):
        if self.stream is not None:
            # The cache was filled on the current stream.
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
        launched = None
        for batch in batches:
            following = self._launch(batch)
            if launched is not None:
                yield self._ready(*launched)
            launched = following
        if launched is not None:
            yield self._ready(*launched)

    def _launch(self, batch):
        """Send and augment a batch; return its tensors and the event after which they are ready."""
        on_host = batch.on_host()
        with torch.cuda.stream(self.stream):
            arrays = batch.send(self.device)
            images = self.augment(self.cache.crops[arrays["index"]], arrays)
            event = None if self.stream is None else self.stream.record_event()
        return (images, arrays["landmarks"], on_host["index"], on_host["unreadable"]), event

    def _ready(self, tensors, event):
        """Let the current stream wait for a batch, and keep its memory until that is done with."""
        if event is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(event)
            for tensor in tensors[:2]:
                tensor.record_stream(current)
        return tensors
