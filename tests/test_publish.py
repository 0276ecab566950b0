"""Published weights and their model cards."""
import shutil

import numpy
import pytest
import torch

from utils import checkpoint
from utils.deploy import publish
from utils.errors import UserError
from utils.predictor import Predictor


def test_published_weights_are_small_anonymous_and_score_as_their_onnx(tiny_weights, tmp_path):
    target = tmp_path / "fast.pt"
    publish.publish(tiny_weights, target)
    state = checkpoint.read(target)
    assert set(state) >= {"weights", "scheme", "crop", "args"}
    assert "optimizer" not in state
    floats = [v for v in state["weights"].values() if v.is_floating_point()]
    assert floats
    assert all(v.dtype == torch.float16 for v in floats)
    assert "/" not in state["args"]["data_dir"]
    assert not {"exp", "device", "report"} & set(state["args"])
    images = numpy.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), numpy.uint8)
    ours, onnx = Predictor(target), Predictor(target.with_suffix(".onnx"))
    for first, second in zip(ours(images), onnx(images)):
        numpy.testing.assert_allclose(first, second, atol=1e-4)
    assert onnx.crop == ours.crop
    assert onnx.input_size == 64
    assert (onnx.scheme.flip == ours.scheme.flip).all()


def test_kernels_in_eight_bits_halve_the_file_and_keep_the_score(tiny_weights, tmp_path):
    halves, small = tmp_path / "halves.pt", tmp_path / "small.pt"
    publish.publish(tiny_weights, halves)
    publish.publish(tiny_weights, small, bits=8)
    trained, kept = (checkpoint.weights_of(checkpoint.read(path)) for path in (tiny_weights, small))
    stored = checkpoint.read(small)["weights"]
    kernels = [name for name, value in stored.items() if isinstance(value, tuple)]
    assert kernels
    assert all(name.startswith("backbone.") for name in kernels)
    numbers = sum(trained[name].numel() for name in kernels)
    for suffix in (".pt", ".onnx"):
        large, less = (path.with_suffix(suffix).stat().st_size for path in (halves, small))
        assert large - less > 0.8 * numbers
    for name in kernels:
        largest = trained[name].abs().flatten(1).amax(1).max()
        assert (trained[name] - kept[name]).abs().max() <= largest / 127 / 2 * 1.001
    images = numpy.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), numpy.uint8)
    ours, onnx = Predictor(small), Predictor(small.with_suffix(".onnx"))
    for first, second in zip(ours(images), onnx(images)):
        numpy.testing.assert_allclose(first, second, atol=1e-4)
    assert numpy.abs(ours(images)[0] - Predictor(halves)(images)[0]).mean() < 0.01


def test_fitting_a_head_keeps_kernels_in_eight_bits(tiny_weights, tmp_path):
    path, again = tmp_path / "small.pt", tmp_path / "again.pt"
    publish.publish(tiny_weights, path, with_onnx=False, bits=8)
    state = checkpoint.read(path)
    fitted = checkpoint.with_head(state, "shape", torch.nn.Linear(136, 136))
    assert fitted["weights"]["shape.weight"].shape == (136, 136)
    for name, value in state["weights"].items():
        assert fitted["weights"][name] is value
    # Publishing again changes no number.
    publish.publish(path, again, with_onnx=False, bits=8)
    first, second = (checkpoint.weights_of(checkpoint.read(p)) for p in (path, again))
    assert all(torch.equal(first[name], second[name]) for name in first)
    model = checkpoint.load_model(tiny_weights)
    assert not checkpoint.load_pretrained(model, path)
    torch.testing.assert_close(dict(model.state_dict()), {
        name: value.to(model.state_dict()[name].dtype) for name, value in first.items()})


def test_a_published_model_keeps_its_flip_test(tiny_weights, tmp_path):
    first, second = tmp_path / "one.pt", tmp_path / "two.pt"
    publish.publish(tiny_weights, first, with_onnx=False, flip_test=True)
    publish.publish(first, second, with_onnx=False)
    assert checkpoint.load_model(second).flip_test
    assert not checkpoint.load_model(tiny_weights).flip_test


def test_the_card_has_the_training_commands(tiny_weights, tmp_path):
    second = tmp_path / "weights" / "second"
    second.mkdir(parents=True)
    state = checkpoint.read(tiny_weights)
    state["args"] = {**state["args"], "pretrained": str(tiny_weights), "epochs": 7,
                     "gssl_epochs": 20, "data_dir": "/somewhere/300W-64"}
    checkpoint.save(state, second / "best.pt")
    lineage = publish.lineage(second / "best.pt")
    first, last = map(publish.training_command, lineage)
    assert "--exp tiny" in first
    assert "--backbone mobilenetv3_small_050" in first
    assert "--exp second" in last
    assert "--epochs 7" in last
    assert "--pretrained weights/tiny/best.pt" in last
    assert "somewhere" not in last
    assert "--input-size 64" in last
    # Without unlabelled faces, the settings of self-training do not matter.
    assert "gssl" not in last
    numbers = {"faces": 8, "nme": 50.0, "fr8": 100.0, "auc8": 0.0, "fr10": 100.0, "auc10": 0.0,
               "nme_crop": 51.0}
    text = publish.model_card(lineage, {"pytorch": {"test": numbers}}, "fast", [first, last], 600.0)
    assert "trained from random weights" in text
    assert last in text
    assert "| test | 8 | 50.000 |" in text
    assert "10 minutes" in text
    shutil.rmtree(second)


def test_the_card_has_teachers_and_unlabelled_faces(tiny_weights, tmp_path):
    state = checkpoint.read(tiny_weights)

    def stage(name, **args):
        path = tmp_path / "weights" / name / "best.pt"
        path.parent.mkdir(parents=True)
        checkpoint.save({**state, "epoch": 5, "args": {**state["args"], **args}}, path)
        return path

    large = stage("large", backbone="resnet18", pretrained=str(stage("larger")))
    begun = stage("begun")
    taught = stage("taught", pretrained=str(begun), teacher=f"{large}, {stage('second')}")
    found = stage("found", pretrained=str(taught), teacher=str(large), gssl=True, epochs=3,
                  gssl_rounds=2, gssl_epochs=4, unlabelled_dir="/somewhere/lfw-64")
    lineage = publish.lineage(found)
    assert [p.parent.name for p in lineage] == [
        "begun", "larger", "large", "second", "taught", "found"]
    taught_command = publish.training_command(taught)
    assert "--teacher weights/large/best.pt,weights/second/best.pt" in taught_command
    last = publish.training_command(found)
    assert "--teacher weights/large/best.pt" in last
    assert "--gssl --unlabelled-dir lfw " in last
    assert "--gssl-rounds 2 --gssl-epochs 4" in last
    assert "somewhere" not in last
    text = publish.model_card(lineage, {"pytorch": {}}, "fast", [last], 600.0)
    assert "and lfw without landmarks; epoch 5 of 11 was best" in text
    publish.publish(found, tmp_path / "fast.pt", with_onnx=False)
    shipped = checkpoint.read(tmp_path / "fast.pt")
    assert shipped["args"]["unlabelled_dir"] == "lfw"
    assert "lfw" in shipped["sets"]
    assert publish.sets_in(["x --data-dir 300W+eyes --unlabelled-dir lfw -y"]) == [
        "300W", "eyes", "lfw"]


def test_the_card_of_a_recipe_names_it_and_what_was_typed(tiny_weights, tmp_path, monkeypatch):
    monkeypatch.setattr("utils.training.recipe.ROOT", tmp_path)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "trial.yaml").write_text(
        "backbone: mobilenetv3_small_050\nepochs: 9\nstages:\n- {name: a, input_size: 64}\n"
        "- {name: b, input_size: 64, epochs: 3, flip: 0.0, teacher: weights/other.pt}\n")
    state = checkpoint.read(tiny_weights)
    path = tmp_path / "weights" / "one" / "best.pt"
    path.parent.mkdir(parents=True)
    args = {**state["args"], "recipe": "recipes/trial.yaml", "epochs": 3, "flip": 0.0,
            "teacher": "weights/other.pt", "data_dir": "300W", "lr": 0.5}
    checkpoint.save({**state, "epoch": 11, "args": args}, path)
    (path.parent / "results.csv").write_text(
        "epoch,lr,loss,val_nme,seconds,stage\n12,0.1,1,3,120,b\n")
    assert publish.lineage(path) == [path]
    commands, seconds = publish.training_commands([path])
    assert commands == ["bash main.sh 1 --train --recipe recipes/trial.yaml --lr 0.5"]
    assert seconds == 120
    text = publish.model_card([path], {"pytorch": {}}, "fast", commands, seconds)
    assert "epoch 11 of 12 was best" in text
    assert "trained from random weights, by the command below" in text


def test_the_card_of_weights_trained_from_published_ones_has_all_commands(tiny_weights, tmp_path):
    """The card of the published weights has the commands of their training."""
    shipped, state = tmp_path / "fast.pt", checkpoint.read(tiny_weights)
    checkpoint.save(state, shipped)
    later = tmp_path / "weights" / "later" / "best.pt"
    later.parent.mkdir(parents=True)
    checkpoint.save({**state, "args": {**state["args"], "pretrained": str(shipped)}}, later)
    (later.parent / "results.csv").write_text(
        "epoch,lr,loss,val_nme,seconds,round\n1,0.1,1,3,120,0\n")
    lineage = publish.lineage(later)
    with pytest.raises(UserError, match="fast.md: is not the model card"):
        publish.training_commands(lineage)
    shipped.with_suffix(".md").write_text(
        "* trained from dust, by the commands below\n* training time: 30 minutes in all\n"
        "bash main.sh 1 --train --exp one\nbash main.sh 1 --train --exp two\n")
    commands, seconds = publish.training_commands(lineage)
    assert [command.split()[5] for command in commands] == ["one", "two", "later"]
    assert "--pretrained weights/two/best.pt" in commands[-1]
    assert seconds == 32 * 60
    text = publish.model_card(lineage, {"pytorch": {}}, "fast", commands, seconds, ["mean of two"])
    assert "trained from dust" in text
    assert "32 minutes" in text
    assert "* mean of two" in text


def test_published_weights_can_be_an_average(tiny_weights, tmp_path):
    state = checkpoint.read(tiny_weights)
    other = {**state, "weights": {k: v + 1 if v.is_floating_point() else v
                                  for k, v in checkpoint.weights_of(state).items()}}
    checkpoint.save(other, tmp_path / "other.pt")
    publish.publish(tiny_weights, tmp_path / "mean.pt", False, tmp_path / "other.pt", 0.25)
    for name, value in checkpoint.weights_of(checkpoint.read(tmp_path / "mean.pt")).items():
        if value.is_floating_point():
            want = checkpoint.weights_of(state)[name].float() + 0.25
            assert torch.allclose(value.float(), want, atol=1e-2, rtol=1e-2), name
    checkpoint.save({**other, "weights": {}}, tmp_path / "other.pt")
    with pytest.raises(UserError, match="another network"):
        publish.publish(tiny_weights, tmp_path / "mean.pt", False, tmp_path / "other.pt", 0.25)
