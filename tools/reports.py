"""Check that inputs which people reported as read wrongly or refused are read right.

    python -m tools.reports FOLDER

FOLDER holds labels/, film/ and sar/, and lies beside films/; their READMEs say what each input is.
Every input is prepared or shown in a temporary folder and gets a line: ok and what was found, or
WRONG and the reason. The exit code is 1 if one is wrong.
"""
from __future__ import annotations

import argparse
import contextlib
import io
import pathlib
import sys
import tempfile
from collections.abc import Callable, Sequence

import numpy

from tools.report_films import FILMS
from utils.data.dataset import PreparedSet
from utils.data.generator import DataGenerator
from utils.data.unlabelled import photos_in, read_boxes
from utils.errors import UserError, printable
from utils.tracking.sources import find_source


class WrongError(Exception):
    """An input is read, and not as it should be."""


def _faces(path, output, scheme, count):
    """Prepare a set and return the points (count, K, 2) of its faces in photo pixels."""
    prepared = PreparedSet(DataGenerator(path, 64, output, scheme=str(scheme), val=0,
                                         workers=1).run())
    faces = [face for face in prepared.lists.values() if len(face)]
    found = sum(map(len, faces))
    if found != count:
        raise WrongError(f"{found} faces, {count} expected")
    boxes = numpy.concatenate([face.boxes for face in faces])
    points = numpy.concatenate([face.points for face in faces])
    return boxes[:, None, :2] + points * (boxes[:, None, 2:] - boxes[:, None, :2])


def _five_points(count):
    """Return the check of faces with five points: right eye, left eye, nose, right, left mouth."""
    def check(path, output):
        points = _faces(path, output, path.parent / "five.yaml", count)
        right_eye, left_eye, nose, right_mouth, left_mouth = points.transpose(1, 0, 2)
        swapped = (right_eye[:, 0] >= left_eye[:, 0]) | (right_mouth[:, 0] >= left_mouth[:, 0])
        misplaced = (nose[:, 1] <= (right_eye + left_eye)[:, 1] / 2) | (
            nose[:, 1] >= (right_mouth + left_mouth)[:, 1] / 2)
        if swapped.any() or misplaced.any():
            raise WrongError(f"left and right are swapped in {swapped.sum()} of {count} faces, the "
                             f"nose is not between eyes and mouth in {misplaced.sum()}")
        return f"{count} faces, left is left and the nose is between eyes and mouth"
    return check


def _photos(path, output):
    kind, files = find_source(str(path))
    if kind != "folder" or len(files) != 3 or photos_in(path) != files:
        raise WrongError(f"{kind} of {len(files)} photos; a folder of 3 expected")
    return "3 photos in the demo and in the generator"


def _landmark_files(path, output):
    _faces(path, output, "300W", 2)
    return "2 faces"


def _boxes(path, output):
    found = [(name, box.tolist()) for name, box in read_boxes(path)]
    if found != [("134212_1.jpg", [10, 10, 100, 100])]:
        raise WrongError(f"found {found}")
    return "1 box"


# {input: check}. A check takes the input's path and a new folder for what it writes, returns what
# was found and raises WrongError or UserError.
LABELS: dict[str, Callable[[pathlib.Path, pathlib.Path], str]] = {
    "labels/cvatvid": _five_points(3),
    "labels/coco_lr": _five_points(10),
    "labels/coco_names": _five_points(24),
    "labels/jf": _photos,
    "labels/jfpts": _landmark_files,
    "labels/boxes_bom.csv": _boxes,
    "labels/boxes_semi.csv": _boxes,
}


def check(folder: pathlib.Path, inputs: dict[str, Callable]) -> list[tuple[str, bool, str]]:
    """Check inputs of a folder; return name, whether it is right, and what was found, of each."""
    found = []
    for name, look in inputs.items():
        with (tempfile.TemporaryDirectory(prefix="reports-") as temporary,
              contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())):
            try:
                found.append((name, True, look(folder / name, pathlib.Path(temporary) / "out")))
            except (UserError, WrongError) as error:
                found.append((name, False, str(error)))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.reports", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path, help="folder with labels/ and film/")
    folder = parser.parse_args(argv).folder
    results = check(folder, {**LABELS, **FILMS})
    for name, is_right, text in results:
        print(printable(f"{'ok' if is_right else 'WRONG':<6}{name}: {text}"))
    print(f"{sum(is_right for _, is_right, _ in results)} of {len(results)} inputs are right")
    return int(not all(is_right for _, is_right, _ in results))


if __name__ == "__main__":
    sys.exit(main())
