"""The lid head: closing lids, its fit, and the files that store it."""
import json
import shutil

import cv2
import numpy
import pytest
import torch

import main
from nets.lids import LidHead
from utils import args, checkpoint
from utils.deploy import publish, raw
from utils.deploy.export import export_weights
from utils.drowsiness import eyes
from utils.evaluation import eyes as scores
from utils.landmarks import crop, eyelids
from utils.landmarks.schemes import SCHEMES
from utils.predictor import Predictor
from utils.training import lid_fit

SCHEME = SCHEMES["300W"]


@pytest.mark.parametrize("name", ["300W", "WFLW", "LaPa"])
def test_lids_of_closed_eyes_meet_and_no_other_point_moves(name):
    scheme = SCHEMES[name]
    head = LidHead(4, scheme).double()
    points = torch.from_numpy(numpy.stack([scheme.mean_face] * 3).astype(numpy.float64))
    drawn = head.close_lids(points, torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, 1.0]]).double())
    assert torch.equal(drawn[0], points[0])
    before, after = eyelids.aspect_ratios(points, scheme), eyelids.aspect_ratios(drawn, scheme)
    assert after[0] == pytest.approx([before[0][0], 0, before[0][0] / 2], abs=1e-9)
    assert after[1] == pytest.approx([before[1][0], before[1][0], 0], abs=1e-9)
    inside = sum((lid for eye in scheme.eyes for lid in eyelids.split_contour(eye)[1:]), [])
    outside = [i for i in range(scheme.points) if i not in inside]
    assert torch.equal(drawn[:, outside], points[:, outside])
    # The same place as the training labels of closed eyes, to within a hundredth of the crop.
    closed = torch.from_numpy(eyelids.close(scheme.mean_face, scheme))
    both = head.close_lids(points[:1], torch.ones(1, 2).double())[0]
    assert (both - closed).abs().max() < 0.01


def test_features_are_sampled_between_the_corners_of_each_eye():
    grid = 16
    y, x = torch.meshgrid(*[(torch.arange(grid) + 0.5) / grid] * 2, indexing="ij")
    features = torch.stack([x, y])[None]  # Each cell has its position in crop units.
    landmarks = torch.from_numpy(SCHEME.mean_face)[None].float()
    values = LidHead(2, SCHEME).eye_features(features, landmarks)
    assert values.shape == (1, 2, 6)
    for eye, contour in enumerate(SCHEME.eyes):
        a, b = landmarks[0, contour[0]], landmarks[0, contour[3]]
        expected = torch.cat([a + share * (b - a) for share in (0.25, 0.5, 0.75)])
        assert torch.allclose(values[0, eye], expected, atol=1e-5)


def test_a_new_head_changes_nothing():
    head = LidHead(3, SCHEME)
    points = torch.from_numpy(SCHEME.mean_face)[None].float()
    assert torch.allclose(head(torch.randn(1, 3, 8, 8), points), points, atol=1e-6)


def test_an_eye_counts_more_than_the_other_one():
    head = LidHead(1, SCHEME)
    with torch.no_grad():
        head.bias.copy_(torch.tensor([4.0, -4.0]))
        wink = head.closed_probability(torch.zeros(1, 2, 3))[0]
        head.bias.copy_(torch.tensor([4.0, -0.5]))
        doubt = head.closed_probability(torch.zeros(1, 2, 3))[0]
    assert wink[0] > 0.8
    assert wink[1] < 0.2
    assert doubt[0] > 0.9
    assert doubt[1] > 0.6


@pytest.fixture
def faces(tmp_path):
    """Readings of 60 small photos: dark or bright patches for eyes, the same landmarks."""
    rng, found = numpy.random.default_rng(0), []
    points = SCHEME.mean_face.astype(numpy.float64) * 80 + 10
    for i in range(60):
        image = rng.integers(90, 130, (100, 100, 3)).astype(numpy.uint8)
        for contour in SCHEME.eyes:
            cv2.fillConvexPoly(image, points[contour].round().astype(numpy.int32),
                               (20,) * 3 if i % 2 else (240,) * 3)
        cv2.imwrite(str(tmp_path / f"{i}.png"), image)
        confidence = numpy.full(68, 0.5)
        found.append(scores.EyeReading(tmp_path / f"{i}.png", bool(i % 2), points, confidence,
                                       eyes.read_eyes(points, confidence, SCHEME,
                                                      eyelids.EyeThresholds())))
    found.insert(7, scores.EyeReading(tmp_path / "none.png", True, None, None, None))
    return found


def test_the_fit_separates_states_that_landmarks_do_not(tiny_weights, faces):
    assert scores.score(faces)["auc"] == 0.5
    predictor = Predictor(tiny_weights, lids=False)
    head, unseen = lid_fit.fit_head(predictor, faces)
    assert [r.photo for r in unseen] == [r.photo for r in faces]
    assert unseen[7] is faces[7]
    assert scores.score(unseen)["auc"] > 0.99
    # The head itself, on nominal crops.
    shut = []
    for r in [r for r in faces if r.eyes is not None]:
        box, = crop.face_boxes(r.points_px[None], predictor.crop, SCHEME)
        image = crop.cut(cv2.imread(str(r.photo)), box, predictor.input_size)
        with torch.inference_mode():
            features = predictor.model.backbone(predictor.model.normalise(
                torch.from_numpy(image).permute(2, 0, 1)[None]))
            landmarks, _ = predictor.model.head.predict(features)
            shut.append(head.closed_probability(head.eye_features(features, landmarks))[0])
    shut = torch.stack(shut)
    assert shut[1::2].min() > 0.5 > shut[::2].max()


def test_random_labels_are_not_memorised(tiny_weights, faces):
    """Thresholds are fitted to readings of heads that were not fitted to the face."""
    rng = numpy.random.default_rng(3)
    faces = [scores.EyeReading(r.photo, bool(c), r.points_px, r.confidence, r.eyes)
             for r, c in zip(faces, rng.integers(0, 2, len(faces)))]
    _, unseen = lid_fit.fit_head(Predictor(tiny_weights, lids=False), faces)
    assert 0.2 < scores.score(unseen)["auc"] < 0.8


@pytest.fixture
def fitted(tiny_weights, weights):
    """mine.pt in weights/ with a lid head that closes the right eye and is unsure of the left."""
    path = weights / "mine.pt"
    shutil.copy(tiny_weights, path)
    model = checkpoint.load_model(path)
    head = LidHead(model.backbone.channels, model.scheme)
    with torch.no_grad():
        head.weight.normal_(std=0.01, generator=torch.Generator().manual_seed(0))
        head.bias.copy_(torch.tensor([7.0, -3.0]))
    lid_fit.store(eyelids.EyeThresholds(0.0, 0.3, 0.1, 0.1), head, path)
    return path


def crops(count=5):
    return numpy.random.default_rng(1).integers(0, 256, (count, 64, 64, 3), numpy.uint8)


def test_the_file_holds_the_head_and_can_be_used_without(fitted, tiny_weights):
    plain, confidence = Predictor(tiny_weights)(crops())
    without, _ = Predictor(fitted, lids=False)(crops())
    drawn, same = Predictor(fitted)(crops())
    assert numpy.array_equal(plain, without)
    assert numpy.array_equal(confidence, same)
    ratios, before = (eyelids.aspect_ratios(p, SCHEME) for p in (drawn, plain))
    assert (ratios[0] < 0.1 * before[0]).all()
    assert ((0.6 * before[1] < ratios[1]) & (ratios[1] < 0.97 * before[1])).all()


def test_onnx_closes_the_same_lids(fitted):
    export_weights(fitted)
    for ours, onnx in zip(Predictor(fitted)(crops()), Predictor(fitted.with_suffix(".onnx"))(
            crops())):
        assert ours == pytest.approx(onnx, abs=1e-5)


def test_raw_maps_exclude_the_lid_head(fitted, capsys):
    path = raw.export_weights(fitted, 13)
    assert "without the lid head" in capsys.readouterr().out
    described = json.loads(path.with_suffix(".json").read_text())
    assert "eyes" not in described
    assert "scheme" in described


def test_a_second_fit_replaces_the_head(fitted):
    head = LidHead(checkpoint.load_model(fitted).backbone.channels, SCHEME)
    lid_fit.store(eyelids.EyeThresholds(), head, fitted)
    plain, again = Predictor(fitted, lids=False), Predictor(fitted)
    assert plain(crops())[0] == pytest.approx(again(crops())[0], abs=1e-6)


def test_a_training_starts_without_the_head(fitted, tiny_weights):
    state = checkpoint.read(fitted)
    model = checkpoint.build_model(args.load_args(state["args"]), SCHEME)
    assert checkpoint.load_pretrained(model, fitted) == []
    assert model.lids is None
    plain = checkpoint.weights_of(checkpoint.read(tiny_weights))
    assert all(torch.equal(v, plain[k]) for k, v in model.state_dict().items())


def test_published_files_keep_the_head_and_averaged_weights_lose_it(fitted, tiny_weights, tmp_path):
    publish.publish(fitted, tmp_path / "whole.pt", with_onnx=False)
    assert checkpoint.load_model(tmp_path / "whole.pt").lids is not None
    publish.publish(fitted, tmp_path / "mean.pt", False, tiny_weights, 0.5)
    model = checkpoint.load_model(tmp_path / "mean.pt")
    assert model.lids is None
    assert model.eyes == eyelids.EyeThresholds()


def test_the_command_exports_again(weights, tiny_weights, faces, tmp_path, monkeypatch, capsys):
    path = weights / "mine.pt"
    shutil.copy(tiny_weights, path)
    export_weights(path)
    for r in faces:
        if r.eyes is not None:
            folder = tmp_path / ("closed" if r.closed else "open")
            folder.mkdir(exist_ok=True)
            shutil.copy(r.photo, folder / r.photo.name)
    by_name = {r.photo.name: r for r in faces}
    monkeypatch.setattr(scores, "predict_photos", lambda predictor, detector, photos, *_: [
        by_name[photo.name] for photo, _ in photos])
    # All faces have the same landmarks, to which thresholds alone could not be fitted.
    main.dispatch(args.parse(["--fit-eyes", "--exp", str(path), "--data-dir", str(tmp_path)]))
    text = capsys.readouterr().out
    assert "AUC 0.5000 without it, 1.0000 with heads fitted to other faces" in text
    assert "exporting" in text
    torch_eyes, onnx = Predictor(path), Predictor(path.with_suffix(".onnx"))
    assert torch_eyes.model.lids is not None
    assert torch_eyes.eyes == onnx.eyes != eyelids.EyeThresholds()
    assert torch_eyes(crops())[0] == pytest.approx(onnx(crops())[0], abs=1e-5)
