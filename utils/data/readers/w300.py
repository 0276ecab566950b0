"""Reader of 300W: afw/, helen/, lfpw/ and ibug/ with a .pts file of 68 points beside each image."""
from __future__ import annotations

import pathlib
import re

from utils.data.readers.face import Face
from utils.data.readers.pts import pair_files, read_pts, unique_name

NAME = "300W"
SCHEME = "300W"
LAYOUT = "afw/, helen/trainset/, helen/testset/, lfpw/trainset/, lfpw/testset/ or ibug/"
EXPECTED = {"afw": 337, "helen/trainset": 2000, "lfpw/trainset": 811, "helen/testset": 330,
            "lfpw/testset": 224, "ibug": 135}
# The common test subset is Helen and LFPW, the challenging one is iBUG.
_LISTS = {"afw": ("train",), "helen/trainset": ("train",), "lfpw/trainset": ("train",),
          "helen/testset": ("test", "test_common"), "lfpw/testset": ("test", "test_common"),
          "ibug": ("test", "test_challenge")}


def matches(folder: pathlib.Path) -> bool:
    """Return True if the folder holds at least one subset of 300W."""
    return any((folder / subset).is_dir() for subset in EXPECTED)


def read(folder: pathlib.Path, problems: list) -> list[Face]:
    """Read all faces of 68 points; absent subsets are skipped, bad files go to `problems`."""
    faces, taken = [], set()
    for subset, lists in _LISTS.items():
        if not (folder / subset).is_dir():
            continue
        for photo, landmarks in pair_files((folder / subset).iterdir(), ".pts", problems):
            try:
                points = read_pts(landmarks, 68)
            except (ValueError, OSError) as error:
                problems.append((landmarks, str(error)))
                continue
            # 12_1 and 12_2 are faces of photo 12, except in LFPW, where image_0001 is a photo.
            group = photo.stem if "lfpw" in subset else re.sub(r"[ _]+\d+$", "", photo.stem)
            faces.append(Face(photo, points, lists, subset, f"{subset}/{group}",
                              unique_name(f"{subset}_{photo.stem}", taken)))
    return faces
