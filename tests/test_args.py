"""args.yaml and the command line: one set of names, and what is said of wrong ones."""
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT

import main
from utils import args as settings
from utils.args import load_args, parse
from utils.errors import UserError
from utils.training import launch


def test_args_yaml_holds_every_knob_once_with_a_sentence():
    text = settings.DEFAULTS.read_text()
    groups, helps = settings.read_help()
    assert set(yaml.safe_load(text)) == set(settings.KINDS) == set(helps)
    assert sorted(name for names in groups.values() for name in names) == sorted(settings.KINDS)
    assert all(len(sentence) > 5 for sentence in helps.values())
    assert not set(settings.CHOICES) - set(settings.KINDS)
    assert not (set(settings.LEAST) | set(settings.LARGEST)) - set(settings.KINDS)


def test_every_knob_is_a_flag_that_wins(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("lr: 0.5\nepochs: 3\nscheme: [36, 37, 45]\npretrained: null\n")
    request = parse(["--train", "--args", str(path), "--lr", "1e-2", "--flip-test", "true"])
    assert request.actions == {"train"}
    assert (request.args.lr, request.args.epochs, request.args.flip_test) == (0.01, 3, True)
    assert request.args.scheme == "36,37,45"
    assert request.args.pretrained == "none"
    assert request.args.batch_size == yaml.safe_load(settings.DEFAULTS.read_text())["batch_size"]
    named = ["data-dir", "data", "exp", "backbone", "head", "scheme", "num-nb", "cls", "reg", "stride", "input-size", "epochs", "batch-size", "lr", "pretrained", "precision", "workers", "device", "seed"]
    assert {name.replace("-", "_") for name in named} <= set(settings.KINDS)
    assert set(settings.ACTIONS) >= {"train", "test", "export", "test_onnx", "compare", "resume"}


def test_a_named_file_wins_over_what_an_experiment_was_begun_with(tmp_path, monkeypatch):
    (tmp_path / "one").mkdir()
    settings.save_args(load_args({"lr": 0.3, "boxes": "haar", "data_dir": "begun"}),
                       tmp_path / "one" / "args.yaml")
    monkeypatch.setattr("utils.experiment.WEIGHTS", tmp_path)
    path = tmp_path / "mine.yaml"
    path.write_text("data_dir: other\nboxes: none\n")
    args = launch.resumed(parse(["--test", "--exp", "one", "--args", str(path), "--boxes", "x"]))
    assert (args.lr, args.data_dir, args.boxes) == (0.3, "other", "x")


def test_what_a_training_was_followed_by_is_not_done_again(tmp_path, monkeypatch):
    (tmp_path / "one").mkdir()
    settings.save_args(load_args({"lr": 0.3, "boxes": "haar", "dump_pseudo": 64, "device": "cpu",
                                  "report": "a.json", "flip_test": True}),
                       tmp_path / "one" / "args.yaml")
    monkeypatch.setattr("utils.experiment.WEIGHTS", tmp_path)
    seen = []
    for name in ("test", "export", "dump_pseudo"):
        monkeypatch.setattr(main, name, lambda args, *_: seen.append(args))
    main.dispatch(parse(["--test", "--exp", "one", "--by-pose"]))
    (args,) = seen
    assert (args.lr, args.device, args.by_pose, args.exp) == (0.3, "cpu", True, "one")
    assert (args.boxes, args.dump_pseudo, args.report, args.flip_test) == ("none", 0, "none", False)
    # Going on with the training itself, everything is as it was begun.
    assert launch.resumed(parse(["--resume", "--exp", "one"])).dump_pseudo == 64


def test_resume_trains_whatever_else_is_asked():
    assert parse(["--resume", "--test", "--exp", "one"]).actions == {"resume", "train", "test"}


@pytest.mark.parametrize("action", ["--fit-eyes", "--fit-shape", "--export", "--int8"])
def test_files_of_a_model_are_written_only_where_it_is_named(action):
    with pytest.raises(UserError, match="say which model with --exp"):
        parse([action, "--data-dir", "faces"])
    assert parse([action, "--exp", "x.pt"]).args.exp == "x.pt"
    assert "train" in parse([action, "--train"]).actions


def test_saved_args_are_read_back(tmp_path):
    args = load_args({"lr": 0.3, "scheme": "eyes", "flip": 0, "exp": "007"})
    settings.save_args(args, tmp_path / "args.yaml")
    assert vars(load_args(path=tmp_path / "args.yaml")) == vars(args)


@pytest.mark.parametrize(("argv", "reason"), [
    ("--train --learning-rate 1", "unknown flag --learning-rate"),
    ("--train --batchsize 4", "nearest: --batch-size"),
    ("--train --epochs ten", "--epochs: expected int, found 'ten'"),
    ("--train --epochs 2.5", "--epochs: expected int"),
    ("--train --epochs 0", "--epochs: must be at least 1, found 0"),
    ("--train --lr nan", "--lr: expected float"),
    ("--train --lr -1", "--lr: must be at least 0"),
    ("--train --lr inf", "--lr: must be"),
    ("--train --flip 2", "--flip: must be 0 to 1"),
    ("--train --stride 8", "--stride: must be one of 16, 32, found 8"),
    ("--train --head heatmap", "--head: must be one of pip, regression"),
    ("--train --flip-test maybe", "--flip-test: expected bool"),
    ("--train --data-dir x --data samples", "give one of them"),
    ("--train --lr", "--lr"),
    ("", "nothing to do"),
    ("--args nowhere.yaml --train", "nowhere.yaml: cannot be read"),
])
def test_wrong_command_lines(argv, reason):
    with pytest.raises(UserError) as caught:
        parse(argv.split())
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("text", "reason"), [
    ("learning_rate: 1", "learning_rate: unknown key"),
    ("epoch: 1", "nearest: epochs"),
    ("epochs: ten", "epochs: expected int, found 'ten'"),
    ("epochs: true", "epochs: expected int"),
    ("flip_test: 1", "flip_test: expected bool"),
    ("exp: 007", "exp: 7 is no text to YAML; put it into quotes"),
    ("lr: 0.1\nlr: 0.2", "key lr is there twice"),
    ("- a list", "expected lines of the form key: value"),
    ("a: [b", "cannot be read"),
    ("", "expected lines of the form key: value"),
])
def test_wrong_files(tmp_path, text, reason):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_args(path=path)
    assert reason in str(caught.value)
    assert "mine.yaml" in str(caught.value)


def test_data_dir_and_data(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("data: samples")
    assert parse(["--train", "--args", str(path)]).args.data == "samples"
    typed = parse(["--train", "--args", str(path), "--data-dir", "x"]).args
    assert (typed.data, typed.data_dir) == ("none", "x"), "what is typed wins"


def test_resume_alone_trains():
    assert parse(["--resume", "--exp", "007"]).actions == {"resume", "train"}


def test_help_is_grouped_and_quick():
    result = subprocess.run([sys.executable, "main.py", "--help"], cwd=ROOT, text=True,
                            capture_output=True)
    assert result.returncode == 0
    assert not result.stderr
    for part in ("Data", "Model", "Loss", "Training", "Augmentation", "Test", "Run", "Actions",
                 "--num-nb", "--test-onnx"):
        assert part in result.stdout
    # It takes half a second; imports of torch would take ten times as long.
    loaded = subprocess.run(
        [sys.executable, "-X", "importtime", "main.py", "--help"], cwd=ROOT, text=True,
        capture_output=True).stderr
    assert not {"torch", "cv2", "numpy", "timm"} & {line.split("|")[-1].strip()
                                                    for line in loaded.splitlines()}
