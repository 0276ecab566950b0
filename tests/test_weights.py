"""The published files score on the real test set what their cards and the README state."""
import pathlib
import re
import shutil
import subprocess

import numpy
import pytest

from nets.model import count_parameters
from utils import checkpoint, experiment
from utils.args import ROOT
from utils.data import dataset
from utils.data.generator import DataGenerator
from utils.deploy.export import digest
from utils.evaluation import predict, score
from utils.predictor import Predictor

WEIGHTS = ROOT / "weights"
SHIPPED = sorted(path.stem for path in WEIGHTS.glob("*.pt"))
# Maximum number of parameters.
LIMITS = {"tiny": 6e6, "fast": 6e6, "accurate": 6e6, "eyes": 6e6, "irnet18": 13e6}
INT8 = {name: WEIGHTS / f"{name}.int8.onnx" for name in (experiment.DEFAULT_MODEL, "fast")}


@pytest.fixture(scope="module")
def lfpw(shared, tmp_path_factory):
    """The 224 faces of the LFPW test set, prepared as a user would."""
    folder = tmp_path_factory.mktemp("lfpw")
    (folder / "300W" / "lfpw").mkdir(parents=True)
    (folder / "300W" / "lfpw" / "testset").symlink_to(shared / "data/300W/lfpw/testset")
    DataGenerator(str(folder / "300W"), 256, folder / "set").run()
    return dataset.PreparedSet(folder / "set")


def _card(name):
    """NME in photo pixels and in published units, as the model's card has them."""
    text = (WEIGHTS / f"{name}.md").read_text(encoding="utf-8")
    cells = re.search(r"^\| test \| 224 \|(.*)\|$", text, re.M)[1].split("|")
    return float(cells[0]), float(cells[-1])


def test_files_are_small_and_complete():
    files = [path for path in WEIGHTS.iterdir() if path.suffix in (".pt", ".onnx")]
    sizes = [path.stat().st_size for path in files]
    assert max(sizes) < 50e6
    assert sum(sizes) < 90e6
    assert "fast" in SHIPPED
    assert set(SHIPPED) <= set(LIMITS)
    # Tests of the demo skip without the first.
    assert all(path.is_file() for path in INT8.values())
    # The folder may also have a user's exports (fast.onnx, fast.raw.onnx).
    assert {path.stem for path in files
            if path.suffix == ".onnx" and "." not in path.stem} <= {*SHIPPED, "eye_state"}


@pytest.mark.parametrize("name", SHIPPED)
def test_scores_as_its_card(name, lfpw):
    model = checkpoint.load_model(WEIGHTS / f"{name}.pt")
    assert count_parameters(model) <= LIMITS[name]
    functions = [predict.torch_predict(model, "cpu")]
    if (WEIGHTS / f"{name}.onnx").is_file():
        onnx = Predictor(WEIGHTS / f"{name}.onnx")
        functions.append(lambda images: onnx(images.permute(0, 2, 3, 1).numpy())[0])
    for function in functions:
        numbers, _ = score.score_lists(function, model, lfpw)
        found = numbers["test"]["nme"], numbers["test"]["nme_crop"]
        assert found == pytest.approx(_card(name), abs=0.005)
        assert _cells("README.md", name)[3] == f"{found[0]:.2f}"
        assert _cells("docs/results.md", name)[2] == f"{found[1]:.2f}"


@pytest.mark.parametrize("name", INT8)
def test_int8_files_score_as_the_results_page(name, lfpw):
    onnx = Predictor(INT8[name])
    assert dict(onnx.session.get_modelmeta().custom_metadata_map)["weights"] == digest(
        checkpoint.load_model(WEIGHTS / f"{name}.pt")), "it was exported from older weights"
    numbers, _ = score.score_lists(lambda images: onnx(images.permute(0, 2, 3, 1).numpy())[0],
                                   onnx, lfpw)
    documented = float(_cells("docs/results.md", name)[7])
    assert numbers["test"]["nme"] == pytest.approx(documented, abs=0.01)


@pytest.fixture(scope="module")
def oldest_runtime(tmp_path_factory):
    """The command of Python 3.10 with ONNX Runtime 1.14, the oldest one that has opset 18."""
    # A shim of pyenv does not run while another version is chosen.
    python = next(pathlib.Path.home().glob(".pyenv/versions/3.10.*/bin/python"),
                  shutil.which("python3.10"))
    if python is None:
        pytest.skip("needs Python 3.10")
    folder = tmp_path_factory.mktemp("oldest") / "venv"
    subprocess.run([python, "-m", "venv", folder], check=True)
    subprocess.run([folder / "bin/pip", "install", "--quiet", "--only-binary", ":all:",
                    "onnxruntime==1.14.0", "numpy<2"], check=True)
    return folder / "bin/python"


READ = """
import sys, numpy, onnxruntime
images = numpy.load(sys.argv[1])
session = onnxruntime.InferenceSession(sys.argv[2], providers=["CPUExecutionProvider"])
numpy.savez(sys.argv[3], *session.run(None, {"images": images}))
print(onnxruntime.__version__)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", INT8)
def test_the_oldest_onnx_runtime_reads_the_shipped_files(name, oldest_runtime, tmp_path):
    predictor = Predictor(INT8[name])
    size = predictor.input_size
    images = numpy.random.default_rng(0).integers(0, 256, (2, size, size, 3), numpy.uint8)
    numpy.save(tmp_path / "images.npy", images.transpose(0, 3, 1, 2))
    done = subprocess.run([oldest_runtime, "-c", READ, tmp_path / "images.npy", INT8[name],
                           tmp_path / "found.npz"], capture_output=True, text=True)
    assert done.stdout == "1.14.0\n", done.stderr
    found = numpy.load(tmp_path / "found.npz")
    for name_of, expected in zip(found.files, predictor(images)):
        assert found[name_of].shape == expected.shape
        # The runtimes round int8 alike, but for single steps.
        assert numpy.abs(found[name_of] - expected).mean() < 0.01


def _cells(page, name):
    """The cells of a shipped model's row, the one that links to its card, in a page."""
    text = (ROOT / page).read_text(encoding="utf-8")
    row, = re.findall(rf"^\| \[`{name}`\].*$", text, re.M)
    return [cell.strip() for cell in row.strip("|").split("|")]
