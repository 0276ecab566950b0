"""NaN losses, unreadable images and full disks during training are skipped or reported."""
import contextlib
import os
import pathlib
import shutil
import signal
import subprocess
import time
from types import SimpleNamespace

import numpy
import pytest
import timm.utils
import torch
from helpers import warm as warm_module

from nets.model import LandmarkNet
from utils import checkpoint
from utils.args import load_args
from utils.data import dataset
from utils.errors import UserError
from utils.training import ddp, loader, loss, optim, stages
from utils.training.ddp import Ranks
from utils.training.state import TrainState
from utils.training.trainer import Trainer

BACKBONE = "mobilenetv3_small_050"


@pytest.fixture(scope="module")
def warm():
    return warm_module.warm()


class Poison:
    """A loss that returns `value` at the given calls and the real loss otherwise."""

    def __init__(self, real, calls, value):
        self.real, self.calls, self.value, self.made = real, calls, value, 0

    def __call__(self, predicted, landmarks, *_):
        self.made += 1
        computed = self.real(predicted, landmarks)
        if self.made - 1 not in self.calls:
            return computed
        # The gradients must be finite: only the value of the loss is bad.
        return computed * 0 + computed.detach() * 0 + self.value


def training(faces, folder, calls=(), value=float("nan"), scaled=False, **options):
    """A Trainer on the CPU, six steps of two micro-batches an epoch, with a poisoned loss.

    options: settings, and "fused" (use the optimiser of a GPU) and "ranks".
    """
    fused, ranks = options.pop("fused", False), options.pop("ranks", Ranks())
    args = load_args({"batch_size": 3, "effective_batch": 6, "input_size": 64, "workers": 0,
                      "save_minutes": 1000, **options})
    prepared = dataset.PreparedSet(faces)
    torch.manual_seed(0)
    model = LandmarkNet(prepared.scheme, BACKBONE, args.head).to(ranks.device)
    faces = prepared.lists["train"].select(numpy.arange(36))
    batches, sampler = loader.make_loader(faces, prepared, prepared.scheme, args, ranks, 2)
    scaler = torch.amp.GradScaler(ranks.device.type, init_scale=16.0, enabled=scaled,
                                  growth_interval=1000)
    poisoned = Poison(loss.build_loss(model, 10.0, 1.0, "l1"), calls, value)
    state = TrainState(
        stages.plan(args)[0], args, prepared, prepared.scheme, neighbour_face=None, data_sets=[],
        digest="", model=model, ddp_model=ddp.wrap_ddp(model, ranks, args.input_size), ema=None,
        teacher=None, loss=poisoned, loader=batches, sampler=sampler,
        faults=loader.FaultCounter(faces, folder, ranks), dtype=None, scaler=scaler,
        optimizer=torch.optim.AdamW(model.parameters(), fused=fused),
        scheduler=SimpleNamespace(step_update=lambda number: None))
    return Trainer(args, folder, ranks, SimpleNamespace(requested=False), state)


def snapshot(model):
    """A copy of all parameters and buffers."""
    return {k: v.clone() for k, v in model.state_dict().items()}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_loss_skips_its_step_and_leaves_no_trace(warm, tmp_path, value):
    # The second micro-batch of step 2 is bad, after the first has accumulated gradients.
    training_ = training(warm.faces, tmp_path, {5}, value)
    before = {}
    apply = training_.state.optimizer.step

    def remember(*arguments, **options):
        result = apply(*arguments, **options)
        before["steps"] = before.get("steps", 0) + 1
        if before["steps"] == 2:
            before["state"] = snapshot(training_.state.model)
        return result

    training_.state.optimizer.step = remember
    kept = loader.FaultCounter.add_step

    def check(faults, finite, indices):
        kept(faults, finite, indices)
        if not finite:
            for name, tensor in snapshot(training_.state.model).items():
                assert torch.equal(tensor, before["state"][name]), name

    training_.state.faults.add_step = check.__get__(training_.state.faults)
    assert training_.train_one_epoch(0)
    assert training_.state.faults.skipped == 1
    assert training_.state.faults.in_a_row == 0
    assert before["steps"] == 5
    assert len(training_.state.losses) == 5
    assert numpy.isfinite(training_.state.losses).all()
    assert all(torch.isfinite(v).all() for v in snapshot(training_.state.model).values())


def test_a_bad_gradient_alone_skips_its_step(warm, tmp_path):
    training_ = training(warm.faces, tmp_path)
    parameter = next(training_.state.model.parameters())
    made = []

    def spoil(gradient):
        made.append(1)
        return gradient * float("inf") if len(made) == 4 else gradient

    parameter.register_hook(spoil)
    assert training_.train_one_epoch(0)
    assert training_.state.faults.skipped == 1
    assert torch.isfinite(parameter).all()


def test_three_bad_steps_in_a_row_stop_the_training_and_list_the_batch(warm, tmp_path):
    training_ = training(warm.faces, tmp_path, {4, 6, 8})
    (tmp_path / "last.pt").write_bytes(b"good")
    with pytest.raises(UserError, match="3 steps in a row.*bad_batch.txt.*--resume"):
        training_.train_one_epoch(0)
    names = (tmp_path / "bad_batch.txt").read_text().splitlines()
    keys = list(training_.state.sampler)[8:10]
    images = training_.state.faults.faces.images
    assert names == [str(images[i]) for batch in keys for _, i in batch]
    assert all(pathlib.Path(name).is_file() for name in names)
    assert (tmp_path / "last.pt").read_bytes() == b"good"
    assert all(torch.isfinite(v).all() for v in snapshot(training_.state.model).values())


def test_a_learning_rate_below_min_lr_does_not_rise():
    args = load_args({"lr": 1e-6, "warmup_epochs": 0})
    optimizer = optim.make_optimizer(torch.nn.Linear(2, 2), args)
    scheduler = optim.make_scheduler(optimizer, args, 5, 50)
    rates = set()
    for step in range(50):
        scheduler.step_update(step)
        rates.add(optimizer.param_groups[0]["lr"])
    assert rates == {1e-6}


def test_two_bad_steps_in_a_row_twice_do_not_stop_the_training(warm, tmp_path):
    training_ = training(warm.faces, tmp_path, {0, 2, 6, 8})
    assert training_.train_one_epoch(0)
    assert training_.state.faults.skipped == 4
    assert len(training_.state.losses) == 2


def test_overflows_do_not_count_while_the_scale_can_be_halved(warm, tmp_path):
    # Four overflows halve the scale from 16 to 1; a bad step and a good step follow.
    training_ = training(warm.faces, tmp_path, {0, 2, 4, 6, 8}, float("inf"), scaled=True)
    assert training_.train_one_epoch(0)
    assert training_.state.faults.skipped == 1
    assert len(training_.state.losses) == 1
    assert training_.state.scaler.get_scale() < 1
    training_ = training(warm.faces, tmp_path, range(100), float("inf"), scaled=True)
    with pytest.raises(UserError, match="3 steps in a row"):
        training_.train_stage()


def test_the_average_is_not_moved_by_a_skipped_step(warm, tmp_path):
    moved, training_ = [], training(warm.faces, tmp_path, {2})
    training_.state.ema = ema = timm.utils.ModelEmaV3(training_.state.model, 0.9)
    # The decay is asked for where the average moves.
    ema.get_decay = lambda number: moved.append(number) or 0.9
    assert training_.train_one_epoch(0)
    assert moved == [0, 2, 3, 4, 5]


def copy_of(faces, folder):
    """A copy of the prepared set that a test may damage, and its training images."""
    shutil.copytree(faces, folder)
    lines = (folder / "train.txt").read_text().splitlines()
    return folder, [folder / line.split()[0] for line in lines]


def flags_for(warm, folder):
    return [*warm.flags[:-1], folder]


def test_one_unreadable_image_is_named_once_and_replaced(warm, tmp_path):
    folder, images = copy_of(warm.faces, tmp_path / "faces")
    images[3].write_bytes(b"no image")
    child = warm.run("--train", "--exp", "one-bad", *flags_for(warm, folder))
    assert child.code == 0, child.text
    # Three epochs of 40 of the 46 faces meet the image more than once.
    assert child.text.count(f"{images[3]}: cannot be read; the next image takes its place") == 1
    assert child.text.count("cannot be read") == 1
    assert "Traceback" not in child.text


@pytest.mark.parametrize("damage", ["gone", "empty", "all"])
def test_more_than_one_percent_unreadable_images_stop_the_training(warm, tmp_path, damage):
    folder, images = copy_of(warm.faces, tmp_path / "faces")
    for image in images if damage == "all" else images[:12]:
        image.unlink() if damage == "gone" else image.write_bytes(b"")
    child = warm.run("--train", "--exp", f"bad-{damage}", *flags_for(warm, folder))
    assert child.code == 2, child.text
    assert "Traceback" not in child.text, child.text
    last = child.text.strip().splitlines()[-1]
    assert last.startswith("error:"), last
    assert str(folder) in last, last
    assert "cannot be read" in last, last


def test_unreadable_images_are_counted_over_all_ranks(warm, tmp_path):
    folder, images = copy_of(warm.faces, tmp_path / "faces")
    for image in images[:2]:
        image.unlink()
    children = warm.ranks(2, "--train", "--exp", "ranks-bad", *flags_for(warm, folder),
                          "--batch-size", 2)
    assert [c.code for c in children] == [2, 2]
    for child in children:
        assert "2 of 46 training images" in child.text
        assert "Traceback" not in child.text


@contextlib.contextmanager
def small_disk(folder, size):
    """A file system of `size` at folder; the test is skipped where mounting is not allowed."""
    folder.mkdir(exist_ok=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder],
                          capture_output=True, text=True) if shutil.which("mount") else None
    if done is None or done.returncode:
        pytest.skip("mounting a small file system is not allowed here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_is_reported_and_the_earlier_checkpoint_still_loads(warm):
    with small_disk(warm.folder("full"), "64m") as folder:
        child = warm.run("--train", "--exp", "full", *warm.flags, hook="step:7:TERM")
        assert child.code == 143, child.text
        before = (folder / "last.pt").read_bytes()
        room = shutil.disk_usage(folder).free - len(before) // 2
        (folder / "filler").write_bytes(bytes(room))
        child = warm.run("--resume", "--exp", "full")
        assert child.code == 2, child.text
        assert "Traceback" not in child.text, child.text
        last = child.text.strip().splitlines()[-1]
        assert last.startswith("error:")
        assert "No space left" in last
        assert "--resume" in last
        assert (folder / "last.pt").read_bytes() == before
        assert checkpoint.read(folder / "last.pt")["step"] == 2
        assert not list(folder.glob("*.tmp"))
        (folder / "filler").unlink()
        assert warm.run("--resume", "--exp", "full").code == 0


@pytest.mark.parametrize("room", [0, 3000])
def test_a_full_disk_is_reported_for_small_files_too(warm, room):
    exp = f"crammed-{room}"
    with small_disk(warm.folder(exp), "40m") as folder:
        (folder / "filler").write_bytes(bytes(shutil.disk_usage(folder).free - room))
        # The folder exists without a checkpoint, as after an end before the first save.
        child = warm.run("--train", "--resume", "--exp", exp, *warm.flags)
        assert child.code == 2, child.text
        assert "Traceback" not in child.text, child.text
        assert "No space left on device" in child.text.strip().splitlines()[-1]


def test_a_killed_loader_process_is_reported_in_one_line(warm, monkeypatch):
    child = warm.start("--train", "--exp", "starved", *warm.flags, "--epochs", 200,
                       "--save-minutes", 0.01)
    path = warm.folder("starved") / "last.pt"
    warm_module.wait_for(lambda: path.exists() and checkpoint.read(path)["epoch"] >= 1)
    children = pathlib.Path(f"/proc/{child.pid}/task/{child.pid}/children")
    # A worker that has finished its epoch exits normally when killed; repeat until one has not.
    with contextlib.suppress(FileNotFoundError):
        while "State:\tZ" not in children.parents[2].joinpath("status").read_text():
            for worker in children.read_text().split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(worker), signal.SIGKILL)
            time.sleep(0.2)
    child.wait()
    assert child.code == 2, child.text
    assert "Traceback" not in child.text, child.text
    last = child.text.strip().splitlines()[-1]
    assert last.startswith("error: a loader process was killed")
    assert "fewer --workers" in last
    assert "go on with --resume --exp starved" in last
    assert checkpoint.read(warm.folder("starved") / "last.pt")["epoch"] >= 1
    # Under main.sh it stays a crash, and torchrun restarts the group.
    error = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
    monkeypatch.setenv("PIPNET_CONTROL", "/nowhere")
    assert loader.loader_error(error, warm.folder("starved")) is error


@pytest.mark.parametrize("error", [ConnectionResetError(104, "reset"), EOFError()])
def test_a_loader_process_that_dies_while_it_sends_a_batch(tmp_path, monkeypatch, error):
    class Batches:
        """Batches of a loader whose worker has just died."""

        def __next__(self):
            raise error

    monkeypatch.delenv("PIPNET_CONTROL", raising=False)
    monkeypatch.setattr(loader.time, "sleep", lambda seconds: None)
    with pytest.raises(RuntimeError) as found:
        loader.next_batch(Batches())
    mistake = loader.loader_error(found.value, tmp_path / "exp")
    assert isinstance(mistake, UserError)
    assert "a loader process was killed" in str(mistake)


def test_too_little_shared_memory_for_batches_is_reported(tmp_path):
    with pytest.raises(UserError, match="No such file.*--workers 0"):
        loader.check_shared_memory(1, tmp_path / "gone")
    with pytest.raises(UserError, match="MB are free, the batches.*--shm-size"):
        loader.check_shared_memory(1e18, tmp_path)
    loader.check_shared_memory(1, tmp_path)
    error = RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible "
                         "that dataloader's workers are out of shared memory.")
    assert "no room in /dev/shm" in str(loader.loader_error(error, tmp_path))
    other = RuntimeError("another")
    assert loader.loader_error(other, tmp_path) is other
