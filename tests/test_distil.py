"""Distillation: labels move towards teachers of any input size and scheme."""
import pytest
import torch

from utils import checkpoint, experiment
from utils.args import load_args
from utils.errors import UserError
from utils.landmarks import eyelids
from utils.landmarks.schemes import SCHEMES, get_scheme
from utils.training import distil, trainer


def test_labels_move_towards_the_teacher(tiny_weights):
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    labels = torch.rand(2, 68, 2)
    seen, _ = checkpoint.load_model(tiny_weights).predict(images)
    for share in (0.0, 0.25, 1.0):
        moved = distil.Teacher(str(tiny_weights), SCHEMES["300W"], share)(images, labels)
        torch.testing.assert_close(moved, (1 - share) * labels + share * seen, atol=1e-5, rtol=0)
        assert not moved.requires_grad


def test_unknown_landmarks_stay_unknown(tiny_weights):
    images = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    labels = torch.full((1, 68, 2), torch.nan)
    assert distil.Teacher(str(tiny_weights), SCHEMES["300W"], 0.5)(images, labels).isnan().all()


def test_eyes_that_are_labelled_closed_do_not_move(tiny_weights):
    scheme = SCHEMES["300W"]
    points = torch.from_numpy(scheme.mean_face).float()
    shut = points.clone()
    shut[36:42] = torch.from_numpy(eyelids.close(scheme.mean_face, scheme)).float()[36:42]
    labels = torch.stack([points, shut])
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    moved = distil.Teacher(str(tiny_weights), scheme, 0.5)(images, labels) != labels
    assert not moved[1, 36:42].any()
    assert moved[1, :36].any(1).all()
    assert moved[1, 42:].any(1).all()
    assert moved[0].any(1).all()


def test_a_teacher_of_another_input_size(tiny_weights):
    teacher, seen = distil.Teacher(str(tiny_weights), SCHEMES["300W"], 1.0), []

    class Model:
        input_size = 32

        def predict(self, images):
            seen.append(images)
            return torch.zeros(1, 68, 2), None

    teacher.models = [Model()]
    teacher(torch.arange(256).view(1, 1, 16, 16).repeat(1, 3, 4, 4).byte(), torch.ones(1, 68, 2))
    teacher(torch.full((1, 3, 32, 32), 7, dtype=torch.uint8), torch.ones(1, 68, 2))
    assert [tuple(images.shape) for images in seen] == [(1, 3, 32, 32)] * 2
    # Pixels stay in 0..255; each is about the mean of four.
    assert abs(float(seen[0][0, 0, 4, 4]) - (136 + 137 + 152 + 153) / 4) < 3
    assert seen[1].unique().tolist() == [7]


def test_a_shipped_teacher_sees_images_of_another_size(tiny_weights):
    teacher = distil.Teacher(str(tiny_weights), SCHEMES["300W"], 1.0)
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    own = teacher.models[0].input_size
    for size in (own + 32, own):
        resized = torch.nn.functional.interpolate(images.float(), (size, size)).byte()
        moved = teacher(resized, torch.zeros(2, 68, 2))
        assert moved.shape == (2, 68, 2)
        assert moved.isfinite().all()


def test_a_student_of_a_subset_of_the_landmarks(tiny_weights):
    images = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    eyes = get_scheme("eyes", SCHEMES["300W"])
    whole = distil.Teacher(str(tiny_weights), SCHEMES["300W"], 1.0)(images, torch.zeros(1, 68, 2))
    part = distil.Teacher(str(tiny_weights), eyes, 1.0)(images, torch.zeros(1, 12, 2))
    torch.testing.assert_close(part, whole[:, 36:48])
    with pytest.raises(UserError, match="teacher: .*has the 300W scheme .68 points.*WFLW"):
        distil.Teacher(str(tiny_weights), SCHEMES["WFLW"], 1.0)


def test_several_teachers_teach_their_mean(tiny_weights, tmp_path):
    state = checkpoint.read(tiny_weights)
    other = tmp_path / "other.pt"
    checkpoint.save({**state, "weights": {
        k: v + 0.05 * torch.rand_like(v) if k.startswith("head") else v
        for k, v in checkpoint.weights_of(state).items()}}, other)
    images, labels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8), torch.rand(2, 68, 2)
    scheme = SCHEMES["300W"]
    first, second, both = (distil.Teacher(setting, scheme, 0.5)(images, labels) for setting in (
        str(tiny_weights), str(other), f"{tiny_weights},{other}"))
    assert (first - second).abs().max() > 0.01
    torch.testing.assert_close(both, (first + second) / 2)


def test_training_with_a_teacher(tiny_weights, drawn_set, weights):
    losses = []
    for name, teacher in (("alone", "none"), ("taught", str(tiny_weights))):
        folder = trainer.train(load_args({
            "exp": name, "data_dir": str(drawn_set), "backbone": "mobilenetv3_small_050",
            "input_size": 64, "epochs": 1, "batch_size": 8, "effective_batch": 8, "workers": 0,
            "device": "cpu", "teacher": teacher, "teacher_share": 1.0}))
        losses.append(experiment.read_epochs(folder)[-1]["loss"])
    # The teacher is untrained, so its predictions are far from the labels.
    assert abs(losses[1] - losses[0]) > 0.02 * losses[0]
