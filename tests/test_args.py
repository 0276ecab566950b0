"""args.yaml and the command line: one list of settings, and the messages for wrong ones."""
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT

import main
from utils import args as settings
from utils.args import load_args, parse
from utils.errors import UserError
from utils.training.settings import experiment_settings


def test_args_yaml_has_every_setting_once_with_its_help():
    text = settings.DEFAULTS.read_text()
    groups, helps = settings.read_help()
    assert set(yaml.safe_load(text)) == set(settings.SETTINGS) == set(helps)
    names = [name for names in groups.values() for name in names]
    assert sorted(names) == sorted(settings.SETTINGS)
    assert all(len(sentence) > 5 for sentence in helps.values())


def test_settings_options_and_actions_have_different_names():
    options = {name for group in settings.OPTIONS.values() for name in group}
    assert not options & set(settings.SETTINGS)
    assert not (options | set(settings.SETTINGS)) & set(settings.ACTIONS)


def test_defaults_are_within_their_own_limits():
    args = load_args()
    for name in settings.SETTINGS:
        assert settings.check(name, getattr(args, name), name) == getattr(args, name)


def test_a_probability_needs_no_entry_in_the_table():
    assert settings.SETTINGS["grey"] is settings.PROBABILITY
    with pytest.raises(UserError, match="--grey: must be 0 to 1, found 1.5"):
        parse(["--train", "--grey", "1.5"])


def test_every_setting_is_a_flag_with_precedence_over_files(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("lr: 0.5\nepochs: 3\nscheme: [36, 37, 45]\npretrained: null\n")
    request = parse(["--train", "--args", str(path), "--lr", "1e-2", "--flip-test", "true"])
    assert request.actions == {"train"}
    assert (request.args.lr, request.args.epochs, request.args.flip_test) == (0.01, 3, True)
    assert request.args.scheme == "36,37,45"
    assert request.args.pretrained == "none"
    assert request.args.batch_size == yaml.safe_load(settings.DEFAULTS.read_text())["batch_size"]
    named = ("data-dir exp backbone head scheme num-nb cls reg stride input-size epochs batch-size "
             "lr pretrained precision workers device seed")
    assert {name.replace("-", "_") for name in named.split()} <= set(settings.SETTINGS)
    assert set(settings.ACTIONS) >= {"train", "test", "export", "test_onnx", "compare", "resume"}


def test_a_named_file_wins_over_the_settings_of_an_experiment(tmp_path, monkeypatch):
    (tmp_path / "one").mkdir()
    settings.save_args(load_args({"lr": 0.3, "clip": 1, "data_dir": "first"}),
                       tmp_path / "one" / "args.yaml")
    monkeypatch.setattr("utils.experiment.WEIGHTS", tmp_path)
    path = tmp_path / "mine.yaml"
    path.write_text("data_dir: other\nclip: 2\n")
    request = parse(["--test", "--exp", "one", "--args", str(path), "--clip", "3"])
    args = experiment_settings(request)
    assert (args.lr, args.data_dir, args.clip) == (0.3, "other", 3)


def test_options_belong_to_one_command(tmp_path, monkeypatch):
    (tmp_path / "one").mkdir()
    settings.save_args(load_args({"lr": 0.3, "boxes": "haar", "dump_pseudo": 64, "device": "cpu",
                                  "report": "a.json", "flip_test": True}),
                       tmp_path / "one" / "args.yaml")
    assert "boxes" not in (tmp_path / "one" / "args.yaml").read_text()
    monkeypatch.setattr("utils.experiment.WEIGHTS", tmp_path)
    seen = []
    for name in ("test", "export", "dump_pseudo"):
        monkeypatch.setattr(main, name, lambda args, *_: seen.append(args))
    main.dispatch(parse(["--test", "--exp", "one", "--by-pose"]))
    (args,) = seen
    assert (args.lr, args.device, args.by_pose, args.exp) == (0.3, "cpu", True, "one")
    assert (args.boxes, args.dump_pseudo, args.report, args.flip_test) == ("none", 0, "none", False)


def test_an_option_in_a_file_is_refused_but_in_one_of_an_earlier_version(tmp_path, monkeypatch):
    (tmp_path / "one").mkdir()
    path = tmp_path / "one" / "args.yaml"
    path.write_text("lr: 0.3\nboxes: haar\ndata: samples\ndata_dir: 300W\ndetect_every: 10\n")
    with pytest.raises(UserError, match="boxes is no setting but a flag of one command: .*--boxes"):
        parse(["--train", "--args", str(path)])
    monkeypatch.setattr("utils.experiment.WEIGHTS", tmp_path)
    args = experiment_settings(parse(["--resume", "--exp", "one"]))
    assert (args.lr, args.boxes, args.data_dir) == (0.3, "none", "samples")
    assert not hasattr(args, "detect_every")


def test_resume_with_another_action_also_trains():
    assert parse(["--resume", "--test", "--exp", "one"]).actions == {"resume", "train", "test"}


@pytest.mark.parametrize("action", ["--fit-eyes", "--fit-shape", "--export", "--int8"])
def test_actions_that_write_files_of_a_model_need_its_name(action):
    with pytest.raises(UserError, match="say which model with --exp"):
        parse([action, "--data-dir", "faces"])
    assert parse([action, "--exp", "x.pt"]).args.exp == "x.pt"
    assert "train" in parse([action, "--train"]).actions


def test_saved_args_are_read_back(tmp_path):
    args = load_args({"lr": 0.3, "scheme": "eyes", "flip": 0, "exp": "007"})
    settings.save_args(args, tmp_path / "args.yaml")
    assert vars(load_args(path=tmp_path / "args.yaml")) == vars(args)


def test_a_checkpoint_stores_what_is_trained_and_not_where():
    stored = settings.training_settings(load_args({"device": "cpu", "report": "a.json"}))
    assert {"data_dir", "backbone", "lr", "seed", "gssl"} <= set(stored)
    assert not {"exp", "device", "workers", "cache", "tensorboard", "report"} & set(stored)


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
    ("--train --opset 9", "--opset: must be 11 to 20, found 9"),
    ("--train --data-dir x --data samples", "give one of them"),
    ("--train --data faces", "--data: must be one of samples, none, found faces"),
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
    ("gssl: 1", "gssl: expected bool"),
    ("flip_test: true", "flip_test is no setting but a flag of one command: type --flip-test"),
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


def test_the_old_spelling_of_drawn_faces(tmp_path):
    assert parse(["--train", "--data", "samples"]).args.data_dir == "samples"
    path = tmp_path / "mine.yaml"
    path.write_text("data: samples")
    assert parse(["--train", "--args", str(path)]).args.data_dir == "samples"
    assert parse(["--train", "--args", str(path), "--data-dir", "x"]).args.data_dir == "x"
    path.write_text("data: none")
    assert parse(["--train", "--args", str(path)]).args.data_dir == load_args().data_dir


def test_resume_alone_trains():
    assert parse(["--resume", "--exp", "007"]).actions == {"resume", "train"}


def test_help_is_grouped_and_quick():
    result = subprocess.run([sys.executable, "main.py", "--help"], cwd=ROOT, text=True,
                            capture_output=True)
    assert result.returncode == 0
    assert not result.stderr
    for part in ("Data", "Model", "Loss", "Training", "Augmentation", "Options of the test", "Run",
                 "Actions", "--num-nb", "--test-onnx", "(l1, smooth_l1, wing)"):
        assert part in result.stdout
    # It takes half a second; imports of torch would take ten times as long.
    loaded = subprocess.run(
        [sys.executable, "-X", "importtime", "main.py", "--help"], cwd=ROOT, text=True,
        capture_output=True).stderr
    assert not {"torch", "cv2", "numpy", "timm"} & {line.split("|")[-1].strip()
                                                    for line in loaded.splitlines()}
