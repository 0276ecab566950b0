"""Outputs: complete or unchanged files, never the source, and one line where the disk is full."""
import contextlib
import csv
import json
import os
import pathlib
import resource
import signal
import stat
import types

import cv2
import numpy
import pytest
from helpers import painted_faces

import demo
from utils.drowsiness.states import Event
from utils.errors import UserError
from utils.tracking import outputs

needs_full = pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="needs /dev/full")


@pytest.fixture(autouse=True)
def painted(monkeypatch, tmp_path):
    """Run the demo on painted faces in an empty folder with an image and a video of two faces."""
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.chdir(tmp_path)
    predictor = painted_faces.Painted()
    monkeypatch.setattr(demo, "get_predictor", lambda weights, device: predictor)
    monkeypatch.setattr(demo, "get_detector", lambda name: painted_faces.detector())
    image = painted_faces.paint(painted_faces.background(), (1, 80, 120, 60), (2, 240, 60, 50))
    assert cv2.imwrite("two.png", image[..., ::-1])
    write_video("two.avi", image)


def write_video(path, image):
    """Write forty frames of an RGB image (240, 320, 3)."""
    writer = cv2.VideoWriter(path, cv2.VideoWriter.fourcc(*"MJPG"), 30, (320, 240))
    for _ in range(40):
        writer.write(numpy.ascontiguousarray(image[..., ::-1]))
    writer.release()


@contextlib.contextmanager
def small_disk(size):
    """Limit the size of every file of this process in bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def frames_of(path):
    capture, count = cv2.VideoCapture(str(path)), 0
    while capture.read()[0]:
        count += 1
    return count


def leftovers():
    return [path.name for path in pathlib.Path().iterdir() if ".part" in path.name]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_files_are_completed_when_the_process_is_ended(number, monkeypatch):
    # Under nohup SIGHUP is ignored; the default is needed here.
    before, drawn = signal.signal(number, signal.SIG_DFL), []
    of_video = outputs.VideoFile.write

    def write(self, *arguments):
        of_video(self, *arguments)
        drawn.append(1)
        if len(drawn) == 10:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(outputs.VideoFile, "write", write)
    pathlib.Path("out.json").write_text("old")
    try:
        with pytest.raises(SystemExit) as ended:
            demo.main(["--source", "two.avi", "--output", "out.avi", "--landmarks", "out.json"])
        assert ended.value.code == 128 + number
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, before)
    assert len(json.loads(pathlib.Path("out.json").read_text())["frames"]) == 10
    assert frames_of("out.avi") == 10
    assert not leftovers()


def test_a_video_keeps_the_time_of_its_source(tmp_path):
    film = outputs.VideoFile(tmp_path / "out.avi", 10)
    image = numpy.zeros((32, 32, 3), numpy.uint8)
    # Ten frames in a fifth of a second, a gap, and frames at the nominal rate.
    stamps = [*numpy.arange(10) / 50, 3.0, *(3.1 + numpy.arange(10) / 10)]
    for seconds in stamps:
        film.write(image, seconds)
    film.close()
    assert abs(frames_of(tmp_path / "out.avi") - 10 * stamps[-1]) <= outputs.MAX_FRAMES_AHEAD + 1


@needs_full
@pytest.mark.parametrize(("flag", "name", "words"), [
    ("--landmarks", "full.csv", "landmarks full.csv: cannot be written: No space"),
    ("--landmarks", "full.json", "landmarks full.json: cannot be written: No space"),
    ("--events", "full.csv", "events full.csv: cannot be written: No space"),
    ("--output", "full.mp4", "output full.mp4: a video needs a file"),
    ("--output", "full.avi", "output full.avi: a video needs a file")])
def test_a_device_that_is_full(flag, name, words):
    pathlib.Path(name).symlink_to("/dev/full")
    with pytest.raises(UserError, match=words) as error:
        demo.main(["--source", "two.avi", flag, name])
    assert "\n" not in str(error.value)
    assert stat.S_ISCHR(os.stat("/dev/full").st_mode)
    assert pathlib.Path(name).is_symlink()


@needs_full
def test_a_picture_on_a_full_device():
    pathlib.Path("full.png").symlink_to("/dev/full")
    with pytest.raises(UserError, match="^full.png: cannot be written: No space"):
        demo.main(["--source", "two.png", "--output", "full.png"])


@pytest.mark.parametrize("name", ["faces.csv", "faces.json"])
def test_landmarks_on_a_full_disk_are_whole_records(name):
    plain = painted_faces.paint(numpy.full((240, 320, 3), 120, numpy.uint8), (1, 80, 120, 60),
                                (2, 240, 60, 50))
    os.mkdir("in")
    for i in range(30):
        assert cv2.imwrite(f"in/{i:02d}.png", plain[..., ::-1])
    # Room for about fifteen frames of landmarks; each image fits.
    with small_disk(30000), pytest.raises(
            UserError, match=f"{name}: cannot be written: .*; the first [0-9]+ records"):
        demo.main(["--source", "in", "--landmarks", name, "--output", "out"])
    text = pathlib.Path(name).read_text()
    if name.endswith("csv"):
        rows = list(csv.DictReader(text.splitlines()))
        assert len(rows) > 10
        assert len(rows) % 2 == 0
        assert all(row["y67"] for row in rows)
    else:
        frames = json.loads(text)["frames"]
        assert len(frames) > 5
        assert all(len(frame["faces"]) == 2 for frame in frames)
    # The other outputs are complete too.
    assert all(cv2.imread(str(path)) is not None for path in pathlib.Path("out").iterdir())


def test_events_on_a_full_disk_are_whole_records():
    log = outputs.EventFile("events.csv")
    event = Event("blink", 1.0, 1.25)
    with small_disk(200), pytest.raises(
            UserError, match="events events.csv: cannot be written: .*first 6 records"):
        log.write([("driver", event)] * 20)
    # Only the first error is raised.
    log.write([("driver", event)])
    log.close()
    rows = list(csv.DictReader(pathlib.Path("events.csv").read_text("utf-8").splitlines()))
    assert [row["seconds"] for row in rows] == ["0.25"] * 6


def test_a_video_on_a_full_disk_leaves_the_old_file():
    demo.main(["--source", "two.avi", "--output", "out.avi"])
    assert frames_of("out.avi") == 40
    before = pathlib.Path("out.avi").read_bytes()
    for name in ("out.avi", "new.avi"):
        with small_disk(20000), pytest.raises(UserError, match=f"output {name}: .*disk full"):
            demo.main(["--source", "two.avi", "--output", name])
    assert pathlib.Path("out.avi").read_bytes() == before
    assert not pathlib.Path("new.avi").exists()
    assert not leftovers()


@pytest.mark.parametrize("suffix", outputs.CODECS)
def test_a_disk_that_fills_up_ends_the_video_in_time(suffix, monkeypatch):
    room = iter([1 << 30] * 25)
    monkeypatch.setattr(outputs.shutil, "disk_usage",
                        lambda path: types.SimpleNamespace(free=next(room, 1000)))
    with pytest.raises(UserError, match="the disk is full; the first 25 frames are whole"):
        demo.main(["--source", "two.avi", "--output", f"out{suffix}"])
    assert frames_of(f"out{suffix}") == 25


@pytest.mark.parametrize("make", ["hard", "soft", "spelling"])
@pytest.mark.parametrize(("source", "flag", "name"), [
    ("two.avi", "--output", "out.avi"), ("two.png", "--output", "out.png"),
    ("two.avi", "--landmarks", "out.csv"), ("two.avi", "--landmarks", "out.json"),
    ("two.png", "--landmarks", "out.json"), ("two.avi", "--events", "out.csv")])
def test_a_source_is_never_overwritten(make, source, flag, name):
    before = pathlib.Path(source).read_bytes()
    if make == "hard":
        os.link(source, name)
    elif make == "soft":
        os.symlink(source, name)
    else:
        os.rename(source, name)  # A video may be called .csv.
        os.mkdir("sub")
        source, name = name, f"sub/../{name}"
    with pytest.raises(UserError, match="this is the source"):
        demo.main(["--source", source, flag, str(name)])
    assert pathlib.Path(source).read_bytes() == before


def test_an_image_of_a_folder_is_never_overwritten():
    os.mkdir("in")
    os.mkdir("out")
    os.rename("two.png", "in/two.png")
    os.symlink("../in/two.png", "out/two.png")
    with pytest.raises(UserError, match="this is the source"):
        demo.main(["--source", "in", "--output", "out"])
    with pytest.raises(UserError, match="folder of their own"):
        demo.main(["--source", "in", "--output", "out/../in"])


def test_two_outputs_cannot_be_one_file():
    with pytest.raises(UserError, match="written as landmarks already"):
        demo.main(["--source", "two.avi", "--landmarks", "a.csv", "--events", "./a.csv"])


def test_existing_outputs_are_replaced_atomically():
    for name in ("out.avi", "faces.json", "events.csv"):
        pathlib.Path(name).write_text("old")
        os.chmod(name, 0o640)
        os.link(name, f"kept-{name}")
    demo.main(["--source", "two.avi", "--output", "out.avi", "--landmarks", "faces.json",
               "--events", "events.csv"])
    for name in ("out.avi", "faces.json", "events.csv"):
        # The old file, which has another link, was not written to.
        assert pathlib.Path(f"kept-{name}").read_text() == "old"
        assert stat.S_IMODE(os.stat(name).st_mode) == 0o640
    assert frames_of("out.avi") == 40
    assert not leftovers()
    assert len(json.loads(pathlib.Path("faces.json").read_text())["frames"]) == 40


def test_an_output_behind_a_link_is_replaced_there():
    os.mkdir("far")
    pathlib.Path("far/faces.csv").write_text("old")
    os.symlink("far/faces.csv", "faces.csv")
    demo.main(["--source", "two.png", "--landmarks", "faces.csv"])
    assert pathlib.Path("faces.csv").is_symlink()
    assert pathlib.Path("far/faces.csv").read_text().startswith("frame,")


def test_a_mistake_in_one_output_leaves_the_others_unchanged():
    pathlib.Path("faces.csv").write_text("old")
    with pytest.raises(UserError, match="events events.txt: written as .csv"):
        demo.main(["--source", "two.avi", "--landmarks", "faces.csv", "--events", "events.txt"])
    assert not leftovers()
    assert pathlib.Path("faces.csv").read_text() == "old"


def test_a_video_of_a_camera_has_the_duration_of_the_capture():
    video = outputs.VideoFile("camera.avi", 30)
    # A slow machine, then a gap of the camera; frames that come fast are kept.
    for seconds in (0.0, 0.1, 0.21, 0.5, 7.0, 7.001, 7.002):
        video.write(numpy.zeros((48, 64, 3), numpy.uint8), seconds)
    video.close()
    assert frames_of("camera.avi") == 7 * 30 + 3


def test_eyes_of_a_picture():
    """A single image has openness and closed, but no state, which needs a video."""
    demo.main(["--source", "two.png", "--eyes", "--landmarks", "two.json"])
    face = json.loads(pathlib.Path("two.json").read_text())["frames"][0]["faces"][0]
    assert face["closed"] is False
    assert all(0.5 < value <= 1 for value in face["openness"])
    assert face["state"] is None
    assert face["perclos"] is None
    demo.main(["--source", "two.png", "--eyes", "--landmarks", "two.csv"])
    row = next(csv.DictReader(pathlib.Path("two.csv").read_text("utf-8").splitlines()))
    assert row["closed"] == "false"
    assert 0.5 < float(row["openness_left"]) <= 1
    assert row["state"] == row["perclos"] == ""


def test_a_frame_without_the_driver_has_the_drivers_state(monkeypatch):
    predictor = painted_faces.Painted(blind=0.0)
    predictor.confidence = 0.0
    monkeypatch.setattr(demo, "get_predictor", lambda weights, device: predictor)
    demo.main(["--source", "two.avi", "--driver", "--landmarks", "two.csv"])
    rows = list(csv.DictReader(pathlib.Path("two.csv").read_text("utf-8").splitlines()))
    assert len(rows) == 40
    assert {row["state"] for row in rows} == {"not visible"}
    assert {row["id"] + row["x0"] + row["closed"] for row in rows} == {""}


def test_driver_monitoring_needs_a_video():
    with pytest.raises(UserError, match="need a video"):
        demo.main(["--source", "two.png", "--driver"])
