"""Errors of predictions: both units, subsets of a scheme, order, tables."""
import numpy
import pytest

from utils.data.dataset import PreparedSet
from utils.data.face_list import FaceList
from utils.errors import UserError
from utils.evaluation import predict, score
from utils.landmarks import crop, metrics, schemes
from utils.landmarks.schemes import SCHEMES

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
    yaws = score.true_yaws(prepared)
    assert yaws.keys() == prepared.test_lists.keys()
    assert len(yaws["test"]) == 8
    assert (yaws["test"] >= 0).all()
    assert yaws["test"].std() > 1
    prepared.scheme = SCHEMES["eyes"]
    with pytest.raises(UserError, match="head pose: scheme eyes"):
        score.true_yaws(prepared)
