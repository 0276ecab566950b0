"""The reader of COFW: .mat files of both formats, and damaged ones."""
import json

import cv2
import h5py
import numpy
import pytest
import scipy.io
from helpers.reader_files import face_of, reasons, write

from utils.data.generator import DataGenerator
from utils.data.readers import aflw, cofw
from utils.errors import UserError


def cofw_rows(faces):
    """Phis (n, 87) and bboxes (n, 4) as MATLAB holds them, 1-based."""
    phis = numpy.array([numpy.r_[p[:, 0] + 1, p[:, 1] + 1, numpy.zeros(29)] for p in faces])
    low = phis[:, :58].reshape(-1, 2, 29).min(2)
    size = phis[:, :58].reshape(-1, 2, 29).max(2) - low
    return phis, numpy.c_[low, size]


def write_cofw(folder, split, images, phis, boxes, leave_out=None):
    """Write a MATLAB 7.3 file: HDF5 after a 512-byte header, all arrays with reversed axes."""
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
    assert reasons(problems) == {}
    assert len(problems) == old
    assert [f.lists for f in faces] == [("train",)] * 3 + [("test",)] * 3 * (not old)
    assert len({f.name for f in faces}) == len({f.group for f in faces}) == len(faces)
    for face, p, picture in zip(faces, points + points[::-1], images + images[::-1]):
        assert numpy.allclose(face.points, p)
        assert numpy.allclose(face.box, [*p.min(0), *p.max(0)])
        decoded = cofw.image_of(face)
        assert decoded.dtype == numpy.uint8
        assert decoded.flags.c_contiguous
        grey = picture.ndim == 2
        assert (decoded == (picture[:, :, None] if grey else picture)).all()
        assert decoded.shape == (*picture.shape[:2], 3)


def test_each_face_of_a_file_counts_as_a_photo(tmp_path, capsys):
    phis, boxes = cofw_rows([face_of("COFW", 0)] * 3)
    write_cofw(tmp_path, "train", [numpy.zeros((256, 256, 3), numpy.uint8)] * 3, phis, boxes)
    DataGenerator(tmp_path, 64, output_dir=tmp_path / "prepared", workers=1).run()
    out = capsys.readouterr().out
    assert "overlap" not in out
    assert "3 faces of 3 photos" in out


def test_cofw_marks_hidden_points(tmp_path):
    phis, boxes = cofw_rows([face_of("COFW", seed) for seed in range(2)])
    phis[:, 58:] = hidden = numpy.random.default_rng(0).integers(0, 2, (2, 29))
    write_cofw(tmp_path, "train", pictures(2), phis, boxes)
    found = [face.hidden.tolist() for face in cofw.read(tmp_path, [])]
    assert found == hidden.astype(bool).tolist()


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
        assert (face.points > 0).all()
        assert (face.points < picture.shape[1::-1]).all()


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
    assert "phisT, face 2" in texts[0]
    assert "bboxesT, face 3" in texts[1]
    assert len(texts) == 2
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
@pytest.mark.parametrize(("reader", "file"), [(cofw, "COFW_test_color.mat"),
                                          (aflw, "AFLWinfo_release.mat")])
def test_files_that_are_not_mat_files(tmp_path, reader, file, content):
    write(tmp_path / file, content)
    (tmp_path / "flickr").mkdir()
    with pytest.raises(UserError, match=f"{file}: no"):
        reader.read(tmp_path, [])


@pytest.mark.parametrize("keep", [0.1, 0.3, 0.6, 0.9])
def test_cut_off_mat_files_raise_a_user_error(tmp_path, keep):
    rows = cofw_rows([face_of("COFW")] * 3)
    path = write_cofw(tmp_path, "train", pictures(), *rows)
    path.write_bytes(path.read_bytes()[:int(path.stat().st_size * keep)])
    with pytest.raises(UserError, match="COFW_train_color.mat"):
        [cofw.image_of(face) for face in cofw.read(tmp_path, [])]
    write_old_cofw(tmp_path, pictures(), *rows)
    path.write_bytes(path.read_bytes()[:int(path.stat().st_size * keep)])
    cofw._images_before_73.cache_clear()
    with pytest.raises(UserError, match="COFW_train_color.mat"):
        [cofw.image_of(face) for face in cofw.read(tmp_path, [])]
