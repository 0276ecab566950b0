"""The shape head: what it can express, that the fit finds it, and that it goes with the weights."""
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


def test_a_fresh_head_changes_nothing_and_a_fitted_one_follows_the_face():
    landmarks = torch.from_numpy(faces(4)).float()
    head = ShapeHead(68)
    assert torch.equal(head(landmarks), landmarks)
    torch.nn.init.normal_(head.weight, std=0.01)
    torch.nn.init.normal_(head.bias, std=0.01)
    with torch.no_grad():
        moved = head(landmarks)
        assert (moved - landmarks).abs().max() > 1e-3
        torch.testing.assert_close(head(landmarks * 3 + 0.7), moved * 3 + 0.7, atol=1e-5, rtol=0)


def test_the_fit_finds_a_correction_that_there_is():
    truth = faces(600)
    # Landmark 3 is seen where 2 and 4 have their middle, and 30 too high by a share of the size.
    found = truth.copy()
    found[:, 3] = found[:, 3] * 0.5 + (truth[:, 2] + truth[:, 4]) * 0.25
    sizes = numpy.linalg.norm(truth - truth.mean(1, keepdims=True), axis=(1, 2))
    found[:, 30, 1] -= 0.02 * sizes
    head = shape_fit.regress(*shape_fit._normalised(found[:500], truth[:500]), 1e-9)
    with torch.no_grad():
        mended = head(torch.from_numpy(found[500:]).float()).numpy()
    before, after = (numpy.abs(landmarks - truth[500:]).max((0, 2))
                     for landmarks in (found[500:], mended))
    assert before[3] > 0.01
    assert before[30] > 0.05
    assert after.max() < 2e-3


def test_validation_decides_whether_it_is_kept(drawn_set, tiny_weights, monkeypatch):
    prepared = PreparedSet(drawn_set)
    model = checkpoint.load_model(tiny_weights)
    head, before, after = shape_fit.fit(model, prepared)
    # An untrained network is wrong by more than any shape explains, and so is easy to mend.
    assert head is not None
    assert after < 0.9 * before
    # A head that was fitted to something else mends nothing.
    regress = shape_fit.regress
    monkeypatch.setattr(shape_fit, "regress", lambda shapes, wrong, ridge: regress(
        shapes, 0.1 * numpy.ones_like(wrong) * numpy.arange(wrong.shape[1]), ridge))
    head, before, worse = shape_fit.fit(model, prepared)
    assert head is None
    assert worse > before


def test_labels_that_lie_to_one_side_are_followed(drawn_set, tiny_weights):
    prepared = PreparedSet(drawn_set)
    model = checkpoint.load_model(tiny_weights)
    assert model.args.flip == 0.5
    faces, found = prepared.lists["test"], []
    for shift in (0, 0.02):
        for name in ("train", "val"):
            prepared.lists[name].points[..., 0] += shift
        model.shape = None
        model.shape = shape_fit.fit(model, prepared)[0]
        found.append(predict.predict_list(predict.torch_predict(model, torch.device("cpu")), faces,
                                          prepared.margin, model.input_size))
    # Mirrored labels lie to the other side, and leave nothing of it.
    assert (found[1] - found[0]).mean((0, 1)) == pytest.approx((0.02, 0), abs=0.003)


def test_the_flip_test_does_not_average_it_away(tiny_weights):
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


def test_a_fit_that_gains_nothing_leaves_the_file(drawn_set, tiny_weights, tmp_path, monkeypatch):
    path = tmp_path / "mine.pt"
    shutil.copy(tiny_weights, path)
    monkeypatch.setattr(shape_fit, "fit", lambda *_: (None, 0.1, 0.2))
    typed = ["--fit-shape", "--exp", str(path), "--data-dir", str(drawn_set), "--workers", "0"]
    main.dispatch(args.parse(typed))
    assert path.read_bytes() == tiny_weights.read_bytes()


def test_it_goes_with_the_weights(drawn_set, tiny_weights, weights, capsys):
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
    # Once more it is fitted to the network and not to itself.
    main.dispatch(args.parse(typed))
    assert Predictor(path)(crops())[0] == pytest.approx(moved, abs=1e-6)
    publish.publish(path, weights / "shipped.pt")
    assert Predictor(weights / "shipped.onnx")(crops())[0] == pytest.approx(moved, abs=2e-3)


def test_a_training_starts_from_the_network_without_it(drawn_set, tiny_weights, weights):
    path = weights / "mine.pt"
    shutil.copy(tiny_weights, path)
    main.dispatch(args.parse(["--fit-shape", "--exp", str(path), "--data-dir", str(drawn_set),
                              "--workers", "0"]))
    folder = trainer.train(args.load_args({
        "data_dir": str(drawn_set), "exp": "next", "backbone": "mobilenetv3_small_050",
        "input_size": 64, "epochs": 1, "workers": 0, "device": "cpu", "pretrained": str(path)}))
    assert not any(name.startswith("shape.") for name in
                   checkpoint.read(folder / "best.pt")["weights"])


def test_mistakes_are_one_line(drawn_set, tiny_weights, tmp_path):
    folder = shutil.copytree(drawn_set, tmp_path / "set")
    (folder / "val.txt").unlink(missing_ok=True)
    (folder / "train.txt").unlink()
    with pytest.raises(UserError, match="has no train faces"):
        shape_fit.fit_weights(args.load_args({"exp": str(tiny_weights), "data_dir": str(folder)}))
