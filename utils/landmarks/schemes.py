"""Landmark schemes: what the K points of a data set are.

A `Scheme` holds the flip table, the mean face, the NME divisor and the regions of a set of points.
Data sets, models and ONNX files carry theirs; `get_scheme` finds one by name, reads one from a YAML
file or takes a subset, and `wflw_to_300w` converts labels. To add a built-in scheme, add an entry
to `_FLIPS`, `_DIVISORS` and `_REGIONS` here and its mean face to mean_faces.py; no other file
changes (an entry in pose.py adds head pose).
"""
from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Sequence

import numpy
import yaml

from utils.args import UniqueLoader
from utils.errors import UserError
from utils.files import read_text
from utils.landmarks.mean_faces import MEAN_FACES

# A larger number in a scheme file is a typing mistake that would fill the memory.
MAX_POINTS = 10000


def _span(*parts):
    """Expand inclusive 1-based runs to 0-based indices: (3, 1), 7 gives [2, 1, 0, 6]."""
    indices = []
    for part in parts:
        first, last = part if isinstance(part, tuple) else (part, part)
        step = 1 if last >= first else -1
        indices += [i - 1 for i in range(first, last + step, step)]
    return indices


def _range(first, last):
    return list(range(first, last + 1))


# flip[i] is the index that point i has in a mirrored face. Each table is its own inverse and maps
# the mirrored mean face onto itself (tests/test_landmarks.py).
_FLIPS = {
    "300W": _span((17, 1), (27, 18), (28, 31), (36, 32), (46, 43), (48, 47), (40, 37), (42, 41),
                  (55, 49), (60, 56), (65, 61), (68, 66)),
    "WFLW": (_span((33, 1), (47, 43), (51, 48), (38, 34), (42, 39), (52, 55), (60, 56), (73, 69),
                   (76, 74), (65, 61), (68, 66), (83, 77), (88, 84), (93, 89), (96, 94), (98, 97))),
    "COFW": _span(2, 1, 4, 3, (7, 8), (5, 6), 10, 9, 12, 11, (15, 16), (13, 14), 18, 17, 20, 19, 21,
                  22, 24, 23, (25, 29)),
    "AFLW": _span((6, 1), (12, 7), (15, 13), (18, 16), 19),
    "LaPa": _span((33, 1), (47, 43), (51, 48), (38, 34), (42, 39), (52, 55), (66, 56), (80, 76),
                  (83, 81), 84, (71, 67), (74, 72), 75, (91, 85), (96, 92), (101, 97), (104, 102),
                  106, 105),
}
_DIVISORS = {"300W": (36, 45), "WFLW": (60, 72), "COFW": (8, 9), "AFLW": None, "LaPa": (66, 79)}
# Regions are for drawing and by-region errors. Each eye is a contour that starts at one corner.
_REGIONS = {
    "300W": {"jaw": _range(0, 16), "right brow": _range(17, 21), "left brow": _range(22, 26),
             "nose bridge": _range(27, 30), "nose": _range(31, 35), "right eye": _range(36, 41),
             "left eye": _range(42, 47), "lips": _range(48, 59), "inner lips": _range(60, 67)},
    "WFLW": {"jaw": _range(0, 32), "right brow": _range(33, 41), "left brow": _range(42, 50),
             "nose bridge": _range(51, 54), "nose": _range(55, 59), "right eye": _range(60, 67),
             "left eye": _range(68, 75), "lips": _range(76, 87), "inner lips": _range(88, 95),
             "right pupil": [96], "left pupil": [97]},
    "COFW": {"right brow": [0, 4, 2, 5], "left brow": [3, 6, 1, 7], "right eye": [8, 12, 10, 13],
             "left eye": [11, 14, 9, 15], "right pupil": [16], "left pupil": [17],
             "nose": [18, 21, 19], "nose bridge": [20], "lips": [22, 24, 23, 27],
             "inner lips": [25, 26], "jaw": [28]},
    "AFLW": {"right brow": [0, 1, 2], "left brow": [3, 4, 5], "right eye": [6, 7, 8],
             "left eye": [9, 10, 11], "nose": [12, 13, 14], "lips": [15, 16, 17], "jaw": [18]},
    "LaPa": {"jaw": _range(0, 32), "right brow": _range(33, 41), "left brow": _range(42, 50),
             "nose bridge": _range(51, 54), "nose": _range(55, 65), "right eye": _range(66, 73),
             "right pupil": [74, 104], "left eye": _range(75, 82), "left pupil": [83, 105],
             "lips": _range(84, 95), "inner lips": _range(96, 103)},
}
# Divisors of the NME other than the distance of two points: the root of the face box's area, and
# the box's diagonal.
BOX_DIVISORS = {"box": None, "diagonal": "diagonal"}
# Parts of any scheme by name, and their regions.
PARTS = {"eyes": ("right eye", "left eye"), "mouth": ("lips", "inner lips"),
         "brows": ("right brow", "left brow"), "contour": ("jaw",)}


@dataclasses.dataclass(frozen=True, eq=False)
class Scheme:
    """The meaning of a set of K landmarks.

    Attributes:
        name: name of the scheme.
        flip: (K,), flip[i] is the index that point i has in a mirrored face.
        mean_face: (K, 2) in crop units; NaN if the scheme file has none.
        divisor: two point indices whose distance divides the NME, None for the root of the face
            box's area, or "diagonal" for its diagonal.
        regions: name to point indices, for drawing.
        base: name of the scheme that this one is a subset of, or None.
        indices: the points of a subset in its base, or None.
        mirrors: whether a mirrored face belongs to the scheme; if not, flip is the identity.
        names: K point names of a scheme file, for annotation readers; `state` omits them.
    """
    name: str
    flip: numpy.ndarray
    mean_face: numpy.ndarray
    divisor: tuple[int, int] | str | None
    regions: dict[str, list[int]]
    base: str | None = None
    indices: tuple[int, ...] | None = None
    mirrors: bool = True
    names: tuple[str, ...] | None = None

    @property
    def points(self) -> int:
        """K, the number of landmarks."""
        return len(self.flip)

    @property
    def eyes(self) -> tuple[list[int], list[int]] | None:
        """Contours of the right and the left eye, index lists that start at a corner, or None."""
        right, left = self.regions.get("right eye"), self.regions.get("left eye")
        closed = right and left and len(right) % 2 == 0 and len(left) % 2 == 0
        return (right, left) if closed and len(right) >= 4 else None

    def subset(self, indices: Sequence[int], name: str | None = None) -> Scheme:
        """Return the scheme of some of this scheme's points, in the order of `indices`.

        Raises:
            UserError: an index is out of range or occurs twice, or the mirror partner of a point is
                missing.
        """
        indices = [int(i) for i in indices]
        bad = [i for i in indices if not 0 <= i < self.points]
        if bad:
            raise UserError(f"scheme {self.name} has points 0..{self.points - 1}, not {bad[0]}")
        if len(set(indices)) != len(indices) or not indices:
            raise UserError(f"a subset of {self.name} needs different points, found {indices}")
        index_of = {point: i for i, point in enumerate(indices)}
        missing = [(i, int(self.flip[i])) for i in indices if int(self.flip[i]) not in index_of]
        if missing:
            raise UserError(f"subset of {self.name}: point {missing[0][0]} is there, its mirror "
                            f"partner {missing[0][1]} is not; add it")
        divisor = self.divisor
        if isinstance(divisor, tuple):
            complete = all(i in index_of for i in divisor)
            divisor = tuple(index_of[i] for i in divisor) if complete else None
        regions = {}
        for region, points in self.regions.items():
            kept = [index_of[i] for i in points if i in index_of]
            if kept:
                regions[region] = kept
        return Scheme(name or f"{self.name}[{','.join(map(str, indices))}]",
                      numpy.array([index_of[int(self.flip[i])] for i in indices]),
                      self.mean_face[indices], divisor, regions, self.name, tuple(indices),
                      self.mirrors, self.names and tuple(self.names[i] for i in indices))

    def part(self, name: str) -> Scheme:
        """Return the subset called `name` in PARTS.

        Raises:
            UserError: this scheme lacks a region of the part.
        """
        missing = [region for region in PARTS[name] if region not in self.regions]
        if missing:
            raise UserError(f"scheme {self.name} has no region {missing[0]!r}, which part {name} "
                            f"needs; give the points, such as 36-47")
        return self.subset(sum((self.regions[region] for region in PARTS[name]), []), name)

    def with_mean_face(self, mean_face: numpy.ndarray) -> Scheme:
        """Return this scheme with another mean face (K, 2); UserError for another K."""
        mean_face = numpy.asarray(mean_face, numpy.float64).reshape(-1, 2)
        if len(mean_face) != self.points:
            raise UserError(f"mean face has {len(mean_face)} points, scheme {self.name} has "
                            f"{self.points}")
        return dataclasses.replace(self, mean_face=mean_face)

    def state(self) -> dict:
        """Return plain numbers and strings, for checkpoints, set.yaml and ONNX metadata."""
        divisor = self.divisor
        return {"name": self.name, "flip": [int(i) for i in self.flip],
                "mean_face": [[float(x), float(y)] for x, y in self.mean_face],
                "divisor": list(divisor) if isinstance(divisor, tuple) else divisor,
                "regions": {k: [int(i) for i in v] for k, v in self.regions.items()},
                "base": self.base,
                "indices": None if self.indices is None else [int(i) for i in self.indices],
                **({} if self.mirrors else {"mirrors": False})}

    @classmethod
    def from_state(cls, state: dict) -> Scheme:
        """Build from what `state` returns.

        Raises:
            UserError: a field is missing or has a wrong shape.
        """
        try:
            points, divisor = len(state["flip"]), state["divisor"]
            if divisor not in BOX_DIVISORS.values():
                divisor = tuple(int(i) for i in divisor)
                if len(divisor) != 2 or not all(0 <= i < points for i in divisor):
                    raise ValueError(f"divisor {divisor}")
            scheme = cls(str(state["name"]), numpy.array(state["flip"], numpy.int64),
                         numpy.array(state["mean_face"], numpy.float64).reshape(points, 2),
                         divisor, dict(state["regions"]), state.get("base"),
                         None if state.get("indices") is None else tuple(state["indices"]),
                         bool(state.get("mirrors", True)))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"not the description of a landmark scheme: {error!r}") from None
        if sorted(scheme.flip.tolist()) != list(range(points)):
            raise UserError(f"scheme {scheme.name}: the flip table is not a permutation of "
                            f"0..{points - 1}")
        wrong = numpy.flatnonzero(scheme.flip[scheme.flip] != numpy.arange(points))
        if len(wrong):
            raise UserError(f"scheme {scheme.name}: {_flip_error(scheme.flip, wrong[0])}")
        return scheme


def _flip_error(flip, point, names=None):
    """Error text for a point that two flips do not map to itself."""
    chain = [point, int(flip[point]), int(flip[flip[point]])]
    first, second, third = (names[i] if names else i for i in chain)
    return (f"flip takes point {first} to {second}, and {second} to {third}: a face mirrored twice "
            f"must be the same again")


def _build_schemes():
    schemes = {}
    for name, flip in _FLIPS.items():
        mean = numpy.array(MEAN_FACES[name], numpy.float64).reshape(-1, 2)
        schemes[name] = Scheme(name, numpy.array(flip), mean, _DIVISORS[name], _REGIONS[name])
    schemes["eyes"] = schemes["300W"].part("eyes")
    return schemes


SCHEMES = _build_schemes()


def get_scheme(name: str | os.PathLike | Sequence[int] | Scheme,
               base: Scheme | None = None) -> Scheme:
    """Find or build a scheme.

    Args:
        name: a key of SCHEMES; a key of PARTS, for a part of `base`; a YAML file, see read_scheme;
            or points of `base`, as a list or a string such as "36-41,42-47". A Scheme is returned
            as it is.
        base: scheme of a part or subset; default 300W.

    Raises:
        UserError: unknown name, or a bad file or subset.
    """
    if isinstance(name, Scheme):
        return name
    if isinstance(name, (list, tuple)):
        return (base or SCHEMES["300W"]).subset(name)
    name = str(name)
    if name in PARTS:
        return (base or SCHEMES["300W"]).part(name)
    if name in SCHEMES:
        return SCHEMES[name]
    if name.endswith((".yaml", ".yml")):
        return read_scheme(name)
    if name and all(c in "0123456789,- " for c in name):
        return (base or SCHEMES["300W"]).subset(parse_indices(name))
    known = dict.fromkeys([*SCHEMES, *PARTS])
    near = difflib.get_close_matches(name, known, 1, 0.3)
    raise UserError(f"unknown landmark scheme {name!r}; known: {', '.join(known)}, a list of "
                    f"points such as 36-47, or a .yaml file"
                    + (f" (nearest: {near[0]})" if near else ""))


def model_scheme(name: str, set_scheme: Scheme) -> Scheme:
    """Return the scheme of a model: the scheme of its training set or a part of it.

    Args:
        name: the setting `scheme`; `auto` is the set's own scheme.
        set_scheme: scheme of the training set, whose mean face the model keeps.

    Raises:
        UserError: another scheme.
    """
    if name in ("auto", set_scheme.name):
        return set_scheme
    scheme = get_scheme(name, set_scheme)
    if is_part_of(scheme, set_scheme):
        return set_scheme if scheme.base is None else set_scheme.subset(scheme.indices, scheme.name)
    mapped = ", ".join(f"{a} to {b}" for a, b in MAPPINGS)
    raise UserError(f"scheme {scheme.name} is neither the set's ({set_scheme.name}) nor a part of "
                    f"it; when a set is prepared, labels can be converted from {mapped}")


def is_part_of(scheme: Scheme, whole: Scheme) -> bool:
    """Tell whether a scheme is the scheme `whole` or a subset of it."""
    if scheme.base is None:
        return scheme.name == whole.name and scheme.points == whole.points
    return scheme.base == whole.name and max(scheme.indices) < whole.points


def check_scheme(scheme: Scheme, set_scheme: Scheme, what: str) -> None:
    """Check that a model of `scheme` can be trained or scored on a set.

    Args:
        scheme: scheme of the model.
        set_scheme: scheme of the set.
        what: the model's file, for the message.

    Raises:
        UserError: the scheme is neither the set's nor a part of it.
    """
    if not is_part_of(scheme, set_scheme):
        whole = "" if scheme.base is None else f" of {scheme.base}'s"
        raise UserError(f"{what}: the model has the {scheme.name} scheme ({scheme.points}{whole} "
                        f"points), the set {set_scheme.name} ({set_scheme.points} points)")


def parse_indices(text: str) -> list[int]:
    """Parse "36-41, 45" to [36, ..., 41, 45]; raises UserError."""
    indices = []
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        try:
            first, last = int(first), int(last or first)
        except ValueError:
            raise UserError(f"points are written as 36-47 or 0,2,5-9, not {text!r}") from None
        if last >= MAX_POINTS:
            raise UserError(f"points must be at most {MAX_POINTS - 1}, found {text!r}")
        indices += range(first, last + 1)
    return indices


def read_scheme(path: str | os.PathLike) -> Scheme:
    """Read a custom scheme from a YAML file.

    A point is given by its name or its 0-based number. The keys are:

    * `points`: K; or `names`: K strings.
    * `flip`: pairs of mirror partners, where points in no pair lie on the mid-line; or a table of K
      points; or `none`, the default: a mirrored face does not belong to the scheme.
    * `divisor`: two points, `diagonal` or `box` (default), see Scheme.
    * `regions`: name to points, optional.
    * `mean_face`: K pairs, optional; without it the mean face is computed from the data.
    * `name`: name of the scheme, optional.

    Raises:
        UserError: the file cannot be read or a key is wrong.
    """
    try:
        spec = yaml.load(read_text(path), UniqueLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read as a scheme: {' '.join(str(error).split())}") \
            from None
    if not isinstance(spec, dict):
        raise UserError(f"{path}: expected keys names or points, flip, divisor")
    known = {"name", "names", "points", "flip", "divisor", "regions", "mean_face"}
    for key in spec:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1)
            raise UserError(f"{path}: unknown key {key!r}; known: {', '.join(sorted(known))}"
                            + (f" (nearest: {near[0]})" if near else ""))
    try:
        points, names = _read_names(spec)
        if str(spec.get("name")) in (*SCHEMES, *PARTS):
            raise ValueError(f"name: {spec['name']} is a built-in scheme; give another name")
        index_of = {name: i for i, name in enumerate(names or [])}

        def index(point):
            if str(point) in index_of:
                return index_of[str(point)]
            if isinstance(point, int) and not isinstance(point, bool) and 0 <= point < points:
                return point
            near = difflib.get_close_matches(str(point), index_of, 1)
            raise ValueError(f"no point {point!r}; points are 0..{points - 1}"
                             + (" or their names" if names else "")
                             + (f" (nearest: {near[0]})" if near else ""))

        mirrors = spec.get("flip", "none") != "none"
        flip = _read_flip(spec["flip"] if mirrors else [], points, index, names)
        divisor = _read_divisor(spec.get("divisor"), index)
        regions = spec.get("regions") or {}
        if not isinstance(regions, dict) or not all(isinstance(v, list) for v in regions.values()):
            raise ValueError("regions maps a name to a list of points")
        regions = {str(k): [index(p) for p in v] for k, v in regions.items()} \
            or {"points": list(range(points))}
        mean = _read_mean(spec.get("mean_face"), points)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    return Scheme(str(spec.get("name") or "custom"), flip, mean, divisor, regions, mirrors=mirrors,
                  names=names and tuple(names))


def _read_names(spec):
    """K, and the names or None, of a scheme file's content; raises ValueError."""
    names = spec.get("names")
    points = spec.get("points", len(names) if isinstance(names, list) else None)
    if not isinstance(points, int) or isinstance(points, bool) or not 2 <= points <= MAX_POINTS:
        # One point has no box, and so no crop.
        raise ValueError(f"needs names (a list) or points (2..{MAX_POINTS}), found {points!r}")
    if names is None:
        return points, None
    if not isinstance(names, list) or len(names) != points:
        found = f"{len(names)} names" if isinstance(names, list) else repr(names)
        raise ValueError(f"names must be a list of {points} different names, found {found}")
    for i, name in enumerate(names):
        if not isinstance(name, (str, int)) or isinstance(name, bool) or not str(name).strip():
            raise ValueError(f"names: name {i} is {name!r}; put names in quotes")
        if "," in str(name):
            raise ValueError(f"names: {name!r} has a comma, which separates names: remove it, or "
                             f"write two names")
        if str(name).isdecimal() and int(name) != i:
            raise ValueError(f"names: {name!r} is the name of point {i}, but a number means the "
                             f"point of that number: use letters")
        if name in names[:i]:
            raise ValueError(f"names: {name!r} is there twice, for points {names.index(name)} and "
                             f"{i}; {points} different names are needed")
    return points, [str(name) for name in names]


def _read_flip(entries, points, index, names):
    """Read `flip` of a scheme file, pairs of points or the whole table, to a table (K,).

    Raises ValueError that names the first wrong entry.
    """
    if not isinstance(entries, list):
        raise ValueError(f"flip is a list of pairs, or none, found {entries!r}")
    if entries and len(entries) == points \
            and not any(isinstance(entry, (list, tuple)) for entry in entries):
        flip = numpy.array([index(entry) for entry in entries])
        wrong = numpy.flatnonzero(flip[flip] != numpy.arange(points))
        if len(wrong):
            raise ValueError(_flip_error(flip, int(wrong[0]), names))
        return flip
    flip, seen = numpy.arange(points), {}
    for pair in entries:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise ValueError(f"flip is a list of pairs, found {pair!r}")
        a, b = index(pair[0]), index(pair[1])
        earlier = next((seen[point] for point in (a, b) if point in seen), None)
        if a == b or earlier is not None:
            raise ValueError(f"flip pair {pair!r} names a point twice"
                             + (f", which is in {earlier!r} already" if earlier else
                                "; leave out points on the mid-line"))
        seen[a] = seen[b] = pair
        flip[a], flip[b] = b, a
    return flip


def _read_divisor(divisor, index):
    if divisor is None or isinstance(divisor, str) and divisor in BOX_DIVISORS:
        return BOX_DIVISORS[divisor or "box"]
    if not isinstance(divisor, (list, tuple)) or len(divisor) != 2:
        raise ValueError(f"divisor is two points, box or diagonal, found {divisor!r}")
    divisor = tuple(index(p) for p in divisor)
    if divisor[0] == divisor[1]:
        raise ValueError("divisor names the same point twice")
    return divisor


def _read_mean(face, points):
    if face is None:
        return numpy.full((points, 2), numpy.nan)
    try:
        mean = numpy.array(face, numpy.float64).reshape(points, 2)
    except (TypeError, ValueError):
        raise ValueError(f"mean_face must be {points} pairs of numbers") from None
    if not numpy.isfinite(mean).all():
        raise ValueError(f"mean_face must be {points} pairs of finite numbers")
    return mean


def wflw_to_300w(points: numpy.ndarray) -> numpy.ndarray:
    """Convert WFLW landmarks (..., 98, 2) to the 300W scheme (..., 68, 2).

    The jaw is every second point, the brows are the mean of their upper and lower edges, and the
    two lid points of 300W lie at thirds between the three of WFLW. The published map weighs .666
    and .333, whose sum of .999 pulls points towards the origin; this one weighs 2/3 and 1/3.
    """
    points = numpy.asarray(points, numpy.float64)
    out = numpy.empty((*points.shape[:-2], 68, 2))
    out[..., 0:17, :] = points[..., 0:33:2, :]
    brows = ((17, 33, None), (18, 34, 41), (19, 35, 40), (20, 36, 39), (21, 37, 38),
             (22, 42, 50), (23, 43, 49), (24, 44, 48), (25, 45, 47), (26, 46, None))
    for target, upper, lower in brows:
        out[..., target, :] = points[..., upper, :]
        if lower is not None:
            # Only y is averaged, because the points of the two edges do not have the same x.
            out[..., target, 1] = (points[..., upper, 1] + points[..., lower, 1]) / 2
    out[..., 27:36, :] = points[..., 51:60, :]
    for target, first in ((36, 60), (42, 68)):
        lid = (2 / 3, 1 / 3)
        for offset, (near, middle) in enumerate(((1, 2), (3, 2)), 1):
            out[..., target + offset, :] = (lid[0] * points[..., first + near, :]
                                            + lid[1] * points[..., first + middle, :])
        for offset, (near, middle) in enumerate(((5, 6), (7, 6)), 4):
            out[..., target + offset, :] = (lid[0] * points[..., first + near, :]
                                            + lid[1] * points[..., first + middle, :])
        out[..., target, :] = points[..., first, :]
        out[..., target + 3, :] = points[..., first + 4, :]
    out[..., 48:68, :] = points[..., 76:96, :]
    return out


# (from, to) scheme names to the function that converts landmarks.
MAPPINGS = {("WFLW", "300W"): wflw_to_300w}
