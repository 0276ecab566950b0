"""Distributed training: process ranks, batch norm synchronisation, DDP and torch.compile."""
from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import datetime
import functools
import json
import os
import re
import socket
import sys
import time
import traceback
import typing
import warnings
from collections.abc import Callable

import timm.layers
import torch
import torch.distributed

from utils.errors import UserError, as_user_error
from utils.machine import choose_device
from utils.training import control
from utils.training.step import StepGuard

# Rank 0 may prepare a set or fill a cache while the others wait for a control message. torchrun
# ends them if rank 0 dies.
CONTROL_TIMEOUT = datetime.timedelta(hours=4)
# All ranks take their steps side by side. NCCL ends a process after this time without naming the
# rank that is missing, so Ranks.wait_for_all, which names it, waits less long.
GRADIENT_TIMEOUT = datetime.timedelta(minutes=15)
STEP_TIMEOUT = datetime.timedelta(minutes=10)
# Seconds that a rank waits for the others to fail too: after a UserError, and after a time-out, as
# ranks that began to wait later fail later.
FAILURE_SECONDS, LATE_SECONDS = 5, 20
# With fewer images per process and forward pass, batch norm statistics of one process are noisy.
FEW_FACES = 8


@dataclasses.dataclass(frozen=True)
class Ranks:
    """This process in the process group.

    Gradients are exchanged by the default group. Control messages (settings, losses, predictions,
    errors) are CPU tensors in a gloo group of their own, whose time-out is much longer.

    Attributes:
        rank: index of this process, from 0.
        world: number of processes.
        device: device this process computes on.
        control: group of the control messages; None for the default group.
    """
    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")
    control: torch.distributed.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes the experiment's files and prints."""
        return self.rank == 0

    def all_reduce_sum(self, *values: float) -> list[float]:
        """Sum each value over all ranks."""
        if self.world == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        torch.distributed.all_reduce(tensor, group=self.control)
        return tensor.tolist()

    def wait_for_all(self) -> None:
        """Wait until all ranks have come here, before this one waits for its GPU.

        A rank that is stuck on its host never exchanges gradients. The others would wait for their
        GPUs until NCCL ends them.

        Raises:
            RuntimeError: if a rank is STEP_TIMEOUT late; names it.
        """
        if self.world > 1 and self.device.type == "cuda":
            torch.distributed.monitored_barrier(self.control, STEP_TIMEOUT, wait_all_ranks=True)

    def broadcast_result(self, function: Callable, *arguments: typing.Any) -> typing.Any:
        """Call a function on rank 0 only and return its picklable result on every rank.

        Raises:
            UserError: on every rank, if the call raises UserError or a disk error on rank 0.
        """
        if self.world == 1:
            return function(*arguments)
        result_and_error = list(_attempt(function, *arguments)) if self.is_main else [None, None]
        torch.distributed.broadcast_object_list(result_and_error, group=self.control)
        result, message = result_and_error
        if message is not None:
            raise UserError(message)
        return result

    def run_on_all(self, function: Callable, *arguments: typing.Any) -> typing.Any:
        """Call a function on every rank and return each rank's own result.

        Raises:
            UserError: on every rank, if the call raises UserError or a disk error on any rank.
        """
        result, message = _attempt(function, *arguments)
        messages = [m for m in self.all_gather(message) if m is not None]
        if messages:
            raise UserError(messages[0])
        return result

    def all_gather(self, value: typing.Any) -> list:
        """Return the picklable values of all ranks, in the order of the ranks."""
        if self.world == 1:
            return [value]
        values = [None] * self.world
        torch.distributed.all_gather_object(values, value, self.control)
        return values

    def broadcast_buffers(self, module: torch.nn.Module) -> None:
        """Copy rank 0's buffers of a module, such as batch norm statistics, to all ranks."""
        if self.world > 1:
            for buffer in module.buffers():
                torch.distributed.broadcast(buffer, 0)


def _attempt(function, *arguments):
    """Call a function; return its result and None, or None and the message of its UserError.

    A disk error counts as a UserError.
    """
    try:
        return function(*arguments), None
    except (OSError, UserError) as error:
        error = as_user_error(error) if isinstance(error, OSError) else error
        if not isinstance(error, UserError):
            raise error
        return None, str(error)


def _place():
    """Return this process's rank and the number of processes, as torchrun's environment has it."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


@functools.cache
def _store():
    """Return the store of torchrun's environment, through which ranks agree without a group."""
    store, _, _ = next(torch.distributed.rendezvous("env://", timeout=CONTROL_TIMEOUT))
    # On several machines torchrun's store outlives a restart and holds addresses of dead ranks.
    return torch.distributed.PrefixStore(f"start {control.restart_count()}", store)


def rank_0_args(read: Callable[[], argparse.Namespace]) -> argparse.Namespace:
    """Return on every rank the settings that `read` returns on rank 0.

    There is no process group yet, and other machines may not see the files that rank 0 reads.

    Raises:
        UserError: on every rank, if `read` raises it on rank 0.
    """
    rank, world = _place()
    if world == 1:
        return read()
    if rank == 0:
        settings, message = _attempt(read)
        _store().set("settings", json.dumps([settings and vars(settings), message]))
    settings, message = json.loads(_store().get("settings"))
    if message is not None:
        raise UserError(message)
    return argparse.Namespace(**settings)


def start(device: str = "auto") -> Ranks:
    """Join the process group that torchrun's environment describes.

    A single process joins none.

    Args:
        device: `auto`, `cuda`, `cpu` or, for a single process, `cuda:N`.

    Raises:
        UserError: on every rank, if a machine has fewer GPUs than processes.
    """
    rank, world = _place()
    if world == 1:
        device = choose_device(device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        return Ranks(rank, world, device)
    if ":" in device:
        raise UserError(f"device {device}: {world} processes cannot share a GPU; give cuda")
    store = _store()
    device = _choose_devices(store, rank, world, device)
    gpu = device.type == "cuda"
    if gpu:
        torch.cuda.set_device(device)
    store.set(f"place {rank}", f"rank {rank} (process {os.getpid()} on {socket.gethostname()})")
    # NCCL needs GPUs; gloo works everywhere.
    torch.distributed.init_process_group(
        "nccl" if gpu else "gloo", store=store, rank=rank, world_size=world,
        timeout=GRADIENT_TIMEOUT, device_id=device if gpu else None)
    messages = torch.distributed.new_group(backend="gloo", timeout=CONTROL_TIMEOUT)
    return Ranks(rank, world, device, messages)


def _choose_devices(store, rank, world, name):
    """Return this rank's device.

    Raises:
        UserError: on every rank, if one of them has no such device.
    """
    device, message = _attempt(choose_device, name, int(os.environ.get("LOCAL_RANK", 0)))
    store.set(f"device {rank}", json.dumps([device and device.type, message]))
    found = [json.loads(store.get(f"device {other}")) for other in range(world)]
    messages = [text for _, text in found if text]
    kinds = sorted({kind for kind, _ in found if kind})
    if len(kinds) > 1:
        messages.append(f"device {name}: some processes would use {kinds[0]} and others "
                        f"{kinds[1]}; give --device cpu")
    if messages:
        raise UserError(messages[0])
    return device


def stop(error: BaseException | None = None) -> None:
    """Leave the process group, if there is one.

    Destroying the group waits for all ranks, so a rank that fails alone ends its process instead,
    with exit code 1, or 2 after a UserError. torchrun then ends the others.

    Args:
        error: why the training has ended; None if it ended well on all ranks.
    """
    if not torch.distributed.is_initialized():
        return
    if error is not None:
        _report_failure()
    shared = error is None or isinstance(error, UserError) and not _unfailed(FAILURE_SECONDS)
    if not shared:
        _end_process(error)
    torch.distributed.destroy_process_group()
    _store.cache_clear()


def _end_process(error):
    """Print an error that other ranks do not have, and end this process at once."""
    with contextlib.suppress(OSError):  # The output may be closed.
        if isinstance(error, UserError):
            if not control.is_supervised():
                print(f"error: {error}", file=sys.stderr)
        else:
            text = "".join(traceback.format_exception(error))
            sys.stderr.write(text)
            timed_out = re.search("[Tt]imed out|monitoredBarrier", text)
            late = _unfailed(LATE_SECONDS) if timed_out else []
            if late:
                print(f"error: {', '.join(late)} did not answer in time; see what it waits for, "
                      f"such as a disk or a loader process", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
    if isinstance(error, UserError):
        control.report_error(error)
    if isinstance(error, BrokenPipeError):
        control.report_stopped()  # Nobody reads the output: a restart would end in the same way.
    os._exit(2 if isinstance(error, UserError) else 1)


def _report_failure():
    """Let the other ranks know that this one has failed."""
    with contextlib.suppress(RuntimeError):  # The store ends with the process that holds it.
        _store().set(f"failed {_place()[0]}", "yes")


def _unfailed(seconds):
    """Return the ranks that do not report a failure within this time, with process and machine."""
    rank, world = _place()
    waiting = [other for other in range(world) if other != rank]
    deadline = time.monotonic() + seconds
    try:
        while waiting and time.monotonic() < deadline:
            waiting = [other for other in waiting if not _store().check([f"failed {other}"])]
            time.sleep(0.05)
        return [_store().get(f"place {other}").decode() for other in waiting]
    except RuntimeError:
        return [f"rank {other}" for other in waiting]


def convert_sync_batchnorm(model: torch.nn.Module, args: argparse.Namespace,
                           ranks: Ranks) -> tuple[torch.nn.Module, str]:
    """Convert a model's batch norm layers to synchronised ones as `args.sync_bn` asks.

    `auto` converts on GPUs if a process sees fewer than FEW_FACES images at once. A synchronised
    layer costs two messages per step, and the host waits for the device in each.

    Returns:
        The model, and a description of the choice for the log.

    Raises:
        UserError: for `always` on CPUs, which have no synchronised batch norm.
    """
    few, gpu = args.batch_size < FEW_FACES, ranks.device.type == "cuda"
    if args.sync_bn == "always" and not gpu:
        raise UserError("sync_bn: always needs GPUs; give auto or never")
    if not gpu:
        return model, "statistics per process (synchronised ones need GPUs)"
    if args.sync_bn == "never" or args.sync_bn == "auto" and not few:
        return model, f"statistics per process, of {args.batch_size} faces (--sync-bn always)"
    # torch's own conversion would drop the activations inside timm's norm layers.
    return timm.layers.convert_sync_batchnorm(model), "synchronised (--sync-bn never)"


def wrap_ddp(model: torch.nn.Module, ranks: Ranks, input_size: int) -> torch.nn.Module:
    """Wrap a model in DistributedDataParallel; a single process gets the model itself.

    Parameters without a gradient are frozen, because DDP would wait for their gradients forever. An
    optimiser does not change them either way.
    """
    if ranks.world == 1:
        return model
    for name in unused_parameters(model, input_size):
        model.get_parameter(name).requires_grad_(False)
    with warnings.catch_warnings():
        # Newer releases of torch rename the option; older ones do not know the new name.
        warnings.filterwarnings("ignore", ".*broadcast_buffers", FutureWarning)
        # Training needs no other rank's batch norm statistics. Evaluation and checkpoints use
        # rank 0's (Ranks.broadcast_buffers), so forward passes need not transfer them.
        return torch.nn.parallel.DistributedDataParallel(
            model, [ranks.device.index] if ranks.device.type == "cuda" else None,
            broadcast_buffers=False, gradient_as_bucket_view=True)


def unused_parameters(model: torch.nn.Module, input_size: int) -> list[str]:
    """Return the names of trainable parameters that a backward pass gives no gradient."""
    trial = copy.deepcopy(model).train()
    _forward_backward(trial, trial, input_size)
    return [name for name, parameter in trial.named_parameters()
            if parameter.requires_grad and parameter.grad is None]


def compile_model(ddp_model: torch.nn.Module, trial: torch.nn.Module | None,
                  args: argparse.Namespace, dtype: torch.dtype | None,
                  ranks: Ranks) -> tuple[Callable, str | None]:
    """Compile a model with torch.compile if `args.compile` asks and it works on every rank.

    Args:
        ddp_model: module to compile, in DDP or not.
        trial: copy of the network on which compilation is tried, so that a failure leaves no trace
            in the model; None without `args.compile`. It is copied before batch norm is
            synchronised, because a rank must not wait in a collective for one whose compiler fails.
        args: training settings.
        dtype: autocast dtype, None for float32.
        ranks: process group.

    Returns:
        The compiled module, or `ddp_model` itself, and a description for the log or None.
    """
    if not args.compile:
        return ddp_model, None
    if any(isinstance(module, torch.nn.SyncBatchNorm) for module in ddp_model.modules()):
        return ddp_model, ("compile: not with synchronised batch norm, whose messages cut the "
                           "graph at each layer; give --sync-bn never")
    problem = None
    try:
        # As in a training step: other contexts would be compiled again.
        with torch.autocast(ranks.device.type, dtype, dtype is not None), \
                StepGuard(trial).forward():
            _forward_backward(torch.compile(trial.train()), trial, args.input_size, args.batch_size)
    except Exception as error:  # Compiler back ends raise exceptions of any type.
        problem = " ".join(str(error).split())[:160] or type(error).__name__
    problems = [found for found in ranks.all_gather(problem) if found]
    if problems or ranks.world > 1:
        # DDP would take the trial's graph, which is not cut where gradients can be exchanged.
        torch.compiler.reset()
    if problems:
        return ddp_model, f"compile: torch.compile failed, training without it: {problems[0]}"
    return torch.compile(ddp_model), "compile: the network is compiled by torch"


def _forward_backward(call, model, input_size, batch=2):
    """Run a forward and backward pass of `call` on black images in `model`'s memory layout."""
    device = next(model.parameters()).device
    # At least two images: batch norm refuses one if the feature map is a single cell.
    images = torch.zeros(batch, input_size, input_size, 3, dtype=torch.uint8, device=device)
    _sum(call(images.permute(0, 3, 1, 2))).backward()


def _sum(output):
    return output.sum() if isinstance(output, torch.Tensor) else sum(map(_sum, output))
