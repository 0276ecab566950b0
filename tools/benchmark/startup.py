"""Start-up: seconds until a command has ended."""
import contextlib
import pathlib
import subprocess
import sys
import tempfile

import numpy

from tools.benchmark.common import build, measure, table
from utils.args import ROOT
from utils.deploy import export


def startup(prepared, options):
    """Measure the first command lines that a user tries, each in a new process."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        weights = pathlib.Path(folder, "model.onnx")
        model = build("mobilenetv3_large_100", prepared.size or 256, prepared.lists["train"],
                      prepared)
        export.export_onnx(model, weights)
        commands = {
            "python -c pass": ["-c", "pass"], "main.py --help": ["main.py", "--help"],
            "demo.py --help": ["demo.py", "--help"],
            "demo.py --source sample, to the written picture": [
                "demo.py", "--source", "sample", "--output", f"{folder}/out.jpg", "--weights",
                str(weights)]}

        def start(command):
            done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True,
                                  text=True)
            # Exit code 1 is no failure here: the untrained network may lose the face.
            if done.returncode not in (0, 1):
                raise RuntimeError(f"{' '.join(command)}: {done.stderr[-500:]}")

        found = measure({k: lambda c=c: start(c) for k, c in commands.items()},
                        max(3, options.rounds // 3))
    return table(["command", "median s", "p90 s"], [
        [f"`{k}`", f"{numpy.median(v):.2f}", f"{numpy.percentile(v, 90):.2f}"]
        for k, v in found.items()])
