"""The exported files beside a .pt: those that --export asks for, and those that a test needs."""
from __future__ import annotations

import argparse
import pathlib
from collections.abc import Collection

from utils import experiment
from utils.deploy import export, quantize, raw
from utils.errors import UserError


def write_requested(args: argparse.Namespace, actions: Collection[str]) -> None:
    """Write the .onnx of the weights, and the other formats that were asked for.

    Args:
        args: resolved settings: `exp` names the weights.
        actions: int8 and raw are the other formats.

    Raises:
        UserError: where there are no such weights or a file cannot be written.
    """
    path = experiment.find_weights(args.exp, ".pt")
    if path.suffix != ".pt":
        raise UserError(f"{path}: is what --export writes; give the .pt that it is made from")
    _write(path, args, actions, args.flip_test)


def refresh(args: argparse.Namespace, actions: Collection[str]) -> None:
    """Write the .onnx anew if it is missing or was exported from other weights.

    Args:
        args: resolved settings: `exp` names the weights.
        actions: with "test", a name stands for a .pt and else for an .onnx.

    Raises:
        DiskError: where it cannot be written.
        UserError: where there are no such weights.
    """
    found = experiment.find_weights(args.exp, ".pt" if "test" in actions else ".onnx")
    path = found.with_suffix(".pt")
    if path.is_file() and export.is_stale(path):
        # The file keeps averaging with the mirrored face if it did so.
        _write(path, args, actions, args.flip_test or export.uses_flip_test(path))


def _write(path: pathlib.Path, args: argparse.Namespace, actions: Collection[str],
           flip_test: bool) -> None:
    path = export.export_weights(path, flip_test)
    if "int8" in actions:
        quantize.export_int8(path, args)
    if "raw" in actions:
        raw.export_weights(path.with_suffix(".pt"), args.opset)
    for kind in ("int8", "raw"):
        other = path.with_suffix(f".{kind}.onnx")
        if kind not in actions and other.is_file():
            print(f"note: {other} was not written; --export --{kind} writes it anew")
