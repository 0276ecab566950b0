"""What a training face goes through: drawn as a record of numbers, and carried out by OpenCV.

utils/data/batched.py carries records out for a whole batch on any device.
"""
import dataclasses
import math

import cv2
import numpy

from utils.data import shutting
from utils.landmarks import eyelids

SHUT_WHOLLY = 0.7  # Share of the faces that are shut; the others are on the way.


@dataclasses.dataclass
class Patch:
    """A covered part of a face: pixels from (y, x) on, height x width of them, under a `colour`
    (3,), under uniform noise of a `seed`, or under the piece of the same face that begins at
    `source` (y, x).
    """
    y: int
    x: int
    height: int
    width: int
    colour: numpy.ndarray | None = None
    seed: int | None = None
    source: tuple | None = None


@dataclasses.dataclass
class Record:
    """What happens to a stored crop, in this order; None where nothing of the kind does.

    matrix (2, 3): from its pixels to those of the image, as cv2.warpAffine takes it. landmarks
    (K, 2) float32: in crop units of the image, when all is done. shut: (landmarks (K, 2) in pixels
    before, share of the way) for shutting.shut. grey (3,): weights of the channels in all three.
    tone (256, 3) uint8: a table a channel. keep: share of the colour, the rest being grey.
    Of one kind: blur: of a Gaussian, its standard deviation in pixels. motion: (kernel, (x, y) of
    its anchor). low: side in pixels to which it is reduced and back. noise: (seed, standard
    deviation). Then patch: a Patch.
    """
    matrix: numpy.ndarray
    landmarks: numpy.ndarray
    shut: tuple | None = None
    grey: numpy.ndarray | None = None
    tone: numpy.ndarray | None = None
    keep: float | None = None
    blur: float | None = None
    motion: tuple | None = None
    low: int | None = None
    noise: tuple | None = None
    patch: Patch | None = None


class Augment:
    """Random geometry and look of a training face; see the Augmentation group of args.yaml.

    Everything it does follows from a face's random generator alone, so a sample is the same on any
    worker, rank and after a resume.
    """

    def __init__(self, args, flip, scheme=None):
        """args: resolved args. flip (K,): the scheme's flip table, None where a mirrored face is
        none of it. scheme: whose eyes args.shut may shut; None where it has none.
        """
        self.args, self.flip, self.scheme = args, flip, scheme

    def __call__(self, stored, landmarks, margin, size, rng):
        """A stored crop to a training sample.

        stored (T, T, 3) uint8, the nominal crop grown by margin; landmarks (K, 2) in crop units.
        Returns (size, size, 3) uint8 and (K, 2) float32 in crop units of the new image.
        """
        record = self.draw(landmarks, margin, stored.shape[0], size, rng)
        return carry_out(record, stored, size, self.scheme), record.landmarks

    def draw(self, landmarks, margin, stored_size, size, rng):
        """The Record of a face whose stored crop has a side of `stored_size` pixels."""
        args = self.args
        mirror = rng.random() < args.flip and self.flip is not None
        angle = math.radians(args.rotation * rng.uniform(-1, 1)) if rng.random() < 0.6 else 0.0
        zoom = math.exp(args.scaling * _clipped_normal(rng))
        stretch = math.exp(args.aspect * _clipped_normal(rng) / 2)
        shift = args.shift * rng.uniform(-1, 1, 2)
        cos, sin = zoom * math.cos(angle), zoom * math.sin(angle)
        # Crop units about the centre: mirror, then aspect, rotation and size, then shift.
        across = stretch * (-1 if mirror else 1)
        linear = numpy.array([[cos * across, -sin / stretch], [sin * across, cos / stretch]])
        landmarks = (landmarks - 0.5) @ linear.T + (0.5 + shift)
        if mirror:
            landmarks = landmarks[self.flip]
        record = Record(pixel_matrix(linear, shift, margin, stored_size, size), landmarks)
        if args.shut and self.scheme is not None and rng.random() < args.shut:
            # A droop is to be seen as one.
            share = 1.0 if rng.random() < SHUT_WHOLLY else rng.random()
            record.shut = landmarks * size - 0.5, share
            landmarks = (eyelids.close(record.shut[0], self.scheme, share) + 0.5) / size
        record.landmarks = landmarks.astype(numpy.float32)
        self._draw_look(record, size, rng)
        return record

    def _draw_look(self, record, size, rng):
        args = self.args
        if rng.random() < args.grey:
            weights = rng.dirichlet((3, 6, 2)) if rng.random() < 0.5 else (0.299, 0.587, 0.114)
            record.grey = numpy.float32(weights)
        if rng.random() < args.colour:
            _draw_tone(record, rng)
        if rng.random() < args.blur:
            _draw_loss(record, size, rng)
        if rng.random() < args.occlusion:
            record.patch = _draw_patch(args.occlusion_size, size, rng)


def plain(stored, margin, size):
    """The nominal crop (size, size, 3) of a stored crop (T, T, 3), as tests and ONNX see it."""
    if margin == 1 and stored.shape[0] == size:
        return stored
    matrix = pixel_matrix(numpy.eye(2), numpy.zeros(2), margin, stored.shape[0], size)
    return cv2.warpAffine(stored, matrix, (size, size), flags=cv2.INTER_LINEAR)


def pixel_matrix(linear, shift, margin, stored_size, size):
    """The 2 x 3 matrix for warpAffine of the map of crop units u' = linear (u - 1/2) + 1/2 + shift.

    Crop unit u is at pixel ((u - 1/2) / margin + 1/2) * stored_size - 1/2 of the stored image and
    at u * size - 1/2 of the result.
    """
    scale = size * margin / stored_size
    matrix = numpy.empty((2, 3))
    matrix[:, :2] = linear * scale
    matrix[:, 2] = (0.5 + shift) * size - 0.5 - matrix[:, :2].sum(1) * (stored_size / 2 - 0.5)
    return matrix


def _clipped_normal(rng):
    return min(max(rng.standard_normal(), -2.5), 2.5)


def _draw_tone(record, rng):
    """Another exposure, contrast, gamma and white balance, as one look-up table a channel."""
    ramp = numpy.linspace(0, 1, 256)
    curve = ramp ** math.exp(0.35 * rng.standard_normal())
    curve = (curve - 0.5) * math.exp(0.25 * rng.standard_normal()) + 0.5
    curve = curve + 0.12 * rng.standard_normal()
    balance = numpy.exp(0.1 * rng.standard_normal(3))
    record.tone = numpy.clip(curve[:, None] * balance * 255, 0, 255).astype(numpy.uint8)
    if rng.random() < 0.3:
        record.keep = rng.uniform(0.2, 1.6)


def _draw_loss(record, size, rng):
    """Blur, motion blur, low resolution or sensor noise."""
    kind = rng.integers(4)
    if kind == 0:
        record.blur = size / 256 * rng.uniform(0.5, 3)
    elif kind == 1:
        length = max(3, int(size / 256 * rng.integers(5, 16)) | 1)
        record.motion = _motion(length, rng.uniform(0, math.pi))
    elif kind == 2:
        record.low = max(8, int(size * rng.uniform(0.2, 0.6)))
    else:
        record.noise = int(rng.integers(2**31)), rng.uniform(2, 18)


def _motion(length, direction):
    """(kernel, (x, y) of its anchor) of a line of so many pixels, without its empty rim."""
    kernel = numpy.zeros((length, length), numpy.float32)
    reach = (length // 2) * numpy.array([math.cos(direction), math.sin(direction)])
    centre = length // 2
    a = tuple(int(round(v)) for v in centre - reach)
    b = tuple(int(round(v)) for v in centre + reach)
    cv2.line(kernel, a, b, 1.0)
    # Without the rim the kernel stays below the size at which OpenCV turns to a Fourier transform,
    # which takes forty times as long.
    x, y, width, height = cv2.boundingRect((kernel > 0).view(numpy.uint8))
    return kernel[y:y + height, x:x + width] / kernel.sum(), (centre - x, centre - y)


def _draw_patch(largest, size, rng):
    """A patch of a colour, noise or a piece of the image itself."""
    height, width = (max(2, int(size * v)) for v in rng.uniform(0.08, max(largest, 0.081), 2))
    y, x = int(rng.integers(0, size - height + 1)), int(rng.integers(0, size - width + 1))
    patch, kind = Patch(y, x, height, width), rng.integers(3)
    if kind == 0:
        patch.colour = rng.integers(0, 256, 3)
    elif kind == 1:
        patch.seed = int(rng.integers(2**31))
    else:
        patch.source = (int(rng.integers(0, size - height + 1)),
                        int(rng.integers(0, size - width + 1)))
    return patch


def carry_out(record, stored, size, scheme=None):
    """The image (size, size, 3) uint8 that a Record makes of its stored crop (T, T, 3) uint8.

    scheme: whose eyes may be shut.
    """
    image = cv2.warpAffine(stored, record.matrix, (size, size), flags=cv2.INTER_LINEAR)
    if record.shut is not None:
        image, _ = shutting.shut(image, record.shut[0], scheme, record.shut[1])
    if record.grey is not None:
        image = cv2.transform(image, numpy.tile(record.grey, (3, 1)))
    if record.tone is not None:
        image = cv2.LUT(image, record.tone[None])
    if record.keep is not None:
        # Mixing towards or away from grey changes saturation without leaving uint8.
        image = cv2.transform(image, mixing(record.keep))
    if record.blur is not None:
        image = cv2.GaussianBlur(image, (0, 0), record.blur)
    if record.motion is not None:
        kernel, anchor = record.motion
        image = cv2.filter2D(image, -1, kernel, anchor=anchor)
    if record.low is not None:
        low = cv2.resize(image, (record.low,) * 2, interpolation=cv2.INTER_AREA)
        image = cv2.resize(low, (size, size), interpolation=cv2.INTER_LINEAR)
    if record.noise is not None:
        image = _add_noise(image, *record.noise)
    if record.patch is not None:
        _cover(image, record.patch)
    return image


def mixing(keep):
    """The (3, 3) float32 matrix that keeps a share of the colours and makes the rest grey."""
    mix = keep * numpy.eye(3) + (1 - keep) * numpy.array([0.299, 0.587, 0.114])
    return mix.astype(numpy.float32)


def _add_noise(image, seed, spread):
    noise = numpy.empty(image.shape, numpy.int16)
    # cv2's own generator is far faster than numpy's here; its seed comes from ours.
    cv2.setRNGSeed(seed)
    cv2.randn(noise, (0,) * 3, (spread,) * 3)
    return cv2.add(image, noise, dtype=cv2.CV_8U)


def _cover(image, patch):
    """Cover a patch, in place."""
    place = image[patch.y:patch.y + patch.height, patch.x:patch.x + patch.width]
    if patch.colour is not None:
        place[:] = patch.colour
    elif patch.seed is not None:
        cv2.setRNGSeed(patch.seed)
        cv2.randu(place, (0,) * 3, (256,) * 3)
    else:
        y, x = patch.source
        place[:] = image[y:y + patch.height, x:x + patch.width].copy()
