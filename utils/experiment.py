"""weights/<exp>/: names, result tables and plots of experiments."""
import contextlib
import csv
import errno
import os
import pathlib
import re
import socket

from utils.args import ROOT
from utils.errors import UserError
from utils.files import atomic_write

WEIGHTS = ROOT / "weights"
SHIPPED = "tiny"  # Of the models there, what is used where none is named.
EPOCH_FIELDS = ("epoch", "lr", "loss", "val_nme", "seconds", "round")
RUN_FIELDS = ("exp", "data", "scheme", "backbone", "head", "epochs", "batch", "lr", "parameters",
              "gmacs", "val_nme", "nme", "onnx_nme")

LOCK = "lock"


class Lock:
    """The right to train in an experiment's folder, for one training at a time.

    It is the system's lock of the file `lock` there: it dies with its process, however that ends,
    and holds among machines that share the disk. Used with `with`. Raises UserError where another
    training has it, with that one's process and machine.
    """

    def __init__(self, folder):
        self.path, self.file = folder / LOCK, None
        try:
            import fcntl
        except ImportError:
            return  # Windows, whose locks would keep the folder from being copied.
        self.file = open(self.path, "a+", encoding="utf-8")
        try:
            # Of the process, not of the open file: the loader's forks do not keep it.
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
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

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.file is None:
            return
        # An experiment that saved nothing leaves nothing, as if it had not begun.
        if [path.name for path in self.path.parent.iterdir()] == [LOCK]:
            self.path.unlink()
            with contextlib.suppress(OSError):
                self.path.parent.rmdir()
        self.file.close()


def new_experiment(name="none", folder=WEIGHTS):
    """Make and return the folder of a new experiment: `name`, or the next free number from 000.

    Raises UserError where the name is taken or is no plain folder name.
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


def find_experiment(name, folder=WEIGHTS, *, others=()):
    """The folder of an existing experiment. Raises UserError listing those that exist, and others,
    names that would do as well.
    """
    if name != "none" and (folder / name).is_dir():
        return folder / name
    known = sorted({*others, *(p.parent.name for p in folder.glob("*/*.pt"))})
    what = "give --exp" if name == "none" else f"{name}: no such experiment"
    raise UserError(f"{what}; there are: {', '.join(known) or 'none yet'}")


def newest_experiment(pattern="best.*", folder=WEIGHTS):
    """The name of the experiment whose file of this pattern was written last. Raises UserError."""
    files = sorted(folder.glob(f"*/{pattern}"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise UserError(f"--exp without a name: {folder.name}/ holds no experiment with a "
                        f"{pattern} yet")
    return files[-1].parent.name


def find_weights(name, suffix=".pt", folder=WEIGHTS):
    """The file that --exp or --weights means: a path, the best of an experiment, a file of this
    name at the top of weights/, or (none) the shipped one, else the newest experiment's.

    suffix: the kind that is wanted first, .pt or .onnx. Raises UserError.
    """
    kinds = sorted((".pt", ".onnx"), key=lambda kind: kind != suffix)
    if name == "none":
        newest = [folder / newest_experiment("best.*", folder)] if any(
            folder.glob("*/best.*")) else []
        for path in [*(folder / f"{SHIPPED}{kind}" for kind in kinds),
                     *(experiment / f"best{kind}" for experiment in newest for kind in kinds)]:
            if path.is_file():
                return path
        raise UserError(f"{folder.name}/: no trained model; give the path of a .pt or .onnx, or "
                        f"train one: bash main.sh 1 --train --test-onnx --data samples")
    path = pathlib.Path(name)
    if name.endswith((".pt", ".onnx")) or path.is_file():
        if not path.exists():
            raise UserError(f"{name}: no such file")
        if path.suffix not in (".pt", ".onnx"):
            raise UserError(f"{name}: found {path.suffix or 'no suffix'}; weights are a .pt or "
                            f".onnx file of main.py, or an experiment's name")
        return path
    if name and not (folder / name).exists():
        for path in (folder / f"{name}{kind}" for kind in kinds):
            if path.is_file():
                return path
    found = find_experiment(name, folder,
                            others={path.stem for path in folder.glob("*.pt")})
    for path in (found / f"best{suffix}", found / "best.pt"):
        if path.is_file():
            return path
    raise UserError(f"{found}: has no best{suffix} yet; train it first")


def tensorboard(folder, first=True):
    """TensorBoard's writer into weights/<exp>/tensorboard, or None on all ranks but the first.

    Raises UserError, on every rank, where it is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard: it is not installed; pip install tensorboard") from None
    return SummaryWriter(str(folder / "tensorboard")) if first else None


def append_epoch(folder, row):
    """Add a row (dict of EPOCH_FIELDS) to the experiment's results.csv; round is 0 where absent."""
    rows = [r for r in read_epochs(folder) if r["epoch"] < row["epoch"]]
    _write(folder / "results.csv", EPOCH_FIELDS, [*rows, {"round": 0} | row])


def read_epochs(folder):
    """The rows of the experiment's results.csv as dicts of numbers; [] if there is none yet."""
    path = folder / "results.csv"
    if not path.is_file():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return [{"round": 0} | {k: int(v) if k in ("epoch", "round") else float(v)
                                for k, v in row.items()}
                for row in csv.DictReader(file)]


def record(row, folder=WEIGHTS):
    """Add or update the line of row["exp"] in weights/results.csv; other fields stay."""
    path = folder / "results.csv"
    with open(folder / "results.lock", "w", encoding="utf-8") as file:
        with contextlib.suppress(ImportError):  # Windows has none.
            import fcntl
            fcntl.lockf(file, fcntl.LOCK_EX)
        rows = read_records(folder)
        old = next((r for r in rows if r["exp"] == row["exp"]), None)
        if old is None:
            old = dict.fromkeys(RUN_FIELDS, "")
            rows.append(old)
        old.update({k: v for k, v in row.items() if k in RUN_FIELDS})
        _write(path, RUN_FIELDS, rows)


def data_name(args, folder):
    """What a line of results.csv calls the set of args, which lies in folder (pathlib.Path)."""
    return args.data if args.data != "none" else folder.name


def record_fit(weights, val_nme, data):
    """Put the validation NME (in %, of the set called data) of an experiment's best file that was
    changed after its training into its line, if the line is of that set; older scores go.
    """
    name = weights.parent.name
    for row in read_records(weights.parent.parent):
        if weights.stem == "best" and row["exp"] == name:
            record({"exp": name, "val_nme": f"{val_nme:.3f}" if row["data"] == data else "",
                    "nme": "", "onnx_nme": ""}, weights.parent.parent)


def record_score(weights, report, data):
    """Add the NMEs of a test's report to the line of the experiment that the weights belong to.

    data: what was tested on; another set than the experiment's leaves its line alone, as do other
    files than its best (best.int8.onnx).
    """
    name = weights.parent.name
    if weights.stem != "best" or not any((row["exp"], row["data"]) == (name, data)
               for row in read_records(weights.parent.parent)):
        return
    scores = {column: f"{next(iter(report[way].values()))['nme']:.3f}"
              for way, column in (("pytorch", "nme"), ("onnx", "onnx_nme")) if way in report}
    record({"exp": name, **scores}, weights.parent.parent)


def read_records(folder=WEIGHTS):
    """The rows of weights/results.csv, as dicts of strings. Raises UserError if it is damaged."""
    path = folder / "results.csv"
    if not path.is_file():
        return []
    try:
        with open(path, newline="", encoding="utf-8") as file:
            return [{k: row.get(k) or "" for k in RUN_FIELDS} for row in csv.DictReader(file)]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read ({error}); move it away") from None


def _write(path, fields, rows):
    with (atomic_write(path) as temporary,
          open(temporary, "w", newline="", encoding="utf-8") as file):
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        writer.writerows(rows)


def compare(folder=WEIGHTS):
    """All experiments as a Markdown table; also written to weights/results.md."""
    rows = read_records(folder)
    if not rows:
        raise UserError(f"{folder / 'results.csv'}: no experiment is recorded yet")
    lines = ["| " + " | ".join(RUN_FIELDS) + " |", "|" + " --- |" * len(RUN_FIELDS)]
    lines += ["| " + " | ".join(row[k] for k in RUN_FIELDS) + " |" for row in rows]
    text = "\n".join(lines) + "\n"
    (folder / "results.md").write_text(text, encoding="utf-8")
    return text


def plot_curves(folder):
    """Draw results.csv as curves.png: loss, validation NME and learning rate against epochs."""
    pyplot = _pyplot()
    rows = read_epochs(folder)
    titles = {"loss": "training loss", "val_nme": "validation NME, %", "lr": "learning rate"}
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 3.8), constrained_layout=True)
    for axis, (key, title) in zip(axes, titles.items()):
        axis.plot([r["epoch"] for r in rows], [r[key] for r in rows], marker=".")
        # Where a round of self-training begins.
        for before, after in zip(rows, rows[1:]):
            if before["round"] != after["round"]:
                axis.axvline(after["epoch"] - 0.5, color="grey", linestyle="--", linewidth=1)
        axis.set(title=title, xlabel="epoch")
        axis.grid(alpha=0.3)
    axes[0].set_yscale("log")
    figure.savefig(folder / "curves.png", dpi=90)
    pyplot.close(figure)


def plot_ced(errors, path):
    """Draw cumulative error distributions. errors: label to NMEs (N,) as fractions, NaN where a
    face was not found.
    """
    import numpy
    pyplot = _pyplot()
    figure, axis = pyplot.subplots(figsize=(6, 4.4), constrained_layout=True)
    for label, values in errors.items():
        values = 100 * numpy.sort(values[numpy.isfinite(values)])
        share = numpy.arange(1, len(values) + 1) / len(values)
        mean = f"{values.mean():.2f}" if len(values) else "none"
        axis.step([0, *values], [0, *share], where="post", label=f"{label}: {mean}")
    axis.set(xlim=(0, 10), ylim=(0, 1), xlabel="NME, %", ylabel="share of faces",
             title="cumulative error distribution")
    axis.grid(alpha=0.3)
    axis.legend(title="list: mean NME, %", loc="lower right")
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def plot_roc(shut, opened, path):
    """Draw the ROC curve of values that are lower where eyes are shut: shut (n,), opened (m,)."""
    import numpy
    pyplot = _pyplot()
    figure, axis = pyplot.subplots(figsize=(6, 4.4), constrained_layout=True)
    limits = numpy.unique(numpy.concatenate([shut, opened]))
    called = [100 * numpy.searchsorted(numpy.sort(values), limits, "right") / len(values)
              for values in (opened, shut)]
    axis.step(*([0, *values] for values in called), where="post")
    axis.set(xlim=(0, 10), ylim=(50, 100), xlabel="false alarms, % of open eyes",
             ylabel="recall, % of shut eyes", title="shut eyes by the eye aspect ratio (ROC)")
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def _pyplot():
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    return pyplot
