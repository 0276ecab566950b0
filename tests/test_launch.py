"""The launcher of main.sh: signals, messages and exit codes, with and without torchrun."""
import ast
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys

import pytest
from helpers import warm as warm_module

from utils.training import launch

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Replaces torchrun: starts one process in a new session and ends with its exit code.
TORCHRUN = """
import subprocess, sys
sys.exit(subprocess.call([sys.executable, *sys.argv[1:]], start_new_session=True))
"""
# Replaces main.py: a training that ends on a stop request, or as MODE selects.
MAIN = """
import os, pathlib, signal, sys, time
from utils.errors import UserError
from utils.training import control
if "--exp" not in sys.argv:
    sys.exit(f"main.py {sys.argv[1:]}")
folder, mode = pathlib.Path("weights", sys.argv[sys.argv.index("--exp") + 1]), os.environ["MODE"]
if not control.register():
    sys.exit()
with control.Stop() as stop:
    if mode == "mistake":
        control.report_error(UserError("a mistake"))
        sys.exit(0 if control.unregister(5) else 3)
    if mode == "killed":
        os.kill(os.getppid(), signal.SIGKILL)
        sys.exit()
    print("threads", os.environ["OMP_NUM_THREADS"], flush=True)
    (folder / "pid").write_text(str(os.getpid()))
    while not stop.requested or mode == "deaf":
        time.sleep(0.01)
    time.sleep(0.5)
    (folder / "last.pt").touch()
    control.report_stopped()
"""


class Tree:
    """A copy of the launcher with the replacements of torchrun and main.py."""

    def __init__(self, folder):
        self.folder = folder
        shutil.copytree(ROOT / "utils", folder / "utils",
                        ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("main.sh", "args.yaml"):
            shutil.copy(ROOT / name, folder)
        (folder / "torchrun.py").write_text(TORCHRUN)
        (folder / "main.py").write_text(MAIN)
        (folder / "weights").mkdir()

    def start(self, *flags, mode=""):
        """Start the launcher with flags of main.py; return a Popen with text output."""
        command = [sys.executable, "-m", "utils.training.launch", "2", sys.executable,
                   "torchrun.py", "main.py", *flags]
        env = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
        return subprocess.Popen(command, cwd=self.folder, env={**env, "MODE": mode}, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                start_new_session=True)

    def train(self, *flags, mode=""):
        """Start a training of the experiment `one`."""
        return self.start("--train", "--device", "cpu", "--exp", "one", *flags, mode=mode)

    def pid(self):
        """Wait until the process of the experiment `one` runs; return its id."""
        path = self.folder / "weights" / "one" / "pid"
        warm_module.wait_for(lambda: path.is_file() and path.read_text(), 30)
        return int(path.read_text())


@pytest.fixture
def tree(tmp_path):
    return Tree(tmp_path)


@pytest.fixture(autouse=True)
def terminal():
    """Let children receive SIGHUP, which nohup makes pytest and its children ignore."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def runs(pid):
    """Return whether a process runs; a zombie does not."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_lets_the_processes_save(tree, number):
    child = tree.train("--mean-face", "a b")
    pid = tree.pid()
    child.send_signal(number)
    if number == signal.SIGHUP:
        # A closed terminal may send it more than once.
        child.send_signal(number)
    text, _ = child.communicate(timeout=300)
    assert child.returncode == 128 + number, text
    threads, stopped = text.splitlines()
    assert threads == f"threads {launch.default_threads(2)}"
    command = ["bash", "main.sh", "2", "--train", "--device", "cpu", "--exp", "one", "--mean-face",
               "a b", "--resume"]
    assert shlex.split(stopped.removeprefix("stopped; go on with: ")) == command
    assert not runs(pid)


def test_a_second_ctrl_c_ends_at_once(tree):
    child = tree.train(mode="deaf")
    pid = tree.pid()
    child.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(1)
    child.send_signal(signal.SIGINT)
    text, _ = child.communicate(timeout=300)
    assert child.returncode == 130
    assert text.splitlines()[1:] == ["stopped before anything was saved"]
    warm_module.wait_for(lambda: not runs(pid), 60)


def test_a_mistake_is_printed_once_and_leaves_no_empty_folder(tree):
    child = tree.train(mode="mistake")
    text, _ = child.communicate(timeout=300)
    assert (child.returncode, text) == (2, "error: a mistake\n")
    assert not (tree.folder / "weights" / "one").exists()


def test_a_killed_torchrun_gives_the_exit_code_of_a_shell(tree):
    child = tree.train(mode="killed")
    text, _ = child.communicate(timeout=300)
    assert (child.returncode, text) == (128 + signal.SIGKILL, "")


def test_processes_that_wait_for_a_dead_one_are_found(tmp_path):
    supervisor = object.__new__(launch.Supervisor)
    supervisor.folder = tmp_path
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    mine = os.getpid()

    def found(*records):
        for number, record in enumerate(records):
            (tmp_path / f"process-{number}").write_text(record)
        return supervisor._left_behind()

    assert found() == []
    assert found(f"{mine} 0", f"{mine} 0") == []
    assert found(f"{mine} 0", f"{ended.pid} 0") == [mine]
    assert found(f"{ended.pid} 0", f"{ended.pid} 0") == [], "torchrun restarts them by itself"
    assert found(f"{mine} 1", f"{ended.pid} 0") == [], "the second one has not registered again yet"
    assert found(f"{mine} 1", f"{ended.pid}") == [], "half of a record is written"


def test_a_new_experiment_gets_a_number_that_all_processes_receive(tree):
    child = tree.start("--train", "--device", "cpu")
    path = tree.folder / "weights" / "000" / "pid"
    warm_module.wait_for(path.is_file, 30)
    child.send_signal(signal.SIGTERM)
    text, _ = child.communicate(timeout=300)
    assert "bash main.sh 2 --train --device cpu --exp 000 --resume" in text


def test_without_a_training_main_py_runs_alone(tree):
    child = tree.start("--compare", "--report", "a b.json")
    text, _ = child.communicate(timeout=300)
    assert (child.returncode, text) == (1, "main.py ['--compare', '--report', 'a b.json']\n")


@pytest.mark.parametrize(("env", "message"), [
    ({"NNODES": "many"}, "NNODES is the number of machines, found 'many'"),
    ({"NNODES": "2"}, "NODE_RANK is the number of this machine, 0 to 1, found ''"),
    ({"NNODES": "2", "NODE_RANK": "2"}, "0 to 1, found '2'"),
    ({"NNODES": "2", "NODE_RANK": "0"}, "MASTER_ADDR is not set")])
def test_settings_of_several_machines_are_checked(tree, env, message):
    result = subprocess.run(
        ["bash", "main.sh", "2", "--train", "--device", "cpu", "--exp", "one"], cwd=tree.folder,
        env={**os.environ, **env, "PATH": f"{pathlib.Path(sys.executable).parent}:"
             f"{os.environ['PATH']}"}, text=True, capture_output=True)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert message in result.stderr
    assert not (tree.folder / "weights" / "one").exists()


def test_main_sh_needs_only_python_and_bash(tmp_path):
    """From another folder, with real processes, and without setsid, pkill or getconf."""
    warm, path = warm_module.warm(), tmp_path / "bin"
    path.mkdir()
    (path / "bash").symlink_to(shutil.which("bash"))
    # Not a link: Python finds the packages of a virtual environment by its own path.
    (path / "python").write_text(f'#!{path / "bash"}\nexec "{sys.executable}" "$@"\n')
    (path / "python").chmod(0o755)
    child = subprocess.Popen(
        [path / "bash", "tree/main.sh", "2", "--train", "--exp", "bare", *warm.flags,
         "--batch-size", "2", "--save-minutes", "0.01", "--epochs", "200"],
        cwd=warm.tree.parent, text=True,
        env={**warm.env, "PATH": str(path)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True)
    warm_module.wait_for((warm.folder("bare") / "last.pt").exists)
    child.send_signal(signal.SIGINT)
    text, _ = child.communicate(timeout=400)
    assert child.returncode == 130, text
    assert re.search("stopped; go on with: bash main.sh 2 --train --exp bare .*--resume$", text)
    assert "not found" not in text
    assert "Traceback" not in text


@pytest.mark.parametrize("command", [["python", "main.py"], ["python", "demo.py"],
                                     ["bash", "main.sh", "1", "--train"]], ids=lambda c: c[1])
def test_a_python_that_is_too_old_is_one_line(tmp_path, command):
    # Imitates an old Python: the version is changed before the command starts.
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nsys.version_info = (3, 9, 18, 'final', 0)\n")
    env = {**os.environ, "PYTHONPATH": str(tmp_path),
           "PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"}
    result = subprocess.run(command, cwd=ROOT, env=env, text=True, capture_output=True)
    assert result.returncode == 2
    assert result.stderr == "error: Python 3.10 or newer is needed, this is 3.9\n"
    assert result.stdout == ""


@pytest.mark.parametrize("name", ["main.py", "demo.py", "utils/__init__.py"])
def test_old_pythons_can_parse_what_checks_their_version(name):
    ast.parse((ROOT / name).read_text(encoding="utf-8"), feature_version=(3, 7))
