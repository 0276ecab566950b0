"""Train, test and export PIPNet facial landmark models, as args.yaml and the flags say.

One process:            python main.py --train --data samples
Four GPUs:              bash main.sh 4 --train --test --test-onnx
Score and compare:      python main.py --test --test-onnx --exp NAME
Several machines:       see main.sh
"""
import os
import sys

from utils import experiment, machine
from utils.args import parse
from utils.errors import UserError
from utils.errors import run as guarded
from utils.training import launch


def main():
    """Parse the command line, do what it says, and end as main.sh expects it."""
    if launch.is_over():
        return
    try:
        dispatch(parse())
    except UserError as error:
        if not launch.has_parent():
            raise
        launch.tell_error(error)
        sys.exit(0 if launch.leave() else 2)
    except BrokenPipeError:
        if not launch.has_parent():
            raise
        launch.tell_stopped()
        # torchrun would take it for a crash, and start again what nobody reads.
        sys.exit(0 if launch.leave() else 2)
    launch.leave(0)


def dispatch(request):
    """Do what was asked for, in this order; after training rank 0 alone goes on.

    What is slow to import is imported by what needs it.
    """
    machine.tune_malloc()
    actions = request.actions
    launch.name_newest(request)
    try:
        if "train" in actions and not train(request):
            return
        # What is not typed is as the experiment was trained: its set, above all.
        args = launch.resumed(request)
        for name in ("exp", *launch.OF_ONE_COMMAND):
            setattr(args, name, getattr(request.args, name))
        if args.dump_pseudo and "train" not in actions:
            dump_pseudo(args)
        if actions & {"fit_shape", "fit_eyes"}:
            fit(args, actions)
        if actions & {"train", "export", "test_onnx"}:
            export(args, actions)
        if actions & {"test", "test_onnx"}:
            test(args, actions, request.typed)
        if "test_eyes" in actions:
            test_eyes(args, actions)
        if "compare" in actions:
            print(experiment.compare(), end="")
    except OSError as error:
        raise launch.disk_mistake(error) from None


def train(request):
    """Train, or go on with what was begun; whether this process is to go on with the rest."""
    resume = "resume" in request.actions or launch.restarts() > 0
    with launch.Stop() as stop:
        # A signal while this imports torch is obeyed too.
        from utils.evaluation import score
        from utils.training import ddp, trainer
        if request.actions & {"test", "test_onnx"}:
            score.check(request.args)
        try:
            args = launch.resumed(request) if resume else request.args
            folder = trainer.train(args, resume, stop)
        finally:
            ddp.stop()
    if folder is None:
        launch.tell_stopped()
        if not launch.has_parent():
            # What is to follow a training (&&, a queue's next job) must not take it for done.
            sys.exit(stop.code)
    if folder is None or int(os.environ.get("RANK", 0)):
        return False
    request.args.exp = folder.name
    return True


def export(args, actions):
    """Write the .onnx beside the weights, and the others that were asked for."""
    from utils.deploy import export, quantize, raw
    asked = actions & {"train", "export"}
    path = experiment.find_weights(args.exp, ".pt" if asked or "test" in actions else ".onnx")
    if not asked:
        path = path.with_suffix(".pt")
        if not path.is_file() or not export.is_stale(path):
            return
    if path.suffix != ".pt":
        raise UserError(f"{path}: is what --export writes; give the .pt that it is made from")
    # Who did not ask for a file gets it as it was.
    path = export.export_weights(path, args.flip_test or not asked and export.averages(path))
    if "int8" in actions:
        quantize.export_int8(path, args)
    if "raw" in actions:
        raw.export_weights(path.with_suffix(".pt"), args.opset)
    for kind in ("int8", "raw"):
        other = path.with_suffix(f".{kind}.onnx")
        if kind not in actions and other.is_file():
            print(f"note: {other} is as it was; --export --{kind} writes it anew")


def fit(args, actions):
    """Fit what a model's landmarks say of each one's error, and how it tells shut eyes."""
    from utils.evaluation import eyes
    from utils.training import shape_fit
    # The eyes last: the shape head moves them.
    changed = [module.fit_weights(args) for action, module in
               (("fit_shape", shape_fit), ("fit_eyes", eyes)) if action in actions]
    if any(changed) and not actions & {"train", "export"}:
        export(args, actions)


def test(args, actions, typed):
    """Score the test lists with PyTorch, ONNX Runtime or both."""
    from utils.evaluation import score
    score.test(args, actions, typed)


def test_eyes(args, actions):
    """Score how a model tells shut eyes from open ones."""
    from utils.evaluation import eyes
    if "fit_eyes" in actions:
        print("note: the eyes that follow are those of the fit, which flatters; score others with "
              "--test-eyes alone")
    eyes.test(args)


def dump_pseudo(args):
    """Draw the newest pseudo-labels of an experiment."""
    from utils.training import gssl
    gssl.dump_pseudo(args)


if __name__ == "__main__":
    guarded(main)
