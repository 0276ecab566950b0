"""Landmark schemes: flip tables, mean faces, neighbours, NME divisors, 98 to 68 points, eyes."""
import dataclasses
import difflib

import numpy
import yaml

from utils.args import UniqueLoader
from utils.errors import UserError
from utils.landmarks.mean_faces import MEAN_FACES

# No scheme comes near; a larger number is a typing mistake that would fill the memory.
MOST_POINTS = 10000


def _span(*parts):
    """0-based indices from inclusive 1-based runs: _span((3, 1), 7) is [2, 1, 0, 6]."""
    indices = []
    for part in parts:
        first, last = part if isinstance(part, tuple) else (part, part)
        step = 1 if last >= first else -1
        indices += [i - 1 for i in range(first, last + step, step)]
    return indices


def _range(first, last):
    return list(range(first, last + 1))


# flip[i] is the point of the mirrored face that lies where point i was. Facts of the schemes,
# checked by tests: each is its own inverse and mirrors its mean face onto itself.
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
# Regions are for drawing; each `eye` is a contour that starts at one corner and goes round.
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
# What NME may be divided by beside the distance of two points: the root of the face box's area, or
# the box's diagonal.
BOX_DIVISORS = {"box": None, "diagonal": "diagonal"}
# Parts of any scheme by name: the regions that they are made of.
PARTS = {"eyes": ("right eye", "left eye"), "mouth": ("lips", "inner lips"),
         "brows": ("right brow", "left brow"), "contour": ("jaw",)}


@dataclasses.dataclass(frozen=True, eq=False)
class Scheme:
    """What a set of K landmarks means.

    flip (K,): flip[i] is the partner of point i in a mirrored face. mean_face (K, 2): crop units.
    divisor: the two points whose distance divides NME, None for the size of the face box, the root
    of its area, or "diagonal" for its diagonal. regions: name to point indices, for drawing. base:
    the scheme this one is a subset of, with `indices` its points there; None for a whole scheme.
    mirrors: whether a mirrored face is one of the scheme; flip is the identity where it is not.
    names: of the K points as a scheme file has them, for readers of annotations; `state` leaves
    them out.
    """
    name: str
    flip: numpy.ndarray
    mean_face: numpy.ndarray
    divisor: tuple | None
    regions: dict
    base: str | None = None
    indices: tuple | None = None
    mirrors: bool = True
    names: tuple | None = None

    @property
    def points(self):
        """K, the number of landmarks."""
        return len(self.flip)

    @property
    def eyes(self):
        """Contours of (right, left) eye as index lists that start at a corner, or None."""
        right, left = self.regions.get("right eye"), self.regions.get("left eye")
        closed = right and left and len(right) % 2 == 0 and len(left) % 2 == 0
        return (right, left) if closed and len(right) >= 4 else None

    def subset(self, indices, name=None):
        """The scheme of some of this scheme's points, in the order given.

        Raises UserError for an index out of range or given twice, or where a point's mirror partner
        is not among the points.
        """
        indices = [int(i) for i in indices]
        bad = [i for i in indices if not 0 <= i < self.points]
        if bad:
            raise UserError(f"scheme {self.name} has points 0..{self.points - 1}, not {bad[0]}")
        if len(set(indices)) != len(indices) or not indices:
            raise UserError(f"a subset of {self.name} needs different points, found {indices}")
        place = {point: i for i, point in enumerate(indices)}
        missing = [(i, int(self.flip[i])) for i in indices if int(self.flip[i]) not in place]
        if missing:
            raise UserError(f"subset of {self.name}: point {missing[0][0]} is there, its mirror "
                            f"partner {missing[0][1]} is not; add it")
        divisor = self.divisor
        if isinstance(divisor, tuple):
            divisor = tuple(place[i] for i in divisor) if all(i in place for i in divisor) else None
        regions = {}
        for region, points in self.regions.items():
            kept = [place[i] for i in points if i in place]
            if kept:
                regions[region] = kept
        return Scheme(name or f"{self.name}[{','.join(map(str, indices))}]",
                      numpy.array([place[int(self.flip[i])] for i in indices]),
                      self.mean_face[indices], divisor, regions, self.name, tuple(indices),
                      self.mirrors, self.names and tuple(self.names[i] for i in indices))

    def part(self, name):
        """The scheme of one of PARTS. Raises UserError where this scheme has no such region."""
        missing = [region for region in PARTS[name] if region not in self.regions]
        if missing:
            raise UserError(f"scheme {self.name} has no region {missing[0]!r}, of which {name} is "
                            f"made; give the points, such as 36-47")
        return self.subset(sum((self.regions[region] for region in PARTS[name]), []), name)

    def with_mean_face(self, mean_face):
        """This scheme with another mean face, (K, 2)."""
        mean_face = numpy.asarray(mean_face, numpy.float64).reshape(-1, 2)
        if len(mean_face) != self.points:
            raise UserError(f"mean face has {len(mean_face)} points, scheme {self.name} has "
                            f"{self.points}")
        return dataclasses.replace(self, mean_face=mean_face)

    def state(self):
        """Plain numbers and strings, for checkpoints, set.yaml and ONNX metadata."""
        divisor = self.divisor
        return {"name": self.name, "flip": [int(i) for i in self.flip],
                "mean_face": [[float(x), float(y)] for x, y in self.mean_face],
                "divisor": list(divisor) if isinstance(divisor, tuple) else divisor,
                "regions": {k: [int(i) for i in v] for k, v in self.regions.items()},
                "base": self.base,
                "indices": None if self.indices is None else [int(i) for i in self.indices],
                **({} if self.mirrors else {"mirrors": False})}

    @classmethod
    def from_state(cls, state):
        """The inverse of `state`. Raises UserError where a field is missing or of a wrong shape."""
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
            raise UserError(f"scheme {scheme.name}: the flip table is no permutation of "
                            f"0..{points - 1}")
        back = numpy.flatnonzero(scheme.flip[scheme.flip] != numpy.arange(points))
        if len(back):
            raise UserError(f"scheme {scheme.name}: {_one_way(scheme.flip, back[0])}")
        return scheme


def _one_way(flip, point, names=None):
    """What is wrong with a flip table at a point that two mirrors do not bring back."""
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


def get_scheme(name, base=None):
    """The scheme called `name`.

    name: one of SCHEMES, one of PARTS of `base` (a Scheme, default 300W), a YAML file of a custom
    scheme, or the points of a subset of `base` as a list or a string such as "36-41,42-47".
    Raises UserError.
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


def model_scheme(name, set_scheme):
    """The scheme `name` (args.scheme) of a model trained on a set: the set's own or a part of it.

    It keeps the set's mean face. Raises UserError.
    """
    if name in ("auto", set_scheme.name):
        return set_scheme
    asked = get_scheme(name, set_scheme)
    if asked.base is None and asked.name == set_scheme.name and asked.points == set_scheme.points:
        return set_scheme
    if asked.base == set_scheme.name and max(asked.indices) < set_scheme.points:
        return set_scheme.subset(asked.indices, asked.name)
    mapped = ", ".join(f"{a} to {b}" for a, b in MAPPINGS)
    raise UserError(f"scheme {asked.name} is neither the set's ({set_scheme.name}) nor a part of "
                    f"it; a set can be prepared as another scheme where there is a map ({mapped})")


def fits(scheme, whole):
    """Whether scheme is the scheme `whole` or some of its points."""
    if scheme.base is None:
        return scheme.name == whole.name and scheme.points == whole.points
    return scheme.base == whole.name and max(scheme.indices) < whole.points


def fit_scheme(scheme, set_scheme, what):
    """Check that a model of `scheme` can be trained or scored on a set; raises UserError."""
    if not fits(scheme, set_scheme):
        whole = "" if scheme.base is None else f" of {scheme.base}'s"
        raise UserError(f"{what}: the model has the {scheme.name} scheme ({scheme.points}{whole} "
                        f"points), the set {set_scheme.name} ({set_scheme.points} points)")


def parse_indices(text):
    """"36-41, 45" to [36, ..., 41, 45]. Raises UserError."""
    indices = []
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        try:
            first, last = int(first), int(last or first)
        except ValueError:
            raise UserError(f"points are written as 36-47 or 0,2,5-9, not {text!r}") from None
        if last >= MOST_POINTS:
            raise UserError(f"points above {MOST_POINTS - 1} are in no scheme, found {text!r}")
        indices += range(first, last + 1)
    return indices


def read_scheme(path):
    """A custom scheme from a YAML file.

    Keys: `points` (K) or `names` (K strings), `flip` (pairs of mirror partners, or a table of K
    points; points in no pair lie on the mid-line; `none`, or no such key: a mirrored face is none
    of the scheme, as with a point that only one side has), `divisor` (two points, `diagonal` or
    `box`, which is the default: see Scheme), optional `regions` (name to points) and `mean_face` (K
    pairs; else it comes from the data). A point is its name or its 0-based number. Raises
    UserError.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            spec = yaml.load(file, UniqueLoader)
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
            raise ValueError(f"name: {spec['name']} is a scheme that is built in; give another one")
        place = {name: i for i, name in enumerate(names or [])}

        def index(point):
            if str(point) in place:
                return place[str(point)]
            if isinstance(point, int) and not isinstance(point, bool) and 0 <= point < points:
                return point
            near = difflib.get_close_matches(str(point), place, 1)
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
    """K and the names, or None, of a scheme file's content. Raises ValueError."""
    names = spec.get("names")
    points = spec.get("points", len(names) if isinstance(names, list) else None)
    if not isinstance(points, int) or isinstance(points, bool) or not 2 <= points <= MOST_POINTS:
        # No crop can be laid round a point alone.
        raise ValueError(f"needs names (a list) or points (2..{MOST_POINTS}), found {points!r}")
    if names is None:
        return points, None
    if not isinstance(names, list) or len(names) != points:
        found = f"{len(names)} names" if isinstance(names, list) else repr(names)
        raise ValueError(f"names must be a list of {points} different names, found {found}")
    for i, name in enumerate(names):
        if not isinstance(name, (str, int)) or isinstance(name, bool) or not str(name).strip():
            raise ValueError(f"names: name {i} is {name!r}; put a name into quotes")
        if "," in str(name):
            raise ValueError(f"names: {name!r} has a comma in it, which parts names: write it "
                             f"without, or as two names")
        if str(name).isdecimal() and int(name) != i:
            raise ValueError(f"names: {name!r} is the name of point {i}, and a number means the "
                             f"point of that number: give it letters")
        if name in names[:i]:
            raise ValueError(f"names: {name!r} is there twice, of points {names.index(name)} and "
                             f"{i}; {points} different names are needed")
    return points, [str(name) for name in names]


def _read_flip(entries, points, index, names):
    """The flip table (K,) of a scheme file's entries. Raises ValueError naming the wrong one."""
    if not isinstance(entries, list):
        raise ValueError(f"flip is a list of pairs, or none, found {entries!r}")
    if entries and len(entries) == points \
            and not any(isinstance(entry, (list, tuple)) for entry in entries):
        flip = numpy.array([index(entry) for entry in entries])
        back = numpy.flatnonzero(flip[flip] != numpy.arange(points))
        if len(back):
            raise ValueError(_one_way(flip, int(back[0]), names))
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
                                "; a point on the mid-line is in no pair"))
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


def wflw_to_300w(points):
    """WFLW (..., 98, 2) to the 300W scheme (..., 68, 2).

    Every second jaw point; brows from the mean of upper and lower edge; the two eyelid points of
    300W at thirds between the three of WFLW. The published map weighs .666 and .333, whose sum of
    .999 pulls points towards the origin; thirds are the correction.
    """
    points = numpy.asarray(points, numpy.float64)
    out = numpy.empty((*points.shape[:-2], 68, 2))
    out[..., 0:17, :] = points[..., 0:33:2, :]
    brows = ((17, 33, None), (18, 34, 41), (19, 35, 40), (20, 36, 39), (21, 37, 38),
             (22, 42, 50), (23, 43, 49), (24, 44, 48), (25, 45, 47), (26, 46, None))
    for target, upper, lower in brows:
        out[..., target, :] = points[..., upper, :]
        if lower is not None:
            # Only y is averaged: the two edges' points are not above one another.
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


# (from, to) schemes to the function that maps landmarks; readers and error messages use it.
MAPPINGS = {("WFLW", "300W"): wflw_to_300w}
