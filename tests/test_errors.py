"""How a command ends: one line for a mistake, silence after a closed pipe, notes on side files."""
import shlex
import shutil
import subprocess
import sys

import pytest
from helpers import warm as warm_module

from utils.args import ROOT
from utils.errors import DiskError, UserError, as_note, as_user_error, shell_word
from utils.files import atomic_write

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


def test_words_of_printed_commands():
    for text in ("plain-1.pt", "a b", "it's", "100%", "a:b", "$x", "-flag"):
        word, = shlex.split(shell_word(text))
        assert word == ("./-flag" if text == "-flag" else text)
    assert shell_word("plain-1.pt") == "plain-1.pt"


def test_a_side_file_that_cannot_be_written_is_a_note(tmp_path, capsys):
    with as_note(tmp_path / "a.png"):
        (tmp_path / "nowhere" / "a.png").write_bytes(b"")
    with as_note(tmp_path / "b.csv"):
        raise UserError(f"{tmp_path / 'b.csv'}: cannot be written")
    assert capsys.readouterr().out.splitlines() == [
        f"note: {tmp_path / 'a.png'}: was not written: No such file or directory",
        f"note: {tmp_path / 'b.csv'}: cannot be written"]
    with pytest.raises(ZeroDivisionError), as_note("c"):
        1 / 0  # noqa: B018


def test_only_a_training_is_told_to_resume(tmp_path):
    full = as_user_error(OSError(28, "No space left on device", "a.onnx"))
    with pytest.raises(DiskError) as gone, atomic_write(tmp_path / "nowhere" / "a") as temporary:
        temporary.write_text("a")
    (tmp_path / "folder").mkdir()
    with pytest.raises(DiskError) as taken, atomic_write(tmp_path / "folder") as temporary:
        temporary.write_text("a")
    for error in (full, gone.value, taken.value):
        assert "--resume" not in str(error)
    assert "its folder is not there" in str(gone.value)
    assert "could not be written (Is a directory)" in str(taken.value)


@pytest.mark.parametrize("away", ["moved", "deleted"])
def test_the_folder_of_a_running_training_goes_away(away):
    warm = warm_module.warm()
    folder = warm.folder(away)
    # Many epochs, so that the training does not end before the folder goes.
    child = warm.start("--train", "--exp", away, *warm.flags, "--epochs", 50)
    warm_module.wait_for((folder / "args.yaml").exists)
    if away == "moved":
        folder.rename(folder.with_name("elsewhere"))
    else:
        shutil.rmtree(folder)
    child.wait()
    assert child.code == 2
    assert "Traceback" not in child.text
    line, = (line for line in child.text.splitlines() if line.startswith("error: "))
    assert line.startswith(f"error: {folder}")
    assert line.endswith(f"could not be written: its folder is not there; if it was moved or "
                         f"deleted, put it back, then go on with --resume --exp {away}")
