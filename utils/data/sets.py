"""Find the prepared set that the settings of a run stand for.

`data_dir` is the folder of a prepared set, the folder of photos beside prepared sets such as
300W-256, or "samples": drawn faces, which are prepared on first use.
"""
from __future__ import annotations

import argparse
import glob
import os
import pathlib
import shutil
import sys

from utils.args import ROOT, SAMPLES
from utils.data import generator


def prepare_samples(size: int) -> pathlib.Path:
    """Return the prepared set of drawn faces for an input size; draw it if it does not exist."""
    folder = ROOT / f"samples-{size}"
    # test.txt is written last: without it the set is incomplete.
    if not (folder / "test.txt").is_file():
        generator.is_prepared_set(folder)  # Raises before the faces are drawn.
        print(f"drawing faces into {folder}")
        # Another process may be drawing them too, so each has its own folder and renames it.
        temporary = folder.with_name(f"{folder.name}.{os.getpid()}")
        try:
            generator.DataGenerator(SAMPLES, size, temporary, layout=SAMPLES).run()
            if not (folder / "test.txt").is_file():
                if generator.is_prepared_set(folder):
                    shutil.rmtree(folder)
                temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


def set_folder(args: argparse.Namespace) -> pathlib.Path:
    """Return the folder of the prepared set for `args.data_dir` and `args.input_size`.

    Of several sets beside a folder of photos, the smallest whose size is at least the input size is
    chosen, else the largest. A prepared set is a folder with set.yaml: PHOTOS-2024 may be photos of
    2024. Drawn faces are prepared on first use.
    """
    if args.data_dir == SAMPLES:
        if pathlib.Path(SAMPLES, "set.yaml").is_file():
            print(f"note: --data-dir {SAMPLES} means drawn faces; the set in the folder of that "
                  f"name is --data-dir ./{SAMPLES}", file=sys.stderr)
        return prepare_samples(args.input_size)
    folder = pathlib.Path(args.data_dir)
    if any(any(folder.glob(names)) for names in ("train.txt", "test.txt", "test_*.txt")):
        return folder
    by_size = {int(path.name.rpartition("-")[2]): path for path in
               folder.parent.glob(f"{glob.escape(folder.name)}-*")
               if path.name.removeprefix(f"{folder.name}-").isdecimal()
               and (path / "set.yaml").is_file()}
    large = [size for size in by_size if size >= args.input_size]
    return by_size[min(large) if large else max(by_size)] if by_size else folder
