"""The lower bounds of requirements.txt: a virtual environment with them runs quick tests."""
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Data, loss, a training step, the export and the demo.
QUICK = ["test_args", "test_dataset", "test_demo", "test_draw", "test_export", "test_generator",
         "test_landmarks", "test_loss", "test_machines", "test_step"]


def oldest_pins():
    """Return requirements.txt with each lower bound as the version to install."""
    pins = []
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        # The CPU package of ONNX Runtime has the same code without the libraries of CUDA.
        line = line.partition("#")[0].strip().replace("onnxruntime-gpu", "onnxruntime")
        name, _, marker = line.partition(";")
        if marker and "!=" not in marker:
            continue
        pins.append(re.sub(r">=([\d.]+).*", r"==\1.*", name))
    return pins


def python310():
    """Return a Python 3.10, the oldest that is supported, or skip the test."""
    if sys.version_info[:2] == (3, 10):
        return sys.executable
    found = sorted((pathlib.Path.home() / ".pyenv/versions").glob("3.10.*/bin/python3.10"))
    path = shutil.which("python3.10") if not found else found[-1]
    return path or pytest.skip("needs python3.10")


def test_pins_are_the_lower_bounds():
    pins = oldest_pins()
    assert {"torch==2.8.*", "timm==1.0.12.*", "opencv-python==4.8.*", "numpy==1.26.*"} <= set(pins)
    assert sum(pin.startswith("onnxruntime") for pin in pins) == 1
    assert not [pin for pin in pins if re.search(r"[<>; ]", pin)]


@pytest.mark.slow
def test_the_oldest_packages_run_the_quick_tests(tmp_path):
    """Download 3 GB in some minutes, as torch comes with the libraries of CUDA."""
    python = tmp_path / "venv/bin/python"
    subprocess.run([python310(), "-m", "venv", tmp_path / "venv"], check=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", *oldest_pins(), "pytest",
                    "hypothesis"], check=True)
    done = subprocess.run(
        [python, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider",
         *(f"tests/{name}.py" for name in QUICK)], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}"})
    assert done.returncode == 0, done.stdout[-4000:]
