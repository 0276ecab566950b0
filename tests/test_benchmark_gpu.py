"""The GPU benchmark runs on a CPU with --quick; failing parts and idle time."""
import pathlib
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("parts", [["speed"],
                                   pytest.param([], marks=pytest.mark.slow)],
                         ids=["speed", "all"])
def test_quick_runs_on_a_cpu(parts, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "tools.benchmark.gpu", "--device", "cpu", "--quick",
         "--output", tmp_path / "out.md", *(["--only", *parts] if parts else [])],
        cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("# Benchmark")
    assert "images/s" in done.stdout
    assert (tmp_path / "out.md").read_text().strip() == done.stdout.strip()
    if not parts:
        assert "the weights are the same to the bit" in done.stdout
        assert "| 2 |" in done.stdout


def test_a_failing_part_is_reported_and_the_others_run(tmp_path, monkeypatch, capsys):
    from tools.benchmark import gpu
    monkeypatch.setattr(gpu, "PARTS", {"bad": lambda *_: 1 / 0, "good": lambda *_: ["fine", ""]})
    monkeypatch.setattr(gpu, "DataGenerator", lambda *_, **__: SimpleNamespace(run=lambda: None))
    monkeypatch.setattr(gpu, "facts", lambda _: ["# Benchmark"])
    monkeypatch.setattr(gpu.dataset, "PreparedSet", lambda _: None)
    with pytest.raises(SystemExit, match="failed: bad"):
        gpu.run(["--device", "cpu", "--quick"])
    out = capsys.readouterr().out
    assert "ZeroDivisionError" in out
    assert "fine" in out


def test_overlapping_kernels_are_counted_once():
    from tools.benchmark import gpu
    kinds = torch.autograd.DeviceType
    meter = gpu.Meter(gpu.Size(True), "cuda", 1)
    meter.profiler = SimpleNamespace(events=lambda: [
        SimpleNamespace(device_type=kind, time_range=SimpleNamespace(start=start, end=end))
        for kind, start, end in ((kinds.CUDA, 20, 30), (kinds.CUDA, 0, 10), (kinds.CUDA, 5, 8),
                                 (kinds.CUDA, 25, 40), (kinds.CPU, 0, 100))])
    assert meter._busy() == pytest.approx(30e-6)
