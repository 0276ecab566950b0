"""Do the commands give the same bits as before? For whoever moves walls and changes nothing else.

    python -m tests.same record BEFORE.json              # before the first move
    python -m tests.same check BEFORE.json               # after the last: a line an item, 1 if any
                                                         # differs; --only NAME … for some of them
    python -m tests.same record BEFORE.json --tree OLD   # another checkout, such as an older one

It knows the command lines and the files they write, and no module but `utils.util`, so that it runs
any version of the repository; what runs is a copy of the checkout, committed or not, in a temporary
folder. Items are small trainings at 64 px on drawn faces, one thread, fp32, on the CPU (RUNS), what
is made of a trained model (tested, int8, demo), and sets prepared from ../shared where that is.
Five minutes on two cores. `--only shipped` scores the shipped models on 300W's LFPW test set, which
takes minutes more. Bits depend on the processor and the packages: record and check on one machine.
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
SMALL = "--data-dir faces --backbone test_resnet"
# Flags by experiment; the numbers of faces of the small sets are in Tree.faces.
RUNS = {
    "irnet18": "--data samples --backbone irnet18 --batch-size 16 --effective-batch 32",
    "timm": "--data-dir faces --backbone mobilenetv3_small_050 --epochs 4",
    "two": SMALL,
    "gssl": f"{SMALL} --gssl --unlabelled-dir others --gssl-rounds 2 --gssl-epochs 1",
    "paper": f"{SMALL} --gssl --unlabelled-dir others --gssl-preset paper --epochs 1",
    "teacher": f"{SMALL} --teacher weights/timm/best.pt --cache ram",
    "eyes": f"{SMALL} --scheme eyes --num-nb 5 --reg 2 --pretrained weights/gssl/best.pt",
    "killed": f"{SMALL} --save-minutes 0",
    "undisturbed": SMALL,
    "regression": f"{SMALL} --head regression --offset-loss wing --epochs 1",
    "confidence": f"{SMALL} --merge confidence --offset-loss smooth_l1 --ema 0 --epochs 1",
}
# Where the killed run ends: (signal, epoch, step) of last.pt from which on it is sent.
KILLS = ((signal.SIGKILL, 0, 2), (signal.SIGTERM, 1, 1))
# Lines of a prepared list that the small sets keep.
KEPT = {"train": 44, "val": 4, "test": 8}


def digest(*parts):
    """A short hash of strings, bytes, arrays, tensors and nested lists and dicts of them."""
    found = hashlib.sha256()

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
            for each in part:
                add(each)
        else:
            found.update(part if isinstance(part, bytes) else repr(part).encode())

    add(parts)
    return found.hexdigest()[:16]


class Tree:
    """A copy of a checkout in a temporary folder, and what its commands have made there."""

    def __init__(self, source, folder):
        self.folder = pathlib.Path(folder) / "tree"
        listed = subprocess.run(["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=source,
                                check=True, capture_output=True, text=True).stdout.split("\0")
        for name in filter(None, listed):
            if (source / name).is_file():
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source / name, self.folder / name)
        one = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENCV_FOR_THREADS_NUM"), "1")
        self.env = {**os.environ, **one, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": "",
                    "PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"}
        self.log = self.folder.parent / "log"

    def start(self, *argv):
        """Begin a command in the copy; a Popen whose output goes to `log`."""
        with open(self.log, "w") as log:
            return subprocess.Popen([str(a) for a in argv], cwd=self.folder, env=self.env,
                                    stdout=log, stderr=subprocess.STDOUT)

    def run(self, *argv):
        """Run a command to its end and return what it printed. Raises RuntimeError if it fails."""
        code = self.start(*argv).wait()
        text = self.log.read_text(errors="replace")
        if code:
            raise RuntimeError(f"{' '.join(map(str, argv))} ended with {code}: {text[-2000:]}")
        return text

    def main(self, *argv):
        """Run `python main.py argv`."""
        return self.run(sys.executable, "main.py", *argv)

    def generate(self, **given):
        """Run the one-liner of util.DataGenerator; paths are relative to the copy or absolute."""
        self.run(sys.executable, "-c", f"from utils import util; util.DataGenerator(**{given!r})"
                                       ".run()")

    @functools.cached_property
    def samples(self):
        """The prepared set of `--data samples`, which any command makes on first use."""
        self.main("--test-onnx", "--exp", "weights/fast.onnx", "--data", "samples",
                  "--input-size", 64)
        return self.folder / "samples-64"

    @functools.cached_property
    def faces(self):
        """The small sets of the trainings: `faces`, and 16 other ones without labels, `others`."""
        faces, others = self.folder / "faces", self.folder / "others"
        for folder in (faces, others):
            shutil.copytree(self.samples, folder)
            (folder / "train.txt").unlink()
        lines = (self.samples / "train.txt").read_text().splitlines(True)
        (others / "unlabelled.txt").write_text("".join(f"{line.split()[0]}\n"
                                                       for line in lines[-16:]))
        for name, count in KEPT.items():
            lines = (self.samples / f"{name}.txt").read_text().splitlines(True)
            (faces / f"{name}.txt").write_text("".join(lines[:count]))
        return faces

    @functools.cache  # noqa: B019
    def trained(self, exp):
        """The folder of an experiment of RUNS, trained, and the others that it needs before."""
        for needed in re.findall(r"weights/(\w+)/", RUNS[exp]):
            self.trained(needed)
        assert self.faces.is_dir()
        argv = [*BASE.split(), *RUNS[exp].split(), "--exp", exp]
        folder = self.folder / "weights" / exp
        if exp == "two":
            self.run("bash", "main.sh", 2, *argv)
        elif exp == "killed":
            for sent, *place in KILLS:
                self.kill(folder / "last.pt", sent, place, argv)
                argv = ["--resume", "--exp", exp]
            self.main(*argv)
        else:
            self.main(*argv)
        return folder

    def kill(self, saved, sent, place, argv):
        """Start `main.py argv` and send it a signal once `saved` is at [epoch, step] or later."""
        child = self.start(sys.executable, "main.py", *argv)
        while child.poll() is None:
            state = torch.load(saved, weights_only=True) if saved.exists() else {"epoch": -1}
            if state["epoch"] >= 0 and [state["epoch"], state["step"]] >= place:
                child.send_signal(sent)
                break
            time.sleep(0.02)
        if child.wait() != (-sent if sent == signal.SIGKILL else 0):
            raise RuntimeError(f"ended by itself: {self.log.read_text()[-2000:]}")
        state = torch.load(saved, weights_only=True)
        if state["epoch"] == 2:
            raise RuntimeError("it was too quick for the signal; run it again")

    def outputs(self, path):
        """The outputs of an .onnx file on the first 32 drawn test faces."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        size = int(session.get_modelmeta().custom_metadata_map["input_size"])
        images = [cv2.resize(cv2.imread(str(self.samples / line.split()[0])), (size, size))
                  for line in (self.samples / "test.txt").read_text().splitlines()[:32]]
        return session.run(None, {"images": numpy.stack(images).transpose(0, 3, 1, 2)[:, ::-1]})


def run_item(tree, exp):
    """What a training left: weights, averages and moments, table, and what the ONNX file says."""
    folder = tree.trained(exp)
    best, last = (torch.load(folder / name, weights_only=True) for name in ("best.pt", "last.pt"))
    with open(folder / "results.csv", newline="") as file:
        epochs = [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]
    with open(tree.folder / "weights" / "results.csv", newline="") as file:
        record = [row for row in csv.DictReader(file) if row["exp"] == exp]
    meta = onnxruntime.InferenceSession(folder / "best.onnx").get_modelmeta().custom_metadata_map
    for row in record:
        # What a test adds: of item "tested".
        row.update(exp="", nme="", onnx_nme="")
    return {"best.pt": digest(best["weights"]), "results.csv": digest(epochs),
            "val NME": epochs[-1]["val_nme"], "record": digest(record),
            **{f"last.pt {name}": digest(last[name]) for name in ("model", "ema", "optimizer")},
            "onnx": digest(tree.outputs(folder / "best.onnx")),
            "onnx metadata": digest(sorted(meta.items()))}


def tested(tree):
    """The numbers of a test with PyTorch and ONNX, and what it adds to the experiments' table."""
    tree.trained("timm")
    text = tree.main("--test", "--test-onnx", "--flip-test", "--exp", "timm", "--report", "r.json")
    report = json.loads((tree.folder / "r.json").read_text())
    return {"report": digest(report), "screen": digest(text.replace(str(tree.folder), "")),
            "compare": digest([line for line in tree.main("--compare").splitlines()
                               if "timm" in line])}


def int8(tree):
    """Outputs of the quantised file."""
    folder = tree.trained("timm")
    tree.main("--export", "--int8", "--exp", "timm")
    return {"onnx": digest(tree.outputs(folder / "best.onnx")),
            "int8": digest(tree.outputs(folder / "best.int8.onnx"))}


def demo(tree):
    """Landmarks and picture of the demo on the portrait that comes with matplotlib."""
    tree.run(sys.executable, "demo.py", "--source", "sample", "--output", "demo.png",
             "--landmarks", "demo.csv")
    return {"landmarks": digest((tree.folder / "demo.csv").read_text()),
            "picture": digest(cv2.imread(str(tree.folder / "demo.png")))}


def prepared(folder):
    """Hashes of a prepared or unlabelled set: each file, and all images."""
    found = {path.name: digest(path.read_text()) for path in sorted(folder.iterdir())
             if path.suffix in (".txt", ".yaml")}
    with open(folder / "sources.csv", newline="") as file:
        # Where a photo lies on this machine says nothing.
        found["sources.csv"] = digest([{k: v for k, v in row.items() if k != "photo"}
                                       for row in csv.DictReader(file)])
    images = sorted((folder / "images").rglob("*.jpg"))
    return found | {"images": digest([(str(path.relative_to(folder)), path.read_bytes())
                                      for path in images])}


def unlabelled(tree):
    """300W at 64 px, and 60 photos of LFW prepared to be trained with it."""
    tree.generate(data_dir=str(SHARED / "data" / "300W"), target_size=64, output_dir="300W-64")
    boxes = (SHARED / "data/unlabelled/lfw/boxes.csv").read_text().splitlines(True)
    (tree.folder / "boxes.csv").write_text("".join(boxes[:61]))
    tree.generate(data_dir=str(SHARED / "data/unlabelled/lfw"), labelled="300W-64",
                  boxes="boxes.csv", detector=str(SHARED / "models" / "yunet_n_640_640.onnx"),
                  output_dir="lfw-64")
    return {f"{name} {key}": value for name in ("300W-64", "lfw-64")
            for key, value in prepared(tree.folder / name).items()}


def shipped(tree):
    """The printed scores of the shipped models on the LFPW test set of 300W, to be read as well."""
    shutil.copytree(SHARED / "data/300W/lfpw/testset", tree.folder / "LFPW/lfpw/testset")
    tree.generate(data_dir="LFPW", target_size=256)
    found = {}
    for name in ("fast", "accurate", "eyes"):
        text = tree.main("--test", "--test-onnx", "--exp", f"weights/{name}.pt", "--data-dir",
                         "LFPW-256", "--device", "cpu")
        ways = re.findall(r"^(pytorch|onnx) .*\n.*\n((?:\w+ +\d+ \|.*\n)+)", text, re.MULTILINE)
        found |= {f"{name} {way}": " ".join(rows.split()) for way, rows in ways}
        found[f"{name} difference"] = re.search(r"coordinate: (.*)", text)[1]
    return found


ITEMS = {"samples": lambda tree: prepared(tree.samples),
         **{exp: functools.partial(run_item, exp=exp) for exp in RUNS},
         "tested": tested, "int8": int8, "demo": demo, "prepared": unlabelled, "shipped": shipped}
NEED_SHARED = ("prepared", "shipped")


def measure(source, names):
    """The entries {"item: what": hash} of the items of those names, run on a copy of `source`."""
    found = {}
    with tempfile.TemporaryDirectory(prefix="same-") as folder:
        tree = Tree(source, folder)
        for name in names:
            if name in NEED_SHARED and not SHARED.is_dir():
                print(f"{name}: skipped, it needs ../shared, which is not here")
                continue
            begun = time.monotonic()
            try:
                entries = ITEMS[name](tree)
            except Exception as error:  # The other items are still worth knowing.
                entries = {"failed": f"{type(error).__name__}: {error}"}
            print(f"{name}: {time.monotonic() - begun:.0f} s", *entries.get("failed", "").split(),
                  flush=True)
            found |= {f"{name}: {key}": value for key, value in entries.items()}
    for key in [key for key in found if key.startswith("killed: ") and "undisturbed" in names]:
        same = found[key] == found.get(key.replace("killed", "undisturbed"))
        found[f"{key} as undisturbed"] = "yes" if same else "no"
    return found


def compare(before, after):
    """[(item, hash before, hash after)] of all entries of both; "absent" where one has none."""
    return [(key, before.get(key, "absent"), after.get(key, "absent"))
            for key in dict.fromkeys([*before, *after])]


def machine():
    """What the bits depend on beside the code."""
    return " ".join([platform.machine(), f"Python {platform.python_version()}", *(
        f"{module.__name__} {module.__version__}" for module in (torch, numpy, cv2, onnxruntime))])


def main(argv=None):
    """Record or check; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.same", description=__doc__,
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
    rows = compare(before, measure(args.tree, names))
    for key, one, two in rows:
        print(f"{'same   ' if one == two else 'DIFFERS'}  {key}: {one}"
              + ("" if one == two else f" -> {two}"))
    differ = sum(one != two for _, one, two in rows)
    print(f"{len(rows) - differ} same, {differ} differ")
    return bool(differ)


if __name__ == "__main__":
    sys.exit(main())
