"""The operations of the augmentation on pixels, each with its random draw and two implementations.

An operation is a field of AugmentParams that holds its parameters, a line in draw_operations that
draws them, and an entry of OPERATIONS: a function of one image in OpenCV, and two for a batch in
torch. The first packs parameters into arrays on the host, the second applies the arrays on the
device, in few calls, because a GPU takes longer to launch small kernels than to run them. Eye
closure, which moves landmarks too, is in eye_closure.py.

To add an operation, put its probability and strength into the Augmentation group of args.yaml and
write these here. Draw it last, so that the random numbers of the others stay the same.
"""
from __future__ import annotations

import argparse
import dataclasses
import math
import typing
from collections.abc import Callable

import cv2
import numpy
import torch

from utils.data.eye_closure import (
    EyeClosure,
    close_eyes_opencv,
    close_eyes_torch,
    pack_closures,
)
from utils.data.pixel_grid import PixelGrid

LUMINANCE = (0.299, 0.587, 0.114)  # Weights of R, G and B in a grey level (ITU-R BT.601).


@dataclasses.dataclass
class Occluder:
    """A rectangle that covers part of a face with a colour, with noise or with another part.

    Attributes:
        y: its first row in pixels.
        x: its first column in pixels.
        height: number of rows.
        width: number of columns.
        colour: (3,) int 0..255 for a colour, else None.
        seed: seed for uniform noise, else None.
        source: first (row, column) of the part of the same image that is copied, else None.
    """
    y: int
    x: int
    height: int
    width: int
    colour: numpy.ndarray | None = None
    seed: int | None = None
    source: tuple[int, int] | None = None


@dataclasses.dataclass
class AugmentParams:
    """The augmentation of one face: the warp, then operations in the order of the fields.

    An operation whose field is None is not applied. A face has at most one of blur, motion_blur,
    downscale and noise.

    Attributes:
        matrix: (2, 3) from pixels of the stored crop to pixels of the image, as cv2.warpAffine
            takes it.
        landmarks: (K, 2) float32 in crop units of the augmented image.
        eye_closure: see EyeClosure.
        grey: weights of the channels in the grey level, (3,) float32.
        tone_curve: a look-up table per channel, (256, 3) uint8.
        saturation: factor of the distance from grey: 0 gives a grey image, 1 changes nothing.
        blur: standard deviation of a Gaussian in pixels.
        motion_blur: kernel (h, w) float32 and the (x, y) of its anchor.
        downscale: side in pixels to which the image is reduced before it is enlarged again.
        noise: seed and standard deviation, in levels of 0..255, of Gaussian noise.
        occluder: see Occluder.
    """
    matrix: numpy.ndarray
    landmarks: numpy.ndarray
    eye_closure: EyeClosure | None = None
    grey: numpy.ndarray | None = None
    tone_curve: numpy.ndarray | None = None
    saturation: float | None = None
    blur: float | None = None
    motion_blur: tuple[numpy.ndarray, tuple[int, int]] | None = None
    downscale: int | None = None
    noise: tuple[int, float] | None = None
    occluder: Occluder | None = None


def draw_operations(params: AugmentParams, args: argparse.Namespace, size: int,
                    rng: numpy.random.Generator) -> None:
    """Draw the operations after eye closure into `params`, for an image of `size` pixels a side."""
    if rng.random() < args.grey:
        params.grey = _draw_grey(rng)
    if rng.random() < args.colour:
        params.tone_curve = _draw_tone_curve(rng)
        if rng.random() < 0.3:
            params.saturation = rng.uniform(0.2, 1.6)
    if rng.random() < args.blur:
        kind = rng.integers(4)
        if kind == 0:
            params.blur = size / 256 * rng.uniform(0.5, 3)
        elif kind == 1:
            params.motion_blur = _draw_motion_blur(size, rng)
        elif kind == 2:
            params.downscale = max(8, int(size * rng.uniform(0.2, 0.6)))
        else:
            params.noise = int(rng.integers(2**31)), rng.uniform(2, 18)
    if rng.random() < args.occlusion:
        params.occluder = _draw_occluder(args.occlusion_size, size, rng)


# Grey: all channels become one weighted sum of them.

def _draw_grey(rng):
    return numpy.float32(rng.dirichlet((3, 6, 2)) if rng.random() < 0.5 else LUMINANCE)


def _grey_opencv(image, weights):
    return cv2.transform(image, numpy.tile(weights, (3, 1)))


def _grey_pack(weights, size):
    return {"weights": numpy.stack(weights)[:, :, None, None]}


def _grey_torch(images, packed, grid):
    return (images * packed["weights"]).sum(1, keepdim=True).round_().expand_as(images)


# Tone curve: gamma, contrast, exposure and white balance.

def _draw_tone_curve(rng):
    ramp = numpy.linspace(0, 1, 256)
    curve = ramp ** math.exp(0.35 * rng.standard_normal())
    curve = (curve - 0.5) * math.exp(0.25 * rng.standard_normal()) + 0.5
    curve = curve + 0.12 * rng.standard_normal()
    balance = numpy.exp(0.1 * rng.standard_normal(3))
    return numpy.clip(curve[:, None] * balance * 255, 0, 255).astype(numpy.uint8)


def _tone_curve_opencv(image, table):
    return cv2.LUT(image, table[None])


def _tone_curve_pack(tables, size):
    return {"tables": numpy.stack(tables).transpose(0, 2, 1)}


def _tone_curve_torch(images, packed, grid):
    return packed["tables"].gather(2, images.flatten(2).long()).view(images.shape).float()


# Saturation: a mix of the image and its grey level.

def _saturation_matrix(saturation):
    mix = saturation * numpy.eye(3) + (1 - saturation) * numpy.array(LUMINANCE)
    return mix.astype(numpy.float32)


def _saturation_opencv(image, saturation):
    return cv2.transform(image, _saturation_matrix(saturation))


def _saturation_pack(saturations, size):
    return {"share": numpy.array(saturations)[:, None, None, None],
            "luminance": numpy.array(LUMINANCE)[:, None, None]}


def _saturation_torch(images, packed, grid):
    grey = (images * packed["luminance"]).sum(1, keepdim=True)
    return torch.lerp(grey, images, packed["share"]).round_().clamp_(0, 255)


# Gaussian blur.

def _blur_opencv(image, sigma):
    return cv2.GaussianBlur(image, (0, 0), sigma)


def _blur_pack(sigmas, size):
    # The length of the kernel that OpenCV uses for bytes.
    reach = numpy.array([round(6 * sigma + 1) | 1 for sigma in sigmas]) // 2
    at = numpy.arange(-reach.max(), reach.max() + 1)
    kernels = numpy.exp(-at ** 2 / (2 * numpy.array(sigmas)[:, None] ** 2))
    kernels[abs(at) > reach[:, None]] = 0
    kernels /= kernels.sum(1, keepdims=True)
    return {"across": kernels[:, None, None, :], "down": kernels[:, None, :, None]}


def _blur_torch(images, packed, grid):
    return _correlate(_correlate(images, packed["across"]), packed["down"]).round_()


# Motion blur: a line of 5 to 15 pixels at 256 px, in any direction.

def _draw_motion_blur(size, rng):
    length = max(3, int(size / 256 * rng.integers(5, 16)) | 1)
    direction = rng.uniform(0, math.pi)
    kernel = numpy.zeros((length, length), numpy.float32)
    centre = length // 2
    reach = centre * numpy.array([math.cos(direction), math.sin(direction)])
    start, end = (tuple(int(round(v)) for v in point) for point in (centre - reach, centre + reach))
    cv2.line(kernel, start, end, 1.0)
    # Without its empty border the kernel stays below the size from which on OpenCV uses a Fourier
    # transform, which takes forty times as long.
    x, y, width, height = cv2.boundingRect((kernel > 0).view(numpy.uint8))
    return kernel[y:y + height, x:x + width] / kernel.sum(), (centre - x, centre - y)


def _motion_blur_opencv(image, motion_blur):
    kernel, anchor = motion_blur
    return cv2.filter2D(image, -1, kernel, anchor=anchor)


def _motion_blur_pack(motion_blurs, size):
    reach = max(max(*anchor, kernel.shape[1] - 1 - anchor[0], kernel.shape[0] - 1 - anchor[1])
                for kernel, anchor in motion_blurs)
    kernels = numpy.zeros((len(motion_blurs), 2 * reach + 1, 2 * reach + 1), numpy.float32)
    for padded, (kernel, (x, y)) in zip(kernels, motion_blurs):
        padded[reach - y:, reach - x:][:kernel.shape[0], :kernel.shape[1]] = kernel
    return {"kernels": kernels[:, None]}


def _motion_blur_torch(images, packed, grid):
    return _correlate(images, packed["kernels"]).round_()


# Downscale: area means of a coarser grid, enlarged again bilinearly.

def _downscale_opencv(image, side):
    low = cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA)
    return cv2.resize(low, image.shape[1::-1], interpolation=cv2.INTER_LINEAR)


def _downscale_pack(sides, size):
    sides, line = numpy.array(sides)[:, None, None], numpy.arange(size)
    # Rows that a smaller image does not have get ends of 0, hence no overlap with any pixel.
    row, step = numpy.arange(sides.max())[:, None], size / sides
    ends = numpy.stack([row, row + 1], 1) * (row < sides)[:, :, None] * step[..., None]
    return {"first": ends[:, None, :, 0], "last": ends[:, None, :, 1], "row": row[:, 0],
            "inverse": 1 / step[:, None],
            "at": ((line[:, None] + 0.5) / step - 0.5).clip(0, sides - 1)[:, None]}


def _downscale_torch(images, packed, grid):
    line = grid.x[0]
    # Weights of pixels in the coarse ones (N, 1, largest, S), and the reverse.
    down = torch.minimum(packed["last"], line + 1) - torch.maximum(packed["first"], line)
    down = down.clamp_(min=0).mul_(packed["inverse"])
    up = (1 - (packed["at"] - packed["row"]).abs_()).clamp_(min=0)
    low = (down @ images @ down.mT).round_()
    return (up @ low @ up.mT).round_()


# Gaussian noise. The two implementations draw different values of one distribution.

def _noise_opencv(image, noise):
    seed, sigma = noise
    values = numpy.empty(image.shape, numpy.int16)
    # OpenCV's generator is far faster than numpy's here.
    cv2.setRNGSeed(seed)
    cv2.randn(values, (0,) * 3, (sigma,) * 3)
    return cv2.add(image, values, dtype=cv2.CV_8U)


def _noise_pack(noises, size):
    seeds, sigmas = (numpy.array(values) for values in zip(*noises))
    return {"seeds": _pack_seeds(seeds), "sigmas": sigmas[:, None, None, None]}


def _noise_torch(images, packed, grid):
    bits = _hash(packed["seeds"] ^ grid.value)
    # The Box-Muller transform of two uniform values, of 16 bits each, to a normal one.
    angle = ((bits & 0xffff) * (2 * math.pi / 65536)).cos_()
    squared = torch.log1p(bits >> 16).mul_(-2).add_(2 * math.log(65536))
    noise = squared.sqrt_().mul_(angle).mul_(packed["sigmas"])
    return (images + noise.round_()).clamp_(0, 255)


# Occluder. Uniform noise differs between the two implementations, as above.

def _draw_occluder(largest, size, rng):
    """An Occluder whose sides are 0.08 to `largest` of the image."""
    height, width = (max(2, int(size * v)) for v in rng.uniform(0.08, max(largest, 0.081), 2))
    y, x = int(rng.integers(0, size - height + 1)), int(rng.integers(0, size - width + 1))
    occluder, kind = Occluder(y, x, height, width), rng.integers(3)
    if kind == 0:
        occluder.colour = rng.integers(0, 256, 3)
    elif kind == 1:
        occluder.seed = int(rng.integers(2**31))
    else:
        occluder.source = (int(rng.integers(0, size - height + 1)),
                           int(rng.integers(0, size - width + 1)))
    return occluder


def _occlude_opencv(image, occluder):
    """Cover the rectangle, in place."""
    height, width = occluder.height, occluder.width
    covered = image[occluder.y:occluder.y + height, occluder.x:occluder.x + width]
    if occluder.colour is not None:
        covered[:] = occluder.colour
    elif occluder.seed is not None:
        cv2.setRNGSeed(occluder.seed)
        cv2.randu(covered, (0,) * 3, (256,) * 3)
    else:
        y, x = occluder.source
        covered[:] = image[y:y + height, x:x + width].copy()
    return image


def _occlude_pack(occluders, size):
    """Masks of rows (N, 1, S, 1) and columns (N, 1, 1, S), and what covers the faces."""
    line = numpy.arange(size)
    rows = numpy.array([(line >= o.y) & (line < o.y + o.height) for o in occluders])
    columns = numpy.array([(line >= o.x) & (line < o.x + o.width) for o in occluders])
    kinds = {"copied": [o.source is not None for o in occluders],
             "coloured": [o.colour is not None for o in occluders],
             "noisy": [o.seed is not None for o in occluders]}
    packed = {f"{kind}_rows": (rows & numpy.array(chosen)[:, None])[:, None, :, None]
              for kind, chosen in kinds.items() if any(chosen)}
    sources = numpy.array([o.source or (o.y, o.x) for o in occluders])
    moved = sources - [(o.y, o.x) for o in occluders]
    packed |= {"columns": columns[:, None, None],
               "moved": (moved[:, 0] * size + moved[:, 1])[:, None, None]}
    if any(kinds["coloured"]):
        packed["colours"] = numpy.float32([(0,) * 3 if o.colour is None else o.colour
                                           for o in occluders])[..., None, None]
    if any(kinds["noisy"]):
        packed["seeds"] = _pack_seeds(numpy.array([o.seed or 0 for o in occluders]))
    return packed


def _occlude_torch(images, packed, grid):
    columns, out = packed["columns"], images
    if "copied_rows" in packed:
        inside = (packed["copied_rows"] & columns).flatten(2)
        at = grid.pixel + inside * packed["moved"]
        out = out.flatten(2).gather(2, at.expand(-1, 3, -1)).view(images.shape)
    if "coloured_rows" in packed:
        out = torch.where(packed["coloured_rows"] & columns, packed["colours"], out)
    if "noisy_rows" in packed:
        noise = _hash(packed["seeds"] ^ grid.value) >> 24
        out = torch.where(packed["noisy_rows"] & columns, noise, out)
    return out


# What several torch implementations use.

def _correlate(images, kernels):
    """Filter each image (C, H, W) with its own kernel (1, h, w) of odd sides; borders mirror."""
    down, across = kernels.shape[2] // 2, kernels.shape[3] // 2
    padded = torch.nn.functional.pad(images, (across, across, down, down), mode="reflect")
    # Faces become the channels, so that each channel of a face meets the same kernel.
    return torch.nn.functional.conv2d(padded.transpose(0, 1), kernels,
                                      groups=len(images)).transpose(0, 1)


def _pack_seeds(seeds):
    """Seeds of images, mixed, in the shape in which they are combined with PixelGrid.value."""
    return _hash(seeds.astype(numpy.int64) * 2)[:, None, None, None]


def _hash(x):
    """A 32-bit integer hash (multiply and xor-shift) of int64 values, of arrays and tensors.

    Of an image's mixed seed and the number of a value it gives bits that depend on nothing else, so
    not on the other images of a batch.
    """
    for multiplier in (0x7feb352d, 0x846ca68b):
        x = x ^ x >> 16
        x = x * multiplier & 0xffffffff
    return x ^ x >> 15


class Operation(typing.NamedTuple):
    """The implementations of an operation, with the same result but for rounding and noise.

    Attributes:
        opencv: image (S, S, 3) uint8 and its parameters to an image; it may work in place.
        pack: a list of parameters of N images and their side S to arrays by name.
        torch: images (N, 3, S, S) float of whole numbers 0..255, these arrays on the device and a
            PixelGrid to such images.
    """
    opencv: Callable[[numpy.ndarray, typing.Any], numpy.ndarray]
    pack: Callable[[list, int], dict[str, numpy.ndarray]]
    torch: Callable[[torch.Tensor, dict[str, torch.Tensor], PixelGrid], torch.Tensor]


# By field of AugmentParams, in the order in which they are applied.
OPERATIONS = {
    "eye_closure": Operation(close_eyes_opencv, pack_closures, close_eyes_torch),
    "grey": Operation(_grey_opencv, _grey_pack, _grey_torch),
    "tone_curve": Operation(_tone_curve_opencv, _tone_curve_pack, _tone_curve_torch),
    "saturation": Operation(_saturation_opencv, _saturation_pack, _saturation_torch),
    "blur": Operation(_blur_opencv, _blur_pack, _blur_torch),
    "motion_blur": Operation(_motion_blur_opencv, _motion_blur_pack, _motion_blur_torch),
    "downscale": Operation(_downscale_opencv, _downscale_pack, _downscale_torch),
    "noise": Operation(_noise_opencv, _noise_pack, _noise_torch),
    "occluder": Operation(_occlude_opencv, _occlude_pack, _occlude_torch),
}
