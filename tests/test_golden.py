"""Comparison with numbers of the authors' implementation (pipnet_golden.npz)."""
import pathlib

import numpy
import pytest
import torch

from nets import head
from nets.head import Maps, PIPHead
from utils.landmarks import metrics
from utils.landmarks import schemes as landmarks
from utils.training import loss


@pytest.fixture(scope="module")
def golden():
    return numpy.load(pathlib.Path(__file__).parent / "pipnet_golden.npz")


@pytest.fixture(scope="module")
def scheme(golden):
    return landmarks.SCHEMES["300W"].with_mean_face(golden["mean_face"])


def _maps(golden):
    return Maps(*(torch.from_numpy(golden[k]) for k in Maps._fields))


def test_neighbour_table(golden, scheme):
    table = head.nearest_neighbours(scheme.mean_face, 10)
    assert (table == golden["neighbour_index"]).all()


def test_reverse_table_has_the_published_padding(golden):
    predictors, slots, mask = head.reverse_neighbours(golden["neighbour_index"])
    assert predictors.shape[1] == golden["reverse_len"] == mask.sum(1).max()
    assert (predictors.flatten() == golden["reverse_index1"]).all()
    assert (slots.flatten() == golden["reverse_index2"]).all()


def test_published_mean_face_gives_the_same_neighbours(golden):
    table = head.nearest_neighbours(landmarks.SCHEMES["300W"].mean_face, 10)
    assert (table == golden["neighbour_index"]).mean() > 0.99


def test_targets(golden):
    truth = torch.from_numpy(golden["labels"])
    table = torch.from_numpy(golden["neighbour_index"])
    cell, offset, neighbour = loss.encode(truth, table, 8)
    assert (cell.numpy() == golden["target_cell"]).all()
    numpy.testing.assert_allclose(offset.numpy(), golden["target_offset"], atol=1e-6)
    numpy.testing.assert_allclose(neighbour.numpy(), golden["target_neighbour"], atol=1e-6)
    assert (golden["labels"] < 0).any(), "no label outside the crop"
    assert (golden["labels"] > 1).any(), "no label outside the crop"
    assert (golden["labels"] * 8 % 1 == 0).any(), "no label on a cell border"


def test_loss_terms(golden):
    maps = _maps(golden)
    table = torch.from_numpy(golden["neighbour_index"])
    truth = torch.from_numpy(golden["labels"][:len(maps.score)])
    terms = loss.PIPLoss(table).terms(maps, truth)
    numpy.testing.assert_allclose([float(t) for t in terms.values()], golden["loss_terms"],
                                  atol=1e-5)
    total = loss.PIPLoss(table, cls=10, reg=1)(maps, truth)
    expected = 10 * golden["loss_terms"][0] + golden["loss_terms"][1:].sum()
    numpy.testing.assert_allclose(float(total), expected, atol=1e-4)


def test_decode_with_padded_merge(golden, scheme):
    points, confidence = PIPHead(4, scheme, 10, "padded").decode(_maps(golden))
    numpy.testing.assert_allclose(points.numpy(), golden["decoded_merged"], atol=1e-5)
    numpy.testing.assert_allclose(confidence.numpy(), golden["decoded_score"].clip(0, 1), atol=1e-6)


def test_decode_without_neighbours(golden, scheme):
    maps = _maps(golden)
    points, _ = PIPHead(4, scheme, 0).decode(maps)
    numpy.testing.assert_allclose(points.numpy(), golden["decoded_own"], atol=1e-5)


@pytest.mark.parametrize("merge", ["plain", "confidence"])
def test_merge_is_a_weighted_mean_of_the_predictions(golden, scheme, merge):
    maps = _maps(golden)
    points, confidence = PIPHead(4, scheme, 10, merge).decode(maps)
    weights = confidence.numpy().clip(0.01) if merge == "confidence" else numpy.ones((2, 68))
    table = golden["neighbour_index"]
    score = maps.score.flatten(2).numpy()
    for n, i in ((0, 0), (1, 30), (1, 67)):
        predictions, weight = [], []
        for j in range(68):
            cell = score[n, j].argmax()
            row, column = divmod(cell, 8)
            if j == i:
                predictions.append(((column + golden["offset_x"][n, j, row, column]) / 8,
                                    (row + golden["offset_y"][n, j, row, column]) / 8))
                weight.append(weights[n, j])
            for slot in numpy.flatnonzero(table[j] == i):
                c = j * 10 + slot
                predictions.append(((column + golden["neighbour_x"][n, c, row, column]) / 8,
                                    (row + golden["neighbour_y"][n, c, row, column]) / 8))
                weight.append(weights[n, j])
        numpy.testing.assert_allclose(points[n, i].numpy(),
                                      numpy.average(predictions, 0, weight), atol=1e-5)


def test_nme(golden):
    truth = golden["labels"]
    norm = metrics.divisors(truth, (36, 45), None)
    numpy.testing.assert_allclose(metrics.nme(golden["nme_pred"], truth, norm), golden["nme"],
                                  atol=1e-9)


@pytest.mark.parametrize("threshold", [0.034, 0.05, 0.0505, 0.07, 0.08, 0.1])
def test_fr_and_auc_of_perfect_of_failed_and_of_no_faces(threshold):
    assert metrics.fr_auc(numpy.zeros(5), threshold) == pytest.approx((0, 1), abs=1e-12)
    assert metrics.fr_auc([0, numpy.nan], threshold) == pytest.approx((0.5, 0.5), abs=1e-12)
    assert numpy.isnan(metrics.fr_auc([], threshold)).all()


@pytest.mark.parametrize("percent", [8, 10])
def test_fr_auc(golden, percent):
    found = metrics.fr_auc(golden["nmes"], percent / 100)
    numpy.testing.assert_allclose(found, golden[f"fr_auc_{percent}"], atol=1e-9)
    summary = metrics.summary(golden["nmes"])
    assert summary["faces"] == 500
    numpy.testing.assert_allclose(summary[f"fr{percent}"], 100 * golden[f"fr_auc_{percent}"][0],
                                  atol=1e-7)


@pytest.mark.parametrize("num_nb", [0, 1, 10])
def test_predict_equals_decode_of_forward(scheme, num_nb):
    torch.manual_seed(num_nb)
    head = PIPHead(6, scheme, num_nb).double()
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter)
    features = torch.randn(3, 6, 8, 8, dtype=torch.float64)
    for found, expected in zip(head.predict(features), head.decode(head(features))):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
