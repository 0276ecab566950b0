"""The complete model: normalisation, backbone, head and the heads fitted after training.

`LandmarkNet.forward` serves training: images to maps (or coordinates), which the loss compares with
the labels. `LandmarkNet.predict` serves evaluation, demo and export: uint8 crops to landmarks and
confidence. utils/checkpoint.py builds the model from the settings of a run.
"""
from __future__ import annotations

import typing

import torch
from torch.utils.flop_counter import FlopCounterMode

from nets.backbone import build_backbone
from nets.head import Maps, PIPHead, RegressionHead, autocast_disabled, to_float32
from utils.errors import UserError

if typing.TYPE_CHECKING:
    import numpy

    from nets.head import CoarseMaps
    from utils.landmarks.schemes import Scheme

# ImageNet's channel mean and deviation, which timm's weights expect, for pixels of 0..1.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


class LandmarkNet(torch.nn.Module):
    """Landmark network: uint8 RGB crops to landmarks.

    Args:
        scheme: landmark scheme of K points.
        backbone: name, see build_backbone.
        head: `pip` or `regression`.
        num_nb: neighbours of the PIP head, see PIPHead.
        stride: output stride, 16 or 32.
        merge: weights of the PIP head's predictions, see PIPHead.
        activation: `prelu` or `relu`, for IRNets.
        timm_weights: start from timm's pretrained weights.
        neighbour_face: mean face (K, 2) that defines the neighbours; default: the scheme's.

    Attributes:
        shape: nets.shape.ShapeHead (main.py --fit-shape), or None.
        lids: nets.lids.LidHead (main.py --fit-eyes), or None.
        flip_test: average predictions with those of the mirrored image.

    Raises:
        UserError: unknown head, backbone or stride, or too many neighbours.
    """

    def __init__(self, scheme: Scheme, backbone: str = "irnet18", head: str = "pip",
                 num_nb: int = 10, stride: int = 32, merge: str = "plain",
                 activation: str = "prelu", timm_weights: bool = False,
                 neighbour_face: numpy.ndarray | None = None):
        super().__init__()
        if head not in ("pip", "regression"):
            raise UserError(f"head must be pip or regression, found {head!r}")
        self.scheme, self.stride = scheme, stride
        self.backbone = build_backbone(backbone, stride, activation, timm_weights)
        if head == "pip":
            self.head = PIPHead(self.backbone.channels, scheme if neighbour_face is None
                                else scheme.with_mean_face(neighbour_face), num_nb, merge)
        else:
            self.head = RegressionHead(self.backbone.channels, scheme)
        self.shape = self.lids = None
        self.flip_test = False
        self.register_buffer("flip", torch.from_numpy(scheme.flip), persistent=False)
        self.register_buffer("mean", 255 * torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(STD).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: torch.Tensor) -> Maps | CoarseMaps | torch.Tensor:
        """Compute the output of the head, as the loss takes it.

        Args:
            images: (N, 3, S, S), uint8 or floats of 0..255.

        Returns:
            Maps (PIP head), or landmarks (N, K, 2) in crop units (regression).
        """
        features = self._features(self.normalise(images))
        autocast = torch.is_autocast_enabled(features.device.type)
        return self.head(features if autocast else to_float32(features))

    def _features(self, images):
        """Run the backbone on normalised images, in the precision of its weights."""
        weights = next(self.backbone.parameters(), images)
        return self.backbone(images.to(weights.dtype))

    def _apply(self, fn: typing.Callable, recurse: bool = True) -> LandmarkNet:
        """Move or convert the model, as `.to()`, `.half()` and `.bfloat16()` do.

        Only the backbone takes half precision. Everything else stays in float32, because half
        precision holds neither the pixels' mean nor the sum of a cell and an offset.
        """
        def without_half(values):
            converted = fn(values)
            is_half = converted.dtype in (torch.float16, torch.bfloat16)
            return values.to(converted.device) if is_half else converted

        if recurse:
            for name, child in self.named_children():
                child._apply(fn if name == "backbone" else without_half)
        return super()._apply(without_half, recurse=False)

    def normalise(self, images: torch.Tensor) -> torch.Tensor:
        """Normalise images (N, 3, S, S), uint8 or floats of 0..255, to mean 0 and deviation 1."""
        # Expanded to a row of pixels, because in channels_last an inner loop over three channels
        # alone is slow.
        mean, std = (values.expand(1, 3, 1, images.shape[3]).contiguous(
            memory_format=torch.channels_last) for values in (self.mean, self.std))
        return (images.to(mean.dtype) - mean) / std

    def predict(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Predict landmarks and confidence.

        Args:
            images: uint8 RGB crops (N, 3, S, S), S a multiple of 32.

        Returns:
            Landmarks (N, K, 2) in crop units, and confidence (N, K) in 0..1.

        Raises:
            ValueError: images of another type or shape, which would give meaningless landmarks.
        """
        if (images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != 3
                or images.shape[2] != images.shape[3] or images.shape[3] % 32):
            raise ValueError(f"images are {images.dtype} {tuple(images.shape)}, expected uint8 "
                             f"(N, 3, S, S), S a multiple of 32")
        images = self.normalise(images)
        if not self.flip_test:
            features = self._features(images)
            return self._apply_fitted_heads(features, *self.head.predict(features))
        both = self._features(torch.cat([images, images.flip(3)]))
        features, (landmarks, mirrored), (confidence, other) = (
            v.unflatten(0, (2, -1)) for v in (both, *self.head.predict(both)))
        x, y = mirrored.index_select(1, self.flip).unbind(2)
        # The fitted heads run after the mean, because they were fitted to unmirrored faces.
        return self._apply_fitted_heads(features[0],
                                        (landmarks + torch.stack([1 - x, y], 2)) / 2,
                                        (confidence + other.index_select(1, self.flip)) / 2)

    def predict_both(self, images: torch.Tensor) -> torch.Tensor:
        """Predict landmarks of images and of their mirror images, without the fitted heads.

        Args:
            images: uint8 RGB crops (N, 3, S, S).

        Returns:
            (N, 2, K, 2) in crop units of the images, for metrics.mirror_error.
        """
        images = self.normalise(images)
        features = self._features(torch.cat([images, images.flip(3)]))
        landmarks, mirrored = self.head.predict(features)[0].unflatten(0, (2, -1))
        x, y = mirrored.index_select(1, self.flip).unbind(2)
        return torch.stack([landmarks, torch.stack([1 - x, y], 2)], 1)

    def predict_without_lids(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Predict landmarks (N, K, 2) and confidence (N, K) of features, without the lid head."""
        landmarks, confidence = self.head.predict(features)
        return self._apply_shape_head(landmarks), confidence

    def _apply_fitted_heads(self, features, landmarks, confidence):
        landmarks = self._apply_shape_head(landmarks)
        if self.lids is None:
            return landmarks, confidence
        with autocast_disabled(features):
            return self.lids(to_float32(features), landmarks), confidence

    def _apply_shape_head(self, landmarks):
        if self.shape is None:
            return landmarks
        with autocast_disabled(landmarks):
            return self.shape(to_float32(landmarks))


def check_size(input_size: int, stride: int, name: str = "", fixed: int | None = None) -> None:
    """Check that the backbone can take images of this size.

    S must be a multiple of 32, because the trunk goes down to stride 32 even for output stride 16.

    Args:
        input_size: S, in pixels.
        stride: output stride, for the error message alone.
        name: backbone, for the error message alone.
        fixed: the only size that the backbone takes, or None.

    Raises:
        UserError: another size than the fixed one, or not a multiple of 32.
    """
    if fixed not in (None, input_size):
        raise UserError(f"backbone {name} takes images of {fixed} px only, found input size "
                        f"{input_size}; give --input-size {fixed} or another --backbone")
    if input_size < 32 or input_size % 32:
        nearest = max(32, round(input_size / 32) * 32)
        raise UserError(f"input size {input_size} is not a multiple of the backbone's total stride "
                        f"32 (output stride {stride}); nearest: {nearest}")


def check_maps(model: LandmarkNet, input_size: int, batch: int) -> None:
    """Check that the backbone's map has input_size / stride cells and suits the batch size.

    Raises:
        UserError: a map of another size, or a batch in which batch norm has one value a channel.
    """
    backbone, expected = model.backbone, input_size // model.stride
    device, training = next(model.parameters()).device, model.training
    try:
        with torch.no_grad():
            found = tuple(backbone.eval()(torch.zeros(1, 3, input_size, input_size, device=device))
                          .shape[2:])
    except RuntimeError as error:
        found = " ".join(str(error).split())[:100]
    model.train(training)
    if found != (expected, expected):
        raise UserError(f"the backbone's map of a {input_size} px image is not {expected} x "
                        f"{expected} cells ({found}), as stride {model.stride} needs: its "
                        f"convolutions crop the borders; give another --backbone")
    if batch == 1 and input_size == 32 and any(isinstance(m, torch.nn.BatchNorm2d)
                                               for m in backbone.modules()):
        raise UserError("--batch-size 1 with --input-size 32 gives batch norm one value a channel; "
                        "increase either")


def gmacs(model: LandmarkNet, input_size: int) -> float:
    """Count the multiply-accumulates of one image, in billions (convolutions and products)."""
    device = next(model.parameters()).device
    image = torch.zeros(1, 3, input_size, input_size, dtype=torch.uint8, device=device)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model.predict(image)
    # torch counts a multiplication and an addition as two operations.
    return counter.get_total_flops() / 2e9


def count_parameters(model: torch.nn.Module) -> int:
    """Count the learnable parameters."""
    return sum(p.numel() for p in model.parameters())
