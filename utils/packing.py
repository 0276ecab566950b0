"""Store weights in 8 or 16 bits and unpack them; the version of the .onnx files.

A published .pt holds half-precision numbers, or with 8 bits the backbone's large kernels as int8
with one scale per output channel. checkpoint.load_model unpacks both to float32, so that the
published file and the ONNX file exported from it predict the same.
"""
from __future__ import annotations

import typing
from collections.abc import Mapping

import torch

if typing.TYPE_CHECKING:
    import onnx

# Smaller tensors are not worth packing.
MIN_PACKED_SIZE = 1024
# IR version of every .onnx that is written. Opset 18 needs no more, and ONNX Runtime 1.17 and older
# refuse 10.
IR_VERSION = 8


def pack(weights: Mapping[str, torch.Tensor], bits: int = 16) -> dict:
    """Convert weights to what a published file stores.

    Args:
        weights: tensors by name.
        bits: 16 for half precision; 8 for int8 kernels in the backbone and half precision for the
            rest. Heads stay in half precision because their outputs are coordinates: 8 bits would
            cost `accurate` 0.07 of 2.76 % NME on the validation list, and cost the backbone none.

    Returns:
        By name, a tensor, or for an int8 kernel the pair of quantize_kernel.
    """
    def is_large_kernel(name, value):
        return name.startswith("backbone.") and value.dim() > 1 and value.numel() >= MIN_PACKED_SIZE

    return {name: quantize_kernel(value) if bits == 8 and is_large_kernel(name, value) else
            value.half() if value.is_floating_point() else value
            for name, value in weights.items()}


def unpack(stored: Mapping) -> dict[str, torch.Tensor]:
    """Return the tensors of packed weights by name; half precision is kept as it is."""
    return {name: value[0] * value[1] if isinstance(value, tuple) else value
            for name, value in stored.items()}


def quantize_kernel(kernel: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize a kernel to 8 bits with one scale per output channel.

    Quantizing the product of the two again gives the same pair.

    Args:
        kernel: (C, ...), floating point.

    Returns:
        int8 values (C, ...) and float32 scales (C, 1, ...); their product approximates the kernel.
    """
    # Clamped because a channel that training has switched off can hold nothing but zeros.
    scale = kernel.float().flatten(1).abs().amax(1).clamp(min=1e-9) / 127
    scale = scale.reshape(-1, *[1] * (kernel.dim() - 1))
    return (kernel / scale).round().to(torch.int8), scale


def lower_ir_version(onnx_model: onnx.ModelProto) -> onnx.ModelProto:
    """Set the IR version of a model to IR_VERSION, in place, and return it."""
    onnx_model.ir_version = IR_VERSION
    return onnx_model
