"""Caches of decoded stored crops, so that training decodes each JPEG once.

A CropCache keeps the crops of a FaceDataset in memory that all processes of a machine share; a
DeviceCache keeps them in the memory of each rank's device, where BatchAugment augments them.
make_cache chooses by the setting `cache` and by the memory that is free.
"""
from __future__ import annotations

import concurrent.futures
import mmap
import os
import pathlib
import shutil
import tempfile

import cv2
import numpy
import PIL.Image
import torch

from utils.data.dataset import FaceDataset
from utils.errors import UserError
from utils.machine import available_cores

# Bytes that stay free for the rest of a training, so that the machine does not swap.
RESERVE = 1 << 30
# Largest share of the free memory that `auto` takes: of a GPU's, which activations need too, and of
# the machine's, which other programs use too.
SHARE_DEVICE, SHARE_RAM = 0.25, 0.5
SHARED_MEMORY = "/dev/shm"


def make_cache(name: str, dataset: FaceDataset, ranks,
               kept: str | None = None) -> DeviceCache | CropCache | None:
    """Make the cache that the setting `cache` asks for; all ranks must call this.

    Args:
        name: `device`, `ram`, `none`, or `auto`: on GPUs a DeviceCache where it takes at most a
            quarter of each GPU's free memory, else a CropCache where it takes at most half of the
            machine's, else none. Caches that do not fit are printed with the reason.
        dataset: the faces to cache.
        ranks: the Ranks of the run (utils/training/ddp.py).
        kept: with `auto`, what it chose before a resume (cache_name). It is tried first, and may
            then take all of the free memory, because images of `device` differ in rounding and
            noise from those of the others.

    Returns:
        The cache, or None.

    Raises:
        UserError: `device` or `ram` does not fit.
    """
    kept = kept if name == "auto" else None
    caches = []
    if "device" in (name, kept):
        caches.append((DeviceCache, 1))
    elif name == "auto" and kept is None and ranks.device.type == "cuda":
        caches.append((DeviceCache, SHARE_DEVICE))
    if name in ("ram", "auto") and kept != "none":
        caches.append((CropCache, None if "ram" in (name, kept) else SHARE_RAM))
    for cache, share in caches:
        try:
            return cache(dataset, ranks, share)
        except UserError as error:
            if name != "auto":
                raise
            if ranks.is_main:
                print(f"{str(error).partition('; use --cache')[0]}; not used", flush=True)
    return None


def cache_name(cache: DeviceCache | CropCache | None) -> str:
    """Return the value of the setting `cache` that stands for what make_cache returned."""
    return {DeviceCache: "device", CropCache: "ram"}.get(type(cache), "none")


class DeviceCache:
    """Stored crops in the memory of each rank's device.

    Args:
        dataset: the faces to cache.
        ranks: the Ranks of the run; all of them must construct the cache.
        share: largest share of the free memory that it may take.

    Attributes:
        crops: (N, T, T, 3) uint8 RGB on the device. A crop smaller than T is in the upper left
            corner, on black.
        sides: side of each crop in pixels; 0 for one that cannot be read.

    Raises:
        UserError: it does not fit (on every rank).
    """

    def __init__(self, dataset: FaceDataset, ranks, share: float = 1):
        self.sides = ranks.broadcast_result(lambda: _sides(dataset))
        side = max(self.sides, default=0)
        shape = len(self.sides), side, side, 3
        self.crops = ranks.run_on_all(_allocate, shape, ranks.device, share)
        if ranks.is_main:
            print(f"cache: {shape[0]} crops take {self.crops.numel() / 1e6:.0f} MB on "
                  f"{ranks.device.type}", flush=True)
        for index, crop in self._read(dataset, ranks):
            if crop is None:
                self.sides[index] = 0
            else:
                self.crops[index, :crop.shape[0], :crop.shape[1]] = torch.from_numpy(crop)


    def _read(self, dataset, ranks):
        """Yield (index, crop or None); ranks of one machine decode each crop once, if it fits."""
        indices = numpy.flatnonzero(self.sides)
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if ranks.world > 1:
            try:
                shared = CropCache(dataset, ranks, SHARE_RAM, self.sides)
                return ((index, shared[index]) for index in indices)
            except UserError:
                pass  # Then each rank decodes all crops.
        return _decoded(dataset, indices, processes)


def _allocate(shape, device, share):
    """Allocate black crops on a device."""
    size = int(numpy.prod(shape))
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # torch keeps blocks that it has freed, and gives them back to the driver where it needs to.
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    else:
        free = _available() - RESERVE
    if size > share * free:
        part = "" if share == 1 else f", of which {share:.0%} may be used"
        raise UserError(f"cache: device: needs {size / 1e9:.2f} GB, {free / 1e9:.2f} GB of "
                        f"{device.type}'s memory are free{part}; use --cache ram")
    return torch.zeros(shape, dtype=torch.uint8, device=device)


class CropCache:
    """Stored crops in memory that all processes of a machine share.

    cache[i] is the RGB crop (T, T, 3) uint8 that FaceDataset.read returns, or None. The memory is
    one mapped file per machine, which the first process fills while the others wait. The file is
    unlinked before training starts, so nothing is left behind however the run ends. Loader workers
    inherit the mapping, so they must be forked.

    Args:
        dataset: the faces to cache.
        ranks: the Ranks of the run; all of them must construct the cache.
        share: largest share of the free memory that it may take; the file is then in /dev/shm
            only. None: all but RESERVE, and the file may be in the temporary folder.
        sides: of the crops, where a DeviceCache has read them already and keeps this one for a
            moment only, which is not printed.

    Raises:
        UserError: it does not fit (on every rank).
    """

    def __init__(self, dataset: FaceDataset, ranks, share: float | None = None,
                 sides: list[int] | None = None):
        passing = sides is not None
        sides = numpy.array(sides if passing else ranks.broadcast_result(lambda: _sides(dataset)),
                            numpy.int64)
        self._sides, self._starts = sides, numpy.cumsum(3 * sides**2) - 3 * sides**2
        size = int((3 * sides**2).sum())
        machine = os.environ.get("GROUP_RANK", "0")
        mine = os.environ.get("LOCAL_RANK", "0") == "0"
        path, problem = None, None
        if mine:
            try:
                path = _reserve(size, share)
            except UserError as error:
                problem = str(error)
        found = ranks.all_gather((machine, path, problem))
        problems = [text for *_, text in found if text]
        try:
            if problems:
                raise UserError(problems[0])
            if ranks.is_main and not passing:
                print(f"cache: {len(sides)} crops take {size / 1e6:.0f} MB of memory", flush=True)
            if not mine:
                path = next(p for where, p, _ in found if where == machine and p)
            with open(path, "r+b") as file:
                self._memory = mmap.mmap(file.fileno(), max(size, 1))
            bad = self._fill(dataset) if mine else []
            for indices in ranks.all_gather(bad):
                sides[indices] = 0
        finally:
            if mine and path:
                pathlib.Path(path).unlink()

    def __getitem__(self, index: int) -> numpy.ndarray | None:
        side = self._sides[index]
        if not side:
            return None
        crop = numpy.frombuffer(self._memory, numpy.uint8, 3 * side**2, self._starts[index])
        crop = crop.reshape(side, side, 3)
        # All processes share these bytes.
        crop.flags.writeable = False
        return crop

    def _fill(self, dataset):
        """Decode every crop into the memory and return the indices of unreadable ones."""
        bad = []
        for index, crop in _decoded(dataset, numpy.flatnonzero(self._sides)):
            if crop is None:
                bad.append(int(index))
                continue
            start = self._starts[index]
            numpy.frombuffer(self._memory, numpy.uint8, crop.size, start)[:] = crop.reshape(-1)
        return bad


def _decoded(dataset, indices, processes=1):
    """Yield (index, crop or None), decoded on this one of `processes` processes' share of cores."""
    threads = cv2.getNumThreads()
    # OpenCV releases the GIL while it decodes, so one image per thread is fastest.
    cv2.setNumThreads(1)
    workers = max(1, available_cores() // processes)
    try:
        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            # In parts, because decoded crops stay in memory until they are consumed.
            for start in range(0, len(indices), 16 * workers):
                part = indices[start:start + 16 * workers]
                yield from zip(part, pool.map(dataset.read, part))
    finally:
        cv2.setNumThreads(threads)


def _sides(dataset):
    """List the side in pixels with which each crop is stored in memory; 0 for an unreadable one.

    The side follows from the header of the file where Pillow can read it.
    """
    sides = []
    for index, path in enumerate(dataset.faces.images):
        try:
            with PIL.Image.open(path) as image:
                sides.append(dataset.stored_side(image.height, image.width))
        except (OSError, PIL.Image.DecompressionBombError):
            crop = dataset.read(index)
            sides.append(0 if crop is None else crop.shape[0])
    return sides


def _reserve(size, share=None):
    """Make a file of `size` bytes in memory and return its path."""
    if not hasattr(os, "posix_fallocate"):
        raise UserError("cache: ram: works on Linux only; use --cache none")
    available = _available()
    if size > (available - RESERVE if share is None else share * available):
        part = f"{RESERVE / 1e9:.0f} GB must stay free" if share is None else \
            f"{share:.0%} may be used"
        raise UserError(f"cache: ram: needs {size / 1e9:.2f} GB, {available / 1e9:.2f} GB of "
                        f"memory are free, of which {part}; use --cache none")
    free = {}
    # The temporary folder may be on a disk, which would be read and written all the time.
    for folder in (SHARED_MEMORY, tempfile.gettempdir())[:2 if share is None else 1]:
        if not os.path.isdir(folder):
            continue
        free[folder] = shutil.disk_usage(folder).free
        if size > free[folder]:
            continue
        handle, path = tempfile.mkstemp(prefix="pipnet-cache-", dir=folder)
        try:
            # A sparse file would end the run with a bus error once the disk is full.
            os.posix_fallocate(handle, 0, max(size, 1))
            return path
        except OSError:
            os.unlink(path)
        finally:
            os.close(handle)
    found = ", ".join(f"{folder} has {count / 1e9:.2f}" for folder, count in free.items())
    raise UserError(f"cache: ram: needs {size / 1e9:.2f} GB; {found}. Enlarge /dev/shm (docker run "
                    f"--shm-size) or use --cache none")


def _available():
    """Return the bytes of memory that can be allocated without swapping."""
    with open("/proc/meminfo", encoding="ascii") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith("MemAvailable"))
