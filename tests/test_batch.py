"""Faces of an optimiser step, their share of each process, and the learning rate."""
import argparse

import pytest

from utils.args import load_args
from utils.errors import UserError
from utils.training.batch import plan_batch


def plan(batch, world, asked=32, kept=None, faces=None):
    settings = argparse.Namespace(batch_size=batch, effective_batch=asked, lr=0.001, min_lr=1e-5)
    return plan_batch(settings, world, kept, faces)


@pytest.mark.parametrize(("batch", "world", "accumulate", "faces", "factor"), [
    (16, 1, 2, 32, 1), (32, 1, 1, 32, 1), (8, 4, 1, 32, 1), (4, 2, 4, 32, 1),
    # No whole number of micro-batches: the nearest one.
    (12, 1, 3, 36, 1), (10, 1, 3, 30, 1), (24, 1, 1, 24, 1),
    # The processes hold more faces than a step is asked to have.
    (32, 4, 1, 128, 2), (32, 8, 1, 256, 8 ** 0.5), (64, 1, 1, 64, 2 ** 0.5)])
def test_a_step_has_the_faces_that_are_asked_for_or_all_that_the_processes_hold(
        batch, world, accumulate, faces, factor):
    found = plan(batch, world)
    assert (found.accumulate, found.faces) == (accumulate, faces)
    assert found.lr_factor == pytest.approx(factor)


def test_the_default_settings_of_one_process_are_unchanged():
    args = load_args()
    found = plan_batch(args, 1)
    assert (found.accumulate, found.faces, found.lr_factor) == (2, 32, 1)
    assert vars(found.scaled(args)) == vars(args)


def test_the_learning_rate_is_scaled_by_the_square_root_and_printed():
    found = plan(32, 4)
    scaled = found.scaled(argparse.Namespace(lr=0.001, min_lr=1e-5, clip=5))
    assert vars(scaled) == {"lr": 0.002, "min_lr": 2e-5, "clip": 5}
    assert str(found) == ("32 a process x 4 processes x 1 accumulated = 128 a step (asked 32), "
                          "learning rate x 2 (the square root of 128 / 32)")
    assert "learning rate" not in str(plan(16, 1))


@pytest.mark.parametrize(("batch", "world", "accumulate"), [
    (32, 1, 4), (32, 2, 2), (16, 8, 1), (64, 2, 1)])
def test_a_resumed_step_keeps_its_faces_and_rate_with_other_processes(batch, world, accumulate):
    first = plan(32, 4)
    found = plan(batch, world, kept=first.state_dict(), faces=first.faces)
    assert (found.accumulate, found.faces) == (accumulate, 128)
    assert found.lr_factor == first.lr_factor == 2
    assert found.state_dict() == first.state_dict()


def test_a_later_stage_is_planned_as_with_the_first_processes():
    first = plan(32, 4)
    for asked, faces, factor in ((64, 128, 2 ** 0.5), (128, 128, 1), (256, 256, 1)):
        found = plan(32, 1, asked, first.state_dict())
        assert (found.faces, found.accumulate) == (faces, faces // 32)
        assert found.lr_factor == pytest.approx(factor)


@pytest.mark.parametrize(("batch", "world", "advice"), [
    (32, 3, "use 2 processes with --batch-size 32"), (48, 1, "give --batch-size 32"),
    (32, 8, "give --batch-size 16"), (5, 6, "use 4 processes with --batch-size 4")])
def test_a_step_that_cannot_be_shared_is_refused_with_what_would_work(batch, world, advice):
    first = plan(32, 4)
    with pytest.raises(UserError) as found:
        plan(batch, world, kept=first.state_dict(), faces=128)
    text = str(found.value)
    assert text.startswith(f"a step of this training has 128 faces, which {world} processes")
    assert text.endswith(advice)
    assert "\n" not in text
    batch, world = (int(advice.split()[-1]),
                    int(advice.split()[1]) if "processes" in advice else world)
    assert plan(batch, world, kept=first.state_dict(), faces=128).faces == 128


@pytest.mark.parametrize(("faces", "at_once"), [(128, 128), (32, 16)])
def test_the_rate_of_a_training_that_did_not_scale_it_stays(faces, at_once):
    found = plan(16, 1, faces=faces)
    assert (found.faces, found.lr_factor, found.at_once) == (faces, 1, at_once)
    assert plan(16, 1, 64, found.state_dict()).lr_factor == 1
