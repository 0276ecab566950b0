"""What weight decay pulls on: convolutions and matrices; no PReLU slope, norm or bias."""
import argparse

import pytest
import torch

from nets.backbone import build_backbone
from utils.training.engine import make_optimizer

NORMS = (torch.nn.modules.batchnorm._NormBase, torch.nn.LayerNorm, torch.nn.GroupNorm)


@pytest.mark.parametrize(("name", "kinds"), [
    ("irnet18", {"weight", "norm", "slope", "bias"}),
    ("resnet18", {"weight", "norm", "bias"}),
    ("mobilenetv3_small_050", {"weight", "norm", "bias"})])
def test_weight_decay_is_on_convolutions_alone(name, kinds):
    model = torch.nn.Sequential(build_backbone(name), torch.nn.Conv2d(8, 8, 1))
    optimizer = make_optimizer(model, argparse.Namespace(weight_decay=0.05, lr=0.001))
    decay = {id(parameter): group["weight_decay"] for group in optimizer.param_groups
             for parameter in group["params"]}
    found = set()
    for module in model.modules():
        for part, parameter in module.named_parameters(recurse=False):
            kind = ("norm" if isinstance(module, NORMS) else
                    "slope" if isinstance(module, torch.nn.PReLU) else part)
            assert decay.pop(id(parameter)) == (0.05 if kind == "weight" else 0), (module, part)
            found.add(kind)
    # Every parameter is looked at once, and each kind was there to look at.
    assert not decay
    assert found == kinds
