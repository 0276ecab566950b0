"""Augmentation: painted dots move with the landmarks to a fraction of a pixel."""
import cv2
import numpy
import pytest

from utils.args import load_args
from utils.data import augment
from utils.landmarks import crop

STILL = {"rotation": 0, "scaling": 0, "shift": 0, "aspect": 0, "flip": 0, "colour": 0, "grey": 0,
         "blur": 0, "occlusion": 0}


def paint(size, points_px, spread=2.5):
    """A dark image with one blurred dot per point, each in a colour channel of its own."""
    y, x = numpy.mgrid[:size[1], :size[0]]
    image = numpy.zeros((size[1], size[0], 3))
    for channel, (px, py) in enumerate(points_px):
        dot = 255 * numpy.exp(-((x - px) ** 2 + (y - py) ** 2) / (2 * spread ** 2))
        image[..., channel] += dot
    return image.round().astype(numpy.uint8)


def centres(image):
    """The centre of each channel's dot in pixels."""
    y, x = numpy.mgrid[:image.shape[0], :image.shape[1]]
    weight = image.astype(float)
    weight[weight < 8] = 0
    return numpy.array([[(x * w).sum() / w.sum(), (y * w).sum() / w.sum()]
                        for w in weight.transpose(2, 0, 1)])


@pytest.mark.parametrize(("side", "size"),
                         [(100, 128), (100, 64), (300, 128), (600, 96), (700, 64)])
@pytest.mark.parametrize("corner", [(50.3, 61.8), (-20.4, -11.7)])
def test_a_dot_is_where_to_crop_maps_it(side, size, corner):
    box = numpy.array([*corner, corner[0] + side, corner[1] + 1.2 * side])
    units = numpy.array([[0.31, 0.42], [0.75, 0.33], [0.52, 0.81]])
    points = crop.to_photo(units, box)
    numpy.testing.assert_allclose(crop.to_crop(points, box), units, atol=1e-12)
    photo = paint((900, 1000), points, max(2.5, 2.5 * side / size))
    found = centres(crop.cut(photo, box, size))
    numpy.testing.assert_allclose(found, units * size - 0.5, atol=0.15)


@pytest.mark.parametrize(("side", "size"), [(100, 64), (300, 128), (700, 64)])
@pytest.mark.parametrize("roll", [0.2, -0.7, 2.0])
def test_a_dot_is_where_a_rotated_crop_maps_it(side, size, roll):
    box = numpy.array([150.3, 181.8, 150.3 + side, 181.8 + 1.1 * side])
    units = numpy.array([[0.31, 0.42], [0.75, 0.33], [0.52, 0.81]])
    centre = (box[None, :2] + box[None, 2:]) / 2
    points, = crop.rotate(crop.to_photo(units, box)[None], centre, numpy.array([roll]))
    photo = paint((1200, 1200), points, max(2.5, 2.5 * side / size))
    found = centres(crop.cut(photo, box, size, roll))
    numpy.testing.assert_allclose(found, units * size - 0.5, atol=0.15)


def test_a_box_off_the_photo_is_black():
    photo = numpy.full((50, 50, 3), 200, numpy.uint8)
    assert not crop.cut(photo, [100, 100, 200, 200], 32).any()
    assert not crop.cut(photo, [-900, -900, -500, -500], 32).any()
    half = crop.cut(photo, [-50, 0, 50, 100], 100)
    assert not half[:, :48].any()
    assert (half[2:45, 52:98] == 200).all()


def test_nominal_crop():
    box = numpy.array([40.0, 30, 140, 130])
    units = numpy.array([[0.2, 0.3], [0.8, 0.35], [0.5, 0.9]])
    photo = paint((200, 200), crop.to_photo(units, box))
    stored = crop.cut(photo, crop.grow(box, 1.6), 205)
    for size in (64, 128, 200):
        found = centres(augment.nominal_crop(stored, 1.6, size))
        numpy.testing.assert_allclose(found, units * size - 0.5, atol=0.1)
    assert augment.nominal_crop(stored, 1, 205) is stored


@pytest.mark.parametrize("settings", [
    {}, {"rotation": 40}, {"scaling": 0.2}, {"shift": 0.1}, {"aspect": 0.1}, {"flip": 1},
    {"rotation": 40, "scaling": 0.12, "shift": 0.08, "aspect": 0.05, "flip": 0.5}])
def test_dots_follow_the_landmarks(settings):
    flip = numpy.array([1, 0, 2])
    augmentation = augment.Augment(load_args({**STILL, **settings}), flip)
    units = numpy.array([[0.35, 0.4], [0.66, 0.44], [0.5, 0.7]])
    size, stored_size, margin = 96, 180, 1.6
    stored = paint((stored_size,) * 2, ((units - 0.5) / margin + 0.5) * stored_size - 0.5)
    changed = mirrored = 0
    for seed in range(12):
        image, landmarks = augmentation(stored, units, margin, size,
                                        numpy.random.default_rng(seed))
        assert image.shape == (size, size, 3)
        assert landmarks.dtype == numpy.float32
        changed += not numpy.allclose(landmarks, units, atol=1e-6)
        # The flip table exchanges left and right, so the red dot is point 1 of a mirrored face.
        was_mirrored = numpy.abs(centres(image)[0] / size - landmarks[1]).max() < 0.05
        mirrored += was_mirrored
        expected = landmarks[flip] if was_mirrored else landmarks
        numpy.testing.assert_allclose(centres(image), expected * size - 0.5, atol=0.35)
        # Point 0 stays left of point 1 along the eye line.
        eyes, down = landmarks[1] - landmarks[0], landmarks[2] - landmarks[:2].mean(0)
        assert eyes[0] * down[1] - eyes[1] * down[0] > 0
    assert changed >= (9 if settings and "rotation" not in settings else 5 if settings else 0)
    assert mirrored == 12 if settings.get("flip") == 1 else mirrored <= 11


def test_pixel_operations_do_not_move_landmarks():
    augmentation = augment.Augment(
        load_args({**STILL, "colour": 1, "grey": 1, "blur": 1, "occlusion": 1}),
        numpy.array([1, 0, 2]))
    stored = cv2.resize(numpy.random.default_rng(0).integers(0, 256, (9, 9, 3), numpy.uint8),
                        (102, 102))
    units = numpy.array([[0.35, 0.4], [0.66, 0.44], [0.5, 0.7]])
    seen = []
    for seed in range(40):
        image, landmarks = augmentation(stored, units, 1.6, 64, numpy.random.default_rng(seed))
        numpy.testing.assert_allclose(landmarks, units, atol=1e-6)
        again = augmentation(stored, units, 1.6, 64, numpy.random.default_rng(seed))[0]
        assert (image == again).all(), "the same generator gives the same image"
        assert image.dtype == numpy.uint8
        seen.append(image)
    assert len({image.tobytes() for image in seen}) == 40
