"""What the parts share: turns, tables, and models to time."""
import argparse
import datetime
import importlib.metadata
import os
import pathlib
import platform
import random
import re
import sys
import time

import numpy
import torch

from nets.backbone import reparameterise
from nets.model import LandmarkNet
from utils.args import load_args
from utils.data import dataset


def say(*words):
    """Progress, on stderr: the table alone goes to stdout."""
    print(*words, file=sys.stderr, flush=True)


def model_parser(prog, description, what, metavar="FILE"):
    """A command line with --weights, of models of which the help says what is done, and --detector.

    prog: the module. description: its docstring.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {prog}", description=description,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", nargs="+", default=["weights/tiny.int8.onnx"],
                        metavar=metavar, help=f"models {what} [tiny.int8.onnx]")
    parser.add_argument("--detector", default="haar", metavar="haar|PATH.onnx",
                        help="as of demo.py [haar]")
    return parser


def facts(prepared):
    """The machine, the versions and the faces, as Markdown lines."""
    info = pathlib.Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8") if info.is_file() else ""
    name = re.search(r"model name\s*: (.*)", text)
    flags = set((re.search(r"flags\s*: (.*)", text) or [0, ""])[1].split())
    wanted = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "avx_vnni", "amx_int8", "amx_bf16")
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in (
        "torch", "torchvision", "timm", "opencv-python", "pillow", "numpy"))
    try:
        runtime = importlib.metadata.version("onnxruntime-gpu")
    except importlib.metadata.PackageNotFoundError:
        runtime = importlib.metadata.version("onnxruntime")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return [f"# Benchmark, {datetime.date.today()}", "",
            f"* Processor: {name[1] if name else platform.processor()}, "
            f"{len(os.sched_getaffinity(0))} cores used; "
            f"{' '.join(flag for flag in wanted if flag in flags)}",
            f"* GPU: {gpu}", f"* Python {platform.python_version()}, {versions}, ONNX Runtime "
            f"{runtime}; PyTorch with {torch.get_num_threads()} threads where nothing else is said",
            f"* Faces: {'drawn' if prepared.drawn else prepared.folder.name}, "
            f"{len(prepared.lists['train'])} for training; load of the machine at the start "
            f"{os.getloadavg()[0]:.1f}"]


def measure(ways, rounds, clock=time.perf_counter, warm=1):
    """Name to seconds (rounds,) of each of the ways (name to function), in turns, shuffled."""
    order, found = list(ways), {name: [] for name in ways}
    shuffler = random.Random(0)
    for number in range(rounds + warm):
        shuffler.shuffle(order)
        for name in order:
            begun = clock()
            ways[name]()
            if number >= warm:
                found[name].append(clock() - begun)
    return {name: numpy.array(values) for name, values in found.items()}


def face_mesh():
    """MediaPipe's face mesh for the largest face of a video; None, and a line on stderr, where it
    is not installed.
    """
    try:
        from mediapipe import solutions
    except ImportError:
        say("MediaPipe is left out: pip install 'mediapipe<0.10.30', in an environment of its own")
        return None
    return solutions.face_mesh.FaceMesh(static_image_mode=False, max_num_faces=1)


def table(head, rows):
    """Lines of a Markdown table; head and rows are lists of cells."""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (head, ["---"] * len(head), *rows)]
    return [*lines, ""]


def ms(seconds, share=50):
    """A percentile of seconds as text in milliseconds."""
    value = 1000 * numpy.percentile(seconds, share)
    return f"{value:.2f}" if value < 100 else f"{value:.0f}"


def build(backbone, scheme, size, faces, prepared, activation="prelu"):
    """An untrained model as checkpoint.load_model gives it, its batch norms moved off their start.

    timm starts the last norm of a block at zero, which would make int8 and folding look too easy.
    """
    torch.manual_seed(0)
    model = LandmarkNet(scheme, backbone, activation=activation)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1)
            torch.nn.init.normal_(module.bias, std=0.1)
            module.momentum = 0.5
        if isinstance(module, torch.nn.PReLU):
            torch.nn.init.uniform_(module.weight, 0.05, 0.5)
    found = dataset.FaceDataset(faces, prepared.margin, size)
    images = torch.stack([found[i][0] for i in range(4)]).permute(0, 3, 1, 2)
    with torch.no_grad():
        for _ in range(4):
            model(images)
    model = reparameterise(model.eval())
    model.args = load_args({"backbone": backbone, "input_size": size})
    model.crop, model.input_size = prepared.crop, size
    return model
