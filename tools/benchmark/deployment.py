"""Deployment: inference with PyTorch, ONNX Runtime fp32 and int8; IRNet's exported graph."""
import contextlib
import copy
import os
import pathlib
import sys
import tempfile
import time
import unittest.mock

import numpy
import torch

from tools.benchmark.common import build, measure, ms, say, table
from utils import checkpoint
from utils.deploy import export, quantize
from utils.evaluation import predict
from utils.predictor import Predictor

# Measured untrained, with random batch norms: see common.build().
BACKBONES = ("resnet18", "mobilenetv2_100", "mobileone_s1", "mobilenetv3_large_100", "irnet18")


def deployment(prepared, options):
    """Measure backbones in eager PyTorch, channels_last and ONNX Runtime, 1 and 2 threads."""
    rows = []
    faces = prepared.lists["train"]
    models = [(name, None) for name in BACKBONES]
    models += [(pathlib.Path(path).parent.name + "/" + pathlib.Path(path).stem, path)
               for path in options.exp]
    for name, path in models:
        say(f"deployment: {name}")
        size = prepared.size or 256
        model = (build(name, size, faces, prepared) if path is None
                 else checkpoint.load_model(path))
        with tempfile.TemporaryDirectory() as folder:
            rows += _deploy(name, path, model, prepared, options, pathlib.Path(folder))
    head = ["model", "input", "variant", "threads", "median ms", "p90 ms", "faces/s, batch 1",
            "faces/s, batch 8", "int8 against fp32", "file MB", "NME %"]
    return ["Models without an NME are untrained, which does not change their speed. The NME of "
            "trained models is in photo pixels, on the first test list.", "", *table(head, rows)]


def _deploy(name, path, model, prepared, options, folder):
    size = model.input_size
    crops = quantize.calibration_crops(prepared, size)
    with contextlib.redirect_stdout(sys.stderr):
        float_file = export.export_onnx(model, folder / "model.onnx")
        int8_file = quantize.quantize(float_file, crops)
    if path is None:
        torch.save(model.state_dict(), folder / "model.pt")
    megabytes = [os.path.getsize(path or folder / "model.pt"), 0, os.path.getsize(float_file),
                 os.path.getsize(int8_file)]
    megabytes[1] = megabytes[0]
    rows, errors = [], {}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        runners = _runners(model, float_file, int8_file, threads)
        one = measure({k: lambda run=run: run(crops[:1]) for k, run in runners.items()},
                      options.rounds, warm=3)
        eight = measure({k: lambda run=run: run(crops[:8]) for k, run in runners.items()},
                        max(3, options.rounds // 4))
        fp32 = numpy.median(one["ONNX Runtime fp32"])
        for (variant, run), size_mb in zip(runners.items(), megabytes):
            if path is not None and threads == 1:
                errors[variant] = _nme(run, model, prepared)
            median = numpy.median(one[variant])
            rows.append([
                name, size, variant, threads, ms(one[variant]), ms(one[variant], 90),
                f"{1 / median:.1f}", f"{8 / numpy.median(eight[variant]):.1f}",
                f"{fp32 / median:.2f}" if variant.endswith("int8") else "",
                f"{size_mb / 1e6:.1f}", f"{errors[variant]:.3f}" if errors else "-"])
    return rows


def _runners(model, float_file, int8_file, threads):
    """Return {variant: function of crops (N, S, S, 3) uint8 that returns landmarks (N, K, 2)}."""
    plain = model.to(memory_format=torch.contiguous_format)
    sessions = {"ONNX Runtime fp32": Predictor(float_file, threads=threads),
                "ONNX Runtime int8": Predictor(int8_file, threads=threads)}

    def eager(images, layout=torch.contiguous_format):
        with torch.inference_mode():
            images = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(memory_format=layout)
            return (plain if layout is torch.contiguous_format else last).predict(images)[0].numpy()

    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    return {"PyTorch eager": eager,
            "PyTorch channels_last": lambda images: eager(images, torch.channels_last),
            **{name: lambda images, run=run: run(images)[0] for name, run in sessions.items()}}


def _nme(run, model, prepared):
    """Return the NME in % on the first test list, in photo pixels."""
    faces = next(iter(prepared.test_lists.values()))
    found = predict.predict_list(lambda images: run(images.permute(0, 2, 3, 1).numpy()), faces,
                                    prepared.margin, model.input_size)
    return 100 * predict.list_nme(found, faces, model.scheme, prepared.scheme)[0].mean()


def irnet(prepared, options):
    """Measure IRNet18 with and without PRelu nodes, and ResNet18, in ONNX Runtime."""
    size, faces = prepared.size or 256, prepared.lists["train"]
    crops = quantize.calibration_crops(prepared, size)[:1]
    rows = []
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        files = {}
        net = build("irnet18", size, faces, prepared)
        with unittest.mock.patch.object(export, "_SplitPReLU", lambda prelu: prelu):
            files["IRNet18, PRelu nodes"] = export.export_onnx(net, f"{folder}/plain.onnx")
        files["IRNet18, as exported"] = export.export_onnx(net, f"{folder}/split.onnx")
        for label, name in (("IRNet18, relu", "irnet18"), ("ResNet18", "resnet18")):
            other = build(name, size, faces, prepared, "relu")
            files[label] = export.export_onnx(other, f"{folder}/{label}.onnx")
        runs = {name: Predictor(file, threads=1) for name, file in files.items()}
        found = measure({k: lambda run=run: run(crops) for k, run in runs.items()},
                        options.rounds, time.process_time)
        outputs = {name: run(crops) for name, run in runs.items()}
    base = numpy.median(found["ResNet18"])
    for name, seconds in found.items():
        same_weights = "IRNet18, " in name and "relu" not in name
        difference = max(float(numpy.abs(a - b).max()) for a, b in zip(
            outputs[name], outputs["IRNet18, PRelu nodes"])) if same_weights else None
        rows.append([name, ms(seconds), f"{numpy.median(seconds) / base:.2f}",
                     "-" if difference is None else f"{difference:.0e}"])
    return ["One thread, batch 1, processor time. IRNet18 has 1.44 times the multiply-adds of "
            "ResNet18.", "",
            *table(["graph", "median ms", "against ResNet18", "largest difference"], rows)]
