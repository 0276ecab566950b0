"""Measure a training: images/s, what the device does in a step, validation and saving.

`measure` runs the trainer itself and stops it after some seconds. As a program it is one process of
a group that torchrun has started, and writes the images/s of the group to a file:

    python -m torch.distributed.run --nproc-per-node 2 -m tools.benchmark.gpu_training JOB.json
"""
from __future__ import annotations

import collections
import contextlib
import dataclasses
import gc
import itertools
import json
import os
import pathlib
import sys
import tempfile
import time
import typing
import unittest.mock
from collections.abc import Callable, Iterator, Mapping

import torch

from utils import experiment
from utils.args import load_args
from utils.training import ddp, loader, trainer

# Steps of an epoch; more than fit into a measurement.
STEPS = 20_000
# Kernels that are listed by name, and characters of a name.
LONGEST, NAME = 10, 70
# Steps before a graph is captured.
CAPTURE_AFTER = 3


@dataclasses.dataclass(frozen=True)
class Span:
    """Seconds of a measurement: not counted ones at the start, counted ones, profiled ones."""
    warm: float = 2
    seconds: float = 3
    profiled: float = 1


@dataclasses.dataclass
class Measured:
    """What a training did in a Span.

    Attributes:
        rate: optimiser steps per second.
        images: images per second of all processes.
        busy: seconds of a step in which a kernel ran (on a CPU: an operator); None if not profiled.
        kernels: name, calls a step and seconds a step of each kernel, the longest first.
        memory: peak of the allocated GPU memory in MB; None on a CPU.
        compiled: whether torch.compile was used.
        replayed: images per second of a CUDA graph of the same step; text that says why not; None
            if not asked for.
    """
    rate: float
    images: float
    busy: float | None = None
    kernels: list[tuple[str, float, float]] = dataclasses.field(default_factory=list)
    memory: float | None = None
    compiled: bool = False
    replayed: float | str | None = None

    @property
    def idle(self) -> float | None:
        """Share of a step's time in which the device computes nothing.

        The profiler slows the host, not the kernels, so their time is compared with that of a step
        that is not profiled.
        """
        return None if self.busy is None else max(0.0, 1 - self.busy * self.rate)


class Meter:
    """Replace control.Stop: count the steps of a training, then profile some.

    The trainer reads `requested` after the device has finished all steps so far.

    Args:
        span: seconds to measure.
        device: `cuda` or `cpu`.
        asks: whether this process ends the training; one of a group does.

    Attributes:
        rate: steps per second; None before they are counted.
        trainer: the Trainer, after its first step.
        profiled: the profiler's events and the number of profiled steps; None without profile.
    """

    def __init__(self, span: Span, device: str, asks: bool = True):
        self.span, self.device, self.asks = span, device, asks
        self.steps, self.readings, self.rate, self.trainer = 0, [], None, None
        self.profiled, self._profiler = None, None

    def count(self, step: Callable) -> Callable:
        """Wrap Trainer.train_step to count its calls."""
        def counted(running, *arguments):
            self.trainer = running
            step(running, *arguments)
            self.steps += 1
        return counted

    @property
    def requested(self) -> bool:
        """Whether to stop."""
        now = time.perf_counter(), self.steps
        if not self.asks:
            return False
        if self._profiler is not None:
            return self._end_profile(*now)
        self.readings.append(now)
        # At least two readings, however long a step takes.
        warm = [reading for reading in self.readings[1:]
                if reading[0] - self.readings[0][0] >= self.span.warm]
        if len(warm) < 2 or now[0] - warm[0][0] < self.span.seconds:
            return False
        self.rate = (now[1] - warm[0][1]) / (now[0] - warm[0][0])
        if not self.span.profiled:
            return True
        kinds = torch.profiler.ProfilerActivity
        self._profiler = torch.profiler.profile(
            activities=[kinds.CUDA if self.device == "cuda" else kinds.CPU])
        self._profiler.start()
        self._profiled_from = time.perf_counter(), self.steps
        return False

    def _end_profile(self, now, steps):
        start, first = self._profiled_from
        if now - start < self.span.profiled or steps == first:
            return False
        self._profiler.stop()
        self.profiled = list(self._profiler.events()), steps - first
        return True


def kernel_events(events: typing.Iterable, device: str) -> list:
    """Return the events that took time of the device (on a CPU: operators).

    Ranges that programs mark, such as an optimiser's step, lie over the kernels in them.
    """
    kind = torch.autograd.DeviceType.CUDA if device == "cuda" else torch.autograd.DeviceType.CPU
    return [event for event in events if event.device_type == kind
            and not getattr(event, "is_user_annotation", False)
            and not event.name.startswith(("ProfilerStep", "Optimizer."))]


def busy_seconds(events: typing.Iterable) -> float:
    """Return the seconds in which at least one of the events ran."""
    spans = sorted((event.time_range.start, event.time_range.end) for event in events)
    total, until = 0.0, float("-inf")
    for begin, end in spans:
        total += max(0.0, end - max(begin, until))
        until = max(until, end)
    return total / 1e6


def longest(events: typing.Iterable, steps: int) -> list[tuple[str, float, float]]:
    """Return name, calls a step and seconds a step of each kernel, the longest first."""
    calls, seconds = collections.Counter(), collections.Counter()
    for event in events:
        calls[event.name] += 1
        seconds[event.name] += (event.time_range.end - event.time_range.start) / 1e6
    return [(name, calls[name] / steps, total / steps) for name, total in seconds.most_common()]


def measure(settings: Mapping[str, typing.Any], span: Span, fixed: bool = False,
            replay: bool = False, asks: bool = True) -> Measured:
    """Train with `settings` for a span.

    Args:
        settings: of a training, by name.
        span: seconds to measure.
        fixed: repeat one batch that is on the device, without loader processes.
        replay: also measure a CUDA graph of the step over one batch.
        asks: see Meter.
    """
    args = load_args(dict(settings))
    device = "cuda" if args.device.startswith("cuda") else "cpu"
    meter = Meter(span, device, asks)
    kept = []
    if device == "cuda":
        # Reference cycles still hold the model of the previous training.
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        for owner, name, value in (
                (experiment, "new_experiment", lambda *_: pathlib.Path(folder)),
                (loader, "make_loader", _long_loader(loader.make_loader, device, fixed, kept)),
                (trainer.Trainer, "train_step", meter.count(trainer.Trainer.train_step))):
            stack.enter_context(unittest.mock.patch.object(owner, name, value))
        trainer.train(args, stop=meter)
    found = Measured(meter.rate or 0.0, 0.0)
    found.images = found.rate * meter.trainer.state.schedule_signature[1]
    found.compiled = hasattr(meter.trainer.state.ddp_model, "_orig_mod")
    if device == "cuda":
        found.memory = torch.cuda.max_memory_allocated() / 1e6
    if meter.profiled is not None:
        events, steps = meter.profiled
        events = kernel_events(events, device)
        found.busy, found.kernels = busy_seconds(events) / steps, longest(events, steps)
    if replay:
        found.replayed = _replay(meter.trainer, kept[0], span)
    return found


def _long_loader(make_loader, device, fixed, kept):
    """Wrap loader.make_loader: epochs that do not end, or one batch again and again."""
    def long(*arguments):
        batches, sampler = make_loader(*arguments)
        if fixed:
            images, landmarks, *others = next(iter(batches))
            kept.append((images.to(device), landmarks.to(device), *others))
            batches = _Repeated(kept[0], batches)
        sampler.steps = STEPS
        return batches, sampler
    return long


class _Repeated:
    """A loader that gives one batch again and again."""

    def __init__(self, batch, real):
        self.batch, self.dataset = batch, real.dataset

    def __iter__(self) -> Iterator:
        return itertools.repeat(self.batch)


def _replay(running, batch, span):
    """Return images per second of a replayed graph of forward, loss, backward and optimiser."""
    if running.ranks.device.type != "cuda":
        return "-"
    try:
        return _replay_rate(running, batch, span)
    except Exception as error:  # The other figures of this training are measured already.
        return f"failed: {' '.join(str(error).split())[:80]}"


def _replay_rate(running, batch, span):
    state, (images, landmarks, indices, *_) = running.state, batch
    images = images.permute(0, 3, 1, 2)
    landmarks = landmarks.to(state.model.mean.dtype)
    optimizer = torch.optim.AdamW(state.model.parameters(), 1e-5, fused=True, capturable=True)
    state.model.train()

    def step():
        with torch.autocast("cuda", state.dtype, state.dtype is not None, cache_enabled=False):
            predicted = state.model(images)
        state.loss(predicted, landmarks, indices).backward()
        optimizer.step()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(CAPTURE_AFTER):
            optimizer.zero_grad(set_to_none=True)
            step()
    torch.cuda.current_stream().wait_stream(side)
    optimizer.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    steps, start = 0, None
    while start is None or time.perf_counter() - start < span.seconds:
        for _ in range(10):
            graph.replay()
        torch.cuda.synchronize()
        # The first replays upload the graph.
        start, steps = (time.perf_counter(), 0) if start is None else (start, steps + 10)
    return steps * len(images) / (time.perf_counter() - start)


def time_epochs(settings: Mapping[str, typing.Any]) -> dict[str, list[float]]:
    """Train `settings` to the end; return the seconds of each epoch's parts.

    Returns:
        Seconds by `steps`, `validation` and `saving`, one for each call.
    """
    found = collections.defaultdict(list)

    def timed(name, function):
        def call(*arguments):
            start = time.perf_counter()
            result = function(*arguments)
            found[name].append(time.perf_counter() - start)
            return result
        return call

    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        stack.enter_context(unittest.mock.patch.object(
            experiment, "new_experiment", return_value=pathlib.Path(folder)))
        for name, method in (("steps", "train_one_epoch"), ("validation", "evaluate"),
                             ("saving", "save_checkpoint")):
            stack.enter_context(unittest.mock.patch.object(
                trainer.Trainer, method, timed(name, getattr(trainer.Trainer, method))))
        stack.enter_context(unittest.mock.patch.object(
            trainer.Trainer, "record_experiment"))
        trainer.train(load_args(dict(settings)))
    return dict(found)


def run_rank(argv: list[str] | None = None) -> None:
    """Measure as one process of a group; the first one writes images per second to job["output"].

    The job is a JSON file with `settings`, `span` and `output`.
    """
    path, = sys.argv[1:] if argv is None else argv
    job = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    is_first = int(os.environ.get("RANK", 0)) == 0
    found = measure(job["settings"], Span(**job["span"]), asks=is_first)
    ddp.stop()
    if is_first:
        pathlib.Path(job["output"]).write_text(json.dumps(found.images), encoding="utf-8")


if __name__ == "__main__":
    run_rank()
