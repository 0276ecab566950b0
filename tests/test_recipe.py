"""Recipes: files, stages, what follows them, resumed trainings, and mistakes told before any."""
import signal
import sys

import pytest
import torch
import yaml
from conftest import ROOT
from helpers import warm as warm_module
from helpers.halt import Halt

import main
from utils import args as settings
from utils import checkpoint, experiment, plots
from utils.args import SETTINGS, load_args, parse
from utils.errors import UserError
from utils.training import recipe, stages, trainer
from utils.training.settings import experiment_settings, requested_settings

SETTINGS_OF_ALL = {"backbone": "mobilenetv3_small_050", "stride": 16, "input_size": 64,
                   "device": "cpu", "workers": 0, "batch_size": 8, "effective_batch": 8,
                   "num_nb": 3, "precision": "fp32", "warmup_epochs": 0.5}
STAGES = [{"name": "small", "epochs": 2, "input_size": 32},
          {"name": "side", "epochs": 1, "lr": 0.0005, "flip": 0.0}]


def _parsed(path, *flags):
    return requested_settings(parse(["--train", "--recipe", str(path), *flags]))


def _write(path, **values):
    path.write_text(yaml.safe_dump(values))
    return path


def _args(drawn_set, exp, **more):
    args = load_args({**SETTINGS_OF_ALL, "data_dir": str(drawn_set), "exp": exp, **more})
    return recipe.Recipe({}, [dict(stage) for stage in STAGES], {}).apply(args, ())


def _same(one, other):
    assert one.keys() == other.keys()
    for key, value in one.items():
        if isinstance(value, dict):
            _same(value, other[key])
        elif isinstance(value, torch.Tensor):
            assert torch.equal(value, other[key]), key
        elif key != "seconds":
            assert value == other[key], key


@pytest.fixture(scope="module")
def whole(drawn_set, tmp_path_factory):
    """The folder of a training of both stages."""
    patch = pytest.MonkeyPatch()
    folder = tmp_path_factory.mktemp("recipe")
    for function in (experiment.new_experiment, experiment.find_experiment):
        patch.setattr(function, "__defaults__", (*function.__defaults__[:-1], folder))
    yield trainer.train(_args(drawn_set, "whole"))
    patch.undo()


def test_stages_are_one_experiment(whole):
    rows = experiment.read_epochs(whole)
    assert [(row["epoch"], row["stage"]) for row in rows] == [
        (1, "small"), (2, "small"), (3, "side")]
    for name in ("best.pt", "best-small.pt", "last-small.pt", "best-side.pt", "last-side.pt",
                 "best.pt", "last.pt", "curves.png", "recipe.yaml"):
        assert (whole / name).is_file()
    assert checkpoint.load_model(whole / "best.pt").input_size == 64
    assert checkpoint.load_model(whole / "best-small.pt").input_size == 32
    assert recipe.read_recipe(whole / "recipe.yaml").stages == STAGES


def test_a_stage_is_the_training_that_its_settings_describe(drawn_set, whole, weights):
    first = trainer.train(load_args({**SETTINGS_OF_ALL, "data_dir": str(drawn_set), "exp": "first",
                                     "epochs": 2, "input_size": 32}))
    _same(checkpoint.read(first / "best.pt")["weights"],
          checkpoint.read(whole / "best-small.pt")["weights"])
    second = trainer.train(load_args({
        **SETTINGS_OF_ALL, "data_dir": str(drawn_set), "exp": "second", "epochs": 1, "lr": 0.0005,
        "flip": 0.0, "pretrained": str(whole / "best-small.pt"), "seed": stages.SEED_STEP}))
    _same(checkpoint.read(second / "best.pt")["weights"],
          checkpoint.read(whole / "best.pt")["weights"])


def test_a_recipe_resumes_to_the_bit_within_and_between_stages(drawn_set, whole, weights,
                                                               monkeypatch, capsys):
    monkeypatch.setattr(plots, "plot_curves", lambda folder: None)
    args = _args(drawn_set, "parts")
    # Stopped in the first epoch (5 steps), at the end of the first stage, and in the second.
    for after, message in ((2, ""), (6, "small goes on at epoch 1, step 4"),
                           (1, "small all epochs are done")):
        assert trainer.train(args, bool(message), Halt(after)) is None
        assert message in capsys.readouterr().out
    # As --resume does: the stages are those of the experiment's own file.
    request = parse(["--resume", "--exp", "parts"])
    monkeypatch.setattr(experiment, "WEIGHTS", weights)
    resumed = trainer.train(experiment_settings(request), True)
    assert "side goes on at epoch 1, step" in capsys.readouterr().out
    for name in ("last.pt", "best.pt", "best-small.pt", "last-side.pt"):
        _same({k: v for k, v in checkpoint.read(whole / name).items() if k != "cache"},
              {k: v for k, v in checkpoint.read(resumed / name).items() if k != "cache"})
    assert [row | {"seconds": 0} for row in experiment.read_epochs(resumed)] == [
        row | {"seconds": 0} for row in experiment.read_epochs(whole)]


def test_self_training_is_a_stage(tmp_path):
    args = load_args({"input_size": 64, "stride": 16, "unlabelled_dir": "faces", "gssl_rounds": 2,
                      "gssl_epochs": 3})
    found = stages.plan(recipe.Recipe({}, [
        {"name": "a", "epochs": 4}, {"name": "b", "epochs": 2, "gssl": True},
        {"name": "c", "epochs": 5, "flip": 0.0}], {}).apply(args, ()))
    assert [(s.number, s.name, s.epochs, s.first_epoch, s.start, s.task) for s in found] == [
        (0, "a", 4, 0, "pretrained", "supervised"), (1, "b", 2, 4, "best", "supervised"),
        (2, "b-round-1", 3, 6, "state", "std"), (3, "b-round-2", 3, 9, "state", "std"),
        (4, "c", 5, 12, "best", "supervised")]
    assert [s.settings.flip for s in found] == [0.5] * 4 + [0.0]


def test_flags_win_over_settings_and_over_every_stage(tmp_path):
    path = _write(tmp_path / "r.yaml", epochs=5, lr=0.1, stages=[
        {"name": "a", "epochs": 7}, {"name": "b", "lr": 0.2}])
    args = _parsed(path)
    assert [(s.epochs, s.settings.lr) for s in stages.plan(args)] == [(7, 0.1), (5, 0.2)]
    args = _parsed(path, "--epochs", "1", "--lr", "0.3")
    assert [(s.epochs, s.settings.lr) for s in stages.plan(args)] == [(1, 0.3), (1, 0.3)]


def test_what_follows_a_training(tmp_path, monkeypatch, drawn_set):
    path = _write(tmp_path / "r.yaml", after={
        "fit_eyes": {"data_dir": str(drawn_set), "device": "cpu"}, "test": True, "raw": False})
    monkeypatch.setattr("utils.experiment.WEIGHTS", tmp_path)
    done = []
    (tmp_path / "one").mkdir()
    def train(args, *_):
        settings.save_args(args, tmp_path / "one" / "args.yaml")
        recipe.recipe_of(args).save(tmp_path / "one")
        return tmp_path / "one"

    monkeypatch.setattr(trainer, "train", train)
    monkeypatch.setattr(main, "export", lambda args, actions: done.append("export"))
    for name in ("utils.training.shape_fit", "utils.training.lid_fit"):
        monkeypatch.setattr(sys.modules.get(name) or __import__(name, fromlist=["x"]),
                            "fit_weights", lambda args: done.append(("fit", args.data_dir)))
    monkeypatch.setattr(main, "test", lambda args, actions, typed: done.append(
        ("test", args.data_dir)))
    main.dispatch(parse(["--train", "--recipe", str(path), "--data-dir", "faces"]))
    assert done == [("fit", str(drawn_set)), "export", ("test", "faces")]


@pytest.mark.parametrize(("content", "message"), [
    ("lrr: 1", "r.yaml: lrr: unknown key; nearest: lr"),
    ("lr: fast", "r.yaml: lr: expected float, found 'fast'"),
    ("stages: small", "r.yaml: stages: expected a list"),
    ("stages: [{name: a, epoch: 3}]", "r.yaml: stage a: epoch: unknown key; nearest: epochs"),
    ("stages: [{name: a/b}]", "r.yaml: stage 1: a name has letters"),
    ("stages: [{name: a, backbone: irnet18}]", "stage a: backbone: is the same in all stages"),
    ("stages: [{name: a}, {name: a}]", "r.yaml: stages: two are called a"),
    ("after: {sleep: true}", "r.yaml: after: unknown action sleep; there are export"),
    ("after: {test: {boxen: haar}}", "after: test: boxen: unknown key"),
    ("recipe: other.yaml", "recipe: has no meaning here"), ("test: true", "no meaning here"),
    ("[1, 2]", "expected lines of the form key: value"), ("lr: 1\nlr: 2", "key lr is there twice")])
def test_wrong_recipes_are_one_line(tmp_path, content, message):
    (tmp_path / "r.yaml").write_text(content)
    with pytest.raises(UserError) as error:
        _parsed(tmp_path / "r.yaml")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("changes", "message"), [
    ({"teacher": "weights/none.pt"}, "stage side: weights/none.pt: no such file"),
    ({"pretrained": "weights/none.pt"}, "stage side: weights/none.pt: no such file"),
    ({"input_size": 70}, "stage side: "), ({"data_dir": "nowhere"}, "stage side: nowhere: ")])
def test_a_stage_that_would_fail_is_told_before_the_first(drawn_set, weights, changes, message):
    args = _args(drawn_set, "never")
    args.stages[1].update(changes)
    with pytest.raises(UserError) as error:
        trainer.train(args)
    assert message in str(error.value)
    assert not (weights / "never").exists()


@pytest.mark.parametrize(("changes", "message"), [
    ({"data_dir": "nowhere"}, "nowhere: no such file or folder, which fit_eyes after"),
    ({"names": "list.txt:choose"}, "list.txt: no such file or folder, which fit_eyes after"),
    ({"boxes": "face.onnx"}, "face.onnx")])
def test_what_follows_is_checked_before_the_first_stage(drawn_set, weights, changes, message):
    args = _args(drawn_set, "never")
    args.after = {"fit_eyes": changes}
    with pytest.raises(UserError, match=message):
        trainer.train(args)
    assert not (weights / "never").exists()


def test_a_recipe_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"--recipe fats: no such file; there are .*quickstart"):
        _parsed("fats")
    assert _parsed("quickstart").data_dir == "samples"


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_the_recipes_of_the_repository(path):
    args = _parsed(path)
    shipped = load_args()
    found = recipe.read_recipe(path)
    same = [k for k, v in found.settings.items() if v == getattr(shipped, k)]
    assert not same, f"{path.name} repeats args.yaml: {same}"
    for stage in stages.plan(args):
        assert set(vars(stage.settings)) >= set(SETTINGS)
        assert stage.settings.input_size % stage.settings.stride == 0
    assert path.read_text(encoding="utf-8").startswith("# ")


@pytest.fixture(scope="module")
def commands():
    """Runs of the command line, with a recipe of two stages of three epochs."""
    warm = warm_module.warm()
    path = _write(warm.tree.parent / "two.yaml", stages=[
        {"name": "a"}, {"name": "b", "flip": 0.0, "lr": 0.0005}])
    return warm, ["--train", *warm.flags, "--recipe", path]


def test_kills_within_and_between_stages_change_nothing(commands):
    warm, flags = commands
    alone = warm.run(*flags, "--exp", "recipe-alone")
    assert alone.code == 0, alone.text
    # Killed in the first stage, while its best weights are kept, and in the second one.
    begin = flags
    for hook in ("step:7", "renamed:7", "step:3"):
        child = warm.run(*begin, "--exp", "recipe-killed", "--save-minutes", 0, hook=hook)
        assert child.code == -signal.SIGKILL, (hook, child.text)
        begin = ["--resume"]
    child = warm.run("--resume", "--exp", "recipe-killed")
    assert child.code == 0, child.text
    for name in ("last.pt", "best.pt", "best-a.pt", "last-b.pt"):
        _same(*({k: v for k, v in checkpoint.read(warm.folder(exp) / name).items() if k != "cache"}
                for exp in ("recipe-alone", "recipe-killed")))


def test_two_processes_train_a_recipe(commands):
    warm, flags = commands
    for child in warm.ranks(2, *flags, "--exp", "recipe-two"):
        assert child.code == 0, child.text
    folder = warm.folder("recipe-two")
    assert [row["stage"] for row in experiment.read_epochs(folder)] == 3 * ["a"] + 3 * ["b"]
    assert (folder / "best-b.pt").is_file()
    # A process alone goes on with a training of two, with as many faces a step.
    for child in warm.ranks(2, *flags, "--exp", "recipe-fewer", "--save-minutes", 0,
                            hook="step:19"):
        assert child.code != 0
    child = warm.run("--resume", "--exp", "recipe-fewer")
    assert child.code == 0, child.text
    assert "resume: recipe-fewer: b goes on at" in child.text
