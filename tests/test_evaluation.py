"""Errors of predictions: units and divisors, subsets of a scheme, order, tables, conditions."""
import csv
import json

import numpy
import pytest
import torch

import demo
from utils import checkpoint
from utils.args import ROOT, load_args
from utils.data.dataset import PreparedSet
from utils.data.face_list import FaceList
from utils.errors import UserError
from utils.evaluation import conditions, predict, score
from utils.landmarks import crop, metrics, schemes
from utils.landmarks.schemes import SCHEMES
from utils.predictor import Predictor

W300 = SCHEMES["300W"]


def _faces(width=200.0, height=100.0, count=3):
    """Mean faces of a landmarks' box of width x height pixels, in square crops of side 240."""
    rng = numpy.random.default_rng(0)
    mean = (W300.mean_face - W300.mean_face.min(0)) / numpy.ptp(W300.mean_face, 0)
    points_px = mean * (width, height) + rng.uniform(0, 50, (count, 1, 2))
    boxes = numpy.array([crop.face_box(p, "square", 1.2) for p in points_px])
    published = numpy.array([crop.face_box(p, "stretch", 1.1) for p in points_px])
    return FaceList([None] * count, crop.to_crop(points_px, boxes), boxes, published, None)


def test_photo_pixels_and_published_units_differ_by_the_stretch():
    faces = _faces()
    truth_px = crop.to_photo(faces.points, faces.boxes)
    corners = numpy.linalg.norm(truth_px[0, 36] - truth_px[0, 45])
    shifted = crop.to_crop(truth_px + (0, 5.0), faces.boxes)
    nme, published = predict.list_nme(shifted, faces, W300, W300)
    assert nme == pytest.approx(5 / corners, rel=1e-9)
    # In the stretched crop the face is as high as wide: a vertical pixel counts twice here.
    unit = crop.to_crop(truth_px, faces.published)
    expected = 5 / 110 / numpy.linalg.norm(unit[0, 36] - unit[0, 45])
    assert published == pytest.approx(expected, rel=1e-9)
    assert published[0] > 1.9 * nme[0]


def test_a_subset_is_divided_by_the_whole_face():
    faces = _faces()
    part = W300.subset([30, 31, 35])
    predicted = faces.points[:, [30, 31, 35]] + 0.01
    nme, _ = predict.list_nme(predicted, faces, part, W300)
    corners = numpy.linalg.norm(faces.points[0, 36] - faces.points[0, 45])
    assert nme == pytest.approx(0.01 * 2 ** 0.5 / corners, rel=1e-9)


def test_a_scheme_without_divisor_is_divided_by_the_box():
    faces = _faces(200, 200)
    scheme = SCHEMES["AFLW"]
    faces.points = faces.points[:, :19]
    nme, published = predict.list_nme(faces.points + (0.1, 0), faces, scheme, scheme)
    assert nme == pytest.approx(0.1 * 240 / 220, rel=1e-9)
    assert published == pytest.approx(0.1 * 240 / 220, rel=1e-9)


def test_mirrored_error_is_the_same():
    faces = _faces()
    rng = numpy.random.default_rng(1)
    predicted = faces.points + rng.normal(0, 0.02, faces.points.shape)
    nme, _ = predict.list_nme(predicted, faces, W300, W300)
    for array in (predicted, faces.points):
        array[...] = array[:, W300.flip]
        array[..., 0] = 1 - array[..., 0]
    assert predict.list_nme(predicted, faces, W300, W300)[0] == pytest.approx(nme, rel=1e-9)


def test_predictions_come_back_in_the_order_of_the_list(drawn_set):
    faces = PreparedSet(drawn_set).lists["test"]

    def brightness(images):
        value = images.float().mean((1, 2, 3)).numpy()
        return numpy.repeat(value[:, None, None], 2, 2)

    whole = predict.predict_list(brightness, faces, 1.6, 64, batch=3)
    single = [predict.predict_list(brightness, faces.select([i]), 1.6, 64)[0] for i in range(8)]
    numpy.testing.assert_allclose(whole, single)
    assert len(numpy.unique(whole[:, 0, 0])) == 8


def test_a_cache_reads_the_crops_of_a_list_once(drawn_set, monkeypatch):
    faces = PreparedSet(drawn_set).lists["test"]

    def brightness(images):
        return images.float().mean((1, 2, 3)).numpy()[:, None, None].repeat(2, 2)

    whole, cache = predict.predict_list(brightness, faces, 1.6, 64, batch=3), []
    first = predict.predict_list(brightness, faces, 1.6, 64, batch=3, cache=cache)
    monkeypatch.setattr(predict.FaceDataset, "read", None)
    again = predict.predict_list(brightness, faces, 1.6, 64, batch=3, cache=cache)
    assert (first == whole).all()
    assert (again == whole).all()
    monkeypatch.undo()
    monkeypatch.setattr(predict, "MAX_CACHE_BYTES", 8 * 3 * 64**2 - 1)
    predict.predict_list(brightness, faces, 1.6, 64, batch=3, cache=(large := []))
    assert large == []


def test_a_face_of_several_lists_is_predicted_once(drawn_set):
    faces, asked = PreparedSet(drawn_set).lists["train"], []

    def numbered(part):
        asked.append([path.name for path in part.images])
        return [faces.images.index(path) for path in part.images], part.points

    lists = {"full": faces, "part": faces.select([2, 0])}
    found = list(predict.predict_lists(lists, numbered))
    assert asked == [[path.name for path in faces.images]]
    assert [(name, one) for name, one, _ in found] == list(lists.items())
    assert found[1][2][0].tolist() == [2, 0]
    assert (found[1][2][1] == faces.points[[2, 0]]).all()
    # Where a part comes first, only the rest of the full list is predicted.
    list(predict.predict_lists({"part": lists["part"], "full": faces}, numbered))
    assert [len(names) for names in asked[1:]] == [2, len(faces) - 2]


def test_a_model_of_another_scheme_is_refused():
    with pytest.raises(UserError, match="eyes.*12 of 300W's points.*WFLW.*98"):
        schemes.check_scheme(SCHEMES["eyes"], SCHEMES["WFLW"], "x.pt")
    schemes.check_scheme(SCHEMES["eyes"], W300, "x.pt")


def test_the_table_shows_both_units(capsys):
    numbers = {**metrics.summary([0.02, 0.09])}
    numbers |= {f"{k}_crop": v for k, v in metrics.summary([0.03, 0.12]).items()}
    score.print_table("onnx", {"common": numbers})
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.split()[:2] == ["common", "2"]
    assert "5.500" in line
    assert "7.500" in line
    assert "50.00" in line


def test_errors_by_yaw(capsys):
    nme, yaw = numpy.array([0.02, 0.04, 0.1, numpy.nan, 0.3]), numpy.array([0, 14.9, 15, 40, 95.0])
    rows = score.by_yaw(nme, yaw)
    assert [row["faces"] for row in rows] == [2, 1, 0, 1]
    assert [row["nme"] for row in rows] == pytest.approx([3, 10, None, 30])
    score.print_by_yaw("common", rows)
    assert capsys.readouterr().out == (
        "common: NME % by |yaw| in degrees: 0-15: 3.000 (2 faces), 15-30: 10.000 (1 faces), "
        "30-60: no face, 60-90: 30.000 (1 faces)\n")


def test_yaws_of_the_annotation(drawn_set):
    prepared = PreparedSet(drawn_set)
    yaws = conditions.true_yaws(prepared)
    assert yaws.keys() == prepared.test_lists.keys()
    assert len(yaws["test"]) == 8
    assert (yaws["test"] >= 0).all()
    assert yaws["test"].std() > 1
    prepared.scheme = SCHEMES["eyes"]
    with pytest.raises(UserError, match="head pose: scheme eyes"):
        conditions.true_yaws(prepared)


def test_three_normalisations():
    faces = _faces()
    truth_px = crop.to_photo(faces.points, faces.boxes)
    shifted = crop.to_crop(truth_px + (0, 5.0), faces.boxes)
    numbers = predict.normalised(shifted, faces, W300, W300)
    outer = numpy.linalg.norm(truth_px[0, 36] - truth_px[0, 45])
    pupils = numpy.linalg.norm(truth_px[0, 36:42].mean(0) - truth_px[0, 42:48].mean(0))
    diagonal = numpy.hypot(*(faces.published[0, 2:] - faces.published[0, :2]))
    assert numbers["inter_ocular"]["nme"] == pytest.approx(100 * 5 / outer)
    assert numbers["inter_pupil"]["nme"] == pytest.approx(100 * 5 / pupils)
    assert numbers["box_diagonal"]["nme"] == pytest.approx(100 * 5 / diagonal)
    nme, published = predict.list_nme(shifted, faces, W300, W300)
    assert numbers["inter_ocular"] == pytest.approx(
        {"nme": 100 * nme.mean(), "nme_crop": 100 * published.mean()})


@pytest.mark.parametrize("name", ["300W", "WFLW", "COFW", "LaPa"])
def test_the_outer_corners_are_the_schemes_divisor(name):
    scheme = SCHEMES[name]
    face = scheme.mean_face[None]
    assert metrics.inter_ocular(face, scheme) == pytest.approx(
        metrics.divisors(face, scheme.divisor, None))
    assert 0 < metrics.inter_pupil(face, scheme) < metrics.inter_ocular(face, scheme)


def test_a_scheme_without_eyes_has_no_eye_distance(capsys):
    mouth = W300.part("mouth")
    assert numpy.isnan(metrics.inter_pupil(mouth.mean_face[None], mouth)).all()
    assert numpy.isnan(metrics.inter_ocular(mouth.mean_face[None], mouth)).all()
    numbers = {"test": {"normalised": {"inter_ocular": {"nme": 3.0}, "inter_pupil": {"nme": 4.125},
                                       "box_diagonal": {"nme": float("nan")}}}}
    score.print_normalised(numbers, W300)
    assert capsys.readouterr().out == ("test: NME %, divided by outer eye corners 3.000, eye "
                                       "centres (mean of an eye's points) 4.125\n")


def test_a_mirror_error_is_zero_where_both_predictions_agree():
    rng = numpy.random.default_rng(0)
    points = W300.mean_face + rng.normal(0, 0.01, (5, 68, 2))
    mirrored = points[:, W300.flip] * (-1, 1) + (1, 0)
    assert metrics.mirror_back(mirrored, W300) == pytest.approx(points)
    assert metrics.mirror_error(points, points, W300) == pytest.approx(0)
    found = metrics.mirror_error(points, points + (0.02, 0), W300)
    assert found == pytest.approx(0.02 / metrics.inter_ocular(points, W300), rel=1e-3)


def test_rank_correlation():
    assert metrics.rank_correlation(numpy.array([1, 2, 30]), numpy.array([3, 4, 5])) == \
        pytest.approx(1)
    # Scipy's documentation of spearmanr has this pair.
    assert metrics.rank_correlation(numpy.array([1, 2, 3, 4, 5]), numpy.array([5, 6, 7, 8, 7])) == \
        pytest.approx(0.82078, abs=1e-5)
    assert numpy.isnan(metrics.rank_correlation(numpy.ones(3), numpy.arange(3)))


@pytest.mark.parametrize("kind", list(conditions.CONDITIONS))
def test_crops_are_degraded_as_stated(kind):
    rng = numpy.random.default_rng(0)
    stored = rng.integers(100, 156, (160, 160, 3), numpy.uint8)
    results = []
    for value in conditions.CONDITIONS[kind][0]:
        image, points = conditions.degrade(
            stored, W300.mean_face, 1.6, 100, numpy.random.default_rng(1), kind=kind, value=value,
            scale=1.25)
        assert image.shape == (100, 100, 3)
        assert image.dtype == numpy.uint8
        assert points == pytest.approx(W300.mean_face)
        results.append(image)
    if kind == "size":
        # The face has 80 px in the stored crop, so that 120 and 80 px change nothing.
        assert (results[0] == results[1]).all()
        assert results[1].std() > 1.2 * results[2].std() > 1.2 * results[3].std()
    elif kind == "blur":
        assert stored.std() > results[0].std() > results[1].std() > results[2].std()
    elif kind == "dark":
        assert [r.mean() for r in results] == pytest.approx(
            [127.5 * v ** (-1 / 2.2) for v in (4, 16, 64)], abs=1)
    else:
        grey = [(r == 128).all(-1).mean() for r in results]
        # Shares of the face's box, which is 0.64 of the crop.
        assert grey == pytest.approx([0.064, 0.16, 0.32], abs=0.01)


class Pixels:
    """A model whose landmarks depend on the crop, for the 68 points of 300W."""

    scheme, input_size = W300, 64

    @staticmethod
    def predict(images):
        """Mean face, moved by the brightness of the crop."""
        return W300.mean_face + images.float().mean((1, 2, 3)).numpy()[:, None, None] / 2550

    def __init__(self):
        self.mean = torch.zeros(1)

    def predict_both(self, images):
        """The mirrored face agrees but for a shift that grows with brightness."""
        found = torch.from_numpy(self.predict(images))
        return torch.stack([found, found * 1.01], 1)


def test_the_table_of_conditions(drawn_set, capsys):
    prepared = PreparedSet(drawn_set)
    _, results = score.score_lists(Pixels.predict, Pixels, prepared)
    nmes = {name: nme for name, (_, nme) in results.items()}
    rows = conditions.by_conditions(conditions.KINDS, Pixels.predict, Pixels(), prepared, nmes)
    found = rows["test"]
    assert len(found) == 1 + 3 + 4 + 3 + 3 + 3 + 2 + 4
    assert found["as it is"]["nme"] == pytest.approx(100 * nmes["test"].mean())
    assert sum(row["faces"] for text, row in found.items() if text.startswith("yaw")) == 8
    assert found["mirrored"]["nme"] != found["as it is"]["nme"]
    assert 2 * found["mean of both"]["nme"] == pytest.approx(
        found["mirrored"]["nme"] + found["as it is"]["nme"])
    assert found["light / 64"]["nme"] != found["light / 4"]["nme"]
    assert found["face of 120 px"] == found["as it is"], "the stored faces are smaller"
    assert [found[f"mirror error, {part} third"]["faces"]
            for part in conditions.MIRROR_PARTS] == [3, 3, 2]
    assert -1 <= found["mirror error, rank correlation"]["correlation"] <= 1
    conditions.print_conditions(rows)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(found) + 1
    assert lines[0].split() == ["NME", "%", "by", "condition", "test", "faces"]
    assert lines[1].split() == ["as", "it", "is", f"{found['as it is']['nme']:.3f}", "8"]


def test_names_of_conditions():
    assert conditions.parse_kinds("none") == []
    assert conditions.parse_kinds("yaw, dark") == ["yaw", "dark"]
    with pytest.raises(UserError, match="--by yaw,fog: expected names out of yaw,size.*'fog'"):
        score.check_settings(load_args({"by": "yaw,fog"}))
    with pytest.raises(UserError, match="of detected boxes there is only yaw; leave out --boxes"):
        score.check_settings(load_args({"by": "yaw,size", "boxes": "haar"}))


def test_a_model_and_a_predictor_give_the_same_mirrored_pair(tiny_weights):
    images = numpy.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), numpy.uint8)
    predictor = Predictor(tiny_weights)
    both = predictor.predict_both(images)
    assert both.shape == (2, 2, 68, 2)
    assert both[:, 0] == pytest.approx(predictor(images)[0], abs=1e-5)
    mirrored = predictor(images[:, :, ::-1])[0]
    assert both[:, 1] == pytest.approx(metrics.mirror_back(mirrored, W300), abs=1e-5)
    averaged = Predictor(tiny_weights, flip_test=True)
    assert averaged(images)[0] == pytest.approx(both.mean(1), abs=1e-5)
    assert averaged.predict_both(images) == pytest.approx(both), "the pair is not averaged"


def _test(weights, drawn_set, **given):
    args = load_args({"exp": str(weights), "data_dir": str(drawn_set), "device": "cpu",
                      "input_size": 64, **given})
    score.run_test(args, {"test"})


def test_numbers_come_before_side_files(tiny_weights, drawn_set, tmp_path, capsys):
    path = tmp_path / "exp" / "best.pt"
    path.parent.mkdir()
    checkpoint.save(checkpoint.read(tiny_weights), path)
    for name in ("ced.png", "faces.csv", "worst.png"):
        (path.parent / name).mkdir()
    _test(path, drawn_set, report=str(tmp_path / "report.json"))
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["pytorch"]["test"]["normalised"].keys() == metrics.NORMALISATIONS.keys()
    *table, first, second, third = capsys.readouterr().out.splitlines()
    assert any(line.startswith("test ") for line in table)
    for line, name in ((first, "faces.csv"), (second, "ced.png"), (third, "worst.png")):
        assert line.startswith(f"note: {path.parent / name}: ")
        assert "--resume" not in line


def test_a_test_by_condition_is_reported(tiny_weights, drawn_set, tmp_path, capsys):
    path = tmp_path / "best.pt"
    checkpoint.save(checkpoint.read(tiny_weights), path)
    _test(path, drawn_set, by="yaw,covered,mirror", report=str(tmp_path / "report.json"))
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["pytorch"]["test"]["by"]["50 % covered"]["faces"] == 8
    assert "mirror error, rank correlation" in capsys.readouterr().out


def test_the_demo_writes_mirror_errors(tmp_path):
    files = [tmp_path / "a.csv", tmp_path / "a.json"]
    for file in files:
        demo.main(["--source", "sample", "--flip-test", "--weights", "tiny", "--landmarks",
                   str(file), "--output", str(tmp_path / "a.png")])
    row, = csv.DictReader(files[0].open())
    face, = json.loads(files[1].read_text())["frames"][0]["faces"]
    assert float(row["mirror_error"]) == face["mirror_error"]
    assert 0.1 < face["mirror_error"] < 5, "% of the eye distance"
    # One landmark file has as many cells in its header as in a row.
    header, cells = (line.split(",") for line in files[0].read_text().splitlines())
    assert len(header) == len(cells) == 9 + 1 + 2 * 68


def test_the_demo_averages_a_pt_only(tmp_path):
    with pytest.raises(UserError, match="tiny.int8.onnx: --flip-test needs the .pt"):
        demo.main(["--source", "sample", "--flip-test", "--output", str(tmp_path / "a.png"),
                   "--weights", str(ROOT / "weights/tiny.int8.onnx")])
    with pytest.raises(UserError, match="--flip-test: not with --serve"):
        demo.main(["--serve", "8000", "--flip-test"])
