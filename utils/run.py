"""A training in progress: all that changes while it runs, saved and restored as one."""
import argparse
import dataclasses
import pathlib
import typing

import torch

from utils import checkpoint
from utils.dataset import EpochSampler
from utils.distributed import Ranks
from utils.engine import Faults, Stop
from utils.errors import UserError


@dataclasses.dataclass
class Run:
    """All that a training changes, so that a save is one look at it."""
    args: argparse.Namespace
    folder: pathlib.Path
    ranks: Ranks
    model: torch.nn.Module
    parallel: torch.nn.Module
    ema: typing.Any
    optimizer: torch.optim.Optimizer
    scheduler: typing.Any
    scaler: torch.amp.GradScaler
    dtype: torch.dtype | None
    loss: typing.Callable
    loader: torch.utils.data.DataLoader
    sampler: EpochSampler
    faults: Faults
    stop: Stop
    description: dict
    losses: list = dataclasses.field(default_factory=list)
    best: float = float("inf")
    seconds: float = 0.0

    def save(self, epoch, step):
        """Write last.pt: everything to go on from optimiser step `step` of `epoch`, bit by bit.

        The order of faces, augmentation and dropout follow from seed, epoch and step, so there is no
        random state to keep.
        """
        if self.ranks.first:
            checkpoint.save({
                **self.description, "epoch": epoch, "step": step, "model": self.model.state_dict(),
                "ema": self.ema and self.ema.module.state_dict(), "best": self.best,
                "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(),
                "scheduler": self.scheduler.state_dict(), "losses": self.losses,
                "skipped": self.faults.skipped, "in_a_row": self.faults.in_a_row,
                "seconds": self.seconds}, self.folder / "last.pt")

    def restore(self, state):
        """Take over a state of save(); returns (epoch, step) to go on from. Raises UserError."""
        for name, old, new in checkpoint.changed(state["args"], self.args):
            if self.ranks.first:
                print(f"resume: {name} changed from {old} to {new}")
        try:
            self.model.load_state_dict(state["model"])
            if self.ema is not None:
                self.ema.module.load_state_dict(state["ema"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scheduler.load_state_dict(state["scheduler"])
            self.scaler.load_state_dict(state["scaler"])
            self.best, self.losses = state["best"], state["losses"]
            self.faults.skipped, self.faults.in_a_row = state["skipped"], state["in_a_row"]
            self.seconds = state["seconds"]
            return state["epoch"], state["step"]
        except (KeyError, RuntimeError, ValueError) as error:
            raise UserError(f"{self.folder / 'last.pt'}: cannot be resumed from: {' '.join(str(error).split())[:160]}") \
                from None
