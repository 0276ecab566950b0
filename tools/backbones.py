"""Which timm models train, export and give the same in ONNX Runtime: python -m tools.backbones.

One model of each of ten families and more, each one epoch of a few steps on drawn faces, a file of
weights, an ONNX file and the largest difference of a coordinate between the two in pixels. A line a
model; the exit code is 1 if one fails. NAME ... tries others. About five minutes on two cores.
"""
import argparse
import pathlib
import sys
import tempfile
import time

import numpy
import onnxruntime
import torch

from nets.model import parameters
from utils import checkpoint
from utils.args import load_args
from utils.data.dataset import FaceDataset, PreparedSet
from utils.data.sets import set_folder
from utils.deploy.export import export
from utils.errors import UserError
from utils.training.engine import make_optimizer
from utils.training.loss import build_loss

# A model of each family, and its input size where it takes one alone.
FAMILIES = {
    "resnet18": 64, "mobilenetv3_small_100": 64, "tf_efficientnet_lite0": 64, "regnetx_008": 64,
    "mobileone_s0": 64, "hrnet_w18_small": 64, "convnext_atto": 64, "ghostnet_100": 64,
    "densenet121": 64, "repvgg_a0": 64, "mobilevit_xs": 64, "poolformer_s12": 64,
    "swin_tiny_patch4_window7_224": 224, "levit_128": 224}
STEPS, FACES, STRIDE = 3, 4, 16
TOLERANCE = 0.01


def attempt(name, size, prepared, folder):
    """Train, save, load, export and compare one model; (parameters, largest difference in px)."""
    args = load_args({"backbone": name, "input_size": size, "stride": STRIDE, "device": "cpu"})
    torch.manual_seed(0)
    model = checkpoint.build_model(args, prepared.scheme)
    samples = FaceDataset(prepared.lists["train"], prepared.margin, size)
    images, landmarks, *_ = map(list, zip(*(samples[i] for i in range(FACES))))
    images, landmarks = torch.stack(images).permute(0, 3, 1, 2), torch.stack(landmarks)
    step(model, args, images, landmarks)
    path = pathlib.Path(folder) / "best.pt"
    checkpoint.save({**checkpoint.describe(args, prepared.scheme, prepared.crop),
                     "weights": model.state_dict()}, path)
    loaded = checkpoint.load_model(path)
    session = onnxruntime.InferenceSession(str(export(loaded, path.with_suffix(".onnx"))),
                                           providers=["CPUExecutionProvider"])
    worst = 0.0
    for count in (1, FACES):
        with torch.inference_mode():
            expected = loaded.predict(images[:count])[0].numpy()
        found, _ = session.run(None, {"images": images[:count].contiguous().numpy()})
        worst = max(worst, size * float(numpy.abs(found - expected).max()))
    return parameters(model), worst


def step(model, args, images, landmarks):
    """A few optimiser steps on one batch. Raises UserError where its loss does not fall."""
    loss = build_loss(model, args.cls, args.reg, args.offset_loss)
    optimizer = make_optimizer(model, args)
    model.to(memory_format=torch.channels_last).train()
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        value = loss(model(images), landmarks)
        value.backward()
        optimizer.step()
        losses.append(float(value.detach()))
    if not losses[-1] < losses[0]:
        raise UserError(f"its loss went from {losses[0]:.3f} to {losses[-1]:.3f}")


def main(argv=None):
    """Try the models; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.backbones", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", default=list(FAMILIES),
                        help="timm's names")
    parser.add_argument("--data-dir", help="a prepared set [drawn faces at 64 px]")
    options = parser.parse_args(argv)
    args = load_args({"data_dir": options.data_dir} if options.data_dir else
                     {"data": "samples", "input_size": 64})
    prepared = PreparedSet(set_folder(args))
    failed = []
    for name in options.names:
        begun, size = time.monotonic(), FAMILIES.get(name, 64)
        with tempfile.TemporaryDirectory() as folder:
            try:
                count, worst = attempt(name, size, prepared, folder)
                text = f"{count / 1e6:.2f} M parameters, ONNX differs by {worst:.5f} px at most"
                failed += [name] if worst > TOLERANCE else []
            except Exception as error:  # The others are still worth knowing.
                text = f"FAILED: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
                failed.append(name)
        print(f"{name}, {size} px, stride {STRIDE}: {text} ({time.monotonic() - begun:.0f} s)",
              flush=True)
    print(f"{len(options.names) - len(failed)} of {len(options.names)} models train, export and "
          f"give the same in ONNX Runtime" + (f"; not: {', '.join(failed)}" if failed else ""))
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
