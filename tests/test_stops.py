"""A GPU does not wait for the host between flushes, and late flushes change nothing."""
import copy
import warnings
from types import SimpleNamespace

import pytest
import test_faults
import timm.utils
import torch
from helpers import warm as warm_module
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from nets.lids import LidHead
from utils.args import load_args
from utils.data import dataset
from utils.data.operations import OPERATIONS
from utils.data.pixel_grid import PixelGrid
from utils.errors import UserError
from utils.training import ddp, distil, gssl, loader, optim
from utils.training.ddp import Ranks
from utils.training.step import StepGuard

GPU = torch.device("cuda", 0)


def needs(count):
    """Mark a test that needs `count` GPUs; -m gpu selects these tests."""
    return [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < count,
                                                reason=f"needs {count} GPU(s)")]


NEEDS_GPU = needs(1)


@pytest.fixture(scope="module")
def warm():
    return warm_module.warm()


class Watched(TorchDispatchMode):
    """Raises AssertionError for operations that synchronise a GPU with the host."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        out, options = function(*arguments, **(options or {})), options or {}
        name = function.overloadpacket._qualified_op_name
        if name in ("aten::_to_copy", "aten::copy_"):
            source = arguments[0] if name == "aten::_to_copy" else arguments[1]
            unhurried = options.get("non_blocking") or (*arguments, None, None)[2] is True
            crosses = {out.device.type, source.device.type} == {"cpu", "cuda"}
            # A non-blocking copy to the device is fine, because the loader pins its memory.
            assert not crosses or unhurried and out.is_cuda, f"{name} to {out.device} waits"
        # Indices on the host are copied to the device, which synchronises.
        if name.startswith("aten::index"):
            on = {t.device.type for a in arguments for t in (a if isinstance(a, list) else [a])
                  if isinstance(t, torch.Tensor)}
            assert len(on) == 1, f"{name} of {on} waits"
        return out


class Fake:
    """A GPU that computes only shapes; reading a value from it raises an error."""

    def __init__(self):
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)

    def move(self, module):
        """Move a module to the fake GPU."""
        with self.mode:
            for part in module.modules():
                for name, value in part._parameters.items():
                    if value is not None:
                        part._parameters[name] = torch.nn.Parameter(self.like(value))
                for name, value in part._buffers.items():
                    if value is not None:
                        part._buffers[name] = self.like(value)
        return module

    def like(self, value):
        """Return a tensor of the same shape and dtype on the fake GPU."""
        return torch.empty(value.shape, dtype=value.dtype, device=GPU)

    def backward(self, module):
        """Replace Tensor.backward, which needs a real GPU: give every parameter a gradient."""
        def backward(*_):
            for parameter in module.parameters():
                gradient = self.like(parameter)
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        return backward


def on_fake_gpu(warm, folder, monkeypatch, head="pip", teacher=None, rounds=False, fp16=False):
    """Return a Trainer on a Fake GPU, that GPU, and batches for three steps."""
    fake = Fake()
    training = test_faults.training(warm.faces, folder, head=head)
    batches = [batch for _, batch in zip(range(6), training.state.loader)]
    if teacher is not None:
        training.state.teacher = distil.Teacher(str(teacher), training.state.model.scheme, 0.5)
        model, = training.state.teacher.models
        model.lids = LidHead(model.backbone.channels, model.scheme)
        fake.move(model)
        with fake.mode:
            training.state.teacher.eyes = [
                (c, fake.like(i)) for c, i in training.state.teacher.eyes]
    training.state.ema = timm.utils.ModelEmaV3(training.state.model, 0.9)
    for module in (training.state.model, training.state.ema.module):
        fake.move(module)
    real = training.state.loss.real
    if head == "pip":
        real.neighbours = training.state.model.head.neighbours
    training.state.loss = gssl.RoundLoss(real, "std", 20) if rounds else real
    training.ranks = Ranks(device=GPU)
    training.state.dtype = torch.float16 if fp16 else torch.bfloat16
    if fp16:
        monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
        monkeypatch.setattr(torch.amp.grad_scaler, "amp_definitely_not_available", lambda: False,
                            raising=False)
        training.state.scaler = torch.amp.GradScaler("cuda")
        assert training.state.scaler.is_enabled()
    training.state.optimizer = optim.make_optimizer(training.state.model, training.state.args)
    monkeypatch.setattr(torch.Tensor, "backward", fake.backward(training.state.model))
    return training, fake, iter(batches)


@pytest.mark.parametrize("options", [{}, {"head": "regression"}, {"teacher": True},
                                     {"rounds": True}, {"fp16": True}],
                         ids=lambda options: "".join(options) or "pip")
def test_a_step_reads_nothing_from_the_gpu(warm, tiny_weights, tmp_path, monkeypatch, options):
    if "teacher" in options:
        options = {"teacher": tiny_weights}
    training, fake, batches = on_fake_gpu(warm, tmp_path, monkeypatch, **options)
    with fake.mode, Watched(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # There is no GPU for autocast.
        for number in range(3):
            training.train_step(batches, number)
        assert len(training.state.pending) == 3
        # A flush does read.
        with pytest.raises(DataDependentOutputException):
            training.flush_metrics(False, 0.0)


def test_augmentation_of_a_batch_reads_nothing_from_the_gpu(drawn_set, monkeypatch):
    prepared = dataset.PreparedSet(drawn_set)
    listed = prepared.lists["train"]
    args = load_args({"input_size": 64, "batch_size": 16, "cache": "device", "shut": 0.3,
                      "grey": 0.5, "blur": 0.9, "occlusion": 0.9})
    batches, _ = loader.make_loader(listed, prepared, prepared.scheme, args, Ranks(), 1)
    draws = batches.batches.dataset
    samples = [draws[0, i] for i in range(len(listed))]
    for kind in OPERATIONS:
        assert any(getattr(params, kind) is not None for params, *_ in samples), kind
    packed, fake, pinned = draws.pack(samples), Fake(), []
    # Pinning memory needs a real GPU.
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t: pinned.append(t.shape) or t)
    with fake.mode, Watched():
        batches.device, batches.augment.grid = GPU, PixelGrid(64, GPU)
        batches.cache.crops = fake.like(batches.cache.crops)
        (images, landmarks, *others), _ = batches._launch(packed)
    assert images.shape == (len(samples), 64, 64, 3)
    assert images.is_contiguous()
    assert images.device == landmarks.device == GPU
    assert [other.device.type for other in others] == ["cpu", "cpu"]
    assert pinned == [packed.buffer.shape], "one copy a batch"


@pytest.mark.parametrize("read", [float, bool, torch.Tensor.item, torch.Tensor.tolist,
                                 torch.Tensor.cpu, lambda t: torch.zeros(3)[t.long()],
                                 lambda t: t.view(1)[torch.tensor([0])], torch.nonzero,
                                 lambda t: torch.zeros(()).to(t.device)])
def test_the_fake_gpu_detects_reads(read):
    fake = Fake()
    with fake.mode, Watched():
        value = fake.like(torch.zeros(()))
        torch.zeros(()).to(GPU, non_blocking=True)
        with pytest.raises(Exception, match="waits|aten|subclasses|index|device"):
            read(value)


@pytest.mark.parametrize("deterministic", [False, True])
def test_float32_is_multiplied_as_tf32_unless_deterministic(monkeypatch, deterministic):
    products, convolutions = (SimpleNamespace(allow_tf32=deterministic) for _ in range(2))
    monkeypatch.setattr(torch.backends.cuda, "matmul", products)
    monkeypatch.setattr(torch.backends, "cudnn", convolutions)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    assert optim.choose_precision("fp32", torch.device("cpu"), None) is None
    assert products.allow_tf32 == deterministic, "a CPU's is left alone"
    assert optim.choose_precision("fp32", GPU, None) is None
    assert products.allow_tf32 == convolutions.allow_tf32 == (not deterministic)


def state(training):
    """Copy all that a step changes: weights, statistics, moments and the average."""
    return copy.deepcopy({**training.state.state_dict(),
                          "scaler": training.state.scaler.state_dict()})


def same(one, two):
    """Whether nested states are equal to the bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[k], two[k]) for k in one)
    if isinstance(one, list):
        return len(one) == len(two) and all(map(same, one, two))
    return one == two


@pytest.mark.parametrize(("device", "fused"), [("cpu", False), ("cpu", True),
                                           pytest.param("cuda", True, marks=NEEDS_GPU)])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_step_leaves_no_trace_before_it_is_read(warm, tmp_path, value, device, fused):
    training = test_faults.training(warm.faces, tmp_path, {3, 4}, value, fused=fused,
                                    ranks=Ranks(device=torch.device(device)))
    training.state.ema = timm.utils.ModelEmaV3(training.state.model, 0.9, use_warmup=True)
    batches = iter(training.state.loader)
    states = []
    for number in range(4):
        training.train_step(batches, number)
        states.append(state(training))
    assert same(states[0], states[1])
    assert same(states[1], states[2])
    for name in ("model", "ema"):
        assert not same(states[2][name], states[3][name])
        assert all(torch.isfinite(v).all() for v in states[3][name].values())
    assert [bool(left[1]) for left, _ in training.state.pending] == [False, True, True, False]


def test_the_average_equals_that_of_timm():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    optimizer = torch.optim.AdamW(model.parameters(), 0.1, fused=True)
    ours, theirs = (timm.utils.ModelEmaV3(model, 0.9, use_warmup=True) for _ in range(2))
    guard = StepGuard(model, optimizer, ours)
    for number in range(4):
        guard.begin()
        with guard.forward():
            loss = model(torch.randn(2, 3, 8, 8)).square().sum()
        loss.backward()
        guard.finish(number, torch.tensor(False))
        theirs.update(model, number)
    for one, two in zip(ours.state_dict().values(), theirs.state_dict().values()):
        torch.testing.assert_close(one, two)


def twice(warm, tmp_path, calls, epochs=1, **options):
    """Train twice, flushing after each step and flushing late; return both Trainers."""
    found = []
    for pause in (1, 100):
        folder = tmp_path / str(pause)
        folder.mkdir()
        training = test_faults.training(warm.faces, folder, calls, **options)
        read, readings = training.flush_metrics, []

        def flush(*arguments, read=read, pause=pause, readings=readings):
            readings.append(1)
            return (*read(*arguments)[:3], pause)

        training.flush_metrics = flush
        training.readings = readings
        for epoch in range(epochs):
            try:
                assert training.train_one_epoch(epoch)
            except UserError as error:
                training.error = str(error)
                break
        found.append(training)
    return found


def test_late_flushes_change_nothing(warm, tmp_path):
    # An epoch ends between the last two of the three bad steps.
    one, two = twice(warm, tmp_path, {2, 11, 12}, 2, fused=True)
    # The late one flushes after the first step of an epoch and at its end.
    assert (len(one.readings), len(two.readings)) == (12, 4)
    assert one.state.losses == two.state.losses
    assert len(one.state.losses) == 9
    assert one.state.faults.skipped == two.state.faults.skipped == 3
    assert same(state(one), state(two))


def test_three_bad_steps_are_listed_after_a_late_flush(warm, tmp_path):
    one, two = twice(warm, tmp_path, {2, 4, 6}, fused=True)
    assert (one.state.loss.made, two.state.loss.made) == (8, 12)
    names = [(tmp_path / pause / "bad_batch.txt").read_text() for pause in ("1", "100")]
    assert names[0] == names[1]
    assert names[0].count("\n") == 6
    assert one.error.replace("/1/", "/100/") == two.error
    assert "3 steps in a row" in two.error


def test_overflows_do_not_count_as_bad_steps_after_a_late_flush(warm, tmp_path):
    # Four overflows halve the scale from 16 to 1; a bad step and a good step follow.
    one, two = twice(warm, tmp_path, {0, 2, 4, 6, 8}, value=float("inf"), scaled=True, fused=True)
    assert one.state.faults.skipped == two.state.faults.skipped == 1
    assert len(one.state.losses) == len(two.state.losses) == 1
    assert same(state(one), state(two))
    assert two.state.scaler.get_scale() < 1


def test_a_checkpoint_is_saved_after_a_flush(warm, tmp_path):
    training = test_faults.training(warm.faces, tmp_path, {4}, fused=True)
    read, saves = training.flush_metrics, []

    def flush(*arguments):
        training.stop.requested = len(training.state.losses) > 0
        return (*read(*arguments)[:3], 3)

    training.flush_metrics = flush
    training.save_checkpoint = lambda *at: saves.append(
        (at, len(training.state.losses), training.state.faults.skipped,
         len(training.state.pending)))
    assert not training.train_one_epoch(0)
    # The flush after the first step read one, the next one three, of which the second was bad.
    assert saves == [((0, 4), 3, 1, 0)]


@pytest.mark.parametrize(("seconds", "steps"), [(0.001, 500), (0.1, 5), (3.0, 1)])
def test_a_gpu_is_flushed_about_twice_a_second(warm, tmp_path, monkeypatch, seconds, steps):
    training = test_faults.training(warm.faces, tmp_path)
    training.ranks = Ranks(device=GPU)
    clock = SimpleNamespace(monotonic=lambda: 100 + 2 * seconds)
    monkeypatch.setattr("utils.training.trainer.time", clock)
    training.state.pending = [(torch.tensor([1.0, 0.0, 0.0]), [1, 2])] * 2
    loss, stop, save, pause = training.flush_metrics(True, 100.0)
    assert (loss, stop, save, training.state.losses) == (1.0, False, True, [1.0, 1.0])
    assert pause == pytest.approx(steps, abs=1)


def rank_overflow(faces, target, device):
    """Train a rank with a scaler; only the second rank overflows, in the second step."""
    ranks = ddp.start(device)
    # It overflows in a micro-batch after which the ranks do not exchange gradients.
    training = test_faults.training(faces, None, {2} if ranks.rank else (), float("inf"),
                                    scaled=True, fused=True, ranks=ranks)
    training.state.ema = timm.utils.ModelEmaV3(training.state.model, 0.9)
    assert training.train_one_epoch(0)
    torch.save({"scale": training.state.scaler.get_scale(), "losses": training.state.losses,
                "skipped": training.state.faults.skipped, "parameters": [
                    p.detach().cpu() for p in training.state.model.parameters()],
                "steps": [float(s["step"]) for s in training.state.optimizer.state.values()]},
               f"{target}.{ranks.rank}")
    ddp.stop()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs(2))])
def test_all_ranks_skip_a_step_that_overflows_on_one(warm, tmp_path, device):
    """The exchange of gradients carries the infinity to all ranks, and every scale is halved."""
    children = warm.ranks(2, call="test_stops:rank_overflow",
                          argv=[str(warm.faces), str(tmp_path / "out"), device])
    assert [c.code for c in children] == [0, 0], children[0].text
    one, two = (torch.load(f"{tmp_path / 'out'}.{rank}", weights_only=True) for rank in range(2))
    assert same(one, two)
    assert (one["scale"], one["skipped"], len(one["losses"])) == (8.0, 0, 2)
    assert set(one["steps"]) == {2.0}


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=NEEDS_GPU)])
def test_a_step_does_not_synchronise_a_real_gpu(warm, tmp_path, dtype, device):
    training = test_faults.training(warm.faces, tmp_path, fused=True, ranks=Ranks(device=GPU),
                                    scaled=dtype is torch.float16)
    training.state.dtype = dtype
    training.state.ema = timm.utils.ModelEmaV3(training.state.model, 0.9)
    batches = iter([batch for _, batch in zip(range(6), training.state.loader)])
    training.train_step(batches, 0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        training.train_step(batches, 1)
        training.train_step(batches, 2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    loss, *_ = training.flush_metrics(False, 0.0)
    assert loss > 0
    assert len(training.state.losses) == 3
