"""Landmark text files (.pts of 300W, .txt of LaPa), the images beside them, names of faces."""
import math
import os
import pathlib
import re

import numpy

from utils.data.photo import IMAGE_SUFFIXES

# Bytes of a face's name: with a source's before it and a suffix it is still none too long.
LONGEST = 100


def short(value, length=50):
    """A value as one short printable line, for messages about files that may hold anything."""
    text = ascii(value)
    return text if len(text) <= length else text[:length - 4] + "...'"


def mark_missing(points):
    """Points (K, 2) as they stand in a file, with NaN for those that its tool left out.

    Such are -1 -1, 0 0 (the corner of the photo, where no landmark lies) and NaN in either place.
    """
    points = numpy.array(points, numpy.float64)
    out = (points == -1).all(1) | (points == 0).all(1) | numpy.isnan(points).any(1)
    points[out] = numpy.nan
    return points


def numbers(fields, missing=False):
    """Strings to a float64 array. Raises ValueError naming the first that is no finite number.

    missing: whether an empty field, NaN or NA is one that was left out, and is NaN.
    """
    values = numpy.empty(len(fields))
    for i, field in enumerate(fields):
        if missing and field.strip().lower() in ("", "nan", "na"):
            values[i] = numpy.nan
            continue
        try:
            # float() reads 1_5 as 15.
            values[i] = float(field.replace("_", "?"))
        except ValueError:
            raise ValueError(f"{short(field)} is no number") from None
        if not math.isfinite(values[i]):
            raise ValueError(f"{short(field)} is no finite number")
    return values


def read_lines(path):
    """The lines of a file that are not blank: [(line number from 1, text), ...].

    latin-1, because every byte is valid there: a stray byte spoils one line and not the file.
    Raises ValueError for a file without text, OSError.
    """
    lines = re.split(r"\r\n|\n|\r", path.read_bytes().decode("latin-1"))
    lines = [(i, line.strip()) for i, line in enumerate(lines, 1) if line.strip()]
    if not lines:
        raise ValueError("the file is empty")
    return lines


def rows_to_points(rows, points, missing=False):
    """Lines "x y", as of read_lines, to (points, 2) float64. Raises ValueError naming the line.

    missing: see numbers.
    """
    if len(rows) != points:
        raise ValueError(f"{len(rows)} points found, {points} expected")
    out = numpy.empty((points, 2))
    for i, (line, text) in enumerate(rows):
        fields = text.split()
        if len(fields) != 2:
            raise ValueError(f"line {line}: x y expected, found {short(text)}")
        try:
            out[i] = numbers(fields, missing)
        except ValueError as error:
            raise ValueError(f"line {line}: {error}") from None
    return out


def read_pts(path, points, missing=False):
    """Landmarks (points, 2) of a .pts file, 0-based pixels (the file counts from 1).

    missing: whether points may be left out, see mark_missing; they are NaN. Raises ValueError with
    the reason where the file is not what it should be, OSError.
    """
    lines = read_lines(path)
    start = next((i for i, (_, text) in enumerate(lines) if text == "{"), None)
    stop = next((i for i, (_, text) in enumerate(lines) if text == "}"), None)
    if start is None:
        raise ValueError(f"no .pts file: no line {{ found; it begins with {short(lines[0][1])}")
    if stop is None or stop < start:
        raise ValueError("no line } after the points: the file is cut off")
    rows = lines[start + 1:stop]
    for line, text in lines[:start]:
        key, _, value = text.partition(":")
        if key.strip() == "n_points" and value.strip() != str(len(rows)):
            raise ValueError(f"line {line}: n_points says {short(value.strip())}, "
                             f"{len(rows)} points found")
    found = rows_to_points(rows, points, missing)
    return (mark_missing(found) if missing else found) - 1


def walk(folder):
    """Files (pathlib.Path) under a folder, sorted. Linked folders are followed, each folder once.

    A folder's own place comes before links to it, so that it does not matter where those lie.
    """
    found, seen = [], set()
    folders, links = [folder], []
    while folders or links:
        current = folders.pop() if folders else links.pop(0)
        try:
            status = os.stat(current)
            entries = sorted(os.scandir(current), key=lambda entry: entry.name)
        except OSError:
            continue  # A broken link, or a folder that is not ours to read.
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        for entry in entries:
            if entry.is_dir():
                (links if entry.is_symlink() else folders).append(pathlib.Path(entry.path))
            elif entry.is_file():
                found.append(pathlib.Path(entry.path))
    return sorted(found)


def pair(files, suffix, problems, photos=None):
    """Images and landmark files of the same stem: [(image, landmark file), ...] sorted by name.

    files: paths of one folder; photos: the images, where they lie in another. An image without
    landmarks, landmarks without an image and a second image of a stem go to `problems`. Mirrored
    copies (_mirror) and hidden files are left out.
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
    landmarks = by_stem(files, (suffix,))
    images = by_stem(files if photos is None else photos, IMAGE_SUFFIXES)
    for stem in sorted(landmarks.keys() ^ images.keys()):
        if stem in images:
            problems.append((images[stem], f"image without {stem}{suffix}"))
        else:
            problems.append((landmarks[stem], f"no image {stem}.jpg, .png or the like"))
    return [(images[stem], landmarks[stem]) for stem in sorted(landmarks.keys() & images.keys())]


def unique_name(text, taken):
    """A file stem for `text` (blanks and slashes become _) unlike all in the set `taken`.

    It is added to `taken`; letter case does not count, as on some file systems. A long one is cut.
    """
    name = stem = re.sub(r"[^\w.+-]+", "_", text).encode()[:LONGEST].decode(errors="ignore")
    number = 2
    while name.lower() in taken:
        name, number = f"{stem}_{number}", number + 1
    taken.add(name.lower())
    return name
