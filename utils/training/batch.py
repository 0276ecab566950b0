"""Faces of an optimiser step, how processes share them, and the learning rate that fits them."""
from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Mapping

from utils.errors import UserError


@dataclasses.dataclass(frozen=True)
class BatchPlan:
    """How many faces an optimiser step has.

    `effective_batch` faces are asked for. Where the processes hold fewer at once, each accumulates
    micro-batches. Where they hold more, the step has all of them and the learning rate is larger by
    the square root of the ratio: the rule for Adam (Malladi et al., arXiv 2205.10287; for SGD it
    would be the ratio itself). Both follow from the processes and the batch size that a training
    began with, so a resumed one keeps them with any number of processes.

    Attributes:
        batch: faces per process and forward pass.
        world: number of processes.
        accumulate: micro-batches of each process in a step.
        at_once: faces that all processes together held in a forward pass when the training began.
        scales: whether the learning rate follows the rule; not in a training that began without it.
        asked: effective_batch.
    """
    batch: int
    world: int
    accumulate: int
    at_once: int
    scales: bool
    asked: int

    @property
    def faces(self) -> int:
        """Faces of an optimiser step."""
        return self.batch * self.world * self.accumulate

    @property
    def lr_factor(self) -> float:
        """What the learning rates of the settings are multiplied by, 1 or more."""
        return math.sqrt(max(1.0, self.at_once / self.asked)) if self.scales else 1.0

    def scaled(self, args: argparse.Namespace) -> argparse.Namespace:
        """Return settings with learning rates that fit the step."""
        return argparse.Namespace(**{**vars(args), "lr": args.lr * self.lr_factor,
                                     "min_lr": args.min_lr * self.lr_factor})

    def state_dict(self) -> dict:
        """Return what last.pt keeps of it."""
        return {"at_once": self.at_once, "scales": self.scales}

    def __str__(self) -> str:
        text = (f"{self.batch} a process x {self.world} processes x {self.accumulate} accumulated "
                f"= {self.faces} a step (asked {self.asked})")
        if self.lr_factor == 1:
            return text
        return (f"{text}, learning rate x {self.lr_factor:.3g} (the square root of {self.at_once} "
                f"/ {self.asked})")


def plan_batch(args: argparse.Namespace, world: int, kept: Mapping | None = None,
               faces: int | None = None) -> BatchPlan:
    """Plan the optimiser steps of a stage.

    Args:
        args: settings of the stage.
        world: number of processes.
        kept: state_dict of the plan that the training began with; None if it begins now.
        faces: faces of a step of the stage that is resumed; None if it begins now.

    Raises:
        UserError: if the processes cannot share the faces of a resumed step.
    """
    now = args.batch_size * world
    if faces is None:
        at_once = kept["at_once"] if kept else now
        faces = at_once * max(1, round(args.effective_batch / at_once))
    elif kept is None:
        # A last.pt without a plan: its training did not scale the learning rate.
        at_once = now if faces % now == 0 and faces <= args.effective_batch else faces
        kept = {"at_once": at_once, "scales": False}
    if faces % now:
        raise UserError(_advice(args.batch_size, world, faces))
    return BatchPlan(args.batch_size, world, faces // now, (kept or {}).get("at_once", now),
                     (kept or {}).get("scales", True), args.effective_batch)


def _advice(batch, world, faces):
    problem = (f"a step of this training has {faces} faces, which {world} processes x --batch-size "
               f"{batch} do not divide")
    if faces % world == 0:
        sizes = [size for size in range(1, faces // world + 1) if faces // world % size == 0]
        best = max((size for size in sizes if size <= batch), default=sizes[0])
        return f"{problem}; give --batch-size {best}"
    fewer = max(count for count in range(1, world) if faces % count == 0)
    sizes = [size for size in range(1, faces // fewer + 1) if faces // fewer % size == 0]
    best = max(size for size in sizes if size <= max(batch, 1))
    return f"{problem}; use {fewer} processes with --batch-size {best}"
