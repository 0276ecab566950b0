"""Steps of a training against one fixed batch, and scoring in batches against one by one."""
import contextlib
import os
import pathlib
import random
import tempfile
import time
import unittest.mock

import numpy
import torch

from tests.benchmark.common import build, measure, say, table
from utils import experiment
from utils.args import load_args
from utils.testing import predict
from utils.training import engine, trainer


class Watch:
    """Stands for launch.Stop: notes when each step ends, and asks to stop after `steps`."""

    def __init__(self, steps):
        self.steps, self.times = steps, []

    @property
    def asked(self):
        """Whether to stop; looked at once a step."""
        self.times.append(time.perf_counter())
        return len(self.times) > self.steps


def step(prepared, options):
    """Images per second of a training against the same with one batch over and over."""
    rows, steps, parts = [], 12, 3
    for backbone in ("irnet18", "mobilenetv3_large_100"):
        found = {"training": [], "fixed batch": []}
        for part in range(parts):
            for way in random.Random(part).sample(sorted(found), 2):
                say(f"step: {backbone}, {way}, part {part + 1} of {parts}")
                found[way].append(_train_steps(prepared, options, backbone, way, steps))
        speed = {way: 16 / numpy.concatenate(times) for way, times in found.items()}
        share = numpy.median(speed["training"]) / numpy.median(speed["fixed batch"])
        rows.append([backbone, *(f"{numpy.median(speed[way]):.1f}" for way in found),
                     f"{100 * share:.0f} %"])
    return [f"Batch 16, default augmentation, {options.workers} loader processes; medians of "
            f"{parts * steps} steps.", "",
            *table(["backbone", "training, images/s", "fixed batch, images/s", "share"], rows)]


def _train_steps(prepared, options, backbone, way, steps):
    """Seconds of `steps` steps of a training, after two that warm up."""
    args = load_args({"data_dir": str(prepared.folder), "backbone": backbone, "batch_size": 16,
                      "effective_batch": 16, "input_size": prepared.size or 256,
                      "workers": options.workers})
    watch = Watch(steps + 2)
    make_loader = engine.make_loader

    def fixed(*arguments):
        loader, sampler = make_loader(*arguments)
        return [next(iter(loader))] * (steps + 3), sampler

    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        out = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(out))
        stack.enter_context(unittest.mock.patch.object(
            experiment, "new_experiment", lambda *_: pathlib.Path(folder)))
        if way == "fixed batch":
            stack.enter_context(unittest.mock.patch.object(engine, "make_loader", fixed))
        trainer.train(args, stop=watch)
    return numpy.diff(watch.times[2:steps + 3])


def evaluate(prepared, options):
    """Scoring faces in batches against one by one, images decoded in both."""
    faces = next(iter(prepared.tests.values()))
    faces = faces.take(numpy.arange(min(224, len(faces))))
    size = prepared.size or 256
    model = build("mobilenetv3_large_100", prepared.scheme, size, faces, prepared)
    function = predict.torch_predict(model.to(memory_format=torch.channels_last),
                                     torch.device("cpu"))
    parts = [faces.take(part) for part in numpy.array_split(numpy.arange(len(faces)), 7)]
    found = {}
    for number in range(-(-options.rounds // len(parts))):
        say(f"evaluation: pass {number + 1}")
        for part in parts:
            times = measure({
                "ours, batch 32": lambda part=part: predict.predict_list(
                    function, part, prepared.margin, size),
                "batch 1": lambda part=part: predict.predict_list(
                    function, part, prepared.margin, size, batch=1)}, 1, warm=int(not found))
            for name, seconds in times.items():
                found.setdefault(name, []).append(len(part) / seconds[0])
    rate = {name: numpy.median(values) for name, values in found.items()}
    rows = [[name, f"{v:.1f}", f"{v / rate['batch 1']:.2f}"] for name, v in rate.items()]
    return [f"{len(faces)} test faces in {len(parts)} parts of about 32, MobileNetV3-Large, input "
            f"{size}, decoding included.", "",
            *table(["way", "faces/s", "times as fast"], rows)]
