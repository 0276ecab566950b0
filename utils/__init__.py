import sys

# Every command imports this file first. It must parse on Python 2 and 3.
if sys.version_info < (3, 10):  # noqa: UP036
    sys.stderr.write("error: Python 3.10 or newer is needed, this is "
                     + ".".join(map(str, sys.version_info[:2])) + "\n")
    sys.exit(2)
