"""Tables of counts and sizes of a prepared set, and notes on its faces.

utils.data.generator calls these functions with `cropped`, the faces whose crops are written, and
`sources`, what was read of each folder. A note is a (path, reason) pair whose reason begins with
"note:".
"""
from __future__ import annotations

import collections
import os
import pathlib

import numpy

from utils.data.cropping import CroppedFace
from utils.data.readers.face import MARKED, Source
from utils.data.readers.pts import OTHER_SUFFIX
from utils.detection.detector import iou
from utils.errors import printable
from utils.landmarks import metrics
from utils.landmarks.schemes import SCHEMES, Scheme

ENLARGED = 4  # Enlargement above which faces are counted in the table.
# A distance between the mean face and its mirror image, as a share of the face, above which the
# flip table is taken for wrong. The mean of fewer faces may just be a turned head.
MAX_ASYMMETRY, MIN_FACES = 0.25, 8
SAME_FACE = 0.7  # IoU above which two crops of a photo show one face.


def notes(cropped: list[CroppedFace], scheme: Scheme) -> list[tuple[pathlib.Path, str]]:
    """Return notes on faces that cannot be scored or occur twice, and on a wrong flip table."""
    found = _duplicates(cropped) + _leaks(cropped)
    for face, *_, published in cropped:
        size = metrics.divisors(face.points[None], scheme.divisor, published[None])[0]
        if not size > 0:
            pair = "point {} and point {}".format(*scheme.divisor)
            found.append((face.photo, f"note: {pair}, whose distance divides NME, "
                          + ("are at one place" if size == 0 else "are not both labelled")
                          + ": the face is trained on and not scored"))
    # Tests check the flip tables of the built-in schemes.
    if scheme.name in SCHEMES or not scheme.mirrors or len(cropped) < MIN_FACES:
        return found
    mirrored = scheme.mean_face[scheme.flip] * (-1, 1)
    shift = scheme.mean_face - mirrored
    shift[:, 0] -= numpy.median(shift[:, 0])
    asymmetry = numpy.linalg.norm(shift, axis=1) / numpy.ptp(scheme.mean_face, 0).max()
    worst = int(asymmetry.argmax())
    if asymmetry[worst] > MAX_ASYMMETRY:
        partner = int(scheme.flip[worst])
        point = (f"point {worst}, which is in no flip pair," if partner == worst else
                 f"point {worst}, the mirror partner of point {partner},")
        found.append((pathlib.Path(scheme.name), f"note: {point} lies {100 * asymmetry[worst]:.0f} "
                      f"% of the face from where the mirrored mean face has it: is the scheme's "
                      f"flip right? (flip: none, if the scheme does not fit mirrored faces)"))
    return found


def _duplicates(cropped: list[CroppedFace]) -> list[tuple[pathlib.Path, str]]:
    """Return notes on faces that overlap another face of the same photo and list."""
    photos = collections.defaultdict(list)
    for face, _, _, box, _ in cropped:
        photos[face.photo, face.group, face.lists].append(box)
    return [(photo, f"note: its faces {one + 1} and {two + 1} overlap: labelled twice?")
            for (photo, *_), boxes in photos.items() if len(boxes) > 1
            for one, two in numpy.argwhere(numpy.triu(iou(boxes, boxes) > SAME_FACE, 1))]


def _leaks(cropped: list[CroppedFace]) -> list[tuple[pathlib.Path, str]]:
    """Return a note if photos are in a test list and in the training or validation list."""
    lists = collections.defaultdict(set)
    for face, *_ in cropped:
        lists[face.photo.resolve()].update(name.split("_")[0] for name in face.lists)
    both = [photo for photo, names in lists.items() if "test" in names and len(names) > 1]
    return [(both[0], f"note: this and {len(both) - 1} more photos are in the test list and in "
             f"another one: the test scores do not hold for new photos")] if both else []


def incomplete(sources: list[Source], cropped: list[CroppedFace]) -> dict[str, list[int]]:
    """Return {"layout subset": [prepared, published]} of subsets whose two counts differ."""
    prepared = collections.Counter(f"{layout} {face.subset}" for face, layout, *_ in cropped)
    published = {f"{source.layout} {subset}": count for source in sources
                 for subset, count in source.expected.items()}
    return {key: [prepared[key], count] for key, count in published.items()
            if prepared[key] != count}


def print_counts(sources: list[Source], cropped: list[CroppedFace],
                 unusable: list[tuple[pathlib.Path, str]], output: pathlib.Path) -> None:
    """Print the face counts of each source and subset, and the reasons for skipped faces.

    Args:
        sources: what was read of each folder.
        cropped: the faces whose crops are written.
        unusable: (path, reason) of the other faces.
        output: folder of the prepared set, which gets all reasons as problems.txt.
    """
    usable = {id(face) for face, *_ in cropped}
    print(f"{'layout':<12}{'subset':<18}{'found':>9}{'expected':>9}{'skipped':>9}{'prepared':>9}")
    for source in sources:
        read = collections.Counter(face.subset for face in source.faces)
        prepared = collections.Counter(f.subset for f in source.faces if id(f) in usable)
        unread = collections.Counter(_subset(path, reason, source, read) for path, reason
                                     in source.problems if not reason.startswith("note:"))
        for subset in dict.fromkeys([*source.expected, *read, *unread]):
            found = read[subset] + unread[subset]
            print(f"{source.layout:<12}{subset:<18}{found:>9}{source.expected.get(subset, '-'):>9}"
                  f"{found - prepared[subset]:>9}{prepared[subset]:>9}")
    problems = [problem for source in sources for problem in source.problems] + unusable
    for path, reason in problems[:20]:
        print(printable(f"  {path}: {reason}"))
    if len(problems) > 20:
        print(f"  … and {len(problems) - 20} more")
    if problems:
        text = "".join(f"{path}: {reason}\n" for path, reason in problems)
        (output / "problems.txt").write_text(text, encoding="utf-8", errors="replace")
        print(f"all {len(problems)} are listed in {output / 'problems.txt'}")
    print(f"{len(cropped)} faces in {output}")


def print_sizes(cropped: list[CroppedFace], target_size: int) -> None:
    """Print numbers of faces and photos, face sizes, and faces enlarged above ENLARGED."""
    sides = [face.side for face, *_ in cropped]
    enlarged = sum(target_size > ENLARGED * (box[2:] - box[:2]).max() for *_, box, _ in cropped)
    print(f"{len(cropped)} faces of {len({face.group for face, *_ in cropped})} photos, of "
          f"{min(sides):.0f} to {max(sides):.0f} px (median {numpy.median(sides):.0f}); "
          f"{enlarged} of them enlarged more than {ENLARGED} times")


def _subset(path: pathlib.Path, reason: str, source: Source, read: collections.Counter) -> str:
    """Return the table row of what was not read: by the reason, else guessed from the path."""
    for part, row in ((MARKED, "marked"), (OTHER_SUFFIX, "other suffix")):
        if part in reason:
            return row
    relative = os.path.relpath(path, source.folder)
    known = [*source.expected, *read]
    found = [s for s in known if relative.startswith(s)] or [s for s in known if s in path.stem]
    # Of several names in list_98pt_rect_attr_train_test/..._train.txt the longest, then the last.
    return max(found, key=lambda s: (len(s), path.stem.rfind(s))) if found else "unreadable"
