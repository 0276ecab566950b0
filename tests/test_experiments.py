"""The lines that the experiments print are commands of main.py, each its own."""
import argparse
import shlex

import experiments

from utils import checkpoint
from utils.args import parse


def test_every_line_is_a_command_of_its_own(capsys):
    experiments.commands(argparse.Namespace(data_dir="300W-128", stretch="300W-128-stretch",
                                            teacher="weights/accurate.pt", epochs=5, name="try"))
    requests = [parse(shlex.split(line)[2:]) for line in capsys.readouterr().out.splitlines()]
    assert len(requests) == len(experiments.CHANGES)
    assert all(request.actions == {"train"} for request in requests)
    settings = [{k: v for k, v in vars(request.args).items() if k != "exp"} for request in requests]
    changed = [[k for k in settings[0] if other[k] != settings[0][k]] for other in settings[1:]]
    # One factor at a time; a teacher is two settings, and strong augmentation a group of them.
    assert all(len(names) == 1 or "teacher" in names or "occlusion" in names for names in changed)
    assert len({request.args.exp for request in requests}) == len(requests)


def test_validation_is_the_error_of_the_list(tiny_weights):
    plain = experiments.validate(tiny_weights)
    assert plain > 5  # The net is untrained.
    alone = experiments.validate(tiny_weights, change=experiments.leave_out_neighbours)
    flipped = experiments.validate(tiny_weights, flip_test=True)
    same = experiments.validate(tiny_weights, change=lambda model: model.load_state_dict(
        checkpoint.read(tiny_weights)["weights"]))
    assert len({plain, alone, flipped}) == 3
    assert same == plain
