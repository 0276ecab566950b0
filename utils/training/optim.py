"""Optimisation: precision, optimiser, learning-rate schedule and weight average."""
from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator

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


@contextlib.contextmanager
def fastest_convolutions() -> Iterator[None]:
    """Let cuDNN measure which algorithm is fastest for each size, unless it must be deterministic.

    For forward and backward passes only: their sizes do not change from step to step, while each
    measurement takes longer than the convolution.
    """
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = not torch.are_deterministic_algorithms_enabled()
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


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
