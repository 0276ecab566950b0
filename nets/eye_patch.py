"""A small network that tells open, looking-down and shut eyes apart in a grey patch of one eye.

It needs landmarks and the image only, so that it works with every landmark model. It is trained by
utils/training/eye_patch_fit.py, and runs in utils/drowsiness/eye_patch.py without torch.
"""
from __future__ import annotations

import numpy
import torch

STATES = ("open", "down", "shut")
# Width and height of a patch in pixels.
SIZE = (48, 32)
CHANNELS, STRIDES = (12, 24, 32, 48, 48), (2, 2, 1, 2, 1)


class EyePatchNet(torch.nn.Module):
    """Five convolutions and a linear layer; 2 million multiply-adds and 48,000 weights.

    Args:
        extra: outputs beside the three logits, for what a teacher knows about the eye.
        dropout: share of the last features that are dropped in training.
    """

    def __init__(self, extra: int = 0, dropout: float = 0.3):
        super().__init__()
        inputs = (1, *CHANNELS[:-1])
        self.convolutions = torch.nn.ModuleList(
            torch.nn.Conv2d(i, o, 3, stride, 1, bias=False)
            for i, o, stride in zip(inputs, CHANNELS, STRIDES))
        self.norms = torch.nn.ModuleList(torch.nn.BatchNorm2d(o) for o in CHANNELS)
        self.dropout = torch.nn.Dropout(dropout)
        cells = SIZE[0] * SIZE[1] // numpy.prod(STRIDES) ** 2
        self.linear = torch.nn.Linear(int(CHANNELS[-1] * cells), len(STATES))
        self.extra = torch.nn.Linear(int(CHANNELS[-1] * cells), extra) if extra else None

    def forward(self, patches: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Classify patches (N, 32, 48), standardised as drowsiness.eye_patch.standardise does.

        Returns:
            Logits (N, 3) of STATES, and the extra outputs (N, extra) or None.
        """
        x = patches[:, None]
        for convolution, norm in zip(self.convolutions, self.norms):
            x = torch.relu(norm(convolution(x)))
        x = self.dropout(x.flatten(1))
        return self.linear(x), None if self.extra is None else self.extra(x)

    def to_onnx(self) -> bytes:
        """Return an ONNX model: patches (N, 32, 48) to logits (N, 3), batch norms folded."""
        from onnx import TensorProto, checker, helper, numpy_helper
        weights, nodes, x = {"axis": numpy.array([1])}, [], "x0"
        nodes.append(helper.make_node("Unsqueeze", ["patches", "axis"], [x]))
        with torch.no_grad():
            for i, (convolution, norm) in enumerate(zip(self.convolutions, self.norms)):
                scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
                weights[f"kernel{i}"] = (convolution.weight * scale[:, None, None, None]).numpy()
                weights[f"bias{i}"] = (norm.bias - norm.running_mean * scale).numpy()
                nodes.append(helper.make_node("Conv", [x, f"kernel{i}", f"bias{i}"], [f"y{i}"],
                                              strides=[STRIDES[i]] * 2, pads=[1] * 4))
                nodes.append(helper.make_node("Relu", [f"y{i}"], [x := f"x{i + 1}"]))
            weights["kernel"] = self.linear.weight.numpy()
            weights["bias"] = self.linear.bias.numpy()
        nodes.append(helper.make_node("Flatten", [x], ["flat"]))
        nodes.append(helper.make_node("Gemm", ["flat", "kernel", "bias"], ["logits"], transB=1))
        graph = helper.make_graph(
            nodes, "eye_state",
            [helper.make_tensor_value_info("patches", TensorProto.FLOAT, ["n", *SIZE[::-1]])],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", len(STATES)])],
            [numpy_helper.from_array(value, name) for name, value in weights.items()])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)])
        model.ir_version = 8
        checker.check_model(model)
        return model.SerializeToString()
