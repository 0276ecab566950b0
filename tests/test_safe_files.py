"""Malformed checkpoints and ONNX files: refused in one line, and no code in them is run."""
import json
import os
import pathlib
import pickle
import shutil
import zipfile

import numpy
import onnx
import pytest
import torch
from helpers import warm as warm_module

from utils import checkpoint
from utils.errors import UserError
from utils.landmarks.schemes import SCHEMES
from utils.predictor import Predictor


class Command:
    """Unpickling it runs a command; weights_only=True must refuse it."""

    def __init__(self, line):
        self.line = line

    def __reduce__(self):
        return os.system, (self.line,)


@pytest.fixture(scope="module")
def warm():
    return warm_module.warm()


@pytest.fixture(scope="module")
def good(warm):
    """The folder of a trained experiment."""
    child = warm.run("--train", "--exp", "good", *warm.flags, hook="step:12:TERM")
    assert child.code == 143, child.text
    return warm.folder("good")


def damaged_pt(kind, path, good, trap):
    """Write a malformed checkpoint of a kind; good: a sound one; trap: made if a command runs."""
    sound = good.read_bytes()
    state = torch.load(good, weights_only=True)
    # best.pt has weights; last.pt has the whole training state.
    weights = state["weights" if "weights" in state else "ema"]
    name = next(k for k, v in weights.items() if v.dim() == 4)
    if kind == "directory":
        path.mkdir()
    elif kind == "missing":
        pass
    elif kind == "picture":
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    elif kind == "foreign zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("readme.txt", "hello")
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(Command(f"touch {trap}")))
    elif kind in BYTES:
        path.write_bytes(BYTES[kind](sound))
    else:
        torch.save(STATES[kind](state, weights, name, trap), path)


BYTES = {
    "empty": lambda sound: b"",
    "text": lambda sound: b"these are no weights\n" * 20,
    "zeros": lambda sound: bytes(len(sound)),
    "half": lambda sound: sound[:len(sound) // 2],
    "without its end": lambda sound: sound[:-30],
    "overwritten": lambda sound: sound[:100] + b"\xff" * 2000 + sound[2100:],
}
STATES = {
    "command in a zip": lambda state, weights, name, trap: {
        **state, "more": Command(f"touch {trap}")},
    "whole module": lambda state, weights, name, trap: {"model": torch.nn.Linear(2, 2)},
    "list": lambda state, weights, name, trap: [1, 2, 3],
    "plain tensor": lambda state, weights, name, trap: torch.zeros(3),
    "other format": lambda state, weights, name, trap: {**state, "format": "pipnet-0"},
    "no weights": lambda state, weights, name, trap: {
        k: v for k, v in state.items() if k not in ("weights", "ema", "model")},
    "no arguments": lambda state, weights, name, trap: {
        k: v for k, v in state.items() if k != "args"},
    "other keys": lambda state, weights, name, trap: everywhere(state, {
        f"module.{k}": v for k, v in weights.items()}),
    "other shapes": lambda state, weights, name, trap: everywhere(state, {
        k: v[:1] if v.dim() else v for k, v in weights.items()}),
    "no tensors": lambda state, weights, name, trap: everywhere(state, dict.fromkeys(weights, 1.5)),
    "not finite": lambda state, weights, name, trap: everywhere(state, {
        **weights, name: weights[name] * float("nan")}),
    "other backbone": lambda state, weights, name, trap: {
        **state, "args": {**state["args"], "backbone": "no_such_net"}},
    "broken arguments": lambda state, weights, name, trap: {
        **state, "args": {**state["args"], "num_nb": "many"}},
}
# --resume and --pretrained read neither scheme nor crop from the file.
ONLY_PREDICT = {
    "broken scheme": lambda state, weights, name, trap: {
        **state, "scheme": {**state["scheme"], "flip": [0] * 68}},
    "no crop": lambda state, weights, name, trap: {**state, "crop": {"rule": "square"}},
}
STATES |= ONLY_PREDICT
KINDS = ["directory", "missing", "picture", "foreign zip", "pickle", *BYTES, *STATES]


def everywhere(state, weights):
    """Return a state with all its weights replaced."""
    return {**state, **{k: weights for k in ("weights", "ema", "model") if k in state}}


def check_refusal(child, path, trap):
    """Check for exit code 2, one line that names the file, no traceback, and no code run."""
    assert child.code == 2, child.text
    lines = [line for line in child.text.strip().splitlines() if line.startswith("error:")]
    assert len(lines) == 1, child.text
    assert child.text.strip().endswith(lines[0]), child.text
    assert pathlib.Path(path).name in lines[0]
    assert len(lines[0]) < 600, lines[0]
    assert "steps in a row" not in child.text
    assert "Traceback" not in child.text, child.text
    assert "Warning" not in child.text, child.text
    assert not trap.exists()


def test_there_are_twenty_kinds():
    assert len(KINDS) + len(ONNX) >= 20
    assert len(KINDS) >= 20


@pytest.mark.parametrize("kind", KINDS)
def test_a_malformed_checkpoint_is_refused_for_testing(warm, good, tmp_path, kind):
    path, trap = tmp_path / "bad.pt", tmp_path / "trap"
    damaged_pt(kind, path, good / "best.pt", trap)
    child = warm.run("--test", "--exp", path, "--data-dir", warm.faces, "--device", "cpu")
    check_refusal(child, path, trap)
    with pytest.raises(UserError, match="bad.pt"):
        Predictor(path)
    assert not trap.exists()


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in (
    *ONLY_PREDICT, "no arguments", "other backbone", "broken arguments", "not finite", "missing")])
def test_a_malformed_checkpoint_is_refused_as_pretrained(warm, good, tmp_path, kind):
    path, trap = tmp_path / "bad.pt", tmp_path / "trap"
    damaged_pt(kind, path, good / "best.pt", trap)
    child = warm.run("--train", *warm.flags, "--pretrained", path, "--exp", f"begin-{len(kind)}")
    shutil.rmtree(warm.folder(f"begin-{len(kind)}"), ignore_errors=True)
    check_refusal(child, path, trap)


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in (
    *ONLY_PREDICT, "missing")] + ["half a run", "moments of another net", "a place outside"])
def test_a_malformed_checkpoint_is_refused_for_resuming(warm, good, tmp_path, kind):
    folder, trap = warm.folder("resumed"), tmp_path / "trap"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    shutil.copy(good / "args.yaml", folder)
    if kind in KINDS:
        damaged_pt(kind, folder / "last.pt", good / "last.pt", trap)
    else:
        state = torch.load(good / "last.pt", weights_only=True)
        if kind == "half a run":
            del state["optimizer"]
        elif kind == "a place outside":
            state["epoch"] = 99
        else:
            moments = state["optimizer"]["state"]
            moments[0]["exp_avg"] = torch.zeros(7, 7)
        torch.save(state, folder / "last.pt")
    child = warm.run("--resume", "--exp", "resumed")
    check_refusal(child, "last.pt", trap)


def test_a_valid_last_checkpoint_can_be_used_everywhere(warm, good, tmp_path):
    """The reader does not refuse everything."""
    shutil.copy(good / "last.pt", tmp_path / "copy.pt")
    predictor = Predictor(tmp_path / "copy.pt")
    landmarks, confidence = predictor(numpy.zeros((2, 64, 64, 3), numpy.uint8))
    assert landmarks.shape == (2, 68, 2)
    assert confidence.shape == (2, 68)
    for name in ("best.pt", "last.pt"):
        child = warm.run("--train", *warm.flags, "--pretrained", good / name, "--exp",
                         f"from-{name[:4]}", hook="step:1:TERM")
        assert child.code == 143, child.text
        assert f"{name}: loaded" in child.text, child.text


def graph(points=68, inputs="uint8", outputs=("landmarks", "confidence"), size=64, **meta):
    """A tiny ONNX model in the form of ours, with metadata `meta`; bytes."""
    helper, kinds = onnx.helper, onnx.TensorProto
    kind = {"uint8": kinds.UINT8, "float": kinds.FLOAT}[inputs]
    where = numpy.full((1, points, 2), 0.5, numpy.float32)
    nodes = [
        helper.make_node("Cast", ["images"], ["floats"], to=kinds.FLOAT),
        helper.make_node("ReduceMean", ["floats", "axes"], ["mean"], keepdims=0),
        helper.make_node("Mul", ["mean", "zero"], ["nothing"]),
        helper.make_node("Reshape", ["nothing", "column"], ["columns"]),
        helper.make_node("Reshape", ["nothing", "cube"], ["cubes"]),
        helper.make_node("Add", ["cubes", "where"], [outputs[0]]),
        helper.make_node("Add", ["columns", "sure"], [outputs[1]])]
    constants = {"axes": numpy.array([1, 2, 3]), "zero": numpy.float32(0),
                 "column": numpy.array([-1, 1]), "cube": numpy.array([-1, 1, 1]), "where": where,
                 "sure": numpy.ones((1, points), numpy.float32)}
    model = helper.make_model(
        helper.make_graph(
            nodes, "tiny", [helper.make_tensor_value_info("images", kind, ["n", 3, size, size])],
            [helper.make_tensor_value_info(outputs[0], kinds.FLOAT, ["n", points, 2]),
             helper.make_tensor_value_info(outputs[1], kinds.FLOAT, ["n", points])],
            [onnx.numpy_helper.from_array(numpy.asarray(v), k) for k, v in constants.items()]),
        opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    described = {"format": "pipnet-1", "input_size": str(size),
                 "scheme": json.dumps(SCHEMES["300W"].state()),
                 "crop": json.dumps({"rule": "square", "scale": 1.2}), **meta}
    helper.set_model_props(model, {k: v for k, v in described.items() if v is not None})
    return model.SerializeToString()


def outside_weights():
    """A model whose constants lie in a file outside its folder."""
    model = onnx.load_from_string(graph())
    tensor = model.graph.initializer[4]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", "../../../../../../etc/passwd"), ("length", "544")):
        tensor.external_data.add(key=key, value=value)
    return model.SerializeToString()


ONNX = {
    "empty": lambda: b"", "text": lambda: b"no model\n" * 30, "zeros": lambda: bytes(3000),
    "half": lambda: graph()[:len(graph()) // 2],
    "overwritten": lambda: graph()[:50] + b"\xff" * 300 + graph()[350:],
    "no metadata": lambda: graph(input_size=None, scheme=None, crop=None),
    "broken metadata": lambda: graph(scheme="{no json"),
    "size in words": lambda: graph(input_size="large"),
    "float pixels": lambda: graph(inputs="float"),
    "other outputs": lambda: graph(outputs=("boxes", "scores")),
    "weights elsewhere": outside_weights,
    "scheme of another kind": lambda: graph(scheme="[1, 2, 3]"),
    "another size than it says": lambda: graph(input_size="96"),
    "another scheme than it says": lambda: graph(points=98),
}


@pytest.mark.parametrize("kind", ["directory", *ONNX])
def test_a_malformed_onnx_file_is_refused(warm, tmp_path, kind):
    path = tmp_path / "bad.onnx"
    path.mkdir() if kind == "directory" else path.write_bytes(ONNX[kind]())
    child = warm.run("--test-onnx", "--exp", path, "--data-dir", warm.faces, "--device", "cpu")
    check_refusal(child, path, tmp_path / "trap")
    with pytest.raises(UserError, match="bad.onnx"):
        Predictor(path)


def test_a_valid_onnx_file_is_accepted(tmp_path):
    (tmp_path / "good.onnx").write_bytes(graph())
    landmarks, _ = Predictor(tmp_path / "good.onnx")(numpy.zeros((3, 64, 64, 3), numpy.uint8))
    assert landmarks.shape == (3, 68, 2)
    assert (landmarks == 0.5).all()


def test_no_module_unpickles_code():
    """torch.load appears with weights_only=True alone, pickle only in the released-IRNet reader."""
    for path in checkpoint.pathlib.Path(warm_module.ROOT).glob("**/*.py"):
        if {"tests", "tools", ".venv"} & set(path.parts):
            continue
        text = path.read_text(encoding="utf-8")
        assert text.count("torch.load(") == text.count("weights_only=True)"), path
        if path.name != "released.py":
            assert "import pickle" not in text, path
            assert "allow_pickle=True" not in text, path
