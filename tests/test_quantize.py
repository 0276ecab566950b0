"""Int8 export: which nodes are quantized, predictions close to float, calibration crops."""
import pathlib

import cv2
import numpy
import onnx
import pytest
import torch

from nets.model import LandmarkNet
from utils import args, checkpoint, packing
from utils.data import dataset
from utils.data.drawn_faces import render
from utils.deploy import export, quantize
from utils.errors import UserError
from utils.landmarks.schemes import SCHEMES
from utils.predictor import Predictor
from utils.training import loss

SIZE, FACES = 64, 12
SCHEME = SCHEMES["300W"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A prepared set of drawn faces whose test images do not exist: reading one would fail."""
    folder = tmp_path_factory.mktemp("set")
    lines = []
    for i in range(FACES):
        image, points = render.render((0, i), 160)
        low, high = points.min(0) - 10, points.max(0) + 10
        box = numpy.array([*low, *high])
        x, y = (int(v) for v in low.clip(0))
        part = image[y:int(high[1]), x:int(high[0])]
        cv2.imwrite(str(folder / f"{i}.png"), cv2.resize(part, (SIZE, SIZE))[..., ::-1])
        points = (points - (x, y)) / (numpy.minimum(box[2:].astype(int), 160) - (x, y))
        lines.append(f"{i}.png " + " ".join(f"{v:.6f}" for v in points.flatten()))
    (folder / "train.txt").write_text("\n".join(lines) + "\n")
    (folder / "test.txt").write_text(lines[0].replace("0.png", "absent.png") + "\n")
    (folder / "val.txt").write_text(lines[1].replace("1.png", "absent.png") + "\n")
    return folder


@pytest.fixture(scope="module")
def float_model(folder, tmp_path_factory):
    """The .onnx of a small MobileNetV3, trained on the drawn faces for 50 steps."""
    torch.manual_seed(0)
    prepared = dataset.PreparedSet(folder)
    faces = dataset.FaceDataset(prepared.lists["train"], 1, SIZE)
    images = torch.stack([faces[i][0] for i in range(FACES)]).permute(0, 3, 1, 2)
    landmarks = torch.stack([faces[i][1] for i in range(FACES)])
    model = LandmarkNet(prepared.scheme, "mobilenetv3_small_050", num_nb=3)
    criterion = loss.build_loss(model, 10.0, 1.0, "l1")
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(50):
        optimizer.zero_grad()
        criterion(model(images), landmarks).backward()
        optimizer.step()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
            module.reset_running_stats()
    with torch.no_grad():
        model(images)
    settings = args.load_args({"backbone": "mobilenetv3_small_050", "num_nb": 3,
                               "input_size": SIZE, "stride": 32})
    path = tmp_path_factory.mktemp("weights") / "best.pt"
    checkpoint.save({**checkpoint.describe(settings, prepared.scheme, prepared.crop),
                     "weights": model.state_dict()}, path)
    return export.export_onnx(checkpoint.load_model(path), path.with_suffix(".onnx"))


@pytest.fixture(scope="module")
def int8_model(folder, float_model):
    """What `main.py --export --int8 --data-dir folder` writes."""
    return quantize.export_int8(float_model, args.load_args({"data_dir": str(folder)}))


def test_the_int8_file_is_named_after_the_weights_and_has_their_metadata(float_model, int8_model):
    assert int8_model == float_model.parent / "best.int8.onnx"
    first, second = Predictor(float_model), Predictor(int8_model)
    assert first.input_size == second.input_size == SIZE
    assert first.crop == second.crop
    assert first.scheme.state() == second.scheme.state()
    assert [p.name for p in float_model.parent.glob("*tmp*")] == []
    assert int8_model.stat().st_size < float_model.stat().st_size
    assert onnx.load(int8_model).ir_version == 8


def test_it_predicts_like_the_float_model_at_any_batch_size(folder, float_model, int8_model):
    images = quantize.calibration_crops(dataset.PreparedSet(folder), SIZE)
    expected, sure = Predictor(float_model)(images)
    found, confidence = Predictor(int8_model)(images)
    assert numpy.abs(found - expected).mean() < 0.01
    assert numpy.abs(confidence - sure).mean() < 0.05
    # A float model would give exactly the same numbers.
    assert numpy.abs(found - expected).max() > 1e-5
    one, _ = Predictor(int8_model)(images[:1])
    numpy.testing.assert_allclose(one, found[:1], atol=1e-4)


def test_packed_and_unpacked_files_are_quantized_alike(folder, float_model, tmp_path, monkeypatch):
    model = checkpoint.load_model(float_model.with_suffix(".pt"))
    for value in (*model.parameters(), *model.buffers()):
        if value.is_floating_point():
            value.data = value.data.half().float()
    halves = export.export_onnx(model, tmp_path / "halves.onnx")
    with monkeypatch.context() as patch:
        patch.setattr(packing, "MIN_PACKED_SIZE", 10**9)
        whole = export.export_onnx(model, tmp_path / "whole.onnx")
    assert halves.stat().st_size < 0.65 * whole.stat().st_size
    images = quantize.calibration_crops(dataset.PreparedSet(folder), SIZE)
    first, second = (quantize.quantize(path, images[:8]) for path in (halves, whole))
    kinds = [[node.op_type for node in onnx.load(path).graph.node] for path in (first, second)]
    assert kinds[0] == kinds[1]
    assert "QuantizeLinear" in kinds[0]
    # What stays float, such as the heads, is packed in 16 bits again.
    assert any(t.data_type == onnx.TensorProto.FLOAT16 for t in onnx.load(first).graph.initializer)
    # Rounding to int8 can depend on the last bit of a float.
    assert numpy.abs(Predictor(first)(images)[0] - Predictor(second)(images)[0]).mean() < 0.01


def test_backbone_is_int8_and_heads_and_squeezes_are_float(int8_model):
    graph = onnx.load(int8_model).graph
    constants = {t.name: t for t in graph.initializer}
    made = {name: node for node in graph.node for name in node.output}
    int8, float32 = [], []
    for node in graph.node:
        if node.op_type == "Conv":
            source = made.get(node.input[1])
            if source is None:
                float32.append(node.input[1])
            else:
                assert source.op_type == "DequantizeLinear"
                weight, scale = (constants[name] for name in source.input[:2])
                assert weight.data_type == onnx.TensorProto.INT8
                assert list(scale.dims) == [weight.dims[0]], "one scale an output channel"
                int8.append(weight.name)
    assert len(int8) > 20
    assert not any(".se." in n or "head" in n for n in int8)
    # One convolution for the scores; offsets of landmarks and neighbours are a matrix product.
    assert sum("head" in n for n in float32) == 1
    # Folding batch norm renames the first convolution; a depthwise one follows it.
    others = [n for n in float32 if "head" not in n and ".se." not in n]
    assert [list(constants[n].dims[1:]) for n in others] == [[3, 3, 3], [1, 3, 3]]
    kernels = [onnx.numpy_helper.to_array(constants[n]).astype(int) for n in int8]
    # Depthwise kernels have eight bits, the others seven.
    assert {abs(k).max() > 64 for k in kernels if k.shape[1] == 1} == {True}
    assert max(abs(k).max() for k in kernels if k.shape[1] > 1) <= 64
    # The input image is uint8, but its normalisation must stay float.
    cast = next(n for n in graph.node if "images" in n.input)
    assert cast.op_type == "Cast"


def test_calibration_reads_training_crops_only(folder):
    prepared = dataset.PreparedSet(folder)
    found = quantize.calibration_crops(prepared, SIZE)
    stored = [cv2.imread(str(path))[..., ::-1] for path in prepared.lists["train"].images]
    assert numpy.array_equal(found, numpy.stack(stored))
    del prepared.lists["train"]
    with pytest.raises(UserError, match="no train.txt"):
        quantize.calibration_crops(prepared, SIZE)


def test_many_training_crops_are_subsampled_evenly(folder, monkeypatch):
    prepared = dataset.PreparedSet(folder)
    monkeypatch.setattr(quantize, "CALIBRATION_CROPS", 3)
    found = quantize.calibration_crops(prepared, SIZE)
    whole = dataset.FaceDataset(prepared.lists["train"], 1, SIZE)
    assert numpy.array_equal(found, numpy.stack([whole[i][0].numpy() for i in (0, 6, 11)]))


def test_a_foreign_onnx_file_is_refused(tmp_path):
    node = onnx.helper.make_node("Identity", ["a"], ["b"])
    value = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [1]) for n in "ab"]
    graph = onnx.helper.make_graph([node], "strange", value[:1], value[1:])
    path = tmp_path / "strange.onnx"
    onnx.save(onnx.helper.make_model(graph), path)
    with pytest.raises(UserError, match="not of this repository"):
        quantize.quantize(path, numpy.zeros((1, 8, 8, 3), numpy.uint8))
    assert [p.name for p in pathlib.Path(tmp_path).iterdir()] == ["strange.onnx"]


def test_int8_implies_export():
    assert {"int8", "export"} <= args.parse(["--int8", "--exp", "one"]).actions


def test_prelu_is_exported_as_an_equal_sum_of_convolutions():
    torch.manual_seed(0)
    prelu = torch.nn.PReLU(6)
    torch.nn.init.uniform_(prelu.weight, -1, 2)
    x = torch.randn(2, 6, 5, 4)
    torch.testing.assert_close(export._SplitPReLU(prelu)(x), prelu(x), rtol=1e-5, atol=1e-6)
    net = torch.nn.Sequential(prelu, torch.nn.Sequential(torch.nn.PReLU(6)))
    exported = export._Predict(net)
    assert not any(isinstance(m, torch.nn.PReLU) for m in exported.modules())
