"""Ranks: what torchrun's environment says, and the few things the ranks tell each other."""
import dataclasses
import os

import torch
import torch.distributed

from utils.errors import UserError


@dataclasses.dataclass(frozen=True)
class Ranks:
    """This process among all: rank of world, and the device it computes on."""
    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def first(self):
        """Whether this is rank 0, the only one that writes files and prints."""
        return self.rank == 0

    def largest(self, *values):
        """Element-wise maximum over the ranks, as a list of floats; a way to agree on flags."""
        if self.world == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX)
        return tensor.tolist()

    def total(self, *values):
        """Element-wise sum over the ranks, as a list of floats."""
        if self.world == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(tensor)
        return tensor.tolist()

    def share(self, make):
        """Rank 0's make(), on every rank. Where it raises UserError, every rank does."""
        if self.world == 1:
            return make()
        box = [None, None]
        if self.first:
            try:
                box[0] = make()
            except UserError as error:
                box[1] = str(error)
        torch.distributed.broadcast_object_list(box, device=self.device)
        if box[1] is not None:
            raise UserError(box[1])
        return box[0]

    def collect(self, value):
        """Every rank's picklable value, in the order of ranks."""
        if self.world == 1:
            return [value]
        values = [None] * self.world
        torch.distributed.all_gather_object(values, value)
        return values


def start(device="auto"):
    """Join the group that torchrun's environment describes; a single process needs none.

    device: `auto`, `cuda` or `cpu`. Raises UserError where there are fewer GPUs than processes.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = choose_device(device, local_rank)
    if world > 1:
        # NCCL needs GPUs; gloo works everywhere.
        backend = "nccl" if device.type == "cuda" else "gloo"
        torch.distributed.init_process_group(backend)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return Ranks(rank, world, device)


def choose_device(name, local_rank=0):
    """A torch.device from `auto`, `cpu`, `cuda` or `cuda:N`. Raises UserError if it is not there."""
    count = torch.cuda.device_count()
    if name == "auto":
        name = "cuda" if count else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    if name == "cuda":
        name = f"cuda:{local_rank}"
    kind, _, number = name.partition(":")
    if kind != "cuda" or not number.isdigit():
        raise UserError(f"device must be auto, cpu, cuda or cuda:N, found {name!r}")
    if int(number) >= count:
        raise UserError(f"asked for GPU {int(number) + 1}, this machine has {count}; ask for fewer "
                        f"processes or give --device cpu")
    return torch.device(name)


def stop():
    """Leave the group, if there is one."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
