"""Fixtures and settings shared by all test modules."""
import contextlib
import os
import pathlib
import signal
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SHARED = ROOT.parent / "shared"

# Several small models run at once; more threads than cores slow them down.
os.environ.setdefault("OMP_NUM_THREADS", "2")

from utils import machine  # noqa: E402 (needs the path above)

machine.limit_spinning()

# A job in the background ignores Ctrl-C, and so would the programs that tests interrupt.
with contextlib.suppress(ValueError):  # Not in the main thread.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def shared():
    """The folder next to the repository with real faces, published figures and detectors."""
    if not SHARED.is_dir():
        pytest.skip("needs ../shared (real faces and detectors), which is missing")
    return SHARED


@pytest.fixture(scope="session")
def drawn_set(tmp_path_factory):
    """A small prepared set of drawn faces at 64 px: 38 train, 2 val, 8 test."""
    from utils.data.generator import DataGenerator
    from utils.data.readers import drawn
    folder = tmp_path_factory.mktemp("drawn") / "set"
    counts, drawn.COUNTS = drawn.COUNTS, {"train": 40, "test": 8}
    try:
        DataGenerator("samples", 64, folder, layout="samples", workers=1).run()
    finally:
        drawn.COUNTS = counts
    return folder


@pytest.fixture
def photo_set(tmp_path, shared):
    """A prepared set of three real test faces at 64 px, with their photos."""
    from utils.data.dataset import PreparedSet
    from utils.data.generator import DataGenerator
    source = tmp_path / "300W" / "lfpw" / "testset"
    source.mkdir(parents=True)
    for name in ("image_0001", "image_0002", "image_0003"):
        for suffix in (".jpg", ".pts"):
            found = shared / "data/300W/lfpw/testset" / (name + suffix)
            (source / (name + suffix)).write_bytes(found.read_bytes())
    return PreparedSet(DataGenerator(tmp_path / "300W", 64, tmp_path / "set", workers=1).run())


@pytest.fixture(scope="session")
def tiny_weights(drawn_set, tmp_path_factory):
    """best.pt of an untrained small network with random batch norms, on the drawn set."""
    import torch

    from utils import checkpoint
    from utils.args import load_args
    from utils.data.dataset import PreparedSet
    prepared = PreparedSet(drawn_set)
    torch.manual_seed(0)
    args = load_args({"backbone": "mobilenetv3_small_050", "input_size": 64,
                      "data_dir": str(drawn_set)})
    model = checkpoint.build_model(args, prepared.scheme)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            # timm initialises the last batch norm of a residual branch to zero.
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.uniform_(module.running_mean, -0.2, 0.2)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
    torch.nn.init.normal_(model.head.score.weight, std=0.05)
    folder = tmp_path_factory.mktemp("weights") / "tiny"
    folder.mkdir()
    checkpoint.save({**checkpoint.describe(args, prepared.scheme, prepared.crop),
                     "weights": model.state_dict(), "epoch": 1, "val_nme": 50.0},
                    folder / "best.pt")
    return folder / "best.pt"


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """Replace weights/ by an empty folder for trainings in this process; the folder."""
    from utils import experiment
    monkeypatch.setattr(experiment, "WEIGHTS", tmp_path)
    for function in (experiment.new_experiment, experiment.find_experiment,
                     experiment.newest_experiment):
        monkeypatch.setattr(function, "__defaults__", (*function.__defaults__[:-1], tmp_path))
    return tmp_path


@pytest.fixture
def no_patches(monkeypatch):
    """Read eyes from landmarks alone: drawn frames show no eyes where stand-ins see them."""
    import numpy

    from utils.drowsiness import eye_patch
    from utils.drowsiness.eyes import SHUT_FROM
    neutral = numpy.array([[-SHUT_FROM, -99, 0]] * 2, numpy.float32)
    monkeypatch.setattr(eye_patch, "shipped", lambda: lambda patches: neutral.copy())
