"""Crops of faces in a photo: laid by the training rule, turned, laid again."""
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
def test_crops_are_turned_with_a_tilted_head(scheme, roll):
    predictor = painted_faces.Painted(SCHEMES[scheme])
    box = numpy.array([[20.0, 30.0, 120.0, 130.0]])
    centre, turned = numpy.array([[70.0, 80.0]]), numpy.array([roll])
    mean = crop.to_photo(predictor.scheme.mean_face, box[0])[None]
    tilted = crop.turn(mean, centre, turned)
    assert crop.rolls(tilted, predictor.scheme) == pytest.approx(turned)
    boxes, rolls = refine.place_crops(predictor, tilted)
    assert rolls == pytest.approx(max(abs(roll) - refine.TILTED, 0) * numpy.sign(roll))
    # As an upright face's crop, but for the rest of the tilt; what is seen there is turned back.
    expected = refine.place_crops(predictor, crop.turn(tilted, centre, -rolls))[0]
    numpy.testing.assert_allclose(boxes[:, 2:] - boxes[:, :2], expected[:, 2:] - expected[:, :2])
    middle = (expected[:, None, :2] + expected[:, None, 2:]) / 2
    numpy.testing.assert_allclose((boxes[:, :2] + boxes[:, 2:]) / 2,
                                  crop.turn(middle, centre, rolls)[:, 0])
    image = painted_faces.background()
    straight, _ = refine.predict_boxes(predictor, image, box)
    assert numpy.allclose(refine.predict_boxes(predictor, image, box, turned)[0],
                          crop.turn(straight, centre, turned))


def test_schemes_without_eyes_are_not_turned():
    scheme = SCHEMES["300W"].subset(range(17))
    points = crop.turn(scheme.mean_face[None] * 100, numpy.full((1, 2), 50.0), numpy.array([0.7]))
    assert not refine.crop_rolls(points, scheme).any()


def test_refine_lays_the_crop_again():
    image = painted_faces.paint(painted_faces.background(), (1, 150, 120, 60), (2, 60, 60, 40))
    rough = [[105, 90, 180, 165], [35, 34, 85, 86]]
    predictor = painted_faces.Painted()
    points, confidence, boxes = refine.refine(predictor, image, rough)
    assert predictor.batches == [2, 2, 1], "only what was moved far is looked at once more"
    assert points.shape == (2, 68, 2)
    assert confidence.shape == (2, 68)
    assert numpy.allclose(boxes, [[114, 84, 186, 156], [36, 36, 84, 84]], atol=2.5)
    assert numpy.allclose(points[0].mean(0), predictor.shape.mean(0) * 60 + [120, 90], atol=1.5)


def test_a_crop_much_too_large_gets_a_third_pass():
    image = painted_faces.paint(painted_faces.background(), (1, 150, 120, 60), (2, 60, 60, 40))
    predictor = painted_faces.Painted()
    _, _, boxes = refine.refine(predictor, image, [[78, 48, 222, 192], [35, 34, 85, 86]])
    assert predictor.batches == [2, 2, 1]
    assert numpy.allclose(boxes, [[114, 84, 186, 156], [36, 36, 84, 84]], atol=2.5)


@pytest.mark.parametrize("quarter", [0, 1, 2, 3])
def test_a_head_on_its_side_is_seen_upright(quarter):
    class Sees(painted_faces.Painted):
        """Is sure of the mean face where the top of the crop is bright and its bottom dark."""
        def __call__(self, images):
            self.batches.append(len(images))
            sure = [0.7 if image[:SIZE // 4].mean() - image[-SIZE // 4:].mean() > 215 else 0.3
                    for image in images]
            return (numpy.tile(self.scheme.mean_face, (len(images), 1, 1)),
                    numpy.tile(numpy.array(sure)[:, None], 68))

    SIZE, predictor = painted_faces.SIZE, Sees()
    upright = numpy.zeros((200, 200, 3), numpy.uint8)
    upright[:100] = 255
    image = numpy.ascontiguousarray(numpy.rot90(upright, -quarter))
    points, confidence, _ = refine.refine(predictor, image, [[40, 40, 160, 160]])
    assert predictor.batches[:2] == [1, len(refine.TURNS)]
    assert confidence.mean() == pytest.approx(0.7)
    found, = crop.rolls(points, predictor.scheme)
    assert abs(numpy.angle(numpy.exp(1j * (found - quarter * numpy.pi / 2)))) < refine.TILTED + 1e-6


def test_the_crops_of_turned_heads_lie_where_a_detector_has_them():
    # A detector's box about a head: its landmarks have their middle below that of the box.
    middle, side = numpy.array([300.0, 200.0]), 120.0
    below = numpy.array([[[0.0, refine.BELOW * side]]])
    crops = [numpy.concatenate([centre - side / 2, centre + side / 2]) for centre in (
        middle + crop.turn(below, numpy.zeros((1, 2)), numpy.array([roll]))[0, 0]
        for roll in (0, *refine.TURNS))]
    numpy.testing.assert_allclose(refine._turned(crops[0]), crops[1:])
    # Of a head turned clockwise by a quarter the chin is on the left.
    quarter, half = (1 + list(refine.TURNS).index(turn) for turn in (numpy.pi / 2, numpy.pi))
    assert crops[quarter][0] < crops[0][0]
    assert crops[half][1] < crops[0][1]


def test_no_boxes_no_call():
    predictor = painted_faces.Painted()
    points, confidence, boxes = refine.refine(predictor, painted_faces.background(), [])
    assert points.shape == (0, 68, 2)
    assert confidence.shape == (0, 68)
    assert boxes.shape == (0, 4)
    assert predictor.batches == []
