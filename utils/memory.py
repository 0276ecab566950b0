"""The C library's habits with memory, where they cost time."""
import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3


def keep_freed():
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


def give_back():
    """Hand all freed memory back now, so that what is in use can be measured."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        return
