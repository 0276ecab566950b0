"""Readers of the published layouts and of own data, with good and with damaged files."""
import json
import pathlib
import shutil
import time

import cv2
import h5py
import numpy
import pytest
import scipy.io

from utils import landmarks, readers
from utils.errors import UserError
from utils.landmarks import SCHEMES
from utils.readers import aflw, cofw, custom, lapa, w300, wflw
from utils.readers.pts import read_pts, unique_name


def image(path):
    """A small image file; readers do not open it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), numpy.zeros((8, 8, 3), numpy.uint8))
    return path


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def face_of(name, seed=0):
    """Points (K, 2) in pixels like those of a face of that scheme, 0-based."""
    shift = numpy.random.default_rng(seed).uniform(5, 50, 2)
    return numpy.round(SCHEMES[name].mean_face * 100 + shift, 3)


def pts(points, count=None):
    """The text of a .pts file of 0-based points."""
    rows = "\n".join(f"{x + 1:.3f} {y + 1:.3f}" for x, y in points)
    return f"version: 1\nn_points: {count or len(points)}\n{{\n{rows}\n}}\n"


def reasons(problems):
    """File name to reason, notes left out."""
    return {pathlib.Path(path).name: reason for path, reason in problems
            if not reason.startswith("note:")}


# ---------------------------------------------------------------- .pts

def test_pts_counts_from_one(tmp_path):
    points = face_of("300W")
    assert numpy.allclose(read_pts(write(tmp_path / "a.pts", pts(points)), 68), points)


@pytest.mark.parametrize("change", [
    lambda text: text.replace("\n", "\r\n"),
    lambda text: text.replace("\n", "\r"),
    lambda text: text.replace("\n", "\n\n  \n"),
    lambda text: text.replace("version", "\xe9"),
    lambda text: text.replace("n_points: 68", "n_points:   68  "),
    lambda text: text.replace(" ", "\t").replace("n_points:\t", "n_points: "),
    lambda text: text[text.index("{"):],
    lambda text: text.rstrip("\n") + "\nanything"])
def test_pts_in_other_hands(tmp_path, change):
    points = face_of("300W")
    path = write(tmp_path / "a.pts", change(pts(points)).encode("latin-1"))
    assert numpy.allclose(read_pts(path, 68), points)


GOOD = pts(face_of("300W"))
LINE = GOOD.split("\n")[8]  # line 9 of the file
DAMAGED = {
    "short": (pts(face_of("300W")[:67]), "67 points found, 68 expected"),
    "long": (pts(numpy.vstack([face_of("300W")] * 2)), "136 points found, 68 expected"),
    "count": (pts(face_of("300W"), 70), "n_points says '70', 68 points found"),
    "nan": (GOOD.replace(LINE, "nan 5"), "line 9: 'nan' is no finite number"),
    "inf": (GOOD.replace(LINE, "1 -inf"), "line 9: '-inf' is no finite number"),
    "words": (GOOD.replace(LINE, "left eye"), "line 9: 'left' is no number"),
    "one": (GOOD.replace(LINE, "12.5"), "line 9: x y expected, found '12.5'"),
    "comma": (GOOD.replace(LINE, "12,5 3"), "line 9: '12,5' is no number"),
    "underscore": (GOOD.replace(LINE, "12_5 3"), "line 9: '12_5' is no number"),
    "latin": (GOOD.replace(LINE, "1\xe9 3").encode("latin-1"), "line 9: '1\\xe9' is no number"),
    "cut": (GOOD[:GOOD.index("}")], "cut off"),
    "empty": (b"", "the file is empty"),
    "blank": (b"\r\n  \n", "the file is empty"),
    "zeros": (bytes(5000), "no line { found"),
    "binary": (bytes(range(256)) * 40, "no line { found"),
    "brackets": ("}\n{\n", "cut off"),
    "none": ("n_points: 0\n{\n}\n", "0 points found, 68 expected"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_pts(tmp_path, name):
    content, reason = DAMAGED[name]
    with pytest.raises(ValueError) as caught:
        read_pts(write(tmp_path / "a.pts", content), 68)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 120


def test_unique_names_are_plain_and_differ():
    taken = set()
    names = [unique_name(text, taken) for text in ("a/b", "a_b", "A b", "image_092 _01", "a_b")]
    assert names == ["a_b", "a_b_2", "A_b_3", "image_092__01", "a_b_4"]


# ---------------------------------------------------------------- 300W

def test_w300_lists_groups_and_order(tmp_path):
    for subset, name in (("ibug", "image_003_1.jpg"), ("afw", "7_2.jpg"), ("afw", "7_1.JPG"),
                         ("helen/trainset", "9_1.jpeg"), ("helen/testset", "9_1.jpg"),
                         ("lfpw/trainset", "image_0001.png"), ("lfpw/testset", "image_0001.png")):
        photo = image(tmp_path / subset / name)
        write(photo.with_suffix(".pts"), pts(face_of("300W")))
    problems = []
    faces = w300.read(tmp_path, problems)
    assert problems == []
    assert [(f.subset, f.photo.name, f.lists) for f in faces] == [
        ("afw", "7_1.JPG", ("train",)), ("afw", "7_2.jpg", ("train",)),
        ("helen/trainset", "9_1.jpeg", ("train",)), ("lfpw/trainset", "image_0001.png", ("train",)),
        ("helen/testset", "9_1.jpg", ("test", "test_common")),
        ("lfpw/testset", "image_0001.png", ("test", "test_common")),
        ("ibug", "image_003_1.jpg", ("test", "test_challenge"))]
    assert len({f.name for f in faces}) == 7 and all(f.box is None for f in faces)
    # Two faces of one photo stay together; photos of LFPW do not.
    assert faces[0].group == faces[1].group == "afw/7"
    assert faces[3].group == "lfpw/trainset/image_0001"
    assert set(w300.EXPECTED) == {f.subset for f in faces} and sum(w300.EXPECTED.values()) == 3837


def test_w300_names_every_bad_item_and_reads_the_rest(tmp_path):
    folder = tmp_path / "afw"
    for name, (content, _) in DAMAGED.items():
        image(folder / f"{name}.jpg")
        write(folder / f"{name}.pts", content)
    good = image(folder / "good.jpg")
    write(folder / "good.pts", GOOD)
    image(folder / "good.png")
    image(folder / "alone.jpg")
    write(folder / "lonely.pts", GOOD)
    # None of these is a face or a mistake.
    image(folder / "good_mirror.jpg")
    write(folder / "good_mirror.pts", "")
    write(folder / "._good.jpg", "")
    write(folder / "good.mat", "")
    problems = []
    faces = w300.read(tmp_path, problems)
    assert [f.photo for f in faces] == [good]
    found = reasons(problems)
    assert set(found) == {f"{name}.pts" for name in DAMAGED} | {"good.png", "alone.jpg",
                                                                "lonely.pts"}
    assert len(problems) == len(found)
    for name, (_, reason) in DAMAGED.items():
        assert reason in found[f"{name}.pts"]
    assert "alone.pts" in found["alone.jpg"] and "lonely.jpg" in found["lonely.pts"]
    assert "good.jpg" in found["good.png"]


def test_w300_of_shared(shared):
    problems = []
    start = time.time()
    faces = w300.read(shared / "data" / "300W", problems)
    assert time.time() - start < 10
    assert problems == []
    count = {subset: sum(f.subset == subset for f in faces) for subset in w300.EXPECTED}
    assert count == {"afw": 337, "helen/trainset": 870, "lfpw/trainset": 805, "helen/testset": 0,
                     "lfpw/testset": 224, "ibug": 0}
    assert sum("train" in f.lists for f in faces) == 2012
    assert len({f.name for f in faces}) == 2236
    assert all(f.photo.is_file() and f.points.shape == (68, 2) for f in faces)
    by_name = {f.photo.name: f for f in faces if f.subset == "helen/trainset"}
    # These are two people in one photo.
    assert by_name["100040721_1.jpg"].group == by_name["100040721_2.jpg"].group
    photo = cv2.imread(str(faces[0].photo))
    assert (faces[0].points > 0).all() and (faces[0].points < photo.shape[1::-1]).all()


# ---------------------------------------------------------------- WFLW

def wflw_line(points, name, box=(1, 2, 30, 40), attributes="0 0 0 0 0 0"):
    coordinates = " ".join(f"{v:.6f}" for v in points.ravel())
    return f"{coordinates} {' '.join(map(str, box))} {attributes} {name}"


def wflw_tree(folder, train, test):
    lists = folder / "WFLW_annotations" / "list_98pt_rect_attr_train_test"
    (folder / "WFLW_images").mkdir(exist_ok=True)
    write(lists / "list_98pt_rect_attr_train.txt", "\n".join(train))
    return write(lists / "list_98pt_rect_attr_test.txt", "\n".join(test) + "\n")


def test_wflw_lists_subsets_and_names(tmp_path):
    image(tmp_path / "WFLW_images" / "0--P" / "a.jpg")
    image(tmp_path / "WFLW_images" / "0--P" / "b c.jpg")
    faces = [face_of("WFLW", seed) for seed in range(4)]
    test = [wflw_line(faces[1], "0--P/a.jpg"), wflw_line(faces[2], "0--P/a.jpg", (5, 6, 7, 8))]
    wflw_tree(tmp_path, [wflw_line(faces[0], "0--P/a.jpg"), wflw_line(faces[3], "0--P/b c.jpg")],
              test)
    subset = tmp_path / "WFLW_annotations" / "list_98pt_test"
    # The published subset lists have no box and no attributes; both forms are read.
    bare = " ".join(test[1].split()[:196]) + " 0--P/a.jpg"
    write(subset / "list_98pt_test_blur.txt", bare)
    write(subset / "list_98pt_test_makeup.txt", test[1] + "\r\n" + test[0] + "\r\n")
    write(subset / "list_98pt_test_occlusion.txt",
          wflw_line(faces[0], "0--P/a.jpg") + "\n1 2 x.jpg\nnan " + bare.split(" ", 1)[1])
    problems = []
    read = wflw.read(tmp_path, problems)
    assert [(f.name, f.lists) for f in read] == [
        ("a-1", ("train",)), ("b_c-1", ("train",)), ("a-2", ("test", "test_makeup")),
        ("a-3", ("test", "test_makeup", "test_blur"))]
    assert read[0].group == read[2].group != read[1].group
    assert read[3].box.tolist() == [5, 6, 7, 8]
    for face, points in zip(read, [faces[0], faces[3], faces[1], faces[2]]):
        assert numpy.allclose(face.points, points)
    texts = [reason for _, reason in problems]
    assert sum(text.startswith("note: no such list") for text in texts) == 3
    # A bad line of a subset list costs no face.
    assert [text[:12] for text in texts if "note: line" in text] == ["note: line 1", "note: line 2",
                                                                     "note: line 3"]
    assert all(text.startswith("note:") for text in texts)


@pytest.mark.parametrize("line, reason", [
    (wflw_line(face_of("WFLW")[:97], "a.jpg"), "207 fields expected"),
    (wflw_line(face_of("WFLW"), "").strip(), "206 found"),
    ("a.jpg", "1 found"),
    (wflw_line(face_of("WFLW") * numpy.nan, "a.jpg"), "'nan' is no finite number"),
    (wflw_line(face_of("WFLW"), "a.jpg", (1, 2, "x", 4)), "'x' is no number"),
    (wflw_line(face_of("WFLW"), "a.jpg", (9, 2, 3, 4)), "no x_min y_min x_max y_max"),
    (wflw_line(face_of("WFLW"), "a.jpg", attributes="0 0 0 0 2 0"), "attributes are 0 or 1"),
    (wflw_line(face_of("WFLW"), "absent.jpg"), "absent.jpg"),
    (wflw_line(face_of("WFLW"), "x" * 5000), "no image"),
    (wflw_line(face_of("WFLW"), "x\0y"), "no image"),
    ("\x00\xff\xfe", "1 found")])
def test_wflw_names_the_bad_line(tmp_path, line, reason):
    image(tmp_path / "WFLW_images" / "a.jpg")
    good = wflw_line(face_of("WFLW"), "a.jpg")
    path = wflw_tree(tmp_path, [good], [good, "", line, good])
    problems = []
    faces = wflw.read(tmp_path, problems)
    assert [f.subset for f in faces] == ["train", "test", "test"]
    (where, text), = [p for p in problems if not p[1].startswith("note:")]
    assert where == path and text.startswith("line 3: ") and reason in text
    assert len(text) < 300 and "\0" not in text


def test_wflw_without_lists_or_images(tmp_path):
    path = wflw_tree(tmp_path, [""], [""])
    with pytest.raises(UserError, match=r"train.txt: cannot be read: the file is empty"):
        wflw.read(tmp_path, [])
    (tmp_path / "WFLW_images").rmdir()
    with pytest.raises(UserError, match="WFLW_images: no such folder"):
        wflw.read(tmp_path, [])
    shutil.rmtree(path.parent)
    (tmp_path / "WFLW_images").mkdir()
    with pytest.raises(UserError, match="no list of WFLW"):
        wflw.read(tmp_path, [])


def test_wflw_of_shared_and_as_68_points(shared):
    problems = []
    faces = wflw.read(shared / "data" / "samples" / "WFLW", problems)
    assert reasons(problems) == {} and len(faces) == 4
    assert len({f.group for f in faces}) == 2 and len({f.name for f in faces}) == 4
    mean = SCHEMES["300W"].mean_face
    # Which points of WFLW each of the 68 comes from, written down apart from the map.
    sources = {i: [2 * i] for i in range(17)}
    sources |= {17: [33], 18: [34, 41], 19: [35, 40], 20: [36, 39], 21: [37, 38], 22: [42, 50],
                23: [43, 49], 24: [44, 48], 25: [45, 47], 26: [46]}
    sources |= {27 + i: [51 + i] for i in range(9)}
    sources |= {36: [60], 37: [61, 62], 38: [62, 63], 39: [64], 40: [65, 66], 41: [66, 67],
                42: [68], 43: [69, 70], 44: [70, 71], 45: [72], 46: [73, 74], 47: [74, 75]}
    sources |= {48 + i: [76 + i] for i in range(20)}
    for face in faces:
        low, high = face.points.min(0), face.points.max(0)
        assert (low >= face.box[:2] - 20).all() and (high <= face.box[2:] + 20).all()
        mapped = landmarks.wflw_to_300w(face.points)
        for i, source in sources.items():
            near = face.points[source]
            assert (mapped[i] >= near.min(0) - 1e-9).all(), i
            assert (mapped[i] <= near.max(0) + 1e-9).all(), i
        # Order and side: along each stroke of the drawing the face goes the way the mean face does.
        matrix, *_ = numpy.linalg.lstsq(numpy.c_[mapped, numpy.ones(68)], mean, rcond=None)
        upright = numpy.c_[mapped, numpy.ones(68)] @ matrix
        for stroke in ([0, 4, 8, 12, 16], [17, 21, 22, 26], [27, 30, 33], [36, 39, 42, 45],
                       [31, 33, 35], [48, 51, 54], [57, 48], [60, 64], [37, 41], [44, 46]):
            steps = numpy.diff(upright[stroke], axis=0), numpy.diff(mean[stroke], axis=0)
            assert ((steps[0] * steps[1]).sum(1) > 0).all(), stroke
        right, left = (upright[SCHEMES["300W"].regions[f"{side} eye"], 0] for side in
                       ("right", "left"))
        assert right.max() < left.min()


# ---------------------------------------------------------------- LaPa

def lapa_text(points, count=None):
    rows = "\n".join(f"{x:.2f} {y:.2f}" for x, y in points)
    return f"{count or len(points)}\n{rows}\n"


def test_lapa_names_every_bad_item_and_reads_the_rest(tmp_path):
    points = face_of("LaPa").round(2)
    files = {"5_0": lapa_text(points), "5_1": lapa_text(points).replace("\n", "\r\n"),
             "count": lapa_text(points, 105), "short": lapa_text(points[:105]),
             "words": lapa_text(points, "many"), "empty": b"", "binary": bytes(range(256)),
             "nan": lapa_text(points * numpy.nan)}
    for name, content in files.items():
        image(tmp_path / "train" / "images" / f"{name}.jpg")
        write(tmp_path / "train" / "landmarks" / f"{name}.txt", content)
    image(tmp_path / "val" / "images" / "5_0.jpg")
    write(tmp_path / "val" / "landmarks" / "5_0.txt", lapa_text(points))
    image(tmp_path / "val" / "images" / "alone.jpg")
    write(tmp_path / "val" / "landmarks" / "lonely.txt", lapa_text(points))
    (tmp_path / "test" / "images").mkdir(parents=True)
    problems = []
    faces = lapa.read(tmp_path, problems)
    assert [(f.name, f.lists, f.group) for f in faces] == [
        ("train_5_0", ("train",), "5"), ("train_5_1", ("train",), "5"), ("val_5_0", ("val",), "5")]
    assert all(numpy.allclose(f.points, points) for f in faces)
    found = reasons(problems)
    assert "the count says '105', 106 points found" in found["count.txt"]
    assert "105 points found, 106 expected" in found["short.txt"]
    assert "'many'" in found["words.txt"] and "empty" in found["empty.txt"]
    assert "line 2: 'nan'" in found["nan.txt"] and len(found["binary.txt"]) < 120
    assert "alone.txt" in found["alone.jpg"] and "lonely.jpg" in found["lonely.txt"]
    assert "no such folder" in found["landmarks"]
    assert len(problems) == 9


def test_lapa_of_shared(shared):
    problems = []
    faces = lapa.read(shared / "data" / "samples" / "LaPa", problems)
    assert problems == [] and [f.lists for f in faces] == [("test",)] * 2
    assert faces[0].points[0].tolist() == [406, 644]
    assert {f.group for f in faces} == {"10773046825", "13609937564"}


# ---------------------------------------------------------------- COFW

def cofw_rows(faces):
    """phis (n, 87) and bboxes (n, 4) as MATLAB holds them, 1-based."""
    phis = numpy.array([numpy.r_[p[:, 0] + 1, p[:, 1] + 1, numpy.zeros(29)] for p in faces])
    low = phis[:, :58].reshape(-1, 2, 29).min(2)
    size = phis[:, :58].reshape(-1, 2, 29).max(2) - low
    return phis, numpy.c_[low, size]


def write_cofw(folder, split, images, phis, boxes, leave_out=None):
    """A MATLAB 7.3 file: HDF5 behind a header of 512 bytes, every array back to front."""
    tail = {"train": "Tr", "test": "T"}[split]
    path = folder / f"COFW_{split}_color.mat"
    with h5py.File(path, "w", userblock_size=512) as file:
        references = numpy.empty((1, len(images)), h5py.ref_dtype)
        for i, picture in enumerate(images):
            references[0, i] = file.create_dataset(f"#refs#/{i}", data=picture.T,
                                                   compression="gzip").ref
        for name, data in (("Is", references), ("phis", phis.T), ("bboxes", boxes.T)):
            if name != leave_out:
                file.create_dataset(name + tail, data=data)
    with open(path, "r+b") as file:
        file.write(b"MATLAB 7.3 MAT-file".ljust(512, b" "))
    return path


def pictures(count=3):
    generator = numpy.random.default_rng(1)
    images = [generator.integers(0, 256, (40 + i, 30, 3), numpy.uint8) for i in range(count)]
    images[1] = images[1][:, :, 0]  # grey
    return images


def write_old_cofw(folder, images, phis, boxes):
    cells = numpy.empty((len(images), 1), object)
    cells[:, 0] = images
    scipy.io.savemat(folder / "COFW_train_color.mat",
                     {"IsTr": cells, "phisTr": phis, "bboxesTr": boxes}, do_compression=True)


@pytest.mark.parametrize("old", [False, True], ids=["7.3", "older"])
def test_cofw_points_boxes_and_images(tmp_path, old):
    points = [face_of("COFW", seed) for seed in range(3)]
    phis, boxes = cofw_rows(points)
    images = pictures()
    if old:
        write_old_cofw(tmp_path, images, phis, boxes)
    else:
        write_cofw(tmp_path, "train", images, phis, boxes)
        write_cofw(tmp_path, "test", images[::-1], phis[::-1], boxes[::-1])
    problems = []
    faces = cofw.read(tmp_path, problems)
    assert reasons(problems) == {} and len(problems) == old
    assert [f.lists for f in faces] == [("train",)] * 3 + [("test",)] * 3 * (not old)
    assert len({f.name for f in faces}) == len({f.group for f in faces}) == len(faces)
    for face, p, picture in zip(faces, points + points[::-1], images + images[::-1]):
        assert numpy.allclose(face.points, p)
        assert numpy.allclose(face.box, [*p.min(0), *p.max(0)])
        decoded = cofw.image_of(face)
        assert decoded.dtype == numpy.uint8 and decoded.flags.c_contiguous
        grey = picture.ndim == 2
        assert (decoded == (picture[:, :, None] if grey else picture)).all()
        assert decoded.shape == (*picture.shape[:2], 3)


def test_cofw_of_shared(shared, tmp_path):
    samples = shared / "data" / "samples" / "COFW"
    spec = json.loads((samples / "test_cofw.json").read_text())
    names = {entry["id"]: entry["file_name"] for entry in spec["images"]}
    images, points = [], []
    for entry in spec["annotations"]:
        picture = cv2.imread(str(samples / names[entry["image_id"]]))
        images.append(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB))
        points.append(numpy.array(entry["keypoints"]).reshape(29, 3)[:, :2])
    write_cofw(tmp_path, "test", images, *cofw_rows(points))
    faces = cofw.read(tmp_path, [])
    assert len(faces) == len(images) >= 2
    for face, picture, p in zip(faces, images, points):
        assert (cofw.image_of(face) == picture).all()
        assert numpy.allclose(face.points, p)
        assert (face.points > 0).all() and (face.points < picture.shape[1::-1]).all()


def test_cofw_names_bad_faces_and_reads_the_rest(tmp_path):
    phis, boxes = cofw_rows([face_of("COFW", seed) for seed in range(4)])
    phis[1, 7], boxes[2, 3] = numpy.nan, 0
    images = pictures(4)
    images[3] = images[3].astype(float)
    path = write_cofw(tmp_path, "test", images, phis, boxes)
    problems = []
    faces = cofw.read(tmp_path, problems)
    assert [f.name for f in faces] == ["cofw_test_0", "cofw_test_3"]
    texts = [reason for where, reason in problems if where == path]
    assert "phisT, face 2" in texts[0] and "bboxesT, face 3" in texts[1] and len(texts) == 2
    assert (cofw.image_of(faces[0]) == images[0]).all()
    with pytest.raises(UserError, match="image 4 of IsT is float64"):
        cofw.image_of(faces[1])


@pytest.mark.parametrize("field", ["Is", "phis", "bboxes"])
def test_cofw_names_the_missing_field(tmp_path, field):
    write_cofw(tmp_path, "train", pictures(), *cofw_rows([face_of("COFW")] * 3), leave_out=field)
    with pytest.raises(UserError, match=f"COFW_train_color.mat: no field {field}Tr; found: "):
        cofw.read(tmp_path, [])


def test_cofw_of_another_shape(tmp_path):
    phis, boxes = cofw_rows([face_of("COFW")] * 3)
    write_cofw(tmp_path, "train", pictures(), phis[:, :86], boxes)
    with pytest.raises(UserError, match=r"phisTr is .*86.*87\) expected"):
        cofw.read(tmp_path, [])
    write_cofw(tmp_path, "train", pictures(), phis[:2], boxes)
    with pytest.raises(UserError, match="phisTr has 2 rows for 3 images"):
        cofw.read(tmp_path, [])
    write_cofw(tmp_path, "train", pictures(), phis, boxes)
    with h5py.File(tmp_path / "COFW_train_color.mat", "r+") as file:
        del file["IsTr"]
        file["IsTr"] = numpy.zeros((1, 3))
    face = cofw.read(tmp_path, [])[0]
    with pytest.raises(UserError, match="image 1 of IsTr cannot be read"):
        cofw.image_of(face)


@pytest.mark.parametrize("content", [b"", b"\x00" * 9000, b"no such thing" * 300])
@pytest.mark.parametrize("reader, file", [(cofw, "COFW_test_color.mat"),
                                          (aflw, "AFLWinfo_release.mat")])
def test_no_mat_file(tmp_path, reader, file, content):
    write(tmp_path / file, content)
    (tmp_path / "flickr").mkdir()
    with pytest.raises(UserError, match=f"{file}: no"):
        reader.read(tmp_path, [])


@pytest.mark.parametrize("keep", [0.1, 0.3, 0.6, 0.9])
def test_cut_off_mat_files_are_no_traceback(tmp_path, keep):
    rows = cofw_rows([face_of("COFW")] * 3)
    path = write_cofw(tmp_path, "train", pictures(), *rows)
    path.write_bytes(path.read_bytes()[:int(path.stat().st_size * keep)])
    with pytest.raises(UserError, match="COFW_train_color.mat"):
        [cofw.image_of(face) for face in cofw.read(tmp_path, [])]
    write_old_cofw(tmp_path, pictures(), *rows)
    path.write_bytes(path.read_bytes()[:int(path.stat().st_size * keep)])
    cofw._old_images.cache_clear()
    with pytest.raises(UserError, match="COFW_train_color.mat"):
        [cofw.image_of(face) for face in cofw.read(tmp_path, [])]


# ---------------------------------------------------------------- AFLW

def write_aflw(folder, names, faces, order, **change):
    """AFLWinfo_release.mat as published: cells of names, x_min x_max y_min y_max, 19 x 19 y."""
    cells = numpy.empty((len(names), 1), object)
    cells[:, 0] = names
    data = numpy.array([numpy.r_[p[:, 0], p[:, 1]] + 1 for p in faces])
    boxes = numpy.array([[p[:, 0].min(), p[:, 0].max(), p[:, 1].min(), p[:, 1].max()]
                         for p in faces]) + 1
    fields = {"nameList": cells, "bbox": boxes, "data": data,
              "mask_new": numpy.ones((len(names), 19)), "ra": numpy.array([order])} | change
    scipy.io.savemat(folder / "AFLWinfo_release.mat",
                     {key: value for key, value in fields.items() if value is not None})
    (folder / "flickr").mkdir(exist_ok=True)


def test_aflw_split_names_and_points(tmp_path, monkeypatch):
    monkeypatch.setitem(aflw.EXPECTED, "train", 3)
    names = ["0/image1.jpg", "2/image2.jpg", "0/image1.jpg", "3/image9.jpg"]
    points = [face_of("AFLW", seed) for seed in range(4)]
    for name in names:
        image(tmp_path / "flickr" / name)
    write_aflw(tmp_path, names, points, [4, 3, 1, 2])
    problems = []
    faces = aflw.read(tmp_path, problems)
    assert problems == []
    assert [(f.name, f.lists, f.group) for f in faces] == [
        ("3_image9-1", ("train",), "3/image9.jpg"), ("0_image1-2", ("train",), "0/image1.jpg"),
        ("0_image1-1", ("train",), "0/image1.jpg"), ("2_image2-1", ("test",), "2/image2.jpg")]
    for face, p in zip(faces, [points[i] for i in (3, 2, 0, 1)]):
        assert numpy.allclose(face.points, p)
        assert numpy.allclose(face.box, [*p.min(0), *p.max(0)])


def test_aflw_names_bad_faces_and_reads_the_rest(tmp_path):
    names = [f"{i}.jpg" for i in range(5)]
    points = [face_of("AFLW", seed) for seed in range(5)]
    for name in names[:4]:
        image(tmp_path / "flickr" / name)
    points[0][3] = -2
    points[1][4, 1] = numpy.nan
    boxes = numpy.tile([1., 9, 1, 9], (5, 1))
    boxes[2] = [9, 1, 1, 9]
    write_aflw(tmp_path, names, points, [1, 2, 3, 4, 5], bbox=boxes)
    problems = []
    assert [f.name for f in aflw.read(tmp_path, problems)] == ["3-1"]
    texts = [reason for _, reason in problems]
    assert "face 1 ('0.jpg'): a landmark is absent" in texts[0]
    assert "face 2 ('1.jpg'): a landmark is absent" in texts[1]
    assert "face 3 ('2.jpg'): no x_min x_max y_min y_max" in texts[2]
    assert problems[3][0].name == "4.jpg" and len(problems) == 4


@pytest.mark.parametrize("field, value, reason", [
    ("ra", None, "no field ra"), ("data", None, "no field data"), ("bbox", None, "no field bbox"),
    ("nameList", None, "no field nameList"),
    ("ra", numpy.array([[1, 1]]), "ra is no permutation"),
    ("ra", numpy.array([[1, 2, 3]]), r"ra is \(3,\); nameList has 2"),
    ("data", numpy.zeros((2, 36)), r"data is \(2, 36\)"),
    ("bbox", numpy.zeros((3, 4)), r"bbox is \(3, 4\)"),
    ("data", "words", "data does not hold numbers")])
def test_aflw_names_the_bad_field(tmp_path, field, value, reason):
    write_aflw(tmp_path, ["a.jpg", "b.jpg"], [face_of("AFLW")] * 2, [1, 2], **{field: value})
    with pytest.raises(UserError, match=f"AFLWinfo_release.mat: {reason}"):
        aflw.read(tmp_path, [])


def test_aflw_without_images(tmp_path):
    write_aflw(tmp_path, ["a.jpg"], [face_of("AFLW")], [1])
    (tmp_path / "flickr").rmdir()
    with pytest.raises(UserError, match="flickr: no such folder"):
        aflw.read(tmp_path, [])


# ---------------------------------------------------------------- own data

THREE = landmarks.Scheme("three", numpy.array([1, 0, 2]), numpy.zeros((3, 2)), None, {})
HEADER = "image,x1,y1,x2,y2,x3,y3"


def test_custom_folder(tmp_path):
    points = numpy.array([[1, 2], [3, 4], [5, 6.5]])
    for name in ("a.jpg", "sub/a.png", "sub/Test/b.jpg", "val/a.jpg", "bad.jpg", "alone.jpg"):
        photo = image(tmp_path / name)
        write(photo.with_suffix(".pts"), pts(points))
    write(tmp_path / "bad.pts", pts(points[:2]))
    (tmp_path / "alone.pts").rename(tmp_path / "lonely.PTS")
    problems = []
    faces = custom.read(tmp_path, problems, THREE)
    assert [(f.name, f.lists, f.group) for f in faces] == [
        ("a", ("train",), "a"), ("sub_a", ("train",), "sub/a"),
        ("sub_Test_b", ("test",), "sub/Test/b"), ("val_a", ("val",), "val/a")]
    assert all(numpy.allclose(f.points, points) for f in faces)
    assert set(reasons(problems)) == {"bad.pts", "alone.jpg", "lonely.PTS"}
    assert "2 points found, 3 expected" in reasons(problems)["bad.pts"]


def test_custom_csv(tmp_path):
    for name in ("a.jpg", "p/b.png"):
        image(tmp_path / name)
    path = write(tmp_path / "faces.csv", (
        "\ufeffsplit, image,x1,y1,x2,y2,x3,y3,x_min,y_min,x_max,y_max\r\n"
        "train,a.jpg,1,2,3,4,5,6,,,,\r\n\r\n"
        "val,./p/b.png,1,2,3,4,5,6.5,0,0,9,9\r\n"
        ',"a.jpg", 7,8 ,9,10,11,12,,,,\r\n'))
    for source in (path, tmp_path):
        problems = []
        faces = custom.read(source, problems, THREE)
        assert problems == []
        assert [(f.name, f.lists, f.group) for f in faces] == [
            ("a-1", ("train",), "a.jpg"), ("p_b-1", ("val",), "p/b.png"),
            ("a-2", ("train",), "a.jpg")]
        assert faces[0].box is None and faces[1].box.tolist() == [0, 0, 9, 9]
        assert faces[1].points.tolist() == [[1, 2], [3, 4], [5, 6.5]]
        assert all(f.photo.is_file() for f in faces)


@pytest.mark.parametrize("line, reason", [
    ("a.jpg,1,2,3,4,5", "7 fields expected, 6 found"),
    ("a.jpg,1,2,3,4,5,6,7", "7 fields expected, 8 found"),
    ("a.jpg,1,2,3,4,5,nan", "'nan' is no finite number"),
    ("a.jpg,1,2,3,4,5,", "'' is no number"),
    ("a.jpg,1,2,3,4,5,six", "'six' is no number"),
    (",1,2,3,4,5,6", "no image named"),
    ("b.jpg,1,2,3,4,5,6", "no image"),
    ('"a"jpg,1,2,3,4,5,6', "expected after"),
    ('"a.jpg,1,2,3,4,5,6', "unexpected end"),
    ("x" * 200000, "field larger"),
    ("a\0.jpg,1,2,3,4,5,6", "")])
def test_custom_csv_names_the_bad_line(tmp_path, line, reason):
    image(tmp_path / "a.jpg")
    good = "a.jpg,1,2,3,4,5,6"
    path = write(tmp_path / "faces.csv", f"{HEADER}\n{good}\n{line}\n{good}")
    problems = []
    assert len(custom.read(path, problems, THREE)) == 2
    (where, text), = problems
    assert where == path and text.startswith("line 3: ") and reason in text


def test_custom_csv_bad_split_and_box(tmp_path):
    image(tmp_path / "a.jpg")
    path = write(tmp_path / "faces.csv", "\n".join([
        HEADER + ",split,x_min,y_min,x_max,y_max", "a.jpg,1,2,3,4,5,6,dev,,,,",
        "a.jpg,1,2,3,4,5,6,test,0,0,,", "a.jpg,1,2,3,4,5,6,test,9,0,1,1",
        "a.jpg,1,2,3,4,5,6,test,0,0,1,1"]))
    problems = []
    assert len(custom.read(path, problems, THREE)) == 1
    assert [reason.split(":")[0] for _, reason in problems] == ["line 2", "line 3", "line 4"]
    assert "found 'dev'" in problems[0][1] and "x_min" in problems[2][1]


@pytest.mark.parametrize("content, reason", [
    (b"", "no column image"),
    (b"image,x1,y1,x2,y2\na.jpg,1,2,3,4\n", "no column x3.*3 points of three"),
    (b"image;x1;y1;x2;y2;x3;y3\n", "no column image"),
    (HEADER.encode() + b",x4,y4\n", "unknown column 'x4'"),
    (HEADER.encode() + b",x1\n", "column 'x1' is there twice"),
    (HEADER.encode() + b",x_min\n", "needs all of x_min"),
    (HEADER.encode() + b"\n\xff\xfe\n", "UTF-8"),
    (bytes(range(256)), "UTF-8"),
    ('"open' + HEADER, "CSV")])
def test_custom_csv_of_another_form(tmp_path, content, reason):
    path = write(tmp_path / "faces.csv", content)
    with pytest.raises(UserError, match=f"faces.csv: .*{reason}") as caught:
        custom.read(path, [], THREE)
    assert "\n" not in str(caught.value)


def test_custom_says_what_it_needs(tmp_path):
    with pytest.raises(UserError, match="needs a landmark scheme"):
        custom.read(tmp_path, [])
    with pytest.raises(UserError, match="no .pts and no .csv"):
        custom.read(tmp_path, [], THREE)
    write(tmp_path / "a.csv", HEADER)
    write(tmp_path / "b.csv", HEADER)
    with pytest.raises(UserError, match="a.csv, b.csv; give the path"):
        custom.read(tmp_path, [], THREE)
    (tmp_path / "b.csv").unlink()
    write(tmp_path / "sub" / "a.pts", "")
    with pytest.raises(UserError, match="a.csv and .pts files; give the path"):
        custom.read(tmp_path, [], THREE)


# ---------------------------------------------------------------- which reader

def test_every_reader_has_the_interface():
    assert list(readers.READERS) == ["300W", "WFLW", "COFW", "AFLW", "LaPa", "custom",
                                      "samples"]
    for name, reader in readers.READERS.items():
        assert readers.get(name) is readers.get(name.lower()) is reader
        assert reader.SCHEME is None or reader.SCHEME in SCHEMES
        assert reader.LAYOUT and isinstance(reader.EXPECTED, dict)


def test_get_offers_the_nearest():
    with pytest.raises(UserError, match="unknown layout 'WFWL'.*nearest: WFLW"):
        readers.get("WFWL")


@pytest.mark.parametrize("file, reader", [
    ("ibug/a.pts", w300), ("helen/testset/a.pts", w300),
    ("WFLW_annotations/list_98pt_rect_attr_train_test/list_98pt_rect_attr_test.txt", wflw),
    ("COFW_test_color.mat", cofw), ("AFLWinfo_release.mat", aflw), ("a.csv", custom),
    ("x/y/a.pts", custom)])
def test_recognise(tmp_path, file, reader):
    write(tmp_path / "set" / file, "")
    assert readers.recognise(tmp_path / "set") is reader
    if reader is not custom:
        with pytest.raises(UserError, match=f"layout of {reader.NAME}; give .*set"):
            readers.recognise(tmp_path)


def test_recognise_lapa_and_a_csv_file(tmp_path):
    write(tmp_path / "val" / "images" / "a.jpg", "")
    write(tmp_path / "val" / "landmarks" / "a.txt", "")
    assert readers.recognise(tmp_path) is lapa
    assert readers.recognise(write(tmp_path / "a.csv", "")) is custom


def test_recognise_says_what_it_looked_for(tmp_path):
    write(tmp_path / "photos.zip", "")
    with pytest.raises(UserError) as caught:
        readers.recognise(tmp_path)
    text = str(caught.value)
    assert str(tmp_path) in text and "photos.zip" in text
    for name, reader in readers.READERS.items():
        assert (f"{name}: {reader.LAYOUT}" in text) == (name != "samples")
    for path in (tmp_path / "absent", tmp_path / "photos.zip"):
        with pytest.raises(UserError, match=f"{path.name}: no such folder"):
            readers.recognise(path)


def test_recognise_two_layouts_in_one_folder(tmp_path):
    write(tmp_path / "afw" / "a.pts", "")
    write(tmp_path / "COFW_test_color.mat", "")
    with pytest.raises(UserError, match="holds 300W and COFW; name"):
        readers.recognise(tmp_path)
