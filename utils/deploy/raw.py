"""ONNX of the maps alone, for runtimes that read little more than convolutions."""
import copy
import io
import json
import pathlib
import warnings

import torch

from nets.head import PIPHead
from utils import checkpoint
from utils.deploy import export
from utils.errors import UserError
from utils.files import atomic_write


class _Maps(torch.nn.Module):
    """The graph that is exported: float crops to the maps of the head, none of them empty."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        """(1, 3, S, S) floats of 0..255 to the tensors of head.Maps."""
        return tuple(self.model(images))[:None if self.model.head.num_nb else 3]


def export_raw(model, path, opset):
    """Write the maps of a model of checkpoint.load_model as ONNX, and a .json beside it.

    Input `images` (1, 3, S, S) float32 RGB of 0..255; outputs `score`, `offset_x`, `offset_y`
    (1, K, G, G) and, with neighbours, `neighbour_x`, `neighbour_y` (1, K * M, G, G), see head.Maps.
    The .json holds what metadata() says, for runtimes that drop it. examples/decode_maps.py makes
    landmarks of both. opset: 11 to 20. Raises UserError for a head without maps.
    """
    import onnx
    path = pathlib.Path(path)
    if not isinstance(model.head, PIPHead):
        raise UserError(f"{path}: a regression has no maps; its .onnx holds no decoding and is all "
                        f"it needs")
    net = _Maps(copy.deepcopy(model).cpu().float()).eval()
    content = io.BytesIO()
    names = ["score", "offset_x", "offset_y", "neighbour_x", "neighbour_y"]
    with warnings.catch_warnings():
        # The older exporter writes old opsets itself; onnx's converter refuses most of them.
        warnings.simplefilter("ignore")
        torch.onnx.export(net, (torch.zeros(1, 3, model.input_size, model.input_size),), content,
                          dynamo=False, opset_version=opset, input_names=["images"],
                          output_names=names[:None if model.head.num_nb else 3])
    graph = export.simplify(onnx.load_from_string(content.getvalue()))
    described = metadata(model)
    export.write(graph, path, described)
    text = {key: value if key in export.PLAIN else json.loads(value)
            for key, value in described.items()}
    with atomic_write(path.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(text), encoding="utf-8")
    return path


def export_weights(path, opset):
    """Write the .raw.onnx and .raw.json beside a .pt (pathlib.Path); returns the first's path."""
    target = path.with_suffix(".raw.onnx")
    model = checkpoint.load_model(path)
    print(f"exporting {target} and {target.with_suffix('.json').name}"
          + (" (the lid head is no part of the maps: shut eyes keep open lids)"
             if model.lids is not None else "")
          + (" (the shape head is no part of the maps)" if model.shape is not None else "")
          + (" (the mirrored face is no part of the maps)" if model.flip_test else ""))
    return export_raw(model, target, opset)


def metadata(model):
    """export.metadata, and what decoding needs, as JSON: `neighbours` (K, M), who is neighbour m of
    landmark k; `repeats` (K, M), how often that prediction counts (more than once where merge is
    padded); `merge`, `grid` (G).
    """
    head = model.head
    table = head.neighbours.cpu()
    votes = head.votes.cpu()
    repeats = torch.zeros(len(table) * (head.num_nb + 1))
    # A landmark's own prediction weighs one.
    repeats.index_add_(0, head.voters.cpu().flatten(), (votes / votes[:, :1]).flatten())
    repeats = repeats.round().int().reshape(len(table), -1)[:, 1:]
    described = export.metadata(model)
    if model.lids is not None:
        # EyeThresholds of landmarks whose lids the lid head has drawn together, which maps do not hold.
        del described["eyes"]
    return {**described, "flip_test": "false", "neighbours": json.dumps(table.tolist()),
            "repeats": json.dumps(repeats.tolist()), "merge": json.dumps(head.merge),
            "grid": str(model.input_size // model.stride)}
