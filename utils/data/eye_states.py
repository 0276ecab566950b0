"""Folders of photos whose eyes are known to be closed or open.

Photos with closed eyes are in closed/, with open eyes in open/. Eye thresholds are fitted and
scored on such a folder, and pseudo_labels.prepare adds its faces to a prepared set. Photos of
people who look down, in down/, are only scored.
"""
from __future__ import annotations

import pathlib
import re

from utils.data.photo import IMAGE_SUFFIXES, warn_left_out
from utils.errors import UserError
from utils.files import read_text, split_numbers

STATES = ("closed", "open")
DOWN = "down"


def list_photos(folder: pathlib.Path | str, names: pathlib.Path | str = "none"
                ) -> list[tuple[pathlib.Path, bool]]:
    """List the photos in folder/closed and folder/open.

    Args:
        folder: has the folders closed/ and open/.
        names: `none` for all photos; else LIST, LIST:PART or LIST:PART,PART, where LIST is a file
            with lines `closed/0001.jpg` or `closed/0001.jpg PART` (a tab, semicolon or comma
            may stand for the blank). Photos of down/ are left out.

    Returns:
        The path of each photo and whether its eyes are closed.

    Raises:
        UserError: a folder, a photo, the list or a part is missing.
    """
    folder = pathlib.Path(folder)
    missing = [state for state in STATES if not (folder / state).is_dir()]
    if missing:
        raise UserError(f"{folder}: has no folder {missing[0]}; photos of faces with closed eyes "
                        f"are expected in closed/, with open eyes in open/")
    if names == "none":
        for state in STATES:
            warn_left_out(folder / state, sorted((folder / state).iterdir()))
        found = [path for state in STATES for path in sorted((folder / state).iterdir())
                 if path.suffix.lower() in IMAGE_SUFFIXES]
    else:
        found = [folder / name for name in _read_names(names) if not name.startswith(f"{DOWN}/")]
    for state in STATES:
        if not any(path.parent.name == state for path in found):
            raise UserError(f"{folder}: no photo in {state}/"
                            + (f" is named by {names}" if names != "none" else ""))
    _require(found, names)
    return [(path, path.parent.name == "closed") for path in found]


def list_down(folder: pathlib.Path | str, names: pathlib.Path | str = "none"
              ) -> list[pathlib.Path]:
    """List the photos in folder/down, none where there is no such folder.

    The arguments are those of list_photos.
    """
    folder = pathlib.Path(folder)
    if names != "none":
        found = [folder / name for name in _read_names(names) if name.startswith(f"{DOWN}/")]
        _require(found, names)
        return found
    return [path for path in sorted((folder / DOWN).iterdir())
            if path.suffix.lower() in IMAGE_SUFFIXES] if (folder / DOWN).is_dir() else []


def _require(paths, names):
    """Raise UserError where one of the photos is missing."""
    absent = next((path for path in paths if not path.is_file()), None)
    if absent:
        raise UserError(f"{absent}: no such photo, though {names} names it")


def _is_part(text):
    """Return True for the name of a part: it has neither a suffix nor a blank."""
    return re.fullmatch(r"[^./\\\s]+", text) is not None


def _read_names(names):
    # The file's own name may hold a colon.
    path, parts = names, ""
    if not pathlib.Path(names).is_file():
        path, _, parts = str(names).rpartition(":")
        path, parts = (path, parts) if path else (parts, "")
    parts = [part for part in parts.split(",") if part]
    try:
        lines = read_text(path).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"names {path}: cannot be read: {error}") from None
    rows = [(number, split_numbers(line, _is_part)) for number, line in enumerate(lines, 1)
            if line.strip()]
    for number, row in rows:
        place = row[0].split("/")
        if len(row) > 2 or len(place) != 2 or place[0] not in (*STATES, DOWN):
            raise UserError(f"{path}:{number}: expected closed/NAME, open/NAME or down/NAME and "
                            f"perhaps a part, found {' '.join(row)[:60]!r}")
    known = {row[1] for _, row in rows if len(row) == 2}
    for part in parts:
        if part not in known:
            raise UserError(f"names {path}: has no part {part}; there is "
                            f"{', '.join(sorted(known)) or 'none'}")
    return [row[0] for _, row in rows if not parts or row[1:] and row[1] in parts]
