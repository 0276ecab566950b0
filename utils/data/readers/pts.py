"""Helpers of the readers: landmark text files, files of a folder, file names of crops.

`walk` and `pair_files` find images and landmark files, `read_pts` and `read_lines` parse their text
and `unique_name` gives each face the file stem of its crop.
"""
from __future__ import annotations

import math
import os
import pathlib
import re
from collections.abc import Iterable, Sequence

import numpy

from utils.data.photo import IMAGE_SUFFIXES, is_left_out
from utils.files import is_number, read_text, split_numbers

# Bytes of a crop's file stem. File systems allow 255 for the name with a source prefix and suffix.
MAX_NAME_BYTES = 100
# Begins the reason why an image is left out because of its suffix.
OTHER_SUFFIX = "an image whose suffix is not that of a photo,"


def shorten(value: object, length: int = 50) -> str:
    """Return a value as one short printable line, for messages about files with any content."""
    text = ascii(value)
    return text if len(text) <= length else text[:length - 4] + "...'"


def mark_missing(points: numpy.ndarray) -> numpy.ndarray:
    """Return points (K, 2) with both coordinates NaN where a point was not labelled.

    Annotation tools write such a point as -1 -1, as 0 0 (the corner of the photo) or as NaN.
    """
    points = numpy.array(points, numpy.float64)
    missing = (points == -1).all(1) | (points == 0).all(1) | numpy.isnan(points).any(1)
    points[missing] = numpy.nan
    return points


def parse_numbers(fields: Sequence[str], allow_missing: bool = False) -> numpy.ndarray:
    """Convert strings to a float64 array (n,).

    Args:
        fields: the strings.
        allow_missing: read an empty field, "nan" and "na" as NaN.

    Raises:
        ValueError: names the first field that is not a finite number.
    """
    values = numpy.empty(len(fields))
    for i, field in enumerate(fields):
        if allow_missing and field.strip().lower() in ("", "nan", "na"):
            values[i] = numpy.nan
            continue
        try:
            # float() reads 1_5 as 15.
            values[i] = float(field.replace("_", "?"))
        except ValueError:
            raise ValueError(f"{shorten(field)} is no number") from None
        if not math.isfinite(values[i]):
            raise ValueError(f"{shorten(field)} is no finite number")
    return values


def read_lines(path: pathlib.Path) -> list[tuple[int, str]]:
    """Return the lines of a text file that are not blank, with their numbers from 1.

    Raises:
        ValueError: the file has no text.
        OSError: the file cannot be read.
    """
    try:
        text = read_text(path)
    except UnicodeDecodeError:
        # Every byte is valid latin-1, so a damaged byte affects one line and not the whole file.
        text = re.sub("\r\n?", "\n", path.read_bytes().decode("latin-1"))
    lines = [(i, line.strip()) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise ValueError("the file is empty")
    return lines


def rows_to_points(rows: Sequence[tuple[int, str]], points: int,
                   allow_missing: bool = False) -> numpy.ndarray:
    """Convert "x y" lines of `read_lines` (see files.split_numbers) to float64 (points, 2).

    Args:
        rows: line numbers and texts.
        points: expected number of rows.
        allow_missing: see parse_numbers.

    Raises:
        ValueError: names the line that cannot be parsed, or gives the wrong number of points.
    """
    if len(rows) != points:
        raise ValueError(f"{len(rows)} points found, {points} expected")
    out = numpy.empty((points, 2))
    for i, (line, text) in enumerate(rows):
        fields = split_numbers(text, lambda field: is_number(field) or field.lower() == "na")
        if len(fields) != 2:
            raise ValueError(f"line {line}: x y expected, found {shorten(text)}")
        try:
            out[i] = parse_numbers(fields, allow_missing)
        except ValueError as error:
            raise ValueError(f"line {line}: {error}") from None
    return out


def read_pts(path: pathlib.Path, points: int, allow_missing: bool = False) -> numpy.ndarray:
    """Read a .pts file, whose pixels count from 1.

    Args:
        path: the file.
        points: expected number of points.
        allow_missing: accept points that were not labelled (see mark_missing); they become NaN.

    Returns:
        Landmarks (points, 2) in pixels, 0-based, float64.

    Raises:
        ValueError: gives the reason why the file cannot be parsed.
        OSError: the file cannot be read.
    """
    lines = read_lines(path)
    start = next((i for i, (_, text) in enumerate(lines) if text == "{"), None)
    stop = next((i for i, (_, text) in enumerate(lines) if text == "}"), None)
    if start is None:
        raise ValueError(f"no .pts file: no line {{ found; it begins with {shorten(lines[0][1])}")
    if stop is None or stop < start:
        raise ValueError("no line } after the points: the file is cut off")
    rows = lines[start + 1:stop]
    for line, text in lines[:start]:
        key, _, value = text.partition(":")
        if key.strip() == "n_points" and value.strip() != str(len(rows)):
            raise ValueError(f"line {line}: n_points says {shorten(value.strip())}, "
                             f"{len(rows)} points found")
    found = rows_to_points(rows, points, allow_missing)
    return (mark_missing(found) if allow_missing else found) - 1


def walk(folder: pathlib.Path) -> list[pathlib.Path]:
    """Return all files under a folder, sorted; links to folders are followed, each folder once."""
    found, seen = [], set()
    # Links are followed last, so that a folder inside the tree is listed under its real path.
    folders, links = [folder], []
    while folders or links:
        current = folders.pop() if folders else links.pop(0)
        try:
            status = os.stat(current)
            entries = sorted(os.scandir(current), key=lambda entry: entry.name)
        except OSError:
            continue  # A broken link, or a folder without read permission.
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        for entry in entries:
            if entry.is_dir():
                (links if entry.is_symlink() else folders).append(pathlib.Path(entry.path))
            elif entry.is_file():
                found.append(pathlib.Path(entry.path))
    return sorted(found)


def other_suffix(files: Iterable[pathlib.Path]) -> list[tuple[pathlib.Path, str]]:
    """Return (path, reason) of the images among files whose suffix is not that of a photo."""
    return [(path, f"{OTHER_SUFFIX} {path.suffix or 'none'}: rename or convert it to .jpg or .png")
            for path in files if is_left_out(path)]


def pair_files(files: Iterable[pathlib.Path], suffix: str, problems: list,
               photos: Iterable[pathlib.Path] | None = None
               ) -> list[tuple[pathlib.Path, pathlib.Path]]:
    """Pair images with the landmark files of the same stem.

    Mirrored copies (stem ends in _mirror) and hidden files are ignored.

    Args:
        files: files of one folder.
        suffix: suffix of the landmark files, lower case.
        problems: receives (path, reason) of unpaired files and of further files of a stem.
        photos: files of the folder that holds the images, if it is another one.

    Returns:
        (image, landmark file) pairs, sorted by stem.
    """
    def by_stem(paths, suffixes):
        found = {}
        for path in sorted(paths):
            hidden = path.name.startswith(".") or path.stem.endswith("_mirror")
            if path.suffix.lower() in suffixes and not hidden:
                if path.stem in found:
                    problems.append((path, f"not used: same stem as {found[path.stem].name}"))
                else:
                    found[path.stem] = path
        return found

    files = list(files)
    photos = files if photos is None else list(photos)
    landmarks = by_stem(files, (suffix,))
    images = by_stem(photos, IMAGE_SUFFIXES)
    others = other_suffix(photos)
    problems += others
    without_photo = landmarks.keys() - {path.stem for path, _ in others}
    for stem in sorted((without_photo | images.keys()) - (landmarks.keys() & images.keys())):
        if stem in images:
            problems.append((images[stem], f"image without {stem}{suffix}"))
        else:
            problems.append((landmarks[stem], f"no image {stem}.jpg, .png or the like"))
    return [(images[stem], landmarks[stem]) for stem in sorted(landmarks.keys() & images.keys())]


def unique_name(text: str, taken: set[str]) -> str:
    """Return a file stem for `text` that is not in `taken`, and add it to `taken`.

    Runs of characters other than letters, digits and ".+-_" become "_". Long stems are truncated.
    `taken` holds lower-case stems, because some file systems ignore case.
    """
    stem = re.sub(r"[^\w.+-]+", "_", text).encode()[:MAX_NAME_BYTES].decode(errors="ignore")
    name = stem
    number = 2
    while name.lower() in taken:
        name, number = f"{stem}_{number}", number + 1
    taken.add(name.lower())
    return name
