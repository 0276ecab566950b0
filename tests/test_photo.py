"""Photos as phones and people store them: lying, cut off, of other formats."""
import cv2
import numpy
import PIL.Image
import pytest
import yaml

from utils.data.generator import DataGenerator
from utils.data.photo import read_photo, why_unread
from utils.errors import UserError

ORIENTATION = 0x0112


def lying(path, tag):
    """A JPEG whose EXIF shows it by `tag`; the picture as a person sees it, RGB (40, 60, 3)."""
    seen = PIL.Image.new("RGB", (60, 40))
    seen.paste((250, 30, 30), (0, 0, 15, 20))
    undo = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE",
            6: "ROTATE_90", 7: "TRANSVERSE", 8: "ROTATE_270"}[tag]
    exif = PIL.Image.Exif()
    exif[ORIENTATION] = tag
    seen.transpose(getattr(PIL.Image.Transpose, undo)).save(path, exif=exif, quality=95)
    return numpy.array(seen)


@pytest.mark.parametrize("tag", range(2, 9))
def test_every_orientation_is_read_as_a_person_sees_it(tmp_path, tag):
    seen = lying(tmp_path / "a.jpg", tag)
    read = read_photo(tmp_path / "a.jpg", upright=True)
    assert read.shape == seen.shape and abs(read.astype(int) - seen).mean() < 3
    stored = read_photo(tmp_path / "a.jpg")
    assert stored.shape != seen.shape or abs(stored.astype(int) - seen).mean() > 10


def own_set(folder, points):
    """A photo of tag 6 (60 x 40 to a person, 40 x 60 stored) with labels in a CSV file."""
    folder.mkdir()
    lying(folder / "a.jpg", 6)
    (folder / "faces.csv").write_text("a.jpg," + ",".join(map(str, points)) + "\n")
    (folder / "two.yaml").write_text(yaml.safe_dump({"name": "two", "points": 3,
                                                     "flip": [[0, 1]]}))
    return folder / "faces.csv", folder / "two.yaml"


def crop_of(folder):
    return read_photo(next((folder / "images").iterdir()))


def test_labels_of_own_photos_are_of_the_photo_as_seen(tmp_path):
    source, scheme = own_set(tmp_path / "own", [3, 3, 13, 3, 8, 15])
    red = {}
    for exif in (None, "ignore"):
        folder = DataGenerator(source, 32, tmp_path / str(exif), scheme=str(scheme), workers=1,
                               margin=1, val=0, exif=exif).run()
        red[exif] = crop_of(folder)[..., 0].mean()
    # The red corner lies under the points as seen, and elsewhere as stored.
    assert red[None] > 200 and red["ignore"] < 50


def test_labels_made_on_stored_pixels_get_a_line(tmp_path, capsys):
    source, scheme = own_set(tmp_path / "own", [5, 40, 25, 40, 15, 57])
    options = {"scheme": str(scheme), "workers": 1, "val": 0}
    with pytest.raises(UserError, match=r"60 x 40 as a person sees it, .*40 x 60.*--exif ignore"):
        DataGenerator(source, 32, tmp_path / "out", **options).run()
    DataGenerator(source, 32, tmp_path / "out", exif="ignore", **options).run()
    assert "1 faces in" in capsys.readouterr().out


def test_a_jpeg_that_was_cut_off_is_damaged(tmp_path):
    preview = cv2.imencode(".jpg", numpy.zeros((8, 8, 3), numpy.uint8))[1].tobytes()
    noise = numpy.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(numpy.uint8)
    whole = cv2.imencode(".jpg", noise)[1].tobytes()
    # A preview in an EXIF segment ends like a picture does.
    size = (len(preview) + 2).to_bytes(2, "big")
    whole = whole[:2] + b"\xff\xe1" + size + preview + whole[2:]
    path = tmp_path / "a.jpg"
    path.write_bytes(whole)
    assert read_photo(path).shape == (64, 64, 3)
    path.write_bytes(whole[:len(whole) * 2 // 3])
    assert read_photo(path) is None and "cut off" in why_unread(path)


def test_an_unread_heic_says_what_to_do(tmp_path):
    path = tmp_path / "a.heic"
    path.write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))
    assert read_photo(path) is None and "convert it to JPEG" in why_unread(path)


@pytest.mark.parametrize("mode, value", [("L", 90), ("P", 90), ("CMYK", (0, 0, 0, 100)),
                                         ("I;16", 90 * 257)])
def test_other_depths_and_channels(tmp_path, mode, value):
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    image = PIL.Image.new(mode, (9, 7), value)
    if mode == "P":
        image.putpalette([90] * 768)
    image.save(path)
    read = read_photo(path)
    assert read.shape == (7, 9, 3) and read.dtype == numpy.uint8
    assert abs(read.astype(int) - (155 if mode == "CMYK" else 90)).max() <= 2
