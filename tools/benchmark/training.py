"""Training steps with each cache against a fixed batch; evaluation in batches against single."""
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
from utils.training import loader, trainer


class Watch:
    """Replace control.Stop: record the time of each step, and stop after `steps` of them."""

    def __init__(self, steps):
        self.steps, self.times = steps, []

    @property
    def requested(self):
        """Whether to stop; the trainer reads it once a step."""
        self.times.append(time.perf_counter())
        return len(self.times) > self.steps


# Backbone, input size and stride.
NETS = (("irnet18", 256, 32), ("mobilenetv3_large_100", 256, 32),
        ("tf_efficientnet_lite0", 128, 16))
SOURCES = ("fixed batch", "none", "ram", "device")  # A repeated batch, and the caches.


def step(prepared, options):
    """Measure images per second of a training with each cache, and on one repeated batch."""
    rows, steps, parts = [], 12, 3
    for net in NETS:
        found = {source: [] for source in SOURCES}
        for part in range(parts):
            for source in random.Random(part).sample(SOURCES, len(SOURCES)):
                say(f"step: {net[0]}, {source}, part {part + 1} of {parts}")
                found[source].append(_train_steps(prepared, options, net, source, steps))
        speed = {key: numpy.median(16 / numpy.concatenate(times)) for key, times in found.items()}
        rows.append([f"{net[0]}, {net[1]} px", *(f"{speed[key]:.1f}" for key in SOURCES),
                     *(f"{speed[key] / speed['none']:.2f}" for key in SOURCES[2:])])
    return [f"Batch 16, default augmentation, {options.workers} loader processes (none with "
            f"`cache: device`, which is the CPU here); images/s, medians of {parts * steps} "
            f"steps.", "",
            *table(["backbone", "fixed batch", *(f"`cache: {key}`" for key in SOURCES[1:]),
                    *(f"{key} / none" for key in SOURCES[2:])], rows)]


def _train_steps(prepared, options, net, source, steps):
    """Return the seconds of `steps` training steps, after two steps of warm-up."""
    backbone, size, stride = net
    args = load_args({"data_dir": str(prepared.folder), "backbone": backbone, "batch_size": 16,
                      "effective_batch": 16, "input_size": size, "stride": stride,
                      "workers": options.workers, "device": "cpu",
                      "cache": "none" if source == "fixed batch" else source})
    watch = Watch(steps + 2)
    make_loader = loader.make_loader

    def fixed(*arguments):
        batches, sampler = make_loader(*arguments)
        return [next(iter(batches))] * (steps + 3), sampler

    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        out = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(out))
        stack.enter_context(unittest.mock.patch.object(
            experiment, "new_experiment", return_value=pathlib.Path(folder)))
        if source == "fixed batch":
            stack.enter_context(unittest.mock.patch.object(loader, "make_loader", fixed))
        trainer.train(args, stop=watch)
    return numpy.diff(watch.times[2:steps + 3])


def evaluate(prepared, options):
    """Measure evaluation in batches of 32 against batches of 1, image decoding included."""
    faces = next(iter(prepared.test_lists.values()))
    faces = faces.select(numpy.arange(min(224, len(faces))))
    size = prepared.size or 256
    model = build("mobilenetv3_large_100", size, faces, prepared)
    function = predict.torch_predict(model.to(memory_format=torch.channels_last),
                                     torch.device("cpu"))
    parts = [faces.select(part) for part in numpy.array_split(numpy.arange(len(faces)), 7)]
    found = {}
    for number in range(-(-options.rounds // len(parts))):
        say(f"evaluation: pass {number + 1}")
        for part in parts:
            times = measure({
                "batch 32": lambda part=part: predict.predict_list(
                    function, part, prepared.margin, size),
                "batch 1": lambda part=part: predict.predict_list(
                    function, part, prepared.margin, size, batch=1)}, 1, warm=int(not found))
            for name, seconds in times.items():
                found.setdefault(name, []).append(len(part) / seconds[0])
    rate = {name: numpy.median(values) for name, values in found.items()}
    rows = [[name, f"{v:.1f}", f"{v / rate['batch 1']:.2f}"] for name, v in rate.items()]
    return [f"{len(faces)} test faces in {len(parts)} parts of about 32, MobileNetV3-Large, input "
            f"{size}, decoding included.", "",
            *table(["batch", "faces/s", "times as fast"], rows)]
