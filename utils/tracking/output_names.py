"""Names of the demo's output files: defaults, and checks before anything is written."""
from __future__ import annotations

import argparse
import collections
import contextlib
import os
import pathlib
from collections.abc import Iterable, Sequence

from utils.data.photo import WRITABLE_SUFFIXES
from utils.errors import UserError
from utils.tracking.outputs import CODECS

MAX_STEM_BYTES = 240  # File systems allow names of 255 bytes, with suffix.
TABLES = {"landmarks": (".csv", ".json"), "events": (".csv",)}


def output_path(output: str | None, kind: str, what: int | pathlib.Path | list[pathlib.Path]
                ) -> pathlib.Path:
    """Return where to write the source (kind, what): --output, or a name made from the source's.

    Raises:
        UserError: where --output does not suit the kind of source.
    """
    stem = {"camera": f"camera{what}", "stream": "stream"}.get(kind) or truncate_stem(
        what[0].parent.resolve().name if kind == "folder" else what.stem)
    name = {"image": f"demo_{stem}.png", "folder": f"demo_{stem}"}.get(kind, f"demo_{stem}.mp4")
    path = pathlib.Path(output or name)
    if kind == "folder":
        if path.is_file() or path.resolve() == what[0].parent.resolve():
            raise UserError(f"output {path}: a folder's pictures need a folder of their own")
        return path
    if path.is_dir():
        path = path / name
    known = WRITABLE_SUFFIXES if kind == "image" else set(CODECS)
    if path.suffix.lower() not in known:
        raise UserError(f"output {path}: this source is written as {', '.join(sorted(known))}, not "
                        f"{path.suffix or 'a name without suffix'}")
    return path


def check_outputs(kind: str, what: int | pathlib.Path | list[pathlib.Path],
                  output: pathlib.Path | None, options: argparse.Namespace) -> None:
    """Check that no output has an unknown suffix or overwrites the source or another output.

    Raises:
        UserError: for the first one that does.
    """
    files = what if kind == "folder" else [what] if kind in ("image", "video") else []
    written = [("output", output / name) for name in picture_names(files).values()] \
        if kind == "folder" and output else [("output", output)]
    tables = [(flag, pathlib.Path(getattr(options, flag))) for flag in ("landmarks", "events")
              if getattr(options, flag)]
    for flag, path in tables:
        check_suffix(flag, path)
    refuse_sources([pair for pair in dict.fromkeys(written + tables) if pair[1]], files)


def check_suffix(flag: str, path: str | pathlib.Path) -> None:
    """Check that landmarks or events (flag) can be written to a file of this name.

    Raises:
        UserError: for another suffix than those in TABLES.
    """
    suffix = pathlib.Path(path).suffix
    if suffix.lower() not in TABLES[flag]:
        raise UserError(f"{flag} {path}: written as {' or '.join(TABLES[flag])}, not "
                        f"{suffix or 'a name without suffix'}")


def refuse_sources(outputs: Iterable[tuple[str, pathlib.Path]],
                   sources: Iterable[pathlib.Path]) -> None:
    """Check that no output overwrites a source or another output, also through links.

    Args:
        outputs: (flag, path) pairs.
        sources: paths of the source files.

    Raises:
        UserError: for the first output that does.
    """
    taken = {key: "this is the source" for path in sources for key in _identities(path)}
    for flag, path in outputs:
        keys = _identities(path)
        for key in keys:
            if key in taken:
                raise UserError(f"{flag} {path}: {taken[key]}; give another name")
        # A device, such as /dev/null, may take several outputs.
        if path.is_file() or not path.exists():
            taken |= dict.fromkeys(keys, f"this is written as {flag} already")


def _identities(path):
    """Return the resolved path and, for an existing file, its device and inode."""
    keys = [path.resolve()]
    with contextlib.suppress(OSError):
        stat = os.stat(path)
        keys.append((stat.st_dev, stat.st_ino))
    return keys


def picture_names(paths: Sequence[pathlib.Path]) -> dict[pathlib.Path, str]:
    """Name the drawn images of one folder.

    Returns:
        {path: name}, all different regardless of letter case. A name is the image's stem with
        .png, or its whole name with .png where several images have the same stem.
    """
    count, names = collections.Counter(path.stem.lower() for path in paths), {}
    taken = set()
    for path in paths:
        name = stem = truncate_stem(path.name if count[path.stem.lower()] > 1 else path.stem)
        number = 2
        while name.lower() in taken:
            name, number = f"{stem}_{number}", number + 1
        taken.add(name.lower())
        names[path] = f"{name}.png"
    return names


def truncate_stem(stem: str) -> str:
    """Truncate a file's stem so that it fits on a disk with a suffix and a number."""
    return os.fsdecode(os.fsencode(stem)[:MAX_STEM_BYTES])
