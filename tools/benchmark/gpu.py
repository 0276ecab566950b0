"""Check and measure training on GPUs; prints Markdown.

    python -m tools.benchmark.gpu [--only PART ...] [--output FILE]

The parts are:

* tests: runs the tests that need a GPU.
* speed: images per second of a training and of one repeated batch on the device, the share of time
  in which the device is idle, and peak memory.
* resume: compares the weights of a training that is killed and resumed with an uninterrupted one.
* ranks: images per second of main.sh on one and on all GPUs, with equal numbers of faces a GPU.

Takes less than eight minutes. `--device cpu --quick` runs all parts with small networks on a CPU in
one to two minutes, as a test of this program. If a part fails, the others still run and the exit
code is 1.
"""
import argparse
import contextlib
import gc
import itertools
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import unittest.mock

import torch

from tools.benchmark.common import facts, say, table
from utils import checkpoint, experiment
from utils.args import ROOT, load_args
from utils.data import dataset
from utils.data.generator import DataGenerator
from utils.data.readers import drawn
from utils.errors import run as guarded
from utils.training import loader, trainer

# Caches of the measured trainings; the first is profiled.
CACHES = ("device", "ram")
# Steps of an epoch; more than fit into a measurement.
STEPS = 5000


class Size:
    """The amount of work of each part, for a measurement or for a quick test of this program."""

    def __init__(self, quick):
        self.input = 64 if quick else 256
        self.faces = {"train": 64, "test": 8} if quick else drawn.COUNTS
        self.backbones = ["mobilenetv3_small_050"] if quick else \
            ["irnet18", "mobilenetv3_large_100", "tf_efficientnet_lite0"]
        self.batches = [8] if quick else [32, 64, 128]
        self.warm, self.seconds, self.profiled = (0.2, 0.5, 0.2) if quick else (2, 3, 1)
        # For the parts resume and ranks.
        self.backbone = "mobilenetv3_small_050" if quick else "irnet18"
        self.repeats = 1 if quick else 20


class Meter:
    """Replace control.Stop: measure the rate of training steps and the idle time of the device.

    The trainer reads `requested` after the device has finished all steps so far. After `size.warm`
    seconds the steps of `size.seconds` seconds are counted, then `profiled` seconds are profiled.

    Attributes:
        rate: steps per second.
        idle: share of the profiled time in which the device computed nothing; None without profile.
    """

    def __init__(self, size, device, profiled=0):
        self.size, self.device, self.profiled = size, device, profiled
        self.steps, self.readings, self.rate, self.idle = 0, [], None, None
        self.profiler = None

    def count(self, step):
        """Wrap Trainer.train_step to count its calls."""
        def counted(*arguments):
            step(*arguments)
            self.steps += 1
        return counted

    @property
    def requested(self):
        """Whether to stop."""
        self.readings.append((time.perf_counter(), self.steps))
        now, first = self.readings[-1], self.readings[0]
        if self.profiler is not None:
            if now[0] - self.profile_start < self.profiled:
                return False
            self.profiler.stop()
            self.idle = 1 - self._busy() / (now[0] - self.profile_start)
            return True
        # At least two readings, however long a step takes.
        warm = [reading for reading in self.readings[1:] if reading[0] - first[0] >= self.size.warm]
        if len(warm) < 2 or now[0] - warm[0][0] < self.size.seconds:
            return False
        self.rate = (now[1] - warm[0][1]) / (now[0] - warm[0][0])
        if not self.profiled:
            return True
        kinds = torch.profiler.ProfilerActivity
        self.profiler = torch.profiler.profile(
            activities=[kinds.CUDA if self.device == "cuda" else kinds.CPU])
        self.profiler.start()
        self.profile_start = time.perf_counter()
        return False

    def _busy(self):
        """Return the seconds in which at least one kernel (on a CPU: one operator) ran."""
        kind = torch.autograd.DeviceType.CUDA if self.device == "cuda" else \
            torch.autograd.DeviceType.CPU
        spans = sorted((event.time_range.start, event.time_range.end)
                       for event in self.profiler.events() if event.device_type == kind)
        total, until = 0.0, float("-inf")
        for begin, end in spans:
            total += max(0.0, end - max(begin, until))
            until = max(until, end)
        return total / 1e6


def tests(size, device, _):
    """Run the tests that need a GPU; return pytest's summary."""
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests"], cwd=ROOT,
                          capture_output=True, text=True)
    # 5: no test was selected.
    if done.returncode not in (0, 5):
        raise RuntimeError(done.stdout[-4000:] + done.stderr[-1000:])
    return [done.stdout.strip().splitlines()[-1], ""]


def speed(size, device, tree):
    """Measure images per second, idle time and peak memory of trainings."""
    rows = []
    for backbone, batch in itertools.product(size.backbones, size.batches):
        say(f"speed: {backbone}, batch {batch}")
        fixed, *_ = _trained(size, device, tree, backbone, batch)
        row = [backbone, batch, f"{fixed:.1f}"]
        for cache in CACHES:
            first = cache == CACHES[0]
            rate, idle, peak = _trained(size, device, tree, backbone, batch, cache)
            row += [f"{rate:.1f}", f"{100 * rate / fixed:.0f} %"]
            if first:
                notes = [f"{1000 * batch / rate:.1f}", f"{100 * idle:.0f} %", peak]
        rows.append(row + notes)
    caches = [text for cache in CACHES for text in (f"cache: {cache}, images/s", "share")]
    return [f"Input {size.input}, default augmentation, {_workers()} loader processes. The last "
            f"three columns are measured with cache: {CACHES[0]}. A CPU is idle when no operator "
            f"runs.",
            "", *table(["backbone", "batch", "fixed batch, images/s", *caches, "ms a step",
                        "device idle", "peak memory, MB"], rows)]


def _workers():
    return max(1, min(16, len(os.sched_getaffinity(0)) - 1))


def _trained(size, device, tree, backbone, batch, cache=None):
    """Measure a training, or without a cache the steps over one batch on the device.

    Returns:
        Images per second, share of idle time, and peak memory in MB as text.
    """
    args = load_args({"data_dir": str(tree / f"samples-{size.input}"), "backbone": backbone,
                      "batch_size": batch, "effective_batch": batch, "input_size": size.input,
                      "workers": _workers() if cache else 0, "cache": cache or "none",
                      "device": device})
    meter = Meter(size, device, size.profiled if cache else 0)
    make_loader = loader.make_loader

    def long(*arguments):
        batches, sampler = make_loader(*arguments)
        if cache is None:
            images, landmarks, *others = next(iter(batches))
            batches = itertools.repeat((images.to(device), landmarks.to(device), *others))
        sampler.steps = STEPS
        return batches, sampler

    if device == "cuda":
        # Reference cycles still hold the model of the previous training.
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        out = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(out))
        for owner, name, value in (
                (experiment, "new_experiment", lambda *_: pathlib.Path(folder)),
                (loader, "make_loader", long),
                (trainer.Trainer, "train_step", meter.count(trainer.Trainer.train_step))):
            stack.enter_context(unittest.mock.patch.object(owner, name, value))
        trainer.train(args, stop=meter)
    peak = f"{torch.cuda.max_memory_allocated() / 1e6:.0f}" if device == "cuda" else "-"
    return batch * meter.rate, meter.idle, peak


def _flags(size, device, exp):
    batch = size.batches[0]
    return ["--train", "--exp", exp, "--input-size", size.input, "--epochs", 2, "--device", device,
            "--batch-size", batch, "--effective-batch", batch, "--backbone", size.backbone,
            "--workers", 2]


def _run(tree, *argv):
    done = subprocess.run([str(a) for a in argv], cwd=tree, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, argv))}: {(done.stdout + done.stderr)[-3000:]}")


def resume(size, device, tree):
    """Compare the weights after two epochs, uninterrupted and killed and resumed."""
    main = [sys.executable, "main.py"]
    whole, killed = (_flags(size, device, exp) + ["--data-dir", "samples", "--deterministic",
                                                  "--save-minutes", 0.01]
                     for exp in ("whole", "killed"))
    _run(tree, *main, *whole)
    with open(tree / "log", "w", encoding="utf-8") as log:
        child = subprocess.Popen([str(a) for a in main + killed], cwd=tree, stdout=log, stderr=log)
        while child.poll() is None and not (tree / "weights" / "killed" / "last.pt").exists():
            time.sleep(0.01)
        child.send_signal(signal.SIGKILL)
        if child.wait() != -signal.SIGKILL:
            raise RuntimeError(f"ended before the signal: {(tree / 'log').read_text()[-3000:]}")
    at = checkpoint.read(tree / "weights" / "killed" / "last.pt")
    _run(tree, *main, "--resume", "--exp", "killed")
    one, two = (checkpoint.read(tree / "weights" / exp / "last.pt")["model"]
                for exp in ("whole", "killed"))
    largest = max(float((one[name].double() - two[name].double()).abs().max()) for name in one)
    result = "the same to the bit" if largest == 0 else f"DIFFERENT, by up to {largest:.1e}"
    return [f"{size.backbone}, killed, resumed at epoch {at['epoch'] + 1}, step {at['step'] + 1}, "
            f"--deterministic: the weights are {result}.", ""]


def ranks(size, device, tree):
    """Measure main.sh on one and on all GPUs (or two CPU processes), with equal faces for each."""
    count = torch.cuda.device_count() if device == "cuda" else 2
    if count < 2:
        return ["Not measured: this machine has one GPU.", ""]
    prepared, rates = tree / f"samples-{size.input}", {}
    for world in (1, count):
        say(f"ranks: {world}")
        folder = tree / f"times-{world}"
        shutil.copytree(prepared, folder)
        lines = (prepared / "train.txt").read_text(encoding="utf-8")
        (folder / "train.txt").write_text(size.repeats * world * lines, encoding="utf-8")
        batch = size.batches[len(size.batches) // 2]
        _run(tree, "bash", "main.sh", world, *_flags(size, device, f"ranks-{world}"),
             "--data-dir", folder, "--cache", "ram", "--batch-size", batch, "--effective-batch",
             world * batch, "--workers", max(1, _workers() // world))
        first, second = (epoch["seconds"] for epoch in experiment.read_epochs(
            tree / "weights" / f"ranks-{world}"))
        steps = size.repeats * world * lines.count("\n") // (world * batch)
        rates[world] = steps * world * batch / (second - first)
    return table(["processes", "images/s", "efficiency"],
                 [[world, f"{rate:.1f}", f"{100 * rate / world / rates[1]:.0f} %"]
                  for world, rate in rates.items()])


PARTS = {"tests": tests, "speed": speed, "resume": resume, "ranks": ranks}


def parse(argv=None):
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.benchmark.gpu", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART",
                        help="parts to run [all]")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true",
                        help="small networks and sets, to test this program")
    parser.add_argument("--output", metavar="FILE", help="also write the Markdown to this file")
    return parser.parse_args(argv)


def copy(folder):
    """Copy the programs to a folder, so that trainings write no experiments here; return it."""
    tree = pathlib.Path(folder) / "tree"
    for name in ("nets", "utils"):
        shutil.copytree(ROOT / name, tree / name)
    for name in ("main.py", "main.sh", "args.yaml"):
        shutil.copy(ROOT / name, tree)
    (tree / "weights").mkdir()
    return tree


def run(argv=None):
    """Run the parts and print their Markdown; exit with an error if one failed."""
    options = parse(argv)
    size, failed = Size(options.quick), []
    with tempfile.TemporaryDirectory(prefix="gpu-") as folder:
        tree = copy(folder)
        with contextlib.redirect_stdout(sys.stderr), \
                unittest.mock.patch.object(drawn, "COUNTS", size.faces):
            DataGenerator("samples", size.input, tree / f"samples-{size.input}",
                          layout="samples").run()
        lines = [*facts(dataset.PreparedSet(tree / f"samples-{size.input}")), ""]
        for name in options.only:
            say(f"== {name}")
            start = time.perf_counter()
            try:
                found = PARTS[name](size, options.device, tree)
            except Exception:  # GPU time is expensive, so the other parts still run.
                failed.append(name)
                found = ["```", traceback.format_exc().strip(), "```", ""]
            lines += [f"## {name}", "", *found]
            say("\n".join(found), f"== {name}: {time.perf_counter() - start:.0f} s")
            if options.output:
                pathlib.Path(options.output).write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    guarded(run)
