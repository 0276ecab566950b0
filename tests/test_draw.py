"""Drawing: landmarks in their colours and places, contact sheets, and the commands for them."""
import subprocess
import sys

import cv2
import numpy
import pytest
import yaml

from utils import draw
from utils.data import sheet
from utils.data.drawn_faces import render
from utils.errors import UserError
from utils.landmarks.schemes import SCHEMES

ROOT = draw.pathlib.Path(__file__).resolve().parent.parent


def test_points_are_drawn_in_the_colour_of_their_region():
    scheme = SCHEMES["300W"]
    points = numpy.stack([numpy.arange(68) % 10, numpy.arange(68) // 10], 1) * 20.0 + 20
    blank = numpy.zeros((200, 240, 3), numpy.uint8)
    image = draw.landmarks(blank, points, scheme, radius=4)
    assert blank.max() == 0
    for region, indices in scheme.regions.items():
        for i in indices:
            x, y = points[i].astype(int)
            assert tuple(image[y, x]) == draw.colour_of(region)


def test_landmarks_are_drawn_at_subpixel_positions():
    scheme = SCHEMES["300W"].subset([30])
    blank = numpy.zeros((40, 40, 3), numpy.uint8)
    image = draw.landmarks(blank, [[19.5, 22.25]], scheme, radius=5).astype(float).sum(2)
    y, x = numpy.mgrid[:40, :40]
    assert (image * x).sum() / image.sum() == pytest.approx(19.5, abs=0.1)
    assert (image * y).sum() / image.sum() == pytest.approx(22.25, abs=0.1)


@pytest.mark.parametrize("name", SCHEMES)
def test_regions_differ_in_colour(name):
    regions = SCHEMES[name].regions
    assert len({draw.colour_of(region) for region in regions}) == len(regions)
    assert draw.colours(SCHEMES[name]).shape == (SCHEMES[name].points, 3)


def test_a_region_of_a_custom_scheme_keeps_its_colour():
    assert draw.colour_of("left ear") == draw.colour_of("left ear") != draw.colour_of("right ear")


def test_a_landmark_of_low_confidence_is_smaller_and_darker():
    scheme = SCHEMES["300W"].subset([27, 30])
    points = [[20, 20], [60, 20]]
    blank = numpy.zeros((40, 80, 3), numpy.uint8)
    image = draw.landmarks(blank, points, scheme, confidence=[1, 0.1], radius=8).astype(int)
    assert image[20, 20].sum() > 1.5 * image[20, 60].sum()
    bright = image.sum(2) > 100
    assert bright[:, :40].sum() > 2 * bright[:, 40:].sum() > 0


def test_missing_points_and_faces_outside_the_image_are_no_error():
    scheme = SCHEMES["300W"]
    blank = numpy.zeros((50, 50, 3), numpy.uint8)
    points = numpy.full((68, 2), numpy.nan)
    assert draw.landmarks(blank, points, scheme, label="none").shape == blank.shape
    points[:] = 10
    points[3] = (500, -90)
    assert draw.landmarks(blank, points, scheme).max() > 0


def test_box_and_label_are_drawn():
    scheme = SCHEMES["eyes"]
    blank = numpy.zeros((120, 120, 3), numpy.uint8)
    points = scheme.mean_face * 40 + 40
    plain = draw.landmarks(blank, points, scheme)
    boxed = draw.landmarks(blank, points, scheme, box=(30, 35, 100, 105))
    assert boxed[105, 60].min() > 100
    assert plain[105, 60].max() == 0
    labelled = draw.landmarks(blank, points, scheme, label="face 1")
    assert (labelled != plain).any()


def test_text_covers_at_most_a_quarter_of_the_height():
    image = numpy.zeros((900, 600, 3), numpy.uint8)
    few, many = (draw.text_lines(image, [f"line {i}" for i in range(count)]) for count in (3, 40))
    rows = [numpy.flatnonzero(drawn.any((1, 2))).max() for drawn in (few, many)]
    assert 60 < rows[0] < 120 < rows[1] <= 240
    assert not image.any()
    assert draw.text_lines(image, []) is image


def test_text_fits_the_width_of_a_portrait_video():
    text = "1: eyes 100% 100%, 12 blinks/min, PERCLOS 10%"
    drawn = draw.text_lines(numpy.zeros((1280, 720, 3), numpy.uint8), [text])
    right = numpy.flatnonzero(drawn.any((0, 2))).max()
    assert 500 < right < 718
    # The size does not change with a digit more or less.
    text = text.replace("100%", "0%")
    shorter = draw.text_lines(numpy.zeros((1280, 720, 3), numpy.uint8), [text])
    rows = [numpy.flatnonzero(one.any((1, 2))).max() for one in (drawn, shorter)]
    assert rows[0] == rows[1]


SIZES = [(240, 320), (320, 240), (406, 720), (640, 480), (1080, 1920), (3840, 2160), (2160, 3840)]
LONG = ["30 FPS", "112: eyes 100% 97%, 112 blinks/min, PERCLOS 100%, unseen 59 s",
        "112: yaw -100, pitch +100, roll -180"]


@pytest.mark.parametrize("size", SIZES)
def test_lines_fit_any_format(size):
    image = numpy.full((size[1], size[0], 3), 128, numpy.uint8)
    drawn = draw.text_lines(image, LONG)
    y, x = numpy.nonzero(drawn[:size[1] // 2, :, 0] > 200)
    assert x.max() < size[0] - 1
    assert y.max() < size[1] / 3
    # The long line is wrapped rather than made small: letters have 8 px or more.
    assert y.max() > 30
    longer = draw.text_lines(image, [*LONG, LONG[1].replace("59", "60 more")])
    assert (longer != drawn).any()


@pytest.mark.parametrize("size", SIZES)
def test_a_headline_fits_any_format_at_one_height(size):
    image = numpy.full((size[1], size[0], 3), 255, numpy.uint8)
    states = ("awake", "microsleep", "not visible")
    heights = set()
    for state in states:
        drawn = draw.banner(image, state, (0, size[1]), size[1] / 10, (90, 200, 90), states)
        drawn = drawn[-size[1] // 5:]
        y, x = numpy.nonzero((drawn == 63).all(2))
        assert x.max() < size[0] - 1
        assert y.max() == len(drawn) - 1
        green = numpy.nonzero((drawn == (90, 200, 90)).all(2))[1]
        # All letters are on the dark background.
        assert green.max() < x.max()
        heights.add(y.max() - y.min())
    assert len(heights) == 1


def test_a_label_at_the_right_edge_is_whole():
    blank, scheme = numpy.full((100, 200, 3), 128, numpy.uint8), SCHEMES["eyes"]
    points, counts = scheme.mean_face * 30 + (160, 50), []
    for shift in (0, 100):
        plain, labelled = (draw.landmarks(blank, points - (shift, 0), scheme, label=label)
                           for label in (None, "1234567"))
        counts.append((labelled != plain).any(2).sum())
    assert counts[0] == pytest.approx(counts[1], rel=0.15)


def test_sheet_shape_and_order():
    images = [numpy.full((30 + i, 30, 3), 60 + 20 * i, numpy.uint8) for i in range(5)]
    page = draw.sheet(images, columns=3, size=40)
    assert page.shape == (80, 120, 3)
    assert page[15, 15, 0] == 60
    assert page[15, 95, 0] == 100
    assert page[55, 55, 0] == 140
    assert page[60, 100, 0] == 40
    assert draw.sheet(images[:2], columns=8, size=40).shape == (40, 80, 3)
    assert (draw.sheet(images, 3, 40, ["a"] * 5) != page).any()


@pytest.mark.parametrize("name", SCHEMES)
def test_scheme_picture_shows_every_region(name):
    image = draw.scheme_picture(SCHEMES[name], 300)
    assert image.shape == (300, 300, 3)
    for region in SCHEMES[name].regions:
        assert (numpy.abs(image.astype(int) - draw.colour_of(region)).max(2) < 12).any(), region


def make_set(folder, size=64, margin=1.5):
    """Make a prepared set of two drawn faces, whose nominal crop is the centre of the image."""
    stored = round(size * margin)
    scheme = SCHEMES["300W"]
    (folder / "images").mkdir(parents=True)
    lines = []
    for i in range(2):
        image, points = render.render((9, i), stored)
        cv2.imwrite(str(folder / "images" / f"{i}.png"), image[..., ::-1])
        units = ((points + 0.5) / stored - 0.5) * margin + 0.5
        lines.append(f"images/{i}.png " + " ".join(f"{v:.6f}" for v in units.flatten()))
    (folder / "train.txt").write_text("\n".join(lines) + "\n")
    (folder / "set.yaml").write_text(yaml.safe_dump(
        {"size": size, "margin": margin, "crop": {"rule": "square", "scale": 1.2},
         "scheme": scheme.state()}))
    return folder


def test_prepared_faces_have_their_landmarks(tmp_path):
    folder = make_set(tmp_path / "set")
    images = sheet.prepared(folder, "train", 5, stored_size=256)
    assert len(images) == 2
    _, points = render.render((9, 1), 256)
    colours = draw.colours(SCHEMES["300W"]).astype(int)
    x, y = numpy.round(points).astype(int).T
    # The drawn image has the colours of the landmarks at their true positions.
    far = numpy.abs(images[1][y, x] - colours).max(1)
    shifted = numpy.abs(images[1][y, x + 5] - colours).max(1)
    assert 2 * numpy.median(far) < numpy.median(shifted)


def test_command_draws_a_prepared_set(tmp_path):
    folder, output = make_set(tmp_path / "set"), tmp_path / "new" / "sheet.png"
    command = [sys.executable, "-m", "utils.data.sheet", str(folder), "--columns", "2", "--output",
               str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert cv2.imread(str(output)).shape == (160, 320, 3)


def test_commands_draw_schemes_and_samples(tmp_path):
    sheet.main(["--schemes", str(tmp_path / "schemes.png")])
    assert cv2.imread(str(tmp_path / "schemes.png")).shape == (960, 1440, 3)
    sheet.main(["--samples", "3", "--columns", "2", "--size", "50", "--output",
               str(tmp_path / "faces.jpg")])
    assert cv2.imread(str(tmp_path / "faces.jpg")).shape == (100, 100, 3)


def test_a_mistake_is_reported_in_two_lines(tmp_path):
    command = [sys.executable, "-m", "utils.data.sheet", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "set.yaml" in done.stderr
    assert len(done.stderr.splitlines()) <= 2


def test_mistakes_name_the_file(tmp_path):
    folder = make_set(tmp_path / "set")
    with pytest.raises(UserError, match="the set has train"):
        sheet.prepared(folder, "test")
    listing = folder / "train.txt"
    listing.write_text(listing.read_text().replace("images/1.png ", "images/1.png 0.5 "))
    with pytest.raises(UserError, match="train.txt:2"):
        sheet.prepared(folder)
    listing.write_text(listing.read_text().replace("images/0.png", "images/7.png"))
    with pytest.raises(UserError, match="images/7.png cannot be read"):
        sheet.prepared(folder)
    with pytest.raises(UserError, match="give the folder"):
        sheet.main([])
    with pytest.raises(UserError, match="1 or more"):
        sheet.main(["--samples", "0"])
    with pytest.raises(UserError, match="cannot be written"):
        draw.save(tmp_path / "picture.xyz", numpy.zeros((4, 4, 3), numpy.uint8))


def test_landmarks_without_confidence_are_not_drawn():
    image = numpy.zeros((100, 100, 3), numpy.uint8)
    scheme = SCHEMES["300W"]
    points = 20 + 60 * numpy.asarray(scheme.mean_face)
    confidence = numpy.where(points[:, 0] > 50, 0.0, 0.8)
    drawn = draw.landmarks(image, points, scheme, confidence, radius=1)
    assert drawn[:, :50].any()
    assert not drawn[:, 54:].any()
