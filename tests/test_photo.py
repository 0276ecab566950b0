"""Photos with EXIF orientation, cut off, and of other formats, depths and channels."""
import sys
import types

import cv2
import numpy
import PIL.Image
import PIL.ImageFile
import pytest
import yaml
from helpers.own_sets import FACE, FIVE

from utils.data import unlabelled
from utils.data.dataset import PreparedSet
from utils.data.generator import DataGenerator
from utils.data.photo import is_left_out, read_photo, why_unread
from utils.data.unlabelled import photos_in
from utils.errors import UserError
from utils.evaluation import boxes

ORIENTATION = 0x0112


def lying(path, tag):
    """Write a JPEG with EXIF orientation `tag`; return the upright picture, RGB (40, 60, 3)."""
    seen = PIL.Image.new("RGB", (60, 40))
    seen.paste((250, 30, 30), (0, 0, 15, 20))
    undo = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE",
            6: "ROTATE_90", 7: "TRANSVERSE", 8: "ROTATE_270"}[tag]
    exif = PIL.Image.Exif()
    exif[ORIENTATION] = tag
    seen.transpose(getattr(PIL.Image.Transpose, undo)).save(path, exif=exif, quality=95)
    return numpy.array(seen)


@pytest.mark.parametrize("tag", range(2, 9))
def test_every_orientation_is_applied(tmp_path, tag):
    seen = lying(tmp_path / "a.jpg", tag)
    read = read_photo(tmp_path / "a.jpg", upright=True)
    assert read.shape == seen.shape
    assert abs(read.astype(int) - seen).mean() < 3
    stored = read_photo(tmp_path / "a.jpg")
    assert stored.shape != seen.shape or abs(stored.astype(int) - seen).mean() > 10


def own_set(folder, points):
    """Write a photo of tag 6 (60 x 40 upright, 40 x 60 as stored) with labels in a CSV file."""
    folder.mkdir()
    lying(folder / "a.jpg", 6)
    (folder / "faces.csv").write_text("a.jpg," + ",".join(map(str, points)) + "\n")
    (folder / "two.yaml").write_text(yaml.safe_dump({"name": "two", "points": 3,
                                                     "flip": [[0, 1]]}))
    return folder / "faces.csv", folder / "two.yaml"


def crop_of(folder):
    return read_photo(next((folder / "images").iterdir()))


def test_labels_of_own_data_refer_to_the_upright_photo(tmp_path):
    source, scheme = own_set(tmp_path / "own", [3, 3, 13, 3, 8, 15])
    red = {}
    for exif in (None, "ignore"):
        folder = DataGenerator(source, 32, tmp_path / str(exif), scheme=str(scheme), workers=1,
                               margin=1, val=0, exif=exif).run()
        red[exif] = crop_of(folder)[..., 0].mean()
    # The red corner is under the points of the upright photo, not of the stored one.
    assert red[None] > 200
    assert red["ignore"] < 50


def test_labels_made_on_stored_pixels_get_a_hint(tmp_path, capsys):
    source, scheme = own_set(tmp_path / "own", [5, 40, 25, 40, 15, 57])
    options = {"scheme": str(scheme), "workers": 1, "val": 0}
    with pytest.raises(UserError, match="60 x 40 with its EXIF orientation applied, .*40 x 60"
                                         ".*--exif ignore"):
        DataGenerator(source, 32, tmp_path / "out", **options).run()
    DataGenerator(source, 32, tmp_path / "out", exif="ignore", **options).run()
    assert "1 faces in" in capsys.readouterr().out


def test_a_jpeg_that_was_cut_off_is_damaged(tmp_path):
    preview = cv2.imencode(".jpg", numpy.zeros((8, 8, 3), numpy.uint8))[1].tobytes()
    noise = numpy.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(numpy.uint8)
    whole = cv2.imencode(".jpg", noise)[1].tobytes()
    # A preview in an EXIF segment has an end marker of its own.
    size = (len(preview) + 2).to_bytes(2, "big")
    whole = whole[:2] + b"\xff\xe1" + size + preview + whole[2:]
    path = tmp_path / "a.jpg"
    path.write_bytes(whole)
    assert read_photo(path).shape == (64, 64, 3)
    path.write_bytes(whole[:len(whole) * 2 // 3])
    assert read_photo(path) is None
    assert "cut off" in why_unread(path)


@pytest.mark.parametrize(("brand", "package"), [(b"heic", "pip install -U pillow-heif,"),
                                            (b"avif", "pip install -U pillow,")])
def test_why_unread_names_the_package_for_heic_and_avif(tmp_path, brand, package):
    path = tmp_path / "a.heic"
    path.write_bytes(b"\0\0\0\x18ftyp" + brand + bytes(40))
    assert read_photo(path) is None
    assert package in why_unread(path)
    assert "convert it to JPEG" in why_unread(path)


def test_heic_is_read_if_pillow_heif_is_installed(tmp_path, monkeypatch):
    """A stand-in for pillow_heif, whose opener makes a grey picture of anything."""
    class Grey(PIL.ImageFile.ImageFile):
        format = "HEIF"

        def _open(self):
            self._size, self._mode = (9, 7), "L"

        def load(self):
            self.im = PIL.Image.new("L", (9, 7), 90).im

    path = tmp_path / "a.heic"
    path.write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))
    monkeypatch.setattr(PIL.Image, "OPEN", dict(PIL.Image.OPEN))
    monkeypatch.setattr(PIL.Image, "ID", list(PIL.Image.ID))
    accept = types.SimpleNamespace(register_heif_opener=lambda: PIL.Image.register_open(
        "HEIF", Grey, lambda prefix: prefix[4:12] == b"ftypheic"))
    monkeypatch.setitem(sys.modules, "pillow_heif", accept)
    assert read_photo(path, upright=True).tolist() == numpy.full((7, 9, 3), 90).tolist()


@pytest.mark.parametrize("suffix", ["gif", "webp"])
def test_the_first_picture_of_an_animation_is_read(tmp_path, suffix):
    first, second = (PIL.Image.new("RGB", (9, 7), colour) for colour in ("red", "blue"))
    first.save(tmp_path / f"a.{suffix}", save_all=True, append_images=[second])
    assert abs(read_photo(tmp_path / f"a.{suffix}").astype(int) - (255, 0, 0)).max() < 9


@pytest.mark.parametrize("bits", [10, 12, 16])
def test_images_with_10_12_or_16_bits_are_scaled_to_8(tmp_path, bits):
    image = numpy.linspace(0, (1 << bits) - 1, 256).round().astype(numpy.uint16).reshape(16, 16)
    (tmp_path / "a.png").write_bytes(cv2.imencode(".png", image)[1])
    read = read_photo(tmp_path / "a.png").astype(int)
    assert abs(read[..., 0] - numpy.arange(256).reshape(16, 16)).max() <= 1


@pytest.mark.parametrize(("mode", "suffix"), [("RGBA", "png"), ("LA", "png"), ("P", "png"),
                                          ("P", "gif"), ("RGBA", "webp"), ("RGBA", "tif"),
                                          ("16", "png")])
def test_transparent_pixels_become_white(tmp_path, mode, suffix):
    path = tmp_path / f"a.{suffix}"
    if mode == "16":
        image = numpy.full((7, 9, 4), 90 * 257, numpy.uint16)
        image[:, :4, 3] = 0
        image[:, 4:, 3] = 65535
        path.write_bytes(cv2.imencode(".png", image)[1])
    elif mode == "P":
        image = PIL.Image.new("P", (9, 7), 1)
        image.putpalette([0] * 3 + [90] * 3)
        image.paste(0, (0, 0, 4, 7))
        image.save(path, transparency=0)
    else:
        colour = (90,) * (len(mode) - 1)
        image = PIL.Image.new(mode, (9, 7), (*colour, 255))
        image.paste((*colour, 0), (0, 0, 4, 7))
        image.save(path, **({"lossless": True, "exact": True} if suffix == "webp" else {}))
    read = read_photo(path).astype(int)
    assert (read[:, :4] == 255).all()
    assert abs(read[:, 4:] - 90).max() <= 2


@pytest.mark.parametrize("suffix", ["png", "webp", "tif", "avif"])
def test_files_of_other_formats_that_were_cut_off_are_damaged(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    noise = numpy.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(numpy.uint8)
    PIL.Image.fromarray(noise).save(path)
    assert read_photo(path).shape == (64, 64, 3)
    path.write_bytes(path.read_bytes()[:path.stat().st_size * 2 // 3])
    assert read_photo(path) is None
    assert "damaged" in why_unread(path)


@pytest.mark.parametrize("suffix", ["png", "webp", "tif", "avif"])
def test_orientation_of_other_formats(tmp_path, suffix):
    lying(tmp_path / "a.jpg", 6)
    exif = PIL.Image.Exif()
    exif[ORIENTATION] = 6
    stored = PIL.Image.fromarray(read_photo(tmp_path / "a.jpg"))
    stored.save(tmp_path / f"a.{suffix}", exif=exif)
    seen = read_photo(tmp_path / "a.jpg", upright=True)
    read = read_photo(tmp_path / f"a.{suffix}", upright=True)
    assert read.shape == seen.shape
    assert abs(read.astype(int) - seen).mean() < 5


def test_photos_of_all_listed_formats_are_read_or_reported(tmp_path, capsys):
    """HEIC without its package is reported with the package's name."""
    (tmp_path / "own").mkdir()
    for suffix in ("webp", "tif", "tiff", "gif", "PNG"):
        PIL.Image.new("RGB", (60, 60), "white").save(tmp_path / "own" / f"{suffix}.{suffix}")
    (tmp_path / "own" / "heic.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))
    for path in list((tmp_path / "own").iterdir()):
        path.with_suffix(".pts").write_text("version: 1\n{\n10 10\n40 10\n20 40\n}\n")
    (tmp_path / "three.yaml").write_text("name: three\npoints: 3\nflip: [[0, 1]]\n")
    folder = DataGenerator(tmp_path / "own", 32, tmp_path / "set", workers=1,
                           scheme=str(tmp_path / "three.yaml")).run()
    assert len(list((folder / "images").iterdir())) == 5
    assert "heic.heic: the image cannot be read: HEIC needs a reader" in capsys.readouterr().out


@pytest.mark.parametrize(("mode", "value"), [("L", 90), ("P", 90), ("CMYK", (0, 0, 0, 100)),
                                         ("I;16", 90 * 257)])
def test_other_depths_and_channels(tmp_path, mode, value):
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    image = PIL.Image.new(mode, (9, 7), value)
    if mode == "P":
        image.putpalette([90] * 768)
    image.save(path)
    read = read_photo(path)
    assert read.shape == (7, 9, 3)
    assert read.dtype == numpy.uint8
    assert abs(read.astype(int) - (155 if mode == "CMYK" else 90)).max() <= 2


class Lying:
    """A detector that returns the face of `own_set` in the upright photo."""
    name = "test"

    def __init__(self):
        self.seen = []

    def __call__(self, image):
        self.seen.append(image.shape)
        return numpy.array([[3, 3, 13, 15, 1.0]])

    def to_crop(self, boxes, scale):
        return numpy.reshape(boxes, (-1, boxes.shape[-1]))[:, :4]

    def box_of_face(self, boxes, face):
        return boxes[0, :4]


class MeanFace:
    """A predictor that finds the mean face in every crop."""
    input_size = 32

    def __init__(self, prepared):
        self.scheme, self.crop = prepared.scheme, prepared.crop

    def __call__(self, images):
        face = self.scheme.mean_face.astype(numpy.float32)
        return numpy.repeat(face[None], len(images), 0), numpy.ones((len(images), len(face)))


def test_scoring_from_detected_boxes_reads_photos_as_their_labels_were_made(tmp_path):
    source, scheme = own_set(tmp_path / "own", [3, 3, 13, 3, 8, 15])
    for exif, shape in ((None, (40, 60, 3)), ("ignore", (60, 40, 3))):
        folder = DataGenerator(source, 32, tmp_path / str(exif), scheme=str(scheme), workers=1,
                               val=0, exif=exif).run()
        (folder / "train.txt").rename(folder / "test.txt")
        prepared, detector = PreparedSet(folder), Lying()
        boxes.score_detected(MeanFace(prepared), detector, prepared)
        assert detector.seen == [shape]


def test_unlabelled_photos_are_cropped_as_their_boxes_were_made(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    lying(folder / "a.jpg", 6)
    prepared = types.SimpleNamespace(margin=1.0, size=32)
    box = numpy.array([0.0, 0, 15, 20])
    # Small boxes are ignored; this one contains only the red corner.
    big = PIL.Image.open(folder / "a.jpg")
    big.resize((400, 600)).save(folder / "a.jpg", exif=big.getexif(), quality=95)
    result = unlabelled._cut(("a.jpg", box * 10), tmp_path / "crop.jpg", lambda box: box, folder,
                             prepared)
    assert result.tolist() == [0, 0, 150, 200]
    assert read_photo(tmp_path / "crop.jpg")[..., 0].mean() > 200


@pytest.mark.parametrize("name", ["a.jfif", "a.jpe", "a.JPEG", "a.JP2", "a.TIF", "a.tiff", "a.PNM"])
def test_photos_of_every_suffix_beside_landmarks(tmp_path, name):
    path = tmp_path / "own" / name
    path.parent.mkdir()
    kind = {".jfif": ".jpg"}.get(path.suffix.lower(), path.suffix.lower())
    path.write_bytes(cv2.imencode(kind, numpy.full((90, 90, 3), 90, numpy.uint8))[1])
    path.with_suffix(".pts").write_text("{\n" + "".join(f"{x} {y}\n" for x, y in FACE) + "}\n")
    (tmp_path / "five.yaml").write_text(FIVE)
    folder = DataGenerator(tmp_path / "own", 64, tmp_path / "set", workers=1,
                           scheme=str(tmp_path / "five.yaml")).run()
    prepared, = PreparedSet(folder).lists["train"].images
    assert abs(int(cv2.imread(str(prepared))[51, 51, 0]) - 90) <= 2
    assert photos_in(tmp_path / "own") == [path]


def test_an_image_left_out_because_of_its_suffix_is_counted(tmp_path, capsys):
    (tmp_path / "five.yaml").write_text(FIVE)
    content = cv2.imencode(".png", numpy.full((90, 90, 3), 90, numpy.uint8))[1]
    for name in ("own/a.png", "own/b.png_large", "own/c", "own/notes.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    for name in "abc":
        (tmp_path / "own" / f"{name}.pts").write_text(
            "{\n" + "".join(f"{x} {y}\n" for x, y in FACE) + "}\n")
    DataGenerator(tmp_path / "own", 64, tmp_path / "set", workers=1,
                  scheme=str(tmp_path / "five.yaml")).run()
    out = capsys.readouterr().out
    assert ["custom", "other", "suffix", "2", "-", "2", "0"] in [
        line.split() for line in out.splitlines()]
    assert "b.png_large: an image whose suffix is not that of a photo, .png_large: rename" in out
    assert "no image" not in out
    assert photos_in(tmp_path / "own") == [tmp_path / "own" / "a.png"]
    assert "2 images are left out because of their suffix (b.png_large)" in capsys.readouterr().err


@pytest.mark.parametrize(("content", "is_image"), [
    (b"\xff\xd8\xff\xe0", True), (b"II*\0\x10", True), (b"RIFF\0\0\0\0WEBP", True),
    (b"BM\x36\0\0\0\0\0\0\0\x36", True), (b"BMW is a name", False),
    (b"\0\0\0\x18ftypheic", True), (b"\0\0\0\x18ftypisom", False), (b"", False), (b"text", False)])
def test_images_by_their_beginning(tmp_path, content, is_image):
    (tmp_path / "a.bin").write_bytes(content)
    (tmp_path / "a.png").write_bytes(content)
    assert is_left_out(tmp_path / "a.bin") == is_image
    assert not is_left_out(tmp_path / "a.png")
