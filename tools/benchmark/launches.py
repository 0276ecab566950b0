"""Count the operations of a training step and measure the time of the host for it.

    python -m tools.benchmark.launches [--backbone NAME ...]

A GPU that waits for the host to launch its kernels is slowed by both. The step is that of a GPU
(fused optimiser, average on the device), on a CPU:

* operations: calls of torch's operators as a TorchDispatchMode sees them. Views, allocations and
  calls inside a fused operator, such as those of an optimiser, are not counted. The networks have
  their full width.
* host ms: median processor time of a step in which arithmetic takes next to no time: 32 px, two
  faces, and all layers an eighth as wide.
"""
import argparse
import collections
import contextlib
import io
import itertools
import math
import os
import pathlib
import statistics
import tempfile
import time
import unittest.mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tools.benchmark.common import table
from utils.args import load_args
from utils.data.generator import DataGenerator
from utils.data.readers import drawn
from utils.training import optim, setup, stages
from utils.training.ddp import Ranks
from utils.training.trainer import Trainer

BACKBONES = ("irnet18", "mobilenetv3_large_100", "tf_efficientnet_lite0")
# Layers are divided by this for the time of the host.
THINNED = 8
WARM, TIMED = 5, 40


class OperationCounter(TorchDispatchMode):
    """Counts the operators that are called within the context, without views and allocations.

    Attributes:
        counts: calls by the operator's name.
    """

    FREE = (torch.ops.aten.detach, torch.ops.aten.alias, torch.ops.aten._unsafe_view,
            torch.ops.aten.empty, torch.ops.aten.empty_like, torch.ops.aten.empty_strided,
            torch.ops.aten.new_empty)

    def __init__(self):
        super().__init__()
        self.counts = collections.Counter()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        """Call the operator and count it."""
        if not function.is_view and function.namespace == "aten" \
                and function.overloadpacket not in self.FREE:
            self.counts[str(function)] += 1
        return function(*arguments, **(options or {}))


def thin(model: torch.nn.Module) -> None:
    """Divide the width of all layers but the outputs of the head by THINNED, in place."""
    def narrow(count):
        return math.ceil(count / THINNED)

    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            output = module.out_channels if module in model.head.children() else \
                narrow(module.out_channels)
            source = 3 if module.in_channels == 3 else narrow(module.in_channels)
            groups = 1 if module.groups == 1 else narrow(module.groups)
            weight = torch.zeros(output, source // groups, *module.kernel_size)
            module.weight = torch.nn.Parameter(torch.nn.init.kaiming_normal_(weight))
            module.in_channels, module.out_channels, module.groups = source, output, groups
        elif isinstance(module, torch.nn.BatchNorm2d):
            module.num_features = narrow(module.num_features)
            module.running_mean = module.running_mean[:module.num_features].clone()
            module.running_var = module.running_var[:module.num_features].clone()
            module.weight = torch.nn.Parameter(module.weight[:module.num_features].clone())
        elif isinstance(module, torch.nn.PReLU):
            module.weight = torch.nn.Parameter(module.weight[:narrow(len(module.weight))].clone())
        # Biases of convolutions and of batch norms.
        if getattr(module, "bias", None) is not None and len(module.bias) != len(module.weight):
            module.bias = torch.nn.Parameter(module.bias[:len(module.weight)].clone())


def make_trainer(faces: pathlib.Path, backbone: str, thinned: bool = False,
                 **settings: object) -> tuple[Trainer, object]:
    """Build a Trainer whose steps are those of a GPU, and an endless iterator over one batch."""
    args = load_args({"data_dir": str(faces), "backbone": backbone, "batch_size": 2,
                      "effective_batch": 2, "input_size": 32 if thinned else 64, "workers": 0,
                      "cache": "none", "device": "cpu", "precision": "fp32", "save_minutes": 1e6,
                      "pretrained": "none", "stride": 32, **settings})
    build, fused = setup._build_model, optim.make_optimizer

    def narrowed(*arguments, **options):
        model = build(*arguments, **options)
        if thinned:
            thin(model)
        return model.to(memory_format=torch.channels_last)

    def on_device(model, args):
        groups = [{key: value for key, value in group.items() if key in ("params", "weight_decay")}
                  for group in fused(model, args).param_groups]
        return torch.optim.AdamW(groups, args.lr, fused=True)

    with unittest.mock.patch.object(setup, "_build_model", narrowed), \
            unittest.mock.patch.object(optim, "make_optimizer", on_device), \
            contextlib.redirect_stdout(io.StringIO()):
        state = setup.build_state(stages.plan(args)[0], faces, Ranks(), lambda text: None)
    trainer = Trainer(args, faces, Ranks(), argparse.Namespace(requested=False), state)
    state.model.train()
    return trainer, itertools.repeat(next(iter(state.loader)))


def count_step(faces: pathlib.Path, backbone: str, **settings: object) -> collections.Counter:
    """Count the operations of a step after the first ones, by operator."""
    trainer, batches = make_trainer(faces, backbone, **settings)
    for number in range(2):
        trainer.train_step(batches, number)
    with OperationCounter() as counter:
        trainer.train_step(batches, 2)
    return counter.counts


def time_step(faces: pathlib.Path, backbone: str) -> float:
    """Measure the median processor time of a step of an epoch in ms."""
    trainer, batches = make_trainer(faces, backbone, thinned=True)
    # An epoch of that many steps, as the trainer runs it.
    trainer.state.loader, trainer.state.sampler.steps = batches, WARM + TIMED
    starts, step = [], trainer.train_step

    def timed(*arguments):
        starts.append(time.process_time())
        return step(*arguments)

    def flush(*_):
        trainer.state.pending.clear()
        return 0, False, False, 1

    with unittest.mock.patch.object(trainer, "train_step", timed), \
            unittest.mock.patch.object(trainer, "flush_metrics", flush):
        trainer.train_one_epoch(0)
    return 1000 * statistics.median(b - a for a, b in itertools.pairwise(starts[WARM:]))


def draw_faces(folder: pathlib.Path) -> pathlib.Path:
    """Prepare a small set of drawn faces; return its folder."""
    with unittest.mock.patch.object(drawn, "COUNTS", {"train": 8, "test": 2}), \
            contextlib.redirect_stdout(io.StringIO()):
        DataGenerator("samples", 64, folder, layout="samples", workers=1).run()
    return folder


def run(argv: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m tools.benchmark.launches", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", nargs="+", default=BACKBONES, metavar="NAME")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        faces = draw_faces(pathlib.Path(folder) / "faces")
        for backbone in options.backbone:
            counts = [sum(count_step(faces, backbone, precision=precision).values())
                      for precision in ("fp32", "bf16")]
            rows.append([backbone, *counts, f"{time_step(faces, backbone):.1f}"])
    print("\n".join(table(["backbone", "operations, fp32", "operations, bf16", "host ms"], rows)))
    print(f"Load of the machine: {os.getloadavg()[0]:.1f}.")


if __name__ == "__main__":
    run()
