"""The decoded stored crops of a list: once in memory for all processes, or on a device."""
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

from utils.errors import UserError

# Left for everything else that a training needs; with less the machine would start to swap.
RESERVE = 1 << 30
# What `auto` takes at most of what is free: of a GPU's memory, which activations need too, and of
# the machine's, which is not this training's alone.
SHARE_DEVICE, SHARE_RAM = 0.25, 0.5
SHARED_MEMORY = "/dev/shm"


def make_cache(name, dataset, ranks):
    """A DeviceCache, a CropCache or None of a FaceDataset, as args.cache says; all ranks call this.

    auto: on GPUs the first where it takes at most a quarter of each GPU's free memory; else the
    second where it takes at most half of the machine's; else none. Says which, and why not the one
    before. Raises UserError where the one asked for does not fit.
    """
    if name == "device" or name == "auto" and ranks.device.type == "cuda":
        try:
            return DeviceCache(dataset, ranks, 1 if name == "device" else SHARE_DEVICE)
        except UserError as error:
            _or_raise(error, name, ranks)
    if name in ("ram", "auto"):
        try:
            return CropCache(dataset, ranks, SHARE_RAM if name == "auto" else None)
        except UserError as error:
            _or_raise(error, name, ranks)
    return None


def _or_raise(error, name, ranks):
    if name != "auto":
        raise error
    if ranks.first:
        print(f"{str(error).partition('; use --cache')[0]}; not cached so", flush=True)


class DeviceCache:
    """Stored crops in the memory of each rank's device: `crops` (N, T, T, 3) uint8 RGB.

    A crop of a smaller side than T lies in the upper left corner, and it is black beyond; `sides`
    has each one's, 0 where it cannot be read.
    """

    def __init__(self, dataset, ranks, share=1):
        """dataset: a FaceDataset. ranks: all processes of the run; everyone must call this. share:
        of the free memory that it may take. Raises UserError, on every rank, where it does not
        fit.
        """
        self.sides = ranks.share(lambda: _sides(dataset))
        most = max(self.sides, default=0)
        shape = len(self.sides), most, most, 3
        self.crops = ranks.together(_allocate, shape, ranks.device, share)
        if ranks.first:
            print(f"cache: {shape[0]} crops take {self.crops.numel() / 1e6:.0f} MB on "
                  f"{ranks.device.type}", flush=True)
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        for index, crop in _decoded(dataset, numpy.flatnonzero(self.sides), processes):
            if crop is None:
                self.sides[index] = 0
            else:
                self.crops[index, :crop.shape[0], :crop.shape[1]] = torch.from_numpy(crop)


def _allocate(shape, device, share):
    """Black crops on a device. Raises UserError."""
    size = int(numpy.prod(shape))
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
    else:
        free = _available() - RESERVE
    if size > share * free:
        part = "" if share == 1 else f" and {share:.0%} of them may be taken"
        raise UserError(f"cache: device: needs {size / 1e9:.2f} GB, {free / 1e9:.2f} GB of "
                        f"{device.type}'s memory are free{part}; use --cache ram")
    return torch.zeros(shape, dtype=torch.uint8, device=device)


class CropCache:
    """Stored crops as FaceDataset.read gives them: cache[i] is RGB (T, T, 3) uint8, or None.

    One memory-mapped file a machine, filled by its first process while the others wait. The file
    has lost its name before training starts, so nothing is left behind however the run ends;
    loader workers inherit the memory and must be forked. Raises UserError where it does not fit.
    """

    def __init__(self, dataset, ranks, share=None):
        """dataset: a FaceDataset. ranks: all processes of the run; everyone must call this. share:
        of the free memory that it may take, none of it on a disk; None: all but a gigabyte.
        """
        sides = numpy.array(ranks.share(lambda: _sides(dataset)), numpy.int64)
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
        found = ranks.collect((machine, path, problem))
        problems = [text for *_, text in found if text]
        try:
            if problems:
                raise UserError(problems[0])
            if ranks.first:
                print(f"cache: {len(sides)} crops take {size / 1e6:.0f} MB of memory", flush=True)
            if not mine:
                path = next(p for place, p, _ in found if place == machine and p)
            with open(path, "r+b") as file:
                self._memory = mmap.mmap(file.fileno(), max(size, 1))
            bad = self._fill(dataset) if mine else []
            for indices in ranks.collect(bad):
                sides[indices] = 0
        finally:
            if mine and path:
                pathlib.Path(path).unlink()

    def __getitem__(self, index):
        side = self._sides[index]
        if not side:
            return None
        crop = numpy.frombuffer(self._memory, numpy.uint8, 3 * side**2, self._starts[index])
        crop = crop.reshape(side, side, 3)
        # All processes see the same bytes; nobody may paint into them.
        crop.flags.writeable = False
        return crop

    def _fill(self, dataset):
        """Decode every crop into the memory; returns the indices of those that are damaged."""
        bad = []
        for index, crop in _decoded(dataset, numpy.flatnonzero(self._sides)):
            if crop is None:
                bad.append(int(index))
                continue
            start = self._starts[index]
            numpy.frombuffer(self._memory, numpy.uint8, crop.size, start)[:] = crop.reshape(-1)
        return bad


def _decoded(dataset, indices, processes=1):
    """(index, crop or None) of each, decoded on all cores that `processes` alike leave this one."""
    threads = cv2.getNumThreads()
    # OpenCV lets go of Python's lock while it decodes: one image a thread, not one for all.
    cv2.setNumThreads(1)
    workers = max(1, os.cpu_count() // processes)
    try:
        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            # Not all at once: what is decoded waits in memory until it is taken.
            for start in range(0, len(indices), 16 * workers):
                part = indices[start:start + 16 * workers]
                yield from zip(part, pool.map(dataset.read, part))
    finally:
        cv2.setNumThreads(threads)


def _sides(dataset):
    """Side in pixels of every crop of a FaceDataset; 0 where it cannot be read. Reads headers."""
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
    """The path of a new file of `size` bytes of memory. Raises UserError."""
    if not hasattr(os, "posix_fallocate"):
        raise UserError("cache: ram: works on Linux only; use --cache none")
    available = _available()
    if size > (available - RESERVE if share is None else share * available):
        part = f"{RESERVE / 1e9:.0f} GB of them must stay so" if share is None else \
            f"{share:.0%} of them may be taken"
        raise UserError(f"cache: ram: needs {size / 1e9:.2f} GB, {available / 1e9:.2f} GB of "
                        f"memory are free and {part}; use --cache none")
    room = {}
    # The second may be a disk, which reads and writes such a file without end.
    for folder in (SHARED_MEMORY, tempfile.gettempdir())[:2 if share is None else 1]:
        if not os.path.isdir(folder):
            continue
        room[folder] = shutil.disk_usage(folder).free
        if size > room[folder]:
            continue
        handle, path = tempfile.mkstemp(prefix="pipnet-cache-", dir=folder)
        try:
            # A file with holes would end the run with a bus error when the disk is full.
            os.posix_fallocate(handle, 0, max(size, 1))
            return path
        except OSError:
            os.unlink(path)
        finally:
            os.close(handle)
    rooms = ", ".join(f"{folder} has {free / 1e9:.2f}" for folder, free in room.items())
    raise UserError(f"cache: ram: needs {size / 1e9:.2f} GB; {rooms}. Enlarge /dev/shm (docker run "
                    f"--shm-size) or use --cache none")


def _available():
    """Bytes of memory that can be taken without swapping."""
    with open("/proc/meminfo", encoding="ascii") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith("MemAvailable"))
