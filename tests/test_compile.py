"""--compile: the same training if torch can compile the network, else a line in the log."""
import copy
import shutil

import pytest
import torch
from helpers import warm as warm_module

from utils import experiment
from utils.args import load_args
from utils.training import ddp
from utils.training.ddp import Ranks


class Net(torch.nn.Module):
    """A network that takes images as a LandmarkNet does."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))

    def forward(self, images):
        return self.layers(images.float())


def settings(**given):
    return load_args({"input_size": 32, "batch_size": 2, **given})


def test_nothing_is_compiled_unless_asked_for(monkeypatch):
    monkeypatch.setattr(torch, "compile", None)
    model = Net()
    assert ddp.compile_model(model, None, settings(), None, Ranks()) == (model, None)


def test_a_compiler_that_fails_leaves_no_trace(monkeypatch):
    def broken(model):
        def call(images):
            model(images)
            raise RuntimeError("no C++\n compiler")
        return call

    monkeypatch.setattr(torch, "compile", broken)
    model = Net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    call, description = ddp.compile_model(model, copy.deepcopy(model), settings(compile=True), None,
                                          Ranks())
    assert call is model
    assert description == "compile: torch.compile failed, training without it: no C++ compiler"
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_a_compiled_training_is_the_same_but_for_rounding():
    warm = warm_module.warm()
    for exp, more in (("plain", ()), ("compiled", ("--compile",))):
        child = warm.run("--train", "--exp", exp, *warm.flags, "--epochs", 1, *more)
        assert child.code == 0, child.text
    assert "compile: the network is compiled by torch" in child.text
    one, two = (experiment.read_epochs(warm.folder(exp))[0] for exp in ("plain", "compiled"))
    assert one["loss"] == pytest.approx(two["loss"], rel=1e-3)


@pytest.mark.parametrize(("world", "resets"), [(1, 0), (2, 1)])
def test_several_processes_compile_anew_for_ddp(monkeypatch, world, resets):
    """DDP cuts a graph where gradients are ready to be exchanged; the trial's has no cuts."""
    calls = []
    monkeypatch.setattr(torch, "compile", lambda model: calls.append("compile") or model)
    monkeypatch.setattr(torch.compiler, "reset", lambda: calls.append("reset"))
    monkeypatch.setattr(Ranks, "all_gather", lambda ranks, value: [value] * world)
    model = Net()
    _, description = ddp.compile_model(model, copy.deepcopy(model), settings(compile=True), None,
                                       Ranks(world=world))
    assert description == "compile: the network is compiled by torch"
    assert calls == ["compile"] + ["reset"] * resets + ["compile"]


def test_the_trial_runs_as_a_step_does(monkeypatch):
    found = []

    def watch(trial):
        def call(images):
            found.append(trial.layers[1].num_batches_tracked)
            return trial(images)
        return call

    monkeypatch.setattr(torch, "compile", watch)
    model = Net()
    ddp.compile_model(model, copy.deepcopy(model), settings(compile=True), None, Ranks())
    assert found == [None]


def test_synchronised_batch_norm_is_not_compiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", None)
    model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(Net())
    call, description = ddp.compile_model(model, Net(), settings(compile=True), None, Ranks())
    assert call is model
    assert description == ("compile: not with synchronised batch norm, whose messages cut the "
                           "graph at each layer; give --sync-bn never")
