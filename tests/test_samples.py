"""Drawn faces: reproducible, different for each seed, with landmarks that fit the picture."""
import numpy
import pytest

from utils.data import generator, sets
from utils.data.drawn_faces import render
from utils.data.drawn_faces.shape import CONTROLS, pose, smooth
from utils.data.readers import drawn as reader
from utils.errors import UserError
from utils.landmarks import crop
from utils.landmarks.schemes import SCHEMES

SCHEME = SCHEMES["300W"]


def test_a_seed_gives_the_same_face_every_time():
    first, points = render.render((0, 7))
    again, points_again = render.render((0, 7))
    assert first.dtype == numpy.uint8
    assert first.shape == (320, 320, 3)
    assert points.shape == (68, 2)
    numpy.testing.assert_array_equal(first, again)
    numpy.testing.assert_array_equal(points, points_again)


def test_global_random_state_changes_nothing():
    numpy.random.seed(1)
    first = render.render(3)[0]
    numpy.random.seed(2)
    numpy.testing.assert_array_equal(first, render.render(3)[0])


def test_seeds_give_different_faces():
    faces = [render.render(seed) for seed in ((0, 1), (1, 0), (1, 1), 2, 3)]
    for i, (image, points) in enumerate(faces):
        for other, other_points in faces[:i]:
            assert numpy.abs(image.astype(int) - other).mean() > 5
            assert numpy.abs(points - other_points).max() > 1


def test_points_without_rasterising_are_the_same():
    for seed in range(5):
        image, points = render.render(seed, rasterise=False)
        assert image is None
        numpy.testing.assert_array_equal(points, render.render(seed)[1])


@pytest.mark.parametrize("size", [64, 160, 321])
def test_points_scale_with_the_picture(size):
    image, points = render.render(11, size)
    assert image.shape == (size, size, 3)
    numpy.testing.assert_allclose(points / size, render.render(11, 320)[1] / 320, atol=1e-9)


def test_faces_lie_in_the_picture_and_cover_about_half_of_it():
    for seed in range(300):
        _, points = render.render((5, seed), rasterise=False)
        assert numpy.isfinite(points).all()
        assert points.min() > 320 * 0.15
        assert points.max() < 320 * 0.85
        side = numpy.ptp(points, axis=0).max() / 320
        assert 0.39 < side < 0.49


def test_the_mean_of_drawn_faces_is_about_the_mean_face_of_300w():
    drawn = []
    for seed in range(300):
        points = render.render((6, seed), rasterise=False)[1]
        drawn.append(crop.to_crop(points, crop.face_box(points, "stretch", 1.1)))
    assert numpy.linalg.norm(numpy.mean(drawn, 0) - SCHEME.mean_face, axis=1).max() < 0.06
    # Poses and shapes vary as much as in photos.
    spread = numpy.linalg.norm(numpy.std(drawn, 0), axis=1).mean()
    assert 0.04 < spread < 0.15


class Posed:
    """A random generator with a fixed pose in degrees, whose other values are the middle ones."""

    def __init__(self, yaw=0.0, pitch=0.0, roll=0.0):
        self.angles = (yaw, pitch, roll)

    def normal(self, mean, sigma, size=None):
        return numpy.array(self.angles)

    def uniform(self, low, high, size=None):
        middle = (low + high) / 2
        return middle if size is None else numpy.full(size, middle)


def nose_offset(yaw):
    points = pose(Posed(yaw=yaw), CONTROLS, 320)[1]
    return (points[30, 0] - (points[36, 0] + points[45, 0]) / 2) / numpy.ptp(points[:, 0])


def test_turning_right_moves_the_nose_right_by_as_much_as_turning_left():
    assert nose_offset(25) > 0.05
    assert nose_offset(40) > nose_offset(25)
    assert nose_offset(-25) == pytest.approx(-nose_offset(25), abs=0.01)


def test_a_turned_face_is_the_mirror_of_one_turned_the_other_way():
    right, left = (pose(Posed(yaw=yaw), CONTROLS, 320)[1] for yaw in (30, -30))
    mirrored = left[SCHEME.flip]
    mirrored[:, 0] = 2 * 159.999 - mirrored[:, 0]
    assert numpy.abs(right - mirrored).max() < 1.5


def test_rolling_turns_the_eyes_and_looking_down_lowers_the_nose():
    level = pose(Posed(), CONTROLS, 320)[1]
    rolled = pose(Posed(roll=20), CONTROLS, 320)[1]
    across = rolled[45] - rolled[36]
    assert numpy.degrees(numpy.arctan2(across[1], across[0])) == pytest.approx(20, abs=1)

    def nose(points):
        return (points[30, 1] - points[[36, 45], 1].mean()) / numpy.ptp(points[:, 1])

    assert nose(pose(Posed(pitch=20), CONTROLS, 320)[1]) > nose(level) + 0.03


def test_the_hidden_cheek_bounds_the_jaw():
    points = pose(Posed(yaw=40), CONTROLS, 320)[1]
    # The hidden points of the far jaw lie on the contour, outside the other landmarks.
    assert points[12:17, 0].min() > points[45, 0] - 2
    assert points[14, 0] > points[54, 0]


def test_dark_pupils_and_lips_lie_where_the_points_say():
    # On most faces the eyes are darker and the lips are redder than the cheek.
    darker = redder = 0
    for seed in range(24):
        image, points = render.render((7, seed))
        grey = image.astype(float).mean(2)

        def mean(indices, values, points=points):
            x, y = points[indices].mean(0)
            return values[int(y) - 3:int(y) + 4, int(x) - 3:int(x) + 4].mean()

        for eye in (range(36, 42), range(42, 48)):
            side = [31, 2] if eye[0] == 36 else [35, 14]
            darker += mean(list(eye), grey) < mean(side, grey)
        red = image[..., 0].astype(float) - image[..., 1]
        redder += mean([57, 66], red) > mean([57, 57, 8], red) - 1
    assert darker > 0.7 * 48
    assert redder > 0.55 * 24


def test_the_curve_passes_through_its_points():
    points = numpy.random.default_rng(0).normal(size=(6, 2))
    numpy.testing.assert_allclose(smooth(points, steps=4)[::4], points)
    numpy.testing.assert_allclose(smooth(points, closed=False, steps=3)[::3], points)


def test_reader_draws_splits_that_share_no_face():
    faces = reader.draw({"train": 12, "test": 6})
    assert [f.lists for f in faces] == [("train",)] * 12 + [("test",)] * 6
    assert len({f.name for f in faces}) == len({f.group for f in faces}) == 18
    shapes = {tuple(f.points.flatten()) for f in faces}
    assert len(shapes) == 18


def test_reader_redraws_the_picture_that_belongs_to_the_points():
    face = reader.draw({"test": 3})[2]
    image, points = render.render((1, 2))
    numpy.testing.assert_array_equal(reader.image_of(face), image)
    numpy.testing.assert_array_equal(face.points, points)


def test_reader_refuses_what_it_cannot_draw():
    with pytest.raises(UserError, match="'val'"):
        reader.draw({"val": 3})
    with pytest.raises(UserError, match="-1"):
        reader.draw({"train": -1})


def test_reader_follows_the_protocol(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "COUNTS", {"train": 2, "test": 1})
    problems = []
    assert not reader.matches(tmp_path)
    assert [f.name for f in reader.read(tmp_path, problems)] == ["train_000000", "train_000001",
                                                                 "test_000000"]
    assert problems == []


class Drawer:
    """Stands in for DataGenerator and writes only test.txt."""

    def __init__(self, data_dir, size, output, layout):
        self.output = output

    def run(self):
        self.output.mkdir()
        (self.output / "test.txt").touch()


def test_an_interrupted_set_is_drawn_again_and_other_folders_are_not_touched(tmp_path, monkeypatch):
    monkeypatch.setattr(sets, "ROOT", tmp_path)
    monkeypatch.setattr(generator, "DataGenerator", Drawer)
    folder = tmp_path / "samples-64"
    (folder / "mine").mkdir(parents=True)
    with pytest.raises(UserError, match="exists and is no prepared set"):
        sets.prepare_samples(64)
    assert (folder / "mine").is_dir()
    (folder / "set.yaml").touch()
    assert sets.prepare_samples(64) == folder
    assert [path.name for path in tmp_path.rglob("*")] == ["samples-64", "test.txt"]
