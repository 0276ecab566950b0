"""TrainState: everything that training changes during one stage."""
from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import pathlib
import time
import typing

import numpy
import timm.utils
import torch

from nets.model import LandmarkNet
from utils.data.dataset import EpochSampler, PreparedSet
from utils.errors import UserError
from utils.landmarks.schemes import Scheme
from utils.training import distil
from utils.training.batch import BatchPlan
from utils.training.loader import FaultCounter
from utils.training.recipe import recipe_of
from utils.training.stages import Stage
from utils.training.step import StepGuard, StepSeeder


@dataclasses.dataclass
class TrainState:
    """State of one stage of training; last.pt is a snapshot of it.

    A training has one stage, or those of stages.plan.

    Attributes:
        stage: the stage that is trained.
        args: settings of the stage (Stage.args).
        prepared: prepared set.
        scheme: landmarks that the model predicts.
        neighbour_face: landmarks (K, 2) that the head's neighbours are chosen on, None for the
            scheme's mean face.
        data_sets: names of all sets behind the weights, for the checkpoints.
        digest: hash of the labelled training faces, to refuse others on --resume.
        model: the network.
        ddp_model: the network as called in training: wrapped in DDP and compiled if need be.
        ema: moving average of the weights, or None.
        teacher: moves the labels towards its own predictions, or None.
        loss: called with the model's output, landmarks (N, K, 2) in crop units and indices (N,) in
            the training list; returns a scalar.
        loader: batches of loader.make_loader.
        sampler: order of the faces.
        faults: counts skipped steps and unreadable images.
        dtype: autocast dtype, None for float32.
        scaler: gradient scaler, enabled for float16 only.
        optimizer: AdamW.
        scheduler: learning rate per optimiser step.
        plan: faces of an optimiser step, and the learning rate that fits them.
        cache: the kind of cache that holds the crops (cache.cache_name).
        best: lowest validation NME so far in %, infinity before the first epoch.
        losses: loss of each good step of the current epoch, mean over ranks.
        pending: (tensor [loss, bad, overflow] on the device, indices of the faces) of each step
            since the last flush_metrics.
        unreadable: indices of unreadable images met on this rank since the last flush_metrics.
        val_cache: crops of the validation list, after the first evaluation.
        seeder: seeds torch for each step.
        started_at: time.monotonic() of the start, moved back by the time of earlier runs.
    """
    stage: Stage
    args: argparse.Namespace
    prepared: PreparedSet
    scheme: Scheme
    neighbour_face: numpy.ndarray | None
    data_sets: list[str]
    digest: str
    model: LandmarkNet
    ddp_model: typing.Callable
    ema: timm.utils.ModelEmaV3 | None
    teacher: distil.Teacher | None
    loss: typing.Callable
    loader: typing.Iterable
    sampler: EpochSampler
    faults: FaultCounter
    dtype: torch.dtype | None
    scaler: torch.amp.GradScaler
    optimizer: torch.optim.Optimizer
    scheduler: typing.Any
    plan: BatchPlan | None = None
    cache: str = "none"
    best: float = math.inf
    losses: list[float] = dataclasses.field(default_factory=list)
    pending: list[tuple[torch.Tensor, list[int]]] = dataclasses.field(default_factory=list)
    unreadable: set[int] = dataclasses.field(default_factory=set)
    val_cache: list = dataclasses.field(default_factory=list)
    seeder: StepSeeder = dataclasses.field(default_factory=StepSeeder)
    started_at: float = dataclasses.field(default_factory=time.monotonic)

    @functools.cached_property
    def guard(self) -> StepGuard:
        """What applies the gradients of a step to model, average and optimiser."""
        return StepGuard(self.model, self.optimizer, self.ema,
                         cast=self.ddp_model is self.model)

    @property
    def averaged(self) -> LandmarkNet:
        """The network that is evaluated and published: the average, or the model without one."""
        return self.model if self.ema is None else self.ema.module

    @property
    def seconds(self) -> float:
        """Training time in seconds, including earlier runs of a resumed training."""
        return time.monotonic() - self.started_at

    @property
    def title(self) -> str:
        """Prefix of lines of output that names the stage; empty where there is only one."""
        if self.args.gssl:
            return f"{self.stage.name} ({self.stage.task}) "
        return f"{self.stage.name} " if recipe_of(self.args).stages else ""

    @property
    def schedule_signature(self) -> list[int]:
        """Optimiser steps per epoch and faces per step. Other values shift the schedule."""
        sampler = self.sampler
        return [sampler.steps, sampler.batch * sampler.accumulate * sampler.world]

    def set_learning_rate(self, steps: int) -> None:
        """Set the learning rate for after `steps` optimiser steps of this stage."""
        self.scheduler.step_update(self.stage.start_epoch * self.sampler.steps + steps)

    def state_dict(self) -> dict:
        """Return model, average and optimiser state, which the next stage starts from."""
        return {"model": self.model.state_dict(), "ema": self.ema and self.ema.module.state_dict(),
                "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, saved: dict) -> None:
        """Load what `state_dict` returned; the optimiser keeps its present settings."""
        self.model.load_state_dict(saved["model"])
        if self.ema is not None:
            self.ema.module.load_state_dict(saved["ema"])
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": saved["optimizer"]["state"],
                                        "param_groups": groups})

    def snapshot(self, epoch: int, step: int) -> dict:
        """Return what last.pt holds to continue from optimiser step `step` of `epoch`.

        No random state is part of it: the order of faces, augmentation, dropout and the learning
        rate follow from seed, epoch, step and rank.
        """
        return {"stage": self.stage.number, "epoch": epoch, "step": step,
                "measure": self.schedule_signature, "batch": self.plan.state_dict(),
                "cache": self.cache, "faces": self.digest, **self.state_dict(),
                "scaler": self.scaler.state_dict(), "best": self.best, "losses": self.losses,
                "skipped": self.faults.skipped, "in_a_row": self.faults.in_a_row,
                "seconds": self.seconds}

    def restore(self, saved: dict, path: pathlib.Path) -> tuple[int, int]:
        """Restore a snapshot; return the epoch and the optimiser step to continue from.

        Args:
            saved: content of last.pt.
            path: its file, for error messages.

        Raises:
            UserError: if the file is damaged or the training would not be the same.
        """
        if saved.get("measure") != self.schedule_signature:
            raise UserError(f"{path}: had {saved.get('measure')} steps an epoch and faces a step, "
                            f"now it would be {self.schedule_signature}; the training list must "
                            f"have as many faces as before")
        if saved.get("faces") != self.digest:
            raise UserError(f"{path}: {self.prepared.folder} holds other training faces, or other "
                            f"landmarks, than those this training started with; start another one "
                            f"with a new --exp, perhaps with --pretrained")
        try:
            if not all(torch.isfinite(v).all() for v in saved["model"].values()):
                raise ValueError("it holds weights that are not finite numbers")
            self.load_state_dict(saved)
            for parameter, moments in self.optimizer.state.items():
                if any(m.numel() > 1 and m.shape != parameter.shape for m in moments.values()):
                    raise ValueError("the optimiser's moments do not fit the parameters")
            if saved["scaler"]:
                self.scaler.load_state_dict(saved["scaler"])
            self.best, self.losses = float(saved["best"]), list(saved["losses"])
            self.faults.skipped, self.faults.in_a_row = saved["skipped"], saved["in_a_row"]
            self.started_at = time.monotonic() - saved["seconds"]
            epoch, step = saved["epoch"], saved["step"]
            if not (0 <= epoch <= self.args.epochs and 0 <= step < self.sampler.steps):
                raise ValueError(f"epoch {epoch}, step {step} is outside the stage")
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(f"{path}: cannot be resumed from: "
                            f"{' '.join(str(error).split())[:160]}") from None
        self.set_learning_rate(epoch * self.sampler.steps + step)
        return epoch, step
