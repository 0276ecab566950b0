"""Time-outs of the process group, and how ranks end that fail together or alone."""
import dataclasses
import datetime
import functools
import json
import os
import pathlib
import re
import time

import pytest
import torch
from helpers import warm as warm_module

from utils.args import load_args
from utils.errors import UserError
from utils.training import ddp, trainer


@pytest.fixture(scope="module")
def warm():
    return warm_module.warm()


def rank_timeout(target):
    """Save the timeouts of a rank's groups, of gradients and of control messages."""
    ranks = ddp.start("cpu")
    groups = torch.distributed.distributed_c10d._get_default_group(), ranks.control
    seconds = [group._get_backend(torch.device("cpu")).options._timeout.total_seconds()
               for group in groups]
    assert ranks.all_gather(ranks.rank) == [0, 1]
    ddp.stop()
    pathlib.Path(f"{target}.{os.environ['RANK']}").write_text(json.dumps(seconds))


def test_control_messages_wait_for_hours_and_gradients_for_minutes(warm, tmp_path):
    children = warm.ranks(2, call="test_ddp:rank_timeout", argv=[str(tmp_path / "out")])
    assert [c.code for c in children] == [0, 0], children[0].text
    for rank in range(2):
        assert json.loads((tmp_path / f"out.{rank}").read_text()) == [900, 4 * 3600]


def rank_stuck(target, place):
    """Let rank 1 not take part in a message; rank 0 writes its process id for it."""
    group = torch.distributed.distributed_c10d
    ddp.CONTROL_TIMEOUT = ddp.GRADIENT_TIMEOUT = datetime.timedelta(seconds=3)
    ddp.STEP_TIMEOUT = datetime.timedelta(seconds=2)
    ddp.LATE_SECONDS = 1
    ranks = ddp.start("cpu")
    other, = (pid for pid in ranks.all_gather(os.getpid()) if pid != os.getpid())
    if ranks.rank:
        path = pathlib.Path(f"/proc/{other}/stat")
        warm_module.wait_for(lambda: not path.exists() or ") Z " in path.read_text())
        os._exit(0)
    try:
        if place == "gradients":
            torch.distributed.all_reduce(torch.zeros(3))
        elif place == "control":
            ranks.all_gather(None)
        else:
            dataclasses.replace(ranks, device=torch.device("cuda", 0)).wait_for_all()
    except RuntimeError as error:
        assert group.is_initialized()
        pathlib.Path(target).write_text(str(error))
        ddp.stop(error)


@pytest.mark.parametrize("place", ["gradients", "control", "step"])
def test_a_stuck_rank_is_named(warm, tmp_path, place):
    """In an exchange of gradients, in a control message, and before a GPU is waited for."""
    children = warm.ranks(2, call="test_ddp:rank_stuck",
                          argv=[str(tmp_path / "out"), place])
    assert [c.code for c in children] == [1, 0], children[0].text
    last = children[0].text.strip().splitlines()[-1]
    assert re.match(rf"error: rank 1 \(process {children[1].pid} on .*\) did not answer in time",
                    last), children[0].text
    if place == "step":
        assert "rank" in (tmp_path / "out").read_text().lower()


def rank_mistake():
    """Print the mistakes that each rank is told of; each is made on one rank only."""
    rank = int(os.environ["RANK"])

    def fail(*_):
        raise UserError(f"a mistake of rank {rank}")

    with pytest.raises(UserError) as found:
        ddp.rank_0_args(fail)
    print(found.value)
    choose, ddp.choose_device = ddp.choose_device, fail if rank == 1 else ddp.choose_device
    with pytest.raises(UserError) as found:
        ddp.start("cpu")
    print(found.value)
    ddp.choose_device = choose
    # The group does not exist yet, so this store is used once more, by other keys.
    again = functools.cache(functools.partial(torch.distributed.PrefixStore, "again", ddp._store()))
    ddp._store = again
    with pytest.raises(UserError) as found:
        trainer.train(load_args({"exp": "mistake", "device": "cpu"}),
                      check=fail if rank == 1 else lambda args: None)
    print(found.value)
    ddp.stop(found.value)
    assert not torch.distributed.is_initialized(), "an error of all ranks leaves the group"


def test_a_mistake_on_one_machine_is_told_on_all(warm):
    children = warm.ranks(2, call="test_ddp:rank_mistake")
    for child in children:
        assert child.code == 0, child.text
        assert child.text.splitlines() == ["a mistake of rank 0", *["a mistake of rank 1"] * 2]
    assert not warm.folder("mistake").exists()


def rank_alone_in_error(mistake):
    """Let rank 1 fail alone; leaving the group waits for all, as NCCL does."""
    ddp.FAILURE_SECONDS = 1
    torch.distributed.destroy_process_group = lambda: time.sleep(3600)
    ranks = ddp.start("cpu")
    error = UserError("a mistake") if mistake == "yes" else KeyError("a fault")
    if ranks.rank:
        ddp.stop(error)
    try:
        ranks.all_gather(None)
    except RuntimeError as lost:
        ddp.stop(lost)


@pytest.mark.parametrize(("mistake", "code"), [("yes", 2), ("no", 1)])
def test_a_rank_that_fails_alone_does_not_wait_for_the_others(warm, mistake, code):
    children = warm.ranks(2, call="test_ddp:rank_alone_in_error", argv=[mistake])
    assert [c.code for c in children] == [1, code], children[0].text
    assert children[1].text == ("error: a mistake\n" if mistake == "yes" else
                                "KeyError: 'a fault'\n")
