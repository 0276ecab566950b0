"""One way to read a photo from a file, and one to write a stored crop."""
import errno

import cv2
import numpy

JPEG_QUALITY = 95


def read_photo(path, upright=False):
    """An image file as RGB uint8 (H, W, 3), whatever its depth and channels; None if it is none.

    upright: whether the EXIF orientation is obeyed, as a person sees the photo; annotators of the
    published sets ignored it.
    """
    flags = cv2.IMREAD_COLOR | (0 if upright else cv2.IMREAD_IGNORE_ORIENTATION)
    try:
        # cv2.imread takes longer, fails on some paths and prints its complaints.
        content = numpy.fromfile(path, numpy.uint8)
        image = None if _is_cut_off(content.tobytes()) else cv2.imdecode(content, flags)
    except (OSError, cv2.error):
        return None
    return None if image is None else cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def why_unread(path):
    """Why read_photo gave None for the path (pathlib.Path), in one line."""
    try:
        content = path.read_bytes()
    except OSError:
        return "the image cannot be read"
    if not content:
        return "the image file is empty"
    if content[4:8] == b"ftyp":
        return ("the image cannot be read: HEIC and AVIF have no reader here; convert it to JPEG "
                "or PNG")
    if _is_cut_off(content):
        return "the image is a JPEG that was cut off"
    return "the image cannot be read"


def _is_cut_off(content):
    """Whether bytes are those of a JPEG without its end, the rest of which decodes to grey.

    The segments before the picture are skipped: the preview in the EXIF has an end of its own.
    """
    if content[:3] != b"\xff\xd8\xff":
        return False
    place = 2
    while content[place:place + 1] == b"\xff" and content[place + 1:place + 2] != b"\xda":
        if content[place + 1:place + 2] == b"\xff":
            place += 1  # A fill byte.
            continue
        place += 2 + int.from_bytes(content[place + 2:place + 4], "big")
    return b"\xff\xd9" not in content[place:]


def write_crop(path, image):
    """Write a stored crop, RGB uint8 (T, T, 3), as JPEG. Raises OSError."""
    if not cv2.imwrite(str(path), cv2.cvtColor(image, cv2.COLOR_RGB2BGR),
                       [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY]):
        raise OSError(errno.EIO, "is the disk full?", str(path))
