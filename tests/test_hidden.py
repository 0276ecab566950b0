"""Hidden points: read, kept in the set, trained or excluded, and scored separately."""
import dataclasses
import json

import cv2
import numpy
import pytest
import torch
from helpers.own_sets import FACE, FIVE, QUICK

from utils.args import load_args
from utils.data.dataset import PreparedSet
from utils.data.generator import DataGenerator
from utils.data.readers import annotations
from utils.errors import UserError
from utils.evaluation import predict, score
from utils.landmarks.schemes import read_scheme
from utils.training import trainer

# COCO visibility of each point of the test faces: 2 visible, 1 hidden, 0 not labelled.
VISIBILITY = [(2, 2, 2, 2, 2), (2, 2, 1, 1, 2), (2, 2, 0, 1, 2), (1, 1, 1, 1, 1)]


def write_coco(folder, visibility=VISIBILITY):
    """Write a COCO file with one face per photo, and five.yaml; return their paths."""
    folder.mkdir(parents=True)
    images, entries = [], []
    for number, flags in enumerate(visibility):
        noise = numpy.random.default_rng(number).integers(0, 255, (90, 90, 3), numpy.uint8)
        cv2.imwrite(str(folder / f"{number}.png"), noise)
        images.append({"id": number, "file_name": f"{number}.png"})
        rows = [(*point, flag) for point, flag in zip((FACE + number).tolist(), flags)]
        entries.append({"image_id": number, "keypoints": sum(map(list, rows), [])})
    (folder / "coco.json").write_text(json.dumps({"images": images, "annotations": entries}))
    (folder / "five.yaml").write_text(FIVE)
    return folder / "coco.json", folder / "five.yaml"


@pytest.fixture(scope="module")
def own_set(tmp_path_factory):
    """The prepared set of such faces, all of which are in train.txt and in test.txt."""
    source, scheme = write_coco(tmp_path_factory.mktemp("own") / "photos")
    folder = DataGenerator(source, 64, source.parent.parent / "set", workers=1, val=0,
                           scheme=str(scheme)).run()
    (folder / "test.txt").write_text((folder / "train.txt").read_text())
    return folder


def test_readers_mark_hidden_points(tmp_path):
    source, scheme = write_coco(tmp_path / "own")
    faces = annotations.read(source, [], read_scheme(scheme))
    assert [face.hidden.tolist() for face in faces] == [[f == 1 for f in flags]
                                                        for flags in VISIBILITY]
    skeleton = "".join(f'<points label="{i}" occluded="{int(i == 3)}" points="{x},{y}"/>'
                       for i, (x, y) in enumerate(FACE))
    flat = ";".join(f"{x},{y}" for x, y in FACE)
    (tmp_path / "own" / "cvat.xml").write_text(
        f'<annotations><image name="0.png"><skeleton label="face">{skeleton}</skeleton>'
        f'<points label="face" occluded="1" points="{flat}"/></image></annotations>')
    faces = annotations.read(tmp_path / "own" / "cvat.xml", [], read_scheme(scheme))
    assert {tuple(face.hidden.tolist()) for face in faces} == {
        (False, False, False, True, False), (True,) * 5}


def test_cvat_points_that_are_separate_shapes(tmp_path):
    _, scheme = write_coco(tmp_path / "own")
    scheme, path = read_scheme(scheme), tmp_path / "own" / "cvat.xml"

    def read(groups):
        shapes = "".join(f'<points label="{i}" occluded="{int(i == 3)}"{group} '
                         f'points="{x + 50 * number},{y}"/>'
                         for number, group in enumerate(groups) for i, (x, y) in enumerate(FACE))
        path.write_text(f'<annotations><image name="0.png">{shapes}</image></annotations>')
        problems = []
        return annotations.read(path, problems, scheme), problems

    faces, problems = read([' group_id="1"', ' group_id="2"'])
    assert not problems
    assert [face.hidden.tolist() for face in faces] == [
        [False, False, False, True, False]] * 2
    assert faces[0].points[0] == pytest.approx(FACE[0])
    assert faces[1].points[0] == pytest.approx(FACE[0] + [50, 0])
    faces, problems = read(["", ""])
    assert not faces
    assert "points without a group_id: point 0 is there twice" in problems[0][1]


def test_a_set_keeps_the_flags(own_set):
    faces = PreparedSet(own_set).lists["train"]
    assert faces.hidden.tolist() == [[f == 1 for f in flags] for flags in VISIBILITY]
    assert faces.select([1]).hidden.tolist() == [[False, False, True, True, False]]
    visible = faces.drop_hidden()
    # No point of the last face is visible.
    assert len(visible) == 3
    assert visible.images == faces.images[:3]
    assert numpy.isnan(visible.points[..., 0]).tolist() == [[f < 2 for f in flags]
                                                            for flags in VISIBILITY[:3]]
    assert numpy.isfinite(faces.points[3]).all()


def test_a_set_without_hidden_points_has_no_flags(tmp_path, capsys):
    source, scheme = write_coco(tmp_path / "own", [(2, 2, 2, 2, 0), (2, 2, 2, 2, 2)])
    folder = DataGenerator(source, 64, tmp_path / "set", workers=1, val=0,
                           scheme=str(scheme)).run()
    assert "annotations train " in capsys.readouterr().out
    assert (folder / "sources.csv").read_text().splitlines()[0].endswith("published_y_max")
    faces = PreparedSet(folder).lists["train"]
    assert faces.hidden is None
    assert faces.drop_hidden() is faces


def test_wrong_flags_are_named(own_set, tmp_path):
    text = (own_set / "sources.csv").read_text()
    assert text.count("00110") == 1
    for name in ("train.txt", "set.yaml", "indices.txt"):
        (tmp_path / name).write_text((own_set / name).read_text())
    for wrong in ("0011", "00120"):
        (tmp_path / "sources.csv").write_text(text.replace("00110", wrong))
        with pytest.raises(UserError, match=f"5 digits 0 or 1 expected, found '{wrong}'"):
            PreparedSet(tmp_path)


@pytest.mark.parametrize("hidden", [True, False])
def test_training_includes_or_excludes_hidden_points(own_set, weights, capsys, monkeypatch, hidden):
    seen = []
    step = trainer.Trainer.train_step

    def spy(self, batches, number):
        loss = self.state.loss
        self.state.loss = lambda predicted, landmarks, indices: (seen.append(landmarks), loss(
            predicted, landmarks, indices))[1]
        try:
            return step(self, batches, number)
        finally:
            self.state.loss = loss

    monkeypatch.setattr(trainer.Trainer, "train_step", spy)
    trainer.train(load_args(QUICK | {"data_dir": str(own_set), "num_nb": 4, "hidden": hidden,
                                     "flip": 0, "batch_size": 12, "effective_batch": 12}))
    known = torch.isfinite(torch.cat(seen)).all(-1).float()
    # 4 faces have 20 points, 1 not labelled; 3 faces have 15 points, 4 of them not visible.
    assert known.mean() == pytest.approx(19 / 20 if hidden else 11 / 15)
    assert ("8 hidden points are not trained" in capsys.readouterr().out) != hidden


def test_hidden_points_are_scored_separately(own_set, capsys):
    prepared = PreparedSet(own_set)
    faces = prepared.test_lists["test"]
    scale = numpy.ptp(faces.boxes[0, ::2])
    # Visible points are off by 4 px, hidden ones by 8, of an eye distance of 40.
    off = numpy.where(faces.hidden, 8, 4)[..., None] / scale * (1, 0)
    nme, _ = predict.list_nme(faces.points + off, faces, prepared.scheme, prepared.scheme)
    nme[0] = numpy.nan
    parts = score.by_visibility(faces.points + off, nme, faces, prepared.scheme, prepared.scheme)
    assert parts["visible"] == {"faces": 2, "points": 6, "nme": pytest.approx(10, rel=1e-5)}
    assert parts["hidden"] == {"faces": 3, "points": 8, "nme": pytest.approx(20, rel=1e-5)}
    part = prepared.scheme.subset([0, 1])
    parts = score.by_visibility((faces.points + off)[:, :2], nme, faces, part, prepared.scheme)
    assert parts["hidden"]["points"] == 2
    assert parts["visible"]["points"] == 4
    score.print_by_visibility("test", parts | {"hidden": {"faces": 0, "points": 0, "nme": None}})
    assert capsys.readouterr().out == ("test: NME % of points, visible: 10.000 (4 points of 2 "
                                       "faces), hidden: no point\n")


def test_both_scores_are_printed_and_reported(own_set, weights, capsys):
    settings = QUICK | {"data_dir": str(own_set), "num_nb": 4}
    folder = trainer.train(load_args(settings))
    report = weights / "report.json"
    score.run_test(load_args(settings | {"exp": str(folder / "best.pt"), "report": str(report)}),
               {"test"})
    assert "(11 points of 3 faces), hidden: " in capsys.readouterr().out
    numbers = json.loads(report.read_text())["pytorch"]["test"]
    assert numbers["by_visibility"]["hidden"]["faces"] == 3


def test_training_without_any_visible_point_is_refused(tmp_path, weights):
    source, scheme = write_coco(tmp_path / "own", [(1,) * 5] * 2)
    folder = DataGenerator(source, 64, tmp_path / "set", workers=1, scheme=str(scheme)).run()
    with pytest.raises(UserError, match="all points of the training faces are hidden"):
        trainer.train(load_args(QUICK | {"data_dir": str(folder), "num_nb": 4, "hidden": False}))
    assert dataclasses.replace(PreparedSet(folder).lists["train"], hidden=None).drop_hidden()
