"""Check that a refactoring changes no result: compare hashes of what the commands write.

    python -m tools.same record BEFORE.json              # before the change
    python -m tools.same check BEFORE.json               # after it: one line an entry
    python -m tools.same record BEFORE.json --tree OLD   # run another checkout, e.g. an older one

The items are small trainings at 64 px on drawn faces (one thread, fp32, CPU; see RUNS), test,
export and demo of a trained model, and sets that are prepared from ../shared where that exists.
`check` ends with code 1 if an entry differs; `--only NAME ...` runs some items. The program uses
only command lines, the files they write and `utils.util`, so it runs any version of the repository.
It works on a copy of the checkout, with uncommitted changes, in a temporary folder.

Takes five minutes on two cores. `--only shipped` takes minutes more: it scores the shipped models
on the LFPW test set of 300W. Hashes depend on the processor and the packages, so record and check
on the same machine.
"""
import argparse
import csv
import functools
import hashlib
import json
import os
import pathlib
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import cv2
import numpy
import onnxruntime
import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
BASE = ("--train --seed 0 --precision fp32 --device cpu --workers 1 --input-size 64 --stride 16 "
        "--epochs 2 --batch-size 4 --effective-batch 8")
SMALL = "--data-dir samples-64 --backbone test_resnet"
GSSL = f"{SMALL} --gssl --unlabelled-dir others"
# {experiment: flags}. Option names are spelled as the oldest versions accept them.
RUNS = {
    "irnet18": "--data samples --backbone irnet18",
    "timm": "--data-dir samples-64 --backbone mobilenetv3_small_050",
    "two": SMALL,
    "gssl": f"{GSSL} --gssl-rounds 2 --gssl-epochs 1",
    "paper": f"{GSSL} --gssl-preset paper --epochs 1",
    "teacher": f"{SMALL} --teacher weights/timm/best.pt --cache ram",
    "eyes": f"{SMALL} --scheme eyes --num-nb 5 --reg 2 --pretrained weights/undisturbed/best.pt",
    "undisturbed": f"{SMALL} --epochs 3",
    "killed": f"{SMALL} --epochs 3 --save-minutes 0.01",
    "regression": f"{SMALL} --head regression --offset-loss wing --epochs 1",
    "confidence": f"{SMALL} --merge confidence --offset-loss smooth_l1 --ema 0 --epochs 1",
}
# Lines that the lists of drawn faces are cut down to, and the number of unlabelled faces.
LIST_LINES, UNLABELLED = {"train": 44, "val": 4, "test": 32}, 16


def digest(*parts):
    """Hash strings, bytes, arrays, tensors and nested lists and dicts of them to 16 hex digits."""
    sha = hashlib.sha256()

    def add(part):
        if isinstance(part, torch.Tensor):
            part = part.detach().contiguous().numpy()
        if isinstance(part, numpy.ndarray):
            add(f"{part.dtype}{part.shape}")
            part = part.tobytes()
        elif isinstance(part, dict):
            part = list(part.items())
        if isinstance(part, list | tuple):
            add(f"{len(part)} parts")
            for item in part:
                add(item)
        else:
            sha.update(part if isinstance(part, bytes) else repr(part).encode())

    add(parts)
    return sha.hexdigest()[:16]


class Tree:
    """A copy of a checkout in a temporary folder, where its commands run."""

    def __init__(self, source, folder):
        self.folder = pathlib.Path(folder) / "tree"
        files = subprocess.run(["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=source,
                               check=True, capture_output=True, text=True).stdout.split("\0")
        for name in filter(None, files):
            if (source / name).is_file():
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source / name, self.folder / name)
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENCV_FOR_THREADS_NUM"),
                                "1")
        self.env = {**os.environ, **threads, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": "",
                    "PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"}
        self.log = self.folder.parent / "log"

    def start(self, *argv):
        """Start a command in the copy and return its Popen; the output goes to `log`."""
        with open(self.log, "w") as log:
            return subprocess.Popen([str(a) for a in argv], cwd=self.folder, env=self.env,
                                    stdout=log, stderr=subprocess.STDOUT)

    def run(self, *argv):
        """Run a command and return its output; raise RuntimeError if it fails."""
        code = self.start(*argv).wait()
        text = self.log.read_text(errors="replace")
        if code:
            raise RuntimeError(f"{' '.join(map(str, argv))} ended with {code}: {text[-2000:]}")
        return text

    def main(self, *argv):
        """Run `python main.py argv`."""
        return self.run(sys.executable, "main.py", *argv)

    def generate(self, **options):
        """Run util.DataGenerator; paths are absolute or relative to the copy."""
        self.run(sys.executable, "-c",
                 f"from utils import util; util.DataGenerator(**{options!r}).run()")

    @functools.cached_property
    def drawn(self):
        """Hashes of the set of drawn faces, which is then cut down, with `others` as unlabelled."""
        # Any command with this option prepares the set.
        self.main("--test-onnx", "--exp", "weights/tiny.int8.onnx", "--data", "samples",
                  "--input-size", 64)
        faces, others = self.folder / "samples-64", self.folder / "others"
        found = set_entries(faces)
        shutil.copytree(faces, others)
        for name, count in LIST_LINES.items():
            lines = (faces / f"{name}.txt").read_text().splitlines(True)
            (faces / f"{name}.txt").write_text("".join(lines[:count]))
            (others / f"{name}.txt").unlink()
            if name == "train":
                (others / "unlabelled.txt").write_text("".join(
                    f"{line.split()[0]}\n" for line in lines[-UNLABELLED:]))
        return found

    @functools.cache  # noqa: B019
    def trained(self, exp):
        """Train an experiment of RUNS, and those that it needs first; return its folder."""
        for needed in re.findall(r"weights/(\w+)/", RUNS[exp]):
            self.trained(needed)
        assert self.drawn
        folder = self.folder / "weights" / exp
        argv = [*BASE.split(), *RUNS[exp].split(), "--exp", exp]
        if exp == "two":
            self.run("bash", "main.sh", 2, *argv)
            return folder
        if exp == "killed":
            self.kill(signal.SIGTERM, (folder / "args.yaml").exists, argv)
            argv = ["--resume", "--exp", exp]
            self.kill(signal.SIGKILL, lambda: torch.load(
                folder / "last.pt", weights_only=True)["epoch"] > 0, argv)
        self.main(*argv)
        return folder

    def kill(self, number, condition, argv):
        """Start `main.py argv` and send it a signal as soon as condition() holds."""
        child = self.start(sys.executable, "main.py", *argv)
        while child.poll() is None and not condition():
            time.sleep(0.02)
        child.send_signal(number)
        if child.wait() != (-number if number == signal.SIGKILL else 128 + number):
            raise RuntimeError(f"ended before the signal: {self.log.read_text()[-2000:]}")

    def outputs(self, path):
        """Return the outputs of an .onnx file on the drawn test faces."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        lines = (self.folder / "samples-64" / "test.txt").read_text().splitlines()
        images = [cv2.resize(cv2.imread(str(self.folder / "samples-64" / line.split()[0])),
                             (64, 64)) for line in lines]
        return session.run(None, {"images": numpy.stack(images).transpose(0, 3, 1, 2)[:, ::-1]})


def training_entries(tree, exp):
    """Hashes of a training: weights, average, optimizer, tables, ONNX outputs and metadata."""
    folder = tree.trained(exp)
    best, last = (torch.load(folder / name, weights_only=True) for name in ("best.pt", "last.pt"))
    epochs = [{k: v for k, v in row.items() if k != "seconds"}
              for row in rows(folder / "results.csv")]
    # The experiment's row without its name and the columns that later tests fill.
    record = [{k: v for k, v in row.items() if k not in ("exp", "nme", "onnx_nme")}
              for row in rows(tree.folder / "weights" / "results.csv") if row["exp"] == exp]
    meta = onnxruntime.InferenceSession(folder / "best.onnx").get_modelmeta().custom_metadata_map
    return {"val NME": epochs[-1]["val_nme"], "best.pt": digest(best["weights"]),
            **{f"last.pt {name}": digest(last[name]) for name in ("model", "ema", "optimizer")},
            "results.csv": digest(epochs), "record": digest(record),
            "onnx": digest(tree.outputs(folder / "best.onnx")),
            "onnx metadata": digest(sorted(meta.items()))}


def test_entries(tree):
    """Hashes of a test with PyTorch and ONNX, of the table of --compare and of int8 outputs."""
    folder = tree.trained("timm")
    tree.main("--export", "--test", "--test-onnx", "--flip-test", "--exp", "timm",
              "--report", "r.json")
    table = [line for line in tree.main("--compare").splitlines() if "timm" in line]
    tree.main("--export", "--int8", "--exp", "timm")
    return {"report": digest(json.loads((tree.folder / "r.json").read_text())),
            "compare": digest(table),
            "onnx": digest(tree.outputs(folder / "best.onnx")),
            "int8": digest(tree.outputs(folder / "best.int8.onnx"))}


def demo_entries(tree):
    """Hashes of the demo's landmarks and picture of the portrait that comes with matplotlib."""
    tree.run(sys.executable, "demo.py", "--source", "sample", "--output", "demo.png",
             "--landmarks", "demo.csv")
    return {"landmarks": digest((tree.folder / "demo.csv").read_text()),
            "picture": digest(cv2.imread(str(tree.folder / "demo.png")))}


def rows(path):
    """Return the rows of a CSV file as dicts."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def set_entries(folder):
    """Hashes of a prepared or unlabelled set: one for each text file, one for all images."""
    found = {path.name: digest(path.read_text()) for path in sorted(folder.iterdir())
             if path.suffix in (".txt", ".yaml")}
    # The path of a photo depends on the machine.
    found["sources.csv"] = digest([{k: v for k, v in row.items() if k != "photo"}
                                   for row in rows(folder / "sources.csv")])
    images = sorted((folder / "images").rglob("*.jpg"))
    return found | {"images": digest([(str(path.relative_to(folder)), path.read_bytes())
                                      for path in images])}


def prepared_entries(tree):
    """Hashes of 300W at 64 px and of 60 photos of LFW as its unlabelled set."""
    tree.generate(data_dir=str(SHARED / "data" / "300W"), target_size=64, output_dir="300W-64")
    boxes = (SHARED / "data/unlabelled/lfw/boxes.csv").read_text().splitlines(True)
    (tree.folder / "boxes.csv").write_text("".join(boxes[:61]))
    tree.generate(data_dir=str(SHARED / "data/unlabelled/lfw"), labelled="300W-64",
                  boxes="boxes.csv", detector=str(SHARED / "models" / "yunet_n_640_640.onnx"),
                  output_dir="lfw-64")
    return {f"{name} {key}": value for name in ("300W-64", "lfw-64")
            for key, value in set_entries(tree.folder / name).items()}


def shipped_entries(tree):
    """Return the printed scores of the shipped models on the LFPW test set of 300W, as text."""
    shutil.copytree(SHARED / "data/300W/lfpw/testset", tree.folder / "LFPW/lfpw/testset")
    tree.generate(data_dir="LFPW", target_size=256)
    found = {}
    for name in ("tiny", "fast", "accurate", "eyes", "irnet18"):
        text = tree.main("--test", "--test-onnx", "--exp", f"weights/{name}.pt", "--data-dir",
                         "LFPW-256", "--device", "cpu")
        tables = re.findall(r"^(pytorch|onnx) .*\n.*\n((?:\w+ +\d+ \|.*\n)+)", text, re.MULTILINE)
        found |= {f"{name} {backend}": " ".join(body.split()) for backend, body in tables}
        found[f"{name} difference"] = re.search(r"coordinate: (.*)", text)[1]
    return found


ITEMS = {"drawn": lambda tree: tree.drawn,
         **{exp: functools.partial(training_entries, exp=exp) for exp in RUNS},
         "tested": test_entries, "demo": demo_entries, "prepared": prepared_entries,
         "shipped": shipped_entries}


def measure(source, names):
    """Run items on a copy of a checkout and return {"item: entry": hash}."""
    found = {}
    with tempfile.TemporaryDirectory(prefix="same-") as folder:
        tree = Tree(source, folder)
        for name in names:
            if name in ("prepared", "shipped") and not SHARED.is_dir():
                print(f"{name}: skipped, ../shared is missing")
                continue
            start = time.monotonic()
            try:
                entries = ITEMS[name](tree)
            except Exception as error:  # One failure must not hide the other items.
                entries = {"failed": f"{type(error).__name__}: {error}"}
            print(f"{name}: {time.monotonic() - start:.0f} s", *entries.get("failed", "").split(),
                  flush=True)
            found |= {f"{name}: {key}": value for key, value in entries.items()}
    for key in [key for key in found if key.startswith("killed: ") and "undisturbed" in names]:
        same = found[key] == found.get(key.replace("killed", "undisturbed"))
        found[f"{key} as undisturbed"] = "yes" if same else "no"
    return found


def compare(before, after):
    """Return [(entry, hash before, hash after)]; a missing hash is "absent"."""
    return [(key, before.get(key, "absent"), after.get(key, "absent"))
            for key in dict.fromkeys([*before, *after])]


def machine():
    """Describe the machine and the packages, on which the hashes depend."""
    return " ".join([platform.machine(), f"Python {platform.python_version()}", *(
        f"{module.__name__} {module.__version__}" for module in (torch, numpy, cv2, onnxruntime))])


def main(argv=None):
    """Record or check; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.same", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("record", "check"))
    parser.add_argument("file", type=pathlib.Path)
    parser.add_argument("--tree", type=pathlib.Path, default=ROOT, help="the checkout to run")
    parser.add_argument("--only", nargs="+", choices=ITEMS, metavar="NAME", help=", ".join(ITEMS))
    args = parser.parse_args(argv)
    if args.action == "record":
        found = measure(args.tree, args.only or [name for name in ITEMS if name != "shipped"])
        broken = [key for key, value in found.items() if key.endswith("failed") or value == "no"]
        args.file.write_text(json.dumps({"machine": machine(), "entries": found}, indent=1) + "\n")
        print(f"{len(found)} entries in {args.file}", *broken, sep="\nBROKEN ")
        return bool(broken)
    recorded = json.loads(args.file.read_text())
    if recorded["machine"] != machine():
        print(f"note: recorded with {recorded['machine']}, this is {machine()}")
    names = args.only or [name for name in ITEMS if any(key.startswith(f"{name}: ")
                                                        for key in recorded["entries"])]
    before = {key: value for key, value in recorded["entries"].items()
              if key.partition(":")[0] in names}
    compared = compare(before, measure(args.tree, names))
    for key, old, new in compared:
        print(f"{'same   ' if old == new else 'DIFFERS'}  {key}: {old}"
              + ("" if old == new else f" -> {new}"))
    differ = sum(old != new for _, old, new in compared)
    print(f"{len(compared) - differ} same, {differ} differ")
    return bool(differ)


if __name__ == "__main__":
    sys.exit(main())
