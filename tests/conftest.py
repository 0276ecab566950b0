"""Fixtures and settings that every test module shares."""
import os
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SHARED = ROOT.parent / "shared"

# Tests run several small models; more threads than cores slow each other down.
os.environ.setdefault("OMP_NUM_THREADS", "2")


@pytest.fixture(scope="session")
def shared():
    """The folder with real faces, published figures and detectors beside the repository."""
    if not SHARED.is_dir():
        pytest.skip("needs ../shared (real faces and detectors), which is not here")
    return SHARED
