"""Preparing sets: their content, merging, and notes and errors about bad input."""
import collections
import os
import pathlib
import signal

import cv2
import numpy
import pytest
import yaml
from helpers import own_sets, small_sets

from utils.data import cropping, generator, sheet
from utils.data.dataset import PreparedSet
from utils.data.drawn_faces.render import render
from utils.data.generator import DataGenerator
from utils.data.readers.face import Face, split_of
from utils.errors import UserError
from utils.landmarks import crop
from utils.landmarks.schemes import SCHEMES


def prepare(data, output, **options):
    return PreparedSet(DataGenerator(data, 64, output, workers=1, **options).run())


def content(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes()
            for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def w300(tmp_path_factory):
    return small_sets.write_300w(tmp_path_factory.mktemp("photos") / "300W")


@pytest.fixture(scope="module")
def prepared(w300, tmp_path_factory):
    return prepare(w300, tmp_path_factory.mktemp("set") / "out", val=0.25)


def test_lists_of_300w(prepared):
    counts = {name: len(faces) for name, faces in prepared.lists.items()}
    assert counts["train"] + counts["val"] == 13
    assert (counts["test"], counts["test_common"], counts["test_challenge"]) == (6, 4, 2)
    assert prepared.scheme.name == "300W"
    assert prepared.margin == 1.6
    assert prepared.size == 64
    assert prepared.crop == {"rule": "square", "scale": 1.2}
    for faces in prepared.lists.values():
        for path in faces.images:
            assert cv2.imread(str(path)).shape == (102, 102, 3)


def test_validation_is_split_by_photo(prepared):
    def photos(name):
        return {p.stem.rpartition("_")[0] if "afw" in p.stem else p.stem
                for p in prepared.lists[name].images}
    assert not photos("train") & photos("val")
    assert len(prepared.lists["val"]) >= 2


def test_a_set_has_the_same_validation_photos_alone_and_merged():
    def faces(source, count):
        return [Face(pathlib.Path("x"), None, ("train",), source, f"{source}/{i}", f"{source}{i}")
                for i in range(count)]

    def held_out(*parts):
        return generator._validation_groups(sum(parts, []), 0.1)

    first, second = faces("first", 400), faces("second", 300)
    alone, merged = held_out(first), held_out(first, second)
    assert len(alone) == 40
    assert len(merged) == 70
    of_first = {group for group in merged if group.startswith("first")}
    # The share is that of the merged set, so the number of each part may differ slightly.
    assert of_first <= alone or alone <= of_first
    assert 30 < len(of_first) < 50
    assert held_out(second, first) == merged
    twins = [face for face in first[:50] for _ in range(3)]
    assert len(held_out(twins)) == 5


def test_a_photo_in_training_and_test_gets_a_note(tmp_path, capsys):
    faces = [(split, own_sets.FACE + i) for i in range(4) for split in ("train", "test")]
    own_sets.prepare(tmp_path / "own", own_sets.FIVE, faces, [f"{i // 2}.png" for i in range(8)])
    assert ("0.png: note: this and 3 more photos are in the test list and in another one"
            in capsys.readouterr().out)


@pytest.mark.parametrize(("word", "split"), [("validation", "val"), ("Testing", "test"),
                                         ("trainset", "train"), ("of_2019", None)])
def test_lists_have_several_names(word, split):
    assert split_of(["photos", word]) == split


def test_lists_and_sources_lead_back_to_the_photo(w300, prepared):
    faces = prepared.lists["test_challenge"]
    for image, points, box, photo in zip(faces.images, faces.points, faces.boxes, faces.photos):
        assert photo.is_file()
        assert photo.is_relative_to(w300)
        truth = numpy.array([line.split() for line in photo.with_suffix(".pts").read_text()
                             .splitlines()[3:-1]], float) - 1
        numpy.testing.assert_allclose(crop.to_photo(points, box), truth, atol=1e-3)
        assert truth % 1 != pytest.approx(0), "coordinates stay floats"
        # The stored crop shows the pixels inside its box.
        stored = cv2.imread(str(image))
        again = crop.cut(cv2.imread(str(photo)), crop.grow(box, 1.6), 102)
        assert numpy.abs(stored.astype(int) - again).mean() < 3


def test_mean_face_is_that_of_the_training_faces(prepared):
    numpy.testing.assert_allclose(prepared.scheme.mean_face,
                                  prepared.lists["train"].points.mean(0), atol=1e-6)


def test_the_result_is_reproducible_for_any_number_of_workers(w300, tmp_path):
    first = DataGenerator(w300, 64, tmp_path / "a", workers=1).run()
    second = DataGenerator(str(w300), 64, tmp_path / "b", workers=3).run()
    assert content(first) == content(second)
    DataGenerator(w300, 64, tmp_path / "b", workers=2).run()
    assert content(first) == content(second), "the existing set is replaced"


def test_the_order_of_files_does_not_matter(w300, tmp_path, monkeypatch):
    first = DataGenerator(w300, 64, tmp_path / "a", workers=1).run()
    ordinary = pathlib.Path.iterdir
    monkeypatch.setattr(pathlib.Path, "iterdir", lambda p: reversed(sorted(ordinary(p))))
    second = DataGenerator(w300, 64, tmp_path / "b", workers=1).run()
    assert content(first) == content(second)


def test_empty_lists_are_not_written(tmp_path):
    data = small_sets.write_300w(tmp_path / "300W", {"lfpw/testset": 2})
    folder = DataGenerator(data, 64, workers=1).run()
    assert folder == tmp_path / "300W-64"
    assert sorted(p.name for p in folder.glob("*.txt")) == ["indices.txt", "test.txt",
                                                            "test_common.txt"]


def test_exif_rotation_is_ignored(tmp_path):
    import PIL.Image
    data = small_sets.write_300w(tmp_path / "300W", {"ibug": 1})
    (photo,) = (data / "ibug").glob("*.png")
    image = PIL.Image.open(photo)
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    plain = prepare(data, tmp_path / "plain").lists["test"].images[0].read_bytes()
    image.save(photo, exif=exif)
    assert cv2.imread(str(photo)) is not None
    turned = prepare(data, tmp_path / "turned").lists["test"].images[0].read_bytes()
    assert plain == turned


def test_bad_files_are_named_counted_and_skipped(tmp_path, capsys):
    data = small_sets.write_300w(tmp_path / "300W", {"afw": 2, "helen/trainset": 12})
    folder = data / "helen" / "trainset"
    points = small_sets.face(0)[1]

    def spoil(number, text):
        (folder / f"image_{number:04d}.pts").write_text(text)

    whole = (folder / "image_0000.pts").read_text()
    small_sets.write_pts(folder / "image_0000.pts", points[:67])
    spoil(1, whole.replace(whole.splitlines()[5], "twelve 3"))
    spoil(2, whole.replace(whole.splitlines()[5], "nan 3"))
    (folder / "image_0003.pts").unlink()
    (folder / "image_0004.png").unlink()
    (folder / "image_0005.png").write_bytes(b"")
    (folder / "image_0006.png").write_bytes(b"no image at all")
    small_sets.write_pts(folder / "image_0007.pts", points + 500)
    small_sets.write_pts(folder / "image_0008.pts", numpy.full((68, 2), 20.0))
    prepared = prepare(data, tmp_path / "out", val=0)
    assert len(prepared.lists["train"]) + len(prepared.lists["val"]) == 5
    out = capsys.readouterr().out
    for number, reason in enumerate(("67 points", "no number", "no finite number", "without",
                                     "no image", "is empty", "cannot be read", "outside the photo",
                                     "0 x 0 pixels")):
        assert any(f"image_{number:04d}" in line and reason in line for line in out.splitlines())
    rows = {line.split()[1]: line.split()[2:] for line in out.splitlines() if "300W " in line}
    assert rows["helen/trainset"] == ["12", "2000", "9", "3"]
    assert rows["afw"] == ["2", "337", "0", "2"]
    assert len((tmp_path / "out" / "problems.txt").read_text().splitlines()) == 9


def test_an_error_if_no_face_can_be_prepared(tmp_path):
    data = small_sets.write_300w(tmp_path / "300W", {"ibug": 1})
    next((data / "ibug").glob("*.png")).write_bytes(b"")
    with pytest.raises(UserError, match="no face could be prepared.*is empty"):
        prepare(data, tmp_path / "out")
    with pytest.raises(UserError, match="no prepared set"):
        PreparedSet(tmp_path / "out")


def test_the_error_for_an_unknown_layout_lists_the_known_ones(tmp_path):
    (tmp_path / "readme.txt").write_text("hello")
    with pytest.raises(UserError, match="no known layout.*readme.txt.*afw/.*WFLW_images/.*pts"):
        DataGenerator(tmp_path, 64).run()
    with pytest.raises(UserError, match="no such folder"):
        DataGenerator(tmp_path / "nowhere", 64).run()


def test_a_prepared_set_is_refused_as_input(prepared):
    with pytest.raises(UserError, match="prepared set already"):
        DataGenerator(prepared.folder, 64).run()


def test_an_output_folder_with_other_files_is_not_touched(w300, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="no prepared set; give another"):
        DataGenerator(w300, 64, tmp_path).run()
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_output_that_cannot_be_written(w300, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written.*output_dir"):
        DataGenerator(w300, 64, tmp_path / "file" / "out").run()
    with pytest.raises(UserError, match="cannot be written.*output_dir"):
        DataGenerator(w300, 64, "/proc/out").run()


def test_an_interrupted_set_is_prepared_again(w300, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(DataGenerator, "_write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            DataGenerator(w300, 64, tmp_path / "out", workers=1).run()
    with pytest.raises(UserError, match="no prepared set"):
        PreparedSet(tmp_path / "out")
    assert len(prepare(w300, tmp_path / "out").lists["test"]) == 6


def test_a_killed_worker_is_reported(w300, tmp_path, monkeypatch):
    monkeypatch.setattr(cropping, "image_of", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(UserError, match="worker process was killed.*workers"):
        DataGenerator(w300, 64, tmp_path / "out", workers=2).run()


@pytest.mark.parametrize("options", [{"target_size": 8}, {"margin": 0.5}, {"scale": 0}, {"val": 1},
                                     {"crop": "round"}, {"target_size": "big"}])
def test_bad_options(options):
    with pytest.raises(UserError):
        DataGenerator("300W", **options)


@pytest.mark.parametrize(("flags", "message"), [
    ("--labelled SET --target-size 256", "target_size: without effect beside labelled; leave it"),
    ("--labelled SET --margin 1.6 --exif obey --workers 1", "^exif, margin, workers: without eff"),
    ("--labelled SET --names list.txt", "^names: without effect beside labelled; .*those of SET"),
    ("--labelled SET --teacher a.pt --one-based", "one_based: without effect beside labelled and "),
    ("--labelled SET --teacher a.pt --scheme eyes", "^scheme: without effect"),
    ("more --labelled SET", "^photos, more: .* prepared one folder at a time"),
    ("more --labelled SET --teacher a.pt", "^photos, more: .* prepared one folder at a time"),
    ("--detector haar", "^detector: for photos without landmarks, which need labelled=SET"),
    ("--names list.txt --boxes b.csv", "^boxes, names: for photos without landmarks, which need"),
])
def test_options_without_effect_are_refused(flags, message):
    with pytest.raises(UserError, match=message):
        generator.main(["photos", *flags.split()])


def test_merge_300w_and_wflw_as_68(w300, tmp_path, capsys):
    small_sets.write_wflw(tmp_path / "WFLW")
    os.symlink(w300, tmp_path / "300W")
    prepared = prepare(f"{tmp_path / '300W'} + {tmp_path / 'WFLW'}", tmp_path / "both",
                       scheme="300W")
    assert prepared.scheme.name == "300W"
    counts = {name: len(faces) for name, faces in prepared.lists.items()}
    assert counts["train"] + counts["val"] == 13 + 4
    assert counts["test"] == 6 + 3
    assert counts["test_300W"] == 6
    assert counts["test_WFLW"] == 3
    names = [p.name for faces in prepared.lists.values() for p in faces.images]
    assert all(name.startswith(("300W_", "WFLW_")) for name in names)
    out = capsys.readouterr().out
    rows = [line.split()[:4] for line in out.splitlines()]
    assert ["WFLW", "train", "4", "7500"] in rows
    assert ["300W", "afw", "6", "337"] in rows
    assert prepared.folder.name == "both"
    # Published crops differ: the stretched landmarks' box of 300W, the face box of WFLW.
    wflw = prepared.lists["test_WFLW"]
    assert not numpy.allclose(wflw.published, crop.grow(wflw.boxes, 1.1 / 1.2))


def test_two_schemes_do_not_merge(w300, tmp_path):
    small_sets.write_wflw(tmp_path / "WFLW")
    for order in ([w300, tmp_path / "WFLW"], [tmp_path / "WFLW", w300]):
        with pytest.raises(UserError) as caught:
            DataGenerator(order, 64, tmp_path / "out").run()
        for part in ("98", "68", "WFLW maps to 300W", "--scheme 300W"):
            assert part in str(caught.value)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="no mapping from 300W.*WFLW to 300W"):
        DataGenerator(w300, 64, tmp_path / "out", scheme="WFLW").run()
    with pytest.raises(UserError, match="part of 300W.*--scheme eyes"):
        DataGenerator(w300, 64, tmp_path / "out", scheme="eyes").run()


def test_folders_of_the_same_name_do_not_collide(tmp_path):
    for place in "ab":
        small_sets.write_300w(tmp_path / place / "300W", {"ibug": 2, "afw": 2})
    prepared = prepare([tmp_path / "a" / "300W", tmp_path / "b" / "300W"], tmp_path / "out")
    assert len(set(prepared.lists["test"].images)) == 4


def test_faces_of_published_sets_may_reach_out_of_the_photo(tmp_path, capsys):
    data = small_sets.write_wflw(tmp_path / "WFLW")
    path = data / "WFLW_annotations/list_98pt_rect_attr_train_test/list_98pt_rect_attr_test.txt"
    lines = [line.split() for line in path.read_text().splitlines()]
    far = numpy.array(lines[0][:196], float).reshape(-1, 2)
    side = numpy.ptp(far, 0).max()
    # 40 % of the first face is left of its photo, the second lies three sides outside.
    for fields, move in zip(lines, (0.4, 3)):
        moved = far - [far[:, 0].min() + move * side, 0]
        fields[:200] = [f"{v:.3f}" for v in (*moved.flatten(), *moved.min(0), *moved.max(0))]
    path.write_text("\n".join(map(" ".join, lines)) + "\n")
    prepared = prepare(data, tmp_path / "out")
    faces = prepared.lists["test"]
    assert len(faces) == 2
    assert "far outside the photo" in capsys.readouterr().out
    cut = [face for face in range(2) if faces.boxes[face, 0] < 0]
    assert len(cut) == 1
    # The published crop is limited to the photo.
    low, high = faces.published[cut[0], :2], faces.published[cut[0], 2:]
    assert low[0] == 0
    assert high[0] == pytest.approx(
        far[:, 0].max() - far[:, 0].min() - 0.4 * side + 0.1 * numpy.ptp(far[:, 0]), abs=0.1)
    prepared.warn_incomplete()
    assert ("note: other faces than published: WFLW train 4 of 7500, WFLW test 2 of 2500"
            in capsys.readouterr().out)


def test_wflw_subset_lists(tmp_path, capsys):
    data = small_sets.write_wflw(tmp_path / "WFLW")
    lines = (data / "WFLW_annotations" / "list_98pt_rect_attr_train_test"
             / "list_98pt_rect_attr_test.txt").read_text().splitlines()
    fields = lines[1].split()
    (data / "WFLW_annotations" / "list_98pt_test" / "list_98pt_test_blur.txt").write_text(
        f"{' '.join(fields[:196])} {fields[206]}\n{' '.join(fields[:196])} other.png\n")
    prepared = prepare(data, tmp_path / "out")
    assert prepared.scheme.name == "WFLW"
    assert len(prepared.lists["test"]) == 3
    assert prepared.test_lists.keys() == {"test", "blur"}
    assert prepared.test_lists["blur"].images == [prepared.test_lists["test"].images[1]]
    out = capsys.readouterr().out
    assert "no test_makeup" in out
    assert "line 2: no such test face" in out
    assert ["WFLW", "test", "3", "2500", "0", "3"] in [row.split() for row in out.splitlines()]
    mapped = prepare(data, tmp_path / "68", scheme="300W")
    assert mapped.lists["test_blur"].points.shape == (1, 68, 2)


SQUARE = """
name: square
names: [left top, right top, right bottom, left bottom, centre]
flip: [[left top, right top], [left bottom, right bottom]]
divisor: [left top, right top]
"""


def write_custom(folder, scheme):
    """A folder of .pts, the same faces as a CSV, and the scheme's file."""
    scheme.write_text(SQUARE)
    lines = ["image,split," + ",".join(f"x{i},y{i}" for i in range(1, 6))]
    for i in range(10):
        split = "test" if i >= 8 else "train"
        image, points = small_sets.face(i)
        points = points[[36, 45, 54, 48, 30]]
        small_sets.write_image(folder / "pts" / split / f"{i}.png", image)
        small_sets.write_pts(folder / "pts" / split / f"{i}.pts", points)
        lines.append(f"pts/{split}/{i}.png,{split}," + ",".join(f"{v:.6f}" for v in points.flat))
    (folder / "faces.csv").write_text("\n".join(lines) + "\n")


def test_a_custom_set_from_the_command_line(tmp_path, capsys):
    write_custom(tmp_path, tmp_path / "square.yaml")
    sets = []
    for source in ("pts", "faces.csv"):
        generator.main([str(tmp_path / source), "--scheme", str(tmp_path / "square.yaml"),
                        "--target-size", "64", "--workers", "1"])
        sets.append(PreparedSet(tmp_path / f"{source}-64"))
    for prepared in sets:
        assert prepared.scheme.name == "square"
        assert prepared.scheme.flip.tolist() == [1, 0, 3, 2, 4]
        assert len(prepared.lists["test"]) == 2
        assert len(prepared.lists["train"]) + len(prepared.lists["val"]) == 8
        assert numpy.isfinite(prepared.scheme.mean_face).all()
    numpy.testing.assert_allclose(sets[0].lists["test"].points, sets[1].lists["test"].points,
                                  atol=1e-5)
    with pytest.raises(UserError, match="needs a landmark scheme"):
        generator.main([str(tmp_path / "pts")])
    with pytest.raises(UserError, match="--target-size"):
        generator.main([str(tmp_path / "pts"), "--target-size", "big"])
    with pytest.raises(UserError, match="nearest: --target-size"):
        generator.main([str(tmp_path / "pts"), "--targetsize", "64"])
    capsys.readouterr()


def test_point_count_and_scheme_are_both_named(tmp_path):
    write_custom(tmp_path, tmp_path / "square.yaml")
    with pytest.raises(UserError, match="5 points found, 68 expected"):
        DataGenerator(tmp_path / "pts", 64, tmp_path / "out", scheme="300W", workers=1).run()


def test_set_yaml_holds_the_scheme(prepared):
    description = yaml.safe_load((prepared.folder / "set.yaml").read_text())
    assert description["scheme"]["flip"] == SCHEMES["300W"].flip.tolist()
    assert description["layouts"] == ["300W"]
    assert not prepared.drawn


@pytest.mark.slow
def test_the_real_300w(shared, tmp_path):
    prepared = PreparedSet(DataGenerator(shared / "data" / "300W", 256, tmp_path / "set").run())
    counts = {name: len(faces) for name, faces in prepared.lists.items()}
    assert counts["train"] + counts["val"] == 2012
    assert counts["test"] == 224
    assert counts["test_common"] == 224
    assert "test_challenge" not in counts
    assert 80 <= counts["val"] <= 120
    photos = collections.Counter(p.stem.split("_")[-2] for p in prepared.lists["val"].images
                                 if "afw" in p.stem)
    assert photos


@pytest.mark.parametrize("name", ["WFLW", "LaPa"])
def test_real_samples_of_other_publishers(shared, tmp_path, name):
    prepared = prepare(shared / "data" / "samples" / name, tmp_path / "set")
    assert prepared.scheme.name == name
    for faces in prepared.lists.values():
        assert ((faces.points > -0.1) & (faces.points < 1.1)).all()


def test_opencv_threads_of_the_caller_do_not_block_the_workers(tmp_path):
    cv2.setNumThreads(2)
    cv2.resize(numpy.zeros((2000, 2000, 3), numpy.uint8), (1000, 1000))
    cv2.GaussianBlur(numpy.zeros((2000, 2000, 3), numpy.uint8), (31, 31), 5)
    source = tmp_path / "300W" / "afw"
    source.mkdir(parents=True)
    for i in range(4):
        image, points = render((7, i), 160)
        cv2.imwrite(str(source / f"face_{i}_1.png"), image[:, :, ::-1])
        lines = "\n".join(f"{x} {y}" for x, y in points + 1)
        (source / f"face_{i}_1.pts").write_text(f"version: 1\nn_points: 68\n{{\n{lines}\n}}\n")
    # Without disable_opencv_threads a worker waits for threads that the fork does not have.
    DataGenerator(tmp_path / "300W", 64, tmp_path / "set", workers=2).run()
    assert len((tmp_path / "set" / "train.txt").read_text().splitlines()) == 3


def test_preparing_ends_with_a_sheet_of_the_faces(w300, tmp_path, capsys):
    folder = prepare(w300, tmp_path / "out").folder
    last = capsys.readouterr().out.splitlines()[-1]
    assert str(folder / "sheet.png") in last
    assert f"utils.data.sheet {folder}" in last
    with_numbers = cv2.imread(str(folder / "sheet.png"))
    assert with_numbers.shape[1] == 6 * 480
    assert with_numbers.std() > 5
    plain, numbered = (sheet.prepared(folder, numbered=n, count=99) for n in (False, True))
    assert len(plain) == len(numbered)
    # The same faces in another order, with numbers.
    assert all(min((a != b).mean() for b in plain) > 0.001 for a in numbered)
