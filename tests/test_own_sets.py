"""Users' own data: few faces, collinear points, other divisors, points without mirror partner."""
import json
import re
import shlex

import numpy
import pytest
from helpers.own_sets import FACE, FIVE, QUICK, prepare, write

from utils import checkpoint, experiment
from utils.args import load_args
from utils.data import sets
from utils.data.augment import Augment
from utils.data.dataset import PreparedSet
from utils.data.generator import DataGenerator
from utils.data.sets import set_folder
from utils.deploy import export
from utils.errors import UserError
from utils.evaluation import predict, score
from utils.landmarks import crop, metrics
from utils.landmarks.schemes import SCHEMES
from utils.predictor import Predictor
from utils.training import trainer

TWO = "name: two\npoints: 2\nflip: [[0, 1]]\n"
LINE = "name: line\npoints: 3\nflip: [[0, 2]]\ndivisor: diagonal\n"


def train(data, **settings):
    return trainer.train(load_args(QUICK | {"data_dir": str(data)} | settings))


@pytest.mark.parametrize(("count", "options", "held_out"), [
    (1, {}, 0), (2, {}, 1), (3, {"val": 0}, 0)])
def test_few_faces_can_be_trained(tmp_path, weights, capsys, count, options, held_out):
    data = prepare(tmp_path / "own", FIVE, [("train", FACE + i) for i in range(count)], **options)
    lists = PreparedSet(data).lists
    assert (len(lists["train"]), len(lists["val"])) == (count - held_out, held_out)
    folder = train(data, num_nb=4, epochs=2)
    out = capsys.readouterr().out
    assert ("no validation faces: the last epoch is the best" in out) == (not held_out)
    if not held_out:
        assert checkpoint.read(folder / "best.pt")["epoch"] == 2
        assert out.count("val NME none *") == 2
        assert all(numpy.isnan(row["val_nme"]) for row in experiment.read_epochs(folder))
    assert (folder / "curves.png").is_file()
    args = load_args({"data_dir": str(data), "exp": str(folder / "best.pt")})
    if held_out:
        score.run_test(args, {"test"})
        assert "no test list; scored on its validation faces" in capsys.readouterr().out
        assert (folder / "faces.csv").read_text().splitlines()[1].startswith("val,")
        return
    with pytest.raises(UserError, match="has no test list and no validation faces"):
        score.run_test(args, {"test"})


def test_all_faces_of_a_single_photo_are_trained(tmp_path):
    faces = [("train", FACE), ("train", FACE + 4), ("train", FACE - 4)]
    lists = PreparedSet(prepare(tmp_path / "own", FIVE, faces, ["0.png"] * 3)).lists
    assert (len(lists["train"]), len(lists["val"])) == (3, 0)


def test_a_set_without_training_faces_is_not_trained_on(tmp_path, weights):
    data = prepare(tmp_path / "own", FIVE, [("test", FACE)])
    with pytest.raises(UserError, match="has no train.txt"):
        train(data, num_nb=4)


def test_an_empty_validation_list_holds_nothing_out(tmp_path):
    data = prepare(tmp_path / "own", FIVE, [("train", FACE + i) for i in range(4)])
    (data / "val.txt").write_text("\n")
    assert {name: len(faces) for name, faces in PreparedSet(data).lists.items()} == {
        "train": 3, "val": 0}


def test_a_report_without_scored_faces_is_valid_json(tmp_path, weights):
    eyeless = FACE.copy()
    eyeless[0] = numpy.nan
    data = prepare(tmp_path / "own", FIVE, [("train", FACE), ("train", FACE), ("test", eyeless)])
    folder, report = train(data, num_nb=4), tmp_path / "report.json"
    score.run_test(load_args({"data_dir": str(data), "exp": str(folder / "best.pt"),
                          "report": str(report)}), {"test"})
    numbers = json.loads(report.read_text(), parse_constant=pytest.fail)["pytorch"]["test"]
    assert numbers["nme"] is None
    assert numbers["unscored"] == 1


def test_the_mean_of_no_scored_face_is_nan():
    numbers = metrics.summary([])
    assert numbers["faces"] == 0
    assert numpy.isnan(numbers["nme"])
    assert "unscored" not in numbers


@pytest.mark.parametrize(("scheme", "points"), [
    (TWO, [(20, 40), (60, 40)]), (TWO, [(40, 20), (40, 60)]), (TWO, [(20, 20), (60, 58)]),
    (LINE, [(20, 40), (40, 40), (60, 40)]), (LINE, [(20, 20), (40, 40), (60, 60)])])
def test_collinear_points_are_trained_and_scored(tmp_path, weights, scheme, points):
    points = numpy.array(points, float)
    data = prepare(tmp_path / "own", scheme, [("train", points), ("train", points + 2),
                                              ("test", points + 1)])
    prepared = PreparedSet(data)
    faces = prepared.lists["test"]
    # The crop is a square of the longer side, enlarged.
    side = numpy.ptp(points, 0).max() * 1.2
    numpy.testing.assert_allclose(faces.boxes[0], [*(points.mean(0) + 1 - side / 2),
                                                   *(points.mean(0) + 1 + side / 2)], atol=1e-3)
    folder = train(data, num_nb=1)
    report = tmp_path / "report.json"
    score.run_test(load_args({"data_dir": str(data), "exp": str(folder / "best.pt"),
                          "report": str(report)}), {"test"})
    numbers = json.loads(report.read_text())["pytorch"]["test"]
    assert 0 < numbers["nme"] < 1000
    assert 0 < numbers["nme_crop"] < 1000
    # The crop around predicted landmarks, as in tracking.
    again = crop.face_boxes(points[None] + 1, prepared.crop, prepared.scheme)
    numpy.testing.assert_allclose(again[0], faces.boxes[0], atol=1e-3)


def test_the_shorter_side_of_a_box_is_at_least_a_tenth_of_the_longer():
    line = numpy.array([(0, 5), (100, 5.)])
    assert crop.face_box(line, "stretch", 1.0).tolist() == [0, 0, 100, 10]
    assert crop.face_box(line[:, ::-1], "stretch", 1.0).tolist() == [0, 0, 10, 100]
    with pytest.raises(UserError, match="0 x 0 pixels"):
        crop.face_box(line[[0, 0]], "square")


@pytest.mark.parametrize(("divisor", "expected"), [("box", 40), ("diagonal", 40 * 2 ** 0.5),
                                               ("[right eye, nose]", 20 * 2 ** 0.5)])
def test_divisors_of_a_scheme(tmp_path, divisor, expected):
    scheme = FIVE.replace("[right eye, left eye]\n", f"{divisor}\n")
    assert f"divisor: {divisor}" in scheme
    data = prepare(tmp_path / "own", scheme, [("test", FACE)])
    prepared = PreparedSet(data)
    faces = prepared.lists["test"]
    found = faces.points + (5 / numpy.ptp(faces.boxes[0, ::2]), 0)
    nme, _ = predict.list_nme(found, faces, prepared.scheme, prepared.scheme)
    # The published crop is enlarged by 1.1; the distance of two points is not.
    grown = 1.0 if "[" in divisor else 1.1
    assert nme[0] == pytest.approx(5 / (expected * grown), rel=1e-4)


def test_a_face_without_its_divisor_is_named(tmp_path, capsys):
    same, missing = FACE.copy(), FACE.copy()
    same[1] = same[0]
    missing[0] = numpy.nan
    prepare(tmp_path / "own", FIVE, [("train", FACE), ("train", same), ("train", missing)])
    out = capsys.readouterr().out
    pair = "point 0 and point 1, whose distance divides NME, are"
    assert f"1.png: note: {pair} at one place: the face is trained on and not scored" in out
    assert f"2.png: note: {pair} not both labelled" in out
    assert "0.png: note" not in out


def test_a_point_that_no_face_has_is_named(tmp_path):
    faces = [("train", FACE.copy()), ("train", FACE + 1)]
    for _, points in faces:
        points[2] = numpy.nan
    with pytest.raises(UserError, match="point 2 is labelled in none of"):
        prepare(tmp_path / "own", FIVE, faces, val=0)


def test_points_of_one_side_are_never_mirrored(tmp_path, weights):
    scheme = "name: mole\nnames: [right eye, left eye, mole]\nflip: none\n"
    points = numpy.array([(20, 20), (60, 20), (30, 50.)])
    data = prepare(tmp_path / "own", scheme, [("train", points)] * 3 + [("test", points)])
    prepared = PreparedSet(data)
    assert not prepared.scheme.mirrors
    assert prepared.scheme.flip.tolist() == [0, 1, 2]
    only_flip = dict.fromkeys(("rotation", "scaling", "shift", "aspect", "colour", "grey", "blur",
                               "occlusion"), 0)
    args = load_args(only_flip | {"flip": 1})
    stored = numpy.zeros((102, 102, 3), numpy.uint8)
    for flip, mirrored in ((None, False), (prepared.scheme.flip, True)):
        _, moved = Augment(args, flip)(stored, prepared.lists["test"].points[0], 1.6, 64,
                                       numpy.random.default_rng(0))
        assert (abs(moved - prepared.lists["test"].points[0]).max() > 0.1) == mirrored
    folder = train(data, num_nb=2)
    assert not checkpoint.load_model(folder / "best.pt").scheme.mirrors
    with pytest.raises(UserError, match="--flip-test: scheme mole has flip: none"):
        score.run_test(load_args({"data_dir": str(data), "exp": str(folder / "best.pt"),
                              "flip_test": True}), {"test"})


def test_a_face_that_is_labelled_twice_gets_a_note(tmp_path, capsys):
    faces = [("train", FACE), ("train", FACE + 1), ("train", FACE), ("val", FACE)]
    prepare(tmp_path / "own", FIVE, faces, photos=["0.png", "0.png", "1.png", "1.png"])
    out = capsys.readouterr().out
    assert out.count("overlap: labelled twice?") == 1
    assert "0.png: note: its faces 1 and 2 overlap: labelled twice?" in out


def test_replacing_a_set_by_one_with_other_crops_gets_a_note(tmp_path, capsys):
    faces = [("train", FACE), ("val", FACE)]
    for options in ({}, {}, {"scale": 1.3}):
        assert "had crops" not in capsys.readouterr().out
        prepare(tmp_path / "own", FIVE, faces, **options)
    assert "had crops {'rule': 'square', 'scale': 1.2} and gets" in capsys.readouterr().out


def test_eye_settings_without_eye_regions_get_a_note(tmp_path, weights, capsys):
    data = prepare(tmp_path / "own", FIVE, [("train", FACE), ("train", FACE), ("val", FACE)])
    train(data, num_nb=4, shut=0.5)
    assert "no regions right eye and left eye: --shut without effect" in capsys.readouterr().out


def test_a_flip_that_does_not_fit_the_faces_gets_a_note(tmp_path, capsys):
    for number, (pairs, note) in enumerate((
            ("[[right eye, left eye], [right mouth, left mouth]]", None),
            ("[[right eye, left eye]]", "which is in no flip pair"),
            ("[[right eye, right mouth], [left eye, left mouth]]", "the mirror partner of point"))):
        scheme = FIVE.replace("[[right eye, left eye], [right mouth, left mouth]]", pairs)
        prepare(tmp_path / str(number), scheme, [("train", FACE)] * 8)
        out = capsys.readouterr().out
        assert ("is the scheme's flip right?" in out) == bool(note)
        assert (note or "") in out
    # A few turned faces do not show that a flip table is wrong.
    prepare(tmp_path / "few", scheme, [("train", FACE)] * 7)
    assert "is the scheme's flip right?" not in capsys.readouterr().out


def test_which_faces_are_kept_is_printed(tmp_path, capsys):
    """Faces of one photo of 90 px: normal, tiny and partly outside, with and without its points."""
    tiny, smallest = 30 + (FACE - 20) * 0.15, 30 + (FACE - 20) * 0.3
    half = FACE + (40, 0)
    shown = numpy.where(half < 90, half, numpy.nan)
    shown[numpy.isnan(shown).any(1)] = numpy.nan
    faces = [("train", points) for points in (FACE, FACE + 5, tiny, smallest, half, shown,
                                              FACE + (25, 0))]
    data = prepare(tmp_path / "own", FIVE, faces, ["0.png"] * len(faces), target_size=128, val=0)
    assert len(PreparedSet(data).lists["train"]) == 5
    out = capsys.readouterr().out
    assert "line 4: " not in out  # The line is valid, the face is too small.
    assert "the face has a side of 6.0 px, less than 8" in out
    assert "point 1 at 100, 20 is far outside the photo of 90 x 90; to keep the face, leave" in out
    assert "kept: every face whose landmarks' box is 8 px or longer" in out
    assert "5 faces of 1 photos, of 12 to 40 px (median 40); 1 of them enlarged more than 4" in out


def test_a_set_with_the_points_of_a_part_can_be_trained(tmp_path, weights):
    points = SCHEMES["eyes"].mean_face * 60 + 12
    table, _ = write(tmp_path / "own", TWO, [("train", points), ("train", points + 2),
                                             ("test", points + 1)])
    data = DataGenerator(table, 64, tmp_path / "set", scheme="eyes", workers=1).run()
    prepared = PreparedSet(data)
    assert (prepared.scheme.name, prepared.scheme.base, prepared.scheme.points) == ("eyes", None,
                                                                                    12)
    folder = train(data, num_nb=4, scheme="eyes")
    report = tmp_path / "report.json"
    args = load_args({"data_dir": str(data), "exp": str(folder / "best.pt"), "workers": 0,
                      "report": str(report)})
    export.export_weights(folder / "best.pt")
    score.run_test(args, {"test", "test_onnx"})
    assert json.loads(report.read_text())["onnx"]["test"]["faces"] == 1
    # In tracking too the crop is around these points, not around a whole face.
    scheme = Predictor(folder / "best.onnx").scheme
    again = crop.face_boxes(points[None] + 1, prepared.crop, scheme)
    numpy.testing.assert_allclose(again[0], prepared.lists["test"].boxes[0], atol=1e-3)
    # A published list of such points has no set.yaml.
    (data / "set.yaml").unlink()
    assert train(data, num_nb=4, exp="again")


def test_a_folder_with_a_number_is_no_prepared_set(tmp_path):
    args = load_args({"data_dir": str(tmp_path / "phone"), "input_size": 64})
    for name in ("phone", "phone-2024"):
        (tmp_path / name).mkdir()
    assert set_folder(args) == tmp_path / "phone"
    for size in (48, 96):
        (tmp_path / f"phone-{size}").mkdir()
        (tmp_path / f"phone-{size}" / "set.yaml").touch()
    assert set_folder(args) == tmp_path / "phone-96"
    (tmp_path / "phone-2024" / "set.yaml").touch()
    args.input_size = 128
    assert set_folder(args) == tmp_path / "phone-2024"


def test_a_set_called_samples_is_told_from_the_drawn_faces(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sets, "prepare_samples", str)
    args = load_args({"data_dir": "samples"})
    set_folder(args)
    assert not capsys.readouterr().err
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "set.yaml").touch()
    set_folder(args)
    assert "is --data-dir ./samples" in capsys.readouterr().err


def test_a_printed_command_can_be_copied(tmp_path, capsys):
    data = prepare(tmp_path / "it's my (own)", FIVE, [("train", FACE), ("train", FACE + 2)])
    command = re.search(r"more: (.*)\)", capsys.readouterr().out)[1]
    assert shlex.split(command) == ["python", "-m", "utils.data.sheet", str(data)]
    with pytest.raises(UserError) as caught:
        DataGenerator(data, 64, tmp_path / "other").run()
    assert shlex.split(str(caught.value).rpartition("train with ")[2]) == ["--data-dir", str(data)]
