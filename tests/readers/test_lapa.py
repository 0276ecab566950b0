"""The reader of LaPa."""
import numpy
from helpers.reader_files import face_of, image, reasons, write

from utils.data.readers import lapa


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
    assert "'many'" in found["words.txt"]
    assert "empty" in found["empty.txt"]
    assert "line 2: 'nan'" in found["nan.txt"]
    assert len(found["binary.txt"]) < 120
    assert "alone.txt" in found["alone.jpg"]
    assert "lonely.jpg" in found["lonely.txt"]
    assert "no such folder" in found["landmarks"]
    assert len(problems) == 9


def test_lapa_of_shared(shared):
    problems = []
    faces = lapa.read(shared / "data" / "samples" / "LaPa", problems)
    assert problems == []
    assert [f.lists for f in faces] == [("test",)] * 2
    assert faces[0].points[0].tolist() == [406, 644]
    assert {f.group for f in faces} == {"10773046825", "13609937564"}
