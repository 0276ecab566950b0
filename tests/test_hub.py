"""Files at the root that other tools read: torch.hub, citation, workflow."""
import re
import subprocess
import sys

import yaml

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
