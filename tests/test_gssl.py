"""Self-training: plans, coarse targets, pseudo-labels and resumed rounds."""
import copy
import shutil

import cv2
import numpy
import pytest
import torch
import yaml
from helpers.halt import Halt

from nets.head import CoarseMaps, Maps, PIPHead
from utils import checkpoint, experiment, plots
from utils.args import load_args, parse
from utils.data import unlabelled
from utils.data.augment import Augment
from utils.data.dataset import FaceDataset, PreparedSet
from utils.data.face_list import FaceList
from utils.errors import UserError
from utils.landmarks.schemes import SCHEMES
from utils.training import gssl, loss, optim, stages, trainer
from utils.training.ddp import Ranks

EYES = SCHEMES["eyes"]
GROUPS = {"fine": ("score", "offset_x", "offset_y", "neighbour_x", "neighbour_y"),
          "half": ("half",), "quarter": ("quarter",)}


@pytest.fixture(scope="module")
def unlabelled_set(drawn_set, tmp_path_factory):
    """Make an unlabelled set of 12 drawn faces."""
    folder = tmp_path_factory.mktemp("unlabelled") / "set"
    (folder / "images").mkdir(parents=True)
    description = yaml.safe_load((drawn_set / "set.yaml").read_text())
    (folder / "set.yaml").write_text(yaml.safe_dump({k: description[k]
                                                     for k in ("size", "margin", "crop")}))
    images = sorted((drawn_set / "images").iterdir())[:12]
    for image in images:
        shutil.copy(image, folder / "images")
    (folder / "unlabelled.txt").write_text("".join(f"images/{i.name}\n" for i in images))
    return folder


def _args(drawn_set, unlabelled_set, **more):
    return load_args({"backbone": "mobilenetv3_small_050", "input_size": 64, "stride": 16,
                      "data_dir": str(drawn_set), "gssl": True, "device": "cpu", "workers": 0,
                      "unlabelled_dir": str(unlabelled_set), "epochs": 1, "gssl_epochs": 1,
                      "gssl_rounds": 2, "batch_size": 8, "effective_batch": 8, "num_nb": 3,
                      "precision": "fp32", "warmup_epochs": 0} | more)


def _maps(num_nb=5, grid=8):
    sizes = (grid, grid // 2, grid // 4)
    fine = [torch.zeros(2, n, grid, grid) for n in (12, 12, 12, 12 * num_nb, 12 * num_nb)]
    coarse = [torch.zeros(2, 12, n, n) for n in sizes[1:]]
    for tensor in (*fine, *coarse):
        tensor.requires_grad_()
    return CoarseMaps(Maps(*fine), *coarse)


def _touched(maps, face):
    """Return the groups of maps that have a gradient for a face."""
    tensors = {**maps.maps._asdict(), "half": maps.half, "quarter": maps.quarter}
    return {group for group, names in GROUPS.items()
            if any(tensors[name].grad[face].abs().sum() > 0 for name in names)}


@pytest.mark.parametrize(("task", "taught"), [
    ("cls3", "quarter"), ("cls2", "half"), ("std", "fine")])
def test_the_task_selects_the_maps_that_unlabelled_faces_train(task, taught):
    head = PIPHead(4, EYES, 5)
    maps = _maps()
    round_loss = gssl.RoundLoss(loss.PIPLoss(head.neighbours), task, labelled=10)
    landmarks = torch.rand(2, 12, 2)
    # Face 9 of the list is the last with labels, face 10 the first without.
    round_loss(maps, landmarks, torch.tensor([9, 10])).backward()
    assert _touched(maps, 0) == {"fine"}
    assert _touched(maps, 1) == {taught}
    # Every map is in the graph, because DDP needs a gradient of every parameter.
    assert all(t.grad is not None for t in (*maps.maps, maps.half, maps.quarter))


def test_targets_of_the_coarse_maps():
    landmarks = torch.zeros(1, 12, 2)
    landmarks[0, 0] = torch.tensor([0.30, 0.80])  # Cell (2, 6) of 8, (1, 3) of 4, (0, 1) of 2.
    landmarks[0, 1] = torch.tensor([1.20, -0.1])  # Outside: the nearest cell.
    head = PIPHead(4, EYES, 5)
    for task, name, size, cells in (("cls2", "half", 4, ((3, 1), (0, 3))),
                                    ("cls3", "quarter", 2, ((1, 0), (0, 1)))):
        maps = _maps()
        terms = gssl.RoundLoss(loss.PIPLoss(head.neighbours), task, 0).terms(
            maps, landmarks.expand(2, -1, -1), torch.tensor([0, 1]))
        terms[task].backward()
        gradient = getattr(maps, name).grad
        for point, (row, column) in enumerate(cells):
            assert (gradient[0, point] < 0).nonzero().tolist() == [[row, column]]
        # The target is 1 in one cell of size * size; the map is 0.
        assert terms[task].item() == pytest.approx(1 / size ** 2)
        assert all(v.item() == 0 for k, v in terms.items() if k != task)


def test_without_unlabelled_faces_it_is_the_standard_loss():
    torch.manual_seed(0)
    head = PIPHead(4, EYES, 5)
    torch.nn.init.normal_(head.score.weight)
    maps, landmarks = head(torch.randn(3, 4, 8, 8)), torch.rand(3, 12, 2)
    plain = loss.PIPLoss(head.neighbours, 10, 2, "wing")
    for task in ("std", "cls2"):
        ours = gssl.RoundLoss(plain, task, 99)(maps, landmarks, torch.arange(3))
        torch.testing.assert_close(ours, plain(maps, landmarks))


def test_nan_landmarks_do_not_count_in_the_means():
    torch.manual_seed(0)
    head = PIPHead(4, EYES, 2)
    maps = head(torch.randn(1, 4, 8, 8) * 1e3)
    landmarks = torch.rand(1, 12, 2)
    plain = loss.PIPLoss(head.neighbours)
    landmarks[0, 3] = torch.nan
    terms = gssl.RoundLoss(plain, "std", 0).terms(maps, landmarks, torch.tensor([0]))
    kept = [i for i in range(12) if i != 3]
    cell, offset, neighbour = loss.encode(landmarks.nan_to_num(), head.neighbours, 8)
    found = maps.offset_x.flatten(2).gather(2, cell[..., None])[..., 0]
    expected = (found - offset[..., 0])[0, kept].abs().mean()
    torch.testing.assert_close(terms["offset_x"], expected)
    found = maps.neighbour_y.flatten(2).gather(2, cell.repeat_interleave(2, 1)[..., None])
    error = (found.view(1, 12, 2) - neighbour[..., 1]).abs()[0]
    pairs = [(i, j) for i in kept for j in range(2) if int(head.neighbours[i, j]) != 3]
    torch.testing.assert_close(terms["neighbour_y"], torch.stack([error[p] for p in pairs]).mean())
    landmarks[:] = torch.nan
    assert gssl.RoundLoss(plain, "std", 0)(maps, landmarks, torch.tensor([0])).item() == 0


def test_the_coarse_maps_are_the_score_layer_on_pooled_features():
    torch.manual_seed(0)
    head = PIPHead(4, EYES, 5)
    features = torch.randn(2, 4, 8, 8)
    assert isinstance(head(features), Maps)
    head.coarse = True
    found = head(features)
    pooled = features.unflatten(2, (2, 4)).unflatten(4, (2, 4)).amax((3, 5))
    torch.testing.assert_close(found.quarter, head.score(pooled))
    assert found.half.shape == (2, 12, 4, 4)
    assert isinstance(head.eval()(features), Maps)


def test_the_plans_of_the_two_presets(drawn_set, unlabelled_set):
    paper = stages.plan(_args(drawn_set, unlabelled_set, gssl_preset="paper", epochs=60,
                            gssl_epochs=0))
    assert [(r.task, r.epochs, r.first_epoch, r.fresh, r.keep_share, len(r.views))
            for r in paper] == [
        (task, 60, 60 * i, True, 1.0, 1) for i, task in
        enumerate(("supervised", "cls3", "cls2", "std", "std", "std"))]
    ours = stages.plan(_args(drawn_set, unlabelled_set, epochs=60, gssl_epochs=20, gssl_rounds=2))
    assert [(r.task, r.epochs, r.first_epoch, r.fresh) for r in ours] == [
        ("supervised", 60, 0, True), ("std", 20, 60, False), ("std", 20, 80, False)]
    assert len({r.args().seed for r in paper}) == 6


def test_the_learning_rate_of_the_rounds(drawn_set, unlabelled_set):
    def rates(stage, steps=5):
        args = stage.args()
        optimizer = optim.make_optimizer(torch.nn.Linear(2, 2), args)
        scheduler = optim.make_scheduler(optimizer, args, steps,
                                          steps * (stage.cosine_epochs or args.epochs))
        found, start = [], stage.start_epoch
        for step in range(start * steps, (start + stage.epochs) * steps):
            scheduler.step_update(step)
            found.append(optimizer.param_groups[0]["lr"])
        return found

    settings = {"epochs": 8, "warmup_epochs": 2, "lr": 0.5, "gssl_rounds": 3, "gssl_epochs": 4}
    args = _args(drawn_set, unlabelled_set, **settings)
    first, *later = [rates(stage) for stage in stages.plan(args)]
    assert first[:10] == sorted(first[:10])
    assert first[0] < 0.1
    assert set(first[10:]) == {0.5}
    # The rounds share one cosine.
    later = numpy.concatenate(later)
    cosine = 0.5 * (1 + numpy.cos(numpy.pi * numpy.arange(60) / 60))
    assert later == pytest.approx(args.min_lr + (0.5 - args.min_lr) * cosine)
    # Rounds of the paper start with fresh weights; each has its own cosine and warm-up.
    args = _args(drawn_set, unlabelled_set, gssl_preset="paper", **settings)
    every = [rates(stage) for stage in stages.plan(args)]
    assert all(found[-1] < 0.05 for found in every)
    assert [numpy.argmax(found) for found in every] == [9] + 5 * [5]


@pytest.mark.parametrize(("preset", "asked", "epochs"), [
    ("paper", 0, [60] * 6), ("paper", 7, [60] + 5 * [7]), ("default", 0, [60, 10, 10, 10]),
    ("default", 7, [60, 7, 7, 7]), ("default", 0, [9, 2, 2, 2]), ("default", 0, [8, 2, 2]),
    ("default", 0, [1, 1])])
def test_lengths_of_rounds(drawn_set, unlabelled_set, preset, asked, epochs):
    rounds = stages.plan(_args(drawn_set, unlabelled_set, gssl_preset=preset, epochs=epochs[0],
                             gssl_epochs=asked, gssl_rounds=3))
    assert [r.epochs for r in rounds] == epochs
    assert [r.first_epoch for r in rounds] == [sum(epochs[:i]) for i in range(len(epochs))]


def test_settings_that_the_presets_refuse(drawn_set, unlabelled_set):
    assert len(stages.plan(_args(drawn_set, unlabelled_set, gssl=False))) == 1
    with pytest.raises(UserError, match="pip head"):
        stages.plan(_args(drawn_set, unlabelled_set, head="regression"))
    with pytest.raises(UserError, match="2 x 2 cells"):
        stages.plan(_args(drawn_set, unlabelled_set, stride=32, gssl_preset="paper"))


class _Reader(torch.nn.Module):
    """Predicts the brightest red, green and blue pixel; landmarks 0 and 1 mirror each other."""

    scheme = SCHEMES["300W"].subset([36, 45, 30])

    def predict(self, images):
        size = images.shape[-1]
        # A weighted mean around the peak is accurate below a pixel.
        weight = images.float().flatten(2) ** 4
        at = torch.arange(size * size)
        place = torch.stack([at % size, at // size], -1) / size + 0.5 / size
        points = (weight / weight.sum(2, keepdim=True)) @ place
        # A network predicts left and right by position, this one by colour.
        mirrored = points[:, 0, 0] > points[:, 1, 0]
        points[mirrored] = points[mirrored][:, [1, 0, 2]]
        return points, points.new_tensor([0.2, 0.4, 0.9]).expand(len(points), -1)


def test_views_are_mapped_back_onto_the_face(tmp_path):
    truth = numpy.array([[[0.3, 0.4], [0.7, 0.45], [0.52, 0.6]]])
    margin, size, side = 1.6, 64, 256
    image = numpy.zeros((side, side, 3), numpy.uint8)
    for channel, point in enumerate(((truth[0] - 0.5) / margin + 0.5) * side - 0.5):
        layer = numpy.zeros((side, side), numpy.uint8)
        cv2.circle(layer, tuple(int(round(v * 16)) for v in point), 6 * 16, 255, -1, cv2.LINE_AA, 4)
        image[..., channel] = layer
    cv2.imwrite(str(tmp_path / "face.png"), image[..., ::-1])
    unit = numpy.array([[0.0, 0, 1, 1]])
    faces = FaceList([tmp_path / "face.png"], numpy.full((1, 3, 2), numpy.nan), unit, unit, None)
    points, confidence, spread = gssl.label(_Reader(), faces, margin, size, stages.VIEWS, Ranks())
    assert points == pytest.approx(truth, abs=0.004)
    assert spread.max() < 0.004
    # Mirrored views swap the confidences 0.2 and 0.4 of the mirror pair.
    assert confidence == pytest.approx(numpy.array([[0.3, 0.3, 0.9]]))
    straight = gssl.label(_Reader(), faces, margin, size, stages.VIEWS[:1], Ranks())
    assert straight[2].max() == 0


def test_the_share_kept_is_the_same_for_every_landmark():
    rng = numpy.random.default_rng(0)
    points, spread = rng.random((50, 4, 2)), rng.random((50, 4)) * [1, 5, 0.1, 1]
    same = numpy.full((50, 4), 0.5)
    known = ~numpy.isnan(gssl.reject_doubtful(points, same, spread, 0.8)).any(2)
    assert known.sum(0).tolist() == [40] * 4
    assert all(spread[known[:, i], i].max() < spread[~known[:, i], i].min() for i in range(4))
    confidence = rng.random((50, 4)) * [1, 0.2, 0.5, 1]
    known = ~numpy.isnan(gssl.reject_doubtful(points, confidence, same, 0.8)).any(2)
    assert known.sum(0).tolist() == [40] * 4
    assert all(confidence[known[:, i], i].min() > confidence[~known[:, i], i].max()
               for i in range(4))
    assert not numpy.isnan(gssl.reject_doubtful(points, confidence, spread, 1.0)).any()
    assert not numpy.isnan(gssl.reject_doubtful(points, same * 0, same * 0, 0.5)).any()


def test_spread_and_confidence_have_the_same_weight_in_doubt():
    points = numpy.zeros((4, 1, 2))
    spread = numpy.array([[1.0], [1], [3], [3]])
    confidence = numpy.array([[0.75], [0.25], [0.75], [0.25]])
    found = [gssl.reject_doubtful(points, confidence, spread, share) for share in (0.25, 0.5, 0.75)]
    known = [(~numpy.isnan(one))[:, 0, 0].tolist() for one in found]
    # Both differ from their means by half the mean.
    assert known == [[True, False, False, False], [True, True, True, False],
                     [True, True, True, False]]


def test_the_list_of_a_round(drawn_set, unlabelled_set):
    prepared = PreparedSet(drawn_set)
    faces, extra = prepared.lists["train"].select([0, 1]), unlabelled.read(unlabelled_set, prepared)
    points = numpy.random.default_rng(0).random((12, 3, 2))
    joined, labelled = gssl.join(faces, extra, points, (4, 7, 9), 1 / 3)
    assert labelled == 6
    assert len(joined) == 18
    assert [i.name for i in joined.images[:6]] == [i.name for i in faces.images] * 3
    numpy.testing.assert_array_equal(joined.points[:2], faces.points)
    numpy.testing.assert_array_equal(joined.points[6:, [4, 7, 9]], points)
    assert numpy.isnan(joined.points[6:, 5]).all()
    assert gssl.join(faces, extra, points, (4, 7, 9))[1] == 2
    # NaN landmarks stay NaN through the augmentation.
    augment = Augment(load_args(), numpy.array([1, 0, 2]))
    dataset = FaceDataset(joined, 1.6, 64, (4, 7, 9), augment)
    joined.points[6, 7] = numpy.nan
    dataset.points = joined.points[:, [4, 7, 9]]
    for epoch in range(4):
        assert int(dataset[epoch, 6][1].isnan().any(1).sum()) == 1


def test_pseudo_labels_are_made_once(tmp_path, drawn_set, unlabelled_set):
    faces = unlabelled.read(unlabelled_set, PreparedSet(drawn_set))
    rng = numpy.random.default_rng(0)
    made = []

    def make():
        made.append(rng.random((12, 3, 2)))
        return made[-1], rng.random((12, 3)), rng.random((12, 3))

    path = tmp_path / "pseudo-1.pt"
    first = gssl.load_or_create_labels(path, make, faces, Ranks())
    again = gssl.load_or_create_labels(path, None, faces, Ranks())
    assert len(made) == 1
    for one, other in zip(first, again):
        numpy.testing.assert_array_equal(one, other)
    with pytest.raises(UserError, match="other faces than --unlabelled-dir"):
        gssl.load_or_create_labels(path, make, faces.select([1, 2]), Ranks())
    with pytest.raises(UserError, match="is missing"):
        gssl.load_or_create_labels(tmp_path / "pseudo-2.pt", None, faces, Ranks())


def test_a_training_of_the_paper_preset(drawn_set, unlabelled_set, weights, monkeypatch):
    made = []

    class Spy(gssl.RoundLoss):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.coarse = set()
            made.append(self)

        def __call__(self, predicted, landmarks, indices):
            self.coarse.add(isinstance(predicted, CoarseMaps))
            return super().__call__(predicted, landmarks, indices)

    monkeypatch.setattr(gssl, "RoundLoss", Spy)
    folder = trainer.train(_args(drawn_set, unlabelled_set, gssl_preset="paper"))
    assert [spy.task for spy in made] == ["cls3", "cls2", "std", "std", "std"]
    assert [spy.coarse for spy in made] == [{True}, {True}, {False}, {False}, {False}]
    assert [spy.labelled for spy in made] == [38] * 5
    rows = experiment.read_epochs(folder)
    assert [(row["epoch"], row["stage"]) for row in rows] == [
        (i + 1, f"train-round-{i}" if i else "train") for i in range(6)]


def test_a_training_of_all_rounds_uninterrupted_and_resumed(drawn_set, unlabelled_set, weights,
                                                            monkeypatch, capsys):
    settings = {"exp": "whole", "dump_pseudo": 5, "gssl_rounds": 2}
    folder = trainer.train(_args(drawn_set, unlabelled_set, **settings))
    rows = experiment.read_epochs(folder)
    assert [(row["epoch"], row["stage"]) for row in rows] == [
        (1, "train"), (2, "train-round-1"), (3, "train-round-2")]
    assert all(numpy.isfinite(row["loss"]) for row in rows)
    for name in ("curves.png", "pseudo-1.pt", "pseudo-2.pt", "pseudo-2.jpg"):
        assert (folder / name).is_file()
    state = checkpoint.read(folder / "last.pt")
    assert (state["stage"], state["epoch"], state["step"]) == (2, 1, 0)
    assert state["args"]["gssl"]
    assert state["args"]["seed"] == 0
    # The optimiser state continues from round to round.
    assert {int(s["step"]) for s in state["optimizer"]["state"].values()} == {4 + 2 * 3}
    capsys.readouterr()
    # Stop within the first round (4 steps), at its end, and within the second (3 steps).
    settings["exp"] = "parts"
    args = _args(drawn_set, unlabelled_set, **settings)
    for after, message in ((2, ""), (1, "train (supervised) goes on at epoch 1, step 4"),
                           (1, "train (supervised) all epochs are done")):
        assert trainer.train(args, bool(message), Halt(after)) is None
        assert message in capsys.readouterr().out
    monkeypatch.setattr(plots, "plot_curves", lambda folder: None)
    resumed = trainer.train(args, True)
    assert "train-round-1 (std) goes on at epoch 1, step 3" in capsys.readouterr().out
    _same(state, checkpoint.read(resumed / "last.pt"))
    _same(checkpoint.read(folder / "best.pt"), checkpoint.read(resumed / "best.pt"))
    assert [r | {"seconds": 0} for r in experiment.read_epochs(resumed)] == [
        r | {"seconds": 0} for r in rows]


def test_a_round_continues_the_model_and_average_of_the_last(drawn_set, unlabelled_set, weights,
                                                             monkeypatch):
    saved, labelled_by = {}, []
    save, label = trainer.Trainer.save_checkpoint, gssl.label
    monkeypatch.setattr(trainer.Trainer, "save_checkpoint", lambda self, epoch, step: (
        saved.update({(self.state.stage.number, epoch): copy.deepcopy(self.state.state_dict())}),
        save(self, epoch, step)))
    monkeypatch.setattr(gssl, "label", lambda model, *others: (
        labelled_by.append(copy.deepcopy(model.state_dict())), label(model, *others))[1])
    trainer.train(_args(drawn_set, unlabelled_set, ema=0.5))
    assert list(saved) == [(0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    for number in (1, 2):
        before = saved[number - 1, 1]
        _same(before, saved[number, 0])
        _same({"ema": before["ema"]}, {"ema": labelled_by[number - 1]})
        assert any((before["model"][name] != before["ema"][name]).any() for name in before["ema"])
    # The window of the average is full at once: half of the six steps of both rounds.
    model = torch.nn.Linear(2, 2)
    average = optim.make_ema(model, 0.5, total_steps=6, fresh=False)
    before = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.add_(3)
    average.update(model, 0)
    torch.testing.assert_close(average.module.weight, before + 1)


def _same(first, second):
    for part in ("model", "ema", "weights"):
        for name, tensor in (first.get(part) or {}).items():
            assert torch.equal(tensor, second[part][name]), name


def test_dump_pseudo_of_a_trained_experiment(drawn_set, unlabelled_set, weights, capsys):
    folder = experiment.new_experiment("old")
    args = _args(drawn_set, unlabelled_set, exp="old", dump_pseudo=3)
    with pytest.raises(UserError, match="no pseudo-labels yet; train it with --gssl"):
        gssl.dump_pseudo(args)
    faces = unlabelled.read(unlabelled_set, PreparedSet(drawn_set))
    confidence = numpy.tile(numpy.linspace(0.9, 0.1, 12)[:, None], 68)
    gssl.load_or_create_labels(folder / "pseudo-2.pt",
                       lambda: (numpy.full((12, 68, 2), 0.5), confidence, confidence / 100),
                       faces, Ranks())
    captions = []
    original = gssl.draw.sheet
    gssl.draw.sheet = lambda *a: captions.extend(a[3]) or original(*a)
    try:
        gssl.dump_pseudo(args)
    finally:
        gssl.draw.sheet = original
    assert (folder / "pseudo-2.jpg").is_file()
    assert [c.split()[0] for c in captions] == ["0.10", "0.17", "0.25"]
    assert captions[0].split()[-1] == faces.images[-1].stem


def test_invalid_command_lines(drawn_set, unlabelled_set, weights):
    with pytest.raises(UserError, match="--gssl needs --unlabelled-dir"):
        trainer.train(_args(drawn_set, unlabelled_set, unlabelled_dir="none", exp="a"))
    with pytest.raises(UserError, match="no unlabelled set"):
        trainer.train(_args(drawn_set, drawn_set, exp="b"))
    with pytest.raises(UserError, match="is an unlabelled set"):
        trainer.train(_args(unlabelled_set, unlabelled_set, exp="c"))
    with pytest.raises(UserError, match="default, paper"):
        parse(["--train", "--gssl", "--gssl-preset", "best"])
    assert parse(["--gssl", "--train"]).args.gssl is True
    assert parse(["--train", "--gssl", "false"]).args.gssl is False
    assert parse(["--dump-pseudo", "9", "--exp", "x"]).args.dump_pseudo == 9
