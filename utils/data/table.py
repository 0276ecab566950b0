"""What a set was made of, as a table, and what is odd about it.

done: [(face, layout, image name, box, published box)] of the faces that were cut. sources: what was
read, of generator.Source.
"""
import collections
import os
import pathlib

import numpy

from utils.detection.detector import overlap
from utils.errors import printable
from utils.landmarks import metrics
from utils.landmarks.schemes import SCHEMES

# Faces that are enlarged more than this are counted in the table.
ENLARGED = 4
# A mean face that is this far, as a share of its size, from its own mirror image has a wrong flip;
# that of fewer faces may just be turned.
LOPSIDED, LOPSIDED_FACES = 0.25, 8
SAME_FACE = 0.7  # Overlap above which two crops of a photo are of one face.


def notes(done, scheme):
    """Notes (path, reason) on faces that cannot be scored or are there twice, and on a flip that
    does not fit.
    """
    found = _twice(done) + _leaks(done)
    for face, *_, published in done:
        size = metrics.divisors(face.points[None], scheme.divisor, published[None])[0]
        if not size > 0:
            pair = "point {} and point {}".format(*scheme.divisor)
            found.append((face.photo, f"note: {pair}, whose distance divides NME, "
                          + ("are at one place" if size == 0 else "are not both labelled")
                          + ": the face is trained on and not scored"))
    # Drawn faces and those of publishers have flips that tests hold to their mean faces.
    if scheme.name in SCHEMES or not scheme.mirrors or len(done) < LOPSIDED_FACES:
        return found
    mirrored = scheme.mean_face[scheme.flip] * (-1, 1)
    shift = scheme.mean_face - mirrored
    shift[:, 0] -= numpy.median(shift[:, 0])
    away = numpy.linalg.norm(shift, axis=1) / numpy.ptp(scheme.mean_face, 0).max()
    worst = int(away.argmax())
    if away[worst] > LOPSIDED:
        partner = int(scheme.flip[worst])
        which = (f"point {worst}, which is in no flip pair," if partner == worst else
                 f"point {worst}, the mirror partner of point {partner},")
        found.append((pathlib.Path(scheme.name), f"note: {which} lies {100 * away[worst]:.0f} % of "
                      f"the face from where the mirrored mean face has it: is the scheme's flip "
                      f"right? (flip: none where mirrored faces are none of it)"))
    return found


def _twice(done):
    """Notes on faces that lie on another one of the same photo and list."""
    photos = collections.defaultdict(list)
    for face, _, _, box, _ in done:
        photos[face.photo, face.group, face.lists].append(box)
    return [(photo, f"note: faces {one + 1} and {two + 1} of it lie on each other: labelled twice?")
            for (photo, *_), boxes in photos.items() if len(boxes) > 1
            for one, two in numpy.argwhere(numpy.triu(overlap(boxes, boxes) > SAME_FACE, 1))]


def _leaks(done):
    """A note where photos are in the training or validation list and in a test list."""
    lists = collections.defaultdict(set)
    for face, *_ in done:
        if face.image is None:
            lists[face.photo.resolve()].update(name.split("_")[0] for name in face.lists)
    both = [photo for photo, names in lists.items() if "test" in names and len(names) > 1]
    return [(both[0], f"note: this and {len(both) - 1} more photos are in the test list and in "
             f"another one: the test says nothing of new photos")] if both else []


def incomplete(sources, done):
    """{"layout subset": [prepared, published]} of what is not as many faces as were published."""
    prepared = collections.Counter(f"{layout} {face.subset}" for face, layout, *_ in done)
    published = {f"{source.layout} {subset}": count for source in sources
                 for subset, count in source.expected.items()}
    return {key: [prepared[key], count] for key, count in published.items()
            if prepared[key] != count}


def print_counts(sources, done, unusable, output):
    """Print, for each source and subset, what was found, expected, skipped and why."""
    usable = {id(face) for face, *_ in done}
    print(f"{'layout':<12}{'subset':<18}{'found':>9}{'expected':>9}{'skipped':>9}{'prepared':>9}")
    for source in sources:
        read = collections.Counter(face.subset for face in source.faces)
        prepared = collections.Counter(f.subset for f in source.faces if id(f) in usable)
        unread = collections.Counter(_subset(path, source, read) for path, reason
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
    print(f"{len(done)} faces in {output}")


def print_sizes(done, target_size):
    """Print of how many photos the faces are, how large they are and how many are enlarged."""
    sides = [face.side for face, *_ in done]
    enlarged = sum(target_size > ENLARGED * (box[2:] - box[:2]).max() for *_, box, _ in done)
    print(f"{len(done)} faces of {len({face.group for face, *_ in done})} photos, of "
          f"{min(sides):.0f} to {max(sides):.0f} px (median {numpy.median(sides):.0f}); "
          f"{enlarged} of them enlarged more than {ENLARGED} times")


def _subset(path, source, read):
    """The row of the table that an unread file belongs to, as far as its name tells."""
    place = os.path.relpath(path, source.folder)
    known = [*source.expected, *read]
    near = [s for s in known if place.startswith(s)] or [s for s in known if s in path.stem]
    # list_..._train_test/list_..._train.txt: the longest of them, then the last.
    return max(near, key=lambda s: (len(s), path.stem.rfind(s))) if near else "unreadable"
