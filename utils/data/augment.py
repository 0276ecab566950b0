"""What a training face goes through: one affine warp, then changes of light, blur and occlusion."""
import math

import cv2
import numpy

from utils.data import shutting

SHUT_WHOLLY = 0.7  # Share of the faces that are shut; the others are on the way.


class Augment:
    """Random geometry and look of a training face; see the Augmentation group of args.yaml.

    Called with a stored crop, its landmarks and a random generator; everything it does follows from
    that generator alone, so a sample is the same on any worker, rank and after a resume.
    """

    def __init__(self, args, flip, scheme=None):
        """args: resolved args. flip (K,): the scheme's flip table, None where a mirrored face is
        none of it. scheme: whose eyes args.shut may shut; None where it has none."""
        self.args, self.flip, self.scheme = args, flip, scheme

    def __call__(self, stored, landmarks, margin, size, rng):
        """A stored crop to a training sample.

        stored (T, T, 3) uint8, the nominal crop grown by margin; landmarks (K, 2) in crop units.
        Returns (size, size, 3) uint8 and (K, 2) float32 in crop units of the new image.
        """
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
        image = cv2.warpAffine(stored, pixel_matrix(linear, shift, margin, stored.shape[0], size),
                               (size, size), flags=cv2.INTER_LINEAR)
        if args.shut and self.scheme is not None and rng.random() < args.shut:
            # A droop is to be seen as one.
            share = 1.0 if rng.random() < SHUT_WHOLLY else rng.random()
            image, points = shutting.shut(image, landmarks * size - 0.5, self.scheme, share)
            landmarks = (points + 0.5) / size
        image = self._look(image, rng)
        return image, landmarks.astype(numpy.float32)

    def _look(self, image, rng):
        args = self.args
        if rng.random() < args.grey:
            weights = rng.dirichlet((3, 6, 2)) if rng.random() < 0.5 else (0.299, 0.587, 0.114)
            image = cv2.transform(image, numpy.tile(numpy.float32(weights), (3, 1)))
        if rng.random() < args.colour:
            image = _tone(image, rng)
        if rng.random() < args.blur:
            image = _degrade(image, rng)
        if rng.random() < args.occlusion:
            _occlude(image, args.occlusion_size, rng)
        return image


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


def _tone(image, rng):
    """Another exposure, contrast, gamma and white balance, as one look-up table a channel."""
    ramp = numpy.linspace(0, 1, 256)
    curve = ramp ** math.exp(0.35 * rng.standard_normal())
    curve = (curve - 0.5) * math.exp(0.25 * rng.standard_normal()) + 0.5
    curve = curve + 0.12 * rng.standard_normal()
    balance = numpy.exp(0.1 * rng.standard_normal(3))
    table = numpy.clip(curve[:, None] * balance * 255, 0, 255).astype(numpy.uint8)
    image = cv2.LUT(image, table[None])
    if rng.random() < 0.3:
        # Mixing towards or away from grey changes saturation without leaving uint8.
        keep = rng.uniform(0.2, 1.6)
        mix = keep * numpy.eye(3) + (1 - keep) * numpy.array([0.299, 0.587, 0.114])
        image = cv2.transform(image, mix.astype(numpy.float32))
    return image


def _degrade(image, rng):
    """Blur, motion blur, low resolution or sensor noise."""
    size = image.shape[0]
    kind = rng.integers(4)
    if kind == 0:
        sigma = size / 256 * rng.uniform(0.5, 3)
        return cv2.GaussianBlur(image, (0, 0), sigma)
    if kind == 1:
        length = max(3, int(size / 256 * rng.integers(5, 16)) | 1)
        kernel = numpy.zeros((length, length), numpy.float32)
        direction = rng.uniform(0, math.pi)
        reach = (length // 2) * numpy.array([math.cos(direction), math.sin(direction)])
        centre = length // 2
        a = tuple(int(round(v)) for v in centre - reach)
        b = tuple(int(round(v)) for v in centre + reach)
        cv2.line(kernel, a, b, 1.0)
        # Without its empty rim the kernel stays below the size at which OpenCV turns to a Fourier
        # transform, which takes forty times as long.
        x, y, width, height = cv2.boundingRect((kernel > 0).view(numpy.uint8))
        kernel = kernel[y:y + height, x:x + width] / kernel.sum()
        return cv2.filter2D(image, -1, kernel, anchor=(centre - x, centre - y))
    if kind == 2:
        small = max(8, int(size * rng.uniform(0.2, 0.6)))
        low = cv2.resize(image, (small, small), interpolation=cv2.INTER_AREA)
        return cv2.resize(low, (size, size), interpolation=cv2.INTER_LINEAR)
    noise = numpy.empty(image.shape, numpy.int16)
    # cv2's own generator is far faster than numpy's here; its seed comes from ours.
    cv2.setRNGSeed(int(rng.integers(2**31)))
    cv2.randn(noise, (0,) * 3, (rng.uniform(2, 18),) * 3)
    return cv2.add(image, noise, dtype=cv2.CV_8U)


def _occlude(image, largest, rng):
    """Cover a patch, in place, with a colour, noise or a piece of the image itself."""
    size = image.shape[0]
    height, width = (max(2, int(size * v)) for v in rng.uniform(0.08, max(largest, 0.081), 2))
    y, x = int(rng.integers(0, size - height + 1)), int(rng.integers(0, size - width + 1))
    patch = image[y:y + height, x:x + width]
    kind = rng.integers(3)
    if kind == 0:
        patch[:] = rng.integers(0, 256, 3)
    elif kind == 1:
        cv2.setRNGSeed(int(rng.integers(2**31)))
        cv2.randu(patch, (0,) * 3, (256,) * 3)
    else:
        from_y = int(rng.integers(0, size - height + 1))
        from_x = int(rng.integers(0, size - width + 1))
        patch[:] = image[from_y:from_y + height, from_x:from_x + width].copy()
