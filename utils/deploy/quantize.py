"""Int8 ONNX models: QDQ, calibrated on training crops, fast in ONNX Runtime on CPUs."""
import copy
import logging
import pathlib

import numpy

from utils.data.dataset import FaceDataset, PreparedSet
from utils.data.sets import set_folder
from utils.deploy import export
from utils.errors import UserError
from utils.files import atomic_write
from utils.landmarks import schemes
from utils.predictor import Predictor

# What ONNX Runtime runs in int8 between convolutions without going back to float.
OPERATORS = ("Conv", "Relu", "Clip", "Add", "MaxPool")
CROPS = 64


def quantize(path, images, output=None):
    """Write the int8 variant of an ONNX file of export.export beside it; returns its path.

    images (N, S, S, 3) uint8 RGB: crops that show the range of activations. Weights are int8 per
    output channel, activations uint8 per tensor. Normalisation, the first layer,
    squeeze-and-excitation, heads and decoding stay float, as does what follows the last
    convolution. A range is that of all crops, or the mean of theirs, whichever leaves the landmarks
    of the crops nearer to the float model's: a few wide crops make the steps of `tiny` so large
    that it has 3.006 instead of 2.981 % on the validation list, while a ResNet18 is better off with
    all. Input, outputs and metadata are those of the float model. Raises UserError.
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
    # Kernels that are stored small become constants, which the quantiser looks for.
    model = onnx.shape_inference.infer_shapes(export.simplify(model))
    expected, found = _landmarks(model, images), []
    with atomic_write(output) as temporary:
        for of_all in (True, False):
            _quantize(model, images, temporary, of_all)
            result = onnx.load(temporary)
            off = float(numpy.abs(_landmarks(result, images) - expected).mean())
            found.append((off, result))
        result = min(found, key=lambda pair: pair[0])[1]
        onnx.helper.set_model_props(result, metadata)
        export.store_small(result.graph, {})
        onnx.save(result, temporary)
    return output


def _landmarks(model, images):
    import onnxruntime
    session = onnxruntime.InferenceSession(model.SerializeToString(),
                                           providers=["CPUExecutionProvider"])
    return session.run(["landmarks"], {"images": images.transpose(0, 3, 1, 2)})[0]


def _quantize(model, images, target, of_all):
    """Write a model (ONNX, as it is) as int8. of_all: the range of activations is that of all
    images, else the mean of theirs.
    """
    from onnxruntime import quantization
    batches = ({"images": image.transpose(2, 0, 1)[None]} for image in images)

    class Crops(quantization.CalibrationDataReader):
        """Hands the crops to ONNX Runtime one by one."""

        def get_next(self):
            """A dict of inputs, or None at the end."""
            return next(batches, None)

    # The quantiser advises preprocessing on the root logger, which has been done by then.
    logging.disable(logging.WARNING)
    try:
        quantization.quantize_static(
            # It writes to the model that it is given.
            copy.deepcopy(model), target, Crops(), quant_format=quantization.QuantFormat.QDQ,
            per_channel=True, activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            # Seven bits: CPUs without VNNI add two products in 16 bits, and eight would saturate.
            reduce_range=True, nodes_to_quantize=_choose(model), op_types_to_quantize=OPERATORS,
            extra_options={"CalibMovingAverage": not of_all,
                           "TensorQuantOverrides": _whole_bytes(model, quantization)})
    finally:
        logging.disable(logging.NOTSET)


def export_int8(path, args):
    """Write the .int8.onnx beside an .onnx (pathlib.Path), calibrated on the set that args mean;
    returns its path. Raises UserError.
    """
    prepared, model = PreparedSet(set_folder(args)), Predictor(path)
    schemes.fit_scheme(model.scheme, prepared.scheme, str(path))
    prepared.tell_crop(model.crop)
    print(f"exporting {path.with_suffix('.int8.onnx')}")
    return quantize(path, calibration_crops(prepared, model.input_size))


def calibration_crops(prepared, size):
    """Up to CROPS nominal crops (n, size, size, 3) from all over the training list of a
    dataset.PreparedSet, never from a test list. Raises UserError where it has none.
    """
    faces = prepared.lists.get("train")
    if faces is None:
        raise UserError(f"{prepared.folder}: has no train.txt to calibrate an int8 model with; "
                        f"give --data-dir or --data samples")
    found = FaceDataset(faces, prepared.margin, size)
    chosen = numpy.unique(numpy.linspace(0, len(faces) - 1, CROPS).round().astype(int))
    return numpy.stack([found[int(index)][0].numpy() for index in chosen])


def _whole_bytes(model, quantization):
    """ONNX Runtime's overrides that give depthwise kernels all eight bits: those products it adds
    in 32 bits on any CPU. With seven, landmarks of `accurate` move by a third more.
    """
    channels = {tensor.name: tensor.dims[0] for tensor in model.graph.initializer if tensor.dims}
    whole = {"quant_type": quantization.QuantType.QInt8, "reduce_range": False}
    return {node.input[1]: [{**whole, "axis": 0}] + [whole] * (channels[node.input[1]] - 1)
            for node in model.graph.node if _is_depthwise(node) and node.input[1] in channels}


def _is_depthwise(node):
    return node.op_type == "Conv" and any(a.name == "group" and a.i > 1 for a in node.attribute)


def _choose(model):
    """Names of the nodes that become int8: those of the backbone, up to its last convolution.

    Not the first convolution and a depthwise one behind it: few channels of a wide range, which
    move landmarks as far as all the others together and gain no time.
    """
    shapes = {v.name: v.type.tensor_type.shape.dim for v in model.graph.value_info}
    nodes = list(model.graph.node)
    convolutions = [i for i, n in enumerate(nodes) if n.op_type == "Conv"
                    and not any(name.startswith("model.head.") for name in n.input)]
    first = next(i for i in convolutions[1:] if not _is_depthwise(nodes[i]))
    chosen = []
    for node in nodes[first:convolutions[-1] + 1]:
        shape = shapes.get(node.output[0], ())
        # Convolutions of a pooled vector are squeeze-and-excitation: little to gain, much to lose.
        pooled = len(shape) == 4 and shape[2].dim_value == shape[3].dim_value == 1
        if node.op_type in OPERATORS and not pooled:
            chosen.append(node.name)
    return chosen
