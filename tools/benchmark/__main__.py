"""Measure the speed of data loading, training steps, evaluation, deployment and start-up.

    python -m tools.benchmark --data-dir PREPARED_SET [--only PART ...] [--exp FILE.pt ...]

Alternatives for the same work run alternately in random order in one process, and the tables have
medians, so that ratios hold on a shared machine. Without --data-dir the faces are drawn. --exp adds
trained models to the deployment table, with the NME of each variant. Takes about 15 minutes on two
cores. `python -m tools.benchmark.gpu` measures trainings on GPUs.
"""
import argparse
import pathlib
import time

import torch

from tools.benchmark import data, deployment, growth, startup, training
from tools.benchmark.common import facts, say
from utils.args import ROOT, load_args
from utils.data import dataset
from utils.data.sets import set_folder
from utils.errors import run as guarded
from utils.machine import tune

PARTS = {"data": data.data, "step": training.step, "evaluation": training.evaluate,
         "deployment": deployment.deployment, "irnet": deployment.irnet, "growth": growth.growth,
         "startup": startup.startup}


def parse(argv=None):
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.benchmark", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART",
                        help="parts to run [all]")
    parser.add_argument("--data-dir", help="a prepared set [drawn faces at 256 px]")
    parser.add_argument("--exp", nargs="*", default=[], metavar="FILE.pt",
                        help="trained models for the deployment table")
    parser.add_argument("--rounds", type=int, default=30,
                        help="repetitions of each measurement [30]")
    parser.add_argument("--workers", type=int, default=2,
                        help="loader processes of the part step [2]")
    parser.add_argument("--output", metavar="FILE", help="also write the Markdown to this file")
    parser.add_argument("--plot", default=str(ROOT / "assets" / "growth.png"), metavar="FILE",
                        help="file of the plot of the part growth [assets/growth.png]")
    return parser.parse_args(argv)


def run():
    """Run the parts and print their Markdown; write it to --output after every part."""
    options = parse()
    tune()
    args = load_args({"data_dir": options.data_dir or "samples"})
    prepared = dataset.PreparedSet(set_folder(args))
    lines = [*facts(prepared), f"* {options.rounds} rounds", ""]
    for name in options.only:
        say(f"== {name}")
        start, threads = time.perf_counter(), torch.get_num_threads()
        found = PARTS[name](prepared, options)
        torch.set_num_threads(threads)
        say(f"== {name}: {time.perf_counter() - start:.0f} s")
        lines += [f"## {name}", "", *found]
        if options.output:
            pathlib.Path(options.output).write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    guarded(run)
