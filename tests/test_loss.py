"""Losses beyond the golden numbers: robust curves, regression, corner cases."""
import pytest
import torch

from nets.head import PIPHead, RegressionHead
from utils.errors import UserError
from utils.landmarks.schemes import SCHEMES
from utils.training import loss

EYES = SCHEMES["eyes"]


@pytest.mark.parametrize("name", sorted(loss.OFFSET_LOSSES))
def test_offset_losses_grow_from_zero_and_are_even(name):
    error = torch.arange(-200, 201, dtype=torch.float64) / 100
    value = loss.OFFSET_LOSSES[name](error)
    assert value[200] == 0
    assert torch.allclose(value, value.flip(0))
    assert (value[201:] > value[200:-1]).all()
    # The gradient of outliers does not grow.
    assert value[400] - value[399] == pytest.approx(float(value[300] - value[299]), rel=1e-6)


def test_wing_is_continuous_where_its_two_parts_meet():
    below, above = loss.wing(torch.tensor([0.5 - 1e-7, 0.5 + 1e-7], dtype=torch.float64))
    assert float(above - below) == pytest.approx(0, abs=1e-5)


def test_perfect_maps_have_no_loss_and_decode_to_the_landmarks():
    torch.manual_seed(0)
    landmarks = torch.rand(3, 12, 2, dtype=torch.float64)
    head = PIPHead(4, EYES, 5).double()
    maps = _perfect(head, landmarks, 8)
    assert float(loss.PIPLoss(head.neighbours)(maps, landmarks)) == pytest.approx(0, abs=1e-12)
    decoded, confidence = head.decode(maps)
    torch.testing.assert_close(decoded, landmarks)
    assert (confidence == 1).all()


def _perfect(head, landmarks, grid):
    cell, offset, neighbour = loss.encode(landmarks, head.neighbours, grid)
    count, points = cell.shape
    score = torch.zeros(count, points, grid * grid, dtype=landmarks.dtype)
    score.scatter_(2, cell[..., None], 1.0)
    spread = lambda values: values.flatten(1)[..., None, None].expand(-1, -1, grid, grid)  # noqa: E731
    return type(head(torch.zeros(1, 4, 8, 8, dtype=landmarks.dtype)))(
        score.unflatten(2, (grid, grid)), spread(offset[..., 0]), spread(offset[..., 1]),
        spread(neighbour[..., 0]), spread(neighbour[..., 1]))


def test_gradients_reach_only_the_target_cells_of_the_offsets():
    landmarks = torch.full((1, 12, 2), 0.3)
    maps = [torch.zeros(1, n, 8, 8, requires_grad=True) for n in (12, 12, 12, 60, 60)]
    head = PIPHead(4, EYES, 5)
    loss.PIPLoss(head.neighbours)(type(head(torch.zeros(1, 4, 8, 8)))(*maps), landmarks).backward()
    for gradient in (m.grad for m in maps[1:]):
        touched = gradient.abs().sum((0, 1)).nonzero()
        assert touched.tolist() == [[2, 2]]
    assert (maps[0].grad[:, :, 2, 2] < 0).all()


def test_regression_loss_and_an_unknown_offset_loss():
    model = torch.nn.Module()
    model.head = RegressionHead(4, EYES)
    robust = loss.build_loss(model, 10, 2, "l1")
    truth = torch.rand(2, 12, 2)
    assert float(robust(truth + 0.125, truth)) == pytest.approx(2.0, rel=1e-5)
    with pytest.raises(UserError, match="offset_loss"):
        loss.build_loss(model, 10, 2, "l3")


@torch.no_grad()
def test_a_landmark_of_weight_three_counts_as_three_in_every_mean():
    torch.manual_seed(3)
    head, landmarks = PIPHead(4, EYES, 5), torch.rand(2, 12, 2)
    maps = head(torch.randn(2, 4, 8, 8))
    weights = torch.arange(1.0, 13.0)
    found = loss.PIPLoss(head.neighbours, weights=weights).terms(maps, landmarks)
    alone = [loss.PIPLoss(head.neighbours, weights=one).terms(maps, landmarks)
             for one in torch.eye(12)]
    # A neighbour's prediction has the weight of the landmark that is predicted.
    predicted = torch.bincount(head.neighbours.flatten(), minlength=12)
    for name, value in found.items():
        share = weights * (predicted if name.startswith("neighbour") else 1)
        expected = sum(s * one[name] for s, one in zip(share, alone)) / share.sum()
        assert float(value) == pytest.approx(float(expected), rel=1e-5), name
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[:, 6:] = False
    weights[:6] = 3  # Equal weights of all in the mask.
    some = loss.PIPLoss(head.neighbours, weights=weights).terms(maps, landmarks, mask)
    for name, value in loss.PIPLoss(head.neighbours).terms(maps, landmarks, mask).items():
        assert float(some[name]) == pytest.approx(float(value), rel=1e-5), name


def test_eye_weight_applies_to_the_eyes_and_one_changes_nothing():
    model = torch.nn.Module()
    model.scheme = SCHEMES["300W"]
    model.head = PIPHead(4, model.scheme, 10)
    weights = loss.build_loss(model, 10, 1, "l1", eye_weight=3.0).weights
    assert weights[36:48].tolist() == [3.0] * 12
    assert weights.sum() == 56 + 36
    assert loss.build_loss(model, 10, 1, "l1").weights is None
    maps, landmarks = model.head(torch.randn(2, 4, 8, 8)), torch.rand(2, 68, 2)
    ones = loss.PIPLoss(model.head.neighbours, weights=torch.ones(68))(maps, landmarks)
    torch.testing.assert_close(ones, loss.PIPLoss(model.head.neighbours)(maps, landmarks))
