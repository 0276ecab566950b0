"""Reader of a user's own data: images with .pts files, or one CSV file.

* A folder of images with a .pts file beside each (pixels count from 1). Subfolders are read too;
  faces in a folder test/ or val/ (or valid/) belong to that list, all others to train.
* A CSV file with the columns image,x1,y1,x2,y2,... (pixels count from 0, or from 1 with
  --one-based) and optionally split, x_min, y_min, x_max, y_max. Columns may also be separated by
  semicolons, tabs or blanks; numbers may then have decimal commas. Without a header the columns are
  image,x1,y1,x2,y2,...

A point that was not labelled is written as -1 -1, 0 0 or nan, or left empty. It is neither trained
nor scored and does not affect the crop.
"""
from __future__ import annotations

import collections
import csv
import os
import pathlib
import re

import numpy

from utils.data.readers import foreign
from utils.data.readers.face import Face, require_scheme, split_of
from utils.data.readers.pts import (
    mark_missing,
    pair_files,
    parse_numbers,
    read_pts,
    shorten,
    unique_name,
    walk,
)
from utils.errors import UserError
from utils.files import delimiter_of, read_text
from utils.landmarks.schemes import Scheme

NAME = "custom"
SCHEME = None
_TABLES = (".csv", ".tsv")
LAYOUT = "images with .pts files beside them, or one .csv file with image,x1,y1,x2,y2,..."
EXPECTED = {}
_BOX = ("x_min", "y_min", "x_max", "y_max")


def matches(folder: pathlib.Path) -> bool:
    """Return True for a .csv or .tsv file, and for a folder that holds such or .pts files."""
    if folder.is_file():
        return folder.suffix.lower() in _TABLES
    return bool(_csv_files(folder)) or _has_pts(folder)


def read(folder: pathlib.Path, problems: list, scheme: Scheme | None = None,
         one_based: bool = False) -> list[Face]:
    """Read all faces of a folder or of a CSV file.

    Args:
        folder: a folder, or the path of a CSV file.
        problems: receives (path, reason) of files and lines that cannot be read.
        scheme: landmark scheme of the annotations; required.
        one_based: True if the pixels of a CSV file count from 1 (those of .pts files always do).

    Returns:
        The faces; points that were not labelled are NaN.

    Raises:
        UserError: there is no scheme, the folder has neither .pts nor .csv files or both, or a CSV
            file has the wrong header.
    """
    require_scheme(folder, scheme)
    if folder.is_file():
        return _read_csv(folder, problems, scheme, one_based)
    tables = _csv_files(folder)
    has_pts = _has_pts(folder)
    if has_pts and tables or len(tables) > 1:
        raise UserError(f"{folder}: holds {', '.join(path.name for path in tables)}"
                        f"{' and .pts files' if has_pts else ''}; give the path of the .csv file "
                        f"to read")
    if tables:
        return _read_csv(tables[0], problems, scheme, one_based)
    if not has_pts:
        raise UserError(f"{folder}: no .pts and no .csv file found; expected: {LAYOUT}")
    return _read_folder(folder, problems, scheme)


def _has_pts(folder: pathlib.Path) -> bool:
    return any(path.suffix.lower() == ".pts" for path in walk(folder))


def _csv_files(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for path in folder.iterdir()
                  if path.suffix.lower() in _TABLES and not path.name.startswith("."))


def _read_folder(folder: pathlib.Path, problems: list, scheme: Scheme) -> list[Face]:
    """Read images with .pts files; folder names give the lists."""
    files = collections.defaultdict(list)
    for path in walk(folder):
        files[path.parent].append(path)
    faces, taken = [], set()
    for parent in sorted(files):
        subfolder = parent.relative_to(folder)
        split = split_of(subfolder.parts) or "train"
        for photo, landmarks in pair_files(files[parent], ".pts", problems):
            try:
                points = read_pts(landmarks, scheme.points, allow_missing=True)
            except (ValueError, OSError) as error:
                problems.append((landmarks, str(error)))
                continue
            stem = (subfolder / photo.stem).as_posix()
            faces.append(Face(photo, points, (split,), split, stem, unique_name(stem, taken)))
    return faces


def _read_csv(path: pathlib.Path, problems: list, scheme: Scheme, one_based: bool) -> list[Face]:
    """Read a CSV file with a face on each line; image paths are relative to the file."""
    try:
        text = read_text(path)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a CSV file in UTF-8: {error}") from None
    lines = text.split("\n")
    delimiter = delimiter_of(lines[0])
    try:
        header, first = _fields(lines[0], delimiter, 1 + 2 * scheme.points), 1
        if len(header) > 1 and _is_number(header[1].replace(",", ".")):
            header, first = ["image", *_columns(scheme)], 0
        elif delimiter == " ":
            header = lines[0].split()
        header = _check_header(path, header, scheme)
    except csv.Error as error:
        raise UserError(f"{path}: line 1: no CSV: {error}") from None
    faces, taken, count = [], set(), collections.Counter()
    for number, line in enumerate(lines[first:], first + 1):
        if not line.strip():
            continue
        try:
            fields = _fields(line, delimiter, len(header))
            image, split, points, box = _parse(header, fields, scheme, delimiter != ",")
            photo = path.parent / image
            if not os.path.isfile(photo):
                raise ValueError(f"no image {shorten(str(photo), 200)}")
        except (ValueError, csv.Error) as error:
            problems.append((path, f"line {number}: {error}"))
            continue
        if one_based:
            points, box = points - 1, None if box is None else box - 1
        count[image] += 1
        stem = re.sub(r"^[./\\]+|\.[^./]*$", "", image)
        faces.append(Face(photo, points, (split,), split, image,
                          unique_name(f"{stem}-{count[image]}", taken), box))
    return faces


def _columns(scheme: Scheme) -> list[str]:
    return [f"{axis}{i}" for i in range(1, scheme.points + 1) for axis in "xy"]


def _is_number(text: str) -> bool:
    try:
        return bool(parse_numbers([text]).size)
    except ValueError:
        return False


def _fields(line: str, delimiter: str, columns: int) -> list[str]:
    if delimiter == " ":
        # The image, which is the first column, may have blanks in its path.
        return line.rsplit(None, columns - 1)
    # Lines are parsed one by one, so that an open quote affects one line and not the whole file.
    rows = csv.reader([line], delimiter=delimiter, strict=True)
    return [field.strip() for field in next(rows, [])]


def _check_header(path: pathlib.Path, header: list[str], scheme: Scheme) -> list[str]:
    other = foreign.name_of_table(header)
    if other:
        raise UserError(f"{path}: {foreign.advice(other)}")
    twice = [column for column, times in collections.Counter(header).items() if times > 1]
    if twice:
        raise UserError(f"{path}: column {shorten(twice[0])} is there twice")
    columns = _columns(scheme)
    missing = [column for column in ["image", *columns] if column not in header]
    if missing:
        raise UserError(f"{path}: line 1: no column {missing[0]}; expected image,x1,y1,...,"
                        f"x{scheme.points},y{scheme.points} for the {scheme.points} points of "
                        f"{scheme.name}, found {shorten(','.join(header))}")
    if 0 < sum(column in header for column in _BOX) < 4:
        raise UserError(f"{path}: line 1: a face box needs all of {', '.join(_BOX)}")
    unknown = [column for column in header if column not in {"image", "split", *columns, *_BOX}]
    if "" in unknown:
        raise UserError(f"{path}: line 1: a column has no name: is it an index? (pandas: "
                        f"to_csv(index=False))")
    if unknown:
        raise UserError(f"{path}: line 1: unknown column {shorten(unknown[0])}; known: image, "
                        f"split, {', '.join(_BOX)}, x1, y1 to x{scheme.points}, y{scheme.points} "
                        f"(the points of {scheme.name})")
    return header


def _parse(header: list[str], fields: list[str], scheme: Scheme, decimal_commas: bool
           ) -> tuple[str, str, numpy.ndarray, numpy.ndarray | None]:
    """Parse a row to image, split, points (K, 2) and box (4,) or None. Raises ValueError."""
    if len(fields) != len(header):
        raise ValueError(f"{len(header)} fields expected, {len(fields)} found")
    row = dict(zip(header, fields))
    if not row["image"]:
        raise ValueError("no image named")
    # Normalised, because the path is also the group of the faces of a photo.
    image = os.path.normpath(row["image"].replace("\\", os.sep))
    if row.get("split"):
        split = split_of([row["split"]])
    else:
        # Only folders below the CSV file name a split.
        folders = [] if os.path.isabs(image) else image.split(os.sep)[:-1]
        split = split_of(folders) or "train"
    if split is None:
        raise ValueError(f"split is train, val or test, found {shorten(row['split'])}")
    if decimal_commas:
        row = {key: value if key == "image" else value.replace(",", ".")
               for key, value in row.items()}
    points = parse_numbers([row[column] for column in _columns(scheme)], allow_missing=True)
    points = mark_missing(points.reshape(-1, 2))
    box = [row.get(column, "") for column in _BOX]
    if not any(box):
        return image, split, points, None
    box = parse_numbers(box)
    if not (box[2] > box[0] and box[3] > box[1]):
        raise ValueError(f"the box {box.tolist()} is no x_min y_min x_max y_max")
    return image, split, points, box
