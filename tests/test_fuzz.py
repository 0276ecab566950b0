"""Mutated .pts files, lists, args.yaml and images.

None may end in a traceback, and the valid files beside them must still be read.
"""
import concurrent.futures
import contextlib
import pathlib
import shutil
import tempfile

import cv2
import hypothesis
import numpy
import pytest
from helpers import small_sets
from hypothesis import strategies

from utils import args
from utils.data import dataset, generator
from utils.errors import UserError

# Four kinds: together 80 cases in CI, and 1,000 more with -m slow.
FEW = hypothesis.settings(max_examples=20, deadline=None, derandomize=True, database=None,
                          suppress_health_check=list(hypothesis.HealthCheck))
MANY = hypothesis.settings(FEW, max_examples=250, derandomize=False)
LENGTHS = [pytest.param(FEW, id="short"), pytest.param(MANY, id="long", marks=pytest.mark.slow)]
TOKENS = [b"nan", b"inf", b"-1", b"1e999", b"0x10", b"{", b"}", b"\0", b"\xff\xfe", b"9" * 400,
          "\u0663".encode(), b"n_points: 67\n", b"version: 2\n", b" ", b"\n\n", b"\r", b"-", b".",
          b"- [1, {a: 2}]\n", b"epochs: -3\n", b"lr: fast\n", b"&a [*a]\n", b"? !!python/none x\n",
          b"!!python/object/apply:os.system ['true']\n", b"data_dir: [a, b]\n", b"1_0", b"\t"]


@strategies.composite
def mutated(draw, good):
    """Bytes of `good` with up to three edits, or random bytes or text."""
    if draw(strategies.integers(0, 9)) == 0:
        return draw(strategies.one_of(strategies.binary(max_size=200),
                                      strategies.text(max_size=200).map(str.encode)))
    content = good
    for _ in range(draw(strategies.integers(1, 3))):
        begin = draw(strategies.integers(0, len(content)))
        end = min(len(content), begin + draw(strategies.sampled_from([0, 1, 2, 8, 60, 10 ** 6])))
        new = draw(strategies.one_of(strategies.sampled_from(TOKENS), strategies.just(b""),
                                     strategies.binary(max_size=4)))
        if draw(strategies.booleans()):
            new += content[begin:end]
        content = content[:begin] + new + content[end:]
    return content


@pytest.fixture(scope="module")
def photos():
    """Photos in the layout of 300W: two good ones in helen, and one in afw to be damaged."""
    folder = pathlib.Path(tempfile.mkdtemp())
    small_sets.write_300w(folder / "300W", {"helen/trainset": 2, "afw": 1, "ibug": 1})
    yield folder / "300W"
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def prepared(photos):
    """The prepared set of the photos."""
    return generator.DataGenerator(photos, 32, photos.parent / "prepared", workers=1).run()


@pytest.fixture(autouse=True)
def threads(monkeypatch):
    """The generator's pool as threads: a pool of processes for each case takes too long."""
    monkeypatch.setattr(concurrent.futures, "ProcessPoolExecutor",
                        concurrent.futures.ThreadPoolExecutor)


@contextlib.contextmanager
def one_line_error(path):
    """Accept a UserError of one line that names the path."""
    text = None
    try:
        yield
    except UserError as error:
        text = str(error)
    if text is not None:
        assert str(path) in text
        assert text.count("\n") <= 1


def neighbours_are_prepared(photos, path, content):
    """Prepare the photos with `content` at path, and check that all others are prepared."""
    original = path.read_bytes()
    output = photos.parent / "fuzzed"
    path.write_bytes(content)
    try:
        generator.DataGenerator(photos, 32, output, workers=1).run()
        lines = [line for name in ("train.txt", "val.txt", "test.txt") if (
            output / name).is_file() for line in (output / name).read_text().splitlines()]
        images = {line.split()[0] for line in lines}
        assert sum("afw" not in image for image in images) == 3, images
        assert all((output / image).is_file() for image in images)
        dataset.PreparedSet(output)
    finally:
        path.write_bytes(original)
        shutil.rmtree(output, ignore_errors=True)


@pytest.mark.parametrize("settings", LENGTHS)
def test_pts_files(photos, settings, capsys):
    path = next((photos / "afw").glob("*.pts"))

    @settings
    @hypothesis.given(mutated(path.read_bytes()))
    def case(content):
        neighbours_are_prepared(photos, path, content)
        capsys.readouterr()

    case()


@pytest.mark.parametrize("settings", LENGTHS)
def test_images(photos, prepared, settings, capsys):
    path = next((photos / "afw").glob("*.png"))
    faces = dataset.PreparedSet(prepared)
    stored = faces.lists["train"].images[0]
    original = stored.read_bytes()
    jpeg = cv2.imencode(".jpg", cv2.imread(str(path)))[1].tobytes()
    good = strategies.sampled_from([path.read_bytes(), jpeg])

    @settings
    @hypothesis.given(good.flatmap(mutated))
    def case(content):
        neighbours_are_prepared(photos, path, content)
        stored.write_bytes(content)
        try:
            with one_line_error(stored):
                samples = dataset.FaceDataset(faces.lists["train"], faces.margin, 32)
                image, landmarks, _, bad = samples[0]
                assert image.shape == (32, 32, 3)
                assert bad in (-1, 0)
                assert landmarks.isfinite().all()
        finally:
            stored.write_bytes(original)
        capsys.readouterr()

    case()


@pytest.mark.parametrize("settings", LENGTHS)
def test_lists(prepared, settings):
    original = (prepared / "train.txt").read_bytes()

    @settings
    @hypothesis.given(mutated(original))
    def case(content):
        (prepared / "train.txt").write_bytes(content)
        try:
            with one_line_error(prepared):
                faces = dataset.PreparedSet(prepared).lists["train"]
                assert faces.points.shape == (len(faces), 68, 2)
                assert len(faces)
                assert numpy.isfinite(faces.points).all()
        finally:
            (prepared / "train.txt").write_bytes(original)

    case()


@pytest.mark.parametrize("settings", LENGTHS)
def test_args_files(tmp_path, settings):
    path = tmp_path / "mine.yaml"
    shipped = args.DEFAULTS.read_bytes()
    lines = shipped.split(b"\n")
    # The whole file, or a few of its lines, so that the edits reach all settings.
    some = strategies.lists(strategies.sampled_from(lines), min_size=1, max_size=6).map(b"\n".join)

    @settings
    @hypothesis.given(strategies.one_of(strategies.just(shipped), some).flatmap(mutated))
    def case(content):
        path.write_bytes(content)
        with one_line_error("mine.yaml"):
            request = args.parse(["--train", "--args", str(path)])
            for name, setting in args.SETTINGS.items():
                assert isinstance(getattr(request.args, name), setting.kind), name

    case()
