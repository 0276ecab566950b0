"""A training from its first step to its last: the Trainer, and `train`, which runs its rounds."""
import contextlib
import copy
import math
import pathlib
import time

import numpy
import torch
import tqdm

from nets.backbone import check_backbone
from nets.model import check_maps, check_size, gmacs, parameters
from utils import checkpoint, experiment
from utils.args import save_args
from utils.data import dataset, unlabelled
from utils.data.sets import set_folder
from utils.errors import UserError
from utils.evaluation import predict
from utils.landmarks.schemes import model_scheme
from utils.training import ddp, distil, engine, gssl, launch
from utils.training.loss import build_loss

# How long a GPU may run ahead of the host; losses are shown, and a stop is answered, that late.
READ_SECONDS = 0.5
# Settings that some models have no use for, as they do nothing.
NEUTRAL = {"eye_weight": 1, "shut": 0, "merge": "plain", "activation": "prelu"}


def train(args, resume=False, stop=None):
    """Train an experiment: best.pt, last.pt, results.csv, curves.png, args.yaml.

    resume: go on from last.pt. stop: a launch.Stop, looked at after each step, on a GPU twice a
    second. Returns the experiment's folder, or None where it was stopped (saved, to be resumed).
    Raises UserError.
    """
    check(args)
    engine.make_deterministic(args.deterministic)
    ranks = ddp.start(args.device)
    # Another machine may not see what the experiment was begun with.
    args = ranks.share(lambda: args)
    folder = ranks.share(lambda: experiment.find_experiment(args.exp) if resume
                         else experiment.new_experiment(args.exp))
    with ranks.together(experiment.Lock if ranks.first else contextlib.nullcontext, folder):
        try:
            return _train_rounds(args, folder, ranks, resume, stop or launch.Stop())
        except RuntimeError as error:
            raise engine.loader_mistake(error, folder) from None


def check(args):
    """What can be said of settings before faces are drawn or read. Raises UserError."""
    check_backbone(args.backbone)
    check_size(args.input_size, args.stride)
    begun = [] if args.pretrained in ("none", "timm") else [pathlib.Path(args.pretrained)]
    for path in (*begun, *checkpoint.teachers(args.teacher)):
        if not path.exists():
            raise UserError(f"{path}: no such file")
    if args.gssl:
        unlabelled.check(args.unlabelled_dir)


def _tell_useless(args, scheme, log):
    """Say which settings change nothing in this training, and why."""
    for reason, holds, names in (
            (f"scheme {scheme.name} has no regions right eye and left eye", scheme.eyes is None,
             ("eye_weight", "shut")),
            ("the regression head has no maps", args.head == "regression", ("eye_weight", "merge")),
            (f"{args.backbone} is no IRNet", not args.backbone.startswith("irnet"),
             ("activation",))):
        useless = [f"--{name.replace('_', '-')}" for name in names
                   if getattr(args, name) != NEUTRAL[name]]
        if holds and useless:
            log(f"note: {reason}: {' and '.join(useless)} without effect")


def _train_rounds(args, folder, ranks, resume, stop):
    state = ranks.share(_read_last, folder) if resume else None
    trainer = Trainer(args, folder, ranks, stop)
    rounds = gssl.plan(args)
    if state is not None:
        done = (state.get("round", 0), state.get("epoch")) == (rounds[-1].number, rounds[-1].epochs)
        for name, old, new in checkpoint.changed(state.get("args"), args):
            if done:
                # What was trained so must not be recorded as something else.
                setattr(args, name, old)
            trainer.log(f"resume: {name} " + (f"stays {old}, as all epochs are done" if done else
                                              f"changed from {old} to {new}"))
    if resume and state is None:
        trainer.log(f"resume: {folder.name}: nothing is saved yet, it begins anew")
    for round in rounds[0 if state is None else state.get("round", 0):]:
        faces, loss = trainer.begin(round, state)
        if not trainer.fit(faces, loss, state, last=round is rounds[-1]):
            if not launch.has_parent():
                trainer.log(f"stopped and saved; go on with: python main.py --resume --exp "
                            f"{folder.name}")
            return None
        state = None
    ddp.stop()
    if ranks.first:
        experiment.plot_curves(folder)
        trainer.record()
    return folder


def _read_last(folder):
    """last.pt, or None where nothing is saved yet. Raises UserError."""
    if (folder / "last.pt").exists():
        return checkpoint.read(folder / "last.pt")
    if (folder / "curves.png").exists():
        raise UserError(f"{folder}: is trained, and its last.pt, to go on from, is gone; train on "
                        f"under another name, with --pretrained {folder / 'best.pt'}")
    return None


class Trainer:
    """A training in progress: all that it changes, so that a save is one look at it.

    args: of the experiment. folder: weights/<exp>. ranks: a ddp.Ranks. stop: a launch.Stop.
    `begin` makes what a gssl.Round needs (the only one, without --gssl), `fit` trains it. Raises
    UserError.
    """

    def __init__(self, args, folder, ranks, stop):
        self.experiment_args, self.folder, self.ranks, self.stop = args, folder, ranks, stop
        self.round = self.args = None
        self.model = self.parallel = self.ema = self.optimizer = self.scheduler = None
        self.scaler = self.dtype = self.loss = self.loader = self.sampler = self.skips = None
        self.teacher = self.digest = self._carried = None
        self.losses, self.best, self.started_at = [], math.inf, time.monotonic()
        # Since the last reading: (what a step left on the device, its indices) and bad images.
        self.pending, self.bad_images = [], set()
        # The validation list's crops, from its first time on.
        self.judged = []
        self.board = ranks.together(experiment.tensorboard, folder, ranks.first) \
            if args.tensorboard else None

    def log(self, text):
        """Print on rank 0."""
        if self.ranks.first:
            print(text)

    @property
    def seconds(self):
        """How long it has trained, earlier starts of a resumed training included."""
        return time.monotonic() - self.started_at

    @property
    def title(self):
        """The round's name before a line of output; empty where there is one round alone."""
        return f"round {self.round.number} ({self.round.task}) " if self.args.gssl else ""

    @property
    def measure(self):
        """Optimiser steps in an epoch and faces in a step: a change would shift the schedule."""
        sampler = self.sampler
        return [sampler.steps, sampler.batch * sampler.accumulate * sampler.world]

    @property
    def start_step(self):
        """Steps of the learning-rate schedule in earlier rounds."""
        return self.round.start_epoch * self.sampler.steps

    def begin(self, round, state):
        """Make the model of a Round and what it learns from: (FaceList, loss).

        state: of last.pt, or None. A round that is not fresh goes on from the one before.
        """
        carried = None if self.model is None or round.fresh else self.carried()
        # The round before goes, with its loader's processes and memory.
        self.model = self.parallel = self.ema = self.optimizer = self.loader = self.loss = None
        args, ranks = round.args(self.experiment_args), self.ranks
        self.round, self.args, self._carried, self.judged = round, args, carried, []
        self.losses, self.best, self.started_at = [], math.inf, time.monotonic()
        self.set = ranks.together(dataset.PreparedSet, ranks.share(set_folder, args))
        self.scheme = model_scheme(args.scheme, self.set.scheme)
        if "train" not in self.set.lists:
            raise UserError(f"{self.set.folder}: has no train.txt; it can only be tested on")
        self.set.tell_size(args.input_size, self.log)
        _tell_useless(args, self.scheme, self.log)
        torch.manual_seed(args.seed)
        self.neighbour_face = dataset.neighbour_face(args.mean_face, self.scheme)
        pretrained = args.pretrained if state is None else "none"
        self.sets = checkpoint.data_sets(vars(args)) if state is None else checkpoint.sets_of(state)
        self.model = self._build_model(pretrained == "timm")
        if pretrained not in ("none", "timm"):
            left_out = ranks.together(checkpoint.load_pretrained, self.model, pretrained)
            fresh = f"; fresh: {', '.join(left_out)}" if left_out else ""
            self.log(f"{pretrained}: loaded{fresh}")
        self.model.to(ranks.device, memory_format=torch.channels_last)
        check_maps(self.model, args.input_size, args.batch_size)
        self.teacher = None if args.teacher == "none" else ranks.together(
            distil.Teacher, args.teacher, self.scheme, args.teacher_share, ranks.device)
        for model in self.teacher.models if self.teacher else ():
            self.set.tell_crop(model.crop, "the teacher", self.log)
        faces = self.set.lists["train"]
        self.digest = faces.digest()
        if not args.hidden and faces.hidden is not None:
            self.log(f"{int(faces.hidden.sum())} hidden points are not trained")
            faces = faces.visible()
            if not len(faces):
                raise UserError(f"{self.set.folder}: all points of the training faces are hidden; "
                                f"give --hidden true")
        loss = build_loss(self.model, args.cls, args.reg, args.offset_loss, args.eye_weight,
                          missing=bool(numpy.isnan(faces.points).any()))
        return self._join_unlabelled(faces, loss, state) if args.gssl else (faces, loss)

    def _build_model(self, timm_weights=False):
        return checkpoint.build_model(self.args, self.scheme, self.neighbour_face, timm_weights)

    def _join_unlabelled(self, faces, loss, state):
        """(FaceList, loss) of a round of self-training: the labelled faces and the others."""
        others = self.ranks.together(unlabelled.read, self.args.unlabelled_dir, self.set)
        if not self.round.number:
            return faces, loss
        labeller = None
        if state is None:
            labeller = self._build_model()
            labeller.load_state_dict(checkpoint.weights_of(
                self._carried or self.ranks.share(checkpoint.read, self.folder / "best.pt")))
        faces, labelled = gssl.round_faces(self.folder, self.round, labeller, faces, others,
                                           self.set, self.scheme, self.args, self.ranks)
        self.model.head.coarse = self.round.task in gssl.COARSE
        self.log(f"round {self.round.number}, {self.round.task}: {labelled} faces with labels "
                 f"(repeated ones counted) and {len(others)} with pseudo-labels")
        return faces, gssl.RoundLoss(loss, self.round.task, labelled)

    def fit(self, faces, loss, state=None, last=True):
        """Train the round that `begin` has made on a FaceList; whether it was finished.

        loss: called with the model's output, landmarks (N, K, 2) and indices (N,) in the list.
        state: of last.pt, to go on from. last: whether no round follows.
        """
        self._prepare(faces, loss)
        start_epoch, step = (0, 0) if state is None else self.restore(state)
        if state is not None:
            self.log(f"resume: {self.folder.name}: {self.title}" + (
                "all epochs are done" if start_epoch == self.args.epochs else
                f"goes on at epoch {start_epoch + 1}, step {step + 1}"))
        elif self.round.number:
            self.started_at -= self.ranks.share(experiment.read_epochs, self.folder)[-1]["seconds"]
            if self._carried is not None:
                self.carry_on(self._carried)
            # What this round began from is about to be overwritten, or gone with the process.
            self.save(0, 0)
        self._carried = state = None
        if self.ranks.first:
            save_args(self.experiment_args, self.folder / "args.yaml")
        for epoch in range(start_epoch, self.args.epochs):
            finished = self.train_epoch(epoch, step)
            step = 0
            if finished:
                self.validate(epoch)
                self.save(epoch + 1, 0)
            over = last and epoch + 1 == self.args.epochs
            if not finished or not over and self.ranks.total(self.stop.asked)[0]:
                return False
        return True

    def _prepare(self, faces, loss):
        """Loader, optimiser, schedule and average of a round, and what it says on the screen."""
        args, ranks = self.args, self.ranks
        self.loss, self.skips = loss, engine.Skips(faces, self.folder, ranks)
        accumulate = max(1, round(args.effective_batch / (args.batch_size * ranks.world)))
        self.loader, self.sampler = engine.make_loader(faces, self.set, self.scheme, args, ranks,
                                                       accumulate)
        self.log(f"{self.set.folder}: {len(faces)} training and {len(self.set.lists['val'])} "
                 f"validation faces, {self.scheme.name}, {self.scheme.points} points"
                 + (", drawn by the repository" if self.set.drawn else ""))
        if not len(self.set.lists["val"]):
            self.log("no validation faces: the last epoch is the best")
        self.dtype = engine.choose_precision(args.precision, ranks.device, self.model)
        self.log(f"{args.backbone}, {args.head} head, {parameters(self.model) / 1e6:.2f} M "
                 f"parameters, on {ranks.device.type} in {engine.name_of(self.dtype)}")
        steps, batch = self.measure
        self.log(f"batch: {args.batch_size} a process x {ranks.world} processes x {accumulate} "
                 f"accumulated = {batch} a step (asked {args.effective_batch}); "
                 f"{steps} steps an epoch, {steps * args.epochs} in all")
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=self.dtype is torch.float16)
        self.optimizer = engine.make_optimizer(self.model, args)
        total_steps = steps * (self.round.cosine_epochs or args.epochs)
        self.scheduler = engine.make_scheduler(self.optimizer, args, steps, total_steps)
        self.schedule(0)
        self.ema = engine.make_average(self.model, args.ema, total_steps, self.round.fresh)
        trial = copy.deepcopy(self.model) if args.compile else None
        if ranks.world > 1:
            self.model, said = engine.synchronise(self.model, args, ranks)
            self.log(f"batch norm: {said}")
        self.parallel, said = engine.compiled(
            engine.parallelise(self.model, ranks, args.input_size), trial, args, self.dtype, ranks)
        if said:
            self.log(said)

    def train_epoch(self, epoch, start=0):
        """Train from optimiser step `start` of `epoch` to its end; False where asked to stop."""
        self.model.train()
        self.sampler.set_epoch(epoch, start)
        drained = saved = time.monotonic()
        pause = 1
        batches = iter(self.loader)
        bar = tqdm.tqdm(total=self.sampler.steps, initial=start, disable=not self.ranks.first,
                        desc=f"{self.title}epoch {epoch + 1}/{self.args.epochs}", leave=False,
                        mininterval=0.5)
        with bar:
            for step in range(start, self.sampler.steps):
                # Dropout and the like follow from the step too: a resumed training draws the same.
                seed = numpy.random.SeedSequence((self.args.seed, epoch, step, self.ranks.rank))
                torch.manual_seed(int(seed.generate_state(1)[0]))
                self.train_step(batches, epoch * self.sampler.steps + step)
                last = step + 1 == self.sampler.steps
                if len(self.pending) < pause and not last:
                    continue
                due = self.ranks.first and time.monotonic() - saved > 60 * self.args.save_minutes
                bar.update(len(self.pending))
                loss, asked, due, pause = self.drain(due, drained)
                drained = time.monotonic()
                bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
                if not last and (asked or due):
                    self.save(epoch, step + 1)
                    saved = time.monotonic()
                    if asked:
                        return False
        return True

    def drain(self, due, since):
        """Read what all ranks' steps have left since the last time, at `since`.

        due: whether this rank wants a save. Returns the last step's mean loss, whether a rank asks
        to stop, whether one wants a save, and the number of steps until the next time. Raises
        UserError where too many steps or images were bad.
        """
        left, seen = zip(*self.pending)
        # The one place where the host waits for the device.
        left = torch.stack(left).tolist()
        # All that the ranks must agree on, in one message.
        asked, due, any_bad, seconds, *losses = self.ranks.total(
            self.stop.asked, due, len(self.bad_images), time.monotonic() - since,
            *(loss for loss, *_ in left))
        if any_bad:
            self.skips.images(self.bad_images)
        losses = [loss / self.ranks.world for loss in losses]
        for loss, (_, bad, overflow), indices in zip(losses, left, seen):
            if not bad:
                self.losses.append(loss)
            if not overflow:
                self.skips.step(not bad, indices)
        self.pending, self.bad_images = [], set()
        # A CPU has nothing to wait for.
        pause = 1 if self.ranks.device.type == "cpu" else max(1, int(
            READ_SECONDS * self.ranks.world * len(left) / seconds))
        return losses[-1], asked, due, pause

    def train_step(self, batches, number):
        """Optimiser step `number` of the round, over the accumulated micro-batches.

        A GPU must not wait for the host here, so that nothing is read off it: what `drain` needs is
        left in `pending` and `bad_images`.
        """
        device, accumulate = self.ranks.device, self.sampler.accumulate
        self.optimizer.zero_grad(set_to_none=True)
        # A bad step must leave nothing behind, and the forward pass already moves these.
        statistics = engine.Kept(self.model.buffers())
        seen, total = [], torch.zeros((), dtype=torch.float64, device=device)
        for micro in range(accumulate):
            images, landmarks, indices, bad = engine.next_batch(batches)
            seen += indices.tolist()
            self.bad_images.update(set(bad.tolist()) - {-1})
            images = images.to(device, non_blocking=True).permute(0, 3, 1, 2)
            landmarks = landmarks.to(device, self.model.mean.dtype, non_blocking=True)
            # Gradients travel between ranks once a step, not once a micro-batch.
            quiet = micro < accumulate - 1 and self.ranks.world > 1
            with self.parallel.no_sync() if quiet else contextlib.nullcontext():
                with torch.autocast(device.type, self.dtype, self.dtype is not None):
                    predicted = self.parallel(images)
                    if self.teacher is not None:
                        landmarks = self.teacher(images, landmarks)
                loss = self.loss(predicted, landmarks, indices) / accumulate
                # A loss that is no number makes all gradients so, which every rank sees; else
                # times 1.
                self.scaler.scale(loss * (1 + 0 * loss.detach())).backward()
            total += loss.detach()
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.args.clip or math.inf)
        # Gradients are the same on all ranks, so all ranks decide alike without talking.
        bad = ~torch.isfinite(norm)
        # A scale that can still be halved is too large; a scaler that is not enabled scales by 1.
        overflow = bad & (self.scaler.scale(torch.ones_like(norm)) > 1)
        statistics.put_back(bad)
        engine.update(self.optimizer, self.ema, self.model, number, bad)
        self.scaler.update()
        self.schedule(number + 1)
        self.pending.append((torch.stack([total, bad, overflow]), seen))

    def schedule(self, steps):
        """Set the learning rate as after so many optimiser steps of this round."""
        self.scheduler.step_update(self.start_step + steps)

    def validate(self, epoch):
        """Score the average on the validation list; keep the best, write the epoch's line.

        Without a list of any face the last epoch is the best.
        """
        averaged = self.model if self.ema is None else self.ema.module
        # Batch norm's statistics are per process on CPUs; all must judge the same net.
        self.ranks.copy_buffers(averaged)
        averaged.eval()
        faces = self.set.lists["val"]
        if not len(faces):
            self.ranks.share(self._finish_epoch, epoch, math.nan, averaged)
            self.losses = []
            return
        predicted = predict.predict_list(
            predict.torch_predict(averaged, self.ranks.device), faces, self.set.margin,
            self.args.input_size, ranks=self.ranks, kept=self.judged)
        errors, _ = predict.errors(predicted, faces, self.scheme, self.set.scheme)
        # Faces that cannot be scored do not count; where none can, any epoch is as good.
        scored = errors[~numpy.isnan(errors)]
        nme = 100 * float(scored.mean()) if len(scored) else math.inf
        if not len(scored) and not epoch:
            self.log("note: no validation face can be scored, for want of the points whose "
                     "distance divides NME: the last epoch is the best")
        self.ranks.share(self._finish_epoch, epoch, nme, averaged)
        self.best, self.losses = min(self.best, nme), []

    def _finish_epoch(self, epoch, nme, averaged):
        """Write best.pt where it is the round's best so far, and a line in results.csv and on the
        screen.
        """
        lr, number = self.optimizer.param_groups[0]["lr"], self.round.first + epoch + 1
        loss = sum(self.losses) / max(1, len(self.losses))
        better = nme < self.best or self.best == math.inf
        if better:
            checkpoint.save({**self.description(), "weights": averaged.state_dict(),
                             "epoch": number, "val_nme": nme}, self.folder / "best.pt")
        experiment.append_epoch(self.folder, {
            "epoch": number, "lr": lr, "loss": loss, "val_nme": nme,
            "seconds": round(self.seconds, 1), "round": self.round.number})
        if self.board is not None:
            for name, value in (("loss", loss), ("val_nme", nme), ("lr", lr)):
                self.board.add_scalar(name, value, number)
            self.board.flush()
        skipped = f", {self.skips.skipped} steps skipped" if self.skips.skipped else ""
        score = "none" if math.isnan(nme) else f"{nme:.3f}"
        print(f"{self.title}epoch {epoch + 1:>3}/{self.args.epochs}  lr {lr:.2e}  loss {loss:.4f}  "
              f"val NME {score}{' *' if better else ''}  {self.seconds:.0f} s{skipped}", flush=True)

    def description(self):
        """What its checkpoints say of themselves beside their weights."""
        return checkpoint.describe(self.experiment_args, self.scheme, self.set.crop,
                                   self.neighbour_face, sets=self.sets)

    def record(self):
        """Write the experiment's line of weights/results.csv."""
        args, best = self.experiment_args, checkpoint.load_model(self.folder / "best.pt")
        experiment.record({
            "exp": self.folder.name, "data": experiment.data_name(args, self.set.folder),
            "scheme": self.scheme.name, "backbone": args.backbone,
            "head": args.head, "lr": args.lr, "epochs": self.round.first + self.round.epochs,
            "batch": self.measure[1], "parameters": parameters(best),
            "gmacs": f"{gmacs(best, args.input_size):.2f}", "val_nme":
            f"{self.best:.3f}" if math.isfinite(self.best) else ""}, self.folder.parent)

    def save(self, epoch, step):
        """Write last.pt: everything to go on from optimiser step `step` of `epoch`, bit by bit.

        The order of faces, augmentation and dropout follow from seed, epoch, step and rank, and the
        learning rate from the step, so there is no random state or schedule to keep. Raises
        UserError, on every rank.
        """
        self.ranks.share(checkpoint.save, {
            **self.description(), "round": self.round.number, "epoch": epoch, "step": step,
            "measure": self.measure, "faces": self.digest, **self.carried(),
            "scaler": self.scaler.state_dict(), "best": self.best, "losses": self.losses,
            "skipped": self.skips.skipped, "in_a_row": self.skips.in_a_row,
            "seconds": self.seconds}, self.folder / "last.pt")

    def restore(self, state):
        """Take over a state of save(); returns (epoch, step) to go on from. Raises UserError."""
        if state.get("measure", self.measure) != self.measure:
            raise UserError(f"{self.folder / 'last.pt'}: had {state['measure']} steps an epoch and "
                            f"faces a step, now it would be {self.measure}; the training list, "
                            f"--batch-size and the number of processes must fit")
        moved = state["args"].get("data_dir") != self.experiment_args.data_dir
        # Of before there were digests, only the folder's name tells.
        if state.get("faces", None if moved else self.digest) != self.digest:
            raise UserError(f"{self.folder / 'last.pt'}: {self.set.folder} holds other training "
                            f"faces, or other landmarks, than those that it began with; it would "
                            f"be another run, with a new --exp, perhaps with --pretrained")
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
            self.skips.skipped, self.skips.in_a_row = state["skipped"], state["in_a_row"]
            self.started_at = time.monotonic() - state["seconds"]
            epoch, step = state["epoch"], state["step"]
            if not (0 <= epoch <= self.args.epochs and 0 <= step < self.sampler.steps):
                raise ValueError(f"epoch {epoch}, step {step} is outside the round")
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(f"{self.folder / 'last.pt'}: cannot be resumed from: "
                            f"{' '.join(str(error).split())[:160]}") from None
        self.schedule(epoch * self.sampler.steps + step)
        return epoch, step

    def carried(self):
        """What a save holds and the next round goes on from: model, average and moments."""
        return {"model": self.model.state_dict(), "ema": self.ema and self.ema.module.state_dict(),
                "optimizer": self.optimizer.state_dict()}

    def carry_on(self, state):
        """Take over what `carried` gave; the optimiser's settings stay today's."""
        self.model.load_state_dict(state["model"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state["optimizer"]["state"],
                                        "param_groups": groups})
