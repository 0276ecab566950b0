"""Train, test and export PIPNet facial landmark models, as args.yaml and the flags say.

Modules that are slow to import are imported by the functions that need them.

One process:            python main.py --train --data-dir samples
Four GPUs:              bash main.sh 4 --train --test --test-onnx
Score and compare:      python main.py --test --test-onnx --exp NAME
Several machines:       see main.sh
"""
import argparse
import os
import sys

from utils import experiment, machine
from utils.args import Request, parse
from utils.errors import DiskError, UserError, as_user_error
from utils.errors import run as run_guarded
from utils.training import control, recipe
from utils.training.settings import experiment_settings, requested_settings, resolve_newest


def main():
    """Run the command line, and end as the launcher (main.sh) expects it of a process."""
    if not control.register():
        return
    try:
        dispatch(parse())
    except (BrokenPipeError, UserError) as error:
        if not control.is_supervised():
            raise
        # torchrun would count either as a crash, and restart the processes in vain.
        if isinstance(error, UserError):
            control.report_error(error)
        else:
            control.report_stopped()
        sys.exit(0 if control.unregister(timeout=5) else 2)
    control.unregister()


def dispatch(request: Request):
    """Do what was asked for, in a fixed order; after a training only rank 0 continues."""
    machine.tune()
    actions = request.actions
    resolve_newest(request)
    try:
        if "train" in actions and not train(request):
            return
        # Settings that are not typed are those of the experiment, above all its data.
        args = recipe.last_stage(experiment_settings(request))
        args.exp = request.args.exp
        actions |= set(args.after) if "train" in actions else set()
        if args.dump_pseudo and "train" not in actions:
            dump_pseudo(args)
        if actions & {"fit_shape", "fit_eyes"}:
            fit(args, actions)
        if actions & {"train", "export"}:
            export(args, actions)
        if actions & {"test", "test_onnx"}:
            test(args, actions, request.typed)
        if "test_eyes" in actions:
            test_eyes(args, actions)
        if "compare" in actions:
            print(experiment.compare(), end="")
    except OSError as error:
        raise as_user_error(error) from None


def train(request: Request) -> bool:
    """Train or resume an experiment; return whether this process does the remaining actions."""
    resume = "resume" in request.actions or control.restart_count() > 0
    with control.Stop() as stop:
        # Within `stop`, so that a signal during the import of torch is handled too.
        from utils.evaluation import score
        from utils.training import ddp, trainer
        try:
            args = ddp.rank_0_args(lambda: requested_settings(request, resume))
            tests = {"test", "test_onnx"} & (request.actions | args.after.keys())
            folder = trainer.train(args, resume, stop, score.check_settings if tests else None)
        except BaseException as error:
            ddp.stop(error)
            raise
        ddp.stop()
    if folder is None:
        control.report_stopped()
        if not control.is_supervised():
            # A stopped training must not count as done for what follows it (&&, a job queue).
            sys.exit(stop.exit_code)
    if folder is None or int(os.environ.get("RANK", 0)):
        return False
    request.args.exp = folder.name
    return True


def export(args: argparse.Namespace, actions: frozenset):
    """Write the .onnx beside the weights, and the other formats that were asked for."""
    from utils.deploy import formats
    formats.write_requested(args, actions)


def fit(args: argparse.Namespace, actions: frozenset):
    """Fit the shape head, the lid head and the eye thresholds of a trained model."""
    from utils.training import lid_fit, shape_fit
    # The lid head comes last, because the shape head moves the eyes.
    changed = [module.fit_weights(recipe.action_settings(args, action)) for action, module in
               (("fit_shape", shape_fit), ("fit_eyes", lid_fit)) if action in actions]
    if any(changed) and not actions & {"train", "export"}:
        from utils.deploy import formats
        formats.refresh(args, actions)


def test(args: argparse.Namespace, actions: frozenset, typed: dict):
    """Score the test lists with PyTorch, ONNX Runtime or both."""
    from utils.evaluation import score
    refused = None
    if "test_onnx" in actions and not actions & {"train", "export"}:
        from utils.deploy import formats
        try:
            formats.refresh(args, actions)
        except DiskError as error:
            # The numbers of PyTorch need no file; the stale one is not scored.
            if "test" not in actions:
                raise
            refused, actions = error, actions - {"test_onnx"}
    score.run_test(recipe.action_settings(args, "test"), actions, typed)
    if refused:
        raise refused


def test_eyes(args: argparse.Namespace, actions: frozenset):
    """Score how a model tells closed eyes from open ones."""
    from utils.evaluation import eyes
    if "fit_eyes" in actions:
        print("note: the following scores are of the faces that were fitted, which flatters; score "
              "other faces with --test-eyes alone")
    eyes.run_test(recipe.action_settings(args, "test_eyes"))


def dump_pseudo(args: argparse.Namespace):
    """Draw the newest pseudo-labels of an experiment."""
    from utils.training import gssl
    gssl.dump_pseudo(args)


if __name__ == "__main__":
    run_guarded(main)
