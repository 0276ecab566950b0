"""Device, termination signals, allocator and file names: what a process needs from its machine.

This module does not import torch at the top, because the demo and main.py import it at start.
"""
from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import pathlib
import signal
import sys
import types
import typing
from collections.abc import Iterable, Iterator

from utils.errors import UserError, printable

if typing.TYPE_CHECKING:
    import torch

# Parameters of mallopt(3).
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
# Turns of its loop that an OpenMP thread waits before it sleeps (GNU libgomp).
SPIN_COUNT = "1000"


def tune() -> None:
    """Tune threads and allocator of this process. Call before torch is imported."""
    limit_spinning()
    tune_malloc()


def tune_malloc() -> None:
    """Let glibc keep freed memory for the next tensor.

    By default it returns large blocks to the system at once, and every large activation needs
    freshly zeroed pages: on CPUs a tenth of a training step, half of a prediction of 32 faces. Does
    nothing with other C libraries.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(_MMAP_THRESHOLD, 1 << 30)
    mallopt(_TRIM_THRESHOLD, (1 << 31) - 1)


def limit_spinning() -> None:
    """Let waiting OpenMP threads sleep after a moment.

    By default they wait actively, and take the cores that the threads they wait for need wherever
    another process is busy: a step of MobileNetV3-Large with two threads beside two trainings took
    24.9 s, with this limit 1.8 s. OMP_WAIT_POLICY and GOMP_SPINCOUNT of the user win.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)


def available_cores() -> int:
    """Count the CPU cores that this process may use, which a container or a scheduler limits."""
    # macOS does not know which these are.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextlib.contextmanager
def without_main_module() -> Iterator[None]:
    """Start processes that do not import the script again.

    With the start methods spawn and forkserver (macOS, Windows, Python 3.14) a new process imports
    the main module, so that a script without a main guard would run again in each. The processes of
    this repository need nothing of it.
    """
    main = sys.modules["__main__"]
    # Not get_start_method(): it would fix the method, which the script may still want to set.
    default = multiprocessing.get_all_start_methods()[0]
    if (multiprocessing.get_start_method(allow_none=True) or default) != "fork":
        sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def start_workers(loader: Iterable) -> Iterator:
    """Return iter(loader) of a DataLoader; its processes do not import the script again."""
    with without_main_module():
        return iter(loader)


def check_main_guard() -> None:
    """Refuse to work in a process that is importing a script which has started it.

    Raises:
        UserError: the script has no main guard around the call.
    """
    # Set by multiprocessing, which itself refuses to start further processes while it is set.
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise UserError(f"{printable(sys.argv[0])}: a process that it starts runs it again (start "
                        f"method spawn); put the call under if __name__ == \"__main__\":")


def return_large_blocks(size: int = 3 << 19) -> None:
    """Let glibc return each freed block of `size` bytes and more to the system at once.

    By default it raises this limit to the largest block that was freed, and keeps such blocks in an
    arena for each thread; new threads share one here. Does nothing with other C libraries.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_MMAP_THRESHOLD, size)
        mallopt(_ARENA_MAX, 1)


def trim_malloc() -> None:
    """Let glibc return freed memory to the system; does nothing with other C libraries."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def termination_signals() -> list[int]:
    """Return SIGTERM, and SIGHUP (closed terminal) where it exists and nohup does not ignore it."""
    numbers = [signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    return numbers


@contextlib.contextmanager
def interrupt_on_signals() -> Iterator[list[int]]:
    """Raise KeyboardInterrupt at the first termination signal, so that files can be finished.

    The context gives a list, to which the number of each such signal is appended.
    """
    received = []

    def interrupt(number, _):
        received.append(number)
        if len(received) == 1:
            raise KeyboardInterrupt

    previous = {number: signal.signal(number, interrupt) for number in termination_signals()}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def check_name(path: pathlib.Path | str, what: str) -> None:
    """Refuse a path whose name is not UTF-8, because OpenCV aborts the process with it.

    Args:
        path: to check.
        what: the path leads to, for the message, such as "a video".

    Raises:
        UserError: where the name is not UTF-8.
    """
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"{printable(path)}: the name is not UTF-8, with which OpenCV cannot open "
                        f"{what}; rename the file or its folder") from None


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """Return the torch.device that the setting `device` names.

    Args:
        name: auto (a GPU if there is one), cpu, cuda or cuda:N.
        local_rank: number of the GPU for auto and cuda.

    Raises:
        UserError: where the name is none of these or the machine has no such GPU.
    """
    import torch
    count = torch.cuda.device_count()
    if name == "auto":
        name = "cuda" if count else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    if name == "cuda":
        name = f"cuda:{local_rank}"
    kind, _, number = name.partition(":")
    if kind != "cuda" or not number.isdecimal():
        raise UserError(f"device must be auto, cpu, cuda or cuda:N, found {name!r}")
    if not count:
        raise UserError(f"device {kind}: this machine has no GPU that torch can use; give --device "
                        f"cpu")
    if int(number) >= count:
        raise UserError(f"asked for GPU {int(number) + 1}, this machine has {count}; ask for fewer "
                        f"processes or give --device cpu")
    return torch.device(name)
