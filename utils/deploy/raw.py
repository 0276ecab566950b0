"""Export a model's PIP maps as ONNX, for runtimes that support little more than convolutions.

The graph takes float crops and ends in the maps of the head. The metadata, which some runtimes
drop, is written beside it as .json. examples/decode_maps.py turns both into landmarks.
"""
from __future__ import annotations

import copy
import io
import json
import pathlib
import warnings

import torch

from nets.head import PIPHead
from nets.model import LandmarkNet
from utils import checkpoint
from utils.deploy import export
from utils.errors import UserError
from utils.files import write_text


class _Maps(torch.nn.Module):
    """The exported graph: float crops to the maps of the head."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        """Return the tensors of head.Maps for images (1, 3, S, S) in 0..255; none is empty."""
        return tuple(self.model(images))[:None if self.model.head.num_nb else 3]


def export_raw(model: LandmarkNet, path: pathlib.Path | str, opset: int) -> pathlib.Path:
    """Write a model's maps as ONNX, and its metadata beside them as .json.

    Input `images` (1, 3, S, S), float32 RGB in 0..255. Outputs `score`, `offset_x`, `offset_y`
    (1, K, G, G) and, with neighbours, `neighbour_x`, `neighbour_y` (1, K * M, G, G), see head.Maps.

    Args:
        model: of checkpoint.load_model, with a PIP head.
        path: of the .onnx to write.
        opset: of ONNX, 11 to 20.

    Returns:
        The path.

    Raises:
        UserError: for a regression head, which has no maps.
    """
    import onnx
    path = pathlib.Path(path)
    if not isinstance(model.head, PIPHead):
        raise UserError(f"{path}: a regression has no maps; its .onnx has no decoding, so use that "
                        f"instead")
    net = _Maps(copy.deepcopy(model).cpu().float()).eval()
    content = io.BytesIO()
    names = ["score", "offset_x", "offset_y", "neighbour_x", "neighbour_y"]
    with warnings.catch_warnings():
        # The older exporter is deprecated, but onnx cannot convert the newer one's to old opsets.
        warnings.simplefilter("ignore")
        torch.onnx.export(net, (torch.zeros(1, 3, model.input_size, model.input_size),), content,
                          dynamo=False, opset_version=opset, input_names=["images"],
                          output_names=names[:None if model.head.num_nb else 3])
    described = metadata(model)
    export.write_onnx(export.simplify(onnx.load_from_string(content.getvalue())), path, described)
    write_text(path.with_suffix(".json"), json.dumps({
        key: value if key in export.PLAIN_TEXT else json.loads(value)
        for key, value in described.items()}))
    return path


def export_weights(path: pathlib.Path, opset: int) -> pathlib.Path:
    """Write the .raw.onnx and .raw.json beside a .pt.

    Args:
        path: of the .pt.
        opset: see export_raw.

    Returns:
        The path of the .raw.onnx.

    Raises:
        UserError: where the .pt cannot be loaded or has no maps.
    """
    target = path.with_suffix(".raw.onnx")
    model = checkpoint.load_model(path)
    print(f"exporting {target} and {target.with_suffix('.json').name}"
          + (" (without the lid head: the lids of closed eyes stay apart)"
             if model.lids is not None else "")
          + (" (without the shape head)" if model.shape is not None else "")
          + (" (without the mirrored face)" if model.flip_test else ""))
    return export_raw(model, target, opset)


def metadata(model: LandmarkNet) -> dict[str, str]:
    """Return export.metadata and, as JSON, what decoding the maps needs.

    `neighbours` (K, M): `neighbours[k][m]` is neighbour m of landmark k. `repeats` (K, M): how
    often landmark k's prediction of neighbour m counts in the mean, more than once where `merge` is
    padded. `merge`: of the head. `grid`: G.
    """
    head = model.head
    table = head.neighbours.cpu()
    weights = head.merge_weights.cpu()
    repeats = torch.zeros(len(table) * (head.num_nb + 1))
    # Relative to a landmark's own prediction, which counts once.
    repeats.index_add_(0, head.prediction_index.cpu().flatten(),
                       (weights / weights[:, :1]).flatten())
    repeats = repeats.round().int().reshape(len(table), -1)[:, 1:]
    described = export.metadata(model)
    if model.lids is not None:
        # These thresholds belong to landmarks that the lid head has moved.
        del described["eyes"]
    return {**described, "flip_test": "false", "neighbours": json.dumps(table.tolist()),
            "repeats": json.dumps(repeats.tolist()), "merge": json.dumps(head.merge),
            "grid": str(model.input_size // model.stride)}
