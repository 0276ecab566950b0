"""The one exception that means: the user can mend this, so show the text and no traceback."""
import os
import sys


class UserError(Exception):
    """A mistake in the input. The message names the file, what was found and what to do."""


def show_on_one_line():
    """Let a UserError that nobody catches end this process as `run` does, without a traceback."""
    before = sys.excepthook
    _print_any_name()

    def hook(kind, error, traceback):
        if not issubclass(kind, UserError):
            before(kind, error, traceback)
            return
        sys.stdout.flush()
        print(f"error: {error}", file=sys.stderr)
        # At an interactive prompt the person goes on.
        if not hasattr(sys, "ps1"):
            sys.exit(2)

    sys.excepthook = hook


def printable(text):
    """Text that can be printed, drawn (OpenCV ends the process over the other kind) and written:
    bytes of a name that are no UTF-8 are \\udcff and the like.
    """
    return str(text).encode("utf-8", "backslashreplace").decode("utf-8")


def _print_any_name():
    """Let stdout take such names, as stderr does."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")


def run(main):
    """Call main(); a UserError is printed on stderr and ends the process with exit code 2.

    Where the reader of its output has gone (`| head`) it ends without a word, as a program does
    that SIGPIPE ends.
    """
    _print_any_name()
    try:
        try:
            main()
        except SystemExit:
            sys.stdout.flush()
            raise
        sys.stdout.flush()
    except BrokenPipeError:
        # What is still to be flushed goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + 13)
    except UserError as error:
        # In a log of both, the error comes last.
        sys.stdout.flush()
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
