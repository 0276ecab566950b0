"""`cache: ram`: the decoded stored crops of a list, once in memory for all processes."""
import concurrent.futures
import mmap
import os
import pathlib
import shutil
import tempfile

import cv2
import numpy
import PIL.Image

from utils.errors import UserError

# Left for everything else that a training needs; with less the machine would start to swap.
RESERVE = 1 << 30


class CropCache:
    """Stored crops as FaceDataset.read gives them: cache[i] is RGB (T, T, 3) uint8, or None.

    One memory-mapped file a machine, filled by its first process while the others wait. The file
    has lost its name before training starts, so nothing is left behind however the run ends;
    loader workers inherit the memory and must be forked. Raises UserError where it does not fit.
    """

    def __init__(self, dataset, ranks):
        """dataset: a FaceDataset. ranks: all processes of the run; everyone must call this."""
        sides = numpy.array(ranks.share(lambda: _sides(dataset)), numpy.int64)
        self._sides, self._starts = sides, numpy.cumsum(3 * sides**2) - 3 * sides**2
        size = int((3 * sides**2).sum())
        if ranks.first:
            print(f"cache: {len(sides)} crops take {size / 1e6:.0f} MB of memory", flush=True)
        machine = os.environ.get("GROUP_RANK", "0")
        mine = os.environ.get("LOCAL_RANK", "0") == "0"
        path, problem = None, None
        if mine:
            try:
                path = _reserve(size)
            except UserError as error:
                problem = str(error)
        found = ranks.collect((machine, path, problem))
        problems = [text for *_, text in found if text]
        try:
            if problems:
                raise UserError(problems[0])
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
        def decode(index):
            crop = dataset.read(index)
            if crop is None:
                return False
            start = self._starts[index]
            numpy.frombuffer(self._memory, numpy.uint8, crop.size, start)[:] = crop.reshape(-1)
            return True

        indices = numpy.flatnonzero(self._sides)

        threads = cv2.getNumThreads()
        # OpenCV lets go of Python's lock while it decodes: one image a thread, not one for all.
        cv2.setNumThreads(1)
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            good = list(pool.map(decode, indices))
        cv2.setNumThreads(threads)
        return [int(index) for index, fine in zip(indices, good) if not fine]


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


def _reserve(size):
    """The path of a new file of `size` bytes of memory. Raises UserError."""
    if not hasattr(os, "posix_fallocate"):
        raise UserError("cache: ram: works on Linux only; use --cache none")
    available = _available()
    if size > available - RESERVE:
        raise UserError(f"cache: ram: needs {size / 1e9:.2f} GB, {available / 1e9:.2f} GB of "
                        f"memory are free and {RESERVE / 1e9:.0f} GB of them must stay so; use "
                        f"--cache none")
    room = {}
    for folder in ("/dev/shm", tempfile.gettempdir()):
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
