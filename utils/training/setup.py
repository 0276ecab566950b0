"""Build the TrainState of a stage from the settings: data, model, loss, loader and optimiser."""
from __future__ import annotations

import argparse
import copy
import pathlib
import time
from collections.abc import Callable

import numpy
import torch

from nets.backbone import check_backbone
from nets.model import LandmarkNet, check_maps, check_size, count_parameters
from utils import checkpoint, provenance
from utils.args import SAMPLES
from utils.data import dataset, unlabelled
from utils.data.cache import cache_name
from utils.data.face_list import FaceList
from utils.data.sets import set_folder
from utils.detection.detector import get_detector
from utils.errors import UserError
from utils.landmarks.schemes import Scheme, model_scheme
from utils.training import ddp, distil, gssl, loader, optim
from utils.training.batch import BatchPlan, plan_batch
from utils.training.loss import build_loss
from utils.training.recipe import recipe_of
from utils.training.stages import Stage, plan
from utils.training.state import TrainState
from utils.training.step import avoid_clones

# Values of settings that have no effect with some models, at which they change nothing.
NEUTRAL = {"eye_weight": 1, "shut": 0, "merge": "plain", "activation": "prelu"}


def check_settings(args: argparse.Namespace) -> None:
    """Check what can be checked of all stages before faces are drawn or read.

    Raises:
        UserError: for a backbone, a size, a set or a file that cannot be used.
    """
    check_backbone(args.backbone)
    stages = plan(args)
    for stage in stages:
        where = f"stage {stage.name}: " if len(stages) > 1 else ""
        try:
            _check_stage(stage, several=len(stages) > 1)
        except UserError as error:
            raise UserError(f"{where}{error}") from None
    for action, changes in recipe_of(args).after.items():
        names = changes.get("names", "none").partition(":")[0]
        for path in (changes.get("data_dir", "none"), names):
            if path not in ("none", SAMPLES) and not pathlib.Path(path).exists():
                raise UserError(f"{path}: no such file or folder, which {action} after the "
                                f"training needs")
        if changes.get("boxes", "none") != "none":
            get_detector(changes["boxes"])


def _check_stage(stage, several):
    args = stage.settings
    check_size(args.input_size, args.stride)
    has_file = stage.start == "pretrained" and args.pretrained not in ("none", "timm")
    initial = [args.pretrained] if has_file else []
    teachers = provenance.teacher_paths(args.teacher)
    for path in map(pathlib.Path, (*initial, *teachers)):
        if not path.exists():
            raise UserError(f"{path}: no such file")
    if args.gssl:
        unlabelled.check(args.unlabelled_dir)
    if several and args.data_dir != SAMPLES:
        # Hours later is too late to find that a set is missing or a teacher does not fit.
        prepared = dataset.PreparedSet(set_folder(args))
        if teachers:
            distil.Teacher(args.teacher, model_scheme(args.scheme, prepared.scheme), 1.0)


def build_state(stage: Stage, folder: pathlib.Path, ranks: ddp.Ranks, log: Callable[[str], None],
                previous: dict | None = None, saved: dict | None = None,
                kept_batch: dict | None = None) -> TrainState:
    """Build the state of a stage before its first step. All ranks must call this.

    Args:
        stage: stage of stages.plan to train.
        folder: weights/<exp>, whose best.pt the stage starts from or has its labels from.
        ranks: process group.
        log: prints a line on rank 0.
        previous: state_dict of the stage before, if this one continues it.
        saved: content of last.pt if the stage is resumed.
        kept_batch: BatchPlan.state_dict of the stage before.

    Raises:
        UserError: if the data, the settings and the files do not fit together.
    """
    started_at, args = time.monotonic(), stage.args()
    batch_plan = _plan_batch(args, ranks, saved, kept_batch)
    args = batch_plan.scaled(args)
    prepared = ranks.run_on_all(dataset.PreparedSet, ranks.broadcast_result(set_folder, args))
    scheme = model_scheme(args.scheme, prepared.scheme)
    if "train" not in prepared.lists:
        raise UserError(f"{prepared.folder}: has no train.txt; it can only be tested on")
    prepared.warn_size(args.input_size, log)
    _warn_without_effect(args, scheme, log)

    torch.manual_seed(args.seed)
    neighbour_face = dataset.load_neighbour_face(args.mean_face, scheme)
    best = None
    if saved is None and stage.start == "best":
        best = ranks.broadcast_result(checkpoint.read, folder / "best.pt")
    data_sets = _data_sets(args, saved, best)
    model = _build_model(args, scheme, neighbour_face, ranks, log, saved is not None, best)
    teacher = _build_teacher(args, scheme, prepared, ranks, log)

    faces = prepared.lists["train"]
    digest = faces.digest()
    faces = _trained_faces(faces, prepared, args, log)
    loss = build_loss(model, args.cls, args.reg, args.offset_loss, args.eye_weight,
                      missing=bool(numpy.isnan(faces.points).any()))
    if args.gssl:
        others = ranks.run_on_all(unlabelled.read, args.unlabelled_dir, prepared)
        if stage.task != "supervised":
            labeller = None if saved is not None else _build_labeller(
                args, scheme, neighbour_face, folder, ranks, previous)
            faces, labelled = gssl.round_faces(folder, stage, labeller, faces, others, prepared,
                                               scheme, args, ranks)
            model.head.coarse = stage.task in gssl.COARSE
            loss = gssl.RoundLoss(loss, stage.task, labelled)
            log(f"{stage.name}, {stage.task}: {labelled} faces with labels (repeated ones "
                f"counted) and {len(others)} with pseudo-labels")

    faults = loader.FaultCounter(faces, folder, ranks)
    batches, sampler = loader.make_loader(faces, prepared, scheme, args, ranks,
                                          batch_plan.accumulate, (saved or {}).get("cache"))
    _log_data(prepared, scheme, faces, log)
    dtype = optim.choose_precision(args.precision, ranks.device, model)
    _log_steps(args, model, dtype, sampler, batch_plan, ranks, log)

    scaler = torch.amp.GradScaler(ranks.device.type, enabled=dtype is torch.float16)
    optimizer = optim.make_optimizer(model, args)
    total_steps = sampler.steps * (stage.cosine_epochs or args.epochs)
    scheduler = optim.make_scheduler(optimizer, args, sampler.steps, total_steps)
    ema = optim.make_ema(model, args.ema, total_steps, stage.fresh)
    model, ddp_model = _parallelise(model, args, dtype, ranks, log)
    state = TrainState(
        stage, args, prepared, scheme, neighbour_face, data_sets, digest, model, ddp_model, ema,
        teacher, loss, batches, sampler, faults, dtype, scaler, optimizer, scheduler, batch_plan,
        cache_name(getattr(batches, "cache", None) or batches.dataset.cache), started_at=started_at)
    state.set_learning_rate(0)
    return state


def _plan_batch(args, ranks, saved, kept) -> BatchPlan:
    """Plan the steps of a stage; those of a resumed one as last.pt has them."""
    if saved is None:
        return plan_batch(args, ranks.world, kept)
    _, faces = saved.get("measure") or (None, None)
    return plan_batch(args, ranks.world, saved.get("batch"), faces)


def _warn_without_effect(args, scheme, log):
    """Log which settings have no effect in this training, and why."""
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


def _data_sets(args, saved, best) -> list[str]:
    """Return the sets behind the weights of a stage, with those of the stage before."""
    if saved is not None:
        return provenance.recorded_sets(saved)
    earlier = [] if best is None else provenance.recorded_sets(best)
    return list(dict.fromkeys([*earlier, *provenance.training_sets(vars(args), checkpoint.read)]))


def _build_model(args, scheme, neighbour_face, ranks, log, resumed, best) -> LandmarkNet:
    """Build the network with its first weights, on the ranks' device.

    They are those of `best`, the stage before, or those that `args.pretrained` names. A resumed
    stage has its own.
    """
    pretrained = "none" if resumed or best is not None else args.pretrained
    model = checkpoint.build_model(args, scheme, neighbour_face, pretrained == "timm")
    if best is not None:
        model.load_state_dict(checkpoint.weights_of(best))
    if pretrained not in ("none", "timm"):
        left_out = ranks.run_on_all(checkpoint.load_pretrained, model, pretrained)
        log(f"{pretrained}: loaded" + (f"; fresh: {', '.join(left_out)}" if left_out else ""))
    model.to(ranks.device, memory_format=torch.channels_last)
    avoid_clones(model)
    check_maps(model, args.input_size, args.batch_size)
    return model


def _build_teacher(args, scheme, prepared, ranks, log):
    if args.teacher == "none":
        return None
    teacher = ranks.run_on_all(distil.Teacher, args.teacher, scheme, args.teacher_share,
                               ranks.device)
    for model in teacher.models:
        prepared.warn_crop(model.crop, "the teacher", log)
    return teacher


def _build_labeller(args, scheme, neighbour_face, folder, ranks, previous) -> LandmarkNet:
    """Build the network that makes a round's pseudo-labels: the stage before's average."""
    labeller = checkpoint.build_model(args, scheme, neighbour_face)
    labeller.load_state_dict(checkpoint.weights_of(
        previous or ranks.broadcast_result(checkpoint.read, folder / "best.pt")))
    return labeller


def _trained_faces(faces, prepared, args, log) -> FaceList:
    """Return the training faces, without their hidden points if those are not to be trained."""
    if args.hidden or faces.hidden is None:
        return faces
    log(f"{int(faces.hidden.sum())} hidden points are not trained")
    faces = faces.drop_hidden()
    if not len(faces):
        raise UserError(f"{prepared.folder}: all points of the training faces are hidden; give "
                        f"--hidden true")
    return faces


def _log_data(prepared, scheme: Scheme, faces, log):
    validation = len(prepared.lists["val"])
    log(f"{prepared.folder}: {len(faces)} training and {validation} validation faces, "
        f"{scheme.name}, {scheme.points} points"
        + (", drawn by the repository" if prepared.drawn else ""))
    if not validation:
        log("no validation faces: the last epoch is the best")


def _log_steps(args, model, dtype, sampler, plan, ranks, log):
    log(f"{args.backbone}, {args.head} head, {count_parameters(model) / 1e6:.2f} M parameters, on "
        f"{ranks.device.type} in {optim.precision_name(dtype)}")
    log(f"batch: {plan}; {sampler.steps} steps an epoch, {sampler.steps * args.epochs} in all")


def _parallelise(model, args, dtype, ranks, log):
    """Return the model, with synchronised batch norm if need be, and the module to train with."""
    trial = copy.deepcopy(model) if args.compile else None
    if ranks.world > 1:
        model, description = ddp.convert_sync_batchnorm(model, args, ranks)
        log(f"batch norm: {description}")
    ddp_model = ddp.wrap_ddp(model, ranks, args.input_size)
    ddp_model, description = ddp.compile_model(ddp_model, trial, args, dtype, ranks)
    if description:
        log(description)
    return model, ddp_model
