"""Crop refinement: crops by the training rule, rotated crops, and passes of `refine`."""
import numpy
import pytest
from helpers import painted_faces

from utils.detection import refine
from utils.landmarks import crop
from utils.landmarks.schemes import SCHEMES


@pytest.mark.parametrize("rule", ["square", "stretch"])
def test_crops_follow_the_training_rule(rule):
    faces = numpy.random.default_rng(0).uniform(10, 200, (5, 68, 2)) * [1, 0.7]
    found = crop.face_boxes(faces, {"rule": rule, "scale": 1.2}, SCHEMES["300W"])
    expected = [crop.face_box(face, rule, 1.2) for face in faces]
    assert numpy.allclose(found, expected)


@pytest.mark.parametrize("predictor", [painted_faces.Painted(SCHEMES["eyes"]),
                                       painted_faces.Painted(rule="box")])
def test_crops_of_subsets_and_boxes_fit_the_mean_face(predictor):
    box = numpy.array([20.0, 30.0, 120.0, 130.0])
    points = crop.to_photo(predictor.scheme.mean_face, box)
    assert numpy.allclose(crop.face_boxes(points[None], predictor.crop, predictor.scheme)[0], box)
    # Turned about the crop's centre by 30 degrees the crop stays where it is.
    turn = numpy.array([[0.75 ** 0.5, 0.5], [-0.5, 0.75 ** 0.5]])
    turned = (points - [70, 80]) @ turn + [70, 80]
    assert numpy.allclose(crop.face_boxes(turned[None], predictor.crop, predictor.scheme)[0], box)


@pytest.mark.parametrize("scheme", ["300W", "eyes"])
@pytest.mark.parametrize("roll", [-0.9, 0.05, 0.7])
def test_crops_are_rotated_with_a_tilted_head(scheme, roll):
    predictor = painted_faces.Painted(SCHEMES[scheme])
    box = numpy.array([[20.0, 30.0, 120.0, 130.0]])
    centre, turned = numpy.array([[70.0, 80.0]]), numpy.array([roll])
    mean = crop.to_photo(predictor.scheme.mean_face, box[0])[None]
    tilted = crop.rotate(mean, centre, turned)
    assert crop.roll_angles(tilted, predictor.scheme) == pytest.approx(turned)
    boxes, rolls = refine.place_crops(predictor, tilted)
    assert rolls == pytest.approx(max(abs(roll) - refine.MAX_UPRIGHT_ROLL, 0) * numpy.sign(roll))
    # The rotated crop equals the upright crop of the face rotated back by the same roll.
    expected = refine.place_crops(predictor, crop.rotate(tilted, centre, -rolls))[0]
    numpy.testing.assert_allclose(boxes[:, 2:] - boxes[:, :2], expected[:, 2:] - expected[:, :2])
    middle = (expected[:, None, :2] + expected[:, None, 2:]) / 2
    numpy.testing.assert_allclose((boxes[:, :2] + boxes[:, 2:]) / 2,
                                  crop.rotate(middle, centre, rolls)[:, 0])
    image = painted_faces.background()
    straight, _ = refine.predict_boxes(predictor, image, box)
    assert numpy.allclose(refine.predict_boxes(predictor, image, box, turned)[0],
                          crop.rotate(straight, centre, turned))


def test_crops_of_schemes_without_eyes_are_not_rotated():
    scheme = SCHEMES["300W"].subset(range(17))
    points = crop.rotate(scheme.mean_face[None] * 100, numpy.full((1, 2), 50.0), numpy.array([0.7]))
    assert not refine.crop_rolls(points, scheme).any()


def test_refine_moves_the_crop():
    image = painted_faces.paint(painted_faces.background(), (1, 150, 120, 60), (2, 60, 60, 40))
    rough = [[105, 90, 180, 165], [35, 34, 85, 86]]
    predictor = painted_faces.Painted()
    points, confidence, boxes = refine.refine(predictor, image, rough)
    assert predictor.batches == [2, 2, 1], "only the crop that moved far gets a third pass"
    assert points.shape == (2, 68, 2)
    assert confidence.shape == (2, 68)
    assert numpy.allclose(boxes, [[114, 84, 186, 156], [36, 36, 84, 84]], atol=2.5)
    assert numpy.allclose(points[0].mean(0), predictor.shape.mean(0) * 60 + [120, 90], atol=1.5)


def test_a_crop_twice_too_large_gets_a_third_pass():
    image = painted_faces.paint(painted_faces.background(), (1, 150, 120, 60), (2, 60, 60, 40))
    predictor = painted_faces.Painted()
    _, _, boxes = refine.refine(predictor, image, [[78, 48, 222, 192], [35, 34, 85, 86]])
    assert predictor.batches == [2, 2, 1]
    assert numpy.allclose(boxes, [[114, 84, 186, 156], [36, 36, 84, 84]], atol=2.5)


@pytest.mark.parametrize("quarter", [0, 1, 2, 3])
def test_a_rotated_head_is_found_in_a_rotated_crop(quarter):
    class BrightTop(painted_faces.Painted):
        """Is confident where the top of the crop is bright and its bottom dark."""
        def __call__(self, images):
            self.batches.append(len(images))
            scores = [0.7 if image[:SIZE // 4].mean() - image[-SIZE // 4:].mean() > 215 else 0.3
                    for image in images]
            return (numpy.tile(self.scheme.mean_face, (len(images), 1, 1)),
                    numpy.tile(numpy.array(scores)[:, None], 68))

    SIZE, predictor = painted_faces.SIZE, BrightTop()
    upright = numpy.zeros((200, 200, 3), numpy.uint8)
    upright[:100] = 255
    image = numpy.ascontiguousarray(numpy.rot90(upright, -quarter))
    points, confidence, _ = refine.refine(predictor, image, [[40, 40, 160, 160]])
    assert predictor.batches[:2] == [1, len(refine.TRIAL_ROLLS)]
    assert confidence.mean() == pytest.approx(0.7)
    found, = crop.roll_angles(points, predictor.scheme)
    error = numpy.angle(numpy.exp(1j * (found - quarter * numpy.pi / 2)))
    assert abs(error) < refine.MAX_UPRIGHT_ROLL + 1e-6


def test_trial_crops_lie_where_a_detector_places_rotated_heads():
    # The centre of an upright face's landmarks is below that of the detector's box.
    middle, side = numpy.array([300.0, 200.0]), 120.0
    below = numpy.array([[[0.0, refine.CENTRE_SHIFT * side]]])
    crops = [numpy.concatenate([centre - side / 2, centre + side / 2]) for centre in (
        middle + crop.rotate(below, numpy.zeros((1, 2)), numpy.array([roll]))[0, 0]
        for roll in (0, *refine.TRIAL_ROLLS))]
    numpy.testing.assert_allclose(refine._trial_crops(crops[0]), crops[1:])
    # The chin of a head rotated clockwise by 90 degrees is on the left.
    quarter, half = (1 + list(refine.TRIAL_ROLLS).index(turn) for turn in (numpy.pi / 2, numpy.pi))
    assert crops[quarter][0] < crops[0][0]
    assert crops[half][1] < crops[0][1]


def test_no_boxes_need_no_prediction():
    predictor = painted_faces.Painted()
    points, confidence, boxes = refine.refine(predictor, painted_faces.background(), [])
    assert points.shape == (0, 68, 2)
    assert confidence.shape == (0, 68)
    assert boxes.shape == (0, 4)
    assert predictor.batches == []
