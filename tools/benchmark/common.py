"""Helpers of the benchmarks: interleaved timing, Markdown tables and untrained models."""
import argparse
import contextlib
import datetime
import importlib.metadata
import os
import pathlib
import platform
import random
import re
import sys
import tempfile
import time

import numpy
import torch

from utils import checkpoint
from utils.args import load_args
from utils.data import dataset

# Packages that install OpenCV, of which a machine has one.
OPENCV = ("opencv-python", "opencv-python-headless", "opencv-contrib-python",
          "opencv-contrib-python-headless")


def say(*words):
    """Print progress to stderr; stdout has only the tables."""
    print(*words, file=sys.stderr, flush=True)


def model_parser(prog, description, purpose, metavar="FILE"):
    """Return an argument parser with --weights and --detector.

    Args:
        prog: name of the module.
        description: docstring of the module.
        purpose: follows "models" in the help of --weights.
        metavar: of --weights.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {prog}", description=description,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", nargs="+", default=["weights/tiny.int8.onnx"],
                        metavar=metavar, help=f"models {purpose} [tiny.int8.onnx]")
    parser.add_argument("--detector", default="haar", metavar="haar|PATH.onnx",
                        help="face detector, as of demo.py [haar]")
    return parser


def version(*names):
    """Return name and version of the first of these packages that is installed."""
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return f"{name} {importlib.metadata.version(name)}"
    return f"no {names[0]}"


def facts(prepared):
    """Describe the machine, the package versions and the prepared set in Markdown lines."""
    info = pathlib.Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8") if info.is_file() else ""
    name = re.search(r"model name\s*: (.*)", text)
    flags = set((re.search(r"flags\s*: (.*)", text) or [0, ""])[1].split())
    listed = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "avx_vnni", "amx_int8", "amx_bf16")
    versions = ", ".join(version(*names) for names in (
        ("torch",), ("torchvision",), ("timm",), OPENCV, ("pillow",), ("numpy",)))
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return [f"# Benchmark, {datetime.date.today()}", "",
            f"* Processor: {name[1] if name else platform.processor()}, "
            f"{len(os.sched_getaffinity(0))} cores used; "
            f"{' '.join(flag for flag in listed if flag in flags)}",
            f"* GPU: {gpu}", f"* Python {platform.python_version()}, {versions}, "
            f"{version('onnxruntime-gpu', 'onnxruntime')}; PyTorch with "
            f"{torch.get_num_threads()} threads unless stated otherwise",
            f"* Faces: {'drawn' if prepared.drawn else prepared.folder.name}, "
            f"{len(prepared.lists['train'])} training faces; system load at the start "
            f"{os.getloadavg()[0]:.1f}"]


def measure(functions, rounds, clock=time.perf_counter, warm=1):
    """Time functions alternately, in a new random order each round.

    Args:
        functions: {name: function without arguments}.
        rounds: number of measured calls of each function.
        clock: returns the time in seconds.
        warm: number of calls before the measured ones.

    Returns:
        {name: seconds (rounds,)}.
    """
    order, found = list(functions), {name: [] for name in functions}
    shuffler = random.Random(0)
    for number in range(rounds + warm):
        shuffler.shuffle(order)
        for name in order:
            start = clock()
            functions[name]()
            if number >= warm:
                found[name].append(clock() - start)
    return {name: numpy.array(values) for name, values in found.items()}


def face_mesh():
    """Return MediaPipe's face mesh in video mode for one face, or None if it is not installed."""
    try:
        from mediapipe import solutions
    except ImportError:
        say("MediaPipe is left out: not installed (pip install 'mediapipe<0.10.30' in a separate "
            "environment)")
        return None
    return solutions.face_mesh.FaceMesh(static_image_mode=False, max_num_faces=1)


def table(head, rows):
    """Return the lines of a Markdown table; head and rows are lists of cells."""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (head, ["---"] * len(head), *rows)]
    return [*lines, ""]


def ms(seconds, percentile=50):
    """Return a percentile of an array of seconds as text in milliseconds."""
    value = 1000 * numpy.percentile(seconds, percentile)
    return f"{value:.2f}" if value < 100 else f"{value:.0f}"


def build(backbone, size, faces, prepared, activation="prelu"):
    """Return an untrained model with random batch norms, as checkpoint.load_model returns it.

    timm initialises the last batch norm of a residual block to zero. Quantization and folding
    would have nothing to do in such a block.

    Args:
        backbone: name of the backbone.
        size: input size in pixels.
        faces: FaceList whose first crops set the running statistics.
        prepared: the PreparedSet of these faces.
        activation: of IRNet, "prelu" or "relu".
    """
    torch.manual_seed(0)
    args = load_args({"backbone": backbone, "input_size": size, "activation": activation})
    model = checkpoint.build_model(args, prepared.scheme)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1)
            torch.nn.init.normal_(module.bias, std=0.1)
            module.momentum = 0.5
        if isinstance(module, torch.nn.PReLU):
            torch.nn.init.uniform_(module.weight, 0.05, 0.5)
    crops = dataset.FaceDataset(faces, prepared.margin, size)
    images = torch.stack([crops[i][0] for i in range(4)]).permute(0, 3, 1, 2)
    with torch.no_grad():
        for _ in range(4):
            model(images)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "best.pt"
        checkpoint.save({**checkpoint.describe(args, prepared.scheme, prepared.crop),
                         "weights": model.state_dict()}, path)
        return checkpoint.load_model(path)
