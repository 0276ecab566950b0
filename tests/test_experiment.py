"""weights/<exp>/: names, locks, tables and plots."""
import errno
import fcntl
import multiprocessing
import os
import subprocess
import sys
import types

import cv2
import numpy
import pytest

from utils import args, experiment, plots
from utils.errors import UserError
from utils.training.ddp import Ranks
from utils.training.settings import resolve_newest
from utils.training.trainer import Trainer


def test_each_number_is_given_once(tmp_path):
    assert [experiment.new_experiment(folder=tmp_path).name for _ in range(3)] == \
        ["000", "001", "002"]
    assert experiment.new_experiment("mine.v2", tmp_path).name == "mine.v2"
    assert experiment.new_experiment("mine.v2", tmp_path).is_dir(), "empty: main.sh made it"
    (tmp_path / "mine.v2" / "last.pt").touch()
    with pytest.raises(UserError, match="exists; add --resume"):
        experiment.new_experiment("mine.v2", tmp_path)


@pytest.mark.parametrize("name", ["../up", "a/b", "", "x.pt", "x.onnx", ".hidden", "a b"])
def test_invalid_names_are_refused(tmp_path, name):
    with pytest.raises(UserError, match="named by letters"):
        experiment.new_experiment(name, tmp_path)


def test_find(tmp_path):
    with pytest.raises(UserError, match="no such experiment; there are: none yet"):
        experiment.find_experiment("007", tmp_path)
    for name in ("000", "good"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "best.pt").touch()
    (tmp_path / "fast.pt").touch()
    with pytest.raises(UserError, match="007: no such experiment; there are: 000, fast, good"):
        experiment.find_weights("007", folder=tmp_path)
    with pytest.raises(UserError, match="there are: 000, good"):
        experiment.find_experiment("007", tmp_path)
    assert experiment.find_weights("good", folder=tmp_path) == tmp_path / "good" / "best.pt"
    assert experiment.find_weights("good", ".onnx", tmp_path).name == "best.pt"
    (tmp_path / "good" / "best.onnx").touch()
    assert experiment.find_weights("good", ".onnx", tmp_path).name == "best.onnx"
    path = tmp_path / "000" / "best.pt"
    assert experiment.find_weights(str(path), folder=tmp_path) == path
    with pytest.raises(UserError, match="gone.pt: no such file"):
        experiment.find_weights(str(tmp_path / "gone.pt"), folder=tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="has no best.pt yet"):
        experiment.find_weights("empty", folder=tmp_path)


def test_weights_when_none_are_named(tmp_path):
    (tmp_path / "000").mkdir()
    with pytest.raises(UserError, match="no trained model.*bash main.sh 1 --train"):
        experiment.find_weights("none", folder=tmp_path)
    for name in ("000/best.pt", "000/best.onnx"):
        (tmp_path / name).touch()
        assert experiment.find_weights("none", ".onnx", tmp_path) == tmp_path / name
    assert experiment.find_weights("none", ".pt", tmp_path) == tmp_path / "000/best.pt"
    (tmp_path / "001").mkdir()
    (tmp_path / "001/best.pt").touch()
    os.utime(tmp_path / "001/best.pt", (2e9, 2e9))
    assert experiment.find_weights("none", ".onnx", tmp_path) == tmp_path / "001/best.pt"
    for name in ("tiny.pt", "tiny.onnx"):
        (tmp_path / name).touch()
        assert experiment.find_weights("none", ".onnx", tmp_path) == tmp_path / name
    assert experiment.find_weights("none", ".pt", tmp_path) == tmp_path / "tiny.pt"
    assert experiment.find_weights("tiny", ".onnx", tmp_path) == tmp_path / "tiny.onnx"
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny/best.pt").touch()
    assert experiment.find_weights("tiny", ".pt", tmp_path) == tmp_path / "tiny/best.pt"


def _record_some(folder, name):
    for number in range(20):
        experiment.record({"exp": f"{name}{number}", "lr": 0.1}, folder)


def test_experiments_that_end_at_once_are_all_recorded(tmp_path):
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_record_some, args=(tmp_path, name)) for name in "ab"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(experiment.read_records(tmp_path)) == 40


def test_a_file_is_no_experiment(tmp_path):
    (tmp_path / "results.csv").touch()
    with pytest.raises(UserError, match="the experiment exists"):
        experiment.new_experiment("results.csv", tmp_path)


def test_epochs_are_written_and_rewritten(tmp_path):
    for epoch in (1, 2, 3, 2):
        experiment.append_epoch(tmp_path, {"epoch": epoch, "lr": 0.1 / epoch, "loss": 3.0 / epoch,
                                           "val_nme": 9.0 - epoch, "seconds": 1.5})
    rows = experiment.read_epochs(tmp_path)
    assert [row["epoch"] for row in rows] == [1, 2], "a resumed run continues its table"
    assert rows[1].items() >= {"epoch": 2, "lr": 0.05, "loss": 1.5, "val_nme": 7.0,
                               "seconds": 1.5}.items()
    plots.plot_curves(tmp_path)
    assert cv2.imread(str(tmp_path / "curves.png")).std() > 5


def test_records_scores_and_comparison(tmp_path):
    with pytest.raises(UserError, match="no experiment is recorded"):
        experiment.compare(tmp_path)
    experiment.record({"exp": "000", "data": "300W-256", "backbone": "irnet18", "lr": 0.001,
                       "parameters": 11976192, "gmacs": "2.90", "nonsense": 1}, tmp_path)
    experiment.record({"exp": "001", "data": "samples-64", "backbone": "resnet18"}, tmp_path)
    weights = tmp_path / "000" / "best.pt"
    report = {"pytorch": {"test": {"nme": 3.14159}, "common": {"nme": 1.0}},
              "onnx": {"test": {"nme": 3.1416}}}
    experiment.record_score(weights, report, "300W-256")
    experiment.record_score(weights, {"pytorch": {"test": {"nme": 9.0}}}, "another set")
    experiment.record_score(tmp_path / "shipped.pt", report, "300W-256")
    experiment.record_score(weights.with_name("best.int8.onnx"), {"onnx": {"test": {"nme": 9.0}}},
                            "300W-256")
    rows = experiment.read_records(tmp_path)
    assert [row["exp"] for row in rows] == ["000", "001"]
    assert (rows[0]["nme"], rows[0]["onnx_nme"], rows[0]["gmacs"]) == ("3.142", "3.142", "2.90")
    table = experiment.compare(tmp_path)
    assert (tmp_path / "results.md").read_text() == table
    lines = table.splitlines()
    assert len(lines) == 4
    assert len({line.count("|") for line in lines}) == 1
    assert "gmacs" in lines[0]
    assert "11976192" in lines[2]
    assert "3.142" in lines[2]
    experiment.record({"exp": "001", "backbone": "resnet50"}, tmp_path)
    assert experiment.read_records(tmp_path)[1]["data"] == "samples-64"


def test_a_fit_clears_the_old_scores(tmp_path):
    experiment.record({"exp": "a", "data": "300W", "val_nme": "3.300"}, tmp_path)
    best = tmp_path / "a" / "best.pt"
    experiment.record_score(best, {"pytorch": {"test": {"nme": 3.1}}}, "300W")
    assert experiment.read_records(tmp_path)[0]["nme"] == "3.100"
    experiment.record_fit(tmp_path / "b" / "best.pt", 1.0, "300W")
    experiment.record_fit(tmp_path / "a" / "last.pt", 1.0, "300W")
    assert experiment.read_records(tmp_path)[0]["val_nme"] == "3.300"
    for data, val_nme in (("300W", "3.250"), ("WFLW", "")):
        experiment.record_fit(best, 3.25, data)
        (row,) = experiment.read_records(tmp_path)
        assert (row["val_nme"], row["nme"], row["data"]) == (val_nme, "", "300W")


def test_ced(tmp_path):
    values = numpy.random.default_rng(0).gamma(4, 0.01, 200)
    plots.plot_ced({"test": values, "common": values / 2}, tmp_path / "ced.png")
    assert cv2.imread(str(tmp_path / "ced.png")).std() > 5
    # Faces that no detector found are left out.
    missed = numpy.concatenate([values, [numpy.nan]])
    plots.plot_ced({"test": missed, "common": missed / 2}, tmp_path / "found.png")
    assert (cv2.imread(str(tmp_path / "found.png")) == cv2.imread(str(tmp_path / "ced.png"))).all()


def test_exp_without_a_name_is_the_newest_experiment(weights, capsys):
    def ask(*argv):
        request = args.parse(argv)
        resolve_newest(request)
        return request.args.exp, request.typed.get("exp")

    with pytest.raises(UserError, match="no experiment with a best"):
        ask("--test", "--exp")
    for name, files, time in (("000", ("best.pt",), 2e9), ("mine", ("best.pt", "last.pt"), 1e9)):
        (weights / name).mkdir()
        for file in files:
            (weights / name / file).touch()
            os.utime(weights / name / file, (time, time))
    assert ask("--test", "--exp") == ("000", "000")
    assert capsys.readouterr().err == "--exp: 000, the newest experiment\n"
    assert ask("--resume", "--exp") == ("mine", "mine"), "the only one that can be resumed"
    assert ask("--test", "--exp", "--boxes", "haar")[0] == "000"
    assert ask("--test")[0] == "none"
    assert ask("--test", "--exp", "mine")[0] == "mine"
    with pytest.raises(UserError, match="give it a name, or leave --exp out"):
        ask("--train", "--exp")


HOLD = """
import pathlib, sys
from utils import experiment
with experiment.Lock(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_training_of_one_experiment_is_refused(tmp_path):
    (tmp_path / "last.pt").touch()
    other = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], cwd=args.ROOT, text=True,
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"is being trained by process {other.pid} on "):
        experiment.Lock(tmp_path)
    # The lock ends with a killed process.
    other.kill()
    other.communicate()
    with experiment.Lock(tmp_path):
        assert (tmp_path / "lock").read_text().startswith(f"process {os.getpid()} on ")
    assert (tmp_path / "lock").is_file()


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_disk_without_locks_is_noted_and_used(tmp_path, monkeypatch, capsys, code):
    def lockf(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "lockf", lockf)
    (tmp_path / "mine").mkdir()
    with experiment.Lock(tmp_path / "mine"):
        out = capsys.readouterr().out
        assert out.startswith(f"note: {tmp_path}/mine: its disk has no file locks"), out
        assert out.count("\n") == 1
    assert not (tmp_path / "mine").exists(), "nothing was saved"
    experiment.record({"exp": "mine", "lr": 0.1}, tmp_path)
    assert experiment.read_records(tmp_path)[0]["lr"] == "0.1"


def test_other_faults_of_a_lock_are_raised(tmp_path, monkeypatch):
    def lockf(*_):
        raise OSError(errno.EIO, "a fault")

    monkeypatch.setattr(fcntl, "lockf", lockf)
    with pytest.raises(OSError, match="a fault"):
        experiment.Lock(tmp_path)
    with pytest.raises(OSError, match="a fault"):
        experiment.record({"exp": "mine"}, tmp_path)


def test_a_training_that_saved_nothing_leaves_nothing(tmp_path):
    folder = experiment.new_experiment("mine", tmp_path)
    with experiment.Lock(folder):
        assert experiment.new_experiment("mine", tmp_path) == folder, "a lock alone is new"
    assert not folder.exists()


def test_tensorboard_is_an_option(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="pip install tensorboard"):
        experiment.tensorboard_writer(tmp_path)
    made = types.ModuleType("torch.utils.tensorboard")
    made.SummaryWriter = lambda folder: folder
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", made)
    assert experiment.tensorboard_writer(tmp_path) == str(tmp_path / "tensorboard")
    assert experiment.tensorboard_writer(tmp_path, is_main=False) is None
    training = Trainer(types.SimpleNamespace(tensorboard=True), tmp_path, Ranks(), None)
    assert training.board == str(tmp_path / "tensorboard")


def test_names_by_tab_completion(weights, monkeypatch):
    monkeypatch.chdir(weights.parent)
    (weights / "mine").mkdir()
    for path in ("mine/best.pt", "mine/last.pt", "tiny.pt"):
        (weights / path).touch()
    place = weights.name
    for name in ("mine", "mine/", f"{place}/mine", f"{place}/mine/", f"./{place}/mine",
                 str(weights / "mine")):
        assert experiment.find_weights(name, folder=weights) == weights / "mine/best.pt"
        assert experiment.find_experiment(name, weights) == weights / "mine"
    for name in ("tiny", f"{place}/tiny", f"{place}/tiny."):
        assert experiment.find_weights(name, folder=weights) == weights / "tiny.pt"
    # A file is that file, and names its experiment where a training is resumed.
    last = f"{place}/mine/last.pt"
    assert str(experiment.find_weights(last, folder=weights)) == last
    assert experiment.find_experiment(last, weights) == weights / "mine"
    for typed, action, name in ((last, "--resume", "mine"), (last, "--test", last),
                                (f"{place}/mine/", "--resume", "mine"),
                                (f"{place}/mine/", "--test", "mine"), ("mine", "--test", "mine"),
                                (f"{place}/new", "--train", "new"), ("a b.pt", "--test", "a b.pt")):
        request = args.parse([action, "--exp", typed])
        resolve_newest(request)
        assert (request.args.exp, request.typed["exp"]) == (name, name)
    with pytest.raises(UserError, match="other/mine: no such experiment"):
        experiment.find_weights("other/mine", folder=weights)
