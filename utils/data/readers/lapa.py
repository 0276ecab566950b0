"""LaPa: {train,val,test}/{images,landmarks}/, a landmark file = its count, then 106 lines x y."""
import re

from utils.data.readers.face import Face
from utils.data.readers.pts import pair, read_lines, rows_to_points, short, unique_name

NAME = "LaPa"
SCHEME = "LaPa"
LAYOUT = "{train,val,test}/{images,landmarks}/"
EXPECTED = {"train": 18176, "val": 2000, "test": 2000}


def matches(folder):
    """Whether the folder (pathlib.Path) holds images/ and landmarks/ of at least one split."""
    return any((folder / split / "images").is_dir() and (folder / split / "landmarks").is_dir()
               for split in EXPECTED)


def read(folder, problems):
    """All faces, 106 points each; missing splits are skipped, bad items go to `problems`."""
    faces, taken = [], set()
    for split in EXPECTED:
        images, landmarks = folder / split / "images", folder / split / "landmarks"
        for part, other in ((images, landmarks), (landmarks, images)):
            if other.is_dir() and not part.is_dir():
                problems.append((part, f"no such folder beside {other.name}"))
        if not (images.is_dir() and landmarks.is_dir()):
            continue
        for photo, path in pair(landmarks.iterdir(), ".txt", problems, images.iterdir()):
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


def _read_landmarks(path):
    """Landmarks (106, 2) in pixels, 0-based as they stand. Raises ValueError, OSError."""
    (line, count), *rows = read_lines(path)
    if count != str(len(rows)):
        raise ValueError(f"line {line}: the count says {short(count)}, {len(rows)} points found")
    return rows_to_points(rows, 106)
