"""One way to read a photo from a file, and one to write a stored crop."""
import importlib
import io

import cv2
import numpy
import PIL.Image
import PIL.ImageOps

JPEG_QUALITY = 95
WRITABLE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".pgm", ".ppm"}
# HEIC is read where pillow-heif is installed.
IMAGE_SUFFIXES = WRITABLE_SUFFIXES | {".gif", ".heic", ".heif", ".avif"}
_JPEG = b"\xff\xd8\xff"
# What the readers of Pillow raise over files that are not what they should be.
_DAMAGE = (OSError, SyntaxError, ValueError, TypeError, IndexError, KeyError, OverflowError,
           EOFError, PIL.Image.DecompressionBombError)


def read_photo(path, upright=False):
    """An image file as RGB uint8 (H, W, 3), whatever its depth and channels; None if it is none.

    upright: whether the EXIF orientation is obeyed, as a person sees the photo; annotators of the
    published sets ignored it. What is transparent is white, 10, 12 or 16 bits become 8, and of an
    animation it is the first picture. HEIC is read where pillow-heif is installed.
    """
    try:
        # cv2.imread takes longer, fails on some paths and prints its complaints.
        content = numpy.fromfile(path, numpy.uint8)
    except OSError:
        return None
    if content[:3].tobytes() == _JPEG:
        return None if _is_cut_off(content.tobytes()) else _decode(content, upright)
    ways = [_decode, _decode_with_pillow]
    # OpenCV drops transparency, under which any colour may lie, and the EXIF of HEIC and AVIF.
    if _is_container(content) or _is_transparent(content):
        ways.reverse()
    return next((image for image in (way(content, upright) for way in ways) if image is not None),
                None)


def _decode(content, upright):
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH
    try:
        image = cv2.imdecode(content, flags if upright else flags | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error:
        return None
    if image is not None and image.dtype == numpy.uint16:
        # Infra-red cameras fill 10 or 12 of the bits.
        bits = next(bits for bits in (10, 12, 16) if image.max(initial=0) < 1 << bits)
        image = (image >> bits - 8).astype(numpy.uint8)
    if image is None or image.dtype != numpy.uint8:
        return None
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def _is_container(content):
    """Whether bytes are those of HEIC or AVIF (or of a video of that kind)."""
    return bytes(content[4:8]) == b"ftyp"


def _open(content):
    if _is_container(content):
        try:
            importlib.import_module("pillow_heif").register_heif_opener()
        except ImportError:
            pass
    return PIL.Image.open(io.BytesIO(content.tobytes()))


def _is_transparent(content):
    try:
        with _open(content) as image:
            return image.has_transparency_data
    except _DAMAGE:
        return False


def _decode_with_pillow(content, upright):
    try:
        with _open(content) as image:
            image.load()
            if upright:
                image = PIL.ImageOps.exif_transpose(image)
            # Depths that Pillow cuts off and does not scale.
            if image.mode[0] in "IF":
                return None
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image)
            return numpy.array(image.convert("RGB"))
    except _DAMAGE:
        return None


def why_unread(path):
    """Why read_photo gave None for the path (pathlib.Path), in one line."""
    try:
        content = path.read_bytes()
    except OSError:
        return "the image cannot be read"
    if not content:
        return "the image file is empty"
    if _is_container(content):
        kind, package = (("AVIF", "pillow") if content[8:11] == b"avi" else
                         ("HEIC", "pillow-heif"))
        return (f"the image cannot be read: {kind} needs a reader; pip install -U {package}, or "
                f"convert it to JPEG or PNG (where it is installed, the file is damaged)")
    if _is_cut_off(content):
        return "the image is a JPEG that was cut off"
    return ("the image cannot be read: it is damaged, cut off, not an image or one of floating "
            "point numbers")


def _is_cut_off(content):
    """Whether bytes are those of a JPEG without its end, the rest of which decodes to grey.

    The segments before the picture are skipped: the preview in the EXIF has an end of its own.
    """
    if content[:3] != _JPEG:
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
    _, content = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR),
                              [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    # Not by OpenCV, which ends the process over names that are no UTF-8.
    with open(path, "wb") as file:
        file.write(content)
