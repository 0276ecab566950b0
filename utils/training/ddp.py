"""Distributed training: process ranks, batch norm synchronisation, DDP and torch.compile."""
from __future__ import annotations

import argparse
import copy
import dataclasses
import datetime
import os
import typing
import warnings
from collections.abc import Callable

import timm.layers
import torch
import torch.distributed

from utils.errors import UserError, as_user_error
from utils.machine import choose_device
from utils.training.control import restart_count

# Rank 0 may prepare a set or fill a cache while the others wait in a collective. torchrun ends
# them at once if rank 0 dies.
COLLECTIVE_TIMEOUT = datetime.timedelta(hours=4)
# With fewer images per process and forward pass, batch norm statistics of one process are noisy.
FEW_FACES = 16


@dataclasses.dataclass(frozen=True)
class Ranks:
    """This process in the process group.

    Attributes:
        rank: index of this process, from 0.
        world: number of processes.
        device: device this process computes on.
    """
    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes the experiment's files and prints."""
        return self.rank == 0

    def all_reduce_sum(self, *values: float) -> list[float]:
        """Sum each value over all ranks."""
        if self.world == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(tensor)
        return tensor.tolist()

    def broadcast_result(self, function: Callable, *arguments: typing.Any) -> typing.Any:
        """Call a function on rank 0 only and return its picklable result on every rank.

        Raises:
            UserError: on every rank, if the call raises UserError or a disk error on rank 0.
        """
        if self.world == 1:
            return function(*arguments)
        result_and_error = [None, None]
        if self.is_main:
            try:
                result_and_error[0] = function(*arguments)
            except (OSError, UserError) as error:
                result_and_error[1] = _user_message(error)
        torch.distributed.broadcast_object_list(result_and_error, device=self.device)
        result, message = result_and_error
        if message is not None:
            raise UserError(message)
        return result

    def run_on_all(self, function: Callable, *arguments: typing.Any) -> typing.Any:
        """Call a function on every rank and return each rank's own result.

        Raises:
            UserError: on every rank, if the call raises UserError or a disk error on any rank.
        """
        result, message = None, None
        try:
            result = function(*arguments)
        except (OSError, UserError) as error:
            message = _user_message(error)
        messages = [m for m in self.all_gather(message) if m is not None]
        if messages:
            raise UserError(messages[0])
        return result

    def all_gather(self, value: typing.Any) -> list:
        """Return the picklable values of all ranks, in the order of the ranks."""
        if self.world == 1:
            return [value]
        values = [None] * self.world
        torch.distributed.all_gather_object(values, value)
        return values

    def broadcast_buffers(self, module: torch.nn.Module) -> None:
        """Copy rank 0's buffers of a module, such as batch norm statistics, to all ranks."""
        if self.world > 1:
            for buffer in module.buffers():
                torch.distributed.broadcast(buffer, 0)


def _user_message(error):
    """Return the message of a UserError or a disk error; raise any other error."""
    error = as_user_error(error) if isinstance(error, OSError) else error
    if not isinstance(error, UserError):
        raise error
    return str(error)


def start(device: str = "auto") -> Ranks:
    """Join the process group that torchrun's environment describes.

    A single process joins none.

    Args:
        device: `auto`, `cuda`, `cpu` or, for a single process, `cuda:N`.

    Raises:
        UserError: if there are fewer GPUs than processes.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and ":" in device:
        raise UserError(f"device {device}: {world} processes cannot share a GPU; give cuda")
    device = choose_device(device, int(os.environ.get("LOCAL_RANK", 0)))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1:
        # On several machines torchrun's store outlives a restart and holds addresses of dead ranks.
        store, _, _ = next(torch.distributed.rendezvous("env://", timeout=COLLECTIVE_TIMEOUT))
        store = torch.distributed.PrefixStore(f"start {restart_count()}", store)
        # NCCL needs GPUs; gloo works everywhere.
        gpu = device.type == "cuda"
        torch.distributed.init_process_group(
            "nccl" if gpu else "gloo", store=store, rank=rank, world_size=world,
            timeout=COLLECTIVE_TIMEOUT, device_id=device if gpu else None)
    return Ranks(rank, world, device)


def stop() -> None:
    """Leave the process group, if there is one."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def convert_sync_batchnorm(model: torch.nn.Module, args: argparse.Namespace,
                           ranks: Ranks) -> tuple[torch.nn.Module, str]:
    """Convert a model's batch norm layers to synchronised ones as `args.sync_bn` asks.

    `auto` converts on GPUs if a process sees fewer than FEW_FACES images at once. A synchronised
    layer costs two messages per step.

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
    problem = None
    try:
        with torch.autocast(ranks.device.type, dtype, dtype is not None):
            _forward_backward(torch.compile(trial.train()), trial, args.input_size, args.batch_size)
    except Exception as error:  # Compiler back ends raise exceptions of any type.
        problem = " ".join(str(error).split())[:160] or type(error).__name__
    problems = [found for found in ranks.all_gather(problem) if found]
    if problems:
        torch.compiler.reset()
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
