"""Your own data: images with .pts files (pixels count from 1) beside them in a folder and its
subfolders, of which test/ and val/ (or valid/) give those lists; or one CSV file
image,x1,y1,x2,y2,... (pixels count from 0, from 1 with --one-based; optional columns split, x_min,
y_min, x_max, y_max). Semicolons or tabs may part the columns, then numbers may have decimal commas;
a file without a header has the columns image,x1,y1,x2,y2,... A point that was not labelled is
-1 -1, 0 0, nan or left empty: it is not trained, not scored and not part of the box.
"""
import collections
import csv
import os
import re

from utils.data.readers.face import Face, split_of
from utils.data.readers.pts import mark_missing, numbers, pair, read_pts, short, unique_name, walk
from utils.errors import UserError

NAME = "custom"
SCHEME = None
_TABLES = (".csv", ".tsv")
LAYOUT = "images with .pts files beside them, or one .csv file with image,x1,y1,x2,y2,..."
EXPECTED = {}
_BOX = ("x_min", "y_min", "x_max", "y_max")


def matches(folder):
    """Whether the path (pathlib.Path) is a .csv or .tsv file or a folder that holds such or .pts
    files.
    """
    if folder.is_file():
        return folder.suffix.lower() in _TABLES
    return bool(_csv_files(folder)) or _has_pts(folder)


def read(folder, problems, scheme=None, one_based=False):
    """All faces with the points of `scheme` (a landmarks.Scheme); bad items go to `problems`.

    one_based: whether the pixels of a CSV file count from 1 (those of .pts files always do).

    Raises UserError without a scheme, for a folder with neither or both of .pts and .csv files, and
    for a CSV file whose header is not the one described above.
    """
    if scheme is None:
        raise UserError(f"{folder}: your own data needs a landmark scheme: 300W, WFLW, COFW, AFLW, "
                        f"LaPa or a .yaml file")
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


def _has_pts(folder):
    return any(path.suffix.lower() == ".pts" for path in walk(folder))


def _csv_files(folder):
    return sorted(path for path in folder.iterdir()
                  if path.suffix.lower() in _TABLES and not path.name.startswith("."))


def _read_folder(folder, problems, scheme):
    """Each image beside a .pts file of its stem, written as in 300W; lists by folder names."""
    files = collections.defaultdict(list)
    for path in walk(folder):
        files[path.parent].append(path)
    faces, taken = [], set()
    for parent in sorted(files):
        place = parent.relative_to(folder)
        split = split_of(place.parts) or "train"
        for photo, landmarks in pair(files[parent], ".pts", problems):
            try:
                points = read_pts(landmarks, scheme.points, missing=True)
            except (ValueError, OSError) as error:
                problems.append((landmarks, str(error)))
                continue
            stem = (place / photo.stem).as_posix()
            faces.append(Face(photo, points, (split,), split, stem, unique_name(stem, taken)))
    return faces


def _read_csv(path, problems, scheme, one_based):
    """One line a face: an image, relative to the file, and landmarks x1,y1,x2,y2,...

    Optional columns: split (train, val, test; empty is train) and the face box x_min, y_min, x_max,
    y_max (may be empty).
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a CSV file in UTF-8: {error}") from None
    lines = re.split(r"\r\n|\n|\r", text)
    delimiter = max(",;\t", key=lines[0].count)
    try:
        header, first = _fields(lines[0], delimiter), 1
        if len(header) > 1 and _is_number(header[1].replace(",", ".")):
            header, first = ["image", *_columns(scheme)], 0
        header = _check_header(path, header, scheme)
    except csv.Error as error:
        raise UserError(f"{path}: line 1: no CSV: {error}") from None
    faces, taken, count = [], set(), collections.Counter()
    for number, line in enumerate(lines[first:], first + 1):
        if not line.strip():
            continue
        try:
            image, split, points, box = _parse(header, _fields(line, delimiter), scheme,
                                              delimiter != ",")
            photo = path.parent / image
            if not os.path.isfile(photo):
                raise ValueError(f"no image {short(str(photo), 200)}")
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


def _columns(scheme):
    return [f"{axis}{i}" for i in range(1, scheme.points + 1) for axis in "xy"]


def _is_number(text):
    try:
        return bool(numbers([text]).size)
    except ValueError:
        return False


def _fields(line, delimiter):
    # Line by line, so that an open quote spoils one line and not the rest of the file.
    rows = csv.reader([line], delimiter=delimiter, strict=True)
    return [field.strip() for field in next(rows, [])]


def _check_header(path, header, scheme):
    twice = [column for column, times in collections.Counter(header).items() if times > 1]
    if twice:
        raise UserError(f"{path}: column {short(twice[0])} is there twice")
    columns = _columns(scheme)
    missing = [column for column in ["image", *columns] if column not in header]
    if missing:
        raise UserError(f"{path}: line 1: no column {missing[0]}; expected image,x1,y1,...,"
                        f"x{scheme.points},y{scheme.points} for the {scheme.points} points of "
                        f"{scheme.name}, found {short(','.join(header))}")
    if 0 < sum(column in header for column in _BOX) < 4:
        raise UserError(f"{path}: line 1: a face box needs all of {', '.join(_BOX)}")
    unknown = [column for column in header if column not in {"image", "split", *columns, *_BOX}]
    if "" in unknown:
        raise UserError(f"{path}: line 1: a column has no name: is it an index? (pandas: "
                        f"to_csv(index=False))")
    if unknown:
        raise UserError(f"{path}: line 1: unknown column {short(unknown[0])}; known: image, split, "
                        f"{', '.join(_BOX)}, x1, y1 to x{scheme.points}, y{scheme.points} "
                        f"(the points of {scheme.name})")
    return header


def _parse(header, fields, scheme, decimal_commas):
    """A row to image, split, points (K, 2), box (4,) or None. Raises ValueError."""
    if len(fields) != len(header):
        raise ValueError(f"{len(header)} fields expected, {len(fields)} found")
    row = dict(zip(header, fields))
    if not row["image"]:
        raise ValueError("no image named")
    # One photo is one group, however the lines spell its path; on Windows with backslashes.
    image = os.path.normpath(row["image"].replace("\\", os.sep))
    if row.get("split"):
        split = split_of([row["split"]])
    else:
        # Folders above the file's own say nothing of its photos.
        folders = [] if os.path.isabs(image) else image.split(os.sep)[:-1]
        split = split_of(folders) or "train"
    if split is None:
        raise ValueError(f"split is train, val or test, found {short(row['split'])}")
    if decimal_commas:
        row = {key: value if key == "image" else value.replace(",", ".")
               for key, value in row.items()}
    points = mark_missing(numbers([row[c] for c in _columns(scheme)], missing=True).reshape(-1, 2))
    box = [row.get(column, "") for column in _BOX]
    if not any(box):
        return image, split, points, None
    box = numbers(box)
    if not (box[2] > box[0] and box[3] > box[1]):
        raise ValueError(f"the box {box.tolist()} is no x_min y_min x_max y_max")
    return image, split, points, box
