"""docs/scaling.md: its counts are those of the code."""
import inspect
import pathlib

import pytest
import torch

from nets.model import LandmarkNet, count_parameters, gmacs
from utils.landmarks.schemes import SCHEMES

# Of the host in each synchronised layer.
WAITS = 3
PAGE = (pathlib.Path(__file__).parent.parent / "docs" / "scaling.md").read_text(encoding="utf-8")


def cell(row, column):
    """Return a cell of the table row that starts with `row`."""
    line = next(line for line in PAGE.splitlines() if line.startswith(f"| {row}"))
    return line.strip("| ").split(" | ")[column]


@pytest.mark.parametrize(("column", "backbone"), [(1, "irnet18"), (2, "tf_efficientnet_lite0")])
def test_counts_and_bytes(column, backbone):
    model = LandmarkNet(SCHEMES["300W"], backbone).eval()
    count, work = count_parameters(model), gmacs(model, 256)
    channels = [m.num_features for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert cell("parameters", column) == f"{count / 1e6:.2f} M"
    assert cell("GMACs", column) == f"{work:.2f}"
    assert cell("GFLOP", column) == f"{6 * work:.1f}"
    assert cell("gradients", column) == f"{4 * count / 1e6:.1f} MB"
    assert cell("of 2 bytes", column) == f"{2 * count / 1e6:.1f} MB"
    for ranks in (8, 32):
        sent = 2 * (ranks - 1) / ranks * 4 * count
        assert cell(f"a GPU sends, ring of {ranks}", column) == f"{sent / 1e6:.1f} MB"
    forward, backward = 4 * (2 * sum(channels) + len(channels)), 4 * 2 * sum(channels)
    assert cell("layers", column) == f"{len(channels)}, {sum(channels)}"
    assert cell("kB forward", column) == f"{forward / 1e3:.1f}, {backward / 1e3:.1f}"
    assert cell("messages", column) == str(2 * len(channels))
    assert cell("waits", column) == str(WAITS * len(channels))


def test_torch_s_synchronised_norm_waits_as_often_as_the_page_says():
    """Each selection by a mask makes the host wait for the number of selected values."""
    source = inspect.getsource(torch.nn.modules._functions.SyncBatchNorm.forward)
    assert source.count("[mask]") == WAITS


def test_the_page_is_marked_as_a_plan():
    assert "not measured" in PAGE.split("\n\n")[1]
    assert "†" in PAGE
    assert "goes to the device is 197 kB" in PAGE
    assert 256 * 256 * 3 + 68 * 8 == 197152
