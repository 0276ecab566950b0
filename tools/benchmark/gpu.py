"""Check and measure training on GPUs; prints Markdown, each row when it is measured.

    python -m tools.benchmark.gpu [--only PART ...] [--seconds N] [--output FILE]

The parts are:

* tests: runs the tests that need a GPU.
* resume: compares the weights of a training that is killed and resumed with an uninterrupted one.
* recipe: the training of rental.sh, which is the last stage of weights/accurate.pt, with teachers.
* epochs: seconds of an epoch's steps, its validation and a save.
* speed: images per second of trainings of several networks and batches, share of the time in which
  the device is idle, and the same step over one batch and as a CUDA graph.
* kernels: kernels of a step, and the ten longest.
* variants: one training in other precisions, with stride 16 at 192 px, --deterministic, --compile.
* ranks: images per second of a process and of one per GPU, with equal numbers of faces a GPU.
* accuracy: the README's training of drawn faces, and its NME.

Each measurement has a process and a time limit of its own. What fails or finds no time left says so
in its row, the others still run, and the exit code is 1. `--device cpu --quick` runs all parts with
small networks on a CPU in a few minutes, as a test of this program.
"""
import argparse
import pathlib
import shutil
import sys
import tempfile
import unittest.mock

from tools.benchmark import gpu_checks, gpu_speed, isolated
from tools.benchmark.common import facts
from tools.benchmark.gpu_bench import Bench, Report, Size
from utils.args import ROOT
from utils.data import dataset
from utils.data.generator import DataGenerator
from utils.data.readers import drawn
from utils.errors import UserError
from utils.errors import run as guarded

PARTS = {"tests": gpu_checks.tests, "resume": gpu_checks.resume, "recipe": gpu_speed.recipe,
         "epochs": gpu_speed.epochs, "speed": gpu_speed.speed, "kernels": gpu_speed.kernels,
         "variants": gpu_speed.variants, "ranks": gpu_checks.ranks,
         "accuracy": gpu_checks.accuracy}


def parse(argv=None):
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.benchmark.gpu", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART",
                        help="parts to run, in this order [all]")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--seconds", type=float, default=1200, metavar="N",
                        help="stop after so many seconds [1200]")
    parser.add_argument("--data-dir", metavar="SET", help="a prepared set [drawn faces]")
    parser.add_argument("--quick", action="store_true",
                        help="small networks and sets, to test this program")
    parser.add_argument("--output", metavar="FILE",
                        help="also write the Markdown to this file, and all figures to the file of "
                             "this name with .jsonl")
    return parser.parse_args(argv)


def copy(folder):
    """Copy the programs to a folder, so that trainings write no experiments here; return it."""
    tree = pathlib.Path(folder) / "tree"
    for name in ("nets", "utils"):
        shutil.copytree(ROOT / name, tree / name)
    for name in ("main.py", "main.sh", "args.yaml"):
        shutil.copy(ROOT / name, tree)
    (tree / "weights").mkdir()
    return tree


def _draw(size, folder):
    with unittest.mock.patch.object(drawn, "COUNTS", size.faces):
        DataGenerator("samples", size.input, folder, layout="samples").run()


def _facts(folder):
    return facts(dataset.PreparedSet(folder))


def run(argv=None):
    """Run the parts; exit with an error if a measurement failed."""
    options = parse(argv)
    size, clock = Size.quick() if options.quick else Size(), isolated.Clock(options.seconds)
    report = Report(options.output)
    with tempfile.TemporaryDirectory(prefix="gpu-") as folder:
        bench = Bench(size, options.device, copy(folder),
                      pathlib.Path(options.data_dir or pathlib.Path(folder) / "faces").resolve(),
                      clock, report)
        try:
            if not options.data_dir:
                isolated.call(_draw, clock.left, size, bench.faces)
            report.write(*isolated.call(_facts, 60, bench.faces), "")
        except isolated.Failure as failure:
            raise UserError(f"{bench.faces}: no faces to train on: {failure}") from None
        for name in options.only:
            report.write(f"## {name}", "")
            PARTS[name](bench)
            report.end()
    if bench.failed:
        sys.exit(f"failed or not measured: {', '.join(bench.failed)}")


if __name__ == "__main__":
    guarded(run)
