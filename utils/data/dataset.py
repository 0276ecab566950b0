"""A prepared set to samples: reading its lists, the Dataset, and the order of an epoch."""
import csv
import dataclasses
import hashlib
import itertools
import pathlib
import random

import cv2
import numpy
import torch
import yaml

from utils.data import augment
from utils.data.photo import read_photo
from utils.errors import UserError
from utils.landmarks.crop import PUBLISHED_CROP
from utils.landmarks.schemes import SCHEMES, Scheme

HELD_OUT = 0.05
# Columns of sources.csv: the nominal crop and that of published NMEs, in photo pixels.
_BOXES = [f"{kind}{side}" for kind in ("", "published_")
          for side in ("x_min", "y_min", "x_max", "y_max")]


@dataclasses.dataclass
class FaceList:
    """One list of a prepared set.

    images: file paths. points (N, K, 2): all landmarks of the set's scheme, in units of the nominal
    crop, NaN where one is missing. boxes, published (N, 4): nominal and published crop in photo
    pixels; unit boxes where the set does not say. photos: source photos or None. hidden (N, K):
    which points are covered, None where the set does not say.
    """
    images: list
    points: numpy.ndarray
    boxes: numpy.ndarray
    published: numpy.ndarray
    photos: list | None
    hidden: numpy.ndarray | None = None

    def __len__(self):
        return len(self.images)

    def take(self, indices):
        """The faces at these indices, as a FaceList."""
        photos = self.photos and [self.photos[i] for i in indices]
        return FaceList([self.images[i] for i in indices], self.points[indices],
                        self.boxes[indices], self.published[indices], photos,
                        None if self.hidden is None else self.hidden[indices])

    def visible(self):
        """The FaceList whose hidden points are missing, without faces that have no other."""
        if self.hidden is None:
            return self
        points = numpy.where(self.hidden[..., None], numpy.nan, self.points)
        return dataclasses.replace(self, points=points).take(
            numpy.flatnonzero(numpy.isfinite(points).all(-1).any(-1)))

    def digest(self):
        """What tells these faces' names and landmarks from others, wherever their folder lies."""
        made = hashlib.sha256(numpy.ascontiguousarray(self.points).tobytes())
        made.update("\n".join(path.name for path in self.images).encode("utf-8", "replace"))
        return made.hexdigest()[:16]


class PreparedSet:
    """A prepared set: `scheme`, `margin`, `size`, `crop` and its lists by name.

    Where there is a list "train" there is a "val", which is empty where nothing is held out. Raises
    UserError where the folder is no prepared set, with the command that makes one.
    """

    def __init__(self, folder):
        self.folder = pathlib.Path(folder)
        lists = sorted(p for p in self.folder.glob("*.txt")
                       if p.stem in ("train", "val") or p.stem.split("_")[0] == "test")
        if not lists and (self.folder / "unlabelled.txt").is_file():
            raise UserError(f"{folder}: is an unlabelled set; give it as --unlabelled-dir beside "
                            f"--data-dir, a labelled one")
        if not lists:
            raise UserError(
                f"{folder}: no prepared set (no train.txt or test.txt). Make it with: python -c "
                f"'from utils import util; util.DataGenerator(data_dir=\"{folder}\", "
                f"target_size=256).run()'")
        self._sources = self._read_sources()
        description = self._read_description()
        # Who holds nothing out may say so with an empty list.
        none_held = any(p.stem == "val" and not p.read_bytes().strip() for p in lists)
        points = {p.stem: _read_list(p) for p in lists if not (none_held and p.stem == "val")}
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
    def has_photos(self):
        """Whether it is known where in its photo a crop lies; lists alone (LMK.zip) do not tell."""
        return self._sources is not None

    @property
    def tests(self):
        """The test lists by their short names: `test`, then `common` for test_common and so on."""
        return {name.removeprefix("test_"): faces for name, faces in self.lists.items()
                if name.startswith("test")}

    def tell_crop(self, crop, whose="the model", log=print):
        """Say where these crops are other ones than those that a model was trained on."""
        if crop != self.crop:
            log(f"note: {whose} was trained on crops {crop}, the set has {self.crop}")

    def tell_incomplete(self, log=print):
        """Say where these are not the faces that published figures rest on."""
        if self._incomplete:
            log("note: other faces than published: " + ", ".join(
                f"{subset} {prepared} of {count}"
                for subset, (prepared, count) in self._incomplete.items()))

    def tell_size(self, size, log=print):
        """Say where these crops are smaller than a network's input of size pixels."""
        if self.size and self.size < size:
            log(f"note: {self.folder} has crops of {self.size} px, blown up to the input's {size}; "
                f"the generator's --target-size {size} prepares larger ones")

    def _read_description(self):
        path = self.folder / "set.yaml"
        if not path.is_file():
            return {}
        try:
            found = yaml.safe_load(path.read_text(encoding="utf-8"))
            rule, scale = (found["crop"][key] for key in ("rule", "scale"))
            return {**found, "size": int(found["size"]), "margin": float(found["margin"]),
                    "crop": {"rule": str(rule), "scale": float(scale)}}
        except KeyError as error:
            raise UserError(f"{path}: has no {error}; prepare the set again") from None
        except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
            raise UserError(f"{path}: cannot be read: {' '.join(str(error).split())}; prepare the "
                            f"set again") from None

    def _scheme(self, description, lists):
        mean = self.folder / "indices.txt"
        if "scheme" in description:
            scheme = Scheme.from_state(description["scheme"])
        else:
            count = next(iter(lists.values()))[1].shape[1]
            named = [s for s in SCHEMES.values() if s.points == count]
            if not named:
                raise UserError(f"{self.folder}: {count} points a face, which is none of the known "
                                f"schemes; a set.yaml with the scheme is needed")
            scheme = named[0]
        for name, (_, points) in lists.items():
            if points.shape[1] != scheme.points:
                raise UserError(f"{self.folder / name}.txt: {points.shape[1]} points a face, "
                                f"scheme {scheme.name} has {scheme.points}")
        if mean.is_file():
            scheme = scheme.with_mean_face(read_mean_face(mean))
        # A set has all of its scheme's points: where they are a part of another's (own photos with
        # eyes alone), it holds no others that `indices` could mean.
        return dataclasses.replace(scheme, base=None, indices=None)

    def _read_sources(self):
        path = self.folder / "sources.csv"
        if not path.is_file():
            return None
        try:
            with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
                return {row["image"]: (row["photo"], numpy.array(
                    [float(row[k]) for k in _BOXES]).reshape(2, 4), row.get("hidden"))
                    for row in csv.DictReader(file)}
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
        """Strings of K digits 0 and 1, or None or empty, to (N, K) bool; None where all are."""
        if not any(rows):
            return None
        count = self.scheme.points
        wrong = [row for row in rows if row and (len(row) != count or set(row) - {"0", "1"})]
        if wrong:
            raise UserError(f"{self.folder / 'sources.csv'}: hidden: {count} digits 0 or 1 "
                            f"expected, found {wrong[0][:60]!r}; prepare the set again")
        return numpy.array([[digit == "1" for digit in row or "0" * count] for row in rows])

    def _locate(self, image):
        """The file of a list's path: under the set, as it stands, or by its tail under the set.

        Published lists hold absolute paths of their makers' machines.
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
        """Take a share of the training list for "val"; it may be empty, and train never is."""
        faces = self.lists["train"]
        order = list(range(len(faces)))
        random.Random(0).shuffle(order)
        count = min(max(1, round(share * len(order))), len(order) - 1) if share else 0
        self.lists["val"] = faces.take(sorted(order[:count]))
        self.lists["train"] = faces.take(sorted(order[count:]))


def neighbour_face(source, scheme):
    """The mean face (K, 2) that decides the neighbours: args.mean_face, for a model's scheme.

    source: `data` gives None, the scheme's own; `published` the authors' of the scheme or of the
    one it is part of; else a file, of the scheme's points or of all of that one. Raises UserError.
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


def read_mean_face(path):
    """A mean face (K, 2) from a file of x y x y ... Raises UserError."""
    try:
        values = [float(v) for v in pathlib.Path(path).read_text(encoding="utf-8").split()]
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: no mean face (numbers x y x y ...): {error}") from None
    if len(values) % 2 or not values or not numpy.isfinite(values).all():
        raise UserError(f"{path}: {len(values)} numbers, expected finite x y pairs")
    return numpy.array(values).reshape(-1, 2)


def _read_list(path):
    """A list file to (image names, points (N, K, 2)). Raises UserError naming the line.

    A line is an image path, which may hold blanks, and as many numbers as the first line has.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    lines = [(number, line.split()) for number, line in enumerate(lines, 1) if line.strip()]
    if not lines:
        raise UserError(f"{path}: the list is empty")
    count = next((i for i, field in enumerate(reversed(lines[0][1])) if not _is_number(field)), 0)
    images, rows = [], numpy.empty((len(lines), count))
    for row, (number, fields) in enumerate(lines):
        try:
            rows[row] = fields[len(fields) - count:]
            good = (len(fields) > count > 0 and count % 2 == 0 and _are_points(rows[row])
                    and not _is_number(fields[-count - 1]))
        except ValueError:
            good = False
        if not good:
            expected = f"{count} numbers" if row else "x y pairs"
            raise UserError(f"{path}:{number}: expected an image path and {expected}, found "
                            f"{' '.join(fields)[:60]!r}")
        images.append(" ".join(fields[:-count]))
    return images, rows.reshape(len(lines), -1, 2)


def _are_points(values):
    """Whether x y x y ... are finite or, where a point is missing, nan nan; one at least is not."""
    missing = numpy.isnan(values.reshape(-1, 2))
    return bool((missing.all(1) == missing.any(1)).all() and not missing.all()
                and not numpy.isinf(values).any())


def _is_number(text):
    try:
        float(text)
    except ValueError:
        return False
    return True


class FaceDataset(torch.utils.data.Dataset):
    """Samples of a FaceList: (image (S, S, 3) uint8, landmarks (K, 2) float32, index, bad).

    indices: which of the set's points (a subset scheme), or None. augmentation: an Augment, or
    None for the plain nominal crop. Keys are indices, or (epoch, turn) for training, where turn is
    an index, plus the number of faces each time that it comes again. An image that
    cannot be read is replaced by the next one; `bad` is then its index, else -1. cache: None, or a
    cache.CropCache to be set later.
    """

    def __init__(self, faces, margin, size, indices=None, augmentation=None, seed=0):
        self.faces, self.margin, self.size, self.seed = faces, margin, size, seed
        self.points = faces.points if indices is None else faces.points[:, list(indices)]
        self.augmentation = augmentation
        self.cache = None

    def __len__(self):
        return len(self.faces)

    def __getitem__(self, key):
        epoch, turn = key if isinstance(key, tuple) else (0, key)
        wanted = turn % len(self)
        index, stored = self.readable(wanted, self._stored)
        bad = -1 if index == wanted else wanted
        if self.augmentation is None:
            image = augment.plain(stored, self.margin, self.size)
            landmarks = self.points[index].astype(numpy.float32)
        else:
            image, landmarks = self.augmentation(stored, self.points[index], self.margin, self.size,
                                                 self.generator(epoch, turn - wanted + index))
        return torch.from_numpy(image), torch.from_numpy(landmarks), index, bad

    def readable(self, index, look):
        """(index, look(index)) of this index, or of the next one where look gives None. Raises
        UserError where it does so for all.
        """
        for other in itertools.chain((index,), range(index + 1, len(self.faces)), range(index)):
            found = look(other)
            if found is not None:
                return other, found
        raise UserError(f"{self.faces.images[index]} and all others cannot be read")

    def generator(self, epoch, turn):
        """The random generator of a face's turn in an epoch."""
        return numpy.random.default_rng((self.seed, epoch, turn))

    def _stored(self, index):
        return self.read(index) if self.cache is None else self.cache[index]

    def read(self, index):
        """The stored crop as RGB (T, T, 3), or None. Large ones are reduced while decoding."""
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

    def stored_side(self, height, width):
        """The side T in which `read` gives an image of this size."""
        side, wanted = max(height, width), round(self.size * self.margin)
        # Bilinear warping looks at four pixels; beyond a factor of 1.5 it would alias.
        return wanted if side > 1.5 * wanted else side


class EpochSampler(torch.utils.data.Sampler):
    """Batches of (epoch, turn) keys (see FaceDataset) for one rank, the same faces a step for any
    number of ranks.

    The epoch's order follows from (seed, epoch). Optimiser step s takes the next
    batch * accumulate * world faces; micro-batch a of rank r is its slice a * world + r. Faces that
    do not fill a last step wait for another epoch's order; a set smaller than one step is repeated.
    """

    def __init__(self, faces, batch, accumulate=1, rank=0, world=1, seed=0):
        self.faces, self.batch, self.accumulate = faces, batch, accumulate
        self.rank, self.world, self.seed = rank, world, seed
        self.steps = max(1, faces // (batch * accumulate * world))
        self.epoch, self.start = 0, 0

    def set_epoch(self, epoch, start=0):
        """Choose the epoch, and the optimiser step to start at (after a resume)."""
        self.epoch, self.start = epoch, start

    def __len__(self):
        return (self.steps - self.start) * self.accumulate

    def __iter__(self):
        order = numpy.random.default_rng((self.seed, self.epoch)).permutation(self.faces)
        per_step = self.batch * self.accumulate * self.world
        order = numpy.resize(order, self.steps * per_step)
        order += numpy.arange(len(order)) // self.faces * self.faces
        for step in range(self.start, self.steps):
            for micro in range(self.accumulate):
                at = step * per_step + (micro * self.world + self.rank) * self.batch
                yield [(self.epoch, int(i)) for i in order[at:at + self.batch]]
