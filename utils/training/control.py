"""Requests to stop, and messages between the launcher and the training processes.

The launcher (launch.py) creates a folder and passes its path to the processes in the environment
variable PIPNET_CONTROL. Both sides write files into it:

    stop         the launcher asks the processes to finish the step, save and end
    stopped      the training has ended before it was complete
    error        the text of a UserError, which the launcher prints once
    process-N    the process id of the running process with local rank N, and how often torchrun
                 had restarted it; it stays if the process dies

torchrun restarts processes that die. A process that finds `stop`, `stopped` or `error` when it
starts ends at once. Without the launcher there is no folder, and nothing is written.

This module imports nothing slow, so that signals are handled soon after the start.
"""
from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import stat
import sys
import time

from utils import machine

VARIABLE = "PIPNET_CONTROL"
STOP, STOPPED, ERROR, PROCESS = "stop", "stopped", "error", "process-"


def is_supervised() -> bool:
    """Return whether the launcher started this process and restarts it after a crash."""
    return bool(os.environ.get(VARIABLE))


def restart_count() -> int:
    """Return how often torchrun has restarted this group of processes."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def register() -> bool:
    """Record this process for the launcher; return False if the run is ending already."""
    if not is_supervised():
        return True
    try:
        _own_record().write_text(f"{os.getpid()} {restart_count()}", encoding="utf-8")
    except FileNotFoundError:
        sys.exit(1)  # The launcher has ended and removed the folder.
    # The record comes before this check, so that a launcher that ends the run now finds either.
    if not any(_path(name).exists() for name in (STOP, STOPPED, ERROR)):
        return True
    if _path(STOP).exists():
        report_stopped()
    _own_record().unlink()
    return False


def unregister(timeout: float = 0.0) -> bool:
    """Remove the record of this process, and wait until the others have removed theirs.

    Args:
        timeout: seconds to wait for the other processes of this machine.

    Returns:
        Whether all processes of this machine are ending. The exit code is then 0, so that torchrun
        reports no crash. Otherwise a failure has to make torchrun end the remaining ones.
    """
    if not is_supervised():
        return False
    _own_record().unlink(missing_ok=True)
    deadline = time.monotonic() + timeout
    while any(_path("").glob(f"{PROCESS}*")):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def report_error(error: Exception) -> None:
    """Pass a UserError to the launcher, which prints it once for all processes."""
    if is_supervised():
        _path(ERROR).write_text(str(error), encoding="utf-8", errors="backslashreplace")


def report_stopped() -> None:
    """Let the launcher, if there is one, print how to resume."""
    if is_supervised():
        _path(STOPPED).touch()


def detach_terminal() -> None:
    """Redirect output from a terminal to nowhere; a closed terminal raises errors on writing."""
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):
            if stat.S_ISCHR(os.fstat(descriptor).st_mode):
                os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


def _path(name: str) -> pathlib.Path:
    return pathlib.Path(os.environ[VARIABLE], name)


def _own_record() -> pathlib.Path:
    return _path(f"{PROCESS}{os.environ.get('LOCAL_RANK', 0)}")


class Stop:
    """Context manager that turns signals into a request to stop after the current step.

    Within it, SIGTERM, SIGINT and SIGHUP (a closed terminal) set `requested`. A second SIGINT
    raises KeyboardInterrupt. Under nohup, SIGHUP stays ignored.
    """

    def __init__(self):
        self._signal = None
        self._file = _path(STOP) if is_supervised() else None

    def __enter__(self) -> Stop:
        self._previous = {number: signal.signal(number, self._handle)
                          for number in (*machine.termination_signals(), signal.SIGINT)}
        return self

    def __exit__(self, *_):
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number, _):
        if self._signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        if number not in (signal.SIGTERM, signal.SIGINT):
            detach_terminal()
        self._signal = number

    @property
    def requested(self) -> bool:
        """Whether a signal or the launcher asks for a stop; ranks may disagree for a moment."""
        return bool(self._signal) or self._file is not None and self._file.exists()

    @property
    def exit_code(self) -> int:
        """Exit code of a stopped process; that of SIGTERM if only another rank got a signal."""
        return 128 + (self._signal or signal.SIGTERM)
