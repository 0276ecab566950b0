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
        image = cv2.imdecode(numpy.fromfile(path, numpy.uint8), flags)
    except (OSError, cv2.error):
        return None
    return None if image is None else cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def write_crop(path, image):
    """Write a stored crop, RGB uint8 (T, T, 3), as JPEG. Raises OSError."""
    if not cv2.imwrite(str(path), cv2.cvtColor(image, cv2.COLOR_RGB2BGR),
                       [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY]):
        raise OSError(errno.EIO, "is the disk full?", str(path))
