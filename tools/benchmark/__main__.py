"""Speed, measured side by side in one process: python -m tools.benchmark --data-dir PREPARED_SET.

Ways of doing the same work take turns in shuffled order, and a table gives medians, so that a ratio
holds even where the machine is shared. Without --data-dir the faces are drawn. --only runs parts:
data, step, evaluation, deployment, irnet, growth, startup. --exp adds trained models (.pt) to the
deployment table, with the error of each variant. About a quarter of an hour on two cores.
A training on GPUs has a benchmark of its own, python -m tools.benchmark.gpu.
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
from utils.machine import tune_malloc

PARTS = {"data": data.data, "step": training.step, "evaluation": training.evaluate,
         "deployment": deployment.deployment, "irnet": deployment.irnet, "growth": growth.growth,
         "startup": startup.startup}


def parse(argv=None):
    """The command line as a namespace."""
    parser = argparse.ArgumentParser(prog="python -m tools.benchmark", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART",
                        help="parts to run [all]")
    parser.add_argument("--data-dir", help="a prepared set [drawn faces at 256 px]")
    parser.add_argument("--exp", nargs="*", default=[], metavar="FILE.pt",
                        help="trained models for the deployment table")
    parser.add_argument("--rounds", type=int, default=30, help="of each measurement [30]")
    parser.add_argument("--workers", type=int, default=2, help="loader processes of `step` [2]")
    parser.add_argument("--output", metavar="FILE", help="also write the Markdown here")
    parser.add_argument("--plot", default=str(ROOT / "assets" / "growth.png"), metavar="FILE",
                        help="where the growth plot goes [assets/growth.png]")
    return parser.parse_args(argv)


def run():
    """Measure, print the Markdown, and write it after every part."""
    options = parse()
    tune_malloc()
    args = load_args({"data_dir": options.data_dir} if options.data_dir else {"data": "samples"})
    prepared = dataset.PreparedSet(set_folder(args))
    lines = [*facts(prepared), f"* {options.rounds} rounds", ""]
    for name in options.only:
        say(f"== {name}")
        begun, threads = time.perf_counter(), torch.get_num_threads()
        found = PARTS[name](prepared, options)
        torch.set_num_threads(threads)
        say(f"== {name}: {time.perf_counter() - begun:.0f} s")
        lines += [f"## {name}", "", *found]
        if options.output:
            pathlib.Path(options.output).write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    guarded(run)
