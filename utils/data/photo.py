"""Read photos and write crops.

`read_photo` decodes any image file to RGB for all other modules, with OpenCV or Pillow, and
`why_unread` explains a failure. `write_crop` writes the JPEG files of prepared sets.
"""
from __future__ import annotations

import contextlib
import importlib
import io
import pathlib
import sys
from collections.abc import Iterable

import cv2
import numpy
import PIL.Image
import PIL.ImageOps

from utils.errors import UserError, printable

JPEG_QUALITY = 95
WRITABLE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".pgm", ".ppm"}
# Suffixes of photos, in lower case, for folders, landmark files beside photos and the demo. Files
# that a list names are read with any suffix. HEIC needs the package pillow-heif.
IMAGE_SUFFIXES = WRITABLE_SUFFIXES | {
    ".jfif", ".jpe", ".mpo", ".jp2", ".j2k", ".dib", ".pnm", ".pbm", ".gif", ".heic", ".heif",
    ".hif", ".avif"}
# How image files begin: JPEG, PNG, GIF, TIFF (also raw photos of cameras), JPEG 2000.
_BEGINNINGS = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"II*\0", b"MM\0*", b"\0\0\0\x0cjP  ")
_IMAGE_BRANDS = (b"heic", b"heix", b"mif1", b"avif", b"crx ")
_NO_IMAGES = {".pts", ".txt", ".json", ".xml", ".csv", ".tsv", ".yaml", ".yml", ".md", ".mat"}
_JPEG = b"\xff\xd8\xff"
# Exceptions of Pillow for damaged files.
_DAMAGE = (OSError, SyntaxError, ValueError, TypeError, IndexError, KeyError, OverflowError,
           EOFError, PIL.Image.DecompressionBombError)


def read_photo(path: str | pathlib.Path, upright: bool = False) -> numpy.ndarray | None:
    """Read an image file of any depth and number of channels.

    Transparent pixels become white, 10, 12 and 16 bits become 8, and the first picture of an
    animation is returned. HEIC needs the package pillow-heif.

    Args:
        path: the image file.
        upright: apply the EXIF orientation. The landmarks of published sets refer to the pixels as
            stored.

    Returns:
        RGB uint8 (H, W, 3), or None if the file cannot be read.
    """
    try:
        # cv2.imread is slower, fails on some paths and prints warnings.
        content = numpy.fromfile(path, numpy.uint8)
    except OSError:
        return None
    if content[:3].tobytes() == _JPEG:
        return None if _is_cut_off(content.tobytes()) else _decode(content, upright)
    decoders = [_decode, _decode_with_pillow]
    # OpenCV ignores transparency (hidden pixels may have any colour) and the EXIF of HEIC and AVIF.
    if _is_container(content) or _is_transparent(content):
        decoders.reverse()
    images = (decode(content, upright) for decode in decoders)
    return next((image for image in images if image is not None), None)


def _decode(content: numpy.ndarray, upright: bool) -> numpy.ndarray | None:
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH
    try:
        image = cv2.imdecode(content, flags if upright else flags | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error:
        return None
    if image is not None and image.dtype == numpy.uint16:
        # Infra-red cameras use 10 or 12 of the 16 bits.
        bits = next(bits for bits in (10, 12, 16) if image.max(initial=0) < 1 << bits)
        image = (image >> bits - 8).astype(numpy.uint8)
    if image is None or image.dtype != numpy.uint8:
        return None
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def _is_container(content: numpy.ndarray | bytes) -> bool:
    """Return True for HEIC or AVIF (and for videos with the same container format)."""
    return bytes(content[4:8]) == b"ftyp"


def _open(content: numpy.ndarray) -> PIL.Image.Image:
    if _is_container(content):
        with contextlib.suppress(ImportError):
            importlib.import_module("pillow_heif").register_heif_opener()
    return PIL.Image.open(io.BytesIO(content.tobytes()))


def _is_transparent(content: numpy.ndarray) -> bool:
    try:
        with _open(content) as image:
            return image.has_transparency_data
    except _DAMAGE:
        return False


def _decode_with_pillow(content: numpy.ndarray, upright: bool) -> numpy.ndarray | None:
    try:
        with _open(content) as image:
            image.load()
            if upright:
                image = PIL.ImageOps.exif_transpose(image)
            # Pillow clips these depths to 8 bits instead of scaling them.
            if image.mode[0] in "IF":
                return None
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image)
            return numpy.array(image.convert("RGB"))
    except _DAMAGE:
        return None


def why_unread(path: pathlib.Path) -> str:
    """Return the reason, in one line, why read_photo returned None for a file."""
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


def _is_cut_off(content: bytes) -> bool:
    """Return True for a JPEG without an end marker, whose missing part would decode to grey."""
    if content[:3] != _JPEG:
        return False
    # The segments before the picture are skipped: a preview in the EXIF has its own end marker.
    position = 2
    while (content[position:position + 1] == b"\xff"
           and content[position + 1:position + 2] != b"\xda"):
        if content[position + 1:position + 2] == b"\xff":
            position += 1  # A fill byte.
            continue
        position += 2 + int.from_bytes(content[position + 2:position + 4], "big")
    return b"\xff\xd9" not in content[position:]


def read_image(path: pathlib.Path | str) -> numpy.ndarray:
    """Read an image file upright, as RGB uint8 (H, W, 3).

    Raises:
        UserError: where it cannot be read.
    """
    image = read_photo(path, upright=True)
    if image is None:
        raise UserError(f"{path}: {why_unread(path)}")
    return image


def is_left_out(path: pathlib.Path) -> bool:
    """Return True for a file that begins like an image and whose suffix is not that of a photo."""
    suffix = path.suffix.lower()
    if suffix in IMAGE_SUFFIXES or suffix in _NO_IMAGES or path.name.startswith("."):
        return False
    try:
        with open(path, "rb") as file:
            content = file.read(16)
    except OSError:
        return False
    return (content.startswith(_BEGINNINGS) or content[8:12] == b"WEBP"
            or content[:2] == b"BM" and content[6:10] == bytes(4)
            or _is_container(content) and content[8:12] in _IMAGE_BRANDS)


def warn_left_out(folder: pathlib.Path, paths: Iterable[pathlib.Path]) -> None:
    """Print a note on stderr if files are left out because of their suffix (see is_left_out)."""
    found = [path.name for path in paths if is_left_out(path)]
    if found:
        print(printable(f"note: {folder}: {len(found)} images are left out because of their suffix "
                        f"({found[0]}); rename or convert them to .jpg or .png"), file=sys.stderr)


def write_crop(path: pathlib.Path, image: numpy.ndarray) -> None:
    """Write a crop, RGB uint8 (T, T, 3), as JPEG. Raises OSError."""
    _, content = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR),
                              [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    # OpenCV's own writer ends the process if the file name is not valid UTF-8.
    with open(path, "wb") as file:
        file.write(content)
