"""What a step does beside forward and backward pass: the same numbers in fewer operations."""
import copy
import pathlib

import numpy
import pytest
import timm.utils
import torch

from nets.model import LandmarkNet
from tools.benchmark import launches
from utils import machine
from utils.args import load_args
from utils.evaluation import predict
from utils.landmarks.schemes import SCHEMES
from utils.training import optim
from utils.training.loss import build_loss
from utils.training.step import StepGuard, StepSeeder, avoid_clones

BACKBONES = ["irnet18", "mobilenetv3_small_050", "tf_efficientnet_lite0"]
SIZE = 64


def network(backbone, **options):
    """A network with random weights, as a training builds it."""
    torch.manual_seed(0)
    return LandmarkNet(SCHEMES["300W"], backbone, **options).to(memory_format=torch.channels_last)


def batches(count):
    """Random images in channels_last and landmarks."""
    random = torch.Generator().manual_seed(1)
    return [(torch.randint(0, 256, (4, SIZE, SIZE, 3), dtype=torch.uint8,
                           generator=random).permute(0, 3, 1, 2),
             torch.rand(4, 68, 2, generator=random)) for _ in range(count)]


def as_torch_and_timm_do_it(model, optimizer, ema, dtype, steps):
    """Train by the functions of torch and timm: what StepGuard must equal."""
    loss = build_loss(model, 10.0, 1.0, "l1")
    for number, step in enumerate(steps):
        optimizer.zero_grad()
        for images, landmarks in step:
            with torch.autocast("cpu", dtype, dtype is not None):
                maps = model(images)
            (loss(maps, landmarks) / len(step)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        ema.update(model, number)


def as_the_trainer_does_it(model, optimizer, ema, dtype, steps):
    """Train by StepGuard."""
    loss, guard = build_loss(model, 10.0, 1.0, "l1"), StepGuard(model, optimizer, ema, True)
    avoid_clones(model)
    for number, step in enumerate(steps):
        guard.begin()
        for images, landmarks in step:
            with torch.autocast("cpu", dtype, dtype is not None), guard.forward():
                maps = model(images)
            (loss(maps, landmarks) / len(step)).backward()
        _, bad = guard.norm(5.0)
        guard.finish(number, bad)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_training_is_that_of_torch_and_timm_to_the_bit(backbone, dtype):
    given, steps = batches(4), None
    steps, states = [given[:2], given[2:]], []
    for train in (as_torch_and_timm_do_it, as_the_trainer_does_it):
        model = network(backbone)
        optimizer = optim.make_optimizer(model, load_args({"lr": 0.01}))
        ema = timm.utils.ModelEmaV3(model, 0.9)
        train(model, optimizer, ema, dtype, steps)
        states.append({**model.state_dict(), **{f"ema.{k}": v for k, v
                                                in ema.module.state_dict().items()}})
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name
    counters = [v for k, v in states[1].items() if k.endswith("num_batches_tracked")]
    assert {int(counter) for counter in counters} == {4}


@pytest.mark.parametrize("fused", [False, True])
def test_a_bad_step_restores_buffers_and_counts_nothing(fused):
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4),
                                torch.nn.Conv2d(4, 4, 3), torch.nn.BatchNorm2d(4, momentum=None))
    unused = torch.nn.BatchNorm2d(4)
    model.unused = unused
    model.forward = lambda x: torch.nn.Sequential(*list(model)[:4])(x)
    optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
    ema = timm.utils.ModelEmaV3(torch.nn.Sequential(*copy.deepcopy(list(model))), 0.9)
    ema.module = copy.deepcopy(model)
    guard, counts = StepGuard(model, optimizer, ema), []
    for number, factor in enumerate((1.0, float("nan"), 1.0)):
        before = copy.deepcopy(model.state_dict())
        guard.begin()
        for _ in range(2):
            with guard.forward():
                loss = model.forward(torch.randn(2, 3, 8, 8)).sum() * factor
            loss.backward()
        norm, bad = guard.norm(0)
        assert bool(bad) == (factor != factor) == (not norm.isfinite())
        guard.finish(number, bad)
        changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
        moved = {"0.weight", "1.running_mean", "3.running_var"}
        assert changed == set() if bad else moved <= changed
        counts.append([int(m.num_batches_tracked) for m in (model[1], model[3], unused)])
    # The cumulative average of the second one depends on its number, so it counts by itself.
    assert counts == [[2, 2, 0], [2, 2, 0], [4, 4, 0]]
    assert [int(ema.module[i].num_batches_tracked) for i in (1, 3)] == [4, 4]


def test_the_layers_keep_their_tensors_where_a_forward_pass_fails():
    model = network("mobilenetv3_small_050")
    guard = StepGuard(model, optim.make_optimizer(model, load_args({})), None, True)
    before = {name: id(value) for name, value in model.state_dict(keep_vars=True).items()}

    def fail():
        with torch.autocast("cpu", torch.bfloat16), guard.forward():
            assert model.head.score.weight.dtype is torch.bfloat16
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert {n: id(v) for n, v in model.state_dict(keep_vars=True).items()} == before


def test_activations_leave_their_input_where_autograd_needs_it():
    model = torch.nn.Sequential(torch.nn.ReLU6(True), torch.nn.Hardswish(True), torch.nn.SiLU(True),
                                torch.nn.ReLU(True))
    avoid_clones(model)
    assert [m.inplace for m in model] == [False, False, False, True]


@pytest.mark.parametrize(("drops", "seeds"), [(0.5, [1, 2, 3, 4]), (0.0, [1])])
def test_torch_is_seeded_in_each_step_only_if_something_is_drawn(monkeypatch, drops, seeds):
    seeder, seeded, seed = StepSeeder(), [], torch.manual_seed
    monkeypatch.setattr(torch, "manual_seed", lambda number: seeded.append(number) or seed(number))
    drawn = []
    for step in range(4):
        seeder.seed((0, 0, step, 0))
        drawn.append(torch.nn.functional.dropout(torch.ones(8), drops))
    assert len(seeded) == len(seeds)
    for step, found in enumerate(drawn):
        seed(int(numpy.random.SeedSequence((0, 0, step, 0)).generate_state(1)[0]))
        assert torch.equal(found, torch.nn.functional.dropout(torch.ones(8), drops))


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    """A prepared set for the benchmark's steps."""
    return launches.draw_faces(tmp_path_factory.mktemp("launches") / "faces")


@pytest.mark.parametrize("backbone", launches.BACKBONES)
def test_nothing_is_launched_for_each_layer_but_the_layer(faces, backbone):
    counts = launches.count_step(faces, backbone, precision="bf16")
    model = network(backbone)
    convolutions = sum(isinstance(m, torch.nn.Conv2d) for m in model.modules())
    norms = sum(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules())
    assert convolutions > 20
    assert counts["aten.convolution.default"] == convolutions
    for name in ("aten.add_.Tensor", "aten.copy_.default", "aten.hardtanh_.default",
                 "aten.hardswish_.default"):
        assert not counts[name], name
    assert counts["aten.clone.default"] <= 2
    # Activations are cast where a layer needs float32, weights together.
    slopes = sum(isinstance(m, torch.nn.PReLU) for m in model.modules())
    assert counts["aten._to_copy.default"] < 20 + 2 * slopes < norms + 20
    # The page has the numbers of one version of torch.
    assert sum(counts.values()) == pytest.approx(documented(backbone), rel=0.05)


def documented(backbone):
    """The operations of a step in bf16 that docs/speed.md states."""
    page = (pathlib.Path(__file__).parent.parent / "docs/speed.md").read_text(encoding="utf-8")
    section = page.partition("## Operations of a step")[2].partition("\n## ")[0]
    line = next(line for line in section.splitlines() if line.startswith(f"| {backbone} |"))
    return int(line.split(" | ")[2])


def test_synchronised_norms_keep_their_counter():
    """Torch's refuses to work without it."""
    model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)))
    with StepGuard(model).forward():
        assert model[1].num_batches_tracked is not None


@pytest.mark.parametrize("deterministic", [False, True])
def test_convolutions_are_measured_in_forward_and_backward_passes_only(monkeypatch, deterministic):
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    assert not torch.backends.cudnn.benchmark
    with optim.fastest_convolutions():
        assert torch.backends.cudnn.benchmark == (not deterministic)
    assert not torch.backends.cudnn.benchmark


@pytest.mark.parametrize("before", [False, True])
def test_scores_are_multiplied_exactly(monkeypatch, before):
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    kept, seen = (matmul.allow_tf32, cudnn.allow_tf32), []
    try:
        matmul.allow_tf32 = cudnn.allow_tf32 = before

        class Model:
            """A model that looks at the settings."""

            def predict(self, images):
                seen.append((matmul.allow_tf32, cudnn.allow_tf32))
                return images, images

        predict.torch_predict(Model(), "cpu")(torch.zeros(1))
        assert seen == [(False, False)]
        assert (matmul.allow_tf32, cudnn.allow_tf32) == (before, before)
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = kept


def test_cores_are_those_that_this_process_may_use(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {3, 5, 7}, raising=False)
    assert machine.available_cores() == 3
    monkeypatch.delattr("os.sched_getaffinity")
    monkeypatch.setattr("os.cpu_count", lambda: 6)
    assert machine.available_cores() == 6
