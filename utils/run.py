"""A training in progress: all that changes while it runs, saved and restored as one."""
import argparse
import dataclasses
import pathlib
import time
import typing

import timm.layers
import timm.optim
import timm.scheduler
import timm.utils
import torch

from utils import checkpoint
from utils.dataset import EpochSampler
from utils.distributed import Ranks
from utils.engine import Faults
from utils.errors import UserError
from utils.launch import Stop


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
    teacher: typing.Callable | None = None
    round: int = 0
    title: str = ""
    before: int = 0  # Steps of the learning-rate schedule in earlier rounds.
    losses: list = dataclasses.field(default_factory=list)
    best: float = float("inf")
    begun: float = dataclasses.field(default_factory=time.monotonic)

    @property
    def seconds(self):
        """How long it has trained, earlier starts of a resumed run included."""
        return time.monotonic() - self.begun

    @property
    def measure(self):
        """Optimiser steps in an epoch and faces in a step: a change would shift the schedule."""
        sampler = self.sampler
        return [sampler.steps, sampler.batch * sampler.accumulate * sampler.world]

    def save(self, epoch, step):
        """Write last.pt: everything to go on from optimiser step `step` of `epoch`, bit by bit.

        The order of faces, augmentation and dropout follow from seed, epoch, step and rank, and the
        learning rate from the step, so there is no random state or schedule to keep. Raises
        UserError, on every rank.
        """
        self.ranks.share(checkpoint.save, {
            **self.description, "round": self.round, "epoch": epoch, "step": step,
            "measure": self.measure,
            **self.carried(), "scaler": self.scaler.state_dict(),
            "best": self.best, "losses": self.losses, "skipped": self.faults.skipped,
            "in_a_row": self.faults.in_a_row, "seconds": self.seconds}, self.folder / "last.pt")

    def restore(self, state):
        """Take over a state of save(); returns (epoch, step) to go on from. Raises UserError."""
        if state.get("measure", self.measure) != self.measure:
            raise UserError(f"{self.folder / 'last.pt'}: had {state['measure']} steps an epoch and "
                            f"faces a step, now it would be {self.measure}; the training list, "
                            f"--batch-size and the number of processes must fit")
        try:
            if not all(torch.isfinite(v).all() for v in state["model"].values()):
                raise ValueError("it holds weights that are not finite numbers")
            self.carry_on(state)
            for parameter, moments in self.optimizer.state.items():
                if any(m.numel() > 1 and m.shape != parameter.shape for m in moments.values()):
                    raise ValueError("the optimiser's moments do not fit the parameters")
            if state["scaler"]:
                self.scaler.load_state_dict(state["scaler"])
            self.best, self.losses = float(state["best"]), list(state["losses"])
            self.faults.skipped, self.faults.in_a_row = state["skipped"], state["in_a_row"]
            self.begun = time.monotonic() - state["seconds"]
            epoch, step = state["epoch"], state["step"]
            if not (0 <= epoch <= self.args.epochs and 0 <= step < self.sampler.steps):
                raise ValueError(f"epoch {epoch}, step {step} is outside the run")
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(f"{self.folder / 'last.pt'}: cannot be resumed from: "
                            f"{' '.join(str(error).split())[:160]}") from None
        self.schedule(epoch * self.sampler.steps + step)
        return epoch, step

    def carried(self):
        """What a save holds and the next round goes on from: model, average and moments."""
        return {"model": self.model.state_dict(), "ema": self.ema and self.ema.module.state_dict(),
                "optimizer": self.optimizer.state_dict()}

    def carry_on(self, before):
        """Take over what `carried` gave; the optimiser's settings stay today's."""
        self.model.load_state_dict(before["model"])
        if self.ema is not None:
            self.ema.module.load_state_dict(before["ema"])
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": before["optimizer"]["state"],
                                        "param_groups": groups})

    def schedule(self, steps):
        """Set the learning rate as after so many optimiser steps of this training."""
        self.scheduler.step_update(self.before + steps)


def optimisation(model, args, steps, before=0, whole=None, fresh=True):
    """(AdamW, warm-up and cosine, weight average or None) of a training.

    args: resolved knobs. steps: optimiser steps an epoch. before, whole: epochs of the cosine that
    were before this training, and all of them (default: the training is the whole). fresh: whether
    its weights are; the average of others has its full memory from the first step.
    """
    optimizer = torch.optim.AdamW(
        timm.optim.param_groups_weight_decay(model, args.weight_decay), args.lr)
    total = steps * (whole or args.epochs)
    scheduler = timm.scheduler.CosineLRScheduler(
        optimizer, t_initial=total, lr_min=args.min_lr, t_in_epochs=False,
        warmup_t=min(round(args.warmup_epochs * steps), total - 1), warmup_lr_init=args.lr / 10)
    scheduler.step_update(steps * before)
    ema = None
    if args.ema:
        # Never below a few steps' memory, nor so long that the random start stays in.
        # With update_after_step timm copies the weights in the first step after it, here none.
        ema = timm.utils.ModelEmaV3(model, 1 - 1 / max(2.0, args.ema * total), use_warmup=fresh,
                                    update_after_step=0 if fresh else -2)
    return optimizer, scheduler, ema


def parallelise(model, ranks):
    """(the model, how to call it in training) on one process or, with DDP, on several."""
    if ranks.world == 1:
        return model, model
    if ranks.device.type == "cuda":
        # timm's, because torch's would drop the activations inside timm's norm layers.
        model = timm.layers.convert_sync_batchnorm(model)
    return model, torch.nn.parallel.DistributedDataParallel(
        model, [ranks.device.index] if ranks.device.type == "cuda" else None)
