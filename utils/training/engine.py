"""What a training runs with: precision, optimiser, schedule, average, processes, loader, skips."""
import atexit
import copy
import functools
import multiprocessing
import os
import shutil
import signal
import sys
import time
import warnings

import timm.layers
import timm.optim
import timm.scheduler
import timm.utils
import torch
import tqdm

from utils.data.augment import Augment
from utils.data.batched import BatchedLoader
from utils.data.cache import SHARED_MEMORY, DeviceCache, make_cache
from utils.data.dataset import EpochSampler, FaceDataset
from utils.errors import UserError
from utils.landmarks.crop import prepare_fork
from utils.training import launch

BAD_STEPS = 3
BAD_IMAGES = 0.01
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
# Below so many faces a process and forward pass, the statistics of one process are too few.
FEW_FACES = 16


def make_deterministic(wanted):
    """Whether torch may only use algorithms that give the same bits each time; it raises a
    RuntimeError that names the operation where a GPU has none. Before the GPU is first used.
    """
    if wanted:
        # cuBLAS reads it when it starts, and torch refuses its products without.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(wanted)


def choose_precision(name, device, model):
    """The autocast dtype for training, or None for float32.

    `auto`: bf16 on GPUs that have it and on CPUs with AVX512-BF16 or AMX unless the net has
    depthwise convolutions (those are fastest in float32 there), fp16 on other GPUs. On GPUs float32
    is multiplied as TF32, which keeps 10 of its 23 bits, unless deterministic algorithms are asked
    for.
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


def name_of(dtype):
    """What --precision calls a dtype of choose_precision."""
    return next(name for name, known in PRECISIONS.items() if known == dtype)


def make_optimizer(model, args):
    """AdamW; norms, biases and PReLU slopes (parameters of one dimension) get no weight decay.

    On GPUs the fused one, which can skip a step by itself. On CPUs it saves a fiftieth of a step's
    time, and has other bits than the trainings so far.
    """
    groups = timm.optim.param_groups_weight_decay(model, args.weight_decay)
    return torch.optim.AdamW(groups, args.lr, fused=next(model.parameters()).is_cuda or None)


def update(optimizer, average, model, number, bad):
    """Step `number` of an optimiser and of the ModelEmaV3 of its model (or None), unless `bad`.

    bad: a boolean scalar on their device. Nobody waits for it where the optimiser is fused: kernels
    look at it. A bad step must have left nothing in the model's buffers by now.
    """
    if optimizer.defaults.get("fused"):
        optimizer.found_inf = bad.float()
        optimizer.step()
        if average is not None:
            _move(average.module, model, (1 - average.get_decay(number)) * ~bad)
    elif not bad:
        optimizer.step()
        if average is not None:
            average.update(model, number)


@torch.no_grad()
def _move(average, model, share):
    """What ModelEmaV3.update does, with a share (1 - decay) that only the device knows."""
    pairs = list(zip(average.state_dict().values(), model.state_dict().values()))
    old, new = zip(*(pair for pair in pairs if pair[0].is_floating_point()))
    moves = torch._foreach_sub(new, old)
    torch._foreach_mul_(moves, share)
    torch._foreach_add_(old, moves)
    for old, new in pairs:
        if not old.is_floating_point():
            old.copy_(new)


class Kept:
    """What a list of tensors held, to be put back into them if a step turns out bad.

    All of a type in one tensor, for a GPU takes longer to be told of a copy than to make a small
    one.
    """

    def __init__(self, tensors):
        self.groups = {}
        for tensor in tensors:
            self.groups.setdefault(tensor.dtype, []).append(tensor)
        self.values = {kind: _joined(group) for kind, group in self.groups.items()}

    def put_back(self, bad):
        """Give the tensors their values back where `bad`, a boolean scalar, is true."""
        for kind, group in self.groups.items():
            values = torch.where(bad, self.values[kind], _joined(group))
            parts = values.split([tensor.numel() for tensor in group])
            torch._foreach_copy_(group, [p.view_as(t) for p, t in zip(parts, group)])


def _joined(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors])


def make_scheduler(optimizer, args, steps, total_steps):
    """A cosine to min_lr over total_steps, its beginning replaced by a linear warm-up; steps: of an
    epoch.
    """
    return timm.scheduler.CosineLRScheduler(
        optimizer, t_initial=total_steps, lr_min=min(args.min_lr, args.lr), t_in_epochs=False,
        warmup_t=min(round(args.warmup_epochs * steps), total_steps - 1),
        warmup_lr_init=args.lr / 10)


def make_average(model, share, total_steps, fresh=True):
    """The exponential average of a model's weights, over `share` of all steps; None for 0.

    fresh: whether the weights are; the average of others has its full memory from the first step.
    """
    if not share:
        return None
    # Never below a few steps' memory, nor so long that the random start stays in.
    # With update_after_step timm copies the weights in the first step after it, here none.
    return timm.utils.ModelEmaV3(model, 1 - 1 / max(2.0, share * total_steps), use_warmup=fresh,
                                 update_after_step=0 if fresh else -2)


def synchronise(model, args, ranks):
    """(the model, a sentence): its batch norms synchronised over GPUs where args.sync_bn says so.

    Two messages a norm layer; `auto`: where a process sees fewer than 16 faces at once. Raises
    UserError for `always` on CPUs, which cannot.
    """
    few, gpu = args.batch_size < FEW_FACES, ranks.device.type == "cuda"
    if args.sync_bn == "always" and not gpu:
        raise UserError("sync_bn: always needs GPUs; give auto or never")
    if not gpu:
        return model, "statistics per process (synchronised ones need GPUs)"
    if args.sync_bn == "never" or args.sync_bn == "auto" and not few:
        return model, f"statistics per process, of {args.batch_size} faces (--sync-bn always)"
    # timm's, because torch's would drop the activations inside timm's norm layers.
    return timm.layers.convert_sync_batchnorm(model), "synchronised (--sync-bn never)"


def parallelise(model, ranks, input_size):
    """How to call a model in training: itself or, on several processes, in DDP.

    Parameters that nothing flows through are frozen: DDP would wait for their gradients for ever,
    and an optimiser leaves them as they are anyway.
    """
    if ranks.world == 1:
        return model
    for name in unreached(model, input_size):
        model.get_parameter(name).requires_grad_(False)
    with warnings.catch_warnings():
        # Newer releases of torch have another name for it, which older ones do not know.
        warnings.filterwarnings("ignore", ".*broadcast_buffers", FutureWarning)
        # No rank needs another's statistics to train; rank 0's are saved, and judged on all ranks
        # (Ranks.copy_buffers), so they need not travel in each forward pass.
        return torch.nn.parallel.DistributedDataParallel(
            model, [ranks.device.index] if ranks.device.type == "cuda" else None,
            broadcast_buffers=False, gradient_as_bucket_view=True)


def unreached(model, input_size):
    """Names of parameters that get no gradient, found by a backward pass of a copy."""
    trial = copy.deepcopy(model).train()
    _try(trial, trial, input_size)
    return [name for name, parameter in trial.named_parameters()
            if parameter.requires_grad and parameter.grad is None]


def compiled(parallel, trial, args, dtype, ranks):
    """(how to call the model in training, a sentence): compiled by torch where args.compile says
    so and each rank's machine can, else as before.

    trial: a copy of the network, tried first, so that a compiler that is missing leaves no trace.
    Of before its batch norms were synchronised: a rank must not wait in it for one that failed.
    """
    if not args.compile:
        return parallel, None
    problem = None
    try:
        with torch.autocast(ranks.device.type, dtype, dtype is not None):
            _try(torch.compile(trial.train()), trial, args.input_size, args.batch_size)
    except Exception as error:  # Compilers raise what they like.
        problem = " ".join(str(error).split())[:160] or type(error).__name__
    problems = [found for found in ranks.collect(problem) if found]
    if problems:
        torch.compiler.reset()
        return parallel, f"compile: not here, goes on without: {problems[0]}"
    return torch.compile(parallel), "compile: the network is compiled by torch"


def _try(call, model, input_size, batch=2):
    """Forward and backward pass of `call` on black faces in `model`'s layout."""
    first = next(model.parameters())
    # Two faces at least: batch norm refuses one where a map is one cell.
    faces = torch.zeros(batch, input_size, input_size, 3, dtype=torch.uint8, device=first.device)
    _sum(call(faces.permute(0, 3, 1, 2))).backward()


def _sum(out):
    return out.sum() if isinstance(out, torch.Tensor) else sum(map(_sum, out))


class Skips:
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
        path, best = self.folder / "bad_batch.txt", self.folder / "best.pt"
        names = [f"{self.faces.images[i]}\n" for part in self.ranks.collect(indices) for i in part]
        if self.ranks.first:
            path.write_text("".join(names), encoding="utf-8")
        raise UserError(f"{BAD_STEPS} steps in a row had a loss or gradient that is no number; the "
                        f"last batch is listed in {path}, last.pt is from before: go on with "
                        f"--resume and a lower --lr or --precision fp32; where the loss had "
                        f"grown before, begin anew with these"
                        + (f" (--pretrained {best})" if best.is_file() else ""))


def next_batch(batches):
    """The next batch; a UserError of a loader process without the traceback it was sent with."""
    try:
        return next(batches)
    except UserError as error:
        last = str(error).strip().splitlines()[-1]
        raise UserError(last.removeprefix(f"{UserError.__module__}.UserError: ")) from None
    except (ConnectionError, EOFError):
        # A process died while it handed its batch over; word of it, which torch makes a
        # RuntimeError, comes a moment later.
        time.sleep(1)
        raise RuntimeError("DataLoader worker is gone") from None


def loader_mistake(error, folder):
    """A RuntimeError as a UserError where a loader process was killed, else as it is.

    Under main.sh it stays a crash, which torchrun answers with a new start that resumes.
    """
    text = " ".join(str(error).split())
    if "DataLoader worker" not in text:
        return error
    if hasattr(signal, "SIGCHLD"):
        # The other processes' deaths would be raised wherever the program is by then.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if launch.has_parent():
        return error
    go_on = f"--resume --exp {folder.name}"
    if "shared memory" in text:
        return UserError(f"a loader process has no room in {SHARED_MEMORY}: give --workers 0, or a "
                         f"container more of it (docker run --shm-size=1g); go on with {go_on}")
    return UserError(f"a loader process was killed, most likely by the system for want of memory: "
                     f"give fewer --workers or a smaller --batch-size; go on with {go_on}")


def check_shared_memory(needed, path=SHARED_MEMORY):
    """Raises UserError where loader processes cannot hand over `needed` bytes of batches."""
    if not sys.platform.startswith("linux"):
        return
    advice = "give --workers 0, or a container more of it (docker run --shm-size=1g)"
    try:
        free = shutil.disk_usage(path).free
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; loader processes hand over their batches "
                        f"there: {advice}") from None
    if free < needed:
        raise UserError(f"{path}: {free / 1e6:.0f} MB are free, the batches of the loader "
                        f"processes take {needed / 1e6:.0f}: {advice}")


def make_loader(faces, prepared, scheme, args, ranks, accumulate):
    """The training loader and its sampler; without processes where the cache is on the device."""
    dataset = FaceDataset(faces, prepared.margin, args.input_size, scheme.indices,
                          Augment(args, scheme.flip if scheme.mirrors else None,
                                  scheme if scheme.eyes else None), args.seed)
    sampler = EpochSampler(len(faces), args.batch_size, accumulate, ranks.rank, ranks.world,
                           args.seed)
    context, cache = None, make_cache(args.cache, dataset, ranks)
    if isinstance(cache, DeviceCache):
        return BatchedLoader(dataset, sampler, cache), sampler
    if cache is not None:
        dataset.cache = cache
        # Forked workers inherit the cache; any other kind would be sent a copy.
        context = "fork" if args.workers else None
    if args.workers:
        # Each worker prepares two batches ahead of the one in use.
        check_shared_memory(3 * args.workers * args.batch_size * args.input_size ** 2 * 3)
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
