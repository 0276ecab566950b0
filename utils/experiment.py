"""Folders and tables of experiments.

An experiment is a folder weights/<exp>/ with its checkpoints, ONNX files, plots and a results.csv
of one row an epoch. weights/results.csv has one row an experiment; --compare prints it as a table.
Commands name weights by experiment, by file or not at all; find_weights turns that into a path.
"""
from __future__ import annotations

import argparse
import contextlib
import csv
import errno
import os
import pathlib
import re
import socket
import typing
from collections.abc import Iterable, Mapping

from utils.args import ROOT, SAMPLES
from utils.errors import UserError
from utils.files import atomic_write, read_table, write_text

WEIGHTS = ROOT / "weights"
DEFAULT_MODEL = "tiny"  # The published model that is used where no weights are named.
EPOCH_FIELDS = ("epoch", "lr", "loss", "val_nme", "seconds", "stage")
RUN_FIELDS = ("exp", "data", "scheme", "backbone", "head", "epochs", "batch", "lr", "parameters",
              "gmacs", "val_nme", "nme", "onnx_nme")
LOCK = "lock"
# What lockf reports on a shared disk that has no locks.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class Lock:
    """Hold an experiment's folder for one training, as a context manager.

    A lock of the operating system on the file `lock` there. It ends with the process, however that
    ends, and holds across machines that share the disk. Windows and some shared disks have no such
    lock, and none is held.

    Args:
        folder: of the experiment.

    Raises:
        UserError: where another training holds the folder; names its process and machine.
    """

    def __init__(self, folder: pathlib.Path):
        self.path, self.file = folder / LOCK, None
        try:
            import fcntl
        except ImportError:
            return  # The locks of Windows would prevent copying the folder.
        # Open until __exit__: closing the file releases the lock.
        self.file = open(self.path, "a+", encoding="utf-8")  # noqa: SIM115
        try:
            # lockf belongs to the process, so forked data loaders do not keep it.
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in NO_LOCKS:
                print(f"note: {folder}: its disk has no file locks ({error.strerror}); see to it "
                      f"that nothing else trains this experiment", flush=True)
                return
            self.file.seek(0)
            holder = self.file.read().strip() or "another process"
            self.file.close()
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            raise UserError(f"{folder}: is being trained by {holder}; wait for it, end it, or give "
                            f"another --exp") from None
        self.file.truncate(0)
        self.file.write(f"process {os.getpid()} on {socket.gethostname()}")
        self.file.flush()

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_) -> None:
        if self.file is None:
            return
        # Remove the folder of a training that saved nothing. It may have been moved meanwhile.
        with contextlib.suppress(OSError):
            if [path.name for path in self.path.parent.iterdir()] == [LOCK]:
                self.path.unlink()
                self.path.parent.rmdir()
        self.file.close()


def new_experiment(name: str = "none", folder: pathlib.Path = WEIGHTS) -> pathlib.Path:
    """Create the folder of a new experiment.

    Args:
        name: of the experiment; none: the next free number from 000.
        folder: that holds the experiments.

    Raises:
        UserError: where the name is taken or is no plain folder name.
    """
    if name != "none":
        if not re.fullmatch(r"[\w][\w.+-]*", name) or name.endswith((".pt", ".onnx")):
            raise UserError(f"--exp {name}: an experiment is named by letters, digits and . _ + -")
        try:
            (folder / name).mkdir(parents=True)
        except FileExistsError:
            if not (folder / name).is_dir() or any(path.name != LOCK for path in
                                                   (folder / name).iterdir()):
                raise UserError(f"{folder / name}: the experiment exists; add --resume to go on "
                                f"with it, or choose another --exp") from None
        return folder / name
    number = 0
    while True:
        try:
            (folder / f"{number:03d}").mkdir(parents=True)
            return folder / f"{number:03d}"
        except FileExistsError:
            number += 1


def short_name(name: str, folder: pathlib.Path = WEIGHTS, *, files: bool = False) -> str:
    """Return the experiment or published model that a path means, else the name as it is.

    Tab completion writes weights/NAME, weights/NAME/, weights/NAME. (of a model's files) and
    weights/NAME/last.pt.

    Args:
        name: as typed.
        folder: that holds the experiments.
        files: whether a file in the folder of an experiment means the experiment.
    """
    path = pathlib.Path(name)
    if not name.strip() or len(path.parts) < 2:
        return path.name if name.endswith("/") else name
    if path.suffix in (".pt", ".onnx"):
        is_inside = path.resolve().parent.parent == folder.resolve()
        return path.resolve().parent.name if files and is_inside else name
    return path.name.rstrip(".") if path.resolve().parent == folder.resolve() else name


def find_experiment(name: str, folder: pathlib.Path = WEIGHTS, *,
                    models: Iterable[str] = ()) -> pathlib.Path:
    """Return the folder of an existing experiment.

    Args:
        name: of the experiment.
        folder: that holds the experiments.
        models: names of published models, which the error lists too.

    Raises:
        UserError: where there is none of this name; lists the existing ones.
    """
    name = short_name(name, folder, files=True)
    if name != "none" and (folder / name).is_dir():
        return folder / name
    known = sorted({*models, *(p.parent.name for p in folder.glob("*/*.pt"))})
    problem = "give --exp" if name == "none" else f"{name}: no such experiment"
    raise UserError(f"{problem}; there are: {', '.join(known) or 'none yet'}")


def newest_experiment(pattern: str = "best.*", folder: pathlib.Path = WEIGHTS) -> str:
    """Return the name of the experiment whose file of this pattern was written last.

    Raises:
        UserError: where no experiment has such a file.
    """
    files = sorted(folder.glob(f"*/{pattern}"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise UserError(f"--exp without a name: {folder.name}/ holds no experiment with a "
                        f"{pattern} yet")
    return files[-1].parent.name


def find_weights(name: str, suffix: str = ".pt",
                 folder: pathlib.Path = WEIGHTS) -> pathlib.Path:
    """Return the weights file that --exp or --weights means.

    Args:
        name: path of a .pt or .onnx, an experiment (its best file) or a published model, or their
            path in weights/ (see short_name); none: the default model, or else the best file of the
            newest experiment.
        suffix: the preferred kind, .pt or .onnx.
        folder: that holds experiments and published models.

    Raises:
        UserError: where there is no such file.
    """
    suffixes = sorted((".pt", ".onnx"), key=lambda kind: kind != suffix)
    if name == "none":
        newest = [folder / newest_experiment("best.*", folder)] if any(
            folder.glob("*/best.*")) else []
        for path in [*(folder / f"{DEFAULT_MODEL}{kind}" for kind in suffixes),
                     *(experiment / f"best{kind}" for experiment in newest for kind in suffixes)]:
            if path.is_file():
                return path
        raise UserError(f"{folder.name}/: no trained model; give the path of a .pt or .onnx, or "
                        f"train one: bash main.sh 1 --train --test-onnx --data-dir samples")
    name = short_name(name, folder)
    path = pathlib.Path(name)
    if name.endswith((".pt", ".onnx")) or path.is_file():
        if not path.exists():
            raise UserError(f"{name}: no such file")
        if path.suffix not in (".pt", ".onnx"):
            raise UserError(f"{name}: found {path.suffix or 'no suffix'}; weights are a .pt or "
                            f".onnx file of main.py, or an experiment's name")
        return path
    if name and not (folder / name).exists():
        for path in (folder / f"{name}{kind}" for kind in suffixes):
            if path.is_file():
                return path
    found = find_experiment(name, folder, models={path.stem for path in folder.glob("*.pt")})
    for path in (found / f"best{suffix}", found / "best.pt"):
        if path.is_file():
            return path
    raise UserError(f"{found}: has no best{suffix} yet; train it first")


def tensorboard_writer(folder: pathlib.Path, is_main: bool = True) -> typing.Any:
    """Return TensorBoard's SummaryWriter for an experiment's folder, or None on other ranks.

    Raises:
        UserError: on every rank, where TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard: it is not installed; pip install tensorboard") from None
    return SummaryWriter(str(folder / "tensorboard")) if is_main else None


def append_epoch(folder: pathlib.Path, row: Mapping[str, float | str]) -> None:
    """Append an epoch to the experiment's results.csv, and drop rows from this epoch on.

    Args:
        folder: of the experiment.
        row: values of EPOCH_FIELDS.
    """
    rows = [r for r in read_epochs(folder) if r["epoch"] < row["epoch"]]
    _write_table(folder / "results.csv", EPOCH_FIELDS, [*rows, row])


def read_epochs(folder: pathlib.Path) -> list[dict[str, float | str]]:
    """Return the rows of the experiment's results.csv; none where there is no such file."""
    path = folder / "results.csv"
    if not path.is_file():
        return []
    kinds = {"epoch": int, "stage": str}
    # Files of earlier versions have the number of a round in place of the stage's name.
    rows = [{"stage": row.get("round", ""), **row} for _, row in read_table(path).rows]
    return [{k: kinds.get(k, float)(row[k]) for k in EPOCH_FIELDS} for row in rows]


def record(row: Mapping, folder: pathlib.Path = WEIGHTS) -> None:
    """Add or update the row of an experiment in weights/results.csv.

    Args:
        row: `exp` and the fields of RUN_FIELDS to set; other fields keep their values.
        folder: that holds the table.
    """
    path = folder / "results.csv"
    with open(folder / "results.lock", "w", encoding="utf-8") as file:
        _wait_for_lock(file)
        rows = read_records(folder)
        old = next((r for r in rows if r["exp"] == row["exp"]), None)
        if old is None:
            old = dict.fromkeys(RUN_FIELDS, "")
            rows.append(old)
        old.update({k: v for k, v in row.items() if k in RUN_FIELDS})
        _write_table(path, RUN_FIELDS, rows)


def _wait_for_lock(file):
    """Lock a file until it is closed; without a lock where the system or the disk has none."""
    try:
        import fcntl
        fcntl.lockf(file, fcntl.LOCK_EX)
    except ImportError:
        return  # Windows has no fcntl.
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise


def data_name(args: argparse.Namespace, folder: pathlib.Path) -> str:
    """Return the name in results.csv of the data set of args, which was prepared in folder."""
    return SAMPLES if args.data_dir == SAMPLES else folder.name


def record_fit(weights: pathlib.Path, val_nme: float, data: str) -> None:
    """Record that an experiment's best file was changed after training; clears its test scores.

    Args:
        weights: the file that was changed.
        val_nme: its validation NME in %.
        data: the set it was measured on; the NME is recorded where the row is of this set.
    """
    name = weights.parent.name
    for row in read_records(weights.parent.parent):
        if weights.stem == "best" and row["exp"] == name:
            record({"exp": name, "val_nme": f"{val_nme:.3f}" if row["data"] == data else "",
                    "nme": "", "onnx_nme": ""}, weights.parent.parent)


def record_score(weights: pathlib.Path, report: Mapping, data: str) -> None:
    """Record test NMEs in the row of the experiment that the weights belong to.

    Args:
        weights: that were scored; only an experiment's best file is recorded.
        report: of evaluation.score.run_test; the first list of each runtime is recorded.
        data: the set that was tested; a row of another set is left unchanged.
    """
    name = weights.parent.name
    if weights.stem != "best" or (name, data) not in [
            (row["exp"], row["data"]) for row in read_records(weights.parent.parent)]:
        return
    scores = {column: f"{next(iter(report[runtime].values()))['nme']:.3f}"
              for runtime, column in (("pytorch", "nme"), ("onnx", "onnx_nme"))
              if runtime in report}
    record({"exp": name, **scores}, weights.parent.parent)


def read_records(folder: pathlib.Path = WEIGHTS) -> list[dict[str, str]]:
    """Return the rows of weights/results.csv.

    Raises:
        UserError: where the file is damaged.
    """
    path = folder / "results.csv"
    if not path.is_file():
        return []
    try:
        return [{k: row.get(k) or "" for k in RUN_FIELDS} for _, row in read_table(path).rows]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read ({error}); move it away") from None


def _write_table(path, fields, rows):
    with (atomic_write(path) as temporary,
          open(temporary, "w", newline="", encoding="utf-8") as file):
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        writer.writerows(rows)


def compare(folder: pathlib.Path = WEIGHTS) -> str:
    """Return all experiments as a Markdown table, and write it to weights/results.md.

    Raises:
        UserError: where no experiment is recorded yet.
    """
    rows = read_records(folder)
    if not rows:
        raise UserError(f"{folder / 'results.csv'}: no experiment is recorded yet")
    lines = ["| " + " | ".join(RUN_FIELDS) + " |", "|" + " --- |" * len(RUN_FIELDS)]
    lines += ["| " + " | ".join(row[k] for k in RUN_FIELDS) + " |" for row in rows]
    text = "\n".join(lines) + "\n"
    write_text(folder / "results.md", text)
    return text
