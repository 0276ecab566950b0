"""Ranks: what torchrun's environment says, and the few things the ranks tell each other."""
import dataclasses
import datetime
import os

import torch
import torch.distributed

from utils.errors import UserError
from utils.machine import choose_device
from utils.training.launch import disk_mistake, restarts

# Others wait so long for a first rank that prepares a set or fills a cache; torchrun ends them at
# once where it dies.
PATIENCE = datetime.timedelta(hours=4)


@dataclasses.dataclass(frozen=True)
class Ranks:
    """This process among all: rank of world, and the device it computes on."""
    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def first(self):
        """Whether this is rank 0, which writes the experiment's files and prints."""
        return self.rank == 0

    def total(self, *values):
        """Element-wise sum over the ranks, as a list of floats."""
        if self.world == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(tensor)
        return tensor.tolist()

    def share(self, make, *arguments):
        """Rank 0's make(*arguments), on every rank; the same UserError on all where it fails."""
        if self.world == 1:
            return make(*arguments)
        box = [None, None]
        if self.first:
            try:
                box[0] = make(*arguments)
            except (OSError, UserError) as error:
                box[1] = str(_mistake(error))
        torch.distributed.broadcast_object_list(box, device=self.device)
        if box[1] is not None:
            raise UserError(box[1])
        return box[0]

    def together(self, make, *arguments):
        """Each rank's own make(*arguments); the same UserError on all where it fails on one."""
        made, mistake = None, None
        try:
            made = make(*arguments)
        except (OSError, UserError) as error:
            mistake = str(_mistake(error))
        mistakes = [m for m in self.collect(mistake) if m is not None]
        if mistakes:
            raise UserError(mistakes[0])
        return made

    def collect(self, value):
        """Every rank's picklable value, in the order of ranks."""
        if self.world == 1:
            return [value]
        values = [None] * self.world
        torch.distributed.all_gather_object(values, value)
        return values

    def copy_buffers(self, module):
        """Give all ranks rank 0's buffers, such as batch norm's statistics."""
        if self.world > 1:
            for buffer in module.buffers():
                torch.distributed.broadcast(buffer, 0)


def _mistake(error):
    error = disk_mistake(error) if isinstance(error, OSError) else error
    if not isinstance(error, UserError):
        raise error
    return error


def start(device="auto"):
    """Join the group that torchrun's environment describes; a single process needs none.

    device: `auto`, `cuda`, `cpu` or, for one process, `cuda:N`. Raises UserError where there are
    fewer GPUs than processes.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and ":" in device:
        raise UserError(f"device {device}: {world} processes cannot share a GPU; give cuda")
    device = choose_device(device, int(os.environ.get("LOCAL_RANK", 0)))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1:
        # Among machines torchrun's store, with the addresses of dead ranks, outlives a restart.
        store, _, _ = next(torch.distributed.rendezvous("env://", timeout=PATIENCE))
        store = torch.distributed.PrefixStore(f"start {restarts()}", store)
        # NCCL needs GPUs; gloo works everywhere.
        gpu = device.type == "cuda"
        torch.distributed.init_process_group(
            "nccl" if gpu else "gloo", store=store, rank=rank, world_size=world, timeout=PATIENCE,
            device_id=device if gpu else None)
    return Ranks(rank, world, device)


def stop():
    """Leave the group, if there is one."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
