"""tools.experiments: the printed command lines, and the validation NME."""
import argparse
import shlex

from tools import experiments
from utils import checkpoint
from utils.args import parse


def test_every_line_is_a_command_that_changes_one_setting(capsys):
    experiments.commands(argparse.Namespace(data_dir="300W-128", stretch="300W-128-stretch",
                                            teacher="weights/accurate.pt", epochs=5, name="try"))
    requests = [parse(shlex.split(line)[2:]) for line in capsys.readouterr().out.splitlines()]
    assert len(requests) == len(experiments.CHANGES)
    assert all(request.actions == {"train"} for request in requests)
    settings = [{k: v for k, v in vars(request.args).items() if k != "exp"} for request in requests]
    changed = [[k for k in settings[0] if other[k] != settings[0][k]] for other in settings[1:]]
    # A teacher needs two settings, and strong augmentation several.
    assert all(len(names) == 1 or "teacher" in names or "occlusion" in names for names in changed)
    assert len({request.args.exp for request in requests}) == len(requests)


def test_validation_nme_depends_on_merge_and_flip(tiny_weights):
    plain = experiments.validate(tiny_weights)
    assert plain > 5  # The net is untrained.
    alone = experiments.validate(tiny_weights, change=experiments.leave_out_neighbours)
    flipped = experiments.validate(tiny_weights, flip_test=True)
    same = experiments.validate(tiny_weights, change=lambda model: model.load_state_dict(
        checkpoint.read(tiny_weights)["weights"]))
    assert len({plain, alone, flipped}) == 3
    assert same == plain
