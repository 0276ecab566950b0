"""Augmentation of training faces: random geometry and pixel operations, in OpenCV or in torch.

Augment draws the parameters of a face, AugmentParams, on the host. Then apply_params makes the
image of one face with OpenCV, in a loader process, or BatchAugment those of a batch with torch, on
any device. The pixel operations are in operations.py.

A sample's augmentation is a function of (seed, epoch, index) alone. It is the same for any number
of workers and ranks, with either implementation, and after a resume.

One affine matrix is one warp: mirroring, rotation, scaling, aspect ratio and shift are multiplied
into a single matrix from the stored crop to the input, so the geometry resamples pixels once.
"""
from __future__ import annotations

import argparse
import math

import cv2
import numpy
import torch

from utils.data.eye_closure import draw_closure
from utils.data.operations import OPERATIONS, AugmentParams, draw_operations
from utils.data.pixel_grid import PixelGrid
from utils.landmarks.schemes import Scheme


class Augment:
    """Random augmentation of one face, by the Augmentation group of args.yaml.

    Args:
        args: resolved settings.
        flip: the scheme's flip table, (K,) indices; None: faces are not mirrored.
        scheme: the landmarks' Scheme, whose eyes may be closed; None: they are not.
    """

    def __init__(self, args: argparse.Namespace, flip: numpy.ndarray | None,
                 scheme: Scheme | None = None):
        self.args, self.flip, self.scheme = args, flip, scheme

    def __call__(self, stored: numpy.ndarray, landmarks: numpy.ndarray, margin: float, size: int,
                 rng: numpy.random.Generator) -> tuple[numpy.ndarray, numpy.ndarray]:
        """Augment a stored crop with OpenCV.

        Args:
            stored: (T, T, 3) uint8, the nominal crop enlarged by `margin`.
            landmarks: (K, 2) in units of the nominal crop, NaN where one is missing.
            margin: side of the stored crop over that of the nominal crop.
            size: side of the result in pixels.
            rng: generator of the sample.

        Returns:
            Image (size, size, 3) uint8 and landmarks (K, 2) float32 in its crop units.
        """
        params = self.draw_params(landmarks, margin, stored.shape[0], size, rng)
        return apply_params(params, stored, size), params.landmarks

    def draw_params(self, landmarks: numpy.ndarray, margin: float, stored_size: int, size: int,
                    rng: numpy.random.Generator) -> AugmentParams:
        """Draw the parameters for a stored crop of `stored_size` pixels a side; see __call__."""
        args = self.args
        mirror = rng.random() < args.flip and self.flip is not None
        angle = math.radians(args.rotation * rng.uniform(-1, 1)) if rng.random() < 0.6 else 0.0
        zoom = math.exp(args.scaling * _clipped_normal(rng))
        stretch = math.exp(args.aspect * _clipped_normal(rng) / 2)
        shift = args.shift * rng.uniform(-1, 1, 2)
        cos, sin = zoom * math.cos(angle), zoom * math.sin(angle)
        # In crop units about the centre: mirror, then aspect, rotation and size, then shift.
        across = stretch * (-1 if mirror else 1)
        linear = numpy.array([[cos * across, -sin / stretch], [sin * across, cos / stretch]])
        landmarks = (landmarks - 0.5) @ linear.T + (0.5 + shift)
        if mirror:
            landmarks = landmarks[self.flip]
        closure = None
        if args.shut and self.scheme is not None and rng.random() < args.shut:
            closure, landmarks = draw_closure(landmarks, size, self.scheme, rng)
        params = AugmentParams(pixel_matrix(linear, shift, margin, stored_size, size),
                               landmarks.astype(numpy.float32), closure)
        draw_operations(params, args, size, rng)
        return params


def _clipped_normal(rng):
    return min(max(rng.standard_normal(), -2.5), 2.5)


def pixel_matrix(linear: numpy.ndarray, shift: numpy.ndarray, margin: float, stored_size: int,
                 size: int) -> numpy.ndarray:
    """Convert an affine map in crop units to pixels of the stored crop and of the image.

    The map is u' = linear (u - 1/2) + 1/2 + shift. Crop unit u is at pixel
    ((u - 1/2) / margin + 1/2) * stored_size - 1/2 of the stored crop, and at u * size - 1/2 of the
    image.

    Args:
        linear: (2, 2) in crop units.
        shift: (2,) in crop units.
        margin: side of the stored crop over that of the nominal crop.
        stored_size: side of the stored crop in pixels.
        size: side of the image in pixels.

    Returns:
        (2, 3) float64, as cv2.warpAffine takes it.
    """
    scale = size * margin / stored_size
    matrix = numpy.empty((2, 3))
    matrix[:, :2] = linear * scale
    matrix[:, 2] = (0.5 + shift) * size - 0.5 - matrix[:, :2].sum(1) * (stored_size / 2 - 0.5)
    return matrix


def nominal_crop(stored: numpy.ndarray, margin: float, size: int) -> numpy.ndarray:
    """Cut the nominal crop (size, size, 3) out of a stored crop (T, T, 3), without augmentation."""
    if margin == 1 and stored.shape[0] == size:
        return stored
    matrix = pixel_matrix(numpy.eye(2), numpy.zeros(2), margin, stored.shape[0], size)
    return cv2.warpAffine(stored, matrix, (size, size), flags=cv2.INTER_LINEAR)


def apply_params(params: AugmentParams, stored: numpy.ndarray, size: int) -> numpy.ndarray:
    """Make the image (size, size, 3) uint8 of a stored crop (T, T, 3) uint8, with OpenCV."""
    image = cv2.warpAffine(stored, params.matrix, (size, size), flags=cv2.INTER_LINEAR)
    for name, operation in OPERATIONS.items():
        value = getattr(params, name)
        if value is not None:
            image = operation.opencv(image, value)
    return image


def pack_params(params: list[AugmentParams], stored_size: int, size: int
                ) -> dict[str, numpy.ndarray]:
    """Turn the parameters of a batch into arrays for BatchAugment.

    Args:
        params: those of each face.
        stored_size: side T of the stored crops, (N, T, T, 3), in pixels.
        size: side of the images in pixels.

    Returns:
        Arrays by name: `warp` (3, N, 1, 1, 2), and `operation/...` of each operation that is
        applied, `operation/faces` among them, the indices of its faces.
    """
    forward = numpy.zeros((len(params), 3, 3))
    forward[:, :2], forward[:, 2, 2] = [face.matrix for face in params], 1
    back = numpy.linalg.inv(forward)[:, :2]
    # From pixels of the image to the units of grid_sample, in which the crop goes from -1 to 1.
    back *= 2 / stored_size
    back[..., 2] += 1 / stored_size - 1
    arrays = {"warp": back.transpose(2, 0, 1)[:, :, None, None]}
    for name, operation in OPERATIONS.items():
        chosen = [i for i, face in enumerate(params) if getattr(face, name) is not None]
        if chosen:
            values = operation.pack([getattr(params[i], name) for i in chosen], size)
            arrays |= {f"{name}/faces": numpy.array(chosen),
                       **{f"{name}/{key}": value for key, value in values.items()}}
    return arrays


class BatchAugment:
    """The torch implementation of apply_params, for a batch and on any device.

    Images equal those of OpenCV but for rounding and noise. OpenCV interpolates at multiples of
    1/32 pixel and blurs with weights of eight bits, so most values differ by at most two levels.
    Noise has other values of the same distribution. A GPU never waits for the host.

    Args:
        size: side of the images in pixels.
        device: where the stored crops are.
    """

    def __init__(self, size: int, device: torch.device | str = "cpu"):
        self.grid = PixelGrid(size, device)

    @torch.no_grad()
    def __call__(self, stored: torch.Tensor, arrays: dict[str, torch.Tensor]) -> torch.Tensor:
        """Augment a batch.

        Args:
            stored: (N, T, T, 3) uint8 on the device; a crop smaller than T is in the upper left
                corner, on black.
            arrays: of pack_params, on the device.

        Returns:
            (N, size, size, 3) uint8 on the device, contiguous.
        """
        across, down, start = arrays["warp"]
        at = torch.addcmul(torch.addcmul(start, across, self.grid.x[..., None]), down,
                           self.grid.y[..., None])
        images = torch.nn.functional.grid_sample(
            stored.permute(0, 3, 1, 2).float(), at, align_corners=False).round_()
        for name, operation in OPERATIONS.items():
            chosen = arrays.get(f"{name}/faces")
            if chosen is not None:
                packed = {key.removeprefix(f"{name}/"): value for key, value in arrays.items()
                          if key.startswith(f"{name}/")}
                images.index_copy_(0, chosen, operation.torch(images[chosen], packed, self.grid))
        return images.permute(0, 2, 3, 1).to(torch.uint8, memory_format=torch.contiguous_format)
