"""Export a model as an ONNX file that predicts landmarks.

Normalisation and decoding are part of the graph: uint8 crops go in, landmarks and confidence come
out, for any batch size. The file's metadata tells a consumer how to crop a face (see metadata).
Large constants are stored in 8 or 16 bits where the .pt has them so, and the same numbers result.
"""
from __future__ import annotations

import copy
import hashlib
import json
import os
import pathlib
import sys
import typing
from collections.abc import Iterable, Mapping

import numpy
import torch

from nets.model import LandmarkNet
from utils import checkpoint, packing
from utils.files import atomic_write

if typing.TYPE_CHECKING:
    import onnx

OPSET = 18
EPSILON = 1e-30
# Metadata values that are plain text; the others are JSON.
PLAIN_TEXT = ("format", "backbone", "licence", "weights", "flip_test")
# As stated by the publishers of the data. The README and the model cards state the same.
DATA_LICENCES = {"samples": "faces drawn by the repository: MIT",
                 "300W": "research only, non-commercial",
                 "300W-small": "research only, non-commercial",
                 "eyes": "research only", "lfw": "research only"}


class _Predict(torch.nn.Module):
    """The exported graph: uint8 crops to landmarks and confidence."""

    def __init__(self, model):
        super().__init__()
        self.model = model.eval()
        for parent in list(model.modules()):
            for name, child in parent.named_children():
                if isinstance(child, torch.nn.PReLU) and child.num_parameters > 1:
                    setattr(parent, name, _SplitPReLU(child))

    def forward(self, images):
        """Predict (N, K, 2) and (N, K) from images (N, 3, S, S), uint8."""
        return self.model.predict(images)


class _SplitPReLU(torch.nn.Module):
    """PReLU as slope * x + (1 - slope) * relu(x), with the products as 1 x 1 convolutions.

    ONNX Runtime leaves the blocked layout of its convolutions for a PRelu node. Split, an IRNet18
    is a fifth faster, and as fast for its multiply-adds as a ResNet.
    """

    def __init__(self, prelu):
        super().__init__()
        channels = prelu.num_parameters
        self.slope = torch.nn.Conv2d(channels, channels, 1, groups=channels, bias=False)
        self.rest = torch.nn.Conv2d(channels, channels, 1, groups=channels, bias=False)
        with torch.no_grad():
            self.slope.weight.copy_(prelu.weight[:, None, None, None])
            self.rest.weight.copy_(1 - prelu.weight[:, None, None, None])

    def forward(self, x):
        """Apply the PReLU to (N, C, H, W)."""
        return self.slope(x) + self.rest(torch.relu(x))


def export_onnx(model: LandmarkNet, path: pathlib.Path | str) -> pathlib.Path:
    """Write a model as ONNX.

    Input `images` (N, 3, S, S), uint8 RGB. Outputs `landmarks` (N, K, 2) in crop units 0..1 and
    `confidence` (N, K), float32. N is dynamic.

    Args:
        model: of checkpoint.load_model.
        path: of the .onnx to write.

    Returns:
        The path.

    Raises:
        UserError: where the file cannot be written.
    """
    images = torch.zeros(2, 3, model.input_size, model.input_size, dtype=torch.uint8)
    program = torch.onnx.export(
        _Predict(copy.deepcopy(model).cpu()).eval(), (images,), dynamo=True, opset_version=OPSET,
        input_names=["images"], output_names=["landmarks", "confidence"], verbose=False,
        dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=4096)},))
    onnx_model = simplify(program.model_proto)
    pack_constants(onnx_model.graph,
                   {f"model.{k}": v.cpu().numpy() for k, v in model.state_dict().items()})
    return write_onnx(onnx_model, path, metadata(model))


def simplify(onnx_model: onnx.ModelProto) -> onnx.ModelProto:
    """Return an ONNX model with constant expressions folded, if onnxsim is installed.

    Standard error is discarded meanwhile, because onnxsim warns of each operation that it cannot
    fold, which is harmless.
    """
    try:
        import onnxsim
    except ImportError:
        print("note: onnxsim is not installed: the ONNX file predicts the same and has more "
              "operations; pip install onnxsim, then --export")
        return onnx_model
    sys.stderr.flush()
    stderr, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        return onnxsim.simplify(onnx_model)[0]
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)


def pack_constants(graph: onnx.GraphProto, weights: Mapping[str, numpy.ndarray]) -> None:
    """Store large constants of a graph in 8 or 16 bits where that changes no output.

    Export folds batch norm into the convolutions, so a kernel in the graph is the trained one times
    a factor per channel. Where the trained one fits 8 or 16 bits, it is stored so, and Cast and Mul
    nodes restore the kernel when a runtime loads the file: a half or a quarter of the size.

    Args:
        graph: changed in place.
        weights: trained kernels by their name in the graph. Constants of other names are packed
            where they fit 8 or 16 bits themselves.
    """
    from onnx import TensorProto, helper, numpy_helper
    restoring = []
    for tensor in list(graph.initializer):
        kernel, name = numpy_helper.to_array(tensor), tensor.name
        if (kernel.dtype != numpy.float32 or kernel.ndim < 2
                or kernel.size < packing.MIN_PACKED_SIZE):
            continue
        small, factor = _packed(weights.get(name, kernel), kernel)
        if small is None:
            continue
        nodes = [helper.make_node("Cast", [f"{name}_small"], [name], to=TensorProto.FLOAT)]
        if (factor != 1).any():
            factor = factor.reshape(-1, *[1] * (kernel.ndim - 1))
            graph.initializer.append(numpy_helper.from_array(factor, f"{name}_factor"))
            nodes[0].output[0] = f"{name}_trained"
            nodes.append(helper.make_node("Mul", [f"{name}_trained", f"{name}_factor"], [name]))
        tensor.CopyFrom(numpy_helper.from_array(small, f"{name}_small"))
        restoring += nodes
    nodes = restoring + list(graph.node)
    del graph.node[:]
    graph.node.extend(nodes)


def _packed(trained, kernel):
    """Return an int8 or float16 array and factors (C,) whose product is the kernel (C, ...).

    Both are None where the kernel is no multiple, per channel, of `trained` in 8 or 16 bits.
    """
    if trained.shape != kernel.shape:
        return None, None
    with numpy.errstate(over="ignore"):
        halves = trained.astype(numpy.float16)
    candidates = [packing.quantize_kernel(torch.tensor(trained))[0].numpy()]
    if numpy.array_equal(halves, trained):
        candidates.append(halves)
    folded = kernel.reshape(len(kernel), -1)
    largest = abs(folded).max(1, keepdims=True)
    for small in (candidate.reshape(folded.shape) for candidate in candidates):
        if numpy.array_equal(small, folded):
            factor = numpy.ones(len(kernel), numpy.float32)
        else:
            values = small.astype(numpy.float32)
            factor = (values * folded).sum(1) / numpy.maximum((values * values).sum(1), EPSILON)
            if (abs(values * factor[:, None] - folded) > 1e-6 * largest).any():
                continue
        return small.reshape(kernel.shape), factor
    return None, None


def write_onnx(onnx_model: onnx.ModelProto, path: pathlib.Path | str,
               described: Mapping[str, str]) -> pathlib.Path:
    """Check an ONNX model and write it with metadata, whole or not at all.

    Args:
        onnx_model: the model.
        path: to write to.
        described: metadata, see metadata().

    Returns:
        The path.

    Raises:
        UserError: where the file cannot be written.
    """
    import onnx
    path = pathlib.Path(path)
    onnx.helper.set_model_props(onnx_model, described)
    packing.lower_ir_version(onnx_model)
    onnx.checker.check_model(onnx_model, full_check=True)
    with atomic_write(path) as temporary:
        onnx.save(onnx_model, temporary)
    return path


def rewrite_ir_version(path: pathlib.Path | str) -> None:
    """Write an .onnx anew with packing.IR_VERSION; weights, metadata and outputs stay the same.

    Raises:
        UserError: where the file cannot be written.
    """
    import onnx
    model = packing.lower_ir_version(onnx.load(path))
    onnx.checker.check_model(model, full_check=True)
    with atomic_write(path) as temporary:
        onnx.save(model, temporary)


def export_weights(path: pathlib.Path, flip_test: bool = False) -> pathlib.Path:
    """Write the .onnx beside a .pt and return its path.

    Args:
        path: of the .pt.
        flip_test: whether the graph averages with the mirrored face, which doubles its time.

    Raises:
        UserError: where the .pt cannot be loaded or the .onnx cannot be written.
    """
    target = path.with_suffix(".onnx")
    print(f"exporting {target}")
    return export_onnx(checkpoint.load_model(path, flip_test=flip_test), target)


def metadata(model: LandmarkNet) -> dict[str, str]:
    """Return the metadata of an ONNX file, which a consumer needs to crop faces.

    Plain text:
        format, backbone, licence; weights: digest() of the model; flip_test: true or false, whether
        the graph averages with the mirrored face.

    JSON:
        input_size; scheme: `mean_face` (K pairs in crop units), `flip`, `divisor`, `regions` ...;
        crop: `rule` (square, stretch or box) and `scale` turn the landmarks' box into the crop;
        eyes, where the scheme has any: the fields of eyelids.EyeThresholds.
    """
    eyes = {"eyes": json.dumps(model.eyes.state())} if model.scheme.eyes else {}
    return {"format": "pipnet-1", "input_size": str(model.input_size),
            "scheme": json.dumps(model.scheme.state()), "crop": json.dumps(model.crop),
            "backbone": model.args.backbone, "licence": licence(model.sets),
            "weights": digest(model), "flip_test": str(model.flip_test).lower(), **eyes}


def digest(model: LandmarkNet) -> str:
    """Return 16 hexadecimal digits that identify the weights and eye thresholds of a model."""
    made = hashlib.sha256(json.dumps(model.eyes.state()).encode())
    made.update(b"flip_test" * model.flip_test)
    for name, values in sorted(model.state_dict().items()):
        made.update(name.encode() + values.cpu().numpy().tobytes())
    return made.hexdigest()[:16]


def is_stale(path: pathlib.Path) -> bool:
    """Return whether the .onnx beside a .pt is missing or was exported from other weights.

    A file that averages with the mirrored face is compared with weights that do so too.
    """
    described = _metadata_beside(path)
    return not described or described.get("weights") != digest(
        checkpoint.load_model(path, flip_test=described.get("flip_test") == "true"))


def uses_flip_test(path: pathlib.Path) -> bool:
    """Return whether there is an .onnx beside a .pt that averages with the mirrored face."""
    return _metadata_beside(path).get("flip_test") == "true"


def _metadata_beside(path):
    """Return the metadata of the .onnx beside a .pt; empty where there is none."""
    import onnx
    target = path.with_suffix(".onnx")
    if not target.is_file():
        return {}
    try:
        return {p.key: p.value for p in onnx.load(target).metadata_props}
    except Exception:  # protobuf raises errors of its own for other files.
        return {}


def licence(sets: Iterable[str]) -> str:
    """Return the licence of weights that were trained on the sets of these names, in one line."""
    data = [f"{name} ({DATA_LICENCES.get(name, 'see its publisher')})" for name in sets]
    return f"code MIT; weights: that of their data, {' and '.join(data)}"
