"""What the parts of the GPU benchmark share: amounts of work, measurements and the report."""
from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import time

from tools.benchmark.common import say, table
from tools.benchmark.gpu_training import Span
from tools.benchmark.isolated import Clock, Failure
from utils.data.readers import drawn

# Seconds that a measurement may take.
LIMIT = 60


@dataclasses.dataclass
class Size:
    """The amount of work of each part, for a measurement or for a quick test of this program."""
    input: int = 256
    faces: dict = dataclasses.field(default_factory=lambda: dict(drawn.COUNTS))
    backbones: tuple = ("irnet18", "mobilenetv3_large_100", "tf_efficientnet_lite0")
    batches: tuple = (32, 128, 16)
    span: Span = Span()
    recipe_batch: int = 128
    epochs: int = 3
    # For the parts resume, kernels, variants and ranks.
    backbone: str = "irnet18"
    fine: tuple = (192, 16)
    accuracy: tuple = ()

    @classmethod
    def quick(cls):
        """Return a size whose figures mean nothing."""
        small = "mobilenetv3_small_050"
        return cls(64, {"train": 64, "test": 8}, (small,), (8,), Span(0.2, 0.5, 0.2), 8, 2, small,
                   (64, 16), ("--backbone", small, "--input-size", "64", "--epochs", "1"))


class Report:
    """Writes Markdown to stdout and to a file, line by line, and figures beside the file.

    Args:
        path: the file; None: stdout alone. Figures go to its name with .jsonl, one measurement a
            line: {"name": ..., "found": ...}.
    """

    def __init__(self, path: str | None = None):
        self._paths = [pathlib.Path(path), pathlib.Path(path).with_suffix(".jsonl")] if path else []
        for file in self._paths:
            file.write_text("", encoding="utf-8")
        self._columns = 0

    def write(self, *lines):
        """Write lines."""
        for line in lines:
            print(line, flush=True)
        self._append(0, "".join(f"{line}\n" for line in lines))

    def _append(self, which, text):
        # Opened each time, so that nothing is lost where the machine goes away.
        if self._paths:
            with open(self._paths[which], "a", encoding="utf-8") as file:
                file.write(text)

    def figure(self, name, found):
        """Write what a measurement has returned, a dataclass or what JSON has."""
        found = dataclasses.asdict(found) if dataclasses.is_dataclass(found) else found
        self._append(1, json.dumps({"name": name, "found": found}) + "\n")

    def head(self, *cells):
        """Begin a table."""
        self._columns = len(cells)
        self.write(*table(cells, [])[:2])

    def row(self, *cells):
        """Write a row of the table."""
        self.write(table(cells, [])[0])

    def end(self):
        """End a table or a paragraph."""
        self._columns = 0
        self.write("")

    def failure(self, name, failure):
        """Write why there is no result, in the table if one has begun; its detail to stderr."""
        say(f"{name}: {failure}\n{failure.detail}")
        short = str(failure).replace("|", "/")
        if self._columns:
            self.row(name, short, *[""] * (self._columns - 2))
        else:
            self.write(f"{name}: {short}")


def workers() -> int:
    """Return the number of loader processes of a training."""
    return max(1, min(16, len(os.sched_getaffinity(0)) - 1))


def training_settings(size: Size, faces: pathlib.Path | str, device: str, backbone: str,
                      batch: int, **others: object) -> dict:
    """Return the settings of a training for gpu_training.measure."""
    return {"data_dir": str(faces), "backbone": backbone, "batch_size": batch,
            "effective_batch": batch, "input_size": size.input, "workers": workers(),
            "cache": "device", "device": device, "save_minutes": 1e6, **others}


@dataclasses.dataclass
class Bench:
    """What the parts share.

    Attributes:
        size: amount of work.
        device: `cuda` or `cpu`.
        tree: a copy of the programs, so that trainings write no experiments here.
        faces: folder of a prepared set.
        clock: time that is left.
        report: writes the lines.
        failed: names of measurements without a result.
    """
    size: Size
    device: str
    tree: pathlib.Path
    faces: pathlib.Path
    clock: Clock
    report: Report
    failed: list = dataclasses.field(default_factory=list)

    def settings(self, backbone: str, batch: int, **others: object) -> dict:
        """Return the settings of a training on the faces."""
        return training_settings(self.size, self.faces, self.device, backbone, batch, **others)

    def measure(self, name, function, *arguments, limit=LIMIT):
        """Call a function in a process of its own; report a failure and return None then."""
        say(f"{name} ...")
        start = time.monotonic()
        try:
            found = self.clock.call(function, limit, *arguments)
            self.report.figure(name, found)
            return found
        except Failure as failure:
            self.failed.append(name)
            self.report.failure(name, failure)
            return None
        finally:
            say(f"{name}: {time.monotonic() - start:.0f} s")
