"""UserError: a mistake that the user can correct, shown as one line without a traceback.

Every module raises it with a message that names the file, what was found, what was expected and
what to do. run() ends a command by it; install_excepthook() does the same in a user's own script.
"""
from __future__ import annotations

import contextlib
import errno
import os
import shlex
import sys
from collections.abc import Callable, Iterator

# A full disk, an exceeded quota, or no permission to write.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


class UserError(Exception):
    """A mistake in the input; the message names the file, what was found and what to do."""


class DiskError(UserError):
    """A file could not be written; a training adds how it is resumed (training/saving.py)."""


@contextlib.contextmanager
def as_note(what: object) -> Iterator[None]:
    """Print a note where a side file cannot be written: the main result does not depend on it.

    Args:
        what: the file.
    """
    try:
        yield
    except (OSError, UserError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        name = printable(what)
        print(f"note: {reason}" if reason.startswith(name) else
              f"note: {name}: was not written: {reason}")


def as_user_error(error: OSError) -> OSError | UserError:
    """Convert an OSError of a full or protected disk to a UserError; return others unchanged."""
    if error.errno not in DISK_ERRORS:
        return error
    path = f"{error.filename}: " if error.filename else ""
    return DiskError(f"{path}{error.strerror}; earlier files are untouched; free space or "
                     f"correct the permissions")


def install_excepthook() -> None:
    """Show an uncaught UserError as one line; a script ends with code 2, a session continues."""
    previous = sys.excepthook
    _escape_in_stdout()

    def hook(kind, error, traceback):
        if not issubclass(kind, UserError):
            previous(kind, error, traceback)
            return
        sys.stdout.flush()
        print(f"error: {error}", file=sys.stderr)
        # An interactive session continues.
        if not hasattr(sys, "ps1"):
            sys.exit(2)

    sys.excepthook = hook


def printable(text: object) -> str:
    r"""Return text with escapes such as \udcff for bytes of a file name that are not UTF-8.

    Such bytes cannot be printed or written, and OpenCV aborts the process when it draws them.
    """
    return str(text).encode("utf-8", "backslashreplace").decode("utf-8")


def shell_word(text: object) -> str:
    """Return a name or path as one word of a command that is printed to be copied.

    It is quoted where the shell needs it, and a leading dash does not make it a flag.
    """
    text = printable(text)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)


def _escape_in_stdout():
    """Let stdout escape such bytes, as stderr does."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")


def run(main: Callable[[], object]) -> None:
    """Call main(); end the process with one line and exit code 2 after a UserError.

    A closed output pipe (`| head`) ends it silently with exit code 141, like SIGPIPE; Ctrl-C ends
    it with 130.
    """
    _escape_in_stdout()
    try:
        try:
            main()
        except SystemExit:
            sys.stdout.flush()
            raise
        sys.stdout.flush()
    except BrokenPipeError:
        # Discards what is flushed at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + 13)
    except UserError as error:
        # Flushed first, so that the error comes last in a log of both streams.
        sys.stdout.flush()
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
