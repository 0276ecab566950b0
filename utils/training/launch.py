"""main.sh and its processes: the checks before they start, and what they tell each other.

They share the folder $PIPNET_CONTROL: main.sh makes the file `stop` there when it is told to end, a
process that ends therefore `stopped`, one that ends in a user's mistake writes it to `error`.
torchrun starts dead processes again; those that find one of these files end at once.
Imports nothing slow: signals must be caught early.
"""
import contextlib
import errno
import io
import os
import pathlib
import signal
import stat
import sys
import time

from utils import experiment, machine
from utils.args import load_args, parse
from utils.errors import UserError, run

# Settings of what follows a training, which a later command does not have unless it says so.
OF_ONE_COMMAND = ("flip_test", "boxes", "names", "by_pose", "report", "opset", "dump_pseudo")
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


def main():
    """Print the experiment's name, or nothing where there is nothing to train. Raises UserError."""
    processes, *flags = sys.argv[1:]
    if not processes.isdecimal() or not int(processes):
        raise UserError(f"the first argument is the number of processes, found {processes!r}: "
                        f"bash main.sh 4 --train")
    # --help prints and exits; main.sh then runs main.py --help, and must not take it for a name.
    with contextlib.redirect_stdout(io.StringIO()):
        request = parse(flags)
    if "train" not in request.actions:
        return
    name_newest(request)
    args, resume = request.args, "resume" in request.actions
    machines, machine = (int(os.environ.get(k, v)) for k, v in (("NNODES", 1), ("NODE_RANK", 0)))
    if machines > 1 and args.exp == "none":
        raise UserError("several machines need the same --exp NAME on each")
    # The folder is the first machine's, which others need not see.
    if resume and not machine:
        experiment.find_experiment(args.exp)
    if resume:
        args = resumed(request)
    if args.device == "cuda" or args.device == "auto" and int(processes) > 1:
        import torch
        count = torch.cuda.device_count()
        if int(processes) > count:
            raise UserError(f"{processes} processes asked for, this machine has {count} GPUs; ask "
                            f"for fewer, or give --device cpu")
    print(args.exp if resume or machine else experiment.new_experiment(args.exp).name)


def name_newest(request):
    """Put the newest experiment in the place of a bare --exp, and say which. Raises UserError."""
    if request.args.exp:
        return
    resume = "resume" in request.actions
    if "train" in request.actions and not resume:
        raise UserError("--exp without a name means the newest experiment, and a training begins a "
                        "new one: give it a name, or leave --exp out for the next number")
    name = experiment.newest_experiment(*["last.pt"] * resume)
    # Not on stdout, where main.sh reads the name.
    print(f"--exp: {name}, the newest experiment", file=sys.stderr)
    request.args.exp = request.typed["exp"] = name


def resumed(request):
    """The settings that the experiment of a request, or of the file that it names, was started
    with; those typed now win.
    """
    exp = pathlib.Path(request.args.exp)
    folder = exp.parent if exp.suffix in (".pt", ".onnx") else experiment.WEIGHTS / exp
    path = folder / "args.yaml"
    return load_args(request.typed, path) if path.is_file() else request.args


def disk_mistake(error):
    """An OSError as a UserError where the disk refused, which its user can mend, else as it is."""
    if error.errno not in DISK:
        return error
    where = f"{error.filename}: " if error.filename else ""
    return UserError(f"{where}{error.strerror}; what was saved before is untouched. Make room or "
                     f"mend the rights; a training goes on with --resume")


def restarts():
    """How often torchrun has started this process's group again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def _told(name):
    folder = os.environ.get("PIPNET_CONTROL")
    return pathlib.Path(folder, name) if folder else None


def _has(name):
    path = _told(name)
    return path is not None and path.exists()


def has_parent():
    """Whether main.sh and torchrun run this process, and would start it again."""
    return _told("stop") is not None


def is_over():
    """Whether main.sh was told to end, or an earlier try ended in a user's mistake."""
    over = [name for name in ("stop", "stopped", "error") if _has(name)]
    if "stop" in over:
        tell_stopped()  # Told before it began: main.sh is to say how to go on.
    return bool(over)


def tell_error(error):
    """Leave a UserError for main.sh, if there is one, which shows it once."""
    if has_parent():
        _told("error").write_text(str(error), encoding="utf-8")


def tell_stopped():
    """Let main.sh, if there is one, say how to go on."""
    if has_parent():
        _told("stopped").touch()


def leave(patience=5.0):
    """Say that this process ends; returns whether all of this machine do so within seconds.

    They do where all have met the same mistake. Ending with exit code 0 then keeps torchrun from
    reporting a crash; where some go on, it must hear of one to end them.
    """
    path = _told("ended")
    if path is None:
        return False
    path.with_name(f"ended-{os.environ.get('LOCAL_RANK', 0)}").touch()
    until = time.monotonic() + patience
    while len(list(path.parent.glob("ended-*"))) < int(os.environ.get("LOCAL_WORLD_SIZE", 1)):
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


def _leave_terminal():
    """Print into nothing where the terminal was: a closed one answers every line with an error."""
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):
            if stat.S_ISCHR(os.fstat(descriptor).st_mode):
                os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


class Stop:
    """`asked`: whether a signal or main.sh has asked to end. Used with `with`.

    Within, SIGTERM, SIGINT and SIGHUP (the terminal was closed) only ask, so that a step is
    finished and saved before the process ends; a second Ctrl-C ends it at once. Under nohup a
    closed terminal asks nothing.
    """

    def __init__(self):
        self._signal, self._file = None, _told("stop")

    def __enter__(self):
        self._before = {number: signal.signal(number, self._ask)
                        for number in (*machine.ending_signals(), signal.SIGINT)}
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number, _):
        if self._signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        if number not in (signal.SIGTERM, signal.SIGINT):
            _leave_terminal()
        self._signal = number

    @property
    def asked(self):
        """Whether to end after this step; the ranks' answers may differ for a moment."""
        return bool(self._signal) or self._file is not None and self._file.exists()

    @property
    def code(self):
        """The exit code of who was stopped: as if by SIGTERM where only another rank was asked."""
        return 128 + (self._signal or signal.SIGTERM)


if __name__ == "__main__":
    run(main)
