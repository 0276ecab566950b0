"""Prepared sets, their lists, samples and the order of an epoch."""
import time

import cv2
import numpy
import pytest
import torch
from helpers import small_sets

from utils.args import load_args
from utils.data import dataset, face_list
from utils.data.augment import Augment
from utils.data.dataset import EpochSampler, FaceDataset, PreparedSet
from utils.errors import UserError
from utils.landmarks import crop
from utils.landmarks.schemes import SCHEMES


def write_list(folder, *lines):
    path = folder / "train.txt"
    path.write_text("\n".join(lines) + "\n")
    return path


def line(name, points=68):
    return f"{name} " + " ".join(["0.25 -0.5"] * points)


def test_a_list(tmp_path):
    path = write_list(tmp_path, line("a.png"), "", line("with two  blanks/7 8.png"))
    images, points = face_list.read_list(path)
    assert images == ["a.png", "with two blanks/7 8.png"]
    assert points.shape == (2, 68, 2)
    assert (points == [0.25, -0.5]).all()


def test_ten_thousand_lines_are_read_in_two_seconds(tmp_path):
    path = write_list(tmp_path, *[line(f"images/{i}.jpg", 100) for i in range(10000)])
    start = time.process_time()
    images, points = face_list.read_list(path)
    assert time.process_time() - start < 2
    assert points.shape == (10000, 100, 2)
    assert images[-1] == "images/9999.jpg"


@pytest.mark.parametrize("bad", [
    "b.png", line("b.png", 67), line("b.png") + " 0.5", line("b.png").replace("0.25", "nan", 1),
    line("b.png").replace("0.25", "inf", 1), line("b.png").replace("0.25", "0,25", 1),
    line("").strip(), "just some words"])
def test_the_error_names_a_bad_line(tmp_path, bad):
    path = write_list(tmp_path, line("a.png"), bad)
    with pytest.raises(UserError, match=r"train\.txt:2: expected an image path and 136 numbers"):
        face_list.read_list(path)


@pytest.mark.parametrize("bad", ["a.png", "a.png 1", "a.png 1 2 3", "1 2", "a.png nan nan"])
def test_a_bad_first_line(tmp_path, bad):
    with pytest.raises(UserError, match=r"train\.txt:1: "):
        face_list.read_list(write_list(tmp_path, bad))


def test_an_empty_list(tmp_path):
    (tmp_path / "train.txt").write_text("\n \n")
    with pytest.raises(UserError, match="the list is empty"):
        PreparedSet(tmp_path)


def test_the_error_without_a_set_has_the_command(tmp_path):
    with pytest.raises(UserError, match=r"util\.DataGenerator\(data_dir=") as caught:
        PreparedSet(tmp_path / "300W")
    assert "300W" in str(caught.value)


def test_lists_of_different_schemes(tmp_path):
    write_list(tmp_path, line("a.png"))
    (tmp_path / "test.txt").write_text(line("a.png", 98) + "\n")
    with pytest.raises(UserError, match="98 points a face, scheme 300W has 68|68 points a face"):
        PreparedSet(tmp_path)


def test_an_unknown_number_of_points(tmp_path):
    write_list(tmp_path, line("a.png", 7))
    with pytest.raises(UserError, match="7 points a face.*set.yaml"):
        PreparedSet(tmp_path)


@pytest.mark.parametrize("text", ["[1]", "size: 64", "crop: [", "crop: square\nsize: 64\nmargin: 1",
                                  "crop: {rule: square, scale: 1.2}\nsize: big\nmargin: 1"])
def test_a_damaged_description(tmp_path, text):
    write_list(tmp_path, line("a.png"))
    (tmp_path / "set.yaml").write_text(text)
    with pytest.raises(UserError, match="set.yaml: .*prepare the set again"):
        PreparedSet(tmp_path)


def test_a_set_like_lmk(tmp_path):
    prepared = PreparedSet(small_sets.write_lmk(tmp_path / "LMK", 40, 4))
    assert prepared.scheme.name == "300W"
    assert prepared.margin == 1
    assert prepared.size is None
    assert prepared.crop == {"rule": "stretch", "scale": 1.1}
    assert len(prepared.lists["train"]) == 38
    assert len(prepared.lists["val"]) == 2
    assert not set(prepared.lists["train"].images) & set(prepared.lists["val"].images)
    again = PreparedSet(prepared.folder)
    assert again.lists["val"].images == prepared.lists["val"].images
    assert prepared.test_lists.keys() == {"test"}
    for faces in prepared.lists.values():
        assert all(path.is_file() and path.is_relative_to(tmp_path) for path in faces.images)
    assert cv2.imread(str(prepared.lists["train"].images[0])).shape[0] > 0
    image, landmarks, _, bad = FaceDataset(prepared.lists["test"], 1, 48)[2]
    assert image.shape == (48, 48, 3)
    assert bad == -1
    # The image is the stretched crop of the photo that the list's points are relative to.
    photo, points = small_sets.face(402)
    low = points.min(0)
    truth = prepared.lists["test"].points[2]
    scale = (points - low)[10] / (truth - truth.min(0))[10]
    box = numpy.concatenate([low - truth.min(0) * scale, low + (1 - truth.min(0)) * scale])
    expected = crop.cut(photo, box - 0.0, 48)
    assert numpy.abs(image.numpy().astype(int) - expected).mean() < 12
    numpy.testing.assert_allclose(landmarks, truth, atol=1e-6)


def test_neighbour_face(tmp_path):
    whole, eyes = SCHEMES["300W"], SCHEMES["eyes"]
    path = tmp_path / "mean.txt"
    path.write_text(" ".join(str(v) for v in whole.mean_face.flatten()))
    assert dataset.load_neighbour_face("data", eyes) is None
    for source in ("published", str(path)):
        for scheme in (whole, eyes, whole.subset(range(36, 48), "36-47")):
            numpy.testing.assert_allclose(dataset.load_neighbour_face(source, scheme),
                                          scheme.mean_face, atol=1e-9)
    custom = whole.subset(range(36, 48))
    custom = type(custom)("mine", custom.flip, custom.mean_face, None, {})
    with pytest.raises(UserError, match="published: there is none for the scheme mine"):
        dataset.load_neighbour_face("published", custom)
    with pytest.raises(UserError, match="68 points, scheme mine has 12"):
        dataset.load_neighbour_face(str(path), custom)
    with pytest.raises(UserError, match="no mean face"):
        dataset.load_neighbour_face(str(tmp_path / "none.txt"), whole)
    path.write_text("1 2 3")
    with pytest.raises(UserError, match="3 numbers, expected finite x y pairs"):
        dataset.load_neighbour_face(str(path), whole)


@pytest.fixture(scope="module")
def prepared(drawn_set):
    return PreparedSet(drawn_set)


def test_plain_samples(prepared):
    faces = prepared.lists["test"]
    samples = FaceDataset(faces, prepared.margin, 64, indices=range(36, 48))
    image, landmarks, index, bad = samples[3]
    assert image.dtype == torch.uint8
    assert image.shape == (64, 64, 3)
    assert (index, bad) == (3, -1)
    numpy.testing.assert_allclose(landmarks, faces.points[3, 36:48], atol=1e-6)


def test_an_unreadable_image_is_replaced_and_reported(prepared, tmp_path):
    faces = prepared.lists["test"].select([0, 1, 2])
    faces.images[1] = tmp_path / "missing.jpg"
    samples = FaceDataset(faces, prepared.margin, 64)
    image, landmarks, index, bad = samples[1]
    assert (index, bad) == (2, 1)
    assert (image == samples[2][0]).all()
    faces.images[:] = [tmp_path / "missing.jpg"] * 3
    with pytest.raises(UserError, match="missing.jpg"):
        samples[0]


def test_augmentation_follows_from_seed_epoch_and_index(prepared):
    faces = prepared.lists["train"]
    augmentation = Augment(load_args({"occlusion": 1, "blur": 1}), prepared.scheme.flip)

    def batches(workers, seed=0, epoch=3):
        samples = FaceDataset(faces, prepared.margin, 64, None, augmentation, seed)
        sampler = EpochSampler(len(faces), 4, seed=seed)
        sampler.set_epoch(epoch)
        loader = torch.utils.data.DataLoader(samples, batch_sampler=sampler, num_workers=workers)
        return [batch[:3] for batch in loader]

    alone, two = batches(0), batches(2)
    assert len(alone) == len(two) == len(faces) // 4
    for one, other in zip(alone, two):
        assert all(torch.equal(a, b) for a, b in zip(one, other))
    samples = FaceDataset(faces, prepared.margin, 64, None, augmentation, 0)
    assert torch.equal(samples[3, 5][0], samples[3, 5][0])
    reseeded = FaceDataset(faces, prepared.margin, 64, None, augmentation, 1)
    for other in (samples[4, 5], reseeded[3, 5]):
        assert not torch.equal(samples[3, 5][0], other[0])


def steps(faces, batch, accumulate, world, start=0, epoch=2):
    """The sorted samples of all ranks per optimiser step, with checks of each micro-batch."""
    found = {}
    for rank in range(world):
        sampler = EpochSampler(faces, batch, accumulate, rank, world, seed=5)
        sampler.set_epoch(epoch, start)
        batches = list(sampler)
        assert len(batches) == len(sampler)
        for i, keys in enumerate(batches):
            assert len(keys) == batch
            assert all(e == epoch for e, _ in keys)
            found.setdefault(start + i // accumulate, []).extend(index for _, index in keys)
    return {step: sorted(indices) for step, indices in found.items()}


def test_a_step_has_the_same_faces_for_any_number_of_ranks():
    expected = steps(103, 16, 1, 1)
    assert len(expected) == 6
    for world, accumulate in ((1, 4), (2, 2), (4, 1), (2, 1)):
        assert steps(103, 16 // world // accumulate, accumulate, world) == expected
    every = [index for indices in expected.values() for index in indices]
    assert len(set(every)) == len(every) == 96


def test_a_resumed_epoch_continues_at_its_step():
    whole = steps(103, 4, 2, 2)
    assert steps(103, 4, 2, 2, start=4) == {s: v for s, v in whole.items() if s >= 4}


def test_epochs_differ_and_a_small_set_is_repeated():
    assert steps(103, 16, 1, 1, epoch=0) != steps(103, 16, 1, 1, epoch=1)
    assert {step: sorted(turn % 5 for turn in turns) for step, turns in steps(5, 4, 2, 2).items()
            } == {0: sorted([*range(5)] * 3 + [steps(5, 1, 1, 1)[0][0]])}


def test_a_repeated_face_is_augmented_differently(drawn_set):
    faces = PreparedSet(drawn_set).lists["train"].select([0, 1])
    augmentation = Augment(load_args(), SCHEMES["300W"].flip)
    data = FaceDataset(faces, 1.2, 64, augmentation=augmentation)
    first, again, other = (data[(0, turn)] for turn in (0, 2, 1))
    assert first[2] == again[2] == 0
    assert other[2] == 1
    assert not torch.equal(first[1], again[1])
    assert torch.equal(data[(0, 2)][0], again[0])
