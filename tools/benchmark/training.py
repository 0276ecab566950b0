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

from tools.benchmark.common import build, measure, say, table
from utils import experiment
from utils.args import load_args
from utils.evaluation import predict
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


# Backbone, input size and stride.
NETS = (("irnet18", 256, 32), ("mobilenetv3_large_100", 256, 32),
        ("tf_efficientnet_lite0", 128, 16))
WAYS = ("fixed batch", "none", "ram", "device")


def step(prepared, options):
    """Images per second of a training with each cache, against one batch over and over."""
    rows, steps, parts = [], 12, 3
    for net in NETS:
        found = {way: [] for way in WAYS}
        for part in range(parts):
            for way in random.Random(part).sample(WAYS, len(WAYS)):
                say(f"step: {net[0]}, {way}, part {part + 1} of {parts}")
                found[way].append(_train_steps(prepared, options, net, way, steps))
        speed = {way: numpy.median(16 / numpy.concatenate(times)) for way, times in found.items()}
        rows.append([f"{net[0]}, {net[1]} px", *(f"{speed[way]:.1f}" for way in WAYS),
                     *(f"{speed[way] / speed['none']:.2f}" for way in WAYS[2:])])
    return [f"Batch 16, default augmentation, {options.workers} loader processes but with `cache: "
            f"device`, which is the CPU here; images/s, medians of {parts * steps} steps.", "",
            *table(["backbone", "fixed batch", *(f"`cache: {way}`" for way in WAYS[1:]),
                    *(f"{way} / none" for way in WAYS[2:])], rows)]


def _train_steps(prepared, options, net, way, steps):
    """Seconds of `steps` steps of a training, after two that warm up."""
    backbone, size, stride = net
    args = load_args({"data_dir": str(prepared.folder), "backbone": backbone, "batch_size": 16,
                      "effective_batch": 16, "input_size": size, "stride": stride,
                      "workers": options.workers, "device": "cpu",
                      "cache": "none" if way == "fixed batch" else way})
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
