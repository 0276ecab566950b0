"""Parts of the GPU benchmark that run the command line: tests, resume, ranks and accuracy."""
from __future__ import annotations

import dataclasses
import json
import re
import shlex
import signal
import subprocess
import sys
import time
import unittest.mock

from tools.benchmark.gpu_bench import Bench, workers
from utils import checkpoint
from utils.args import ROOT
from utils.data.generator import DataGenerator
from utils.data.readers import drawn

# main.py without the ONNX file at the end, which takes longer than a short training.
WITHOUT_EXPORT = """
import main
from utils.errors import run
main.export = lambda *_: None
run(main.main)
"""


def tests(bench: Bench) -> None:
    """Run the tests that need a GPU; report pytest's summary."""
    done = bench.measure("tests", _run_tests, limit=120)
    if done:
        bench.report.write(done)


def _run_tests():
    # Collecting the others would take longer than these tests.
    files = [path for path in sorted((ROOT / "tests").glob("test_*.py"))
             if re.search(r"mark\.gpu|needs\(", path.read_text(encoding="utf-8"))]
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p",
                           "no:cacheprovider", *files], cwd=ROOT, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True)
    lines = done.stdout.strip().splitlines() or [""]
    # 5: no test was selected.
    if done.returncode not in (0, 5):
        failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
        print(done.stdout)
        raise RuntimeError("; ".join([lines[-1], *failed])[:300])
    return lines[-1]


def _flags(bench, exp):
    batch = bench.size.batches[0]
    return ["--train", "--exp", exp, "--input-size", bench.size.input, "--epochs", 2, "--device",
            bench.device, "--batch-size", batch, "--effective-batch", batch, "--backbone",
            bench.size.backbone, "--workers", 2, "--data-dir", bench.faces, "--deterministic",
            "--save-minutes", 0.01]


def _run(tree, *argv):
    done = subprocess.run([str(a) for a in argv], cwd=tree, capture_output=True, text=True)
    if done.returncode:
        print(done.stdout, done.stderr)
        lines = (done.stdout + done.stderr).strip().splitlines() or [""]
        # torchrun prints a table after the error of a process.
        errors = [line for line in lines if re.search(r"(^error:|Error: )", line)] or lines[-1:]
        raise RuntimeError(f"exit code {done.returncode}: {errors[0][:200]}")
    return done.stdout


def resume(bench: Bench) -> None:
    """Compare the weights after two epochs, uninterrupted and killed and resumed."""
    flags = [_flags(bench, exp) for exp in ("whole", "killed")]
    found = bench.measure("resume", _resumed, bench.tree, *flags, limit=120)
    if found:
        bench.report.write(f"{bench.size.backbone}, {found}")


def _resumed(tree, whole, killed):
    main = [sys.executable, "-c", WITHOUT_EXPORT]
    _run(tree, *main, *whole)
    with open(tree / "log", "w", encoding="utf-8") as log:
        child = subprocess.Popen([str(a) for a in main + killed], cwd=tree, stdout=log, stderr=log)
        while child.poll() is None and not (tree / "weights" / "killed" / "last.pt").exists():
            time.sleep(0.01)
        child.send_signal(signal.SIGKILL)
        if child.wait() != -signal.SIGKILL:
            raise RuntimeError(f"ended before the signal: {(tree / 'log').read_text()[-200:]}")
    at = checkpoint.read(tree / "weights" / "killed" / "last.pt")
    _run(tree, *main, "--resume", "--exp", "killed")
    one, two = (checkpoint.read(tree / "weights" / exp / "last.pt")["model"]
                for exp in ("whole", "killed"))
    largest = max(float((one[name].double() - two[name].double()).abs().max()) for name in one)
    result = "the same to the bit" if largest == 0 else f"DIFFERENT, by up to {largest:.1e}"
    return (f"killed, resumed at epoch {at['epoch'] + 1}, step {at['step'] + 1}, --deterministic: "
            f"the weights are {result}.")


def ranks(bench: Bench) -> None:
    """Measure one process and one on each GPU (or two CPU processes), with equal faces for each."""
    count = bench.measure("GPUs", _gpus) if bench.device == "cuda" else 2
    if count is None or count < 2:
        bench.report.write("Not measured: this machine has one GPU." if count else "")
        return
    bench.report.head("processes", "images/s", "efficiency")
    batch, alone = bench.size.batches[0], None
    for world in (1, count):
        settings = bench.settings(bench.size.backbone, batch, cache="ram",
                                  effective_batch=world * batch,
                                  workers=max(1, workers() // world))
        rate = bench.measure(f"{world} processes", _group, bench.tree, world, settings,
                             dataclasses.replace(bench.size.span, profiled=0), limit=90)
        if rate:
            alone = rate if world == 1 else alone
            bench.report.row(world, f"{rate:.1f}",
                             f"{100 * rate / world / alone:.0f} %" if alone else "-")
    bench.report.end()


def _gpus():
    import torch
    return torch.cuda.device_count()


def _group(tree, world, settings, span):
    """Return the images per second of a group of processes."""
    job, output = tree / f"job-{world}.json", tree / f"rate-{world}.json"
    job.write_text(json.dumps({"settings": settings, "span": dataclasses.asdict(span),
                               "output": str(output)}), encoding="utf-8")
    _run(ROOT, sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
         world, "-m", "tools.benchmark.gpu_training", job)
    return json.loads(output.read_text(encoding="utf-8"))


def accuracy(bench: Bench) -> None:
    """Train drawn faces as the README does; report the NME of both."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    line = re.search(r"^bash main\.sh 1 (--train .*--data-dir samples.*)$", text, re.MULTILINE)
    stated = re.search(r"It ends at ([\d.]+) % NME", text)
    found = bench.measure("accuracy", _accuracy, bench.tree, bench.device, shlex.split(line[1]),
                          bench.size, limit=240)
    if found:
        bench.report.write(f"{found:.2f} % NME on the test list after `{line[0]}`; the README has "
                           f"{stated[1]}." + (" (Other flags: --quick.)" if bench.size.accuracy
                                              else ""))


def _accuracy(tree, device, flags, size):
    folder = f"samples-{size.input if size.accuracy else flags[flags.index('--input-size') + 1]}"
    if not (ROOT / folder).is_dir() and not (tree / folder).is_dir():
        with unittest.mock.patch.object(drawn, "COUNTS", size.faces):
            DataGenerator("samples", int(folder.rpartition("-")[2]), tree / folder,
                          layout="samples").run()
    report = tree / "accuracy.json"
    _run(tree, sys.executable, "main.py", *flags, *size.accuracy, "--exp", "accuracy", "--device",
         device, "--workers", workers(), "--report", report)
    return json.loads(report.read_text(encoding="utf-8"))["pytorch"]["test"]["nme"]
