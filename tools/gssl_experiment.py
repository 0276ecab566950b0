"""Self-training (GSSL) against supervised training at an equal number of optimiser steps.

`prepare` writes the sets, `commands` prints one training command a line, `table` prints the mean
and the standard deviation of the test NME over the seeds.

200 labelled faces (tools/splits/300W_200.txt), the other 1812 training faces unlabelled:
    python -m tools.gssl_experiment prepare SETS/300W-128 DETECTOR.onnx SETS/gssl
    python -m tools.gssl_experiment commands SETS/gssl/few SETS/gssl/rest --all SETS/gssl/all | bash
    python -m tools.gssl_experiment table
All training faces labelled, those of LFW unlabelled, compared with `ceiling` of the runs above:
    python -m utils.data.generator LFW --labelled SETS/300W-128 --boxes LFW/boxes.csv \
        --detector DETECTOR.onnx --output-dir SETS/lfw-128
    python -m tools.gssl_experiment commands SETS/gssl/all SETS/lfw-128 --name lfw --rounds 4 \
        --methods default | bash
    python -m tools.gssl_experiment table --name lfw --baseline few-ceiling
"""
import argparse
import hashlib
import json
import os
import pathlib
import shlex
import shutil
import sys

import numpy
import tqdm

from utils.data import unlabelled
from utils.data.dataset import PreparedSet
from utils.data.photo import read_photo
from utils.detection.detector import get_detector
from utils.errors import run as guarded
from utils.errors import shell_word
from utils.experiment import WEIGHTS
from utils.training import gssl, stages

LIST = pathlib.Path(__file__).with_name("splits") / "300W_200.txt"
BATCH = 16
WARM_UP = 1 / 24  # Share of the steps of a training and of each round.
FLAGS = (f"--train --test --stride 16 --input-size 64 --batch-size {BATCH} "
         f"--effective-batch {BATCH} --ema 0.05 --lr 0.003 --rotation 30 --scaling 0.12 "
         "--shift 0.08 --aspect 0.05 --occlusion 0.2 --colour 0.4 --grey 0.05 --blur 0.15 "
         "--workers 1 --cache ram")
METHODS = ("supervised", "paper", "default", "ceiling")


def choose(names, count=200):
    """Return the `count` names with the smallest SHA-256, sorted; independent of their order."""
    return sorted(sorted(names, key=lambda n: hashlib.sha256(n.encode()).hexdigest())[:count])


def prepare(source, detector, output):
    """Write the prepared sets `few` and `all` and the unlabelled set `rest` into a folder.

    Every tenth of the 200 labelled faces is a validation face, in `all` too. The test lists are
    those of the source. `rest` has the detected face nearest to the middle of each photo.

    Args:
        source: folder of the prepared 300W.
        detector: "haar", or the .onnx file of a face detector.
        output: folder to write, a pathlib.Path; must be new.
    """
    prepared, chosen = PreparedSet(source), set(LIST.read_text(encoding="utf-8").split())
    lines = [line for name in ("train", "val")
             for line in (prepared.folder / f"{name}.txt").read_text("utf-8").splitlines()]
    lines = {pathlib.Path(line.split(maxsplit=1)[0]).stem: line for line in lines}
    missing = chosen - lines.keys()
    if missing:
        sys.exit(f"{source}: has no training face {min(missing)}; expected a prepared 300W "
                 "with afw, helen and lfpw")
    held_out = sorted(chosen)[::10]
    for name, faces in (("few", chosen), ("all", lines.keys())):
        folder = output / name
        folder.mkdir(parents=True)
        os.symlink(prepared.folder.resolve() / "images", folder / "images")
        for path in ("set.yaml", "sources.csv", *(p.name for p in prepared.folder.glob("test*"))):
            shutil.copy(prepared.folder / path, folder)
        train = [lines[n] for n in sorted(set(faces) - set(held_out))]
        for split, rows in (("train", train), ("val", [lines[n] for n in held_out])):
            (folder / f"{split}.txt").write_text("\n".join(rows) + "\n", encoding="utf-8")
        points = numpy.array([[float(v) for v in line.split()[1:]] for line in train])
        (folder / "indices.txt").write_text(" ".join(f"{v:.7f}" for v in points.mean(0)))
    _prepare_rest(prepared, chosen, detector, output)


def _prepare_rest(prepared, chosen, detector, output):
    photos = sorted({photo for name in ("train", "val")
                     for photo, image in zip(prepared.lists[name].photos,
                                             prepared.lists[name].images)
                     if image.stem not in chosen})
    folder = pathlib.Path(os.path.commonpath(photos))
    find = get_detector(detector)
    rows = []
    for photo in tqdm.tqdm(photos, desc="faces", unit="photo"):
        image = read_photo(photo)
        boxes = find(image)[:, :4]
        if len(boxes):
            offsets = (boxes[:, :2] + boxes[:, 2:]) / 2 - numpy.array(image.shape[1::-1]) / 2
            box = boxes[numpy.linalg.norm(offsets, axis=1).argmin()]
            rows.append(",".join([str(photo.relative_to(folder)), *(f"{v:.2f}" for v in box)]))
    table = output / "rest.csv"
    table.write_text("\n".join([",".join(unlabelled.COLUMNS), *rows]) + "\n", encoding="utf-8")
    unlabelled.prepare(folder, output / "few", table, find, output / "rest")


def epochs(method, labelled, unlabelled_faces, steps, rounds=15):
    """Return the settings that make a training about `steps` optimiser steps long.

    Args:
        method: "supervised", "default" (half of the steps before at most `rounds` rounds) or
            "paper" (a sixth of the steps before five rounds).
        labelled: number of labelled faces.
        unlabelled_faces: number of unlabelled faces.
        steps: optimiser steps.
        rounds: largest number of rounds of the default preset.
    """
    epoch_steps = labelled // BATCH
    if method == "supervised":
        return {"epochs": max(1, round(steps / epoch_steps))}
    rounds, share, batch = ((5, 0, BATCH) if method == "paper" else
                            (rounds, stages.LABELLED, stages.LARGER * BATCH))
    repeated = gssl.repeats(labelled, unlabelled_faces, share) * labelled
    gssl_epoch_steps = (repeated + unlabelled_faces) // batch
    supervised_share = 1 / 6 if method == "paper" else 1 / 2
    gssl_epochs = steps * (1 - supervised_share) / gssl_epoch_steps
    if method == "default":
        rounds = max(1, min(rounds, round(gssl_epochs / max(1, round(gssl_epochs / rounds)))))
    round_epochs = max(1, round(gssl_epochs / rounds))
    first_steps = steps - rounds * round_epochs * gssl_epoch_steps
    settings = {"epochs": max(1, round(first_steps / epoch_steps)), "gssl_epochs": round_epochs}
    return settings if method == "paper" else {**settings, "gssl_rounds": rounds}


def commands(args):
    """Print the command line of every run."""
    few = PreparedSet(args.labelled)
    rest = unlabelled.read(args.unlabelled, few)
    methods = {"supervised": few, "default": few, "paper": few}
    if args.all:
        methods["ceiling"] = PreparedSet(args.all)
    methods = {name: methods[name] for name in args.methods if name in methods}
    for seed in range(args.seeds):
        for method, prepared in methods.items():
            name = f"{args.name}-{method}-{seed}"
            kind = "supervised" if method == "ceiling" else method
            settings = epochs(kind, len(prepared.lists["train"]), len(rest), args.steps,
                              args.rounds)
            # The warm-up is set in epochs, whose number of steps differs between methods.
            settings["warmup_epochs"] = f"{WARM_UP * settings['epochs']:.2f}"
            if kind != "supervised":
                settings |= {"gssl_preset": method, "unlabelled_dir": args.unlabelled,
                             "gssl": "true"}
            flags = " ".join([*(f"--{k.replace('_', '-')} {shlex.quote(str(v))}"
                                for k, v in settings.items()), args.flags])
            print(f"python main.py {FLAGS} --backbone {args.backbone} --data-dir "
                  f"{shell_word(prepared.folder)} --seed {seed} --exp {name} --report "
                  f"{shell_word(WEIGHTS / name / 'test.json')} {flags}")


def table(args):
    """Print mean and standard deviation of the first test list's NME, and the gap closed."""
    means = {}
    for method in METHODS:
        runs = args.baseline if method == "supervised" and args.baseline else (
            f"{args.name}-{method}")
        found = sorted(WEIGHTS.glob(f"{runs}-*/test.json"))
        values = [next(iter(json.loads(p.read_text())["pytorch"].values())) for p in found]
        if not values:
            continue
        nme = numpy.array([[v["nme"], v["nme_crop"]] for v in values])
        means[method] = nme[:, 0].mean()
        closed = ""
        if method != "supervised" and "supervised" in means:
            closed = f"{means['supervised'] - means[method]:+.3f} against supervised"
        print(f"{method:<11} photo pixels {nme[:, 0].mean():.3f} +- {nme[:, 0].std():.3f}, "
              f"published units {nme[:, 1].mean():.3f} +- {nme[:, 1].std():.3f} "
              f"({len(nme)} seeds) {closed}")
    if not means:
        sys.exit(f"weights/{args.name}-*/test.json: there are none")
    if {"supervised", "ceiling"} <= means.keys():
        gap = means["supervised"] - means["ceiling"]
        for method in ("paper", "default"):
            if method in means:
                print(f"{method} closes {100 * (means['supervised'] - means[method]) / gap:.0f} % "
                      f"of the gap of {gap:.3f}")


def main():
    """Parse the command line and run the action."""
    parser = argparse.ArgumentParser(prog="python -m tools.gssl_experiment", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    action = actions.add_parser("prepare")
    action.add_argument("source", help="prepared 300W at 128 px")
    action.add_argument("detector", help="haar, or the .onnx file of a detector")
    action.add_argument("output", type=pathlib.Path, help="folder for the sets; must be new")
    action = actions.add_parser("commands")
    action.add_argument("labelled")
    action.add_argument("unlabelled")
    action.add_argument("--all", help="the set with all labels, for the runs named ceiling")
    action.add_argument("--name", default="few", help="prefix of the experiments' names [few]")
    action.add_argument("--steps", type=int, default=6000, help="optimiser steps of a run [6000]")
    action.add_argument("--seeds", type=int, default=3)
    action.add_argument("--rounds", type=int, default=15,
                        help="largest number of rounds of the default preset [15]")
    action.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    action.add_argument("--backbone", default="test_resnet")
    action.add_argument("--flags", default="", help="more flags of main.py, in one argument")
    action = actions.add_parser("table")
    action.add_argument("--name", default="few")
    action.add_argument("--baseline", help="runs to compare with [those of NAME-supervised]")
    args = parser.parse_args()
    if args.action == "prepare":
        prepare(args.source, args.detector, args.output)
    else:
        {"commands": commands, "table": table}[args.action](args)


if __name__ == "__main__":
    guarded(main)
