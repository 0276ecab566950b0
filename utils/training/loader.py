"""Training data loader, its worker processes, and the faults that a training tolerates."""
from __future__ import annotations

import argparse
import atexit
import functools
import multiprocessing
import os
import pathlib
import shutil
import signal
import sys
import time
import typing
from collections.abc import Iterable, Iterator

import torch
import tqdm

from utils.data.augment import Augment
from utils.data.batched import AugmentationDraws, BatchedLoader
from utils.data.cache import SHARED_MEMORY, DeviceCache, make_cache
from utils.data.dataset import EpochSampler, FaceDataset, PreparedSet
from utils.data.face_list import FaceList
from utils.errors import UserError, shell_word
from utils.landmarks.crop import disable_opencv_threads
from utils.landmarks.schemes import Scheme
from utils.training import control
from utils.training.ddp import Ranks

MAX_BAD_STEPS = 3  # In a row.
MAX_BAD_IMAGES = 0.01  # Share of the training list.
SHARED_MEMORY_ADVICE = "give --workers 0, or a container more of it (docker run --shm-size=1g)"


def make_loader(faces: FaceList, prepared: PreparedSet, scheme: Scheme, args: argparse.Namespace,
                ranks: Ranks, accumulate: int,
                kept_cache: str | None = None) -> tuple[typing.Any, EpochSampler]:
    """Build the training loader and its sampler. All ranks must call this.

    Args:
        faces: training list.
        prepared: set the faces belong to.
        scheme: landmarks to train, all of the set's or some.
        args: training settings.
        ranks: process group.
        accumulate: micro-batches per optimiser step.
        kept_cache: what `cache: auto` chose before a resume.

    Returns:
        A loader of (images (n, S, S, 3) uint8, landmarks (n, K, 2) float32 in crop units, indices
        (n,), unreadable (n,): index of the image that another one replaces, or -1), and the
        EpochSampler. The loader is a BatchedLoader if the crops are cached on the device, else a
        DataLoader.

    Raises:
        UserError: if the cache or the workers' batches do not fit into memory.
    """
    dataset = FaceDataset(faces, prepared.margin, args.input_size, scheme.indices,
                          Augment(args, scheme.flip if scheme.mirrors else None,
                                  scheme if scheme.eyes else None), args.seed)
    sampler = EpochSampler(len(faces), args.batch_size, accumulate, ranks.rank, ranks.world,
                           args.seed)
    context, cache = None, make_cache(args.cache, dataset, ranks, kept_cache)
    on_device, options = isinstance(cache, DeviceCache), {}
    if on_device:
        draws = AugmentationDraws(dataset, [int(side) for side in cache.sides])
        options = {"collate_fn": draws.pack}
    elif cache is not None:
        dataset.cache = cache
        # Forked workers inherit the cache; spawned ones would be sent a copy.
        context = "fork" if args.workers else None
    if args.workers and not on_device:
        # Each worker prepares two batches beside the one in use.
        check_shared_memory(3 * args.workers * args.batch_size * args.input_size ** 2 * 3)
    exiting = multiprocessing.Value("b", 0, lock=False)
    atexit.register(setattr, exiting, "value", 1)
    disable_opencv_threads()
    loader = torch.utils.data.DataLoader(
        draws if on_device else dataset, batch_sampler=sampler, num_workers=args.workers,
        worker_init_fn=functools.partial(_ignore_signals, exiting),
        persistent_workers=args.workers > 0, multiprocessing_context=context,
        # A BatchedLoader pins its single buffer itself.
        pin_memory=ranks.device.type == "cuda" and not on_device, **options)
    return BatchedLoader(loader, cache) if on_device else loader, sampler


def _ignore_signals(exiting, _):
    """Leave signals to the main process until it exits, when multiprocessing sends a SIGTERM."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: exiting.value and os._exit(0))


def check_shared_memory(needed: float, path: str | pathlib.Path = SHARED_MEMORY) -> None:
    """Check that workers can hand over `needed` bytes of batches through shared memory.

    Raises:
        UserError: if less is free.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        free = shutil.disk_usage(path).free
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; loader processes hand over their batches "
                        f"there: {SHARED_MEMORY_ADVICE}") from None
    if free < needed:
        raise UserError(f"{path}: {free / 1e6:.0f} MB are free, the batches of the loader "
                        f"processes take {needed / 1e6:.0f}: {SHARED_MEMORY_ADVICE}")


def next_batch(batches: Iterator) -> typing.Any:
    """Return the next batch of a loader's iterator.

    Raises:
        UserError: raised by a worker process, without the worker's traceback in its message.
        RuntimeError: if a worker process is gone, see `loader_error`.
    """
    try:
        return next(batches)
    except UserError as error:
        message = str(error).strip().splitlines()[-1]
        raise UserError(message.removeprefix(f"{UserError.__module__}.UserError: ")) from None
    except (ConnectionError, EOFError):
        # A worker died while sending its batch. torch raises its own RuntimeError only when the
        # SIGCHLD arrives, a moment later.
        time.sleep(1)
        raise RuntimeError("DataLoader worker is gone") from None


def loader_error(error: RuntimeError, folder: pathlib.Path) -> Exception:
    """Return a UserError for a RuntimeError about a killed loader process, else the error itself.

    Under main.sh the error stays a crash, so that torchrun restarts the group, which resumes.
    """
    text = " ".join(str(error).split())
    if "DataLoader worker" not in text:
        return error
    if hasattr(signal, "SIGCHLD"):
        # torch's handler would raise for each further worker that dies, at any place in the code.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if control.is_supervised():
        return error
    go_on = f"--resume --exp {shell_word(folder.name)}"
    if "shared memory" in text:
        return UserError(f"a loader process has no room in {SHARED_MEMORY}: "
                         f"{SHARED_MEMORY_ADVICE}; go on with {go_on}")
    return UserError(f"a loader process was killed, most likely by the system because memory ran "
                     f"out: give fewer --workers or a smaller --batch-size; go on with {go_on}")


class FaultCounter:
    """Counts skipped steps and unreadable images over all ranks, and stops at too many.

    Attributes:
        skipped: bad steps so far.
        in_a_row: bad steps since the last good one.
        unreadable: indices of unreadable images in the training list.
    """

    def __init__(self, faces: FaceList, folder: pathlib.Path, ranks: Ranks):
        self.faces, self.folder, self.ranks = faces, folder, ranks
        self.skipped, self.in_a_row = 0, 0
        self.unreadable: set[int] = set()

    def add_unreadable(self, indices: Iterable[int]) -> None:
        """Add the unreadable images that this rank found. All ranks must call this.

        Raises:
            UserError: if more than 1 % of the list is unreadable.
        """
        for index in sorted(set().union(*self.ranks.all_gather(indices)) - self.unreadable):
            self.unreadable.add(index)
            if self.ranks.is_main:
                tqdm.tqdm.write(f"{self.faces.images[index]}: cannot be read; the next image takes "
                                f"its place")
        if len(self.unreadable) > max(1, MAX_BAD_IMAGES * len(self.faces)):
            raise UserError(f"{len(self.unreadable)} of {len(self.faces)} training images cannot "
                            f"be read (more than 1 %), {self.faces.images[min(self.unreadable)]} "
                            f"among them; prepare the set again, then --resume")

    def add_step(self, finite: bool, indices: list[int]) -> None:
        """Add an optimiser step. All ranks must call this.

        Args:
            finite: whether loss and gradients were finite, the same on all ranks.
            indices: of this rank's faces in the step.

        Raises:
            UserError: at the third bad step in a row; bad_batch.txt then lists its faces.
        """
        self.in_a_row = 0 if finite else self.in_a_row + 1
        self.skipped += not finite
        if self.in_a_row < MAX_BAD_STEPS:
            return
        path, best, last = (self.folder / name for name in ("bad_batch.txt", "best.pt", "last.pt"))
        names = [f"{self.faces.images[i]}\n"
                 for part in self.ranks.all_gather(indices) for i in part]
        if self.ranks.is_main:
            path.write_text("".join(names), encoding="utf-8")
        raise UserError(f"{MAX_BAD_STEPS} steps in a row had a NaN or infinite loss or gradient; "
                        f"the faces of the last one are listed in {path}, and "
                        + ("last.pt is older than these steps" if last.is_file() else
                           "nothing is saved yet")
                        + ": go on with --resume and a lower --lr or --precision fp32; if the "
                        "loss had been growing, start anew with these settings"
                        + (f" and --pretrained {shell_word(best)}" if best.is_file() else ""))
