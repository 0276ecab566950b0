"""Files at the root that other tools read: torch.hub, citation, workflow."""
import re
import subprocess
import sys

import numpy
import pytest
import torch
import yaml

import hubconf
from utils.args import ROOT

LOAD = """
import sys, torch
model = torch.hub.load(sys.argv[1], "pipnet", weights=sys.argv[2], source="local")
size = model.input_size
points, confidence = model.predict(torch.zeros(2, 3, size, size, dtype=torch.uint8))
points.numpy(), confidence.numpy()
print(model.scheme.name, tuple(points.shape), tuple(confidence.shape), model.training)
"""


def hub(weights, folder):
    return subprocess.run([sys.executable, "-c", LOAD, str(ROOT), str(weights)], cwd=folder,
                          text=True, capture_output=True)


def test_torch_hub_loads_a_shipped_model_and_a_file(tmp_path, tiny_weights):
    for weights in ("fast", tiny_weights):
        done = hub(weights, tmp_path)
        assert done.stdout == "300W (2, 68, 2) (2, 68) False\n", done.stderr
    assert "no such experiment" in hub("nobody", tmp_path).stderr


@pytest.fixture(scope="module")
def crops(tiny_weights):
    """Smooth crops (4, 3, 64, 64), so that the best cell does not hang on the last bit."""
    rng = numpy.random.default_rng(3)
    small = torch.from_numpy(rng.integers(0, 256, (4, 3, 4, 4), numpy.uint8))
    return torch.nn.functional.interpolate(small.float(), 64, mode="bicubic").clamp(0, 255).byte()


@pytest.mark.parametrize(("convert", "tolerance"), [
    ("half", 0.002), ("bfloat16", 0.02), ("double", 1e-5), ("float", 0)])
def test_the_model_predicts_in_other_precisions(tiny_weights, crops, convert, tolerance):
    model = hubconf.pipnet(str(tiny_weights))
    expected, scores = model.predict(crops)
    converted = getattr(hubconf.pipnet(str(tiny_weights)), convert)()
    landmarks, confidence = converted.predict(crops)
    kind = torch.float64 if convert == "double" else torch.float32
    assert landmarks.dtype == confidence.dtype == kind
    assert (landmarks - expected).abs().mean() <= tolerance
    assert (confidence - scores).abs().mean() <= tolerance
    weights = next(converted.backbone.parameters())
    assert weights.dtype == getattr(torch, convert)
    # What half precision would spoil stays in float32.
    assert {p.dtype for p in (*converted.head.parameters(), converted.mean)} == {kind}
    assert len(converted(crops)) == 5, "forward gives the maps"
    assert list(converted.state_dict()) == list(model.state_dict())


def test_the_model_goes_to_a_device_and_a_type_at_once(tiny_weights):
    model = hubconf.pipnet(str(tiny_weights)).to("meta", torch.bfloat16)
    assert {p.device.type for p in (*model.parameters(), *model.buffers())} == {"meta"}
    assert next(model.backbone.parameters()).dtype == torch.bfloat16
    assert {p.dtype for p in (*model.head.parameters(), model.mean)} == {torch.float32}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_model_predicts_alike_on_a_gpu(tiny_weights, crops):
    expected, _ = hubconf.pipnet(str(tiny_weights)).predict(crops)
    for model in (hubconf.pipnet(str(tiny_weights)).to("cuda"),
                  hubconf.pipnet(str(tiny_weights), "cuda").half()):
        found, _ = model.predict(crops.to("cuda"))
        assert (found.cpu() - expected).abs().mean() < 0.002


class Predict(torch.nn.Module):
    """The prediction of a model as the forward pass of a module, which torch.export takes."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        return self.model.predict(images)


def test_torch_export_and_torch_compile(tiny_weights, crops):
    model = hubconf.pipnet(str(tiny_weights)).half()
    expected = model.predict(crops)
    exported = torch.export.export(Predict(model), (crops,), dynamic_shapes=(
        {0: torch.export.Dim("batch", min=1, max=64)},))
    # `eager` traces the whole graph as every backend does, and needs no C++ compiler.
    compiled = torch.compile(model.predict, fullgraph=True, backend="eager")
    for call in (exported.module(), compiled):
        for count in (4, 2):
            for found, value in zip(call(crops[:count]), expected):
                torch.testing.assert_close(found, value[:count], rtol=1e-3, atol=1e-3)


def test_the_citation_names_the_paper():
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    paper = found["preferred-citation"]
    assert found["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= found.keys()
    assert [a["family-names"] for a in paper["authors"]] == ["Jin", "Liao", "Shao"]
    number = paper["identifiers"][0]["value"].removeprefix("arXiv:")
    assert f"arXiv {number}" in (ROOT / "README.md").read_text()


def test_the_workflow_runs_the_readmes_test_command_and_ruff():
    found = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text())
    tests, ruff = [step["run"] for step in found["jobs"]["tests"]["steps"] if "run" in step]
    assert tests in (ROOT / "README.md").read_text().splitlines()
    assert ruff == "ruff check ."
    oldest, *_ = found["jobs"]["tests"]["strategy"]["matrix"]["python-version"]
    project = (ROOT / "pyproject.toml").read_text()
    assert re.search(r'^requires-python = "(.*)"$', project, re.M)[1] == f">={oldest}"
    target = re.search(r'^target-version = "(.*)"$', project, re.M)[1]
    assert target == f"py{oldest.replace('.', '')}"
