"""What needs a GPU to be shown; the same code runs on the CPU where it can."""
import os

import pytest
import test_faults
import torch
from helpers import warm as warm_module

from utils.args import load_args
from utils.data import batched, dataset
from utils.training import ddp, optim
from utils.training.ddp import Ranks
from utils.training.loader import make_loader

NEEDS_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(),
                                                 reason="needs 1 GPU(s)")]
DEVICES = ["cpu", pytest.param("cuda", marks=NEEDS_GPU)]


@pytest.fixture(scope="module")
def warm():
    return warm_module.warm()


def device_loader(folder, device):
    """A BatchedLoader of the set in a folder, which augments on a device, and its sampler."""
    prepared = dataset.PreparedSet(folder)
    args = load_args({"input_size": 64, "batch_size": 8, "workers": 0, "cache": "device",
                      "grey": 0.5, "colour": 1, "blur": 1, "shut": 0.5, "occlusion": 1})
    loader, sampler = make_loader(prepared.lists["train"], prepared, prepared.scheme, args,
                                  Ranks(device=torch.device(device, 0)), 1)
    assert isinstance(loader, batched.BatchedLoader)
    return loader, sampler


@pytest.mark.parametrize("device", DEVICES)
def test_a_device_augments_as_the_cpu_does(drawn_set, device):
    batches = [list(device_loader(drawn_set, name)[0]) for name in ("cpu", device)]
    assert len(batches[0]) == 4
    for (one, *others), (two, *same) in zip(*batches, strict=True):
        assert two.device.type == device
        assert (one.int() - two.cpu().int()).abs().max() <= (2 if device == "cuda" else 0)
        assert all(torch.equal(a, b) for a, b in zip(others, same, strict=True))


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=NEEDS_GPU)])
def test_a_loader_on_a_gpu_never_waits_for_it(drawn_set, device):
    loader, sampler = device_loader(drawn_set, device)
    list(loader)  # Allocates, and loads kernels.
    sampler.set_epoch(1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert len(list(loader)) == 4
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Several(int):
    """The number 1 for arithmetic, and more than one where code asks for several processes."""

    def __eq__(self, other):
        return other is self

    def __gt__(self, other):
        return True

    __hash__ = int.__hash__


def join(backend, device, world):
    """Join a process group, whatever the number of processes and GPUs; return the Ranks."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    optim.make_deterministic(True)
    torch.distributed.init_process_group(backend)
    return Ranks(int(os.environ["RANK"]), world, device,
                 torch.distributed.new_group(backend="gloo"))


def train_epoch(faces, ranks):
    """Train an epoch of six micro-batches; return losses, weights and buffers on the CPU."""
    training = test_faults.training(faces, None, ranks=ranks)
    assert training.train_one_epoch(0)
    ranks.broadcast_buffers(training.state.model)
    return {"losses": list(training.state.losses), "ddp": type(training.state.ddp_model).__name__,
            "state": {k: v.cpu() for k, v in training.state.model.state_dict().items()}}


def lone_rank(faces, target, device):
    """Train as a group of one process and as a process without a group; save both."""
    ranks = join("nccl" if device == "cuda" else "gloo", torch.device(device, 0), Several(1))
    assert ranks.all_reduce_sum(2.0, True) == [2.0, 1.0]
    assert ranks.broadcast_result(lambda: {"a": 1}) == {"a": 1}
    assert ranks.run_on_all(lambda: "own") == "own"
    assert ranks.all_gather("text") == ["text"]
    ranks.wait_for_all()
    grouped = train_epoch(faces, ranks)
    ddp.stop()
    torch.save([grouped, train_epoch(faces, Ranks(device=ranks.device))], target)


@pytest.mark.parametrize("device", DEVICES)
def test_a_group_of_one_process_trains_as_a_process_alone(warm, tmp_path, device):
    """All distributed paths run, under NCCL on a GPU; the exchange adds nothing."""
    child, = warm.ranks(1, call="test_gpu:lone_rank",
                        argv=[str(warm.faces), str(tmp_path / "out"), device])
    assert child.code == 0, child.text
    grouped, alone = torch.load(tmp_path / "out", weights_only=True)
    assert (grouped["ddp"], alone["ddp"]) == ("DistributedDataParallel", "LandmarkNet")
    assert len(grouped["losses"]) == 6
    assert grouped["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    for name, value in alone["state"].items():
        assert torch.allclose(grouped["state"][name], value, rtol=1e-4, atol=1e-5), name


def shared_rank(faces, target, device):
    """Train as one of two processes that share a device; NCCL refuses this, gloo does not."""
    ranks = join("gloo", torch.device(device, 0), 2)
    torch.save(train_epoch(faces, ranks), f"{target}.{ranks.rank}")
    ddp.stop()


@pytest.mark.parametrize("device", DEVICES)
def test_two_processes_share_a_device(warm, tmp_path, device):
    children = warm.ranks(2, call="test_gpu:shared_rank",
                          argv=[str(warm.faces), str(tmp_path / "out"), device])
    assert [child.code for child in children] == [0, 0], children[0].text
    one, two = (torch.load(f"{tmp_path / 'out'}.{rank}", weights_only=True) for rank in range(2))
    assert one["losses"] == two["losses"]
    assert len(one["losses"]) == 3
    for name, value in one["state"].items():
        assert torch.equal(two["state"][name], value), name
