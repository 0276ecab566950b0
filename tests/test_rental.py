"""Ten minutes on a rented GPU: what is packed, how long is trained, and what is copied."""
import subprocess
import tarfile

import numpy
import pytest
import torch

from tools.benchmark import rental
from tools.benchmark.gpu_speed import recipe_flags
from utils.args import ROOT, load_args, parse
from utils.data.dataset import FaceDataset, PreparedSet
from utils.errors import UserError
from utils.training import trainer
from utils.training.batch import plan_batch


@pytest.fixture(scope="module")
def webp(drawn_set, tmp_path_factory):
    """The drawn set with its images as WebP."""
    folder = tmp_path_factory.mktemp("webp")
    for name, content in rental.webp_set(drawn_set, rental.QUALITY):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def test_a_set_of_webp_images_has_the_same_faces(drawn_set, webp):
    assert {path.suffix for path in (webp / "images").iterdir()} == {".webp"}
    before, after = PreparedSet(drawn_set), PreparedSet(webp)
    assert before.lists.keys() == after.lists.keys()
    assert after.has_photos == before.has_photos
    for name, faces in before.lists.items():
        assert numpy.array_equal(after.lists[name].points, faces.points)
    one, two = (FaceDataset(found.lists["test"], found.margin, 64) for found in (before, after))
    for i in range(len(one)):
        assert (one[i][0].int() - two[i][0].int()).abs().float().mean() < 4


@pytest.mark.parametrize("cache", ["none", "device"])
def test_a_set_of_webp_images_trains(webp, weights, cache):
    args = load_args({"data_dir": str(webp), "backbone": "mobilenetv3_small_050", "input_size": 64,
                      "batch_size": 8, "effective_batch": 8, "epochs": 1, "workers": 0,
                      "cache": cache, "device": "cpu", "exp": "webp"})
    folder = trainer.train(args)
    saved = torch.load(folder / "best.pt", weights_only=True)
    assert numpy.isfinite(saved["val_nme"])


def test_the_folder_has_what_the_script_needs(drawn_set, tmp_path, capsys):
    folder = rental.pack(str(drawn_set), str(tmp_path / "rental"))
    assert {path.name for path in folder.iterdir()} == {"payload.tar", "rental.sh"}
    assert "faces 0." in capsys.readouterr().out
    with tarfile.open(folder / "payload.tar") as tar:
        names = set(tar.getnames())
    assert {"main.py", "args.yaml", "weights/accurate.md", "weights/irnet18.pt", "faces/train.txt",
            "tools/benchmark/gpu.py", "tests/test_gpu.py", "faces/set.yaml"} <= names
    assert not [name for name in names if "__pycache__" in name or name.endswith(".onnx")]


def test_a_folder_that_is_too_large_is_refused(drawn_set, tmp_path, monkeypatch):
    monkeypatch.setattr(rental, "LIMIT", 1 << 20)
    with pytest.raises(UserError, match="at most 1 MiB are allowed; give a smaller --quality"):
        rental.pack(str(drawn_set), str(tmp_path / "rental"))


def test_epochs_fill_the_time():
    figures = {"with teachers": {"images": 1000}, "epochs": {"steps": [9, 2], "validation": [5, 1]}}
    # Three seconds an epoch, of which two are steps.
    assert rental.count_epochs(figures, 1000, 360) == int(0.93 * 300 / 3)
    # The measured epoch is not slower than the steady rate allows.
    assert rental.count_epochs(figures, 4000, 360) == int(0.93 * 300 / 5)
    del figures["epochs"]
    assert rental.count_epochs(figures, 1000, 360) == int(0.93 * 300 / 2)
    assert rental.count_epochs(figures, 1000, 20) == 1
    with pytest.raises(UserError, match="was not measured"):
        rental.count_epochs({}, 1000, 360)


def test_the_plan_is_the_last_stage_of_accurate(drawn_set, tmp_path):
    figures = tmp_path / "gpu.jsonl"
    figures.write_text('{"name": "with teachers", "found": {"images": 100}}\n')
    flags = rental.plan(str(figures), str(drawn_set), 360, "cuda", False)
    args = parse(["--train", *flags.split()]).args
    card = recipe_flags()
    assert args.backbone == card["--backbone"] == "tf_efficientnet_lite2"
    assert args.teacher == ",".join(str(ROOT / "weights" / f"{name}.pt")
                                    for name in ("irnet18", "fast", "accurate"))
    assert args.pretrained == str(ROOT / "weights" / "accurate.pt")
    assert (args.batch_size, args.precision, args.lr) == (128, "bf16", float(card["--lr"]))
    assert args.epochs == int(0.93 * 300 / (38 / 100 + rental.VALIDATION))
    # 16 faces a step were asked for: the learning rate follows from the 128 there are.
    assert plan_batch(args, 1).lr_factor == pytest.approx(8 ** 0.5)


def test_large_files_come_back_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(rental, "PART", 10)
    exp, output = tmp_path / "exp", tmp_path / "out"
    exp.mkdir()
    for name, size in (("best.pt", 25), ("results.csv", 10), ("last.pt", 5)):
        (exp / name).write_bytes(bytes(range(size)))
    rental.collect(str(exp), str(output))
    assert sorted(path.name for path in output.iterdir()) == [
        "best.pt.part0", "best.pt.part1", "best.pt.part2", "results.csv"]
    joined = b"".join((output / f"best.pt.part{i}").read_bytes() for i in range(3))
    assert joined == (exp / "best.pt").read_bytes()


def test_the_script_stops_itself_and_leaves_out_what_has_no_time(tmp_path):
    """With two seconds there is time to unpack alone."""
    (tmp_path / "faces").mkdir()
    with tarfile.open(tmp_path / "payload.tar", "w") as tar:
        tar.add(tmp_path / "faces", "faces")
    script = tmp_path / "rental.sh"
    script.write_text((ROOT / "tools/benchmark/rental.sh").read_text().replace(
        "stage unpack 15", "stage unpack 585"))
    done = subprocess.run(["bash", script, tmp_path / "out", "--seconds", "2"],
                          capture_output=True, text=True, timeout=120)
    log = (tmp_path / "out" / "rental.log").read_text()
    assert "== unpack: ends at second" in log, done.stderr
    assert "== verify: left out, the time is up" in log
    assert "== measure: left out, the time is up" in log
    wrong = subprocess.run(["bash", script, tmp_path / "out", "--fast"], capture_output=True,
                           text=True)
    assert (wrong.returncode, "unknown flag --fast" in wrong.stderr) == (2, True)
