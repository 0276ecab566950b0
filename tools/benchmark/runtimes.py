"""Measure the NME and the speed of an exported model in every installed inference runtime.

    python -m tools.benchmark.runtimes weights/fast.raw.onnx --data-dir 300W

The .raw.onnx file returns maps, which examples/decode_maps.py decodes. It runs in ONNX Runtime and
OpenCV, and in OpenVINO and ncnn where they are installed (pip install openvino ncnn pnnx, in a
separate environment). The .int8.onnx file in the same folder, which returns landmarks, is measured
too if it exists. Differences are from the .onnx file in ONNX Runtime. Takes minutes.
"""
import argparse
import functools
import importlib.util
import json
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy

from examples import decode_maps
from tools.benchmark.common import say, table
from utils.args import load_args
from utils.data import dataset
from utils.data.sets import set_folder
from utils.errors import run as guarded
from utils.evaluation import predict
from utils.landmarks import crop
from utils.predictor import Predictor


def opencv(path):
    """Return a runner of OpenCV DNN: (1, 3, S, S) float32 to the list of maps."""
    import cv2
    cv2.setNumThreads(1)
    net = cv2.dnn.readNetFromONNX(str(path))
    names = net.getUnconnectedOutLayersNames()

    def run(images):
        net.setInput(images)
        return in_order(dict(zip(names, net.forward(names))))

    return run


def openvino(path, precision):
    """Return a runner of OpenVINO, one thread; precision is "bf16" or "f32"."""
    import openvino
    model = openvino.Core().compile_model(str(path), "CPU", {
        "INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": 1})
    return lambda images: in_order({port.any_name: value
                                    for port, value in model(images).items()})


def ncnn(path, folder, half):
    """Return a runner of ncnn, one thread, converted by pnnx; half allows fp16, ncnn's default."""
    import ncnn
    shape = "[1,3,{0},{0}]f32".format(_about(path)["input_size"])
    copy = pathlib.Path(folder, "net.onnx")
    copy.write_bytes(path.read_bytes())
    # The package installs its program next to the Python interpreter.
    subprocess.run([pathlib.Path(sys.executable).with_name("pnnx"), copy, f"inputshape={shape}",
                    f"fp16={int(half)}"], check=True, stdout=sys.stderr, cwd=folder)
    net = ncnn.Net()
    net.opt.num_threads = 1
    if not half:
        net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = False
        net.opt.use_bf16_storage = False
    net.load_param(f"{folder}/net.ncnn.param")
    net.load_model(f"{folder}/net.ncnn.bin")
    names = [f"out{i}" for i in range(len(net.output_names()))]

    def run(images):
        with net.create_extractor() as extractor:
            extractor.input("in0", ncnn.Mat(images[0]).clone())
            return [numpy.array(extractor.extract(name)[1]) for name in names]

    return run


def onnxruntime(path):
    """Return a runner of ONNX Runtime, one thread."""
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
    return lambda images: session.run(None, {"images": images})


def in_order(maps):
    """Return the maps in the order of decode_maps.decode, or only the landmarks if there are some.

    Args:
        maps: {output name: array}.
    """
    return [maps[name] for name in ("landmarks", "score", "offset_x", "offset_y", "neighbour_x",
                                    "neighbour_y") if name in maps]


def _about(path):
    return json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))


def landmarks_runner(make):
    """Return a function (1, 3, S, S) uint8 to landmarks (K, 2) for a file that returns those."""
    run = make()
    return lambda images: run(images)[0][0]


def maps_runner(make, about):
    """Return a function (1, 3, S, S) uint8 to landmarks (K, 2) for a file that returns maps."""
    run = make()
    return lambda images: decode_maps.decode(run(images.astype(numpy.float32)), about)[0]


def runtimes(path, folder):
    """Return {runtime: function that makes a landmark function} of the installed runtimes."""
    installed = {name: importlib.util.find_spec(name) for name in ("openvino", "ncnn", "pnnx")}
    found = {"ONNX Runtime": functools.partial(onnxruntime, path),
             "OpenCV DNN": functools.partial(opencv, path)}
    if installed["openvino"]:
        found |= {f"OpenVINO, {p}": functools.partial(openvino, path, p) for p in ("f32", "bf16")}
    if installed["ncnn"] and installed["pnnx"]:
        found |= {"ncnn, fp32": functools.partial(ncnn, path, folder, False),
                  "ncnn, default": functools.partial(ncnn, path, folder, True)}
    found = {name: functools.partial(maps_runner, make, _about(path))
             for name, make in found.items()}
    int8 = path.with_name(path.name.replace(".raw.", ".int8."))
    if int8.is_file():
        found["ONNX Runtime, int8"] = functools.partial(
            landmarks_runner, functools.partial(onnxruntime, int8))
        if installed["openvino"]:
            found["OpenVINO, int8"] = functools.partial(
                landmarks_runner, functools.partial(openvino, int8, "f32"))
    return found


def main():
    """Parse the command line, score the first test list in each runtime, print a table."""
    parser = argparse.ArgumentParser(prog="python -m tools.benchmark.runtimes", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=pathlib.Path,
                        help="a .raw.onnx file; its .json and .onnx in the same folder")
    parser.add_argument("--data-dir", required=True, help="a prepared set")
    options = parser.parse_args()
    prepared = dataset.PreparedSet(set_folder(load_args({"data_dir": options.data_dir})))
    faces = next(iter(prepared.test_lists.values()))
    onnx_file = options.weights.with_name(options.weights.name.replace(".raw.", "."))
    reference = Predictor(onnx_file, threads=1)
    crops = dataset.FaceDataset(faces, prepared.margin, reference.input_size)
    images = [numpy.ascontiguousarray(crops[i][0].numpy().transpose(2, 0, 1)[None])
              for i in range(len(faces))]
    expected = numpy.concatenate([reference(image.transpose(0, 2, 3, 1))[0] for image in images])
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, make in runtimes(options.weights, folder).items():
            say(name)
            run = make()
            run(images[0])
            start, found = time.process_time(), []
            for image in images:
                found.append(run(image))
            seconds = (time.process_time() - start) / len(images)
            found = numpy.stack(found)
            nme, _ = predict.list_nme(found, faces, reference.scheme, prepared.scheme)
            difference = numpy.abs(crop.to_photo(found, faces.boxes)
                                   - crop.to_photo(expected, faces.boxes))
            rows.append([name, f"{100 * nme.mean():.3f}", f"{difference.mean():.4f}",
                         f"{difference.max():.3f}", f"{1000 * seconds:.0f}"])
    print("\n".join(table(["runtime", f"NME % of {len(faces)} faces", "mean difference, px",
                           "largest difference, px", "ms a face, one thread"], rows)))


if __name__ == "__main__":
    guarded(main)
