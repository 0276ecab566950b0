"""Start and supervise a training: main.sh passes its torchrun command to this module.

    python -m utils.training.launch PROCESSES python -m torch.distributed.run ... main.py FLAGS

torchrun starts the processes and restarts them after a crash. This module adds checks before the
start, one experiment name for all processes, stops that finish the step and save, errors of one
line, and exit codes. control.py has the processes' side of it. Where nothing is to be trained,
main.py runs once, without torchrun.

This module imports nothing slow, so that signals are handled soon after the start.
"""
from __future__ import annotations

import argparse
import contextlib
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import tempfile
import time

from utils import experiment, machine
from utils.args import Request, parse
from utils.errors import UserError, run
from utils.training import control
from utils.training.settings import requested_settings, resolve_newest

# Seconds that processes have to end after one of them has died, and between looks at them.
DEATH_SECONDS, WATCH_SECONDS = 3, 0.5


def main() -> None:
    """Check the command line and run it; exits with the code of the training.

    Raises:
        UserError: for mistakes in the command line, and those that the processes report.
    """
    processes, *command = sys.argv[1:]
    if not processes.isdecimal() or not int(processes):
        raise UserError(f"the first argument is the number of processes, found {processes!r}: "
                        f"bash main.sh 4 --train")
    flags = command[command.index("main.py") + 1:]
    request = parse(flags)
    if "train" not in request.actions:
        os.execvp(command[0], [command[0], "main.py", *flags])
    resolve_newest(request)
    node_rank = check_nodes(request.args)
    resume = "resume" in request.actions
    # Experiments lie on the first machine; the others may not see its disk.
    if resume and node_rank == 0:
        experiment.find_experiment(request.args.exp)
    args = requested_settings(request, resume)
    check_gpus(int(processes), args.device)
    with tempfile.TemporaryDirectory(prefix="pipnet-", ignore_cleanup_errors=True) as folder:
        supervisor = Supervisor(pathlib.Path(folder))
        name = args.exp if resume or node_rank else experiment.new_experiment(args.exp).name
        try:
            code = supervisor.run([*command, "--exp", name], default_threads(int(processes)))
            if supervisor.stopped:
                print_stop(processes, flags, request, name, node_rank)
        finally:
            # The folder of an experiment that failed before it wrote anything is empty.
            with contextlib.suppress(OSError):
                (experiment.WEIGHTS / name).rmdir()
    sys.exit(code)


def check_nodes(args: argparse.Namespace) -> int:
    """Check the environment variables of a training on several machines; return this one's rank."""
    nodes = os.environ.get("NNODES") or "1"
    if not nodes.isdecimal() or not int(nodes):
        raise UserError(f"NNODES is the number of machines, found {nodes!r}")
    if int(nodes) == 1:
        return 0
    if args.exp == "none":
        raise UserError("several machines need the same --exp NAME on each")
    rank = os.environ.get("NODE_RANK", "")
    if not rank.isdecimal() or int(rank) >= int(nodes):
        raise UserError(f"NODE_RANK is the number of this machine, 0 to {int(nodes) - 1}, found "
                        f"{rank!r}")
    if not os.environ.get("MASTER_ADDR"):
        raise UserError("MASTER_ADDR is not set; set it to the address of the first machine")
    return int(rank)


def check_gpus(processes: int, device: str) -> None:
    """Raise UserError if the processes need more GPUs than this machine has."""
    if device != "cuda" and (device != "auto" or processes == 1):
        return
    # Another process imports torch, which is slow and large. In a session of its own it does not
    # receive Ctrl-C, which it would answer with a traceback.
    counting = subprocess.run(
        [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"],
        stdout=subprocess.PIPE, check=True, start_new_session=True)
    count = int(counting.stdout)
    if processes > count:
        raise UserError(f"{processes} processes asked for, this machine has {count} GPUs; ask for "
                        f"fewer, or give --device cpu")


def default_threads(processes: int) -> int:
    """Return the CPU threads of each process: this machine's cores divided by the processes."""
    return -(-machine.available_cores() // processes)


class Supervisor:
    """Runs torchrun, turns signals into requests to stop, and ends what a dead process leaves.

    After a death torchrun sends the other processes SIGTERM, and SIGKILL 30 s later (torch 2.6 to
    2.14; its --shutdown-timeout has no effect there). A process that waits for its GPU, and so for
    the dead one, never handles the SIGTERM, so it is killed sooner.

    Signals are handled from the construction on. The first one lets the processes finish their
    step, save and end; a second Ctrl-C or SIGTERM ends them at once.

    Args:
        folder: the empty folder for the messages of control.py.
    """

    def __init__(self, folder: pathlib.Path):
        self.folder, self.torchrun = folder, None
        # The code that stays if another machine was asked to stop.
        self.stop_code = 128 + signal.SIGTERM
        self.signals = [number for number in (*machine.termination_signals(), signal.SIGINT)
                        if signal.getsignal(number) != signal.SIG_IGN]
        for number in self.signals:
            signal.signal(number, self._handle)

    @property
    def stopped(self) -> bool:
        """Whether a process has ended before the training was complete."""
        return (self.folder / control.STOPPED).exists()

    def run(self, command: list[str], threads: int) -> int:
        """Run torchrun to its end; return the exit code.

        Args:
            command: torchrun's, with main.py and its flags.
            threads: OMP_NUM_THREADS of each process, if the environment does not set it.

        Raises:
            UserError: that a process has reported.
        """
        env = {**os.environ, control.VARIABLE: str(self.folder),
               "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(threads)}
        # torchrun answers a signal with a traceback; in a session of its own it receives none from
        # the terminal.
        self.torchrun = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL,
                                         start_new_session=True)
        code = self._wait()
        for number in self.signals:
            signal.signal(number, signal.SIG_IGN)
        error = self.folder / control.ERROR
        if error.exists():
            raise UserError(error.read_text(encoding="utf-8"))
        if self.stopped:
            return self.stop_code
        return code if code >= 0 else 128 - code

    def _wait(self):
        """Wait for torchrun to end, and return its exit code."""
        died_at = None
        while True:
            try:
                return self.torchrun.wait(WATCH_SECONDS)
            except subprocess.TimeoutExpired:
                running = self._left_behind()
            died_at = (died_at or time.monotonic()) if running else None
            if running and time.monotonic() - died_at > DEATH_SECONDS:
                for pid in running:
                    with contextlib.suppress(OSError):
                        os.killpg(pid, signal.SIGKILL)

    def _left_behind(self):
        """Return the running processes of a group of which at least one has died."""
        if not hasattr(os, "killpg"):
            return []  # Windows: signal 0 would end a process there.
        groups = {}
        for pid, restart in self._records():
            groups.setdefault(restart, []).append(pid)
        # The records of an earlier group stay until its successors have replaced them.
        newest = groups[max(groups)] if groups else []
        running = [pid for pid in newest if _is_running(pid)]
        return running if len(running) < len(newest) else []

    def _records(self):
        """Return the process ids and restart counts of the registered processes."""
        records = []
        for path in self.folder.glob(f"{control.PROCESS}*"):
            with contextlib.suppress(OSError, ValueError):  # It has just ended, or just begins.
                pid, restart = path.read_text(encoding="utf-8").split()
                records.append((int(pid), int(restart)))
        return records

    def _handle(self, number, _):
        hangup = number not in (signal.SIGINT, signal.SIGTERM)
        stop = self.folder / control.STOP
        # A closed terminal may send its signal several times.
        if stop.exists() and not hangup:
            self._kill()
        self.stop_code = 128 + number
        stop.touch()
        if hangup:
            control.detach_terminal()
            self._send(os.kill, number)

    def _kill(self):
        (self.folder / control.STOPPED).touch()
        # torchrun first: it would report the death of its processes and restart them.
        if self.torchrun is not None:
            self.torchrun.kill()
        # torchrun makes each process the leader of a group, which holds its loader processes.
        self._send(os.killpg, signal.SIGKILL)

    def _send(self, send, number):
        """Send a signal to the registered processes, by os.kill or to their groups by os.killpg."""
        for pid, _ in self._records():
            with contextlib.suppress(OSError):
                send(pid, number)


def _is_running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def print_stop(processes: str, flags: list[str], request: Request, name: str, node_rank: int):
    """Print how to resume a stopped training."""
    if node_rank == 0 and not (experiment.WEIGHTS / name / "last.pt").exists():
        text = "stopped before anything was saved"
    else:
        again = [*flags, *["--exp", name] * ("exp" not in request.typed),
                 *["--resume"] * ("resume" not in request.actions)]
        text = f"stopped; go on with: {shlex.join(['bash', 'main.sh', processes, *again])}"
    # Not by print: where nobody reads the output any more, the exit code must stay that of a stop.
    with contextlib.suppress(OSError):
        os.write(1, os.fsencode(f"{text}\n"))


if __name__ == "__main__":
    run(main)
