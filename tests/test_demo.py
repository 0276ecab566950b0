"""The demo's command line: sources, outputs, landmark files and mistakes."""
import csv
import inspect
import json
import pathlib
import re
import subprocess
import sys

import cv2
import numpy
import pytest
from helpers import films, painted_faces

import demo
from utils.errors import UserError
from utils.landmarks import pose
from utils.landmarks.schemes import SCHEMES
from utils.tracking.tracker import Tracker

ROOT = pathlib.Path(demo.__file__).parent
SHIPPED = ROOT / "weights/tiny.int8.onnx"


@pytest.fixture(autouse=True)
def headless(monkeypatch, tmp_path):
    """Use no window, and an empty folder for outputs."""
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def painted(monkeypatch):
    """Run the demo with a model and a detector of painted faces."""
    predictor = painted_faces.Painted()
    monkeypatch.setattr(demo, "get_predictor", lambda weights, device: predictor)
    monkeypatch.setattr(demo, "get_detector", lambda name: painted_faces.detector())
    return predictor


def frame(i=0):
    return painted_faces.paint(painted_faces.background(), (1, 80 + 2 * i, 120, 60),
                               (2, 240 - 2 * i, 60, 50))


def write_image(path, image):
    assert cv2.imwrite(str(path), image[..., ::-1] if image.ndim == 3 else image)


def write_video(path, frames):
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 30, (320, 240))
    for image in frames:
        writer.write(numpy.ascontiguousarray(image[..., ::-1]))
    writer.release()


def count_frames(path):
    capture, count = cv2.VideoCapture(str(path)), 0
    while capture.read()[0]:
        count += 1
    return count


def test_image(painted, capsys):
    write_image("two.png", frame())
    demo.main(["--source", "two.png", "--output", "demo_two.png", "--landmarks", "two.json"])
    assert "1 frames, 2 faces: demo_two.png, two.json" in capsys.readouterr().out
    drawn = cv2.imread("demo_two.png")[..., ::-1]
    assert drawn.shape == (240, 320, 3)
    assert (drawn != frame()).any()
    content = json.loads(pathlib.Path("two.json").read_text())
    assert content["scheme"] == "300W"
    assert len(content["frames"]) == 1
    face = content["frames"][0]["faces"][0]
    assert set(face) == {"id", "box", "points", "confidence"}
    assert len(face["points"]) == 68
    assert face["box"] == pytest.approx([44, 84, 116, 156], abs=3)
    assert face["confidence"] == pytest.approx(0.9, abs=1e-3)


@pytest.mark.parametrize("flags", [["--landmarks", "table.csv"], ["--events", "table.csv"]])
def test_no_video_is_written_without_output_beside_other_outputs(painted, flags, capsys):
    write_video("two.avi", [frame(i) for i in range(5)])
    demo.main(["--source", "two.avi", *flags])
    assert "5 frames, 10 faces: table.csv" in capsys.readouterr().out
    table = pathlib.Path("table.csv").read_text()
    assert {path.name for path in pathlib.Path().iterdir()} == {"two.avi", "table.csv"}
    demo.main(["--source", "two.avi", "--output", "seen.avi", *flags])
    assert count_frames("seen.avi") == 5
    assert pathlib.Path("table.csv").read_text() == table


def test_pose_is_written(painted):
    write_image("two.png", frame())
    demo.main(["--source", "two.png", "--pose", "--output", "drawn.png", "--landmarks", "two.csv"])
    row, _ = csv.DictReader(pathlib.Path("two.csv").read_text("utf-8").splitlines())
    points = numpy.array([[float(row[f"{axis}{i}"]) for axis in "xy"] for i in range(68)])
    expected = pose.head_pose(points, SCHEMES["300W"])
    assert [float(row[k]) for k in ("yaw", "pitch", "roll")] == pytest.approx(expected, abs=0.1)
    assert (cv2.imread("drawn.png")[:40, :200] != frame()[:40, :200, ::-1]).any(), "the numbers"
    demo.main(["--source", "two.png", "--pose", "--eyes", "--landmarks", "two.json"])
    face = json.loads(pathlib.Path("two.json").read_text())["frames"][0]["faces"][0]
    assert face["pose"] == pytest.approx(expected, abs=0.1)
    assert "openness" in face


def test_a_hint_is_printed_where_no_face_is_found(painted, capsys):
    painted.confidence = 0.1
    write_image("two.png", frame())
    demo.main(["--source", "two.png", "--output", "drawn.png"])
    assert "found 2 boxes in which the network sees no face" in capsys.readouterr().err
    write_image("none.png", painted_faces.background())
    demo.main(["--source", "none.png", "--output", "drawn.png"])
    assert "the detector found no face" in capsys.readouterr().err


def test_video(painted, capsys):
    write_video("two.avi", [frame(i) for i in range(15)])
    demo.main(["--source", "two.avi", "--output", "out/drawn.mp4", "--landmarks", "two.csv",
               "--eyes"])
    assert "15 frames, 30 faces" in capsys.readouterr().out
    assert count_frames("out/drawn.mp4") == 15
    rows = list(csv.DictReader(pathlib.Path("two.csv").read_text("utf-8").splitlines()))
    assert len(rows) == 30
    assert {row["id"] for row in rows} == {"1", "2"}
    assert [row["frame"] for row in rows[:4]] == ["0", "0", "1", "1"]
    assert float(rows[-1]["time"]) == pytest.approx(14 / 30, abs=1e-3)
    assert 0.1 < float(rows[-1]["eye_right"]) < 0.6
    assert {"blinks_per_minute", "perclos", "x0", "y67"} <= set(rows[0])
    xs = [float(row["x30"]) for row in rows if row["id"] == "1"]
    assert xs[-1] - xs[0] == pytest.approx(28, abs=3)


def test_the_rate_that_is_drawn_on_a_film_is_its_own(painted, monkeypatch):
    lines = []
    monkeypatch.setattr(demo.draw, "text_lines",
                        lambda image, texts: lines.append(texts) or image)
    films.write("two.mkv", [frame(i)[..., ::-1] for i in range(5)], range(0, 200, 40),
                rate=1000)
    demo.main(["--source", "two.mkv", "--output", "drawn.mp4"])
    assert lines == [["25 FPS"]] * 5
    written = cv2.VideoCapture("drawn.mp4")
    assert written.get(cv2.CAP_PROP_FPS) == 25
    assert count_frames("drawn.mp4") == 5


def test_a_film_that_is_cut_off_is_reported_in_one_line(painted, capsys):
    write_video("two.avi", [frame(i) for i in range(40)])
    content = pathlib.Path("two.avi").read_bytes()
    pathlib.Path("two.avi").write_bytes(content[:len(content) // 2])
    demo.main(["--source", "two.avi", "--landmarks", "two.csv"])
    line, = [line for line in capsys.readouterr().err.splitlines() if "two.avi" in line]
    assert re.search(r"two.avi: ended after 0\.[67] of 1\.3 s; the file is cut off", line)


def test_a_gap_is_not_called_a_low_rate(painted, capsys):
    for name, stamps in (("gap.mkv", [0, 4500, *range(4540, 5000, 40)]),
                         ("slow.mkv", range(0, 30000, 3000))):
        films.write(name, [frame()[..., ::-1]] * len(stamps), list(stamps))
        demo.main(["--source", name, "--eyes", "--landmarks", "out.csv"])
        assert capsys.readouterr().err.count("2 s apart") == (name == "slow.mkv")


def test_folder_leaves_out_files_that_are_no_images(painted, capsys):
    pathlib.Path("in").mkdir()
    for name in ("a.png", "b.jpg"):
        write_image(f"in/{name}", frame())
    pathlib.Path("in/c.png").write_bytes(b"")
    pathlib.Path("in/notes.txt").write_text("no image")
    demo.main(["--source", "in", "--output", "out", "--landmarks", "faces.json"])
    printed = capsys.readouterr()
    assert sorted(path.name for path in pathlib.Path("out").iterdir()) == ["a.png", "b.png"]
    assert "c.png" in printed.err
    assert "2 frames" in printed.out
    frames = json.loads(pathlib.Path("faces.json").read_text())["frames"]
    assert [entry["source"] for entry in frames] == ["a.png", "b.jpg"]
    # Images of a folder are not a video: ids start anew in each.
    assert [face["id"] for face in frames[1]["faces"]] == [1, 2]


def test_a_folder_without_readable_images_is_a_mistake(painted, capsys):
    pathlib.Path("in").mkdir()
    for name in ("a.png", "b.jpg"):
        pathlib.Path("in", name).write_bytes(b"")
    with pytest.raises(UserError, match="in: none of its 2 pictures could be read"):
        demo.main(["--source", "in", "--output", "out"])


def image_kinds():
    image = frame()
    return {"one.png": numpy.zeros((1, 1, 3), numpy.uint8), "grey.png": image[..., 0],
            "alpha.png": numpy.dstack([image[..., ::-1], image[..., :1]])[..., [2, 1, 0, 3]],
            "deep.png": image.astype(numpy.uint16) * 257,
            "deep_grey.png": image[..., 0].astype(numpy.uint16) * 257}


@pytest.mark.parametrize("name", image_kinds())
def test_kinds_of_images(name, painted):
    image = image_kinds()[name]
    if name == "alpha.png":
        assert cv2.imwrite(name, image)
    else:
        write_image(name, image)
    demo.main(["--source", name])
    drawn = cv2.imread(f"demo_{name}")
    assert drawn.shape == (*image.shape[:2], 3)
    assert drawn.dtype == numpy.uint8
    if name == "deep.png":
        assert (demo.read_image(name) == frame()).all()


def test_truncated_video_is_played_to_its_end(painted, capsys):
    write_video("whole.avi", [frame(i) for i in range(30)])
    content = pathlib.Path("whole.avi").read_bytes()
    pathlib.Path("cut.avi").write_bytes(content[:len(content) // 2])
    demo.main(["--source", "cut.avi"])
    printed = capsys.readouterr()
    played = count_frames("demo_cut.mp4")
    assert 5 < played < 30
    assert f"{played} frames" in printed.out


def test_unreadable_videos(painted, shared):
    pathlib.Path("empty.mp4").write_bytes(b"")
    clip = (shared / "data/video/clip.mp4").read_bytes()
    pathlib.Path("cut.mp4").write_bytes(clip[:len(clip) // 2])
    pathlib.Path("notes.txt").write_text("neither image nor video\n")
    for name in ("empty.mp4", "notes.txt"):
        with pytest.raises(UserError, match="neither an image nor a video"):
            demo.main(["--source", name])
    # Whether OpenCV can read a part of it depends on its version.
    message = "cut.mp4"
    try:
        demo.main(["--source", "cut.mp4"])
    except UserError as error:
        message = str(error)
    assert "cut.mp4" in message


@pytest.mark.parametrize(("arguments", "words"), [
    (["--source", "nowhere.mp4"], "no such file"), (["--source", "empty"], "no images"),
    (["--source", "77"], "camera 77: cannot be opened"),
    (["--source", "two.png", "--output", "two.mp4"], "written as"),
    (["--source", "two.png", "--output", "two.png"], "this is the source"),
    (["--source", "two.png", "--landmarks", "two.txt"], "as .csv or .json"),
    (["--source", "two.png", "--min-confidence", "high"], "min-confidence: expected float"),
    (["--source", "two.png", "--min-confidence", "2"], "min-confidence: must be 0 to 1, found 2"),
    (["--source", "two.png", "--min-confidence", "nan"], "min-confidence: expected float"),
    (["--source", "two.png", "--detect-every", "0"], "detect-every: must be at least 1, found 0"),
    (["--source", "two.png", "--detect-every", "1.5"], "detect-every: expected int, found 1.5"),
    (["--source", "two.png", "--detect-every", "inf"], "detect-every: expected int"),
    (["--source", "two.png", "--filter-beta", "inf"], "filter-beta: must be at least 0"),
    (["--source", "two.png", "--filter-min-cutoff=-1"], "filter-min-cutoff: must be at least 0"),
    (["--source", "broken.png"], "not an image"), (["--sourse", "0"], "unknown flag --sourse"),
])
def test_mistakes(arguments, words, painted):
    write_image("two.png", frame())
    pathlib.Path("empty").mkdir()
    pathlib.Path("broken.png").write_bytes(pathlib.Path("two.png").read_bytes()[:40])
    with pytest.raises(UserError, match=words) as error:
        demo.main(arguments)
    assert str(error.value).count("\n") <= 1


def test_tracking_flags_are_the_trackers_arguments():
    options = vars(demo.parse([]))
    arguments = inspect.signature(Tracker.__init__).parameters
    assert {name: arguments[name].default for name in demo.TRACKING} \
        == {name: options[name] for name in demo.TRACKING} \
        == {"detect_every": 10, "min_confidence": 0.0, "filter_min_cutoff": 1.2, "filter_beta": 5.0}
    assert vars(demo.parse(["--detect-every", "3"]))["detect_every"] == 3


def test_eyes_need_eyes(painted):
    painted.scheme = SCHEMES["300W"].subset(range(48, 68))
    write_image("two.png", frame())
    with pytest.raises(UserError, match="contours"):
        demo.main(["--source", "two.png", "--eyes"])


def test_files_that_are_no_weights():
    for path, words in (("lost.onnx", "no such file"), (__file__, "found .py"),
                        ("lost", "no such experiment")):
        with pytest.raises(UserError, match=words):
            demo.get_predictor(path)


def run(*arguments):
    return subprocess.run([sys.executable, str(ROOT / "demo.py"), *map(str, arguments)],
                          capture_output=True, text=True, timeout=120)


def test_mistakes_end_with_one_line_and_code_2():
    done = run("--source", "77")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: camera 77")
    assert done.stderr.count("\n") == 1


def test_the_shipped_8_bit_model_is_used_on_the_cpu_only(tmp_path, monkeypatch):
    monkeypatch.setattr(demo.experiment, "WEIGHTS", tmp_path)
    for name in ("tiny.pt", "tiny.int8.onnx"):
        (tmp_path / name).touch()
    assert demo.find_weights(None) == demo.find_weights(None, "cpu") == tmp_path / "tiny.int8.onnx"
    assert demo.find_weights(None, "cuda") == demo.find_weights("tiny") == tmp_path / "tiny.pt"
    (tmp_path / "tiny.int8.onnx").unlink()
    assert demo.find_weights(None) == tmp_path / "tiny.pt"


needs_weights = pytest.mark.skipif(not SHIPPED.is_file(), reason="needs weights/tiny.int8.onnx")


@needs_weights
def test_sample_with_shipped_weights(capsys):
    pytest.importorskip("matplotlib")
    demo.main(["--source", "sample", "--landmarks", "sample.json", "--weights", str(SHIPPED)])
    face, = json.loads(pathlib.Path("sample.json").read_text())["frames"][0]["faces"]
    points = numpy.array(face["points"])
    # The face in the portrait of 512 x 600 pixels.
    assert face["confidence"] > 0.15
    assert (points.min(0) > [150, 90]).all()
    assert (points.max(0) < [390, 360]).all()


@needs_weights
def test_clip_with_shipped_weights(shared):
    """All frames are processed and the singer has one id.

    The shot without a frontal face has nearly no track: `tiny` accepts the profile in three frames.
    """
    demo.main(["--source", str(shared / "data/video/clip.mp4"), "--landmarks", "clip.json",
               "--output", "demo_clip.mp4", "--weights", str(SHIPPED),
               "--detector", str(shared / "models/yunet_n_640_640.onnx")])
    frames = json.loads(pathlib.Path("clip.json").read_text())["frames"]
    assert len(frames) == 275
    assert count_frames("demo_clip.mp4") == 275
    assert sum(bool(entry["faces"]) for entry in frames[20:82]) <= 3
    singer = [{face["id"] for face in entry["faces"]} for entry in frames[85:208]]
    assert all(ids == singer[0] and len(ids) == 1 for ids in singer)
