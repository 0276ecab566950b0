"""Match the names that people give to points with the names of a landmark scheme.

`L_eye`, `left-eye`, `LeftEye`, `leye` and `eye_left` are all the scheme's `left eye`, and `N` is
its `nose`. A name that may be two points is none.
"""
from __future__ import annotations

import re
from collections.abc import Callable, Sequence

_SIDES = {"l": "left", "lt": "left", "left": "left", "r": "right", "rt": "right", "right": "right"}
_WORDS = {"eyebrow": "brow", "centre": "center", "middle": "center", "mid": "center",
          "lips": "lip", "eyes": "eye"}
# Parts of a face that stand behind a side without a separator: leye, rightbrow.
_PARTS = ("eyebrow", "brow", "eye", "pupil", "mouth", "ear", "cheek", "nostril", "lip")
# Whole names, as in the lists of face detectors.
_SHORT = {"le": "left eye", "re": "right eye", "el": "left eye", "er": "right eye", "n": "nose",
          "lm": "left mouth", "rm": "right mouth", "ml": "left mouth", "mr": "right mouth",
          "lmc": "left mouth corner", "rmc": "right mouth corner"}
# Words without which a point is still the same one, where the scheme has no other like it.
_FILLERS = {"corner", "tip", "center", "point", "pt", "landmark", "of", "the"}


def plain(name: str) -> str:
    """Return a name in lower case without blanks, - and _."""
    return re.sub(r"[\s_-]+", "", str(name).lower())


def _words(name):
    """Return the sorted words of a name in their common form."""
    name = _SHORT.get(plain(name), str(name))
    # LEye is L Eye, leftEye is left Eye.
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", name)
    words = []
    for word in re.split(r"[\W_]+", name.lower()):
        joined = re.fullmatch(f"(left|right|l|r)({'|'.join(_PARTS)})", word)
        words += joined.groups() if joined else [word]
    return sorted(_SIDES.get(word) or _WORDS.get(word, word) for word in words if word)


def _loose_words(name):
    return [{"lip": "mouth"}.get(word, word) for word in _words(name) if word not in _FILLERS]


_LEVELS: tuple[Callable[[str], object], ...] = (
    str, plain, lambda name: " ".join(_words(name)), lambda name: " ".join(sorted(
        _loose_words(name))))


def match(names: Sequence[str], known: Sequence[str]) -> dict[str, int]:
    """Match names with known ones: exactly, then by ever looser keys.

    Args:
        names: of points, as a tool wrote them.
        known: the scheme's names.

    Returns:
        Name to index in `known`, of the names that match exactly one known name, which no other
        name matches as well.
    """
    found, taken = {}, set()
    for key in _LEVELS:
        here = {}
        for name in dict.fromkeys(map(str, names)):
            points = [i for i, other in enumerate(known) if i not in taken
                      and key(name) and key(other) == key(name)]
            if name not in found and len(points) == 1:
                here.setdefault(points[0], []).append(name)
        for point, alike in here.items():
            if len(alike) == 1:
                found[alike[0]] = point
                taken.add(point)
    return found


def numbers(names: Sequence[str]) -> list[int] | None:
    """Return the points 0..n-1 of names that end in numbers 0..n-1 or 1..n, such as p1, else None.

    All names must be equal apart from the number.
    """
    parts = [re.fullmatch(r"(.*?)(\d{1,9})", str(name)) for name in names]
    if not parts or not all(parts) or len({plain(part[1]) for part in parts}) > 1:
        return None
    found = [int(part[2]) for part in parts]
    first = min(found)
    return [number - first for number in found] if first in (0, 1) and sorted(found) == list(
        range(first, first + len(found))) else None
