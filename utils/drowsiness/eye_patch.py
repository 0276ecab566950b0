"""Open, looking down or shut: classify grey patches of both eyes, cut from the full image.

The eye aspect ratio of a lowered lid is that of a shut one, and a backbone's grid is too coarse to
show whether there is an iris below the lid. A patch of 48 x 32 pixels shows it. It needs landmarks
and the image only, so that one file serves every landmark model.
"""
from __future__ import annotations

import functools
import pathlib
from typing import TYPE_CHECKING

import cv2
import numpy

from utils.errors import UserError
from utils.files import refuse_lfs_pointer

if TYPE_CHECKING:
    from utils.landmarks.schemes import Scheme

WEIGHTS = pathlib.Path(__file__).resolve().parents[2] / "weights" / "eye_state.onnx"
STATES = ("open", "down", "shut")
# Width and height of a patch in pixels, and its width in widths of the eye. Its centre lies RAISE
# widths above the middle of the corners, because the lid above the eye tells more than the cheek.
SIZE, SPAN, RAISE = (48, 32), 1.8, 0.08
# Patches of larger eyes are reduced by averaging first, so that no pixel is skipped.
MAX_STEP = 1.5
# Added to the standard deviation of a patch, in grey levels: noise of a dark patch stays small.
LEAST_CONTRAST = 6.0


def cut_eyes(image: numpy.ndarray, points_px: numpy.ndarray, scheme: Scheme,
             size: tuple[int, int] = SIZE, span: float = SPAN, grey: bool = True) -> numpy.ndarray:
    """Cut both eyes of a face, upright and at the scale of the wider one.

    Args:
        image: RGB uint8 (H, W, 3).
        points_px: landmarks (K, 2) in pixels.
        scheme: of the landmarks, with eye contours.
        size: width and height of a patch in pixels.
        span: width of a patch in widths of the eye.
        grey: whether to return grey levels, (2, 32, 48), or colours, (2, 32, 48, 3).

    Returns:
        Patches, float32, of the right and of the left eye; the left one is mirrored, so that the
        outer corner is always on the left.
    """
    corners = points_px[[[contour[0], contour[len(contour) // 2]] for contour in scheme.eyes]]
    centres, sides = corners.mean(1), corners[:, 1] - corners[:, 0]
    width = max(float(numpy.sqrt((sides ** 2).sum(1).max())), 1.0)
    x, y = (float(v) for v in centres[1] - centres[0])
    length = (x * x + y * y) ** 0.5
    x, y = (x / length, y / length) if length > 1e-6 else (1.0, 0.0)
    step = span * width / size[0]
    centres = centres + RAISE * width * numpy.array([y, -x])
    return numpy.stack([_cut(image, *centre, step, (x * mirror, y * mirror, -y, x), size, grey)
                        for centre, mirror in zip(centres.tolist(), (1, -1))])


def _cut(image, centre_x, centre_y, step, axes, size, grey):
    """Cut a patch around a point.

    step: pixels of the image in a pixel of the patch. axes: direction of the patch's x and y axis.
    """
    half = step * (size[0] ** 2 + size[1] ** 2) ** 0.5 / 2 + 2
    left, top = max(int(centre_x - half), 0), max(int(centre_y - half), 0)
    region = image[top:int(centre_y + half) + 2, left:int(centre_x + half) + 2] \
        if centre_x + half > 0 and centre_y + half > 0 else image[:0]
    if not region.size:
        return numpy.zeros(size[::-1] if grey else (*size[::-1], 3), numpy.float32)
    region = numpy.ascontiguousarray(region)
    region = cv2.cvtColor(region, cv2.COLOR_RGB2GRAY) if grey else region
    x, y = centre_x - left, centre_y - top
    if step > MAX_STEP:
        factor = 1.2 / step
        region = cv2.resize(region, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)
        x, y, step = (x + 0.5) * factor - 0.5, (y + 0.5) * factor - 0.5, step * factor
    xx, xy, yx, yy = (step * axis for axis in axes)
    u, v = (size[0] - 1) / 2, (size[1] - 1) / 2
    matrix = numpy.array([[xx, yx, x - xx * u - yx * v], [xy, yy, y - xy * u - yy * v]])
    return cv2.warpAffine(region, matrix, size, flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
                          borderMode=cv2.BORDER_REPLICATE).astype(numpy.float32)


def standardise(patches: numpy.ndarray) -> numpy.ndarray:
    """Remove brightness and contrast of patches (..., 32, 48)."""
    centred = patches - patches.mean((-1, -2), keepdims=True)
    deviation = numpy.sqrt((centred ** 2).mean((-1, -2), keepdims=True))
    return (centred / (deviation + LEAST_CONTRAST)).astype(numpy.float32)


class EyePatchModel:
    """The network of nets/eye_patch.py in ONNX Runtime, on one thread of the CPU.

    Args:
        path: an .onnx that tools/fit_eye_state.py wrote.

    Raises:
        UserError: the file is missing, damaged or of another kind.
    """

    def __init__(self, path: pathlib.Path | str = WEIGHTS):
        if not pathlib.Path(path).is_file():
            raise UserError(f"{path}: no such file; it belongs to the repository and tells eyes "
                            f"that look down from shut ones")
        refuse_lfs_pointer(pathlib.Path(path))
        import onnxruntime  # Imported here because it is slow.
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        try:
            self._session = onnxruntime.InferenceSession(str(path), options,
                                                         providers=["CPUExecutionProvider"])
            logits = self(numpy.zeros((2, *SIZE[::-1]), numpy.float32))
            found = f"gives {logits.shape}"
        except Exception as error:
            # ONNX Runtime raises exception types that it does not export.
            logits, found = numpy.zeros(0), " ".join(str(error).split())[:120]
        if logits.shape != (2, len(STATES)):
            raise UserError(f"{path}: not the weights of the eye state ({found}); make them with "
                            f"python -m tools.fit_eye_state")

    def __call__(self, patches: numpy.ndarray) -> numpy.ndarray:
        """Return logits (N, 3) of STATES for patches (N, 32, 48) from cut_eyes."""
        return self._session.run(["logits"], {"patches": standardise(patches)})[0]


@functools.cache
def shipped() -> EyePatchModel:
    """Return the model in weights/, which is read once."""
    return EyePatchModel()
