"""Parts of the GPU benchmark that measure trainings: recipe, epochs, speed, kernels, variants."""
from __future__ import annotations

import dataclasses
import pathlib
import shlex

from tools.benchmark import gpu_training
from tools.benchmark.gpu_bench import LIMIT, Bench, Size, training_settings, workers
from tools.benchmark.gpu_training import LONGEST, NAME
from utils.args import ROOT
from utils.errors import UserError

# Caches of the trainings of the part speed; the first is profiled.
CACHES = ("device", "ram")
COMPILE_LIMIT = 150
CARD = ROOT / "weights" / "accurate.md"
# Files beside the card that stand for the experiments its last command names.
SHIPPED = {"irD": "irnet18", "fastW": "fast", "accW": "accurate"}


def recipe_flags() -> dict[str, str]:
    """Return the flags of the last training command of weights/accurate.md, for shipped teachers.

    Raises:
        UserError: the card has no such command.
    """
    lines = [line for line in CARD.read_text(encoding="utf-8").splitlines()
             if line.startswith("bash main.sh 1 --train")]
    if not lines:
        raise UserError(f"{CARD}: has no line `bash main.sh 1 --train`, whose flags are needed")
    words = shlex.split(lines[-1])[4:]
    flags = dict(zip(words[::2], words[1::2]))
    for name, shipped in SHIPPED.items():
        for flag in ("--pretrained", "--teacher"):
            flags[flag] = flags[flag].replace(f"weights/{name}/best.pt",
                                              str(ROOT / "weights" / f"{shipped}.pt"))
    for flag in ("--exp", "--data-dir", "--epochs"):
        flags.pop(flag)
    return flags


def recipe_settings(size: Size, faces: pathlib.Path | str, device: str) -> dict:
    """Return the settings of the recipe, with the batch and the precision of rental.sh."""
    found = {flag[2:].replace("-", "_"): value for flag, value in recipe_flags().items()}
    # The recipe's faces a step stay, from which the learning rate of a larger batch follows.
    found = {**training_settings(size, faces, device, found["backbone"], size.recipe_batch),
             **found, "precision": "bf16"}
    if size.input < 128:
        found |= {"backbone": size.backbone, "input_size": size.input, "pretrained": "none",
                  "teacher": str(ROOT / "weights" / "fast.pt")}
    return found


def recipe(bench: Bench) -> None:
    """Measure the training of rental.sh."""
    settings = recipe_settings(bench.size, bench.faces, bench.device)
    bench.report.write(f"Last stage of accurate, batch {settings['batch_size']}, bf16, input "
                       f"{settings['input_size']}, cache: {settings['cache']}.", "")
    bench.report.head("training", "images/s", "ms a step", "device idle", "kernels a step",
                      "peak memory, MB")
    _rows(bench, {"with teachers": settings, "without": {**settings, "teacher": "none"}})
    bench.report.end()


def epochs(bench: Bench) -> None:
    """Measure the parts of an epoch."""
    settings = recipe_settings(bench.size, bench.faces, bench.device)
    settings["epochs"] = bench.size.epochs
    found = bench.measure("epochs", gpu_training.time_epochs, settings, limit=90)
    if not found:
        return
    # The first epoch and the first validation read the files.
    steps, validation = (sum(found[name][1:]) / len(found[name][1:])
                         for name in ("steps", "validation"))
    bench.report.head("an epoch's steps, s", "its validation, s", "share", "a save, s",
                      "share, one a minute")
    saving = max(found["saving"])
    bench.report.row(f"{steps:.3f}", f"{validation:.3f}",
                     f"{100 * validation / (steps + validation):.1f} %", f"{saving:.3f}",
                     f"{100 * saving / 60:.1f} %")
    bench.report.end()


def speed(bench: Bench) -> None:
    """Measure images per second, idle time, kernels and peak memory of trainings."""
    size = bench.size
    bench.report.write(
        f"Input {size.input}, default augmentation, {workers()} loader processes. `fixed` repeats "
        f"one batch on the device; `graph` replays forward, loss, backward and optimiser over it. "
        f"The last four columns are of cache: {CACHES[0]}. A CPU is idle when no operator runs.",
        "")
    bench.report.head("training", *(f"{cache}, images/s" for cache in CACHES), "fixed", "graph",
                      "ms a step", "device idle", "kernels a step", "peak memory, MB")
    for batch in size.batches:
        for backbone in size.backbones:
            name = f"{backbone}, batch {batch}"
            found = bench.measure(name, _speed, bench.settings(backbone, batch), size.span)
            if found:
                bench.report.row(name, *found)
    bench.report.end()


def _speed(settings, span):
    """Measure a row of the part speed; return its cells."""
    fixed = gpu_training.measure({**settings, "workers": 0, "cache": "none"},
                                 dataclasses.replace(span, profiled=0), fixed=True, replay=True)
    first = gpu_training.measure(settings, span)
    others = [gpu_training.measure({**settings, "cache": cache},
                                   dataclasses.replace(span, profiled=0)) for cache in CACHES[1:]]
    graph = fixed.replayed
    return [*(f"{found.images:.1f}" for found in (first, *others, fixed)),
            graph if isinstance(graph, str) else f"{graph:.1f}", *_cells(first)[1:]]


def _cells(found):
    """Return images/s, ms a step, idle share, kernels a step and peak memory as text."""
    return [f"{found.images:.1f}", f"{1000 / found.rate:.1f}",
            "-" if found.idle is None else f"{100 * found.idle:.0f} %",
            f"{sum(calls for _, calls, _ in found.kernels):.0f}",
            "-" if found.memory is None else f"{found.memory:.0f}"]


def _rows(bench, variants):
    """Measure trainings by name and report a row for each; the first is the reference."""
    for name, settings in variants.items():
        limit = COMPILE_LIMIT if settings.get("compile") else LIMIT
        found = bench.measure(name, gpu_training.measure, settings, bench.size.span, limit=limit)
        if found:
            bench.report.row(name + (" (failed: not compiled)" if settings.get("compile")
                                     and not found.compiled else ""), *_cells(found))


def kernels(bench: Bench) -> None:
    """List the longest kernels of a step."""
    size = bench.size
    settings = bench.settings(size.backbone, size.batches[0])
    found = bench.measure("kernels", gpu_training.measure, settings, size.span)
    if not found:
        return
    total = sum(calls for _, calls, _ in found.kernels)
    bench.report.write(f"{size.backbone}, batch {size.batches[0]}: {total:.0f} kernels a step, "
                       f"which take {1000 * found.busy:.2f} ms of {1000 / found.rate:.2f}.", "")
    bench.report.head("kernel", "calls a step", "ms a step", "share")
    every = sum(seconds for *_, seconds in found.kernels)
    for name, calls, seconds in found.kernels[:LONGEST]:
        bench.report.row(f"`{name[:NAME].replace('|', '/')}`", f"{calls:.1f}",
                         f"{1000 * seconds:.3f}", f"{100 * seconds / every:.0f} %")
    bench.report.end()


def variants(bench: Bench) -> None:
    """Measure one training with other settings."""
    size, batch = bench.size, bench.size.batches[0]
    plain = bench.settings(size.backbone, batch)
    side, stride = size.fine
    bench.report.write(f"{size.backbone}, batch {batch}, cache: {CACHES[0]}.", "")
    bench.report.head("training", "images/s", "ms a step", "device idle", "kernels a step",
                      "peak memory, MB")
    precisions = ("bf16", "fp16", "fp32") if bench.device == "cuda" else ("fp32", "bf16")
    _rows(bench, {
        **{name: {**plain, "precision": name} for name in precisions},
        f"stride {stride}, {side} px": {**plain, "stride": stride, "input_size": side},
        "--deterministic": {**plain, "deterministic": "true"},
        "--compile": {**plain, "compile": "true"}})
    bench.report.end()
