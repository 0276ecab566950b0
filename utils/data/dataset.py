"""From a prepared set to training samples.

PreparedSet reads a folder that DataGenerator has written: its scheme, its crop and its lists of
faces. FaceDataset turns one list into samples, an image and its landmarks each, augmented for
training; EpochSampler gives the order of the faces in an epoch.

A sample's augmentation is a function of (seed, epoch, index) alone, and the faces of an optimiser
step do not depend on the number of ranks.
"""
from __future__ import annotations

import csv
import dataclasses
import itertools
import pathlib
import random
import typing
from collections.abc import Callable, Iterator, Sequence

import cv2
import numpy
import torch
import yaml

from utils.data.augment import Augment, nominal_crop
from utils.data.face_list import FaceList, read_list
from utils.data.photo import read_photo
from utils.errors import UserError, shell_word
from utils.files import read_table, read_text, split_numbers
from utils.landmarks.crop import PUBLISHED_CROP
from utils.landmarks.schemes import SCHEMES, Scheme

# Share of the training list that validates where a set has no validation list.
HELD_OUT = 0.05
# Columns of sources.csv: the nominal and the published crop (see FaceList) in photo pixels.
_BOXES = [f"{kind}{side}" for kind in ("", "published_")
          for side in ("x_min", "y_min", "x_max", "y_max")]


class PreparedSet:
    """A prepared set.

    Args:
        folder: the set; its lists are train.txt, val.txt, test.txt and test_*.txt.

    Attributes:
        scheme: the Scheme of its landmarks.
        size: side of the nominal crop in pixels; None without a set.yaml.
        margin: side of the stored crops over that of the nominal crop.
        crop: crop rule and scale, as model files keep them.
        lists: FaceList by name: train, val, test and test_*. A set with "train" has "val", which is
            empty where nothing is held out.
        drawn: whether its faces are drawn, not photographed.
        upright: whether photos are rotated as their EXIF orientation says.

    Raises:
        UserError: it is not a prepared set; the message has the command that makes one.
    """

    def __init__(self, folder: pathlib.Path | str):
        self.folder = pathlib.Path(folder)
        lists = sorted(p for p in self.folder.glob("*.txt")
                       if p.stem in ("train", "val") or p.stem.split("_")[0] == "test")
        if not lists and (self.folder / "unlabelled.txt").is_file():
            raise UserError(f"{folder}: is an unlabelled set; give it as --unlabelled-dir beside "
                            f"--data-dir, a labelled one")
        if not lists:
            command = (f"python -c 'from utils import util; util.DataGenerator("
                       f"data_dir=\"{folder}\", target_size=256).run()'")
            if "+" in str(folder):
                command = "bash recipes/data.sh " + " ".join(
                    shell_word(name) for name in str(folder).split("+"))
            raise UserError(f"{folder}: no prepared set (no train.txt or test.txt); make it with: "
                            f"{command}")
        self._sources = self._read_sources()
        description = self._read_description()
        # An empty val.txt means that nothing is held out.
        none_held = any(p.stem == "val" and not p.read_bytes().strip() for p in lists)
        points = {p.stem: read_list(p) for p in lists if not (none_held and p.stem == "val")}
        self.scheme = self._scheme(description, points)
        self.size, self.margin = description.get("size"), description.get("margin", 1.0)
        self.crop = description.get("crop", PUBLISHED_CROP)
        self.lists = {name: self._face_list(name, *rows) for name, rows in points.items()}
        self._incomplete = description.get("incomplete", {})
        self.drawn = description.get("layouts") == ["samples"]
        self.upright = description.get("exif") == "obey"
        if "train" in self.lists and "val" not in self.lists:
            held_out = 0 if none_held or description.get("val") == 0 else HELD_OUT
            self._split_validation(held_out)

    @property
    def has_photos(self) -> bool:
        """Whether the place of each crop in its photo is known; without sources.csv it is not."""
        return self._sources is not None

    @property
    def test_lists(self) -> dict[str, FaceList]:
        """The test lists by short name: `test`, then `common` for test_common and so on."""
        return {name.removeprefix("test_"): faces for name, faces in self.lists.items()
                if name.startswith("test")}

    def warn_crop(self, crop: dict, owner: str = "the model", log: Callable = print) -> None:
        """Print a note if a model (`owner`) was trained on another crop than this set's."""
        if crop != self.crop:
            log(f"note: {owner} was trained on crops {crop}, the set has {self.crop}")

    def warn_incomplete(self) -> None:
        """Print a note if faces of a published set are missing."""
        if self._incomplete:
            print("note: other faces than published: " + ", ".join(
                f"{subset} {prepared} of {count}"
                for subset, (prepared, count) in self._incomplete.items()))

    def warn_size(self, size: int, log: Callable = print) -> None:
        """Print a note if the crops are smaller than a network's input of `size` pixels."""
        if self.size and self.size < size:
            log(f"note: {self.folder} has crops of {self.size} px, which are enlarged to the "
                f"input's {size}; the generator's --target-size {size} prepares larger ones")

    def _read_description(self):
        path = self.folder / "set.yaml"
        if not path.is_file():
            return {}
        try:
            found = yaml.safe_load(read_text(path))
            rule, scale = (found["crop"][key] for key in ("rule", "scale"))
            return {**found, "size": int(found["size"]), "margin": float(found["margin"]),
                    "crop": {"rule": str(rule), "scale": float(scale)}}
        except KeyError as error:
            raise UserError(f"{path}: has no {error}; prepare the set again") from None
        except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
            raise UserError(f"{path}: cannot be read: {' '.join(str(error).split())}; prepare the "
                            f"set again") from None

    def _scheme(self, description, lists):
        mean_face = self.folder / "indices.txt"
        if "scheme" in description:
            scheme = Scheme.from_state(description["scheme"])
        else:
            count = next(iter(lists.values()))[1].shape[1]
            matching = [s for s in SCHEMES.values() if s.points == count]
            if not matching:
                raise UserError(f"{self.folder}: {count} points a face, which is none of the known "
                                f"schemes; a set.yaml with the scheme is needed")
            scheme = matching[0]
        for name, (_, points) in lists.items():
            if points.shape[1] != scheme.points:
                raise UserError(f"{self.folder / name}.txt: {points.shape[1]} points a face, "
                                f"scheme {scheme.name} has {scheme.points}")
        if mean_face.is_file():
            scheme = scheme.with_mean_face(read_mean_face(mean_face))
        # The set has the points of this scheme only. If it is a subset of another scheme, there
        # are no other points that `indices` could refer to.
        return dataclasses.replace(scheme, base=None, indices=None)

    def _read_sources(self):
        path = self.folder / "sources.csv"
        if not path.is_file():
            return None
        try:
            return {row["image"]: (row["photo"], numpy.array(
                [float(row[k]) for k in _BOXES]).reshape(2, 4), row.get("hidden"))
                for _, row in read_table(path, errors="surrogateescape").rows}
        except (OSError, KeyError, TypeError, ValueError, csv.Error) as error:
            raise UserError(f"{path}: cannot be read ({error}); prepare the set again") from None

    def _face_list(self, name, images, points):
        unit = numpy.tile(numpy.array([0.0, 0, 1, 1]), (len(images), 1))
        boxes, published, photos, hidden = unit, unit.copy(), None, None
        if self._sources is not None:
            try:
                found = [self._sources[image] for image in images]
            except KeyError as error:
                raise UserError(f"{self.folder / name}.txt: {error} is not in sources.csv; prepare "
                                f"the set again") from None
            photos = [pathlib.Path(photo) for photo, *_ in found]
            boxes = numpy.array([both[0] for _, both, _ in found])
            published = numpy.array([both[1] for _, both, _ in found])
            hidden = self._hidden([flags for *_, flags in found])
        return FaceList([self._locate(image) for image in images], points, boxes, published, photos,
                        hidden)

    def _hidden(self, rows):
        """Parse the `hidden` strings of a list, K digits each with 1 for a hidden point, to (N, K).

        An empty or absent string has no hidden point. Returns None if all are such.
        """
        if not any(rows):
            return None
        count = self.scheme.points
        wrong = [row for row in rows if row and (len(row) != count or set(row) - {"0", "1"})]
        if wrong:
            raise UserError(f"{self.folder / 'sources.csv'}: hidden: {count} digits 0 or 1 "
                            f"expected, found {wrong[0][:60]!r}; prepare the set again")
        return numpy.array([[digit == "1" for digit in row or "0" * count] for row in rows])

    def _locate(self, image):
        """Find the file of a list's path: as it is, or by the last parts of the path.

        Published lists hold absolute paths of the authors' machines.
        """
        path = self.folder / image
        if self._sources is not None or path.is_file():
            return path
        parts = pathlib.PurePosixPath(image.replace("\\", "/")).parts
        for start in range(1, len(parts)):
            tail = self.folder.joinpath(*parts[start:])
            if tail.is_file():
                return tail
        return path

    def _split_validation(self, share):
        """Move a share of the training list to "val", which may stay empty; train never does."""
        faces = self.lists["train"]
        order = list(range(len(faces)))
        random.Random(0).shuffle(order)
        count = min(max(1, round(share * len(order))), len(order) - 1) if share else 0
        self.lists["val"] = faces.select(sorted(order[:count]))
        self.lists["train"] = faces.select(sorted(order[count:]))


def load_neighbour_face(source: str, scheme: Scheme) -> numpy.ndarray | None:
    """Load the mean face that defines the neighbours of each landmark (setting `mean_face`).

    Args:
        source: `data` for the scheme's own; `published` for the authors'; else a file, with the
            points of `scheme` or of the scheme that it is a subset of.
        scheme: the model's Scheme.

    Returns:
        (K, 2) in crop units, or None for the scheme's own.

    Raises:
        UserError: there is none, or it has another number of points.
    """
    if source == "data":
        return None
    indices = slice(None) if scheme.indices is None else list(scheme.indices)
    if source != "published":
        face = read_mean_face(source)
        if len(face) == scheme.points:
            return face
        if scheme.indices is None or max(scheme.indices) >= len(face):
            raise UserError(f"{source}: {len(face)} points, scheme {scheme.name} has "
                            f"{scheme.points}")
        return face[indices]
    known = SCHEMES.get(scheme.base or scheme.name)
    if known is None:
        raise UserError(f"mean_face: published: there is none for the scheme {scheme.name}; use "
                        f"data or a file")
    return known.mean_face[indices]


def read_mean_face(path: pathlib.Path | str) -> numpy.ndarray:
    """Read a mean face (K, 2) from a file of numbers x y x y ..."""
    try:
        values = [float(v) for line in read_text(path).splitlines() for v in split_numbers(line)]
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: no mean face (numbers x y x y ...): {error}") from None
    if len(values) % 2 or not values or not numpy.isfinite(values).all():
        raise UserError(f"{path}: {len(values)} numbers, expected finite x y pairs")
    return numpy.array(values).reshape(-1, 2)


class FaceDataset(torch.utils.data.Dataset):
    """Samples of a FaceList.

    A key is an index or, for training, (epoch, sample). `sample` is the index plus, for each
    repetition of the face within the epoch, the number of faces.

    Args:
        faces: N faces.
        margin: side of the stored crops over that of the nominal crop.
        size: side of the images in pixels.
        indices: which of the faces' points are returned, for a subset scheme; None: all.
        augmentation: an Augment or a callable like it; None: the nominal crop.
        seed: seed of the augmentation.

    Attributes:
        cache: a CropCache, or None; set after construction.
    """

    def __init__(self, faces: FaceList, margin: float, size: int,
                 indices: Sequence[int] | None = None, augmentation: Augment | None = None,
                 seed: int = 0):
        self.faces, self.margin, self.size, self.seed = faces, margin, size, seed
        self.points = faces.points if indices is None else faces.points[:, list(indices)]
        self.augmentation = augmentation
        self.cache = None

    def __len__(self) -> int:
        return len(self.faces)

    def __getitem__(self, key: int | tuple[int, int]
                    ) -> tuple[torch.Tensor, torch.Tensor, int, int]:
        """Load a sample; an image that cannot be read is replaced by the next one.

        Returns:
            Image (size, size, 3) uint8 RGB, landmarks (K, 2) float32 in its crop units, index of
            the face, and index of the unreadable image that it replaces, else -1.
        """
        epoch, sample = key if isinstance(key, tuple) else (0, key)
        requested = sample % len(self)
        index, stored = self.first_readable(requested, self._stored)
        unreadable = -1 if index == requested else requested
        if self.augmentation is None:
            image = nominal_crop(stored, self.margin, self.size)
            landmarks = self.points[index].astype(numpy.float32)
        else:
            image, landmarks = self.augmentation(stored, self.points[index], self.margin, self.size,
                                                 self.generator(epoch, sample - requested + index))
        return torch.from_numpy(image), torch.from_numpy(landmarks), index, unreadable

    def first_readable(self, index: int, read: Callable[[int], typing.Any]
                       ) -> tuple[int, typing.Any]:
        """Find the first face from `index` on, cyclically, for which read(i) is not None.

        Returns:
            Its index i, and read(i).

        Raises:
            UserError: there is none.
        """
        for other in itertools.chain((index,), range(index + 1, len(self.faces)), range(index)):
            found = read(other)
            if found is not None:
                return other, found
        raise UserError(f"{self.faces.images[index]} and all others cannot be read")

    def generator(self, epoch: int, sample: int) -> numpy.random.Generator:
        """Make the random generator of a sample, on which its augmentation depends alone."""
        return numpy.random.default_rng((self.seed, epoch, sample))

    def _stored(self, index):
        return self.read(index) if self.cache is None else self.cache[index]

    def read(self, index: int) -> numpy.ndarray | None:
        """Decode a stored crop to RGB (T, T, 3) uint8, reduced if large; None if unreadable."""
        image = read_photo(self.faces.images[index], upright=True)
        if image is None:
            return None
        side = self.stored_side(*image.shape[:2])
        if image.shape[0] != image.shape[1]:
            longer = max(image.shape[:2])
            image = cv2.resize(image, (longer, longer))
        if image.shape[0] > side:
            image = cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA)
        return image

    def stored_side(self, height: int, width: int) -> int:
        """Return the side T in pixels to which `read` reduces an image of this size."""
        side, target = max(height, width), round(self.size * self.margin)
        # The warp interpolates between four pixels; beyond a factor of 1.5 it would alias.
        return target if side > 1.5 * target else side


class EpochSampler(torch.utils.data.Sampler):
    """Batches of (epoch, sample) keys (see FaceDataset) for one rank.

    The order of an epoch is a function of (seed, epoch). Optimiser step s takes the next
    batch * accumulate * world faces of it; micro-batch a of rank r is slice a * world + r of these.
    So a step has the same faces for any number of ranks. Faces that do not fill a last step are
    left out of the epoch; a set smaller than one step is repeated.

    Args:
        faces: number of faces.
        batch: faces per micro-batch.
        accumulate: micro-batches per rank and optimiser step.
        rank: this rank.
        world: number of ranks.
        seed: seed of the order.
    """

    def __init__(self, faces: int, batch: int, accumulate: int = 1, rank: int = 0, world: int = 1,
                 seed: int = 0):
        self.faces, self.batch, self.accumulate = faces, batch, accumulate
        self.rank, self.world, self.seed = rank, world, seed
        self.steps = max(1, faces // (batch * accumulate * world))
        self.epoch, self.start = 0, 0

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Set the epoch, and the optimiser step to start at after a resume."""
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        return (self.steps - self.start) * self.accumulate

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = numpy.random.default_rng((self.seed, self.epoch)).permutation(self.faces)
        per_step = self.batch * self.accumulate * self.world
        order = numpy.resize(order, self.steps * per_step)
        order += numpy.arange(len(order)) // self.faces * self.faces
        for step in range(self.start, self.steps):
            for micro in range(self.accumulate):
                at = step * per_step + (micro * self.world + self.rank) * self.batch
                yield [(self.epoch, int(i)) for i in order[at:at + self.batch]]
