"""The shape head: its equivariance, its fit, and its storage with the weights."""
import shutil

import numpy
import pytest
import torch

import main
from nets.shape import ShapeHead
from utils import args, checkpoint
from utils.data.dataset import PreparedSet
from utils.deploy import publish
from utils.deploy.export import export_weights
from utils.errors import UserError
from utils.evaluation import predict
from utils.landmarks.schemes import SCHEMES
from utils.predictor import Predictor
from utils.training import shape_fit, trainer

MEAN = SCHEMES["300W"].mean_face


def faces(count, seed=0):
    """Landmarks (count, 68, 2) of different shapes, sizes and places."""
    rng = numpy.random.default_rng(seed)
    return (MEAN + rng.normal(0, 0.02, (count, 68, 2))) * rng.uniform(0.5, 1.5, (count, 1, 1)) \
        + rng.uniform(-0.2, 0.2, (count, 1, 2))


def crops(count=3):
    return numpy.random.default_rng(0).integers(0, 256, (count, 64, 64, 3), numpy.uint8)


def test_a_new_head_changes_nothing_and_a_fitted_one_is_equivariant():
    landmarks = torch.from_numpy(faces(4)).float()
    head = ShapeHead(68)
    assert torch.equal(head(landmarks), landmarks)
    torch.nn.init.normal_(head.weight, std=0.01)
    torch.nn.init.normal_(head.bias, std=0.01)
    with torch.no_grad():
        moved = head(landmarks)
        assert (moved - landmarks).abs().max() > 1e-3
        torch.testing.assert_close(head(landmarks * 3 + 0.7), moved * 3 + 0.7, atol=1e-5, rtol=0)


def test_the_fit_recovers_a_known_correction():
    truth = faces(600)
    # Landmark 3 is moved towards the middle of 2 and 4, and 30 up by a share of the size.
    found = truth.copy()
    found[:, 3] = found[:, 3] * 0.5 + (truth[:, 2] + truth[:, 4]) * 0.25
    sizes = numpy.linalg.norm(truth - truth.mean(1, keepdims=True), axis=(1, 2))
    found[:, 30, 1] -= 0.02 * sizes
    head = shape_fit.ridge_regression(*shape_fit._normalise(found[:500], truth[:500]), 1e-9)
    with torch.no_grad():
        mended = head(torch.from_numpy(found[500:]).float()).numpy()
    before, after = (numpy.abs(landmarks - truth[500:]).max((0, 2))
                     for landmarks in (found[500:], mended))
    assert before[3] > 0.01
    assert before[30] > 0.05
    assert after.max() < 2e-3


def test_validation_decides_whether_the_head_is_stored(drawn_set, tiny_weights, monkeypatch):
    prepared = PreparedSet(drawn_set)
    model = checkpoint.load_model(tiny_weights)
    head, before, after = shape_fit.fit_head(model, prepared)
    # The errors of an untrained network are large and easy to correct.
    assert head is not None
    assert after < 0.9 * before
    # A head that was fitted to other residuals corrects nothing.
    regress = shape_fit.ridge_regression
    monkeypatch.setattr(shape_fit, "ridge_regression", lambda shapes, residuals, ridge: regress(
        shapes, 0.1 * numpy.ones_like(residuals) * numpy.arange(residuals.shape[1]), ridge))
    head, before, worse = shape_fit.fit_head(model, prepared)
    assert head is None
    assert worse > before


def test_a_left_right_bias_of_the_labels_is_learnt(drawn_set, tiny_weights):
    prepared = PreparedSet(drawn_set)
    model = checkpoint.load_model(tiny_weights)
    assert model.args.flip == 0.5
    faces, found = prepared.lists["test"], []
    for shift in (0, 0.02):
        for name in ("train", "val"):
            prepared.lists[name].points[..., 0] += shift
        model.shape = None
        model.shape = shape_fit.fit_head(model, prepared)[0]
        found.append(predict.predict_list(predict.torch_predict(model, torch.device("cpu")), faces,
                                          prepared.margin, model.input_size))
    # With mirrored faces the bias would cancel out.
    assert (found[1] - found[0]).mean((0, 1)) == pytest.approx((0.02, 0), abs=0.003)


def test_the_flip_test_keeps_the_correction(tiny_weights):
    model = checkpoint.load_model(tiny_weights, shape=False)
    model.flip_test = True
    images = torch.from_numpy(crops()).permute(0, 3, 1, 2)
    with torch.no_grad():
        plain, confidence = model.predict(images)
        model.shape = ShapeHead(68)
        model.shape.bias[::2] = 0.01
        mended, same = model.predict(images)
        assert torch.equal(mended, model.shape(plain))
        assert torch.equal(same, confidence)
    assert (mended - plain)[..., 0].min() > 0.001


def test_a_fit_without_gain_keeps_the_file(drawn_set, tiny_weights, tmp_path, monkeypatch):
    path = tmp_path / "mine.pt"
    shutil.copy(tiny_weights, path)
    monkeypatch.setattr(shape_fit, "fit_head", lambda *_: (None, 0.1, 0.2))
    typed = ["--fit-shape", "--exp", str(path), "--data-dir", str(drawn_set), "--workers", "0"]
    main.dispatch(args.parse(typed))
    assert path.read_bytes() == tiny_weights.read_bytes()


def test_the_head_is_stored_exported_and_published(drawn_set, tiny_weights, weights, capsys):
    path = weights / "mine.pt"
    shutil.copy(tiny_weights, path)
    export_weights(path)
    plain = Predictor(path)(crops())[0]
    typed = ["--fit-shape", "--exp", str(path), "--data-dir", str(drawn_set), "--workers", "0"]
    main.dispatch(args.parse(typed))
    text = capsys.readouterr().out
    assert "shape head of" in text
    assert "exporting" in text
    fitted, onnx = Predictor(path), Predictor(path.with_suffix(".onnx"))
    moved = fitted(crops())[0]
    assert abs(moved - plain).max() > 0.01
    assert onnx(crops())[0] == pytest.approx(moved, abs=1e-5)
    without = checkpoint.load_model(path, shape=False).predict(
        torch.from_numpy(crops()).permute(0, 3, 1, 2))[0].detach().numpy()
    assert without == pytest.approx(plain, abs=1e-6)
    # A second fit starts from the network without the head.
    main.dispatch(args.parse(typed))
    assert Predictor(path)(crops())[0] == pytest.approx(moved, abs=1e-6)
    publish.publish(path, weights / "shipped.pt")
    assert Predictor(weights / "shipped.onnx")(crops())[0] == pytest.approx(moved, abs=2e-3)


def test_a_training_starts_from_the_network_without_the_head(drawn_set, tiny_weights, weights):
    path = weights / "mine.pt"
    shutil.copy(tiny_weights, path)
    main.dispatch(args.parse(["--fit-shape", "--exp", str(path), "--data-dir", str(drawn_set),
                              "--workers", "0"]))
    folder = trainer.train(args.load_args({
        "data_dir": str(drawn_set), "exp": "next", "backbone": "mobilenetv3_small_050",
        "input_size": 64, "epochs": 1, "workers": 0, "device": "cpu", "pretrained": str(path)}))
    assert not any(name.startswith("shape.") for name in
                   checkpoint.read(folder / "best.pt")["weights"])


def test_a_set_without_training_faces_is_an_error(drawn_set, tiny_weights, tmp_path):
    folder = shutil.copytree(drawn_set, tmp_path / "set")
    (folder / "val.txt").unlink(missing_ok=True)
    (folder / "train.txt").unlink()
    with pytest.raises(UserError, match="has no train faces"):
        shape_fit.fit_weights(args.load_args({"exp": str(tiny_weights), "data_dir": str(folder)}))
