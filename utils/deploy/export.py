"""ONNX: decoding inside the graph, dynamic batch, and metadata that says how to crop."""
import copy
import hashlib
import json
import os
import pathlib
import sys

import numpy
import torch

from utils import checkpoint
from utils.files import atomic_write

OPSET = 18
EPSILON = 1e-30
# Values of metadata() that are plain text; the others are JSON.
PLAIN = ("format", "backbone", "licence", "weights", "flip_test")
# As the publishers state them; README and cards say the same.
DATA_LICENCES = {"samples": "faces drawn by the repository: MIT",
                 "300W": "research only, non-commercial",
                 "300W-small": "research only, non-commercial",
                 "eyes": "research only", "lfw": "research only"}


class _Predict(torch.nn.Module):
    """The graph that is exported: uint8 crops to landmarks and confidence."""

    def __init__(self, model):
        super().__init__()
        self.model = model.eval()
        for parent in list(model.modules()):
            for name, child in parent.named_children():
                if isinstance(child, torch.nn.PReLU) and child.num_parameters > 1:
                    setattr(parent, name, _SplitPReLU(child))

    def forward(self, images):
        """(N, 3, S, S) uint8 to (N, K, 2) and (N, K)."""
        return self.model.predict(images)


class _SplitPReLU(torch.nn.Module):
    """PReLU as slope * x + (1 - slope) * relu(x), the products as 1 x 1 convolutions.

    ONNX Runtime keeps these in the blocked layout of its convolutions and leaves it for a PRelu:
    an IRNet18 is a fifth faster, and as fast for its multiply-adds as a ResNet.
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
        """(N, C, H, W) to the same."""
        return self.slope(x) + self.rest(torch.relu(x))


def export(model, path):
    """Write a model of checkpoint.load_model as ONNX; returns the path.

    Input `images` (N, 3, S, S) uint8 RGB, outputs `landmarks` (N, K, 2) in crop units and
    `confidence` (N, K); N is dynamic. Metadata: see metadata(). Raises UserError.
    """
    images = torch.zeros(2, 3, model.input_size, model.input_size, dtype=torch.uint8)
    program = torch.onnx.export(
        _Predict(copy.deepcopy(model).cpu()).eval(), (images,), dynamo=True, opset_version=OPSET,
        input_names=["images"], output_names=["landmarks", "confidence"], verbose=False,
        dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=4096)},))
    graph = simplify(program.model_proto)
    store_small(graph.graph, {f"model.{k}": v.cpu().numpy() for k, v in model.state_dict().items()})
    return write(graph, path, metadata(model))


def simplify(graph):
    """An ONNX model without steps that need not be taken.

    onnxsim prints a warning of each operation that it cannot work out beforehand, which is none the
    worse for it.
    """
    import onnxsim
    sys.stderr.flush()
    stderr, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        return onnxsim.simplify(graph)[0]
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)


def store_small(graph, weights):
    """Keep weights that a .pt stores in 16 or 8 bits so in an ONNX graph too: a half or a quarter
    of the file, and no output changes.

    weights: numpy arrays as trained, by their names in the graph; of others the graph's own are
    looked at. Batch norm was folded into the convolutions, so a kernel is what was trained times a
    factor a channel; a runtime multiplies the constants when it loads the file.
    """
    from onnx import TensorProto, helper, numpy_helper
    before = []
    for tensor in list(graph.initializer):
        kernel, name = numpy_helper.to_array(tensor), tensor.name
        if kernel.dtype != numpy.float32 or kernel.ndim < 2 or kernel.size < checkpoint.LARGE:
            continue
        small, factor = _smaller(weights.get(name, kernel), kernel)
        if small is None:
            continue
        steps = [helper.make_node("Cast", [f"{name}_small"], [name], to=TensorProto.FLOAT)]
        if (factor != 1).any():
            factor = factor.reshape(-1, *[1] * (kernel.ndim - 1))
            graph.initializer.append(numpy_helper.from_array(factor, f"{name}_factor"))
            steps[0].output[0] = f"{name}_trained"
            steps.append(helper.make_node("Mul", [f"{name}_trained", f"{name}_factor"], [name]))
        tensor.CopyFrom(numpy_helper.from_array(small, f"{name}_small"))
        before += steps
    nodes = before + list(graph.node)
    del graph.node[:]
    graph.node.extend(nodes)


def _smaller(trained, kernel):
    """(int8 or float16 array, factors (C,) float32) whose product is the kernel (C, ...), which is
    `trained` times a factor a channel; None twice where it is none.
    """
    if trained.shape != kernel.shape:
        return None, None
    with numpy.errstate(over="ignore"):
        halves = trained.astype(numpy.float16)
    candidates = [checkpoint.to_bytes(torch.tensor(trained))[0].numpy()]
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


def write(graph, path, described):
    """Check an ONNX model and write it, whole or not at all, with metadata (a dict of strings).

    Returns the path. Raises UserError.
    """
    import onnx
    path = pathlib.Path(path)
    onnx.helper.set_model_props(graph, described)
    onnx.checker.check_model(graph, full_check=True)
    with atomic_write(path) as temporary:
        onnx.save(graph, temporary)
    return path


def export_weights(path, flip_test=False):
    """Write the .onnx beside a .pt (pathlib.Path); returns its path. flip_test: it averages with
    the mirrored face, in twice the time. Raises UserError.
    """
    target = path.with_suffix(".onnx")
    print(f"exporting {target}")
    return export(checkpoint.load_model(path, flip_test=flip_test), target)


def metadata(model):
    """What a consumer needs, as strings: input_size, scheme, crop and eyes as JSON, format.

    scheme has `mean_face` (K pairs in crop units), `flip`, `divisor`, `regions`; crop has `rule`
    (square, stretch or box) and `scale`: how the landmarks' box becomes the crop; eyes, where the
    scheme has any, are the fields of eyelids.EyeThresholds; weights is their digest; flip_test, true
    or false, whether the graph averages with the mirrored face.
    """
    eyes = {"eyes": json.dumps(model.eyes.state())} if model.scheme.eyes else {}
    return {"format": "pipnet-1", "input_size": str(model.input_size),
            "scheme": json.dumps(model.scheme.state()), "crop": json.dumps(model.crop),
            "backbone": model.args.backbone, "licence": licence(model.sets),
            "weights": digest(model), "flip_test": str(model.flip_test).lower(), **eyes}


def digest(model):
    """What tells the weights of a model of checkpoint.load_model, and its limits, from others."""
    made = hashlib.sha256(json.dumps(model.eyes.state()).encode())
    made.update(b"flip_test" * model.flip_test)
    for name, values in sorted(model.state_dict().items()):
        made.update(name.encode() + values.cpu().numpy().tobytes())
    return made.hexdigest()[:16]


def is_stale(path):
    """Whether the .onnx beside a .pt (pathlib.Path) is absent, or of other weights than these.
    Whether it averages with the mirrored face is as it was exported.
    """
    said = _described(path)
    return not said or said.get("weights") != digest(
        checkpoint.load_model(path, flip_test=said.get("flip_test") == "true"))


def averages(path):
    """Whether the .onnx beside a .pt (pathlib.Path) is there and averages with the mirrored face.
    """
    return _described(path).get("flip_test") == "true"


def _described(path):
    """The metadata of the .onnx beside a .pt; empty where there is none."""
    import onnx
    target = path.with_suffix(".onnx")
    if not target.is_file():
        return {}
    try:
        return {p.key: p.value for p in onnx.load(target).metadata_props}
    except Exception:  # What is no ONNX file raises protobuf's own kinds.
        return {}


def licence(sets):
    """The licence of weights that were trained on the sets of these names, and of their data, as a
    line.
    """
    said = [f"{name} ({DATA_LICENCES.get(name, 'see its publisher')})" for name in sets]
    return f"code MIT; weights: that of their data, {' and '.join(said)}"
