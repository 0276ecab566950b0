"""The lists of a prepared set: image paths with landmarks, and what belongs to each face.

A list file has a line per face: the image path and x y pairs in units of the nominal crop,
separated by blanks, tabs, semicolons or commas.
PreparedSet reads it with read_list and joins it with sources.csv to a FaceList, which FaceDataset,
evaluation and self-training take.
"""
from __future__ import annotations

import dataclasses
import hashlib
import pathlib
from collections.abc import Sequence

import numpy

from utils.errors import UserError
from utils.files import is_number, read_text, split_numbers


@dataclasses.dataclass
class FaceList:
    """One list of a prepared set, of N faces with K landmarks.

    Attributes:
        images: paths of the stored crops.
        points: (N, K, 2) float64 in units of the nominal crop, NaN where a landmark is missing.
        boxes: (N, 4) the nominal crop in photo pixels; the unit box where the set has no photos.
        published: (N, 4) the crop in which the authors measure NME, as `boxes`.
        photos: paths of the photos, or None.
        hidden: (N, K) bool, occluded landmarks; None where the set does not have this.
    """
    images: list[pathlib.Path]
    points: numpy.ndarray
    boxes: numpy.ndarray
    published: numpy.ndarray
    photos: list[pathlib.Path] | None
    hidden: numpy.ndarray | None = None

    def __len__(self) -> int:
        return len(self.images)

    def select(self, indices: Sequence[int] | numpy.ndarray) -> FaceList:
        """Return the faces at these indices."""
        photos = self.photos and [self.photos[i] for i in indices]
        return FaceList([self.images[i] for i in indices], self.points[indices],
                        self.boxes[indices], self.published[indices], photos,
                        None if self.hidden is None else self.hidden[indices])

    def drop_hidden(self) -> FaceList:
        """Make hidden landmarks missing, and leave out faces that have no other landmarks."""
        if self.hidden is None:
            return self
        points = numpy.where(self.hidden[..., None], numpy.nan, self.points)
        return dataclasses.replace(self, points=points).select(
            numpy.flatnonzero(numpy.isfinite(points).all(-1).any(-1)))

    def digest(self) -> str:
        """Hash the images' names and the landmarks; the folder does not count."""
        digest = hashlib.sha256(numpy.ascontiguousarray(self.points).tobytes())
        digest.update("\n".join(path.name for path in self.images).encode("utf-8", "replace"))
        return digest.hexdigest()[:16]


def read_list(path: pathlib.Path) -> tuple[list[str], numpy.ndarray]:
    """Read a list file: image path, which may hold blanks, and x y pairs per line.

    Returns:
        Image paths as written, and points (N, K, 2) float64.

    Raises:
        UserError: it cannot be read, is empty, or has a bad line, which is named.
    """
    try:
        lines = read_text(path).split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    lines = [(number, split_numbers(line)) for number, line in enumerate(lines, 1) if line.strip()]
    if not lines:
        raise UserError(f"{path}: the list is empty")
    # All lines have as many numbers as the first line ends in.
    count = next((i for i, field in enumerate(reversed(lines[0][1])) if not is_number(field)), 0)
    images, rows = [], numpy.empty((len(lines), count))
    for row, (number, fields) in enumerate(lines):
        try:
            rows[row] = fields[len(fields) - count:]
            valid = (len(fields) > count > 0 and count % 2 == 0 and _are_points(rows[row])
                     and not is_number(fields[-count - 1]))
        except ValueError:
            valid = False
        if not valid:
            expected = f"{count} numbers" if row else "x y pairs"
            raise UserError(f"{path}:{number}: expected an image path and {expected}, found "
                            f"{' '.join(fields)[:60]!r}")
        images.append(" ".join(fields[:-count]))
    return images, rows.reshape(len(lines), -1, 2)


def _are_points(values):
    """Whether x y x y ... are finite or, for a missing point, nan nan; one at least is finite."""
    missing = numpy.isnan(values.reshape(-1, 2))
    return bool((missing.all(1) == missing.any(1)).all() and not missing.all()
                and not numpy.isinf(values).any())
