"""Faces with missing points and faces that cannot be scored, from the CSV file to the scores."""
import csv

import cv2
import numpy
import pytest
import torch

from nets.head import PIPHead
from utils import checkpoint
from utils.args import load_args
from utils.data.dataset import PreparedSet
from utils.data.generator import DataGenerator
from utils.evaluation import predict, score
from utils.landmarks import crop, metrics
from utils.landmarks.schemes import SCHEMES
from utils.training import loss, trainer

FIVE = """name: five
names: [right eye, left eye, nose, right mouth, left mouth]
flip: [[right eye, left eye], [right mouth, left mouth]]
divisor: [right eye, left eye]
"""
FACE = numpy.array([(20, 20), (60, 20), (40, 40), (28, 60), (52, 60)], float)


@pytest.fixture(scope="module")
def own_set(tmp_path_factory):
    """A prepared set of 12 faces.

    Face 1 has no nose, test face 10 has both eyes at the same point, test face 11 lacks an eye.
    """
    folder = tmp_path_factory.mktemp("own")
    (folder / "five.yaml").write_text(FIVE)
    rows = ["image,split," + ",".join(f"x{i},y{i}" for i in range(1, 6))]
    for number in range(12):
        image = numpy.random.default_rng(number).integers(0, 255, (90, 90, 3), numpy.uint8)
        cv2.imwrite(str(folder / f"{number}.png"), image)
        points = [f"{x},{y}" for x, y in FACE + number / 4]
        if number == 1:
            points[2] = "-1,-1"
        if number == 10:
            points[1] = points[0]
        if number == 11:
            points[0] = ","
        rows.append(f"{number}.png,{'train' if number < 8 else 'test'},{','.join(points)}")
    (folder / "faces.csv").write_text("\n".join(rows) + "\n")
    return DataGenerator(folder / "faces.csv", 64, folder / "set", workers=1,
                         scheme=str(folder / "five.yaml")).run()


def test_a_missing_point_does_not_affect_the_box():
    points = FACE.copy()
    points[2] = numpy.nan
    assert crop.face_box(points).tolist() == crop.face_box(FACE).tolist()
    # The lowest point is missing, so the box ends at the next one.
    points = numpy.array([(0, 0), (10, 0), (5, numpy.nan), (5, 8)])
    assert crop.face_box(points, "stretch", 1.0).tolist() == [0, 0, 10, 8]


def test_nme_ignores_missing_points():
    truth = numpy.tile(FACE, (4, 1, 1))
    found = truth + (3, 4)
    truth[1, 2] = numpy.nan
    truth[2] = numpy.nan
    found[1, 2] += 1000
    norm = numpy.array([10, 10, 10, 0])
    assert metrics.nme(found, truth, norm)[:2].tolist() == [0.5, 0.5]
    assert numpy.isnan(metrics.nme(found, truth, norm)[2:]).all()
    numbers = metrics.summary(metrics.nme(found, truth, norm))
    assert numbers["nme"] == 50
    assert (numbers["faces"], numbers["unscored"]) == (2, 2)
    assert "unscored" not in metrics.summary([0.1])
    # A prediction of NaN is an error, not a missing point: its face is still scored.
    found[0, 1] = numpy.nan
    assert metrics.nme(found, truth, norm)[:2].tolist() == [numpy.inf, 0.5]
    numbers = metrics.summary(metrics.nme(found, truth, norm))
    assert (numbers["nme"], numbers["faces"], numbers["fr8"]) == (numpy.inf, 2, 100)
    assert numpy.isnan(metrics.summary([numpy.nan])["nme"])


def test_a_missing_point_does_not_affect_the_loss():
    torch.manual_seed(0)
    head = PIPHead(4, SCHEMES["eyes"], 5)
    features = torch.randn(2, 4, 8, 8)
    landmarks = torch.rand(2, 12, 2)
    landmarks[0, 3] = torch.nan
    maps = head(features)
    masked = loss.PIPLoss(head.neighbours, missing=True)
    assert torch.isfinite(masked(maps, landmarks))
    # The prediction of a missing point does not change the loss.
    moved = maps._replace(score=maps.score.clone(), offset_x=maps.offset_x.clone())
    moved.score[0, 3] += 5
    moved.offset_x[0, 3] -= 5
    assert masked(moved, landmarks) == masked(maps, landmarks)
    moved.offset_x[1, 3] -= 5
    assert masked(moved, landmarks) > masked(maps, landmarks)
    regression = loss.RegressionLoss(missing=True)
    found = torch.zeros(2, 12, 2)
    assert torch.isfinite(regression(found, landmarks))
    torch.testing.assert_close(regression(found[1:], landmarks[1:]),
                               loss.RegressionLoss()(found[1:], landmarks[1:]))


def test_a_prepared_set_keeps_missing_points(own_set):
    prepared = PreparedSet(own_set)
    points = numpy.concatenate([faces.points for faces in prepared.lists.values()])
    assert numpy.isnan(points).sum() > 0
    assert numpy.isfinite(prepared.scheme.mean_face).all()


def test_training_works_and_the_test_reports_unscored_faces(own_set, weights, capsys):
    settings = {"data_dir": str(own_set), "backbone": "test_resnet", "input_size": 64, "epochs": 1,
                "batch_size": 4, "effective_batch": 4, "workers": 0, "num_nb": 4, "stride": 16,
                "exp": "own"}
    folder = trainer.train(load_args(settings))
    assert all(torch.isfinite(v).all() for v in
               checkpoint.read(folder / "best.pt")["weights"].values())
    score.run_test(load_args({**settings, "exp": str(folder / "best.pt")}), {"test"})
    text = capsys.readouterr().out
    assert "2 faces are not scored" in text
    with open(folder / "faces.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [bool(row["nme"]) for row in rows] == [True, True, False, False]
    assert (folder / "worst.png").is_file()


def test_best_pt_is_written_even_if_no_face_can_be_scored(own_set, weights, monkeypatch):
    monkeypatch.setattr(predict, "list_nme",
                        lambda found, *_: (numpy.full(len(found), numpy.nan),) * 2)
    folder = trainer.train(load_args({
        "data_dir": str(own_set), "backbone": "test_resnet", "input_size": 64, "epochs": 1,
        "batch_size": 4, "effective_batch": 4, "workers": 0, "num_nb": 4, "stride": 16}))
    assert (folder / "best.pt").is_file()
