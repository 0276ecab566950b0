"""The training loop: `train` runs the stages of a training, the Trainer runs the epochs of each.

Read in this order: train, Trainer.train_stage, train_one_epoch, train_step, evaluate and
save_checkpoint. setup.py builds what they work on.
"""
from __future__ import annotations

import argparse
import contextlib
import math
import pathlib
import time
from collections.abc import Callable, Iterator

import numpy
import torch
import tqdm

from nets.model import count_parameters, gmacs
from utils import checkpoint, experiment, machine, plots
from utils.args import save_args
from utils.errors import UserError, as_note, shell_word
from utils.evaluation import predict
from utils.training import control, ddp, optim, saving, setup
from utils.training.loader import loader_error, next_batch
from utils.training.recipe import recipe_of
from utils.training.stages import Stage, plan, stage_of
from utils.training.state import TrainState

# Seconds that a GPU may run ahead of the host, and the delay of shown losses and of a stop.
FLUSH_SECONDS = 0.5


def train(args: argparse.Namespace, resume: bool = False, stop: control.Stop | None = None,
          check: Callable[[argparse.Namespace], None] | None = None) -> pathlib.Path | None:
    """Train an experiment: best.pt, last.pt, results.csv, curves.png, args.yaml.

    Args:
        args: settings of the experiment.
        resume: continue from last.pt.
        stop: tested after each step, on a GPU twice a second.
        check: called with the settings on every rank before anything is written; raises UserError.

    Returns:
        The experiment's folder, or None if the training was stopped and saved to be resumed.

    Raises:
        UserError: for settings, data or files that cannot be used, and after too many faults.
    """
    optim.make_deterministic(args.deterministic)
    ranks = ddp.start(args.device)
    # Every machine needs the files, and all are told which is missing on one of them.
    for function in filter(None, (check, setup.check_settings)):
        ranks.run_on_all(function, args)
    folder = ranks.broadcast_result(lambda: experiment.find_experiment(args.exp) if resume
                                    else experiment.new_experiment(args.exp))
    with ranks.run_on_all(experiment.Lock if ranks.is_main else contextlib.nullcontext, folder):
        try:
            return _train_stages(args, folder, ranks, resume, stop or control.Stop())
        except RuntimeError as error:
            raise loader_error(error, folder) from None


def _train_stages(args, folder, ranks, resume, stop):
    saved = ranks.broadcast_result(_read_last, folder) if resume else None
    trainer = Trainer(args, folder, ranks, stop)
    stages = plan(args)
    first = 0
    if saved is not None:
        first = stage_of(saved, stages, folder / "last.pt")
        complete = (first, saved.get("epoch")) == (stages[-1].number, stages[-1].epochs)
        settings = stages[first].settings
        changes = checkpoint.changed_settings(saved.get("args"), settings)
        trainer.log_changes(changes, settings if complete else None)
    elif resume:
        trainer.log(f"resume: {folder.name}: nothing is saved yet, training starts anew")
    for stage in stages[first:]:
        epoch, step = trainer.setup_stage(stage, saved)
        saved = None
        if not trainer.train_stage(epoch, step, is_last=stage is stages[-1]):
            if not control.is_supervised():
                trainer.log(f"stopped and saved; go on with: python main.py --resume --exp "
                            f"{shell_word(folder.name)}")
            return None
        trainer.keep_stage()
    ddp.stop()
    if ranks.is_main:
        trainer.record_experiment()
        with as_note(folder / "curves.png"):
            plots.plot_curves(folder)
    return folder


def _read_last(folder):
    """Read last.pt; None if nothing is saved yet."""
    if (folder / "last.pt").exists():
        return checkpoint.read(folder / "last.pt")
    if (folder / "curves.png").exists():
        raise UserError(f"{folder}: training is complete, and last.pt, which --resume needs, is "
                        f"missing; train under another name, with --pretrained "
                        f"{shell_word(folder / 'best.pt')}")
    return None


class Trainer:
    """Runs the stages of a training.

    Attributes:
        settings: of the experiment; those of a stage are state.stage.settings.
        folder: weights/<exp>.
        ranks: process group.
        stop: tells whether to stop.
        state: TrainState of the current stage, None before the first.
        saver: writes best.pt and last.pt.
        board: TensorBoard writer on rank 0, or None.
    """

    def __init__(self, settings: argparse.Namespace, folder: pathlib.Path, ranks: ddp.Ranks,
                 stop: control.Stop, state: TrainState | None = None):
        self.settings, self.folder, self.ranks, self.stop = settings, folder, ranks, stop
        self.state = state
        self.saver = saving.Saver(folder, ranks)
        self.board = ranks.run_on_all(experiment.tensorboard_writer, folder, ranks.is_main) \
            if settings.tensorboard else None

    def log(self, text: str) -> None:
        """Print on rank 0."""
        if self.ranks.is_main:
            print(text)

    def log_changes(self, changes: list[tuple], complete: argparse.Namespace | None) -> None:
        """Log the settings that a resumed training changes.

        Args:
            changes: (name, value in last.pt, new value).
            complete: settings of the last stage if all epochs are done. The old values are then
                kept, because the weights were not trained with the new ones.
        """
        for name, old, new in changes:
            if complete is not None:
                setattr(complete, name, old)
                if not recipe_of(self.settings).stages:
                    setattr(self.settings, name, old)
            self.log(f"resume: {name} " + (f"changed from {old} to {new}" if complete is None else
                                           f"stays {old}, as all epochs are done"))

    def setup_stage(self, stage: Stage, saved: dict | None = None) -> tuple[int, int]:
        """Build the state of a stage, or restore it.

        Args:
            stage: stage to train.
            saved: content of last.pt to restore, None for a new stage.

        Returns:
            Epoch and optimiser step to start from.

        Raises:
            UserError: if the state cannot be built or restored.
        """
        previous = None if self.state is None or stage.fresh else self.state.state_dict()
        kept_batch = None if self.state is None else self.state.plan.state_dict()
        # Free memory and loader processes of the previous stage first.
        self.state = None
        self.state = state = setup.build_state(stage, self.folder, self.ranks, self.log, previous,
                                               saved, kept_batch)
        epoch, step = 0, 0
        if saved is not None:
            epoch, step = state.restore(saved, self.folder / "last.pt")
            self.log(f"resume: {self.folder.name}: {state.title}" + (
                "all epochs are done" if epoch == state.args.epochs else
                f"goes on at epoch {epoch + 1}, step {step + 1}"))
        elif stage.number:
            epochs = self.ranks.broadcast_result(experiment.read_epochs, self.folder)
            state.started_at -= epochs[-1]["seconds"]
            if previous is not None:
                state.load_state_dict(previous)
            # The stage overwrites best.pt, which its weights or its pseudo-labels came from.
            self.save_checkpoint(0, 0)
        if self.ranks.is_main:
            with saving.resumable(self.folder):
                save_args(self.settings, self.folder / "args.yaml")
                recipe_of(self.settings).save(self.folder)
        return epoch, step

    def keep_stage(self) -> None:
        """Keep the best and the last weights of a complete stage of a recipe."""
        if recipe_of(self.settings).stages:
            stage = self.state.stage
            self.saver.keep_stage(stage.name, {
                **self._description(), "epoch": stage.first_epoch + stage.epochs,
                "weights": self.state.averaged.state_dict()})

    def train_stage(self, start_epoch: int = 0, step: int = 0, is_last: bool = True) -> bool:
        """Train the stage from optimiser step `step` of `start_epoch` to its end.

        Args:
            start_epoch: first epoch.
            step: optimiser step of that epoch to start at.
            is_last: whether no other stage follows.

        Returns:
            Whether the stage is complete; False if asked to stop.
        """
        epochs = self.state.args.epochs
        for epoch in range(start_epoch, epochs):
            if not self.train_one_epoch(epoch, step):
                return False
            step = 0
            self.evaluate(epoch)
            ended = epoch + 1 == epochs
            stopping, save_due = self.ranks.all_reduce_sum(
                not (ended and is_last) and self.stop.requested,
                self.saver.is_due(self.state.args.save_minutes, after_epoch=True))
            if ended or stopping or save_due:
                self.save_checkpoint(epoch + 1, 0)
            if stopping:
                return False
        return True

    def train_one_epoch(self, epoch: int, start: int = 0) -> bool:
        """Train from optimiser step `start` of an epoch to its end.

        Returns False if a stop was requested before the last step. Saves last.pt within the epoch
        every `save_minutes`, and before it returns False.
        """
        state, sampler = self.state, self.state.sampler
        state.model.train()
        sampler.set_epoch(epoch, start)
        flushed_at = time.monotonic()
        interval = 1
        batches = machine.start_workers(state.loader)
        with tqdm.tqdm(total=sampler.steps, initial=start, disable=not self.ranks.is_main,
                       desc=f"{state.title}epoch {epoch + 1}/{state.args.epochs}", leave=False,
                       mininterval=0.5) as bar:
            for step in range(start, sampler.steps):
                # Seeded per step, so that dropout draws the same numbers after a resume.
                state.seeder.seed((state.args.seed, epoch, step, self.ranks.rank))
                self.train_step(batches, epoch * sampler.steps + step)
                is_last = step + 1 == sampler.steps
                if len(state.pending) < interval and not is_last:
                    continue
                save_due = self.saver.is_due(state.args.save_minutes)
                bar.update(len(state.pending))
                loss, stopping, save_due, interval = self.flush_metrics(save_due, flushed_at)
                flushed_at = time.monotonic()
                bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
                if not is_last and (stopping or save_due):
                    self.save_checkpoint(epoch, step + 1)
                    if stopping:
                        return False
        return True

    def train_step(self, batches: Iterator, number: int) -> None:
        """Take optimiser step `number` of the stage, over all its micro-batches.

        Nothing is read from the device, so that a GPU does not wait for the host. What
        flush_metrics needs later is kept in state.pending and state.unreadable.
        """
        state, device, guard = self.state, self.ranks.device, self.state.guard
        accumulate = state.sampler.accumulate
        guard.begin()
        trained, total = [], None
        for micro in range(accumulate):
            images, landmarks, indices, unreadable = next_batch(batches)
            trained += indices.tolist()
            state.unreadable.update(set(unreadable.tolist()) - {-1})
            images = images.to(device, non_blocking=True).permute(0, 3, 1, 2)
            landmarks = landmarks.to(device, state.model.mean.dtype, non_blocking=True)
            # Ranks exchange gradients once per step, in the last micro-batch.
            local = micro < accumulate - 1 and self.ranks.world > 1
            with state.ddp_model.no_sync() if local else contextlib.nullcontext(), \
                    optim.fastest_convolutions():
                with torch.autocast(device.type, state.dtype, state.dtype is not None):
                    with guard.forward():
                        predicted = state.ddp_model(images)
                    if state.teacher is not None:
                        landmarks = state.teacher(images, landmarks)
                loss = state.loss(predicted, landmarks, indices)
                loss = loss / accumulate if accumulate > 1 else loss
                # The factor is 1 for a finite loss. A NaN or infinite loss makes every gradient
                # NaN, which the gradient exchange shows to all ranks.
                state.scaler.scale(loss).backward(1 + 0 * loss.detach())
            total = loss.detach() if total is None else total.double() + loss.detach()

        state.scaler.unscale_(state.optimizer)
        # Gradients are equal on all ranks, so all ranks decide alike without a message.
        norm, bad = guard.norm(state.args.clip)
        # A float16 overflow is expected while the scale can still be halved.
        overflow = bad & (state.scaler.scale(torch.ones_like(norm)) > 1) \
            if state.scaler.is_enabled() else torch.zeros_like(bad)
        guard.finish(number, bad)
        state.scaler.update()
        state.set_learning_rate(number + 1)
        state.pending.append((torch.stack([total, bad, overflow]), trained))

    def flush_metrics(self, save_due: bool, since: float) -> tuple[float, float, float, int]:
        """Read the results of all pending steps from the device and exchange them between ranks.

        Args:
            save_due: whether this rank wants a checkpoint.
            since: time.monotonic() of the last call.

        Returns:
            Mean loss of the last step, whether any rank asks to stop, whether any wants a
            checkpoint, and the number of steps until the next call.

        Raises:
            UserError: after too many bad steps or unreadable images.
        """
        state = self.state
        results, trained = zip(*state.pending)
        self.ranks.wait_for_all()
        # The only place where the host waits for the device.
        results = torch.stack(results).tolist()
        # One message for all that the ranks must agree on.
        stopping, save_due, any_unreadable, seconds, *losses = self.ranks.all_reduce_sum(
            self.stop.requested, save_due, len(state.unreadable), time.monotonic() - since,
            *(loss for loss, *_ in results))
        if any_unreadable:
            state.faults.add_unreadable(state.unreadable)
        losses = [loss / self.ranks.world for loss in losses]
        for loss, (_, bad, overflow), indices in zip(losses, results, trained):
            if not bad:
                state.losses.append(loss)
            if not overflow:
                state.faults.add_step(not bad, indices)
        state.pending, state.unreadable = [], set()
        # A CPU step is complete when the call returns, so each is read at once.
        interval = 1 if self.ranks.device.type == "cpu" else max(1, int(
            FLUSH_SECONDS * self.ranks.world * len(results) / seconds))
        return losses[-1], stopping, save_due, interval

    def evaluate(self, epoch: int) -> None:
        """Score the averaged weights on the validation list, keep the best and log the epoch.

        Without validation faces the last epoch is the best.
        """
        state, nme = self.state, math.nan
        # Batch norm statistics differ per process on CPUs; all ranks must evaluate one network.
        self.ranks.broadcast_buffers(state.averaged)
        state.averaged.eval()
        faces = state.prepared.lists["val"]
        if len(faces):
            predicted = predict.predict_list(
                predict.torch_predict(state.averaged, self.ranks.device), faces,
                state.prepared.margin, state.args.input_size, ranks=self.ranks,
                cache=state.val_cache)
            errors, _ = predict.list_nme(predicted, faces, state.scheme, state.prepared.scheme)
            scored = errors[~numpy.isnan(errors)]
            nme = 100 * float(scored.mean()) if len(scored) else math.inf
            if not len(scored) and not epoch:
                self.log("note: no validation face can be scored, for want of the points whose "
                         "distance divides NME: the last epoch is the best")
        self.ranks.broadcast_result(self._log_epoch, epoch, nme)
        if len(faces):
            state.best = min(state.best, nme)
        state.losses = []

    def _log_epoch(self, epoch, nme):
        """Keep the weights of the stage's best epoch; write a line to results.csv and stdout."""
        state = self.state
        lr, number = state.optimizer.param_groups[0]["lr"], state.stage.first_epoch + epoch + 1
        loss = sum(state.losses) / max(1, len(state.losses))
        better = nme < state.best or state.best == math.inf
        if better:
            self.saver.keep_best({**self._description(), "epoch": number, "val_nme": nme},
                                 state.averaged.state_dict())
        with saving.resumable(self.folder):
            experiment.append_epoch(self.folder, {
                "epoch": number, "lr": lr, "loss": loss, "val_nme": nme,
                "seconds": round(state.seconds, 1), "stage": state.stage.name})
        if self.board is not None:
            for name, value in (("loss", loss), ("val_nme", nme), ("lr", lr)):
                self.board.add_scalar(name, value, number)
            self.board.flush()
        skipped = f", {state.faults.skipped} steps skipped" if state.faults.skipped else ""
        score = "none" if math.isnan(nme) else f"{nme:.3f}"
        print(f"{state.title}epoch {epoch + 1:>3}/{state.args.epochs}  lr {lr:.2e}  "
              f"loss {loss:.4f}  val NME {score}{' *' if better else ''}  "
              f"{state.seconds:.0f} s{skipped}", flush=True)

    def _description(self):
        """Return what best.pt and last.pt hold beside the weights."""
        state = self.state
        return checkpoint.describe(state.stage.settings, state.scheme, state.prepared.crop,
                                   state.neighbour_face, sets=state.data_sets)

    def record_experiment(self) -> None:
        """Write the experiment's line of weights/results.csv."""
        state = self.state
        args = state.stage.settings
        best = checkpoint.load_model(self.folder / "best.pt")
        with as_note(self.folder.parent / "results.csv"):
            experiment.record({
                "exp": self.folder.name, "data": experiment.data_name(args, state.prepared.folder),
                "scheme": state.scheme.name, "backbone": args.backbone, "head": args.head,
                "lr": args.lr, "epochs": state.stage.first_epoch + state.stage.epochs,
                "batch": state.schedule_signature[1], "parameters": count_parameters(best),
                "gmacs": f"{gmacs(best, args.input_size):.2f}",
                "val_nme": f"{state.best:.3f}" if math.isfinite(state.best) else ""},
                self.folder.parent)

    def save_checkpoint(self, epoch: int, step: int) -> None:
        """Write last.pt, to continue with the same bits from optimiser step `step` of `epoch`.

        No random state is saved: the order of faces, augmentation, dropout and the learning rate
        follow from seed, epoch, step and rank. New best weights are written to best.pt.

        Raises:
            UserError: on every rank, if a file cannot be written.
        """
        self.saver.save({**self._description(), **self.state.snapshot(epoch, step)})
