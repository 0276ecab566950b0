"""Check that timm backbones train, export to ONNX and predict the same in ONNX Runtime.

    python -m tools.backbones [NAME ...]

Each model takes a few optimiser steps on drawn faces and is saved, loaded and exported. One line a
model has its parameters and the largest coordinate difference between PyTorch and ONNX Runtime in
pixels. The exit code is 1 if a model fails. Without NAME one model of each of 14 families is
checked, in about five minutes on two cores.
"""
import argparse
import pathlib
import sys
import tempfile
import time

import numpy
import onnxruntime
import torch

from nets.model import count_parameters
from utils import checkpoint
from utils.args import load_args
from utils.data.dataset import FaceDataset, PreparedSet
from utils.data.sets import set_folder
from utils.deploy.export import export_onnx
from utils.errors import UserError
from utils.training.loss import build_loss
from utils.training.optim import make_optimizer

# {model: input size}; 224 where the model accepts no other size.
FAMILIES = {
    "resnet18": 64, "mobilenetv3_small_100": 64, "tf_efficientnet_lite0": 64, "regnetx_008": 64,
    "mobileone_s0": 64, "hrnet_w18_small": 64, "convnext_atto": 64, "ghostnet_100": 64,
    "densenet121": 64, "repvgg_a0": 64, "mobilevit_xs": 64, "poolformer_s12": 64,
    "swin_tiny_patch4_window7_224": 224, "levit_128": 224}
STEPS, FACES, STRIDE = 3, 4, 16
TOLERANCE = 0.01


def attempt(name, size, prepared, folder):
    """Train, save, load, export and compare one model.

    Args:
        name: timm's name of the backbone.
        size: input size in pixels.
        prepared: a PreparedSet.
        folder: where to write the checkpoint and the ONNX file.

    Returns:
        The number of parameters, and the largest coordinate difference in pixels.
    """
    args = load_args({"backbone": name, "input_size": size, "stride": STRIDE, "device": "cpu"})
    torch.manual_seed(0)
    model = checkpoint.build_model(args, prepared.scheme)
    samples = FaceDataset(prepared.lists["train"], prepared.margin, size)
    images, landmarks, *_ = map(list, zip(*(samples[i] for i in range(FACES))))
    images, landmarks = torch.stack(images).permute(0, 3, 1, 2), torch.stack(landmarks)
    train_steps(model, args, images, landmarks)
    path = pathlib.Path(folder) / "best.pt"
    checkpoint.save({**checkpoint.describe(args, prepared.scheme, prepared.crop),
                     "weights": model.state_dict()}, path)
    loaded = checkpoint.load_model(path)
    session = onnxruntime.InferenceSession(str(export_onnx(loaded, path.with_suffix(".onnx"))),
                                           providers=["CPUExecutionProvider"])
    largest = 0.0
    for count in (1, FACES):
        with torch.inference_mode():
            expected = loaded.predict(images[:count])[0].numpy()
        found, _ = session.run(None, {"images": images[:count].contiguous().numpy()})
        largest = max(largest, size * float(numpy.abs(found - expected).max()))
    return count_parameters(model), largest


def train_steps(model, args, images, landmarks):
    """Take STEPS optimiser steps on one batch; raise UserError if the loss does not fall."""
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
        raise UserError(f"the loss went from {losses[0]:.3f} to {losses[-1]:.3f}")


def main(argv=None):
    """Check the models of the command line; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.backbones", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", default=list(FAMILIES),
                        help="timm's names of the models [one of each family]")
    parser.add_argument("--data-dir", help="a prepared set [drawn faces at 64 px]")
    options = parser.parse_args(argv)
    args = load_args({"data_dir": options.data_dir} if options.data_dir else
                     {"data_dir": "samples", "input_size": 64})
    prepared = PreparedSet(set_folder(args))
    failed = []
    for name in options.names:
        start, size = time.monotonic(), FAMILIES.get(name, 64)
        with tempfile.TemporaryDirectory() as folder:
            try:
                count, largest = attempt(name, size, prepared, folder)
                text = f"{count / 1e6:.2f} M parameters, ONNX differs by {largest:.5f} px at most"
                failed += [name] if largest > TOLERANCE else []
            except Exception as error:  # One failure must not hide the other models.
                text = f"FAILED: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
                failed.append(name)
        print(f"{name}, {size} px, stride {STRIDE}: {text} ({time.monotonic() - start:.0f} s)",
              flush=True)
    print(f"{len(options.names) - len(failed)} of {len(options.names)} models train, export and "
          f"give the same in ONNX Runtime" + (f"; not: {', '.join(failed)}" if failed else ""))
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
