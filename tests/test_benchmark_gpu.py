"""The GPU benchmark on a CPU: rows as they come, failures, time limits, idle time, packages."""
import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from tools.benchmark import common, gpu, gpu_bench, gpu_checks, gpu_training, isolated
from utils.data.dataset import PreparedSet

ROOT = pathlib.Path(__file__).resolve().parent.parent
KINDS = torch.autograd.DeviceType


@pytest.mark.parametrize("parts", [["kernels"], pytest.param([], marks=pytest.mark.slow)],
                         ids=["kernels", "all"])
def test_quick_runs_on_a_cpu(parts, drawn_set, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "tools.benchmark.gpu", "--device", "cpu", "--quick", "--data-dir",
         drawn_set, "--output", tmp_path / "out.md", *(["--only", *parts] if parts else [])],
        cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("# Benchmark")
    assert (tmp_path / "out.md").read_text() == done.stdout
    assert "calls a step" in done.stdout
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert next(row for row in rows if row["name"] == "kernels")["found"]["images"] > 0
    if not parts:
        assert "the weights are the same to the bit" in done.stdout
        assert "| 2 |" in done.stdout
        assert "its validation, s" in done.stdout


def bench(tmp_path, seconds=100):
    """A Bench that runs small trainings on the CPU."""
    return gpu_bench.Bench(gpu_bench.Size.quick(), "cpu", tmp_path, tmp_path,
                           isolated.Clock(isolated.process_age() + seconds),
                           gpu_bench.Report(str(tmp_path / "out.md")))


def test_a_failed_row_says_why_and_is_written_at_once(tmp_path, capsys):
    ours = bench(tmp_path)
    ours.report.head("name", "one", "two")
    assert ours.measure("bad", lambda: 1 / 0) is None
    assert "| bad | ZeroDivisionError: division by zero |" in (tmp_path / "out.md").read_text()
    assert ours.measure("good", lambda: [1, 2]) == [1, 2]
    assert ours.failed == ["bad"]
    assert json.loads((tmp_path / "out.jsonl").read_text()) == {"name": "good", "found": [1, 2]}
    assert "Traceback" in capsys.readouterr().err


def test_without_time_left_nothing_is_measured(tmp_path):
    ours = bench(tmp_path, seconds=0)
    assert ours.measure("late", lambda: 1) is None
    assert "late: not measured: the time is up" in (tmp_path / "out.md").read_text()


def test_a_part_that_fails_lets_the_others_run(drawn_set, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "PARTS", {
        "bad": lambda ours: ours.measure("bad", lambda: 1 / 0),
        "good": lambda ours: ours.report.write("fine")})
    with pytest.raises(SystemExit, match="failed or not measured: bad"):
        gpu.run(["--device", "cpu", "--quick", "--data-dir", str(drawn_set), "--only", "bad",
                 "good"])
    assert "fine" in capsys.readouterr().out


def test_a_time_limit_ends_a_part_with_its_processes(tmp_path):
    def hang():
        child = subprocess.Popen(["sleep", "600"])
        (tmp_path / "pid").write_text(str(child.pid))
        os.write(1, b"began")
        time.sleep(600)

    with pytest.raises(isolated.Failure, match="not done within 3 s") as found:
        isolated.call(hang, 3)
    assert found.value.detail == "began"
    status = pathlib.Path("/proc", (tmp_path / "pid").read_text(), "stat")
    # Nobody may have waited for it yet.
    assert not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z"


def test_a_part_that_dies_is_reported():
    with pytest.raises(isolated.Failure, match="ended with exit code 3"):
        isolated.call(os._exit, 60, 3)


def event(kind, start, end, name="kernel", **others):
    return SimpleNamespace(device_type=kind, name=name, **others,
                           time_range=SimpleNamespace(start=start, end=end))


def test_overlapping_kernels_are_counted_once_and_marked_ranges_never():
    events = [event(KINDS.CUDA, *span) for span in ((20, 30), (0, 10), (5, 8), (25, 40))]
    others = [event(KINDS.CPU, 0, 100), event(KINDS.CUDA, 0, 100, "Optimizer.step#AdamW.step"),
              event(KINDS.CUDA, 0, 100, "mine", is_user_annotation=True)]
    found = gpu_training.kernel_events(events + others, "cuda")
    assert found == events
    assert gpu_training.busy_seconds(found) == pytest.approx(30e-6)
    assert gpu_training.longest([*found, event(KINDS.CUDA, 50, 99, "copy")], 2) == [
        ("copy", 0.5, pytest.approx(24.5e-6)), ("kernel", 2, pytest.approx(19e-6))]


def test_idle_time_is_that_of_a_step_without_the_profiler():
    assert gpu_training.Measured(10, 320, busy=0.04).idle == pytest.approx(0.6)
    assert gpu_training.Measured(10, 320).idle is None


def test_a_meter_counts_the_steps_after_the_first_ones(monkeypatch):
    now = iter([0, 1, 2, 3, 4])
    monkeypatch.setattr(gpu_training.time, "perf_counter", lambda: next(now))
    meter = gpu_training.Meter(gpu_training.Span(2, 2, 0), "cpu")
    answers = []
    for _ in range(5):
        meter.steps += 7
        answers.append(meter.requested)
    assert answers == [False] * 4 + [True]
    assert meter.rate == 7


def test_versions_are_named_whatever_package_has_them(drawn_set, monkeypatch):
    known = {"torch": "9", "opencv-python-headless": "5", "onnxruntime": "7"}

    def version(name):
        if name not in known:
            raise importlib.metadata.PackageNotFoundError(name)
        return known[name]

    monkeypatch.setattr(common.importlib.metadata, "version", version)
    text = "\n".join(common.facts(PreparedSet(drawn_set)))
    assert "torch 9, no torchvision, no timm, opencv-python-headless 5" in text
    assert "onnxruntime 7" in text


def test_only_the_files_with_gpu_tests_are_collected(monkeypatch):
    asked = []

    def run(argv, **_):
        asked.extend(pathlib.Path(word).name for word in argv)
        return SimpleNamespace(returncode=1, stdout="FAILED tests/test_a.py::b\n1 failed in 2 s")

    monkeypatch.setattr(gpu_checks.subprocess, "run", run)
    with pytest.raises(RuntimeError, match="1 failed in 2 s; FAILED tests/test_a.py::b"):
        gpu_checks._run_tests()
    assert {"test_gpu.py", "test_stops.py"} <= set(asked)
    assert "test_crop.py" not in asked
