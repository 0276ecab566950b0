"""The prepared set that settings mean: a folder, one beside it, or faces drawn on first use."""
import glob
import os
import pathlib
import shutil

from utils.args import ROOT
from utils.data import generator


def prepare_samples(size):
    """The prepared set of drawn faces for an input size, made if it is not there; its folder."""
    folder = ROOT / f"samples-{size}"
    # The last file that is written: without it drawing was interrupted.
    if not (folder / "test.txt").is_file():
        generator.is_filled(folder)  # Raises before the drawing where it is none of ours.
        print(f"drawing faces into {folder}")
        # Under a name of its own, for another process may be about to draw them as well.
        drawn = folder.with_name(f"{folder.name}.{os.getpid()}")
        try:
            generator.DataGenerator("samples", size, drawn, layout="samples").run()
            if not (folder / "test.txt").is_file():
                if generator.is_filled(folder):
                    shutil.rmtree(folder)
                drawn.rename(folder)
        finally:
            shutil.rmtree(drawn, ignore_errors=True)
    return folder


def set_folder(args):
    """The folder of the prepared set that args mean; drawn faces are made on first use."""
    if args.data == "samples":
        return prepare_samples(args.input_size)
    folder = pathlib.Path(args.data_dir)
    if any(any(folder.glob(names)) for names in ("train.txt", "test.txt", "test_*.txt")):
        return folder
    beside = {int(path.name.rpartition("-")[2]): path for path in
              folder.parent.glob(f"{glob.escape(folder.name)}-*")
              if path.name.removeprefix(f"{folder.name}-").isdecimal()}
    # Rather reduce larger crops than blow up smaller ones.
    enough = [size for size in beside if size >= args.input_size]
    return beside[min(enough) if enough else max(beside)] if beside else folder
