"""Weight decay applies to convolutions and matrices, not to PReLU slopes, norms or biases."""
import argparse

import pytest
import torch

from nets.backbone import build_backbone
from utils.training.optim import make_optimizer

NORMS = (torch.nn.modules.batchnorm._NormBase, torch.nn.LayerNorm, torch.nn.GroupNorm)


@pytest.mark.parametrize(("name", "kinds"), [
    ("irnet18", {"weight", "norm", "slope", "bias"}),
    ("resnet18", {"weight", "norm", "bias"}),
    ("mobilenetv3_small_050", {"weight", "norm", "bias"})])
def test_weight_decay_applies_only_to_convolutions(name, kinds):
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
    # Every parameter was in the optimiser once, and every kind was present.
    assert not decay
    assert found == kinds
