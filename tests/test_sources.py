"""Cameras, streams and video files: frames, their times, and reconnection."""
import contextlib
import csv
import http.server
import pathlib
import threading
import time

import cv2
import numpy
import pytest
from helpers import mp4, painted_faces

import demo
from utils.errors import UserError
from utils.tracking import outputs, sources


def numbered(i):
    """Return a BGR frame (120, 160, 3) whose brightness encodes its number."""
    return numpy.full((120, 160, 3), 20 + 5 * i, numpy.uint8)


def number_of(frame):
    return round((float(frame.mean()) - 20) / 5)


def write_video(path, frames, rate=25):
    code = "MJPG" if path.endswith(".avi") else "mp4v"
    writer = cv2.VideoWriter(path, cv2.VideoWriter.fourcc(*code), rate, frames[0].shape[1::-1])
    for frame in frames:
        writer.write(frame)
    writer.release()


@contextlib.contextmanager
def served(answer):
    """Serve HTTP on this machine with answer(handler, number of the request); gives the address."""
    requests = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_GET(self):
            requests.append(self.path)
            with contextlib.suppress(OSError):
                answer(self, len(requests))

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def send(handler, frames, pause):
    """Send a stream of JPEGs, as webcam servers do."""
    handler.send_response(200)
    handler.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
    handler.end_headers()
    for frame in frames:
        content = cv2.imencode(".jpg", frame)[1].tobytes()
        handler.wfile.write(b"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n"
                            % len(content) + content + b"\r\n")
        handler.wfile.flush()
        time.sleep(pause)


@pytest.fixture
def short_timeouts(monkeypatch):
    """Shorten the time until streams are given up."""
    monkeypatch.setattr(sources, "STALLED_SECONDS", 0.8)
    monkeypatch.setattr(sources, "RETRY_PAUSES", (0.05, 0.05))


class Film:
    """Stands in for a capture that delivers a frame each 5 ms, read or not."""

    def __init__(self):
        self.taken = -1

    def grab(self):
        time.sleep(0.005)
        self.taken += 1
        return self.taken < 1000

    def retrieve(self):
        return True, numpy.full((2, 2, 3), self.taken, numpy.int64)

    def get(self, setting):
        return 200.0 if setting == cv2.CAP_PROP_FPS else 0.0

    def release(self):
        pass


def test_a_camera_whose_frames_cannot_be_decoded_is_opened_again(monkeypatch, capsys):
    class Broken(Film):
        def retrieve(self):
            return False, None

    opened = iter([Broken(), Film()])
    monkeypatch.setattr(sources, "STALLED_SECONDS", 0.05)
    monkeypatch.setattr(sources, "RETRY_PAUSES", [0.01])
    monkeypatch.setattr(sources.Live, "_open", lambda self: next(opened))
    live = sources.open_source("stream", "rtsp://anywhere")
    frame, _ = live.read()
    assert frame.shape == (2, 2, 3)
    live.release()
    assert "no frame comes; opening it again" in capsys.readouterr().err


def test_a_slow_reader_gets_the_newest_frame_and_when_it_was_taken(monkeypatch):
    film = Film()
    monkeypatch.setattr(sources.Live, "_open", lambda self: film)
    live = sources.open_source("stream", "rtsp://anywhere")
    begin = time.monotonic()
    number, before = -1, -1.0
    for _ in range(5):
        while live._thread and film.taken < number + 20:
            time.sleep(0.001)
        last = film.taken - 1  # The latest frame may not be delivered yet.
        frame, taken = live.read()
        assert frame[0, 0, 0] >= last
        assert frame[0, 0, 0] > number
        assert before < taken <= time.monotonic() - begin
        number, before = frame[0, 0, 0], taken
    live.release()


def test_a_stream_that_stalls_is_opened_again_with_a_line(short_timeouts, capsys):
    def answer(handler, n):
        if n > 2:
            handler.send_error(404)
            return
        send(handler, [numbered(20 * (n - 1) + i) for i in range(10)], 0.02)
        time.sleep(4)  # The connection stays open without data.

    with served(answer) as url:
        live = sources.open_source("stream", url.replace("//", "//me:secret@") + "/live.mjpg")
        found = list(iter(live.read, None))
        live.release()
    numbers = [number_of(frame) for frame, _ in found]
    assert numbers == sorted(numbers)
    assert numbers[0] < 10
    assert numbers[-1] >= 20
    times = [at for _, at in found]
    assert times == sorted(times)
    gap = max(after - before for before, after in zip(times, times[1:]))
    assert gap > 0.7
    line = capsys.readouterr().err.splitlines()[0]
    assert "live.mjpg: no frame comes; opening it again" in line
    assert "secret" not in line


def test_a_video_file_at_an_address_is_read_completely():
    write_video("served.avi", [numbered(i) for i in range(30)])
    content = pathlib.Path("served.avi").read_bytes()

    def answer(handler, n):
        handler.send_response(200)
        handler.send_header("Content-Type", "video/x-msvideo")
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content)

    with served(answer) as url:
        recording = sources.open_source("stream", f"{url}/clip.avi")
        assert recording.count == 30
        assert recording.rate == 25
        found = list(iter(recording.read, None))
    assert [number_of(frame) for frame, _ in found] == list(range(30))
    assert [at for _, at in found] == pytest.approx([i / 25 for i in range(30)], abs=2e-3)


def test_a_live_stream_takes_no_rate(monkeypatch):
    monkeypatch.setattr(sources.Live, "_open", lambda self: Film())
    with pytest.raises(UserError, match="time of their arrival"):
        sources.open_source("stream", "rtsp://anywhere", rate=30.0)


@pytest.mark.parametrize(("reported", "aspect", "shape"), [
    ((2, 1), None, (120, 320, 3)), ((0, 1), None, (120, 160, 3)), ((2, 1), 2 / 3, (240, 160, 3))])
def test_pixels_of_a_stream_are_made_square(reported, aspect, shape, monkeypatch):
    class Anamorphic(Film):
        def retrieve(self):
            return True, numbered(0)

        def get(self, setting):
            return {cv2.CAP_PROP_SAR_NUM: reported[0],
                    cv2.CAP_PROP_SAR_DEN: reported[1]}.get(setting, super().get(setting))

    monkeypatch.setattr(sources.Live, "_open", lambda self: Anamorphic())
    live = sources.open_source("stream", "rtsp://anywhere", aspect=aspect)
    assert live.read()[0].shape == shape
    live.release()


def test_a_video_at_an_address_that_stops_is_cut_off(short_timeouts):
    write_video("served.avi", [numbered(i) for i in range(30)])
    content, waiting = pathlib.Path("served.avi").read_bytes(), threading.Event()

    def answer(handler, n):
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content[:len(content) // 2])
        handler.wfile.flush()
        waiting.wait(10)

    with served(answer) as url:
        recording = sources.open_source("stream", f"{url}/clip.avi")
        numbers = [number_of(frame) for frame, _ in iter(recording.read, None)]
        waiting.set()
    assert 5 < len(numbers) < 25
    assert numbers == list(range(len(numbers)))
    seconds, whole = recording.cut_off()
    assert seconds < whole == pytest.approx(1.2)


def test_the_demo_draws_a_stream(short_timeouts, monkeypatch, capsys):
    image = painted_faces.paint(painted_faces.background(), (1, 80, 120, 60))[..., ::-1]
    # The error tells a supervisor that the demo did not end on request.
    with served(lambda handler, n: send(handler, [image] * 10 * (n == 1), 0.04)) as url, \
            pytest.raises(UserError, match="gives no more frames; the camera or the server went"):
        demo.main(["--source", url.replace("//", "//me:secret@"), "--landmarks", "live.csv",
                   "--output", "demo_stream.mp4"])
    printed = capsys.readouterr()
    rows = list(csv.DictReader(pathlib.Path("live.csv").read_text("utf-8").splitlines()))
    assert 0 < len(rows) <= 10
    assert rows[0]["source"] == url
    assert pathlib.Path("demo_stream.mp4").is_file()
    assert "secret" not in printed.out + printed.err


def test_a_camera_that_stalls_returns_times_without_frames(monkeypatch):
    class Stalled(Film):
        def grab(self):
            if self.taken == 3:
                time.sleep(0.5)
            return super().grab()

    monkeypatch.setattr(sources, "READ_TIMEOUT", 0.1)
    monkeypatch.setattr(sources, "NEXT_READ_TIMEOUT", 0.1)
    monkeypatch.setattr(sources.Live, "_open", lambda self: Stalled())
    live = sources.open_source("stream", "rtsp://anywhere")
    taken = [live.read() for _ in range(12)]
    live.release()
    waited = [seconds for frame, seconds in taken if frame is None]
    assert len(waited) >= 3
    assert waited == sorted(waited)
    assert sum(frame is not None for frame, _ in taken) >= 4


class Camera:
    """Stands in for cv2.VideoCapture of a camera that delivers 640 x 480 at 30 only."""
    opened, lives = [], [3, 2]

    def __init__(self, what, *_):
        Camera.opened.append((what, {}))
        self.left = Camera.lives.pop(0) if Camera.lives else None

    def isOpened(self):
        return self.left is not None

    def set(self, setting, value):
        Camera.opened[-1][1][setting] = value

    def get(self, setting):
        return {cv2.CAP_PROP_FRAME_WIDTH: 640, cv2.CAP_PROP_FRAME_HEIGHT: 480,
                cv2.CAP_PROP_FPS: 30}.get(setting, 0)

    def grab(self):
        time.sleep(0.02)
        self.left -= 1
        return self.left >= 0

    def retrieve(self):
        return True, numpy.zeros((480, 640, 3), numpy.uint8)

    def release(self):
        pass


def test_size_and_rate_are_requested_at_each_opening(short_timeouts, monkeypatch, capsys):
    monkeypatch.setattr(Camera, "opened", [])
    monkeypatch.setattr(Camera, "lives", [3, 2])
    monkeypatch.setattr(sources.cv2, "VideoCapture", Camera)
    kind, what = sources.find_source("/dev/video7")
    assert (kind, what) == ("camera", 7)
    assert sources.find_source("7") == ("camera", 7)
    live = sources.open_source(kind, what, (1280, 720), 60.0)
    found = list(iter(live.read, None))
    assert 1 < len(found) <= 5
    requested = {cv2.CAP_PROP_FRAME_WIDTH: 1280, cv2.CAP_PROP_FRAME_HEIGHT: 720,
                 cv2.CAP_PROP_FPS: 60}
    # The same settings are requested after a reconnection.
    assert Camera.opened[:2] == [(7, requested)] * 2
    printed = capsys.readouterr().err
    assert "camera 7: gives 640x480, not 1280x720" in printed
    assert "camera 7: gives 30 frames a second, not 60" in printed


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    """Use an empty folder, no window, and a model of painted faces."""
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.chdir(tmp_path)
    predictor = painted_faces.Painted()
    monkeypatch.setattr(demo, "get_predictor", lambda weights, device: predictor)
    monkeypatch.setattr(demo, "get_detector", lambda name: painted_faces.detector())


@pytest.mark.parametrize(("arguments", "words"), [
    (["--source", "http://127.0.0.1:9/none"], "http://127.0.0.1:9/none: cannot be opened"),
    (["--source", "rtsp://me:secret@127.0.0.1:9/x"], "^rtsp://127.0.0.1:9/x: cannot be opened"),
    (["--source", "/dev/video99"], "camera 99: cannot be opened"),
    (["--source", "0", "--camera-size", "big"], "expected WIDTHxHEIGHT"),
    (["--source", "0", "--camera-rate", "0"], "expected frames a second"),
    (["--source", "0", "--aspect", "16/9"], "expected WIDTH:HEIGHT"),
    (["--source", "0", "--aspect", "100:1"], "must be 1:4 to 4:1"),
    (["--source", "sample", "--camera-rate", "30"], "need a camera, a stream or a video"),
    (["--source", "sample", "--aspect", "16:9"], "need a camera, a stream or a video"),
    (["--source", "clip.avi", "--camera-size", "640x480"], "needs a camera")])
def test_mistakes(arguments, words, short_timeouts):
    write_video("clip.avi", [numbered(0)] * 3)
    with pytest.raises(UserError, match=words) as error:
        demo.main(arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_a_video_of_a_rotated_camera_is_upright(degrees):
    image = painted_faces.paint(painted_faces.background(), (1, 80, 120, 60))[..., ::-1]
    code = {90: cv2.ROTATE_90_COUNTERCLOCKWISE, 180: cv2.ROTATE_180,
            270: cv2.ROTATE_90_CLOCKWISE}[degrees]
    lying = numpy.ascontiguousarray(cv2.rotate(image, code))
    write_video("lying.mp4", [lying] * 5)
    content = pathlib.Path("lying.mp4").read_bytes()
    pathlib.Path("phone.mp4").write_bytes(mp4.turn(content, degrees))
    frame, _ = sources.open_source("video", pathlib.Path("phone.mp4")).read()
    assert frame.shape == image.shape
    assert abs(frame.astype(int) - image).mean() < 12
    demo.main(["--source", "phone.mp4", "--landmarks", "phone.csv", "--output", "demo_phone.mp4"])
    row = next(csv.DictReader(pathlib.Path("phone.csv").read_text("utf-8").splitlines()))
    assert float(row["x_min"]) == pytest.approx(44, abs=4)
    assert float(row["y_min"]) == pytest.approx(84, abs=4)
    drawn = cv2.VideoCapture("demo_phone.mp4").read()[1]
    assert drawn.shape == image.shape


def test_what_exists_is_a_path_whatever_it_is_called(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert sources.find_source("2023") == ("camera", 2023)
    assert sources.find_source("sample")[1].name == "grace_hopper.jpg"
    for name in ("2023", "sample"):
        pathlib.Path(name).mkdir()
        for photo in ("a.JPG", "b.jfif", "c.jpe", "d.JP2", "e.tif"):
            (pathlib.Path(name) / photo).touch()
        assert [path.name for path in sources.find_source(name)[1]] == [
            "a.JPG", "b.jfif", "c.jpe", "d.JP2", "e.tif"]
    pathlib.Path("7").touch()
    assert sources.find_source("7") == ("video", pathlib.Path("7"))
    assert not capsys.readouterr().err
    # An image that is left out because of its suffix is counted.
    pathlib.Path("2023", "f.jpg_large").write_bytes(b"\xff\xd8\xff\xe0")
    sources.find_source("2023")
    assert "note: 2023: 1 images are left out because of their suffix (f.jpg_large)" in \
        capsys.readouterr().err
    with pytest.raises(UserError, match="no such file or folder"):
        sources.find_source("²")


@pytest.mark.parametrize("name", ["10:30 trip.mp4", "100%d.mp4", "-x.mp4", "it's \"a\".mp4"])
def test_videos_with_any_name(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    writer = outputs.VideoFile(name, 25)
    for i in range(3):
        writer.write(numbered(i), i / 25)
    writer.close()
    recording = sources.open_source(*sources.find_source(name))
    assert abs(recording.read()[0].mean() - 20) < 5
    recording.release()
