"""Optimisation: precision, optimiser, learning-rate schedule, weight average, guarded steps."""
from __future__ import annotations

import argparse
import os
from collections.abc import Iterable

import timm.optim
import timm.scheduler
import timm.utils
import torch

from utils.errors import UserError

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def make_deterministic(enabled: bool) -> None:
    """Enable or disable deterministic algorithms. Call before the first use of a GPU.

    When enabled, torch raises a RuntimeError that names the operation if a GPU has no deterministic
    algorithm for it.
    """
    if enabled:
        # cuBLAS reads the variable at start-up. Without it torch refuses matrix products.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(enabled)


def choose_precision(name: str, device: torch.device,
                     model: torch.nn.Module) -> torch.dtype | None:
    """Choose the autocast dtype for training; None stands for float32.

    `auto` is bf16 on GPUs that have it and fp16 on others. On CPUs it is bf16 with AVX512-BF16 or
    AMX, unless the network has grouped convolutions, which are fastest in float32 there. float32
    products on GPUs use TF32, which keeps 10 of 23 mantissa bits, unless deterministic algorithms
    are enabled.

    Raises:
        UserError: for fp16 on a CPU.
    """
    if device.type == "cuda":
        tf32 = not torch.are_deterministic_algorithms_enabled()
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    if name == "auto":
        if device.type == "cuda":
            name = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        else:
            fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
            grouped = any(getattr(m, "groups", 1) > 1 for m in model.modules())
            name = "bf16" if fast and not grouped else "fp32"
    if name == "fp16" and device.type == "cpu":
        raise UserError("precision fp16 needs a GPU; use auto, bf16 or fp32")
    return PRECISIONS[name]


def precision_name(dtype: torch.dtype | None) -> str:
    """Return the --precision name of an autocast dtype."""
    return next(name for name, known in PRECISIONS.items() if known == dtype)


def make_optimizer(model: torch.nn.Module, args: argparse.Namespace) -> torch.optim.Optimizer:
    """Build AdamW without weight decay on norms, biases and PReLU slopes (1-D parameters).

    The optimiser is fused on GPUs, where it can skip a step without the host. On CPUs the fused one
    saves only 2 % of a step and rounds differently.
    """
    groups = timm.optim.param_groups_weight_decay(model, args.weight_decay)
    return torch.optim.AdamW(groups, args.lr, fused=next(model.parameters()).is_cuda or None)


def make_scheduler(optimizer: torch.optim.Optimizer, args: argparse.Namespace, epoch_steps: int,
                   total_steps: int) -> timm.scheduler.CosineLRScheduler:
    """Build a cosine schedule to min_lr over total_steps whose start is a linear warm-up."""
    return timm.scheduler.CosineLRScheduler(
        optimizer, t_initial=total_steps, lr_min=min(args.min_lr, args.lr), t_in_epochs=False,
        warmup_t=min(round(args.warmup_epochs * epoch_steps), total_steps - 1),
        warmup_lr_init=args.lr / 10)


def make_ema(model: torch.nn.Module, share: float, total_steps: int,
             fresh: bool = True) -> timm.utils.ModelEmaV3 | None:
    """Build the exponential moving average (EMA) of a model's weights.

    Args:
        model: network whose weights are averaged.
        share: averaging window as a share of all steps; 0 for no average.
        total_steps: optimiser steps of the schedule.
        fresh: whether the weights are newly initialised. The decay then warms up. The average of
            trained weights has its full window from the first step.
    """
    if not share:
        return None
    # A window of two steps at least. The warm-up keeps random initial weights out of long windows.
    # With update_after_step timm copies the weights at the step after it; -2 never copies.
    return timm.utils.ModelEmaV3(model, 1 - 1 / max(2.0, share * total_steps), use_warmup=fresh,
                                 update_after_step=0 if fresh else -2)


def guarded_step(optimizer: torch.optim.Optimizer, ema: timm.utils.ModelEmaV3 | None,
                 model: torch.nn.Module, number: int, bad: torch.Tensor) -> None:
    """Step the optimiser, then update the weight average, unless the step is bad.

    The host does not wait for `bad` if the optimiser is fused: the kernels on the device test it.

    Args:
        optimizer: optimiser with gradients.
        ema: average of the model's weights, or None.
        model: network, whose buffers are already restored if the step is bad.
        number: index of the step in the stage, for the warm-up of the average.
        bad: bool scalar on the parameters' device.
    """
    if optimizer.defaults.get("fused"):
        optimizer.found_inf = bad.float()
        optimizer.step()
        if ema is not None:
            _update_ema(ema.module, model, (1 - ema.get_decay(number)) * ~bad)
    elif not bad:
        optimizer.step()
        if ema is not None:
            ema.update(model, number)


@torch.no_grad()
def _update_ema(average, model, weight):
    """Do what ModelEmaV3.update does, with a weight (1 - decay) that is a tensor on the device."""
    pairs = list(zip(average.state_dict().values(), model.state_dict().values()))
    old, new = zip(*(pair for pair in pairs if pair[0].is_floating_point()))
    differences = torch._foreach_sub(new, old)
    torch._foreach_mul_(differences, weight)
    torch._foreach_add_(old, differences)
    for old, new in pairs:
        if not old.is_floating_point():
            old.copy_(new)


class BufferSnapshot:
    """Copies of a model's buffers, to undo what a bad step's forward pass changed.

    Buffers of one dtype are copied as one tensor, because launching a copy takes a GPU longer than
    copying a small tensor.
    """

    def __init__(self, buffers: Iterable[torch.Tensor]):
        self.groups = {}
        for buffer in buffers:
            self.groups.setdefault(buffer.dtype, []).append(buffer)
        self.values = {dtype: _flatten(group) for dtype, group in self.groups.items()}

    def restore_if(self, bad: torch.Tensor) -> None:
        """Restore the buffers where `bad`, a bool scalar on their device, is true."""
        for dtype, group in self.groups.items():
            values = torch.where(bad, self.values[dtype], _flatten(group))
            parts = values.split([buffer.numel() for buffer in group])
            torch._foreach_copy_(group, [p.view_as(b) for p, b in zip(parts, group)])


def _flatten(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors])
