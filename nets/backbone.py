"""Backbones: a name to a feature extractor, from images to one feature map.

A backbone is one of `BACKBONES` (the IRNets of nets/irnet.py) or any timm model with feature maps
at strides 16 and 32. `build_backbone` wraps it in `Backbone`, which selects the map for the head.
To add a backbone that timm does not have, add an entry to `BACKBONES`; no other file changes.
"""
from __future__ import annotations

import difflib
import functools

import timm
import timm.utils
import torch

from nets import packaged
from nets.irnet import IRNet
from utils.errors import UserError

# Backbones that timm does not have: name to a function of the activation (prelu or relu) that
# returns a module. Its forward returns a list of feature maps; the attributes `channels` and
# `strides` list the width and the stride of each.
BACKBONES = {f"irnet{depth}": functools.partial(IRNet, depth) for depth in (18, 50, 100)}
NECK_CHANNELS = 256


class Backbone(torch.nn.Module):
    """A trunk and the selection of its feature map at the output stride.

    Stride 32 uses the last feature map. Stride 16 adds the upsampled stride-32 map to the stride-16
    map (see Neck), so that the finer grid keeps the receptive field of the coarse one.

    Args:
        trunk: module from images to a list of feature maps.
        last: index of the stride-32 map in that list.
        second_last: index of the stride-16 map.
        channels: width of each map.
        stride: output stride, 16 or 32.

    Attributes:
        channels: width of the output.
        fixed_size: the only input size that the trunk takes (attention windows, position
            embeddings), or None.
    """

    def __init__(self, trunk: torch.nn.Module, last: int, second_last: int,
                 channels: list[int] | tuple[int, ...], stride: int):
        super().__init__()
        self.trunk = trunk
        cfg = getattr(trunk, "pretrained_cfg", None) or getattr(trunk, "default_cfg", None) or {}
        self.fixed_size = cfg["input_size"][1] if cfg.get("fixed_input_size") else None
        self.channels_last = str(getattr(trunk, "output_fmt", "NCHW")).endswith("NHWC")
        self.last, self.second_last = last, second_last
        self.neck = None if stride == 32 else Neck(channels[second_last], channels[last])
        self.channels = channels[last] if self.neck is None else NECK_CHANNELS

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map normalised images (N, 3, S, S) to features (N, channels, S / stride, S / stride)."""
        features = self.trunk(images)
        if self.channels_last:
            features = [f.permute(0, 3, 1, 2) for f in features]
        if self.neck is None:
            return features[self.last]
        return self.neck(features[self.second_last], features[self.last])


class Neck(torch.nn.Module):
    """Stride-16 plus upsampled stride-32 features, smoothed by one 3x3 convolution.

    Args:
        fine: width of the stride-16 map.
        coarse: width of the stride-32 map.
        channels: width of the output.
    """

    def __init__(self, fine: int, coarse: int, channels: int = NECK_CHANNELS):
        super().__init__()
        self.fine = torch.nn.Conv2d(fine, channels, 1)
        self.coarse = torch.nn.Conv2d(coarse, channels, 1)
        self.smooth = torch.nn.Sequential(
            torch.nn.BatchNorm2d(channels), torch.nn.ReLU(inplace=True),
            torch.nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            torch.nn.BatchNorm2d(channels), torch.nn.ReLU(inplace=True))

    def forward(self, fine: torch.Tensor, coarse: torch.Tensor) -> torch.Tensor:
        """Merge (N, fine, 2H, 2W) and (N, coarse, H, W) to (N, channels, 2H, 2W)."""
        coarse = torch.nn.functional.interpolate(self.coarse(coarse), scale_factor=2.0)
        return self.smooth(self.fine(fine) + coarse)


def build_backbone(name: str, stride: int = 32, activation: str = "prelu",
                   timm_weights: bool = False) -> Backbone:
    """Build the feature extractor called `name`.

    Args:
        name: a key of BACKBONES or the name of a timm model.
        stride: output stride, 16 or 32.
        activation: `prelu` or `relu`, for IRNets only.
        timm_weights: load timm's pretrained weights, from an installed package (see
            nets/packaged.py), timm's cache or the network.

    Raises:
        UserError: unknown name or stride, or no such weights.
    """
    if stride not in (16, 32):
        raise UserError(f"stride must be 16 or 32, found {stride}")
    if name in BACKBONES:
        if timm_weights:
            raise UserError(f"pretrained: timm: there are none for {name}; use none or the path of "
                            f"a released IRNet file or of a .pt of this repository")
        trunk = BACKBONES[name](activation)
        channels, strides = trunk.channels, trunk.strides
    else:
        trunk = _timm_trunk(name, timm_weights)
        channels, strides = trunk.feature_info.channels(), trunk.feature_info.reduction()
    if 32 not in strides or 16 not in strides:
        raise UserError(f"backbone {name} has feature maps at strides {list(strides)}; strides 16 "
                        f"and 32 are needed")
    _replace_strided_1x1(trunk)
    level = {s: i for i, s in enumerate(strides)}
    return Backbone(trunk, level[32], level[16], channels, stride)


def check_backbone(name: str) -> None:
    """Raise UserError with similar names if there is no backbone called `name`."""
    if name not in BACKBONES and not timm.is_model(name):
        known = [*BACKBONES, *timm.list_models()]
        near = difflib.get_close_matches(name, known, 4, 0.5)
        raise UserError(f"unknown backbone {name!r}; near: {', '.join(near) or 'none'}; known: "
                        f"{', '.join(BACKBONES)} and timm's models (timm.list_models())")


def _timm_trunk(name, pretrained):
    check_backbone(name)
    file = packaged.find(name) if pretrained else None
    overlay = {"state_dict": packaged.read(file, name)} if file else None
    try:
        return timm.create_model(name, pretrained=pretrained, features_only=True,
                                 pretrained_cfg_overlay=overlay)
    except Exception as error:
        # timm and its hub client raise many exception types here.
        what = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if pretrained:
            raise UserError(f"pretrained: timm: the weights of {name} could not be loaded (no "
                            f"network, or none exist): {what}; use none or a path") from None
        raise UserError(f"backbone {name} gives no feature maps: {what}") from None


def _replace_strided_1x1(trunk):
    """Subsample the input of narrow strided 1x1 convolutions instead; the output is the same.

    The backward pass of such a convolution, as in MobileOne's stem, writes out of bounds in torch
    2.14 in channels_last on CPUs with AVX2.
    """
    for conv in trunk.modules():
        if isinstance(conv, torch.nn.Conv2d) and conv.kernel_size == (1, 1) \
                and conv.stride != (1, 1) and conv.in_channels < 8:
            conv.register_forward_pre_hook(functools.partial(_subsample_input, conv.stride))
            conv.stride = (1, 1)


def _subsample_input(stride, module, inputs):
    return (inputs[0][..., ::stride[0], ::stride[1]],)


def fuse_branches(model: torch.nn.Module) -> torch.nn.Module:
    """Fuse the training branches of MobileOne-like blocks into single convolutions, in place."""
    return timm.utils.reparameterize_model(model, inplace=True)
