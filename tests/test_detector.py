"""Boxes of the three detectors on real faces, box conversion, and files that are no detector."""
import shutil

import cv2
import numpy
import pytest

from utils.detection import detector
from utils.errors import UserError

FILES = {"haar": "haar", "yunet": "models/yunet_n_640_640.onnx", "scrfd": "models/scrfd_500m.onnx"}


def make(name, shared):
    return detector.get_detector("haar" if name == "haar" else shared / FILES[name])


def faces(shared, step):
    """Yield (image, landmarks' box) of every step-th LFPW test photo."""
    for path in sorted((shared / "data/300W/lfpw/testset").glob("*.pts"))[::step]:
        points = numpy.array(path.read_text().split("{")[1].split("}")[0].split(), float) - 1
        points = points.reshape(-1, 2)
        photo = next(p for p in path.parent.glob(path.stem + ".*") if p.suffix != ".pts")
        image = cv2.cvtColor(cv2.imread(str(photo)), cv2.COLOR_BGR2RGB)
        yield image, numpy.concatenate([points.min(0), points.max(0)])


def score(found, shared, step):
    """Return the share of faces found, and the median shift and side ratio of their crops."""
    hits, relation, count = 0, [], 0
    for image, truth in faces(shared, step):
        boxes, count = found(image), count + 1
        shared_area = detector.iou(boxes, truth[None])[:, 0]
        if not len(boxes) or shared_area.max() < 0.3:
            continue
        hits += 1
        start = found.to_crop(boxes[shared_area.argmax()][None], 1.0)[0]
        side = (truth[2:] - truth[:2]).max()
        relation.append([*((start[:2] + start[2:] - truth[:2] - truth[2:]) / 2 / side),
                         (start[2] - start[0]) / side])
    return hits / count, numpy.median(relation, 0)


@pytest.mark.parametrize("name", FILES)
def test_faces_are_found_where_they_are(name, shared):
    found, relation = score(make(name, shared), shared, 12)
    assert found >= 0.9
    assert numpy.allclose(relation, [0, 0, 1], atol=0.06)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "least"), [("haar", 0.97), ("yunet", 0.99), ("scrfd", 0.99)])
def test_recall_on_all_test_photos(name, least, shared):
    found, relation = score(make(name, shared), shared, 1)
    assert found >= least
    assert numpy.allclose(relation, [0, 0, 1], atol=0.05)


@pytest.mark.parametrize("name", FILES)
def test_boxes_follow_the_image_shape_and_scale(name, shared):
    found = make(name, shared)
    image, truth = next(faces(shared, 1))
    canvas = numpy.zeros((700, 1300, 3), numpy.uint8)
    canvas[100:100 + image.shape[0], 700:700 + image.shape[1]] = image
    for frame, scale in ((canvas, 1.0), (cv2.resize(canvas, None, fx=2, fy=2), 2.0)):
        boxes = found(frame)
        there = (truth + [700, 100, 700, 100]) * scale
        assert detector.iou(boxes, [there])[0] > 0.45
        assert boxes.shape[1] == 5
        assert (numpy.diff(boxes[:, 4]) <= 0).all()


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("shape", [(1, 1), (2, 900), (900, 3), (37, 53)])
def test_frames_without_a_face(name, shape, shared):
    assert make(name, shared)(numpy.full((*shape, 3), 128, numpy.uint8)).shape == (0, 5)


def test_crops_are_square_and_shifted():
    found = detector.Detector("test", lambda image: [], (0.0, 0.25, 0.5))
    assert numpy.allclose(found.to_crop([[10, 20, 50, 60, 0.9]], 2.0), [[10, 30, 50, 70]])
    assert found.to_crop(found(None), 1.2).shape == (0, 4)


def test_invalid_boxes_are_dropped_and_the_best_is_first():
    rows = [[0, 0, 9, 9, 0.2], [5, 5, 5, 9, 1], [0, 0, numpy.nan, 9, 1], [1, 1, 9, 9, 0.8]]
    found = detector.Detector("test", lambda image: rows, (0, 0, 1))(None)
    assert found.tolist() == [rows[3], rows[0]]


def test_boxes_of_equal_scores_have_a_fixed_order():
    rows = [[5, 5, 9, 9, 0.5], [1, 4, 9, 9, 0.5], [1, 2, 9, 9, 0.5], [7, 7, 9, 9, 0.6]]
    orders = [detector.Detector("test", lambda image, n=n: rows[n:] + rows[:n], (0, 0, 1))(None)
              for n in range(4)]
    assert all((found == [rows[3], rows[2], rows[1], rows[0]]).all() for found in orders)


@pytest.mark.parametrize("name", FILES)
def test_low_resolution_finds_faces_of_common_size(name, shared):
    found = make(name, shared)
    low_res, seen, count = found.low_resolution(), 0, 0
    assert low_res.name == found.name
    assert low_res.crop_transform == found.crop_transform
    for image, truth in faces(shared, 12):
        # A face of 120 px in a frame of 640 x 360, as from a webcam.
        scale = 120 / (truth[2:] - truth[:2]).max()
        shift = numpy.array([320, 180]) - scale * (truth[:2] + truth[2:]) / 2
        frame = cv2.warpAffine(image, numpy.column_stack([scale * numpy.eye(2), shift]),
                               (640, 360), flags=cv2.INTER_AREA)
        boxes, count = low_res(frame), count + 1
        seen += len(boxes) and detector.iou(
            low_res.to_crop(boxes, 1.0), [scale * truth + numpy.tile(shift, 2)]).max() > 0.3
    assert seen >= 0.9 * count


def test_a_detector_without_a_low_resolution_variant_is_its_own():
    found = detector.Detector("test", lambda image: [[1, 1, 9, 9, 0.8]], (0, 0, 1))
    assert found.low_resolution() is found
    fast = detector.Detector("test", found.detect, (0, 0, 1), lambda image: [])
    assert len(fast(None)) == 1
    assert len(fast.low_resolution()(None)) == 0
    assert fast.with_retry().detect_low_res is None


@pytest.mark.parametrize("shape", [(360, 640), (640, 300)])
def test_yunet_boxes_are_those_in_a_padded_square(shape, shared):
    found = make("yunet", shared)
    image, truth = next(faces(shared, 1))
    scale = 250 / max(image.shape[:2])
    small = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    frame = numpy.full((*shape, 3), 127, numpy.uint8)
    frame[-small.shape[0]:, -small.shape[1]:] = small
    square = numpy.zeros((640, 640, 3), numpy.uint8)
    square[:shape[0], :shape[1]] = frame
    assert len(found(frame)) >= 1
    assert numpy.allclose(found(frame), found(square), atol=0.5)


def test_iou():
    table = detector.iou([[0, 0, 2, 2], [5, 5, 6, 6]], [[1, 0, 3, 2], [0, 0, 2, 2]])
    assert numpy.allclose(table, [[1 / 3, 1], [0, 0]])


def test_landmarks_match_the_crop_that_holds_their_centre():
    crops = [[0, 0, 8, 8], [4, 0, 12, 8], [20, 0, 28, 8]]
    # Landmarks of a small part of a face, beside a crop, and of a whole face.
    table = detector.match_scores([[5, 2, 7, 4], [12, 2, 14, 4], [19, 0, 27, 8]], crops)
    assert numpy.allclose(table, [[4 / 64, 4 / 64, 0], [0, 0, 0], [0, 0, 7 / 9]])
    found = detector.Detector("test", lambda image: [], (0, 0, 1 / 1.2))
    boxes = numpy.array([[0, 0, 9, 9, 0.9], [0, 0, 8, 8, 0.8], [20, 0, 28, 8, 0.7]])
    assert found.box_of_face(boxes, numpy.array([1, 1, 7, 7])).tolist() == [0, 0, 8, 8]
    assert found.box_of_face(boxes, numpy.array([9, 9, 19, 19])) is None
    assert found.box_of_face(boxes[:0], numpy.array([1, 1, 7, 7])) is None


def test_files_that_are_no_detector(tmp_path, shared):
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"not a model")
    for name, words in (("dlib", "no such file"), (tmp_path, "a folder"),
                        (broken, "not a readable")):
        with pytest.raises(UserError, match=words) as error:
            detector.get_detector(name)
        assert "\n" not in str(error.value)
        assert "haar" in str(error.value)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Replace the package of YuNet by an empty one; return its folder."""
    folder = tmp_path / "brings_yunet"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise ImportError('is not to be imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(detector, "PACKAGE", folder.name)
    for function in (detector.packaged_yunet, detector._note_haar):
        function.cache_clear()
    yield folder
    for function in (detector.packaged_yunet, detector._note_haar):
        function.cache_clear()


def test_auto_is_yunet_where_a_package_brings_it(package, shared):
    shutil.copy(shared / FILES["yunet"], package / "face_detection_yunet_2023mar.onnx")
    assert detector.get_detector("auto").name == "yunet"
    assert detector.get_detector("yunet").name == "yunet"


def test_auto_is_haar_where_no_package_brings_yunet(package, monkeypatch, capsys):
    for name in (package.name, "no_such_package"):
        monkeypatch.setattr(detector, "PACKAGE", name)
        detector.packaged_yunet.cache_clear()
        assert detector.get_detector("auto").name == "haar"
        with pytest.raises(UserError, match="detector yunet: no package .*; pip install"):
            detector.get_detector("yunet")
    # The page loads a detector for each viewer; the note comes once.
    assert capsys.readouterr().err.count("note: faces are searched with Haar") == 1


def test_the_package_of_the_requirement_brings_a_usable_file(shared):
    if detector.packaged_yunet() is None:
        pytest.skip(detector.INSTALL)
    found, relation = score(detector.get_detector("yunet"), shared, 12)
    assert found >= 0.95
    assert numpy.allclose(relation, [0, 0, 1], atol=0.06)


def test_another_model_is_recognised_by_its_outputs(tmp_path):
    onnx = pytest.importorskip("onnx")
    kind = onnx.TensorProto.FLOAT
    sides = [onnx.helper.make_tensor_value_info(name, kind, [1]) for name in ("image", "landmarks")]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["image"], ["landmarks"])], "g",
                                   sides[:1], sides[1:])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)],
                                   ir_version=8)
    onnx.save(model, tmp_path / "other.onnx")
    with pytest.raises(UserError, match="outputs landmarks is neither"):
        detector.get_detector(tmp_path / "other.onnx")
