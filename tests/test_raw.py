"""The .raw.onnx, and its decoding in numpy."""
import json

import numpy
import onnx
import onnxruntime
import pytest
import torch

from examples import decode_maps
from utils import checkpoint
from utils.args import load_args
from utils.deploy import export, raw
from utils.errors import UserError

# Operators that small runtimes may not support.
HARD = {"Gather", "GatherElements", "GatherND", "ArgMax", "TopK", "Cast", "Mod", "Loop", "If"}


def crops(count=4):
    """Smooth noise (N, 3, 64, 64) uint8, so that scores differ between cells."""
    small = numpy.random.default_rng(3).integers(0, 256, (count, 3, 8, 8), numpy.uint8)
    return small.repeat(8, 2).repeat(8, 3)


def run(path, images):
    """The maps of each face, from ONNX Runtime."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return [session.run(None, {"images": image[None].astype(numpy.float32)}) for image in images]


@pytest.mark.parametrize("merge", ["plain", "padded", "confidence"])
@pytest.mark.parametrize("opset", [11, 18])
def test_maps_decoded_in_numpy_equal_the_model(tiny_weights, tmp_path, merge, opset):
    model = checkpoint.load_model(tiny_weights, merge=merge)
    path = raw.export_raw(model, tmp_path / "net.raw.onnx", opset)
    graph = onnx.load(path)
    assert graph.opset_import[0].version == opset
    assert graph.ir_version == 8
    assert not {node.op_type for node in graph.graph.node} & HARD
    shapes = [[d.dim_value for d in v.type.tensor_type.shape.dim]
              for v in (*graph.graph.input, *graph.graph.output)]
    assert shapes == [[1, 3, 64, 64], *[[1, 68, 4, 4]] * 3, *[[1, 680, 4, 4]] * 2]
    about = json.loads((tmp_path / "net.raw.json").read_text())
    images = crops()
    with torch.inference_mode():
        expected = model.predict(torch.from_numpy(images))
    for maps, landmarks, confidence in zip(run(path, images), *expected):
        found = decode_maps.decode(maps, about)
        numpy.testing.assert_allclose(found[0], landmarks, atol=1e-4)
        numpy.testing.assert_allclose(found[1], confidence, atol=1e-4)
        assert len(set(maps[0][0].reshape(68, -1).argmax(1))) > 1, "more than one cell is used"


def test_the_json_equals_the_metadata_of_the_file(tiny_weights, tmp_path):
    model = checkpoint.load_model(tiny_weights)
    path = raw.export_raw(model, tmp_path / "net.raw.onnx", 13)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    inside = session.get_modelmeta().custom_metadata_map
    about = json.loads((tmp_path / "net.raw.json").read_text())
    assert {k: v if k in export.PLAIN_TEXT else json.loads(v)
            for k, v in inside.items()} == about
    assert about["grid"] == 4
    assert about["input_size"] == 64
    assert about["crop"] == model.crop
    assert about["neighbours"] == model.head.neighbours.tolist()
    assert not list(tmp_path.glob("*.tmp"))


def test_a_head_without_neighbours_and_a_head_without_maps(tiny_weights, tmp_path):
    state = checkpoint.read(tiny_weights)
    for setting in ({"num_nb": 0}, {"head": "regression"}):
        args = {**state["args"], **setting}
        scheme = checkpoint.load_model(tiny_weights).scheme
        model = checkpoint.build_model(load_args(args), scheme)
        checkpoint.save({**state, "args": args, "weights": model.state_dict()},
                        tmp_path / "other.pt")
        model = checkpoint.load_model(tmp_path / "other.pt")
        if "head" in setting:
            with pytest.raises(UserError, match="a regression has no maps"):
                raw.export_raw(model, tmp_path / "other.raw.onnx", 13)
            continue
        path = raw.export_raw(model, tmp_path / "other.raw.onnx", 13)
        about = json.loads((tmp_path / "other.raw.json").read_text())
        (maps,) = run(path, crops(1))
        assert len(maps) == 3
        with torch.inference_mode():
            expected = model.predict(torch.from_numpy(crops(1)))[0][0]
        numpy.testing.assert_allclose(decode_maps.decode(maps, about)[0], expected, atol=1e-4)


def test_maps_of_bfloat16_are_decoded_in_full_precision():
    """A corner of 15 plus an offset of 0.3 would be off by 0.06 cells if added in bfloat16."""
    grid, points = 16, 3
    about = {"grid": grid, "merge": "plain", "neighbours": [[1], [2], [0]],
             "repeats": [[1], [1], [1]]}
    score = numpy.zeros((1, points, grid, grid))
    score[0, :, 15, 14] = 1
    maps = [score] + [numpy.full_like(score, v) for v in (0.3, 0.7, 0.3, 0.7)]
    rounded = [torch.from_numpy(m).bfloat16().float().numpy() for m in maps]
    landmarks, _ = decode_maps.decode(rounded, about)
    numpy.testing.assert_allclose(landmarks * grid, [[14.3, 15.7]] * points, atol=0.002)
