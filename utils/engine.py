"""One epoch of training: steps, accumulation, faults, signals."""
import atexit
import contextlib
import functools
import math
import multiprocessing
import os
import signal
import time

import numpy
import torch
import tqdm

from utils.augment import Augment
from utils.cache import CropCache
from utils.crop import prepare_fork
from utils.dataset import EpochSampler, FaceDataset
from utils.errors import UserError

BAD_STEPS = 3
BAD_IMAGES = 0.01


def choose_precision(name, device, model):
    """The autocast dtype for training, or None for float32.

    `auto`: bf16 on GPUs that have it and on CPUs with AVX512-BF16 or AMX unless the net has
    depthwise convolutions (those are fastest in float32 there), fp16 on other GPUs.
    """
    if name == "auto":
        if device.type == "cuda":
            name = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        else:
            fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
            grouped = any(getattr(m, "groups", 1) > 1 for m in model.modules())
            name = "bf16" if fast and not grouped else "fp32"
    if name == "fp16" and device.type == "cpu":
        raise UserError("precision fp16 needs a GPU; use auto, bf16 or fp32")
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


class Faults:
    """Counts skipped steps and unreadable images of all ranks, and stops a run with too many."""

    def __init__(self, faces, folder, ranks):
        self.faces, self.folder, self.ranks = faces, folder, ranks
        self.skipped, self.in_a_row = 0, 0
        self.bad_images = set()

    def images(self, bad):
        """Note indices of unreadable images on this rank. Raises UserError above 1 %."""
        for index in sorted(set().union(*self.ranks.collect(bad)) - self.bad_images):
            self.bad_images.add(index)
            if self.ranks.first:
                tqdm.tqdm.write(f"{self.faces.images[index]}: cannot be read; the next image takes "
                                f"its place")
        if len(self.bad_images) > max(1, BAD_IMAGES * len(self.faces)):
            raise UserError(f"{len(self.bad_images)} of {len(self.faces)} training images cannot "
                            f"be read (more than 1 %), {self.faces.images[min(self.bad_images)]} "
                            f"among them; prepare the set again, then --resume")

    def step(self, finite, indices):
        """Note whether a step was finite. Raises UserError after three bad ones in a row."""
        self.in_a_row = 0 if finite else self.in_a_row + 1
        self.skipped += not finite
        if self.in_a_row < BAD_STEPS:
            return
        path = self.folder / "bad_batch.txt"
        names = [f"{self.faces.images[i]}\n" for part in self.ranks.collect(indices) for i in part]
        if self.ranks.first:
            path.write_text("".join(names), encoding="utf-8")
        raise UserError(f"{BAD_STEPS} steps in a row had a loss or gradient that is no number; the "
                        f"last batch is listed in {path}, last.pt is from before: go on with "
                        f"--resume and a lower --lr or --precision fp32")


def train_one_epoch(run, epoch, start=0):
    """Train from optimiser step `start` of `epoch` to its end, or until asked to stop.

    run: a run.Run, whose model, EMA, optimiser and counters are changed; run.save is called every
    save_minutes and for a stop. Returns whether the epoch was finished. Raises UserError.
    """
    run.model.train()
    run.sampler.set_epoch(epoch, start)
    saved = time.monotonic()
    batches = iter(run.loader)
    bar = tqdm.tqdm(total=run.sampler.steps, initial=start, disable=not run.ranks.first,
                    desc=f"{run.title}epoch {epoch + 1}/{run.args.epochs}", leave=False,
                    mininterval=0.5)
    with bar:
        for step in range(start, run.sampler.steps):
            # Dropout and the like follow from the step too, so that a resumed run draws the same.
            seed = numpy.random.SeedSequence((run.args.seed, epoch, step, run.ranks.rank))
            torch.manual_seed(int(seed.generate_state(1)[0]))
            loss, applied, bad = _optimise(run, batches, epoch * run.sampler.steps + step)
            due = run.ranks.first and time.monotonic() - saved > 60 * run.args.save_minutes
            # All that the ranks must agree on, in one message.
            loss, asked, due, unreadable = run.ranks.total(loss, run.stop.asked, due, len(bad))
            loss /= run.ranks.world
            if unreadable:
                run.faults.images(bad)
            if applied:
                run.losses.append(loss)
            bar.update()
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            if step + 1 < run.sampler.steps and (asked or due):
                run.save(epoch, step + 1)
                saved = time.monotonic()
                if asked:
                    return False
    return True


def _optimise(run, batches, number):
    """Optimiser step `number`, over the accumulated micro-batches.

    Returns its mean loss on this rank, whether it was applied, and the set of indices of images
    that could not be read.
    """
    run.optimizer.zero_grad(set_to_none=True)
    # A bad step must leave nothing behind, and the forward pass already moves these.
    statistics = [buffer.clone() for buffer in run.model.buffers()]
    seen, unreadable, total = [], set(), 0.0
    for micro in range(run.sampler.accumulate):
        images, landmarks, indices, bad = _next(batches)
        seen += indices.tolist()
        unreadable.update(set(bad.tolist()) - {-1})
        images = images.to(run.ranks.device, non_blocking=True).permute(0, 3, 1, 2)
        landmarks = landmarks.to(run.ranks.device, run.model.mean.dtype, non_blocking=True)
        last = micro == run.sampler.accumulate - 1
        # Gradients travel between ranks once a step, not once a micro-batch.
        wait = contextlib.nullcontext() if last or run.ranks.world == 1 else run.parallel.no_sync()
        with wait:
            with torch.autocast(run.ranks.device.type, run.dtype, run.dtype is not None):
                predicted = run.parallel(images)
                if run.teacher is not None:
                    landmarks = run.teacher(images, landmarks)
            loss = run.loss(predicted, landmarks, indices) / run.sampler.accumulate
            # A loss that is no number makes all gradients so, which every rank sees; else times 1.
            run.scaler.scale(loss * (1 + 0 * loss.detach())).backward()
        total += float(loss.detach())
    run.scaler.unscale_(run.optimizer)
    norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), run.args.clip or math.inf)
    # Gradients are the same on all ranks, so all ranks decide alike without talking.
    finite = bool(torch.isfinite(norm))
    overflow = not finite and run.scaler.is_enabled() and run.scaler.get_scale() > 1
    if finite:
        run.scaler.step(run.optimizer)
    run.scaler.update()
    run.schedule(number + 1)
    if not finite:
        for buffer, before in zip(run.model.buffers(), statistics):
            buffer.copy_(before)
    elif run.ema is not None:
        run.ema.update(run.model, number)
    if not overflow:
        run.faults.step(finite, seen)
    return total, finite, unreadable


def _next(batches):
    """The next batch; a UserError of a loader process without the traceback it was sent with."""
    try:
        return next(batches)
    except UserError as error:
        last = str(error).strip().splitlines()[-1]
        raise UserError(last.removeprefix(f"{UserError.__module__}.UserError: ")) from None


def make_loader(faces, prepared, scheme, args, ranks, accumulate):
    """The training loader and its sampler."""
    dataset = FaceDataset(faces, prepared.margin, args.input_size, scheme.indices,
                          Augment(args, scheme.flip), args.seed)
    sampler = EpochSampler(len(faces), args.batch_size, accumulate, ranks.rank, ranks.world,
                           args.seed)
    context = None
    if args.cache == "ram":
        dataset.cache = CropCache(dataset, ranks)
        # Forked workers inherit the cache; any other kind would be sent a copy.
        context = "fork" if args.workers else None
    ending = multiprocessing.Value("b", 0, lock=False)
    atexit.register(setattr, ending, "value", 1)
    prepare_fork()
    loader = torch.utils.data.DataLoader(
        dataset, batch_sampler=sampler, num_workers=args.workers,
        worker_init_fn=functools.partial(_quiet_worker, ending),
        persistent_workers=args.workers > 0, pin_memory=ranks.device.type == "cuda",
        multiprocessing_context=context)
    return loader, sampler


def _quiet_worker(ending, _):
    """Signals are for the main process.

    Only when that ends (`ending`), and multiprocessing then sends a SIGTERM, is one obeyed.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: ending.value and os._exit(0))
