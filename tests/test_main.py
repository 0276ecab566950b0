"""The commands end to end on drawn faces, and their messages for mistakes."""
import csv
import json
import subprocess
import sys

import cv2
import pytest
import test_generator
import torch
import yaml
from helpers import small_sets
from helpers.warm import warm


def run(*argv, ok=True, call="run_main"):
    """Run main.py in the copied tree and return its output; the exit code must be 0 (or 2)."""
    child = warm().run(call=f"small_sets:{call}", argv=[str(a) for a in argv])
    assert "Traceback" not in child.text, child.text
    assert child.code == (0 if ok else 2), child.text
    return child.text


def train(exp, *argv, ok=True, call="run_main"):
    return run("--train", *warm().flags, "--workers", 0, "--exp", exp, *argv, ok=ok, call=call)


def weights(exp, name="best.pt"):
    return warm().folder(exp) / name


def records():
    with open(warm().tree / "weights" / "results.csv", newline="") as file:
        return {row["exp"]: row for row in csv.DictReader(file)}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    report = tmp_path_factory.mktemp("report") / "report.json"
    text = train("whole", "--test", "--test-onnx", "--epochs", 2, "--report", report)
    return text, json.loads(report.read_text())


def test_the_files_of_an_experiment(trained):
    text, _ = trained
    folder = warm().folder("whole")
    for name in ("args.yaml", "best.pt", "last.pt", "best.onnx", "results.csv", "curves.png",
                 "ced.png", "worst.png"):
        assert (folder / name).stat().st_size > 0, name
    for name in ("curves.png", "ced.png", "worst.png"):
        assert cv2.imread(str(folder / name)).std() > 5
    rows = list(csv.DictReader((folder / "results.csv").open()))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert {"epoch", "lr", "loss", "val_nme", "seconds"} <= set(rows[0])
    args = yaml.safe_load((folder / "args.yaml").read_text())
    assert args["backbone"] == "mobilenetv3_small_050"
    assert args["epochs"] == 2
    assert "drawn by the repository" in text
    assert "4 a process x 1 processes x 2" in text
    row = records()["whole"]
    assert (row["scheme"], row["head"], row["batch"], row["epochs"]) == ("300W", "pip", "8", "2")
    assert int(row["parameters"]) > 100000
    assert row["nme"]
    assert row["onnx_nme"]


def test_a_report(trained):
    text, report = trained
    assert set(report) == {"pytorch", "onnx", "max_abs_diff_px"}
    numbers = report["pytorch"]["test"]
    assert numbers["faces"] == 8
    assert {"nme", "fr8", "auc8", "fr10", "auc10"} <= set(numbers)
    assert 0 <= numbers["auc8"] <= 1
    assert 0 <= numbers["fr8"] <= 100
    assert abs(numbers["nme"] - report["onnx"]["test"]["nme"]) < 1e-3
    assert report["max_abs_diff_px"] < 0.05
    assert f"{numbers['nme']:.3f}" in text
    assert "photo pixels" in text
    assert "published" in text


def test_a_pt_or_onnx_file_alone_is_enough(trained, tmp_path):
    _, report = trained
    nme = f"{report['pytorch']['test']['nme']:.3f}"
    moved = tmp_path / "mine.pt"
    moved.write_bytes(weights("whole").read_bytes())
    data = ("--data-dir", warm().faces, "--workers", 0, "--device", "cpu")
    assert nme in run("--test", "--exp", moved, *data)
    assert {p.name for p in tmp_path.iterdir()} == {"mine.pt", "mine-ced.png", "mine-worst.png",
                                                "mine-faces.csv"}
    run("--export", "--exp", moved)
    moved.unlink()
    assert nme in run("--test-onnx", "--exp", moved.with_suffix(".onnx"), *data)
    assert "no such file" in run("--test", "--exp", moved.with_suffix(".onnx"), *data, ok=False)


def test_another_set_does_not_change_the_record(trained, tmp_path):
    before = records()["whole"]
    small_sets.write_lmk(tmp_path / "LMK")
    text = run("--test", "--exp", "whole", "--data-dir", tmp_path / "LMK", "--device", "cpu",
               "--workers", 0)
    assert "note: the model was trained on crops" in text
    assert records()["whole"] == before


def test_compare(trained):
    text = run("--compare")
    assert "| whole |" in text
    assert "| gmacs |" in text
    assert (warm().tree / "weights" / "results.md").read_text() == text


def state(exp):
    return torch.load(weights(exp), weights_only=True)


def test_the_eyes_of_a_68_point_set(trained):
    """The 12-point experiment of the user's notes is one command."""
    text = train("eyes", "--scheme", "eyes", "--num-nb", 5, "--reg", 2.0, "--epochs", 1, "--test",
                 "--test-onnx")
    assert "eyes, 12 points" in text
    assert "onnx" in text
    scheme = state("eyes")["scheme"]
    assert scheme["flip"] == [9, 8, 7, 6, 11, 10, 3, 2, 1, 0, 5, 4]
    assert scheme["divisor"] == [0, 9]
    assert scheme["base"] == "300W"
    assert records()["eyes"]["scheme"] == "eyes"
    # The mean face is the set's own.
    whole = state("whole")["scheme"]["mean_face"]
    assert scheme["mean_face"] == whole[36:48]


def test_points_by_number_and_from_yaml(trained, tmp_path):
    (tmp_path / "mine.yaml").write_text(f"scheme: {list(range(36, 48))}\nnum_nb: 0\n")
    train("listed", "--args", tmp_path / "mine.yaml", "--epochs", 1,
          call="run_main_without_export")
    train("range", "--scheme", "36-47", "--num-nb", 11, "--epochs", 1,
          call="run_main_without_export")
    for exp in ("listed", "range"):
        assert state(exp)["scheme"]["indices"] == list(range(36, 48))
        assert state(exp)["scheme"]["flip"] == [9, 8, 7, 6, 11, 10, 3, 2, 1, 0, 5, 4]
    assert state("range")["args"]["num_nb"] == 11


def test_mean_face_published_or_from_a_file(trained, tmp_path):
    train("published", "--mean-face", "published", "--epochs", 1, call="run_main_without_export")
    train("filed", "--mean-face", warm().faces / "indices.txt", "--epochs", 1,
          call="run_main_without_export")
    ours = state("whole")["scheme"]["mean_face"]
    assert state("published")["neighbour_face"] != ours
    torch.testing.assert_close(torch.tensor(state("filed")["neighbour_face"]), torch.tensor(ours),
                               atol=1e-5, rtol=0)
    assert "test" in run("--test", "--exp", "published", "--data-dir", warm().faces, "--device",
                         "cpu", "--workers", 0)


def test_regression_and_fine_tuning(trained):
    text = train("tuned", "--scheme", "eyes", "--num-nb", 5, "--head", "regression",
                 "--offset-loss", "wing", "--pretrained", weights("whole"), "--epochs", 1, "--test",
                 "--test-onnx")
    assert "loaded; fresh: head.linear.bias" in text
    assert records()["tuned"]["head"] == "regression"
    assert records()["tuned"]["onnx_nme"]


def test_a_set_like_lmk_trains(tmp_path):
    small_sets.write_lmk(tmp_path / "LMK", 20, 4)
    text = train("lmk", "--data-dir", tmp_path / "LMK", "--epochs", 1, "--test",
                 call="run_main_without_export")
    assert "19 training and 1 validation faces" in text
    assert state("lmk")["crop"] == {"rule": "stretch", "scale": 1.1}


@pytest.mark.parametrize("source", ["pts", "faces.csv"])
def test_a_custom_set_from_photos_to_onnx(tmp_path, source):
    test_generator.write_custom(tmp_path, tmp_path / "square.yaml")
    run(tmp_path / source, "--scheme", tmp_path / "square.yaml", "--target-size", 64,
        call="run_generator")
    exp = f"custom-{source.partition('.')[0]}"
    # The folder that was prepared also finds the set beside it.
    onnx = source == "pts"
    text = train(exp, "--data-dir", tmp_path / source, "--num-nb", 4, "--epochs", 1, "--test",
                 *["--test-onnx"][:onnx], call="run_main" if onnx else "run_main_without_export")
    assert "square, 5 points" in text
    assert weights(exp, "best.onnx").is_file() == onnx
    assert "none for" in train("custom-published", "--data-dir", tmp_path / source, "--num-nb", 4,
                               "--mean-face", "published", ok=False)


@pytest.mark.parametrize(("argv", "reason"), [
    ("--train --backbone resnet19 {data}", "near: "),
    ("--train --num-nb 68 {data}", "num_nb must be 0..67 for 68 landmarks, found 68"),
    ("--train --scheme eyes --num-nb 12 {data}", "num_nb must be 0..11 for 12 landmarks"),
    ("--train --input-size 250 {data}", "250 is not a multiple"),
    ("--train --scheme eye {data}", "nearest: eyes"),
    ("--train --scheme 36-40 {data}", "mirror partner"),
    ("--train --scheme 60-70 {data}", "300W has points 0..67, not 68"),
    ("--train --scheme WFLW {data}", "neither the set's (300W)"),
    ("--train --mean-face gone.txt {data}", "gone.txt: no mean face"),
    ("--train --pretrained gone.pt {data}", "gone.pt: no such file"),
    ("--train --pretrained args.yaml {data}", "args.yaml"),
    ("--train --pretrained timm --backbone irnet18 {data}", "there are none for irnet18"),
    ("--train --data-dir nowhere", "util.DataGenerator(data_dir=\"nowhere\""),
    ("--train --data-dir nets", "no prepared set"),
    ("--train --data-dir x --data samples", "give one of them"),
    ("--train --exp whole {data}", "add --resume"),
    ("--train --device cuda:99 {data}", "this machine has"),
    ("--test --exp 999 {data}", "no such experiment; there are: "),
    ("--test --exp 999 --data-dir nowhere", "no such experiment"),
    ("--test --exp gone.pt {data}", "gone.pt: no such file"),
    ("--test --exp args.yaml {data}", "args.yaml"),
    ("--test --exp whole --data-dir nowhere", "no prepared set"),
    ("--test --exp whole --report no/such/report.json {data}", "there is no such folder"),
    ("--export --exp 999", "no such experiment"),
    ("--train --epoch 3", "nearest: --epochs"),
    ("--train --epochs three", "expected int"),
    ("", "nothing to do"),
])
def test_mistakes_end_in_one_or_two_lines(trained, argv, reason):
    data = ["--data-dir", warm().faces, "--device", "cpu", "--backbone", "mobilenetv3_small_050",
            "--input-size", 64, "--workers", 0]
    words = argv.split()
    # The flags of the case come last, so that they override the others.
    words = [w for w in words if w != "{data}"]
    text = run(*(data if "{data}" in argv else []), *words, ok=False)
    lines = text.strip().splitlines()
    assert lines[-1].startswith("error: "), text
    assert reason in lines[-1], text
    assert len(lines) <= 2, text
    if "--train" in words and "--exp" not in words:
        for folder in (warm().tree / "weights").glob("[0-9][0-9][0-9]"):
            assert not any(folder.glob("*.pt"))


@pytest.mark.parametrize(("argv", "reason"), [
    (["nowhere"], "nowhere: no such folder"),
    (["nets"], "no known layout"),
    (["nets", "--layout", "300"], "nearest: 300W"),
    (["nets", "--layout", "WFLW"], "WFLW_images: no such folder"),
    (["nets", "--scheme", "gone.yaml"], "no known layout"),
    (["nets", "--target-size", "4"], "out of range"),
    (["nets", "--crop", "round"], "crop must be one of"),
    ([], "data_dir"),
])
def test_mistakes_in_preparing(argv, reason):
    text = run(*argv, ok=False, call="run_generator")
    assert reason in text
    assert len(text.strip().splitlines()) <= 2, text


@pytest.mark.parametrize(("argv", "reason"), [
    (["main.py", "--train", "--data-dir", "nowhere"], "util.DataGenerator"),
    (["main.py", "--tests"], "nearest: --test"),
    (["-m", "utils.data.generator", "nowhere"], "no such folder"),
    (["-c", "from utils import util; util.DataGenerator(data_dir='nowhere').run()"],
     "no such folder"),
    (["-m", "utils.generator", "nowhere"], "no such folder"),
    (["-m", "utils.data.sheet"], "the folder of a prepared set"),
])
def test_mistakes_of_real_processes(argv, reason):
    result = subprocess.run([sys.executable, *argv], cwd=warm().tree, text=True,
                            capture_output=True, env={**warm().env})
    assert result.returncode == 2
    assert not result.stdout
    assert result.stderr.startswith("error: ")
    assert reason in result.stderr
    assert len(result.stderr.splitlines()) <= 2


@pytest.mark.parametrize(("argv", "reason"), [
    ("--backbone resnet19", "near: "), ("--input-size 250", "is not a multiple"),
    ("--teacher gone.pt", "gone.pt: no such file"),
    ("--teacher args.yaml,gone.pt", "gone.pt: no such file"),
    ("--pretrained gone.pt", "no such file"),
    ("--gssl", "--gssl needs --unlabelled-dir"),
    ("--gssl --unlabelled-dir nowhere", "nowhere: no unlabelled set")])
def test_mistakes_are_reported_before_faces_are_drawn(argv, reason):
    text = run("--train", "--data", "samples", "--workers", 0, "--device", "cpu", *argv.split(),
               ok=False)
    assert reason in text
    assert text.count("\n") == 1, text
    assert not list(warm().tree.glob("samples-*"))
