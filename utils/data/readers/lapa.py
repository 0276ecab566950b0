"""Reader of LaPa: {train,val,test}/{images,landmarks}/ with a text file of 106 points per image."""
from __future__ import annotations

import pathlib
import re

import numpy

from utils.data.readers.face import Face
from utils.data.readers.pts import pair_files, read_lines, rows_to_points, shorten, unique_name

NAME = "LaPa"
SCHEME = "LaPa"
LAYOUT = "{train,val,test}/{images,landmarks}/"
EXPECTED = {"train": 18176, "val": 2000, "test": 2000}


def matches(folder: pathlib.Path) -> bool:
    """Return True if the folder holds images/ and landmarks/ of at least one split."""
    return any((folder / split / "images").is_dir() and (folder / split / "landmarks").is_dir()
               for split in EXPECTED)


def read(folder: pathlib.Path, problems: list) -> list[Face]:
    """Read all faces of 106 points; absent splits are skipped, bad files go to `problems`."""
    faces, taken = [], set()
    for split in EXPECTED:
        images, landmarks = folder / split / "images", folder / split / "landmarks"
        for part, other in ((images, landmarks), (landmarks, images)):
            if other.is_dir() and not part.is_dir():
                problems.append((part, f"no such folder beside {other.name}"))
        if not (images.is_dir() and landmarks.is_dir()):
            continue
        for photo, path in pair_files(landmarks.iterdir(), ".txt", problems, images.iterdir()):
            try:
                points = _read_landmarks(path)
            except (ValueError, OSError) as error:
                problems.append((path, str(error)))
                continue
            # 12_0 and 12_5 are faces of photo 12.
            group = re.sub(r"_\d+$", "", photo.stem)
            faces.append(Face(photo, points, (split,), split, group,
                              unique_name(f"{split}_{photo.stem}", taken)))
    return faces


def _read_landmarks(path: pathlib.Path) -> numpy.ndarray:
    """Read landmarks (106, 2); the first line is their number. Raises ValueError, OSError."""
    (line, count), *rows = read_lines(path)
    if count != str(len(rows)):
        raise ValueError(f"line {line}: the count says {shorten(count)}, {len(rows)} points found")
    # The file's pixels count from 0.
    return rows_to_points(rows, 106)
