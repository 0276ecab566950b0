"""How a command ends: one line for a mistake, silence after a closed pipe."""
import subprocess
import sys

import pytest

from utils.args import ROOT

LONG = "from utils.errors import run, UserError\nrun(lambda: print('line\\n' * 100000))"
SHORT = "from utils.errors import run, UserError\nrun(lambda: print('line'))"
MISTAKE = "from utils.errors import run, UserError\ndef main(): raise UserError('so')\nrun(main)"


def piped(*argv):
    """Standard error and exit code of a Python whose output pipe is closed."""
    child = subprocess.Popen([sys.executable, *argv], cwd=ROOT, stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True)
    child.stdout.close()
    text = child.stderr.read()
    return text, child.wait()


@pytest.mark.parametrize(("argv", "codes"), [
    (["-c", LONG], {141}), (["-c", SHORT], {141}),
    # Some versions of argparse ignore a line that cannot be printed.
    (["main.py", "--help"], {0, 141})], ids=["long", "short", "help"])
def test_a_closed_pipe_ends_quietly(argv, codes):
    text, code = piped(*argv)
    assert text == ""
    assert code in codes


def test_a_mistake_is_printed_to_a_closed_pipe():
    assert piped("-c", MISTAKE) == ("error: so\n", 2)
