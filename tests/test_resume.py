"""Kills, stops and resumes: the run ends with the same bits as an uninterrupted one."""
import csv
import os
import pathlib
import pty
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from helpers import warm as warm_module

from utils import checkpoint, errors, experiment, files
from utils.training import control, optim


@pytest.fixture(autouse=True, scope="module")
def terminal():
    """Let children receive SIGHUP, which nohup makes pytest and its children ignore."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture(scope="module")
def warm(terminal):
    return warm_module.warm()


@pytest.fixture(scope="module")
def alone(warm):
    """The folder of a run that is not interrupted."""
    child = warm.run("--train", "--exp", "alone", *warm.flags)
    assert child.code == 0, child.text
    return warm.folder("alone")


def same_run(one, two):
    """Assert that weights, averages, moments, best epoch and table are equal to the bit."""
    for name in ("last.pt", "best.pt"):
        first, second = (torch.load(folder / name, weights_only=True) for folder in (one, two))
        for key in first.keys() - {"args", "seconds"}:
            same(first[key], second[key], f"{name}: {key}")
    assert table(one) == table(two)


def same(one, two, where):
    """Assert that two nested states are equal, tensors to the bit."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, two), where
    elif isinstance(one, dict):
        assert one.keys() == two.keys(), where
        for key in one:
            same(one[key], two[key], f"{where}.{key}")
    else:
        assert one == two, where


def table(folder):
    """Return the rows of results.csv without the seconds."""
    with open(folder / "results.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


# Each inner list has the kills of one run, with resumes in between; then it is resumed to its end.
# Saves are made after every step; best.pt and last.pt at an epoch's end are the 5th and 6th.
CHAINS = [
    # Before the first checkpoint; within an epoch, a step and a save; between best.pt and last.pt.
    ["step:1", "step:3", "update:2", "half:2", "renamed:1"],
    ["half:1", "replace:2", "update:3", "step:2", "fsync:4", "step:4"],
    ["renamed:5", "step:5", "replace:6", "update:1", "renamed:3"],
]
WILD = 4


@pytest.mark.parametrize("chain", [
    CHAINS[0], *(pytest.param(chain, marks=pytest.mark.slow) for chain in CHAINS[1:])],
    ids=lambda chain: f"{len(chain)} kills")
def test_kills_at_exact_moments_change_nothing(warm, alone, chain):
    exp = f"killed-{CHAINS.index(chain)}"
    begin = ["--train", *warm.flags]
    for hook in chain:
        child = warm.run(*begin, "--exp", exp, "--save-minutes", 0, hook=hook)
        assert child.code == -signal.SIGKILL, (hook, child.text)
        begin = ["--resume"]
    child = warm.run("--resume", "--exp", exp)
    assert child.code == 0, child.text
    same_run(alone, warm.folder(exp))
    assert not list(warm.folder(exp).glob("*.tmp"))


@pytest.mark.slow
def test_kills_from_outside_at_any_time_change_nothing(warm, alone):
    begin, rng, kills = ["--train", *warm.flags], random.Random(0), 0
    while kills < WILD:
        child = warm.start(*begin, "--exp", "wild", "--save-minutes", 0)
        if kills:
            warm_module.wait_for(lambda: (warm.folder("wild") / "last.pt").exists())
        time.sleep(rng.uniform(0.8, 1.8))
        os.kill(child.pid, signal.SIGKILL)
        kills += child.wait().code == -signal.SIGKILL
        begin = ["--resume"] if (warm.folder("wild") / "args.yaml").exists() else begin
    assert warm.run("--resume", "--exp", "wild").code == 0
    same_run(alone, warm.folder("wild"))


def test_there_are_twenty_kills():
    assert sum(map(len, CHAINS)) + WILD == 20


def test_best_is_the_same_after_a_kill_between_best_and_last(warm, alone):
    # Saves after every step: best.pt and last.pt of the second epoch's end are the 11th and 12th.
    child = warm.run("--train", "--exp", "between", *warm.flags, "--save-minutes", 0,
                     hook="replace:12")
    assert child.code == -signal.SIGKILL
    assert checkpoint.read(warm.folder("between") / "best.pt")["epoch"] == 2
    last = checkpoint.read(warm.folder("between") / "last.pt")
    assert (last["epoch"], last["step"]) == (1, 4)
    assert warm.run("--resume", "--exp", "between").code == 0
    same_run(alone, warm.folder("between"))


def test_short_epochs_are_saved_once_a_minute_and_at_the_end(warm, alone):
    """Three epochs take seconds: the first two are not saved, the last one is."""
    child = warm.run("--train", "--exp", "unsaved", *warm.flags, hook="step:15")
    assert child.code == -signal.SIGKILL
    folder = warm.folder("unsaved")
    assert len(table(folder)) == 2
    assert not (folder / "best.pt").exists()
    assert not (folder / "last.pt").exists()
    # The end saves best.pt and last.pt once; a kill before the second loses last.pt.
    child = warm.run("--resume", "--exp", "unsaved", hook="replace:2")
    assert child.code == -signal.SIGKILL, child.text
    assert "nothing is saved yet, training starts anew" in child.text
    assert (folder / "best.pt").exists()
    assert not (folder / "last.pt").exists()
    child = warm.run("--resume", "--exp", "unsaved")
    assert child.code == 0, child.text
    same_run(alone, folder)


@pytest.mark.parametrize(("kill", "written"), [
    pytest.param("half:1", [], marks=pytest.mark.slow), ("replace:1", []),
    pytest.param("half:2", ["best.pt"], marks=pytest.mark.slow), ("replace:2", ["best.pt"]),
    ("renamed:2", ["best.pt", "last.pt"])])
def test_a_kill_while_a_stop_saves_the_best_average_from_memory(warm, alone, kill, written):
    """The best epoch so far, the first, is in memory when the stop in the second epoch saves it."""
    exp = f"stopped-{kill.replace(':', '-')}"
    child = warm.run("--train", "--exp", exp, *warm.flags, hook=f"step:7:TERM,{kill}")
    assert child.code == -signal.SIGKILL, child.text
    folder = warm.folder(exp)
    assert sorted(path.name for path in folder.glob("*.pt")) == written
    if "last.pt" in written:
        assert checkpoint.read(folder / "best.pt")["epoch"] == 1
        assert checkpoint.read(folder / "last.pt")["best"] == checkpoint.read(
            folder / "best.pt")["val_nme"]
    child = warm.run("--resume", "--exp", exp)
    assert child.code == 0, child.text
    same_run(alone, folder)


@pytest.mark.parametrize("name", ["TERM", "INT", "HUP"])
def test_a_signal_finishes_the_step_and_saves(warm, alone, name):
    exp = f"signalled-{name}"
    child = warm.run("--train", "--exp", exp, *warm.flags, hook=f"step:7:{name}")
    assert child.code == 128 + signal.Signals[f"SIG{name}"], child.text
    assert f"go on with: python main.py --resume --exp {exp}" in child.text
    assert "Traceback" not in child.text
    state = checkpoint.read(warm.folder(exp) / "last.pt")
    assert (state["epoch"], state["step"]) == (1, 2)
    child = warm.run("--resume", "--exp", exp)
    assert child.code == 0
    assert "goes on at epoch 2, step 3" in child.text
    same_run(alone, warm.folder(exp))


@pytest.mark.parametrize("command", [["python", "main.py"], ["bash", "main.sh", "1"]])
def test_a_closed_terminal_saves(warm, alone, command):
    folder = warm.folder(f"hung-up-{command[0]}")
    argv = [*command, "--train", "--exp", folder.name, *warm.flags, "--save-minutes", "0.01"]
    pid, terminal = pty.fork()
    if not pid:
        os.chdir(warm.tree)
        os.execvpe(argv[0], argv, warm.env)
    while not (folder / "last.pt").exists():
        # Writing to a terminal that nobody reads blocks.
        os.read(terminal, 1 << 16)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 128 + signal.SIGHUP
    assert not (folder / "best.onnx").exists(), "it must not train to its end"
    child = warm.run("--resume", "--exp", folder.name)
    assert child.code == 0, child.text
    assert "goes on at" in child.text, child.text
    same_run(alone, folder)


def test_nohup_keeps_sighup_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with control.Stop() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.requested
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_rank_that_stops_without_a_signal_exits_as_by_sigterm():
    with control.Stop() as stop:
        assert stop.exit_code == 143
        signal.raise_signal(signal.SIGINT)
        assert stop.requested
        assert stop.exit_code == 130


def test_an_experiment_in_training_is_not_trained_twice(warm, alone):
    with experiment.Lock(alone):
        child = warm.run("--resume", "--exp", "alone")
    assert child.code == 2, child.text
    assert "alone: is being trained by process" in child.text, child.text
    assert child.text.count("\n") == 1


def test_a_signal_during_the_imports_is_handled(warm):
    child = subprocess.Popen(
        [sys.executable, "main.py", "--train", "--exp", "early", *warm.flags], cwd=warm.tree,
        env=warm.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    # Signal handlers are installed before torch is imported.
    maps = pathlib.Path(f"/proc/{child.pid}/maps")
    warm_module.wait_for(lambda: "libtorch" in maps.read_text())
    child.send_signal(signal.SIGTERM)
    text, _ = child.communicate(timeout=120)
    assert child.returncode == 128 + signal.SIGTERM, text
    assert "stopped and saved" in text, text
    assert checkpoint.read(warm.folder("early") / "last.pt")["step"] == 1


def test_a_kill_changes_nothing_with_augmentation_on_the_device(warm, alone):
    flags = ["--train", *warm.flags, "--cache", "device"]
    assert warm.run(*flags, "--exp", "on-device").code == 0
    child = warm.run(*flags, "--exp", "on-device-killed", "--save-minutes", 0, hook="update:3")
    assert child.code == -signal.SIGKILL, child.text
    child = warm.run("--resume", "--exp", "on-device-killed")
    assert child.code == 0, child.text
    assert "on cpu" in child.text, child.text
    same_run(warm.folder("on-device"), warm.folder("on-device-killed"))
    # Rounding and noise differ: the same faces, and nearly the same losses.
    ours, theirs = (table(warm.folder(exp)) for exp in ("on-device", "alone"))
    assert ours != theirs
    assert float(ours[-1]["loss"]) == pytest.approx(float(theirs[-1]["loss"]), rel=0.05)


def test_deterministic_is_set_and_changes_nothing_on_a_cpu(warm, alone):
    child = warm.run("--train", "--exp", "determined", *warm.flags, "--deterministic")
    assert child.code == 0, child.text
    same_run(alone, warm.folder("determined"))


@pytest.mark.parametrize("wanted", [True, False])
def test_deterministic_reaches_torch(monkeypatch, wanted):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        optim.make_deterministic(wanted)
        assert torch.are_deterministic_algorithms_enabled() == wanted
        assert torch.backends.cudnn.benchmark != wanted
        assert ("CUBLAS_WORKSPACE_CONFIG" in os.environ) == wanted
    finally:
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
        torch.use_deterministic_algorithms(False)


def test_changes_are_listed_or_refused(warm):
    assert warm.run("--train", "--exp", "change", *warm.flags, hook="step:7:TERM").code == 143
    folder = warm.folder("change")
    before = (folder / "last.pt").read_bytes()
    for flags, message in ((["--backbone", "irnet18"], "cannot change backbone from mobilenetv3"),
                           (["--epochs", 4], "cannot change epochs from 3 to 4"),
                           (["--seed", 1], "cannot change seed from 0 to 1"),
                           (["--data", "samples"], "cannot change data")):
        child = warm.run("--resume", "--exp", "change", *flags)
        assert child.code == 2, child.text
        assert message in child.text, child.text
        assert "Traceback" not in child.text
    assert (folder / "last.pt").read_bytes() == before
    child = warm.run("--resume", "--exp", "change", "--lr", 0.004, "--rotation", 10)
    assert child.code == 0, child.text
    assert "resume: lr changed from 0.001 to 0.004" in child.text
    assert "resume: rotation changed from 20.0 to 10.0" in child.text
    # At the same step of the schedule the rate is four times as high (apart from min_lr).
    assert float(table(folder)[1]["lr"]) == pytest.approx(4 * 2.58e-4, rel=0.05)
    # No epoch is left, so args.yaml and the tables keep their values.
    kept = [(folder / name).read_text() for name in ("args.yaml", "../results.csv")]
    child = warm.run("--resume", "--exp", "change", "--lr", 0.01)
    assert child.code == 0
    assert "resume: lr stays 0.004, as all epochs are done" in child.text
    assert kept == [(folder / name).read_text() for name in ("args.yaml", "../results.csv")]
    best = (folder / "best.pt").read_bytes()
    (folder / "last.pt").unlink()
    child = warm.run("--resume", "--exp", "change")
    assert child.code == 2
    assert "training is complete, and last.pt, which --resume needs, is missing" in child.text
    assert best == (folder / "best.pt").read_bytes()
    child = warm.run("--resume", "--exp", "chance")
    assert child.code == 2
    assert "no such experiment" in child.text
    assert "change" in child.text


def test_the_set_may_move_but_not_change(warm, tmp_path):
    import shutil
    assert warm.run("--train", "--exp", "moved", *warm.flags, hook="step:7:TERM").code == 143
    shutil.copytree(warm.faces, tmp_path / "elsewhere")
    child = warm.run("--resume", "--exp", "moved", "--data-dir", tmp_path / "elsewhere")
    assert child.code == 0, child.text
    assert f"resume: data_dir changed from {warm.faces} to {tmp_path / 'elsewhere'}" in child.text
    assert warm.run("--train", "--exp", "other", *warm.flags, hook="step:7:TERM").code == 143
    listed = tmp_path / "elsewhere" / "train.txt"
    lines = listed.read_text().splitlines()
    lines[0], lines[1] = lines[1], lines[0]
    listed.write_text("\n".join(lines) + "\n")
    child = warm.run("--resume", "--exp", "other", "--data-dir", tmp_path / "elsewhere")
    assert child.code == 2, child.text
    assert "holds other training faces" in child.text, child.text


def test_a_shorter_training_list_is_refused(warm, tmp_path):
    import shutil
    shutil.copytree(warm.faces, tmp_path / "faces")
    flags = [*warm.flags[:-1], tmp_path / "faces"]
    assert warm.run("--train", "--exp", "shrunk", *flags, hook="step:7:TERM").code == 143
    lines = (tmp_path / "faces" / "train.txt").read_text().splitlines(True)
    (tmp_path / "faces" / "train.txt").write_text("".join(lines[:20]))
    child = warm.run("--resume", "--exp", "shrunk")
    assert child.code == 2, child.text
    assert "had [5, 8] steps an epoch" in child.text, child.text


def test_a_checkpoint_of_an_earlier_version_is_resumed(warm, alone):
    """It has neither the plan of the batch nor the kind of the cache."""
    assert warm.run("--train", "--exp", "earlier", *warm.flags, hook="step:7:TERM").code == 143
    path = warm.folder("earlier") / "last.pt"
    state = checkpoint.read(path)
    del state["batch"], state["cache"]
    checkpoint.save(state, path)
    child = warm.run("--resume", "--exp", "earlier")
    assert child.code == 0, child.text
    for name in ("model", "ema", "optimizer", "best"):
        same(checkpoint.read(path)[name], checkpoint.read(alone / "last.pt")[name], name)
    assert checkpoint.read(path)["batch"] == {"at_once": 4, "scales": False}


def test_the_batch_size_may_change_where_it_divides_the_step(warm):
    assert warm.run("--train", "--exp", "divided", *warm.flags, hook="step:7:TERM").code == 143
    child = warm.run("--resume", "--exp", "divided", "--batch-size", 3)
    assert child.code == 2, child.text
    assert "Traceback" not in child.text, child.text
    assert "has 8 faces, which 1 processes x --batch-size 3 do not divide" in child.text
    assert child.text.endswith("give --batch-size 2\n"), child.text
    child = warm.run("--resume", "--exp", "divided", "--batch-size", 2)
    assert child.code == 0, child.text
    assert "batch: 2 a process x 1 processes x 4 accumulated = 8 a step (asked 8); " in child.text
    assert len(table(warm.folder("divided"))) == 3


def test_the_choice_of_the_cache_is_kept(warm):
    """The memory that is free at the resume does not change how faces are augmented."""
    for kind in ("device", "ram"):
        exp = f"kept-{kind}"
        child = warm.run("--train", "--exp", exp, *warm.flags, "--cache", kind,
                         hook="step:7:TERM")
        assert child.code == 143, child.text
        assert checkpoint.read(warm.folder(exp) / "last.pt")["cache"] == kind
        child = warm.run("--resume", "--exp", exp, "--cache", "auto", hook="step:2:TERM")
        assert child.code == 143, child.text
        assert ("MB on cpu" in child.text) == (kind == "device"), child.text
        assert checkpoint.read(warm.folder(exp) / "last.pt")["cache"] == kind


def test_an_existing_experiment_is_not_overwritten(warm, alone):
    before = (alone / "last.pt").read_bytes()
    child = warm.run("--train", "--exp", "alone", *warm.flags)
    assert child.code == 2
    assert "add --resume" in child.text
    assert (alone / "last.pt").read_bytes() == before


def test_a_save_that_fails_leaves_the_earlier_file(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    checkpoint.save({"format": checkpoint.FORMAT, "epoch": 1}, path)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(errors.UserError, match="No space left on device"):
        checkpoint.save({"format": checkpoint.FORMAT, "epoch": 2}, path)
    assert checkpoint.read(path)["epoch"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]
