"""What a process runs on: device, signals, the C library's memory, names of files."""
import contextlib
import ctypes
import signal

from utils.errors import UserError, printable

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3


def tune_malloc():
    """Let glibc keep freed memory for the next tensor instead of handing it back to the system.

    It hands back large blocks at once, so every large activation is made of pages that must be
    zeroed again: on CPUs a tenth of a training step, half of a prediction of 32 faces. Does nothing
    where the C library is another one.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(_MMAP_THRESHOLD, 1 << 30)
    mallopt(_TRIM_THRESHOLD, (1 << 31) - 1)


def ending_signals():
    """SIGTERM and SIGHUP (the terminal was closed), where the system has it and nohup does not want
    it ignored.
    """
    numbers = [signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    return numbers


@contextlib.contextmanager
def signals_interrupt():
    """Within, ending_signals are a KeyboardInterrupt, so that files are finished; gives a list, to
    which their numbers are added.
    """
    seen = []

    def interrupt(number, _):
        seen.append(number)
        if len(seen) == 1:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in ending_signals()}
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def check_name(path, what):
    """Raise UserError for a path whose name is no UTF-8, over which OpenCV ends the process."""
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"{printable(path)}: the name is no UTF-8, and OpenCV cannot open {what} "
                        f"by it; rename the file or its folder") from None


def choose_device(name, local_rank=0):
    """A torch.device from `auto`, `cpu`, `cuda` or `cuda:N`. Raises UserError if it is missing."""
    import torch  # Not needed, and slow to import, where only memory matters.
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
