"""A name to a feature extractor: IRNet, or any timm model with feature maps."""
import difflib
import functools

import timm
import timm.utils
import torch

from nets import packaged
from nets.irnet import IRNet
from utils.errors import UserError

# Trunks that timm does not have, made of the activation's name: modules with `channels` and
# `strides` that give as many feature maps.
OWN = {f"irnet{depth}": functools.partial(IRNet, depth) for depth in (18, 50, 100)}
NECK_CHANNELS = 256


class Backbone(torch.nn.Module):
    """Images to one feature map of the wanted output stride.

    At stride 32 that is the last feature map. At stride 16 the stride-16 and the (upsampled)
    stride-32 maps are added and smoothed, so that the finer grid keeps the whole view.
    `channels` is the width of the result; `only_size` the one input size that a trunk of attention
    windows or position tables takes, or None.
    """

    def __init__(self, trunk, last, second_last, channels, stride):
        super().__init__()
        self.trunk = trunk
        known = getattr(trunk, "pretrained_cfg", None) or getattr(trunk, "default_cfg", None) or {}
        self.only_size = known["input_size"][1] if known.get("fixed_input_size") else None
        self.channels_last = str(getattr(trunk, "output_fmt", "NCHW")).endswith("NHWC")
        self.last, self.second_last = last, second_last
        self.neck = None if stride == 32 else Neck(channels[second_last], channels[last])
        self.channels = channels[last] if self.neck is None else NECK_CHANNELS

    def forward(self, images):
        """(N, 3, S, S) normalised to (N, channels, S / stride, S / stride)."""
        features = self.trunk(images)
        if self.channels_last:
            features = [f.permute(0, 3, 1, 2) for f in features]
        if self.neck is None:
            return features[self.last]
        return self.neck(features[self.second_last], features[self.last])


class Neck(torch.nn.Module):
    """Stride-16 plus upsampled stride-32 features, smoothed by one 3x3 convolution."""

    def __init__(self, fine, coarse, channels=NECK_CHANNELS):
        super().__init__()
        self.fine = torch.nn.Conv2d(fine, channels, 1)
        self.coarse = torch.nn.Conv2d(coarse, channels, 1)
        self.smooth = torch.nn.Sequential(
            torch.nn.BatchNorm2d(channels), torch.nn.ReLU(inplace=True),
            torch.nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            torch.nn.BatchNorm2d(channels), torch.nn.ReLU(inplace=True))

    def forward(self, fine, coarse):
        """(N, fine, 2H, 2W) and (N, coarse, H, W) to (N, channels, 2H, 2W)."""
        coarse = torch.nn.functional.interpolate(self.coarse(coarse), scale_factor=2.0)
        return self.smooth(self.fine(fine) + coarse)


def build_backbone(name, stride=32, activation="prelu", timm_weights=False):
    """The feature extractor called `name` at output stride 16 or 32.

    activation: `prelu` or `relu`, for IRNets only. timm_weights: load timm's pretrained weights,
    which come from an installed package (see nets/packaged.py), timm's cache or the network. Raises
    UserError for unknown names and strides.
    """
    if stride not in (16, 32):
        raise UserError(f"stride must be 16 or 32, found {stride}")
    if name in OWN:
        if timm_weights:
            raise UserError(f"pretrained: timm: there are none for {name}; use none or the path of "
                            f"a released IRNet file or of a .pt of this repository")
        trunk = OWN[name](activation)
        channels, strides = trunk.channels, trunk.strides
    else:
        trunk = _timm_trunk(name, timm_weights)
        channels, strides = trunk.feature_info.channels(), trunk.feature_info.reduction()
    if 32 not in strides or 16 not in strides:
        raise UserError(f"backbone {name} has feature maps at strides {list(strides)}; strides 16 "
                        f"and 32 are needed")
    _avoid_crash(trunk)
    places = {s: i for i, s in enumerate(strides)}
    return Backbone(trunk, places[32], places[16], channels, stride)


def check_backbone(name):
    """Raises UserError, with the names near to it, where there is no such backbone."""
    if name not in OWN and not timm.is_model(name):
        known = [*OWN, *timm.list_models()]
        near = difflib.get_close_matches(name, known, 4, 0.5)
        raise UserError(f"unknown backbone {name!r}; near: {', '.join(near) or 'none'}; known: "
                        f"{', '.join(OWN)} and timm's models (timm.list_models())")


def _timm_trunk(name, pretrained):
    check_backbone(name)
    file = packaged.find(name) if pretrained else None
    overlay = {"state_dict": packaged.read(file, name)} if file else None
    try:
        return timm.create_model(name, pretrained=pretrained, features_only=True,
                                 pretrained_cfg_overlay=overlay)
    except Exception as error:
        # timm and its hub client raise a dozen kinds here; each means the same to the user.
        what = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if pretrained:
            raise UserError(f"pretrained: timm: the weights of {name} could not be had (no "
                            f"network, or none exist): {what}; use none or a path") from None
        raise UserError(f"backbone {name} gives no feature maps: {what}") from None


def _avoid_crash(trunk):
    """Strided 1x1 convolutions of a few channels, as in MobileOne's stem, take thinned-out input.

    torch 2.14 on CPUs with AVX2 writes out of bounds in their backward pass in channels_last, where
    a convolution of stride 1 is safe; what comes out is the same.
    """
    for conv in trunk.modules():
        if isinstance(conv, torch.nn.Conv2d) and conv.kernel_size == (1, 1) \
                and conv.stride != (1, 1) and conv.in_channels < 8:
            conv.register_forward_pre_hook(functools.partial(_thin_out, conv.stride))
            conv.stride = (1, 1)


def _thin_out(stride, module, inputs):
    return (inputs[0][..., ::stride[0], ::stride[1]],)


def reparameterise(model):
    """Fuse the training branches of MobileOne-like blocks into single convolutions, in place."""
    return timm.utils.reparameterize_model(model, inplace=True)
