"""Run parts of a benchmark so that none can stop the others: a process and a time limit for each.

A forked child has the imports of its parent and a CUDA context of its own, so that neither a
time-out nor an error that leaves a GPU unusable reaches the next part. The parent must not use CUDA
itself.
"""
from __future__ import annotations

import contextlib
import multiprocessing
import os
import pathlib
import signal
import sys
import tempfile
import time
import traceback
import typing
from collections.abc import Callable

# Seconds that a child has to end after it has sent its result, or after a SIGTERM.
GRACE = 2
# Characters of a child's output and traceback in an error.
TAIL = 2000
# Characters of a Failure's message.
LINE = 300


class Failure(Exception):
    """A part that has no result; the message says why, in one line.

    Attributes:
        detail: the traceback, and what the part has printed last.
    """

    def __init__(self, message: str, detail: str = ""):
        super().__init__(" ".join(message.split())[:LINE])
        self.detail = detail


class Clock:
    """Counts down the seconds of a whole run, from the start of this process.

    Args:
        seconds: when the run ends.
    """

    def __init__(self, seconds: float):
        self._end = time.monotonic() + seconds - process_age()

    @property
    def left(self) -> float:
        """Seconds until the end; negative after it."""
        return self._end - time.monotonic()

    def call(self, function: Callable, limit: float, *arguments: typing.Any) -> typing.Any:
        """Call a function as `call` does, in `limit` seconds or those that are left.

        Raises:
            Failure: as of `call`, or if no time is left.
        """
        if self.left < 1:
            raise Failure("not measured: the time is up")
        return call(function, min(limit, self.left), *arguments)


def process_age() -> float:
    """Return the seconds since this process has started; 0 where the system does not tell."""
    try:
        text = pathlib.Path("/proc/self/stat").read_text(encoding="utf-8")
        # The 22nd field; the second one, in brackets, may hold spaces.
        ticks = int(text.rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (AttributeError, OSError, ValueError):
        return 0.0


def call(function: Callable, limit: float, *arguments: typing.Any) -> typing.Any:
    """Call a function in a forked child and return its picklable result.

    Args:
        function: to call. What it prints is dropped, unless it fails.
        limit: seconds after which the child and its processes are ended.
        *arguments: of the function.

    Raises:
        Failure: the function has raised an exception, the child has died, or the time is up.
    """
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    with tempfile.NamedTemporaryFile("rb", suffix=".log") as log:
        child = context.Process(target=_child, args=(theirs, log.name, function, arguments))
        sys.stdout.flush()
        child.start()
        theirs.close()
        try:
            if not ours.poll(limit):
                raise Failure(f"not done within {limit:.0f} s", _tail(log.name))
            result, error = ours.recv()
            child.join(GRACE)
        except EOFError:
            child.join()
            raise Failure(f"ended with exit code {child.exitcode}", _tail(log.name)) from None
        finally:
            _end(child)
            ours.close()
        if error is not None:
            raise Failure(error[0], f"{error[1][-TAIL:]}\n{_tail(log.name)}")
        return result


def _child(pipe, log, function, arguments):
    os.setsid()
    # Loader processes and commands inherit the descriptors.
    output = os.open(log, os.O_WRONLY | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    try:
        result = function(*arguments), None
    except BaseException as error:
        result = None, (traceback.format_exception_only(error)[-1], traceback.format_exc())
    pipe.send(result)
    pipe.close()


def _end(child):
    """End a child and all processes of its session, which may outlive it."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + GRACE
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, number)
            while time.monotonic() < deadline:
                child.join(0)
                os.killpg(child.pid, 0)
                time.sleep(0.02)
    child.kill()
    child.join()


def _tail(log):
    return pathlib.Path(log).read_text(encoding="utf-8", errors="replace").strip()[-TAIL:]
