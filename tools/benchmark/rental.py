"""Prepare and plan ten minutes on a rented GPU; rental.sh runs them.

    python -m tools.benchmark.rental pack --data-dir SET --output FOLDER
    bash FOLDER/rental.sh OUTPUT              # on the rented machine

`pack` writes what the machine needs into a folder of at most 64 MiB: rental.sh, and payload.tar
with the programs, the three models that the training starts from and learns from, and the faces of
a prepared set as WebP. rental.sh calls the other commands: `plan` prints the flags of the training,
whose length follows from the measured speed, and `collect` copies what came out in files of at most
16 MiB.
"""
from __future__ import annotations

import argparse
import io
import json
import pathlib
import shlex
import shutil
import tarfile

import cv2
import numpy

from tools.benchmark.gpu_bench import Size
from tools.benchmark.gpu_speed import SHIPPED, recipe_settings
from tools.benchmark.isolated import process_age
from utils.args import ROOT
from utils.data.dataset import PreparedSet
from utils.data.photo import read_photo
from utils.errors import UserError
from utils.errors import run as guarded

LIMIT, PART = 64 << 20, 16 << 20
QUALITY = 90
PROGRAMS = ("nets", "utils", "tools", "tests", "main.py", "main.sh", "args.yaml", "README.md",
            "demo.py", "pyproject.toml")
FACES = "faces"
# Seconds of a training that are not steps or validation: the start, the test and the export.
REMAINDER = 60
# Share of the time that the plan uses, because rates vary.
SHARE = 0.93
# Seconds of a validation, and faces of an epoch, if they were not measured.
VALIDATION = 1.0


def pack(data_dir: str, output: str, quality: int = QUALITY) -> pathlib.Path:
    """Write the folder that a rented machine needs.

    Args:
        data_dir: a prepared set.
        output: the folder, which is made.
        quality: of the WebP files, 0 to 100.

    Returns:
        The folder.

    Raises:
        UserError: it would be larger than 64 MiB, or an image cannot be read.
    """
    folder, source = pathlib.Path(output), pathlib.Path(data_dir)
    PreparedSet(source)  # Raises where it is none.
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {}
    with tarfile.open(folder / "payload.tar", "w") as tar:
        for name in PROGRAMS:
            tar.add(ROOT / name, name, filter=_without_caches)
        for name in ("accurate.md", *(f"{model}.pt" for model in SHIPPED.values())):
            tar.add(ROOT / "weights" / name, f"weights/{name}")
        sizes["programs and weights"] = tar.offset
        for name, content in webp_set(source, quality):
            entry = tarfile.TarInfo(f"{FACES}/{name}")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
        sizes["faces"] = tar.offset - sum(sizes.values())
    shutil.copy(pathlib.Path(__file__).with_name("rental.sh"), folder)
    total = sum(path.stat().st_size for path in folder.iterdir())
    parts = ", ".join(f"{name} {size / 2**20:.1f} MiB" for name, size in sizes.items())
    if total > LIMIT:
        raise UserError(f"{folder}: {total / 2**20:.1f} MiB ({parts}), at most "
                        f"{LIMIT >> 20} MiB are allowed; give a smaller --quality, or a set of "
                        f"fewer or smaller faces")
    print(f"{folder}: {total / 2**20:.1f} MiB ({parts})")
    return folder


def _without_caches(entry):
    parts = pathlib.PurePosixPath(entry.name).parts
    return None if {"__pycache__", "node_modules"} & set(parts) else entry


def webp_set(source: pathlib.Path, quality: int):
    """Yield (path in the set, content) of the files of a prepared set with its images as WebP.

    Raises:
        UserError: an image cannot be read.
    """
    renamed = {}
    for path in sorted((source / "images").rglob("*")):
        if not path.is_file():
            continue
        image = read_photo(path, upright=True)
        if image is None:
            raise UserError(f"{path}: cannot be read; prepare the set again")
        name = path.relative_to(source).as_posix()
        renamed[name] = str(pathlib.PurePosixPath(name).with_suffix(".webp"))
        yield renamed[name], encode_webp(image, quality)
    for name in ("set.yaml", "indices.txt"):
        if (source / name).is_file():
            yield name, (source / name).read_bytes()
    for path in sorted(source.glob("*.txt")):
        if path.name == "indices.txt":
            continue
        # An image path has no spaces.
        lines = [line.split(" ", 1) for line in path.read_text(encoding="utf-8").splitlines()]
        yield path.name, "".join(f"{renamed.get(image, image)} {rest}\n"
                                 for image, rest in lines).encode()
    if (source / "sources.csv").is_file():
        first, *rows = (source / "sources.csv").read_text(
            encoding="utf-8", errors="surrogateescape").splitlines(keepends=True)
        cells = (row.partition(",") for row in rows)
        yield "sources.csv", (first + "".join(
            renamed.get(image, image) + comma + rest for image, comma, rest in cells)).encode(
                "utf-8", "surrogateescape")


def encode_webp(image: numpy.ndarray, quality: int) -> bytes:
    """Encode an image, RGB uint8 (H, W, 3), as lossy WebP."""
    _, content = cv2.imencode(".webp", cv2.cvtColor(image, cv2.COLOR_RGB2BGR),
                              [cv2.IMWRITE_WEBP_QUALITY, quality])
    return content.tobytes()


def count_epochs(figures: dict, faces: int, seconds: float) -> int:
    """Return how many epochs fit into a training of so many seconds, at least one.

    Args:
        figures: results of tools.benchmark.gpu by name: `with teachers` and `epochs`. Either may be
            missing.
        faces: of an epoch.
        seconds: of the training, with its start and end.

    Raises:
        UserError: neither was measured.
    """
    rate, parts = figures.get("with teachers"), figures.get("epochs") or {}
    steps = [sum(parts[name][1:]) / len(parts[name][1:]) if len(parts.get(name, ())) > 1 else None
             for name in ("steps", "validation")]
    epoch = [value for value in (steps[0], rate and faces / rate["images"]) if value]
    if not epoch:
        raise UserError("the speed of the training was not measured; see gpu.md, and train by hand")
    epoch = max(epoch) + (VALIDATION if steps[1] is None else steps[1])
    return max(1, int(SHARE * (seconds - REMAINDER) / epoch))


def plan(figures: str, data_dir: str, seconds: float, device: str, quick: bool) -> str:
    """Return the flags of main.py for the training, as one line for a shell.

    Args:
        figures: the .jsonl of tools.benchmark.gpu.
        data_dir: the prepared set.
        seconds: of the training.
        device: `cuda` or `cpu`.
        quick: whether to train a small network, to test rental.sh.
    """
    path = pathlib.Path(figures)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] \
        if path.is_file() else []
    settings = recipe_settings(Size.quick() if quick else Size(), data_dir, device)
    faces = len(PreparedSet(data_dir).lists["train"])
    settings |= {"epochs": count_epochs({row["name"]: row["found"] for row in rows}, faces,
                                        seconds), "save_minutes": 2}
    return " ".join(shlex.quote(str(word)) for name, value in settings.items()
                    for word in (f"--{name.replace('_', '-')}", value))


def collect(exp: str, output: str) -> None:
    """Copy an experiment's files, but for last.pt, in parts of at most 16 MiB.

    Args:
        exp: its folder.
        output: folder to copy to, which is made.
    """
    folder = pathlib.Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(pathlib.Path(exp).glob("*")):
        if not path.is_file() or path.name in ("last.pt", "lock"):
            continue
        if path.stat().st_size <= PART:
            shutil.copy(path, folder)
            continue
        with open(path, "rb") as file:
            for number, content in enumerate(iter(lambda file=file: file.read(PART), b"")):
                (folder / f"{path.name}.part{number}").write_bytes(content)
        print(f"{path.name}: in parts; join them with: cat {path.name}.part* > {path.name}")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.benchmark.rental", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack", help="write the folder that a rented machine needs")
    packing.add_argument("--data-dir", required=True, metavar="SET", help="a prepared set")
    packing.add_argument("--output", required=True, metavar="FOLDER")
    packing.add_argument("--quality", type=int, default=QUALITY, metavar="N",
                         help=f"of the WebP files [{QUALITY}]")
    planning = commands.add_parser("plan", help="print the flags of the training")
    planning.add_argument("--figures", required=True, metavar="FILE",
                          help="the .jsonl of tools.benchmark.gpu")
    planning.add_argument("--data-dir", required=True, metavar="SET")
    planning.add_argument("--seconds", type=float, required=True, metavar="N",
                          help="of the training, from the start of this command")
    planning.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    planning.add_argument("--quick", action="store_true")
    collecting = commands.add_parser("collect", help="copy an experiment in parts of 16 MiB")
    collecting.add_argument("--exp", required=True, metavar="FOLDER")
    collecting.add_argument("--output", required=True, metavar="FOLDER")
    return parser.parse_args(argv)


def run(argv: list[str] | None = None) -> None:
    """Run the command."""
    options = vars(parse(argv))
    command = options.pop("command")
    if command == "plan":
        options["seconds"] -= process_age()
    found = {"pack": pack, "plan": plan, "collect": collect}[command](**options)
    if command == "plan":
        print(found)


if __name__ == "__main__":
    guarded(run)
