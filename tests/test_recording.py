"""Video files: times, rates, pixel shapes, and what is damaged or cut off."""
import pathlib
import threading

import cv2
import numpy
import pytest
from helpers import films, mp4

from utils.errors import UserError
from utils.tracking import sources
from utils.tracking.recording import display_size, typical_rate


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def opened(path, **settings):
    return sources.open_source("video", pathlib.Path(path), **settings)


def read(path, **settings):
    """Return the numbers and times of the frames, and the closed Recording."""
    recording = opened(path, **settings)
    found = list(iter(recording.read, None))
    recording.release()
    return [films.number_of(frame) for frame, _ in found], [at for _, at in found], recording


FRAMES = [films.numbered(i) for i in range(50)]


@pytest.mark.parametrize(("name", "codec"), [("a.webm", "libvpx"), ("a.mkv", "mpeg4"),
                                             ("a.mp4", "mpeg4")])
def test_times_are_those_of_the_stamps_whatever_rate_the_header_states(name, codec):
    # A browser's camera: 30 frames a second with jitter, and two seconds without any.
    stamps = [33 * i + (i * 7) % 5 + 2000 * (i > 20) for i in range(50)]
    films.write(name, FRAMES, stamps, rate=1000, codec=codec)
    numbers, times, recording = read(name)
    assert numbers == list(range(50))
    assert times == pytest.approx([stamp / 1000 for stamp in stamps], abs=2e-3)
    assert 25 < recording.rate < 35
    assert recording.cut_off() is None


def test_frames_that_an_avi_dropped_leave_a_gap():
    stamps = [40 * (i + 100 * (i > 0) + i // 2) for i in range(50)]
    films.write("a.avi", FRAMES, stamps, codec="mjpeg")
    numbers, times, recording = read("a.avi")
    assert numbers == list(range(50))
    assert times == pytest.approx([stamp / 1000 for stamp in stamps], abs=2e-3)
    assert recording.rate == 25
    assert recording.cut_off() is None
    assert not recording.missed


@pytest.mark.parametrize(("name", "codec", "container"), [
    ("a.mjpeg", "mjpeg", "mjpeg"), ("a.m4v", "mpeg4", "m4v"), ("a.h264", "libx264", "h264")])
def test_a_film_without_stamps_needs_a_rate(name, codec, container):
    films.write(name, FRAMES, codec=codec, container=container)
    with pytest.raises(UserError, match=f"{name}: has no time stamps.*--camera-rate") as error:
        opened(name)
    assert "\n" not in str(error.value)
    numbers, times, recording = read(name, rate=10.0)
    assert numbers == list(range(50))
    assert times == pytest.approx([i / 10 for i in range(50)])
    assert recording.rate == 10


def test_a_given_rate_replaces_the_stamps():
    films.write("a.mp4", FRAMES)
    _, times, recording = read("a.mp4", rate=50.0)
    assert times == pytest.approx([i / 50 for i in range(50)])
    assert recording.cut_off() is None


def test_a_film_of_one_frame():
    films.write("a.mp4", FRAMES[:1])
    assert read("a.mp4")[:2] == ([0], [0.0])


@pytest.mark.parametrize("turn", [0, 90])
def test_pixels_are_made_square(turn):
    image = numpy.zeros((120, 160, 3), numpy.uint8)
    image[30:60, 20:60] = 255
    films.write("a.mp4", [image] * 3, sar="2:1")
    if turn:
        content = pathlib.Path("a.mp4").read_bytes()
        pathlib.Path("a.mp4").write_bytes(mp4.turn(content, turn))
    frame = opened("a.mp4").read()[0]
    expected = cv2.resize(image, (320, 120))
    if turn:
        expected = cv2.rotate(expected, cv2.ROTATE_90_CLOCKWISE)
    assert frame.shape == expected.shape
    assert numpy.abs(frame.astype(int) - expected).mean() < 4


def test_a_given_aspect_replaces_that_of_the_file():
    films.write("a.mp4", FRAMES[:3], sar="2:1")
    assert opened("a.mp4", aspect=4 / 3).read()[0].shape == (120, 160, 3)
    assert opened("a.mp4", aspect=1 / 2).read()[0].shape == (320, 160, 3)


def test_display_size():
    assert display_size(640, 480) == display_size(640, 480, 0.0) == (640, 480)
    assert display_size(720, 576, 16 / 15) == (768, 576)
    assert display_size(640, 480, 0.5) == (640, 960)
    # A header of 1:1000 is a mistake.
    assert display_size(640, 480, 1e-3) == (640, 480)
    assert display_size(640, 480, 2.0, 16 / 9) == (853, 480)


def test_typical_rate():
    milliseconds = [round(1000 * i / 29.97) / 1000 for i in range(30)]
    assert typical_rate(milliseconds, [16.9, 29.97]) == 29.97
    assert typical_rate(milliseconds, [1000.0]) == pytest.approx(30, abs=0.5)
    # Two of three frames were dropped in the second half.
    assert typical_rate([*range(10), *range(10, 40, 3)], [1.0]) == 1
    assert typical_rate([0.0], [25.0]) is None
    assert typical_rate([0.0, 1e-6], []) == 1000


@pytest.mark.parametrize(("name", "codec", "options"), [
    ("a.mp4", "mpeg4", {"movflags": "faststart"}), ("a.mkv", "mpeg4", {}), ("a.avi", "mjpeg", {})])
def test_a_file_that_is_cut_off(name, codec, options):
    films.write(name, FRAMES, codec=codec, **options)
    assert read(name)[2].cut_off() is None
    content = pathlib.Path(name).read_bytes()
    pathlib.Path(name).write_bytes(content[:len(content) * 6 // 10])
    numbers, _, recording = read(name)
    assert 10 < len(numbers) < 40
    assert numbers == list(range(len(numbers)))
    seconds, whole = recording.cut_off()
    assert seconds == pytest.approx(len(numbers) / 25, abs=0.05)
    assert whole == pytest.approx(2, abs=0.05)


def test_frames_that_cannot_be_decoded_are_left_out():
    films.write("a.avi", FRAMES, codec="mjpeg")
    content = bytearray(pathlib.Path("a.avi").read_bytes())
    starts = [i for i in range(content.find(b"movi"), len(content))
              if content[i:i + 4] == b"00dc"]
    for i in (6, 7, 30):
        content[starts[i] + 8:starts[i + 1]] = bytes(starts[i + 1] - starts[i] - 8)
    pathlib.Path("a.avi").write_bytes(content)
    numbers, times, recording = read("a.avi")
    assert numbers == [i for i in range(50) if i not in (6, 7, 30)]
    assert times == pytest.approx([i / 25 for i in numbers])
    assert recording.missed == 3
    assert recording.cut_off() is None


def test_frames_of_another_size_are_resized():
    films.write("large.mjpeg", FRAMES[:5], codec="mjpeg", container="mjpeg")
    films.write("small.mjpeg", [films.numbered(i, (80, 64)) for i in range(5, 9)], codec="mjpeg",
                container="mjpeg")
    pathlib.Path("a.mjpeg").write_bytes(b"".join(
        pathlib.Path(name).read_bytes() for name in ("large.mjpeg", "small.mjpeg")))
    recording = opened("a.mjpeg", rate=10.0)
    frames = [frame for frame, _ in iter(recording.read, None)]
    assert {frame.shape for frame in frames} == {(120, 160, 3)}
    assert [films.number_of(frame) for frame in frames] == list(range(9))


@pytest.mark.parametrize("content", [b"", b"no film" * 100])
def test_files_that_are_no_videos(content):
    pathlib.Path("a.mp4").write_bytes(content)
    with pytest.raises(UserError, match="a.mp4: neither an image nor a video") as error:
        opened("a.mp4")
    assert "\n" not in str(error.value)


def test_a_file_of_sound_alone():
    import wave
    with wave.open("a.wav", "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(8000)
        sound.writeframes(bytes(8000))
    with pytest.raises(UserError, match="a.wav: a file without pictures"):
        opened("a.wav")


def test_release_while_another_thread_reads():
    films.write("a.mp4", FRAMES)
    recording, started = opened("a.mp4"), threading.Event()

    def work():
        while recording.read() is not None:
            started.set()

    thread = threading.Thread(target=work)
    thread.start()
    assert started.wait(10)
    recording.release()
    thread.join(10)
    assert not thread.is_alive()
    assert recording.read() is None
