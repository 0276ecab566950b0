"""One epoch of training: steps, accumulation, faults, signals."""
import contextlib
import math
import signal
import time

import cv2
import torch
import tqdm

from utils.augment import Augment
from utils.dataset import EpochSampler, FaceDataset
from utils.errors import UserError

BAD_STEPS = 3
BAD_IMAGES = 0.01


class Stop:
    """Set by SIGTERM and SIGINT, so that a step is finished and saved before the process ends."""

    def __init__(self):
        self.asked = False
        for name in (signal.SIGTERM, signal.SIGINT):
            signal.signal(name, self._ask)

    def _ask(self, number, frame):
        self.asked = True


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
    """Counts skipped steps and unreadable images, and stops a run that has too many."""

    def __init__(self, faces, folder):
        self.faces, self.folder = faces, folder
        self.skipped, self.in_a_row = 0, 0
        self.bad_images = set()

    def images(self, bad):
        """Note indices of unreadable images (a tensor; -1: none). Raises UserError above 1 %."""
        for index in set(bad.tolist()) - {-1} - self.bad_images:
            self.bad_images.add(index)
            tqdm.tqdm.write(f"{self.faces.images[index]}: cannot be read; the next image takes its "
                            f"place")
        if len(self.bad_images) > max(1, BAD_IMAGES * len(self.faces)):
            raise UserError(f"{len(self.bad_images)} of {len(self.faces)} training images cannot be "
                            f"read (more than 1 %), {self.faces.images[min(self.bad_images)]} among "
                            f"them; prepare the set again, then --resume")

    def step(self, finite, indices):
        """Note whether a step was finite. Raises UserError after three bad ones in a row."""
        self.in_a_row = 0 if finite else self.in_a_row + 1
        self.skipped += not finite
        if self.in_a_row >= BAD_STEPS:
            names = [str(self.faces.images[i]) for i in indices]
            path = self.folder / "bad_batch.txt"
            path.write_text("\n".join(names) + "\n", encoding="utf-8")
            raise UserError(f"{BAD_STEPS} steps in a row had a loss or gradient that is no number; "
                            f"the last batch is listed in {path}, last.pt is from before. Try a "
                            f"lower --lr or --precision fp32")


def train_one_epoch(run, epoch, start=0):
    """Train from optimiser step `start` of `epoch` to its end, or to a signal.

    run: a run.Run, whose model, EMA, optimiser and counters are changed; run.save is called every
    save_minutes. Returns whether the epoch was finished.
    """
    run.model.train()
    run.sampler.set_epoch(epoch, start)
    saved = time.monotonic()
    batches = iter(run.loader)
    bar = tqdm.tqdm(total=run.sampler.steps, initial=start, disable=not run.ranks.first,
                    desc=f"epoch {epoch + 1}/{run.args.epochs}", leave=False, mininterval=0.5)
    for step in range(start, run.sampler.steps):
        # Dropout and the like follow from the step too, so that a resumed run draws the same.
        torch.manual_seed(hash((run.args.seed, epoch, step, run.ranks.rank)) % 2**63)
        loss = _optimise(run, batches, epoch * run.sampler.steps + step)
        bar.update()
        bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        due = run.ranks.first and time.monotonic() - saved > 60 * run.args.save_minutes
        asked, due = run.ranks.largest(float(run.stop.asked), float(due))
        if step + 1 < run.sampler.steps and (asked or due):
            run.save(epoch, step + 1)
            saved = time.monotonic()
            if asked:
                bar.close()
                return False
    bar.close()
    return True


def _optimise(run, batches, number):
    """One optimiser step over the accumulated micro-batches; returns its mean loss on this rank."""
    run.optimizer.zero_grad(set_to_none=True)
    seen, total = [], 0.0
    for micro in range(run.sampler.accumulate):
        images, landmarks, indices, bad = next(batches)
        seen += indices.tolist()
        run.faults.images(bad)
        images = images.to(run.ranks.device, non_blocking=True).permute(0, 3, 1, 2)
        landmarks = landmarks.to(run.ranks.device, non_blocking=True)
        last = micro == run.sampler.accumulate - 1
        # Gradients travel between ranks once a step, not once a micro-batch.
        wait = contextlib.nullcontext() if last or run.ranks.world == 1 else run.parallel.no_sync()
        with wait:
            with torch.autocast(run.ranks.device.type, run.dtype, run.dtype is not None):
                predicted = run.parallel(images)
            loss = run.loss(predicted, landmarks) / run.sampler.accumulate
            run.scaler.scale(loss).backward()
        total += float(loss.detach())
    run.scaler.unscale_(run.optimizer)
    norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), run.args.clip or math.inf)
    # Gradients are the same on all ranks, so all ranks decide alike without talking.
    finite = bool(torch.isfinite(norm))
    overflow = not finite and run.scaler.is_enabled() and run.scaler.get_scale() > 1
    if finite or overflow:
        run.scaler.step(run.optimizer)
    run.scaler.update()
    run.scheduler.step_update(number + 1)
    if finite:
        if run.ema is not None:
            run.ema.update(run.model, number)
        run.losses.append(total)
    else:
        _mend_statistics(run)
    if not overflow:
        run.faults.step(finite, seen)
    return total


def _mend_statistics(run):
    """Batch norm statistics that a bad step made infinite go back to their averages."""
    if run.ema is None:
        return
    for ours, theirs in zip(run.model.buffers(), run.ema.module.buffers()):
        if ours.is_floating_point() and not torch.isfinite(ours).all():
            ours.copy_(theirs)


def make_loader(faces, prepared, scheme, args, ranks, accumulate):
    """The training loader and its sampler."""
    dataset = FaceDataset(faces, prepared.margin, args.input_size, scheme.indices,
                          Augment(args, scheme.flip), args.seed)
    sampler = EpochSampler(len(faces), args.batch_size, accumulate, ranks.rank, ranks.world, args.seed)
    loader = torch.utils.data.DataLoader(
        dataset, batch_sampler=sampler, num_workers=args.workers, worker_init_fn=_quiet_worker,
        persistent_workers=args.workers > 0, pin_memory=ranks.device.type == "cuda")
    return loader, sampler


def _quiet_worker(_):
    """One thread a worker: the cores are busy with training; signals are for the main process."""
    cv2.setNumThreads(1)
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, signal.SIG_IGN)
