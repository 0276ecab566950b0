"""Quantize an exported ONNX file to int8, for ONNX Runtime on CPUs.

Post-training quantization with QuantizeLinear/DequantizeLinear nodes, calibrated on crops of the
training list. Only the backbone's convolutions become int8; input, outputs and metadata stay those
of the float file, so that the two are interchangeable.
"""
from __future__ import annotations

import argparse
import copy
import logging
import pathlib

import numpy

from utils import packing
from utils.data.dataset import FaceDataset, PreparedSet
from utils.data.sets import set_folder
from utils.deploy import export
from utils.errors import UserError
from utils.files import atomic_write
from utils.landmarks import schemes
from utils.predictor import Predictor

# Operators that ONNX Runtime runs in int8 between convolutions without converting to float.
OPERATORS = ("Conv", "Relu", "Clip", "Add", "MaxPool")
CALIBRATION_CROPS = 64


def quantize(path: pathlib.Path | str, images: numpy.ndarray,
             output: pathlib.Path | str | None = None) -> pathlib.Path:
    """Write the int8 variant of an exported ONNX file.

    Weights are int8 per output channel, activations uint8 per tensor. Normalisation, the first
    layer, squeeze-and-excitation, heads and decoding stay float, as does what follows the last
    convolution. The range of an activation is that of all crops, or the mean of their ranges,
    whichever keeps the landmarks of the crops nearer to the float model's. A few wide crops make
    the steps of `tiny` so large that it has 3.006 instead of 2.981 % on the validation list, while
    a ResNet18 is better with the range of all.

    Args:
        path: of the .onnx, of export.export_onnx.
        images: crops (N, S, S, 3), uint8 RGB, to calibrate the activations with.
        output: path to write; None: NAME.int8.onnx beside the .onnx.

    Returns:
        The path that was written.

    Raises:
        UserError: where the file is not of this repository or there are no crops.
    """
    import onnx

    path = pathlib.Path(path)
    output = pathlib.Path(output or path.with_suffix(".int8.onnx"))
    model = onnx.load(path)
    if not any(p.key == "input_size" for p in model.metadata_props):
        raise UserError(f"{path}: an ONNX model, but not of this repository")
    if not len(images):
        raise UserError(f"{path}: there are no training crops to calibrate its int8 variant with")
    metadata = {p.key: p.value for p in model.metadata_props}
    # Folds packed kernels into constants, which the quantizer expects.
    model = onnx.shape_inference.infer_shapes(export.simplify(model))
    expected, candidates = _landmarks(model, images), []
    with atomic_write(output) as temporary:
        for mean_range in (False, True):
            _quantize(model, images, temporary, mean_range)
            result = onnx.load(temporary)
            difference = float(numpy.abs(_landmarks(result, images) - expected).mean())
            candidates.append((difference, result))
        result = min(candidates, key=lambda pair: pair[0])[1]
        onnx.helper.set_model_props(result, metadata)
        export.pack_constants(result.graph, {})
        onnx.save(packing.lower_ir_version(result), temporary)
    return output


def _landmarks(model, images):
    import onnxruntime
    session = onnxruntime.InferenceSession(model.SerializeToString(),
                                           providers=["CPUExecutionProvider"])
    return session.run(["landmarks"], {"images": images.transpose(0, 3, 1, 2)})[0]


def _quantize(model, images, target, mean_range):
    """Write an ONNX model as int8; mean_range: average the images' ranges of activations."""
    from onnxruntime import quantization
    batches = ({"images": image.transpose(2, 0, 1)[None]} for image in images)

    class Crops(quantization.CalibrationDataReader):
        """Gives the crops to ONNX Runtime one by one."""

        def get_next(self):
            """Return a dict of inputs, or None at the end."""
            return next(batches, None)

    # The quantizer advises preprocessing on the root logger; simplify() has done it.
    logging.disable(logging.WARNING)
    try:
        quantization.quantize_static(
            # A copy, because the quantizer changes its input.
            copy.deepcopy(model), target, Crops(), quant_format=quantization.QuantFormat.QDQ,
            per_channel=True, activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            # Seven bits, because CPUs without VNNI add two products in 16 bits, which overflow
            # with eight.
            reduce_range=True, nodes_to_quantize=_int8_nodes(model), op_types_to_quantize=OPERATORS,
            extra_options={"CalibMovingAverage": mean_range,
                           "TensorQuantOverrides": _eight_bit_depthwise(model, quantization)})
    finally:
        logging.disable(logging.NOTSET)


def export_int8(path: pathlib.Path, args: argparse.Namespace) -> pathlib.Path:
    """Write the .int8.onnx beside an .onnx, calibrated on the training list.

    Args:
        path: of the .onnx.
        args: resolved settings; `data_dir` names the set.

    Returns:
        The path that was written.

    Raises:
        UserError: where the set has no training list or does not fit the model.
    """
    prepared, model = PreparedSet(set_folder(args)), Predictor(path)
    schemes.check_scheme(model.scheme, prepared.scheme, str(path))
    prepared.warn_crop(model.crop)
    print(f"exporting {path.with_suffix('.int8.onnx')}")
    return quantize(path, calibration_crops(prepared, model.input_size))


def calibration_crops(prepared: PreparedSet, size: int) -> numpy.ndarray:
    """Return up to CALIBRATION_CROPS nominal crops, spread evenly over the training list.

    Args:
        prepared: the set.
        size: side of the crops in pixels.

    Returns:
        Crops (n, size, size, 3), uint8 RGB.

    Raises:
        UserError: where the set has no training list.
    """
    faces = prepared.lists.get("train")
    if faces is None:
        raise UserError(f"{prepared.folder}: has no train.txt to calibrate an int8 model with; "
                        f"give --data-dir or --data-dir samples")
    dataset = FaceDataset(faces, prepared.margin, size)
    chosen = numpy.unique(numpy.linspace(0, len(faces) - 1, CALIBRATION_CROPS).round().astype(int))
    return numpy.stack([dataset[int(index)][0].numpy() for index in chosen])


def _eight_bit_depthwise(model, quantization):
    """Return overrides for ONNX Runtime that quantize depthwise kernels to all eight bits.

    Their products are added in 32 bits on any CPU. With seven bits, the landmarks of `accurate`
    move by a third more.
    """
    channels = {tensor.name: tensor.dims[0] for tensor in model.graph.initializer if tensor.dims}
    eight = {"quant_type": quantization.QuantType.QInt8, "reduce_range": False}
    return {node.input[1]: [{**eight, "axis": 0}] + [eight] * (channels[node.input[1]] - 1)
            for node in model.graph.node if _is_depthwise(node) and node.input[1] in channels}


def _is_depthwise(node):
    return node.op_type == "Conv" and any(a.name == "group" and a.i > 1 for a in node.attribute)


def _int8_nodes(model):
    """Return the names of the nodes that become int8: the backbone, up to its last convolution.

    The first convolution and a depthwise one behind it stay float. Their few channels have a wide
    range: in int8 they would move landmarks as far as all others together and save no time.
    """
    shapes = {v.name: v.type.tensor_type.shape.dim for v in model.graph.value_info}
    nodes = list(model.graph.node)
    convolutions = [i for i, n in enumerate(nodes) if n.op_type == "Conv"
                    and not any(name.startswith("model.head.") for name in n.input)]
    first = next(i for i in convolutions[1:] if not _is_depthwise(nodes[i]))
    chosen = []
    for node in nodes[first:convolutions[-1] + 1]:
        shape = shapes.get(node.output[0], ())
        # Squeeze-and-excitation works on pooled vectors: int8 saves little time and costs accuracy.
        pooled = len(shape) == 4 and shape[2].dim_value == shape[3].dim_value == 1
        if node.op_type in OPERATORS and not pooled:
            chosen.append(node.name)
    return chosen
