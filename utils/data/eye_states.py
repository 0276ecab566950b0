"""Photos of faces whose eyes are known to be shut, in closed/, or open, in open/."""
import pathlib

from utils.data.photo import IMAGE_SUFFIXES
from utils.errors import UserError

STATES = ("closed", "open")


def list_photos(folder, names="none"):
    """[(path, closed)] of the photos in folder/closed and folder/open.

    names: none for all, or LIST or LIST:PART or LIST:PART,PART: a file with lines `closed/0001.jpg`
    or `closed/0001.jpg part`, of which those of the parts are taken. Raises UserError.
    """
    folder = pathlib.Path(folder)
    missing = [state for state in STATES if not (folder / state).is_dir()]
    if missing:
        raise UserError(f"{folder}: has no folder {missing[0]}; photos of faces with shut eyes are "
                        f"expected in closed/, with open eyes in open/")
    if names == "none":
        found = [path for state in STATES for path in sorted((folder / state).iterdir())
                 if path.suffix.lower() in IMAGE_SUFFIXES]
    else:
        found = [folder / name for name in _read_names(names)]
    for state in STATES:
        if not any(path.parent.name == state for path in found):
            raise UserError(f"{folder}: no photo in {state}/"
                            + (f" is named by {names}" if names != "none" else ""))
    absent = [path for path in found if not path.is_file()]
    if absent:
        raise UserError(f"{absent[0]}: no such photo, though {names} names it")
    return [(path, path.parent.name == "closed") for path in found]


def _read_names(names):
    path, _, wanted = str(names).partition(":")
    wanted = [part for part in wanted.split(",") if part]
    try:
        lines = pathlib.Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"names {path}: cannot be read: {error}") from None
    rows = [(number, line.split()) for number, line in enumerate(lines, 1) if line.strip()]
    for number, row in rows:
        place = row[0].split("/")
        if len(row) > 2 or len(place) != 2 or place[0] not in STATES:
            raise UserError(f"{path}:{number}: expected closed/NAME or open/NAME and perhaps a "
                            f"part, found {' '.join(row)[:60]!r}")
    parts = {row[1] for _, row in rows if len(row) == 2}
    for part in wanted:
        if part not in parts:
            raise UserError(f"names {path}: has no part {part}; there is "
                            f"{', '.join(sorted(parts)) or 'none'}")
    return [row[0] for _, row in rows if not wanted or row[1:] and row[1] in wanted]
