"""Machines unlike a Linux desktop: other ways to start processes, no GNU tools, no window."""
import ast
import concurrent.futures
import contextlib
import os
import pathlib
import subprocess
import sys

import cv2
import numpy
import pytest
from helpers import painted_faces, small_sets

import demo
from utils import machine
from utils.data.generator import DataGenerator
from utils.errors import UserError
from utils.tracking import window

ROOT = pathlib.Path(__file__).resolve().parent.parent
PRODUCT = [ROOT / "main.py", ROOT / "demo.py", ROOT / "hubconf.py",
           *(path for folder in ("nets", "utils", "examples")
             for path in (ROOT / folder).rglob("*.py"))]


def run_script(folder, text):
    """Run a script without a main guard, as people write them; the finished process."""
    (folder / "script.py").write_text(text)
    return subprocess.run([sys.executable, "script.py"], cwd=folder, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=120)


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_script_without_main_guard_prepares_a_set(method, tmp_path):
    small_sets.write_300w(tmp_path / "300W")
    done = run_script(tmp_path, f"import multiprocessing\n"
                                f"multiprocessing.set_start_method({method!r}, force=True)\n"
                                f"from utils import util\n"
                                f"print('once')\n"
                                f"util.DataGenerator('300W', 64, 'set', workers=2).run()\n")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout.count("once") == 1
    assert len((tmp_path / "set/test.txt").read_text().splitlines()) == 6


def test_a_script_without_main_guard_starts_loader_processes(drawn_set, tmp_path):
    done = run_script(tmp_path, f"import multiprocessing\n"
                                f"multiprocessing.set_start_method('spawn')\n"
                                f"from utils.data.dataset import PreparedSet\n"
                                f"from utils.evaluation.predict import predict_list\n"
                                f"faces = PreparedSet({str(drawn_set)!r})\n"
                                f"print(predict_list(lambda x: x[:, 0, :4, :2],\n"
                                f"                   faces.lists['test'], faces.margin, 64,\n"
                                f"                   workers=1).shape)\n")
    assert (done.returncode, done.stdout) == (0, "(8, 4, 2)\n"), done.stderr


def test_a_process_of_the_script_that_runs_it_again_says_so_in_one_line(tmp_path):
    small_sets.write_300w(tmp_path / "300W")
    done = run_script(tmp_path, "import multiprocessing\n"
                                "from utils import util\n"
                                "util.DataGenerator('300W', 64, 'set', workers=1).run()\n"
                                "if __name__ == '__main__':\n"
                                "    process = multiprocessing.get_context('spawn').Process()\n"
                                "    process.start()\n"
                                "    process.join()\n"
                                "    print(process.exitcode)\n")
    assert done.stdout.endswith("\n2\n")
    assert "Traceback" not in done.stderr
    error, = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert error.endswith("script.py: a process that it starts runs it again (start method spawn); "
                          'put the call under if __name__ == "__main__":')


def test_one_worker_starts_no_process(tmp_path, monkeypatch):
    monkeypatch.setattr(concurrent.futures, "ProcessPoolExecutor", None)
    data = small_sets.write_300w(tmp_path / "300W")
    DataGenerator(data, 64, tmp_path / "set", workers=1).run()
    with pytest.raises(TypeError):
        DataGenerator(data, 64, tmp_path / "set", workers=2).run()


def test_the_main_module_comes_back(monkeypatch):
    main = sys.modules["__main__"]
    monkeypatch.setattr(machine.multiprocessing, "get_start_method", lambda allow_none: "spawn")
    with contextlib.suppress(UserError), machine.without_main_module():
        assert sys.modules["__main__"] is not main
        raise UserError("a mistake")
    assert sys.modules["__main__"] is main
    monkeypatch.setattr(machine.multiprocessing, "get_start_method", lambda allow_none: "fork")
    with machine.without_main_module():
        assert sys.modules["__main__"] is main


def test_the_only_program_that_is_started_is_python():
    starts = []
    for path in PRODUCT:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                assert name not in ("os.system", "os.popen"), path
                if name.startswith("subprocess."):
                    starts.append((path.name, ast.unparse(node.args[0])))
    # The command of launch.py is that of main.sh, whose test runs with a bare PATH.
    assert ("window.py", "[sys.executable, '-c', PROBE]") in starts
    assert [item for item in starts if not item[1].startswith("[sys.executable, ")] == [
        ("launch.py", "command")]


@pytest.fixture
def display(tmp_path, monkeypatch):
    """Name a display that leads nowhere, in an empty folder."""
    monkeypatch.setenv("DISPLAY", ":4711")
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.chdir(tmp_path)


def replace_opencv(text):
    """Let the probe, which runs in the current folder, import another OpenCV."""
    pathlib.Path("cv2.py").write_text("WINDOW_NORMAL = 0\nclass error(Exception): pass\n"
                                      "def destroyAllWindows(): pass\n"
                                      f"def namedWindow(*arguments):\n    {text}\n")


def test_a_display_that_leads_nowhere(display):
    assert window.why_no_window() == "no window can be opened on this display (DISPLAY=:4711)"


@pytest.mark.parametrize(("text", "reason"), [
    ("pass", None), ("raise error", "this OpenCV cannot open windows (opencv-python-headless "),
    ("import os; os.abort()", "no window can be opened on this display (DISPLAY=:4711)"),
    ("import time; time.sleep(60)", "no window can be opened on this display (DISPLAY=:4711)")])
def test_the_probe(text, reason, display, monkeypatch):
    replace_opencv(text)
    if "sleep" in text:
        monkeypatch.setattr(window, "PROBE_SECONDS", 1)
    found = window.why_no_window()
    assert found is None if reason is None else found.startswith(reason)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="others name no display")
def test_without_a_display_nothing_is_probed(display, monkeypatch):
    monkeypatch.delenv("DISPLAY")
    monkeypatch.setattr(subprocess, "run", None)
    assert window.why_no_window() == ""


@pytest.mark.parametrize(("flags", "end"), [
    ([], "; demo_face.png is written\n"), (["--landmarks", "out.csv"], "; nothing is shown\n")])
def test_files_are_written_in_place_of_a_window(flags, end, display, monkeypatch, capsys):
    predictor = painted_faces.Painted()
    monkeypatch.setattr(demo, "get_predictor", lambda weights, device: predictor)
    monkeypatch.setattr(demo, "get_detector", lambda name: painted_faces.detector())
    image = painted_faces.paint(painted_faces.background(), (1, 80, 120, 60))
    assert cv2.imwrite("face.png", image[..., ::-1])
    replace_opencv("raise error")
    demo.main(["--source", "face.png", *flags])
    out, err = capsys.readouterr()
    assert err.startswith("note: this OpenCV cannot open windows")
    assert err.endswith(end)
    assert err.count("\n") == 1
    assert out == f"1 frames, 1 faces: {flags[-1] if flags else 'demo_face.png'}\n"
    assert pathlib.Path("demo_face.png").exists() == (not flags)


@pytest.mark.parametrize(("visible", "autosize", "closed"), [
    ((1, 1), (0, 0), False), ((1, 0), (0, 0), True),        # Qt, Cocoa, Win32
    ((-1, -1), (1, 1), False), ((-1, -1), (1, -1), True),   # GTK
    ((-1, -1), (-1, -1), False)])                           # a build that tells neither
def test_closing_the_window(visible, autosize, closed, monkeypatch):
    handled = []
    answers = {cv2.WND_PROP_VISIBLE: visible, cv2.WND_PROP_AUTOSIZE: autosize}
    monkeypatch.setattr(cv2, "imshow", lambda *_: None)
    monkeypatch.setattr(cv2, "waitKey", lambda wait: handled.append(wait) or -1)
    monkeypatch.setattr(cv2, "getWindowProperty", lambda _, name: answers[name][len(handled)])
    assert window.show(numpy.zeros((4, 4, 3), numpy.uint8), 1) is closed


def test_closing_the_last_window_of_qt(monkeypatch):
    def gone(*_):
        raise cv2.error("NULL guiReceiver (please create a window)")

    monkeypatch.setattr(cv2, "getWindowProperty", gone)
    assert window._is_closed(True)


def test_waiting_threads_sleep_unless_the_user_says_how_they_wait(monkeypatch):
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    machine.limit_spinning()
    assert os.environ["GOMP_SPINCOUNT"] == machine.SPIN_COUNT
    monkeypatch.setenv("GOMP_SPINCOUNT", "5")
    machine.limit_spinning()
    assert os.environ["GOMP_SPINCOUNT"] == "5"
    monkeypatch.delenv("GOMP_SPINCOUNT")
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    machine.limit_spinning()
    assert "GOMP_SPINCOUNT" not in os.environ
    # Read when torch is loaded, which main.py's imports must not do.
    code = "import sys, main; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
