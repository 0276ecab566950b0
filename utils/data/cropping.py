"""One face of a photo to its crop: what is kept, and the box in which its authors measure NME."""
import numpy

from utils.data import readers
from utils.data.photo import read_photo, why_unread, write_crop
from utils.errors import UserError
from utils.landmarks import crop as crops

# What the authors crop to before they measure NME: rule and factor; others as 300W.
PUBLISHED_CROPS = {"WFLW": ("box", 1.2), "COFW": ("box", 1.0), "AFLW": ("box", 1.0)}
# A point this far outside the photo, as a share of the face, is a mistake and no cut-off chin. Of
# published sets, whose counts are the benchmark, only what no person can have meant is one.
OUTSIDE, OUTSIDE_PUBLISHED = 0.15, 1.0
# A face whose points' box has a longer side of fewer pixels shows nothing.
SMALLEST = 8
KEPT = (f"kept: every face of a photo whose points' box is {SMALLEST} px or longer and reaches out "
        f"of the photo, where it is black, by at most {100 * OUTSIDE:.0f} % of that "
        f"({100 * OUTSIDE_PUBLISHED:.0f} % in published sets)")


def image_of(face, layout):
    """The photo of a face as RGB uint8 (H, W, 3), or None where it cannot be read."""
    if face.image is not None:
        return face.image
    module = readers.READERS.get(layout)
    if hasattr(module, "image_of"):
        return module.image_of(face)
    return read_photo(face.photo, face.upright)


def cut(job, settings):
    """Write the crop of one face; (box, published box) in photo pixels, or the reason why not.

    job: (face, layout, image name). settings: (folder of the images, size, crop rule, scale,
    margin), as DataGenerator has them.
    """
    face, layout, name = job
    folder, size, rule, scale, margin = settings
    try:
        image = image_of(face, layout)
    except UserError as error:
        return str(error)
    if image is None:
        return why_unread(face.photo)
    height, width = image.shape[:2]
    try:
        box = crops.face_box(face.points, rule, scale, face.box)
        published = _published_box(face, layout, width, height)
    except UserError as error:
        return str(error)
    if face.side < SMALLEST:
        return f"the face is of {face.side:.1f} px, less than {SMALLEST}"
    reach = face.side * (OUTSIDE_PUBLISHED if _is_published(layout) else OUTSIDE)
    outside = _outside(face.points, width, height, reach)
    if outside.any():
        point = int(numpy.flatnonzero(outside.any(1))[0])
        return (f"point {point} at {face.points[point, 0]:.0f}, {face.points[point, 1]:.0f} is far "
                f"outside the photo of {width} x {height}"
                + (_turned(face, image, reach) or "; to keep the face, leave out the points that "
                   "the photo does not show"))
    stored = crops.cut(image, crops.grow(box, margin), round(size * margin))
    write_crop(folder / f"{name}.jpg", stored)
    return box, published


def _outside(points, width, height, reach):
    return (points < -reach) | (points > numpy.array([width, height]) - 1 + reach)


def _turned(face, image, reach):
    """What to add for points that lie inside the photo as stored but not as a person sees it."""
    stored = read_photo(face.photo) if face.upright and face.image is None else None
    if stored is None or stored.shape == image.shape:
        return ""
    height, width = stored.shape[:2]
    if _outside(face.points, width, height, reach).any():
        return ""
    return (f" as a person sees it, and inside the {width} x {height} that are stored: if the "
            f"labels were made on stored pixels, give exif=\"ignore\" (--exif ignore)")


def _is_published(layout):
    return readers.READERS.get(layout) in readers.PUBLISHED


def _published_box(face, layout, width, height):
    """The crop (4,) in which the authors measure NME: of their sets what of it lies in the photo;
    for 300W they move its left and top edges into the photo without the others (their
    lib/preprocess.py). Of own sets the landmarks' box, grown.
    """
    rule, scale = PUBLISHED_CROPS.get(layout, crops.PUBLISHED_CROP.values())
    if rule == "box" and face.box is None:
        rule, scale = crops.PUBLISHED_CROP.values()
    box = crops.face_box(face.points, rule, scale, face.box)
    if not _is_published(layout):
        return box
    low = numpy.maximum(box[:2], 0)
    high = low + box[2:] - box[:2] if rule == "stretch" else box[2:]
    inside = numpy.concatenate([low, numpy.minimum(high, (width - 1, height - 1))])
    return inside if (inside[2:] - inside[:2] >= 1).all() else box
