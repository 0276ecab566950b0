"""The ONNX file: inputs, outputs, metadata, equality with PyTorch, and when it is stale."""
import argparse
import json
import sys

import numpy
import onnx
import onnxruntime
import pytest
import torch

import main
from utils import checkpoint, provenance
from utils.args import load_args, parse
from utils.deploy.export import (
    export_onnx,
    export_weights,
    is_stale,
    licence,
    rewrite_ir_version,
)
from utils.deploy.formats import refresh
from utils.errors import UserError
from utils.predictor import Predictor


@pytest.fixture(scope="module")
def exported(tiny_weights, tmp_path_factory):
    model = checkpoint.load_model(tiny_weights)
    return model, export_onnx(model, tmp_path_factory.mktemp("onnx") / "net.onnx")


def test_inputs_outputs_and_metadata(exported):
    model, path = exported
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (images,), outputs = session.get_inputs(), session.get_outputs()
    assert images.type == "tensor(uint8)"
    assert images.shape[1:] == [3, 64, 64]
    assert isinstance(images.shape[0], str), "any batch"
    assert [o.name for o in outputs] == ["landmarks", "confidence"]
    described = session.get_modelmeta().custom_metadata_map
    assert described["input_size"] == "64"
    assert described["backbone"] == "mobilenetv3_small_050"
    scheme, crop = json.loads(described["scheme"]), json.loads(described["crop"])
    assert scheme["name"] == "300W"
    assert len(scheme["mean_face"]) == 68
    assert crop == model.crop
    assert not path.with_name("net.onnx.tmp").exists()
    onnx.checker.check_model(onnx.load(path), full_check=True)
    assert onnx.load(path).ir_version == 8


def test_without_onnxsim_the_file_predicts_the_same(exported, drawn_set, tmp_path, monkeypatch,
                                                    capsys):
    monkeypatch.setitem(sys.modules, "onnxsim", None)
    model, simplified = exported
    path = export_onnx(model, tmp_path / "net.onnx")
    assert "onnxsim is not installed" in capsys.readouterr().out
    images = numpy.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), numpy.uint8)
    for one, two in zip(Predictor(path)(images), Predictor(simplified)(images)):
        assert numpy.abs(numpy.array(one) - numpy.array(two)).max() < 1e-4


def test_a_file_of_a_newer_format_is_written_anew(exported, tmp_path):
    path, newer = tmp_path / "net.onnx", onnx.load(exported[1])
    newer.ir_version = 10
    onnx.save(newer, path)
    rewrite_ir_version(path)
    assert path.read_bytes() == exported[1].read_bytes()


def test_onnx_equals_pytorch(exported, drawn_set):
    model, path = exported
    images = numpy.random.default_rng(0).integers(0, 256, (7, 64, 64, 3), numpy.uint8)
    with torch.inference_mode():
        expected = model.predict(torch.from_numpy(images).permute(0, 3, 1, 2))
    predictor = Predictor(path)
    for n in (1, 3, 7):
        landmarks, confidence = predictor(images[:n])
        assert numpy.abs(landmarks - expected[0][:n].numpy()).max() * 64 < 1e-2
        assert numpy.abs(confidence - expected[1][:n].numpy()).max() < 1e-4
    assert ((confidence >= 0) & (confidence <= 1)).all()
    assert confidence.std() > 0
    landmarks, confidence = predictor(images[:0])
    assert landmarks.shape == (0, 68, 2)
    assert confidence.shape == (0, 68)


def test_half_precision_weights_halve_the_file_and_keep_the_output(tiny_weights, tmp_path):
    trained = checkpoint.load_model(tiny_weights)
    shipped = checkpoint.load_model(tiny_weights)
    for value in (*shipped.parameters(), *shipped.buffers()):
        if value.is_floating_point():
            value.data = value.data.half().float()
    large = export_onnx(trained, tmp_path / "a.onnx")
    small = export_onnx(shipped, tmp_path / "b.onnx")
    assert small.stat().st_size < 0.65 * large.stat().st_size
    kinds = {t.data_type for t in onnx.load(large).graph.initializer}
    assert onnx.TensorProto.FLOAT16 not in kinds, "float32 weights must not be rounded"
    images = numpy.random.default_rng(2).integers(0, 256, (3, 64, 64, 3), numpy.uint8)
    with torch.inference_mode():
        expected = shipped.predict(torch.from_numpy(images).permute(0, 3, 1, 2))
    for found, value in zip(Predictor(small)(images), expected):
        numpy.testing.assert_allclose(found, value.numpy(), atol=2e-5)


def test_predictor_is_the_same_from_either_file(exported, tiny_weights):
    _, path = exported
    images = numpy.random.default_rng(1).integers(0, 256, (2, 64, 64, 3), numpy.uint8)
    one, other = Predictor(path), Predictor(tiny_weights)
    for a, b in zip(one(images), other(images)):
        numpy.testing.assert_allclose(a, b, atol=1e-4)
    assert one.input_size == other.input_size == 64
    assert one.crop == other.crop
    assert one.scheme.state() == other.scheme.state()


def test_a_regression_has_no_confidence(exported, tmp_path):
    trained, path = exported
    assert Predictor(path).has_confidence
    args = load_args({"backbone": "test_resnet", "input_size": 64, "head": "regression"})
    model = checkpoint.build_model(args, trained.scheme)
    checkpoint.save({**checkpoint.describe(args, trained.scheme, trained.crop),
                     "weights": model.state_dict()}, tmp_path / "best.pt")
    for file in (tmp_path / "best.pt", export_weights(tmp_path / "best.pt")):
        assert not Predictor(file).has_confidence


def test_files_that_are_no_models(exported, tmp_path):
    (tmp_path / "bad.onnx").write_bytes(b"not a model")
    with pytest.raises(UserError, match="bad.onnx: cannot be used as an ONNX model"):
        Predictor(tmp_path / "bad.onnx")
    with pytest.raises(UserError, match="no such file"):
        Predictor(tmp_path / "gone.onnx")
    for name in ("pointer.onnx", "pointer.pt"):
        (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\nsize 3\n")
        with pytest.raises(UserError, match=f"{name}: is a pointer of Git LFS"):
            Predictor(tmp_path / name)
    model = onnx.load(exported[1])
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "foreign.onnx")
    with pytest.raises(UserError, match="not of this repository"):
        Predictor(tmp_path / "foreign.onnx")
    with pytest.raises(UserError, match="could not be written"):
        export_onnx(exported[0], tmp_path / "nowhere" / "net.onnx")


def test_a_requested_gpu_that_cannot_be_used_is_an_error(exported, monkeypatch):
    monkeypatch.setattr("utils.predictor._providers", lambda device: ["CPUExecutionProvider"])
    with pytest.raises(UserError, match="cannot use the GPU here"):
        Predictor(exported[1], "cuda")


def test_an_onnx_file_of_other_weights_is_stale(tiny_weights, tmp_path):
    path, state = tmp_path / "net.pt", checkpoint.read(tiny_weights)
    checkpoint.save(state, path)
    assert is_stale(path), "there is no file"
    export_onnx(checkpoint.load_model(path), path.with_suffix(".onnx"))
    assert not is_stale(path)
    eyes = checkpoint.load_model(path).eyes.state()
    checkpoint.save({**state, "eyes": {**eyes, "closed_below": 0.123}}, path)
    assert is_stale(path), "its thresholds differ"
    weights = checkpoint.weights_of(state)
    name = next(k for k, v in weights.items() if v.is_floating_point())
    checkpoint.save({**state, "weights": {**weights, name: weights[name] + 1}}, path)
    assert is_stale(path), "its weights differ"


@pytest.mark.parametrize("images", [
    numpy.zeros((1, 64, 64, 3), numpy.float32), numpy.zeros((1, 32, 32, 3), numpy.uint8),
    numpy.zeros((64, 64, 3), numpy.uint8), numpy.zeros((1, 64, 64, 1), numpy.uint8)])
def test_a_predictor_takes_no_other_images(tiny_weights, images):
    with pytest.raises(ValueError, match=r"expected uint8 \(N, 64, 64, 3\)"):
        Predictor(tiny_weights)(images)


def test_the_flip_test_is_exported(tiny_weights, tmp_path):
    path, state = tmp_path / "net.pt", checkpoint.read(tiny_weights)
    checkpoint.save(state, path)
    images = numpy.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), numpy.uint8)
    plain = Predictor(path)
    seen, mirrored = plain(images), plain(images[:, :, ::-1])
    flip = plain.scheme.flip
    landmarks = (seen[0] + mirrored[0][:, flip] * [-1, 1] + [1, 0]) / 2
    confidence = (seen[1] + mirrored[1][:, flip]) / 2
    export_weights(path)
    with pytest.raises(UserError, match="was exported without --flip-test; export it again"):
        Predictor(path.with_suffix(".onnx"), flip_test=True)
    assert not is_stale(path)
    export_weights(path, flip_test=True)
    assert not is_stale(path), "flip_test is a choice of the export"
    # A checkpoint with flip_test needs no option.
    checkpoint.save({**state, "flip_test": True}, path)
    assert not is_stale(path)
    for predictor in (Predictor(path), Predictor(path.with_suffix(".onnx"), flip_test=True)):
        numpy.testing.assert_allclose(predictor(images)[0], landmarks, atol=1e-5)
        numpy.testing.assert_allclose(predictor(images)[1], confidence, atol=1e-5)
        assert predictor(images[:1])[0].shape == (1, *landmarks.shape[1:])


def test_a_test_exports_a_stale_file_again(tiny_weights, tmp_path, capsys):
    path = tmp_path / "net.pt"
    checkpoint.save(checkpoint.read(tiny_weights), path)
    settings = argparse.Namespace(exp=str(path), flip_test=False)
    for _ in range(2):
        refresh(settings, {"test", "test_onnx"})
    assert capsys.readouterr().out.count("exporting") == 1
    path.with_suffix(".int8.onnx").touch()
    main.export(settings, {"export"})
    assert "net.int8.onnx was not written; --export --int8" in capsys.readouterr().out


def test_the_numbers_come_before_a_file_that_cannot_be_written(tiny_weights, drawn_set, tmp_path,
                                                               capsys):
    path = tmp_path / "net.pt"
    checkpoint.save(checkpoint.read(tiny_weights), path)
    path.with_suffix(".onnx").mkdir()  # Also an administrator cannot replace it by a file.
    command = ["--test-onnx", "--exp", str(path), "--data-dir", str(drawn_set)]
    with pytest.raises(UserError, match=r"net\.onnx: could not be written") as error:
        main.dispatch(parse(["--test", *command]))
    assert "\n" not in str(error.value)
    printed = capsys.readouterr().out
    assert "pytorch" in printed
    assert "onnx " not in printed.replace("net.onnx", "")
    with pytest.raises(UserError, match="could not be written"):
        main.dispatch(parse(command))
    assert not capsys.readouterr().out.replace(f"exporting {path.with_suffix('.onnx')}", "").strip()


def test_a_stale_file_keeps_its_flip_test(tiny_weights, tmp_path):
    path = tmp_path / "net.pt"
    state = checkpoint.read(tiny_weights)
    checkpoint.save(state, path)
    settings = argparse.Namespace(exp=str(path), flip_test=False)
    main.export(argparse.Namespace(exp=str(path), flip_test=True), {"export"})
    assert Predictor(path.with_suffix(".onnx")).flip_test
    state["weights"] = {name: value * 1.01 for name, value in state["weights"].items()}
    checkpoint.save(state, path)
    assert is_stale(path)
    refresh(settings, {"test", "test_onnx"})
    assert Predictor(path.with_suffix(".onnx")).flip_test
    assert not is_stale(path)
    main.export(settings, {"export"})
    assert not Predictor(path.with_suffix(".onnx")).flip_test


def test_the_file_carries_the_licence_of_its_data(exported):
    described = onnxruntime.InferenceSession(str(exported[1])).get_modelmeta().custom_metadata_map
    assert described["licence"].startswith("code MIT; weights: that of their data, ")
    assert licence(["300W", "mine"]) == (
        "code MIT; weights: that of their data, 300W (research only, non-commercial) and mine (see "
        "its publisher)")
    assert "drawn by the repository" in licence(["samples"])


def test_weights_inherit_the_data_sets_of_their_parents(tiny_weights, tmp_path):
    args = {"data_dir": "/x/300W+eyes-256", "unlabelled_dir": "lfw", "gssl": True,
            "input_size": 256, "pretrained": "timm", "teacher": "none"}
    assert provenance.training_sets(args, checkpoint.read) == ["300W", "eyes", "lfw"]
    assert provenance.training_sets({**args, "data_dir": "samples"}, checkpoint.read) == ["samples"]
    begun = tmp_path / "begun.pt"
    checkpoint.save({**checkpoint.read(tiny_weights), "sets": ["300W", "lfw"]}, begun)
    own = {**args, "data_dir": "phone", "gssl": False, "pretrained": str(begun)}
    assert provenance.training_sets(own, checkpoint.read) == ["phone", "300W", "lfw"]
    taught = {**own, "pretrained": "none", "teacher": str(begun)}
    assert provenance.training_sets(taught, checkpoint.read) == ["phone", "300W", "lfw"]
    assert "research only" in licence(provenance.training_sets(own, checkpoint.read))
    # A file of an earlier version may lack a setting, or hold one by its old name.
    state = checkpoint.read(tiny_weights)
    older = {**state["args"], "data": "samples"}
    checkpoint.save({**state, "args": older, "sets": None}, begun)
    assert checkpoint.load_model(begun).sets == ["samples"]
    for missing in ("gssl", "merge"):
        older = {k: v for k, v in state["args"].items() if k != missing}
        checkpoint.save({**state, "args": older, "sets": None}, begun)
        assert checkpoint.load_model(begun).sets
