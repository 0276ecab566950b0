"""Several processes train as one does, also after kills and stops under torchrun."""
import copy
import os
import pathlib
import re
import signal

import numpy
import pytest
import test_resume
import timm.layers
import torch
from helpers import warm as warm_module

from nets.model import LandmarkNet
from utils import checkpoint
from utils.args import load_args
from utils.data import dataset
from utils.errors import UserError
from utils.evaluation import predict
from utils.landmarks import metrics
from utils.landmarks.schemes import SCHEMES
from utils.training import ddp

BACKBONE = "mobilenetv3_small_050"


@pytest.fixture(scope="module")
def warm():
    return warm_module.warm()


def in_one_thread(make):
    """Call make() with one thread, as the ranks that it is compared with use."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return make()
    finally:
        torch.set_num_threads(before)


def three_steps(faces, batch):
    """Take three optimiser steps in float64 with batch norm in evaluation mode."""
    from types import SimpleNamespace

    from utils import args as settings
    from utils.data import augment
    from utils.training import loader, loss, stages
    from utils.training.state import TrainState
    from utils.training.trainer import Trainer
    args = settings.load_args({"batch_size": batch, "input_size": 64, "workers": 0, "clip": 0})
    ranks = ddp.start("cpu")
    prepared = dataset.PreparedSet(faces)
    torch.manual_seed(0)
    model = LandmarkNet(prepared.scheme, BACKBONE).double()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            module.eval()
            module.train = lambda mode=True: None
    listed = prepared.lists["train"]
    batches, sampler = loader.make_loader(listed, prepared, prepared.scheme, args, ranks, 2)
    assert isinstance(batches.dataset.augmentation, augment.Augment)
    sampler.steps = 3
    state = TrainState(
        stages.plan(args)[0], args, prepared, prepared.scheme, neighbour_face=None, data_sets=[],
        digest="", model=model, ema=None, teacher=None, loader=batches, sampler=sampler,
        ddp_model=(model if ranks.world == 1
                   else torch.nn.parallel.DistributedDataParallel(model)),
        loss=loss.build_loss(model, 10.0, 1.0, "l1"),
        faults=loader.FaultCounter(listed, None, ranks), dtype=None,
        scaler=torch.amp.GradScaler("cpu", enabled=False),
        optimizer=torch.optim.Adam(model.parameters(), 1e-3),
        scheduler=SimpleNamespace(step_update=lambda number: None))
    training = Trainer(args, None, ranks, SimpleNamespace(requested=False), state)
    assert training.train_one_epoch(0)
    assert len(state.losses) == 3
    ddp.stop()
    return {"parameters": dict(model.named_parameters()), "losses": state.losses}


def rank_three_steps(faces, target):
    """Run one rank of the test below; rank 0 saves the result."""
    result = three_steps(faces, 2)
    if os.environ["RANK"] == "0":
        torch.save(result, target)


def test_two_processes_take_the_steps_of_one(warm, tmp_path):
    children = warm.ranks(2, call="test_distributed:rank_three_steps",
                          argv=[str(warm.faces), str(tmp_path / "two.pt")])
    assert [c.code for c in children] == [0, 0], children[0].text
    two = torch.load(tmp_path / "two.pt", weights_only=True)
    one = in_one_thread(lambda: three_steps(warm.faces, 4))
    assert two["losses"] == pytest.approx(one["losses"], abs=1e-10)
    for name, parameter in one["parameters"].items():
        assert parameter.dtype == torch.float64
        assert (parameter - two["parameters"][name]).abs().max() < 1e-8, name
    assert one["parameters"].keys() == two["parameters"].keys()
    assert one["losses"][2] < one["losses"][0]


def rank_gather(faces, target):
    """Gather predictions of a list whose length no number of ranks divides, and score them."""
    ranks = ddp.start("cpu")
    prepared = dataset.PreparedSet(faces)
    listed = prepared.lists["train"].select(numpy.arange(43))
    given = predictions(listed)
    calls = iter(range(ranks.rank, 43, ranks.world))

    def given_ones(images):
        return numpy.stack([given[next(calls)] for _ in images])

    predicted = predict.predict_list(given_ones, listed, prepared.margin, 32, batch=5,
                                     ranks=ranks)
    nme = predict.list_nme(predicted, listed, prepared.scheme, prepared.scheme)[0]
    # The sum over the ranks shows that every rank has all predictions.
    count, everywhere = len(predicted), ranks.all_reduce_sum(float(nme.mean()))[0] / ranks.world
    ddp.stop()
    torch.save({"nme": float(nme.mean()), "everywhere": everywhere, "count": count},
               f"{target}.{ranks.rank}")


def predictions(faces):
    """Predictions with a different error for each face."""
    noise = numpy.random.default_rng(1).normal(0, 0.05, faces.points.shape)
    return faces.points + noise * numpy.arange(1, len(faces) + 1)[:, None, None] / len(faces)


@pytest.mark.parametrize("world", [2, 3])
def test_gathered_predictions_score_as_in_one_process(warm, tmp_path, world):
    children = warm.ranks(world, call="test_distributed:rank_gather",
                          argv=[str(warm.faces), str(tmp_path / "out")])
    assert [c.code for c in children] == [0] * world, children[0].text
    prepared = dataset.PreparedSet(warm.faces)
    listed = prepared.lists["train"].select(numpy.arange(43))
    given = predictions(listed)
    boxes = listed.boxes
    scale = numpy.stack([boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]], 1)[:, None]
    expected = metrics.nme(given * scale, listed.points * scale,
                           metrics.divisors(listed.points * scale, prepared.scheme.divisor,
                                            listed.published)).mean()
    for rank in range(world):
        found = torch.load(f"{tmp_path / 'out'}.{rank}", weights_only=True)
        assert found["count"] == 43
        assert found["nme"] == pytest.approx(expected, abs=1e-9)
        assert found["everywhere"] == pytest.approx(expected, abs=1e-9)


def rank_evaluate(faces, weights, target):
    """Evaluate a checkpoint on this process group."""
    ranks = ddp.start("cpu")
    result = evaluate(faces, weights, ranks)
    ddp.stop()
    torch.save(result, f"{target}.{ranks.rank}")


def evaluate(faces, weights, ranks=None):
    """Return the NME in % of 43 training faces, which split unevenly over two ranks."""
    prepared = dataset.PreparedSet(faces)
    model = checkpoint.load_model(weights)
    listed = prepared.lists["train"].select(numpy.arange(43))
    predicted = predict.predict_list(predict.torch_predict(model, "cpu"), listed,
                                        prepared.margin, 64, batch=8, ranks=ranks)
    nme, _ = predict.list_nme(predicted, listed, model.scheme, prepared.scheme)
    return 100 * float(nme.mean())


def test_two_ranks_evaluate_a_checkpoint_as_one_does(warm, tmp_path):
    child = warm.run("--train", "--exp", "judged", *warm.flags, "--epochs", 1)
    assert child.code == 0, child.text
    weights = str(warm.folder("judged") / "best.pt")
    children = warm.ranks(2, call="test_distributed:rank_evaluate",
                          argv=[str(warm.faces), weights, str(tmp_path / "out")])
    assert [c.code for c in children] == [0, 0], children[0].text
    one = evaluate(warm.faces, weights)
    for rank in range(2):
        assert torch.load(f"{tmp_path / 'out'}.{rank}", weights_only=True) == pytest.approx(
            one, abs=1e-3)


def test_synchronised_batch_norm_keeps_the_net():
    """Timm's norm layers hold activations, which torch's own conversion would drop."""
    torch.manual_seed(0)
    model = LandmarkNet(SCHEMES["300W"], BACKBONE).eval()
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    before, names = model.predict(images), list(model.state_dict())
    model = timm.layers.convert_sync_batchnorm(model).eval()
    assert any(isinstance(m, torch.nn.SyncBatchNorm) for m in model.modules())
    assert list(model.state_dict()) == names
    for one, two in zip(before, model.predict(images)):
        assert torch.allclose(one, two, atol=1e-6)


class Partly(torch.nn.Module):
    """A network whose second layer is never called."""

    def __init__(self):
        super().__init__()
        self.used, self.unused = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
        self.fixed = torch.nn.Parameter(torch.zeros(2), requires_grad=False)

    def forward(self, images):
        """Images (N, 3, S, S) to nested outputs."""
        return self.used(images.float().mean((2, 3))) + self.fixed, (self.used.bias, )


def test_unused_parameters_are_found_without_a_trace():
    model = Partly().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert ddp.unused_parameters(model, 32) == ["unused.weight", "unused.bias"]
    assert not model.training
    assert all(p.grad is None for p in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_backbone_with_unused_parameters_trains_in_two_processes(warm):
    children = warm.ranks(2, "--train", "--exp", "hrnet", *warm.flags, "--backbone",
                          "hrnet_w18_small", "--stride", 16, "--epochs", 1, "--batch-size", 2)
    assert [c.code for c in children] == [0, 0], children[0].text
    assert len(test_resume.table(warm.folder("hrnet"))) == 1
    assert "Warning" not in children[0].text, children[0].text


def rank_buffers(target):
    """Save a rank's buffers after three forward passes, with and without DDP, and broadcast."""
    ranks = ddp.start("cpu")
    torch.manual_seed(0)
    model = LandmarkNet(SCHEMES["300W"], BACKBONE)
    alone = copy.deepcopy(model)
    parallel = ddp.wrap_ddp(model, ranks, 64)
    generator = torch.Generator().manual_seed(ranks.rank)
    for _ in range(3):
        images = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8, generator=generator)
        parallel(images)
        alone(images)
    own = {name: value.clone() for name, value in model.named_buffers()}
    ranks.broadcast_buffers(model)
    ddp.stop()
    torch.save([own, dict(alone.named_buffers()), dict(model.named_buffers())],
               f"{target}.{ranks.rank}")


def test_batch_norm_statistics_stay_on_their_rank_until_they_are_broadcast(warm, tmp_path):
    children = warm.ranks(2, call="test_distributed:rank_buffers", argv=[str(tmp_path / "out")])
    assert [c.code for c in children] == [0, 0], children[0].text
    found = [torch.load(f"{tmp_path / 'out'}.{rank}", weights_only=True) for rank in range(2)]
    for own, alone, judged in found:
        for name, value in own.items():
            assert torch.equal(value, alone[name]), name
            assert torch.equal(judged[name], found[0][0][name]), name
    moved = [name for name in found[0][0] if name.endswith("running_mean")]
    assert moved
    assert all(not torch.equal(found[0][0][n], found[1][0][n]) for n in moved)


@pytest.mark.parametrize(("wish", "batch", "device", "synchronised"), [
    ("auto", 7, "cuda", True), ("auto", 8, "cuda", False), ("always", 64, "cuda", True),
    ("never", 2, "cuda", False), ("auto", 2, "cpu", False), ("never", 2, "cpu", False)])
def test_batch_norm_is_synchronised_where_it_is_asked_for(wish, batch, device, synchronised):
    args = load_args({"sync_bn": wish, "batch_size": batch})
    ranks = ddp.Ranks(0, 2, torch.device(device))
    model, description = ddp.convert_sync_batchnorm(
        torch.nn.Sequential(torch.nn.BatchNorm2d(3)), args, ranks)
    assert isinstance(model[0], torch.nn.SyncBatchNorm) == synchronised
    assert description.startswith("synchronised" if synchronised else "statistics per process")


def test_batch_norm_cannot_be_synchronised_on_cpus():
    args = load_args({"sync_bn": "always"})
    with pytest.raises(UserError, match="sync_bn: always needs GPUs"):
        ddp.convert_sync_batchnorm(torch.nn.BatchNorm2d(3), args, ddp.Ranks(0, 2))


@pytest.fixture(scope="module")
def alone(warm):
    """The folder of an uninterrupted training of two ranks."""
    children = warm.ranks(2, "--train", "--exp", "pair", *warm.flags, *PAIR)
    assert [c.code for c in children] == [0, 0], children[0].text
    return warm.folder("pair")


PAIR = ["--batch-size", 2, "--epochs", 6]


def ranks_of(launcher):
    """Process ids of the ranks below a main.sh, by rank."""
    found = {}
    for entry in os.listdir("/proc"):
        try:
            status = pathlib.Path(f"/proc/{entry}/environ").read_bytes().split(b"\0")
            command = pathlib.Path(f"/proc/{entry}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"main.py" in command and any(v.startswith(b"RANK=") for v in status) and (
                f"PIPNET_TEST={launcher}".encode() in status) and (
                pathlib.Path(f"/proc/{entry}/stat").read_text().split()[3]
                == str(torchrun_of(launcher))):
            rank = next(int(v[5:]) for v in status if v.startswith(b"RANK="))
            found[rank] = int(entry)
    return found


def torchrun_of(launcher):
    """The process id of the torchrun that a main.sh has started, or None."""
    for entry in os.listdir("/proc"):
        try:
            command = pathlib.Path(f"/proc/{entry}/cmdline").read_bytes().split(b"\0")
            environment = pathlib.Path(f"/proc/{entry}/environ").read_bytes().split(b"\0")
            mine = f"PIPNET_TEST={launcher}".encode() in environment
        except OSError:
            continue
        if (mine and b"torch.distributed.run" in command
                and b"utils.training.launch" not in command):
            return int(entry)
    return None


def test_two_ranks_under_torchrun_are_stopped_resumed_and_killed(warm, alone):
    folder = warm.folder("shot")
    first = warm.bash(2, "--train", "--exp", "shot", *warm.flags, *PAIR, "--save-minutes", 0.01)
    warm_module.wait_for((folder / "last.pt").exists)
    first.send_signal(signal.SIGTERM)
    text, _ = first.communicate(timeout=400)
    assert first.returncode == 128 + signal.SIGTERM, text
    assert "Traceback" not in text
    assert "E11" not in text
    assert re.search(r"stopped; go on with: bash main.sh 2 --train --exp shot .*--resume", text)
    state = checkpoint.read(folder / "last.pt")
    assert state["epoch"] < 6

    second = warm.bash(2, "--resume", "--exp", "shot", PIPNET_TEST="shot")
    changed = (folder / "last.pt").stat().st_mtime_ns
    warm_module.wait_for(lambda: (folder / "last.pt").stat().st_mtime_ns != changed)
    os.kill(ranks_of("shot")[1], signal.SIGKILL)
    text, _ = second.communicate(timeout=500)
    assert second.returncode == 0, text
    assert text.count("resume: shot: goes on at") == 2, text
    assert len(test_resume.table(folder)) == 6
    test_resume.same_run(alone, folder)
    assert (folder / "best.onnx").exists()


# Imported by every process before main.py. In the first start rank 1 raises an error, rank 0 waits
# as for a GPU (no Python code runs, so SIGTERM is not handled), and leaving the group waits for
# all.
HANGING = """
import importlib.abc, importlib.util, os, signal, sys, time

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "utils.training.trainer":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module
        spec.loader.exec_module = lambda module: (execute(module), patch(module.Trainer))
        return spec

def wait(*_):
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    time.sleep(3600)

def patch(trainer):
    import torch
    torch.distributed.destroy_process_group = wait
    step = trainer.train_step
    def failing(self, batches, number):
        if number == 2:
            if os.environ["RANK"] == "0":
                wait()
            raise ValueError("a fault of rank 1")
        step(self, batches, number)
    trainer.train_step = failing

if "RANK" in os.environ and os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0":
    sys.meta_path.insert(0, Finder())
"""


def test_an_exception_on_one_rank_restarts_the_job(warm, alone, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(HANGING)
    child = warm.bash(2, "--train", "--exp", "hanging", *warm.flags, *PAIR,
                      PYTHONPATH=str(tmp_path))
    text, _ = child.communicate(timeout=500)
    assert child.returncode == 0, text
    assert text.count("ValueError: a fault of rank 1") == 1, text
    assert "resume: hanging: nothing is saved yet, training starts anew" in text, text
    assert "Unable to shutdown process" not in text, "torchrun had to wait 30 s for rank 0"
    test_resume.same_run(alone, warm.folder("hanging"))


def test_a_training_goes_on_with_another_number_of_processes(warm):
    """Two processes hold 16 faces at once where 8 are asked for; one process accumulates them."""
    flags = [*warm.flags, "--batch-size", 8, "--epochs", 4]
    children = warm.ranks(2, "--train", "--exp", "two", *flags)
    assert [c.code for c in children] == [0, 0], children[0].text
    line = ("accumulated = 16 a step (asked 8), learning rate x 1.41 (the square root of 16 / 8); "
            "2 steps an epoch, 8 in all")
    assert f"batch: 8 a process x 2 processes x 1 {line}" in children[0].text, children[0].text
    children = warm.ranks(2, "--train", "--exp", "fewer", *flags, hook="step:4:TERM")
    assert [c.code for c in children] == [143, 143], children[0].text
    child = warm.run("--resume", "--exp", "fewer")
    assert child.code == 0, child.text
    assert "goes on at epoch 3, step 1" in child.text, child.text
    assert f"batch: 8 a process x 1 processes x 2 {line}" in child.text, child.text
    two, fewer = (test_resume.table(warm.folder(exp)) for exp in ("two", "fewer"))
    assert [row["lr"] for row in two] == [row["lr"] for row in fewer]
    # The forward passes hold the same faces, so the same batch norm statistics.
    assert [float(row["loss"]) for row in fewer] == pytest.approx(
        [float(row["loss"]) for row in two], rel=1e-3)
    children = warm.ranks(3, "--resume", "--exp", "fewer")
    assert [c.code for c in children] == [2, 2, 2], children[0].text
    assert children[0].text.strip().splitlines()[-1].endswith(
        "3 processes x --batch-size 8 do not divide; use 2 processes with --batch-size 8")


def test_an_error_on_all_ranks_is_one_line(warm, tmp_path):
    (tmp_path / "train.txt").write_text("image.jpg 0.1 0.2 oops\n")
    # --shut reaches the ranks, although torchrun has a --shutdown-timeout.
    child = warm.bash(2, "--train", "--exp", "mistaken", "--shut", 0.1, *warm.flags[:-1], tmp_path)
    text, _ = child.communicate(timeout=400)
    assert child.returncode == 2
    assert text.startswith(f"error: {tmp_path}/train.txt:1"), text
    assert text.count("\n") == 1, text
    assert not warm.folder("mistaken").exists()


@pytest.mark.parametrize(("argv", "env", "message"), [
    ([], {}, "number of processes"), (["two"], {}, "number of processes"),
    (["2", "--train", "--lrr", "1"], {}, "unknown flag --lrr"),
    (["2", "--train", "--device", "cpu"], {"NNODES": "2"}, "--exp NAME"),
    (["2", "--train", "--device", "cpu", "--exp", "x"], {"NNODES": "2", "NODE_RANK": "1"},
     "MASTER_ADDR"),
    (["2", "--resume", "--exp", "nobody"], {}, "no such experiment")])
def test_main_sh_checks_before_it_starts(warm, argv, env, message):
    child = warm.bash(*argv, **env)
    text, _ = child.communicate(timeout=60)
    assert child.returncode != 0, text
    assert message in text, text
    assert "Traceback" not in text, text
    assert text.strip().count("\n") == 0, text


def test_main_sh_shows_the_help_of_main_py(warm):
    text, _ = (child := warm.bash(2, "--help")).communicate(timeout=60)
    assert child.returncode == 0
    assert text.startswith("usage: main.py")
    assert text.count("usage:") == 1


@pytest.mark.slow
@pytest.mark.parametrize("event", ["stop", "kill"])
def test_two_machines(warm, alone, event):
    """Two torchrun agents on this machine, of one process each."""
    exp = f"machines-{event}"
    folder = warm.folder(exp)
    flags = ["--train", "--exp", exp, *warm.flags, *PAIR, "--save-minutes", 0.01]
    env = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517"}
    agents = [warm.bash(1, *flags, **env, NODE_RANK=str(i), PIPNET_TEST=f"{exp}-{i}")
              for i in range(2)]
    warm_module.wait_for((folder / "last.pt").exists)
    if event == "stop":
        agents[1].send_signal(signal.SIGTERM)
    else:
        os.kill(ranks_of(f"{exp}-1")[1], signal.SIGKILL)
    texts = [agent.communicate(timeout=500)[0] for agent in agents]
    ended = 128 + signal.SIGTERM if event == "stop" else 0
    assert [agent.returncode for agent in agents] == [ended, ended], "\n\n".join(texts)
    if event == "stop":
        assert all("stopped; go on with" in text for text in texts), texts
        assert checkpoint.read(folder / "last.pt")["epoch"] < 6
        agents = [warm.bash(1, *flags, "--resume", **env, NODE_RANK=str(i)) for i in range(2)]
        texts = [agent.communicate(timeout=500)[0] for agent in agents]
        assert [agent.returncode for agent in agents] == [0, 0], "\n\n".join(texts)
    assert len(test_resume.table(folder)) == 6
    test_resume.same_run(alone, folder)
