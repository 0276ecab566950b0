"""The page in Chromium, whose camera is a film of a drawn driver who falls asleep."""
import contextlib
import csv
import io
import pathlib
import re
import shutil
import statistics

import cv2
import pytest
from helpers import lid_film

import demo
from utils.tracking import sources

pytest.importorskip("aiohttp", reason="needs aiohttp (requirements-web.txt)")
playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright "
                                 "(requirements-dev.txt)")
CHROMIUM = next(filter(None, map(shutil.which, (
    "chromium", "chromium-browser", "google-chrome"))), None)
if CHROMIUM is None:
    pytest.skip("needs chromium (apt-get install chromium)", allow_module_level=True)
EXPECT = playwright.expect
EXPECT.set_options(timeout=60000)

# Notes when the page sends a frame, shows another state and sounds the alarm.
NOTES = """
window.notes = { sent: [], states: [], tones: 0 };
const send = WebSocket.prototype.send;
WebSocket.prototype.send = function (data) {
  if (data instanceof Blob) {
    const now = performance.now();
    data.slice(1, 9).arrayBuffer().then((time) =>
      notes.sent.push([new DataView(time).getFloat64(0, true), now]));
  }
  return send.call(this, data);
};
const play = OscillatorNode.prototype.start;
OscillatorNode.prototype.start = function () { notes.tones += 1; return play.call(this); };
addEventListener("DOMContentLoaded", () => {
  const word = document.getElementById("word");
  new MutationObserver(() => {
    if (word.textContent !== notes.states.at(-1)?.[0])
      notes.states.push([word.textContent, performance.now()]);
  }).observe(word, { childList: true });
});
"""


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    return lid_film.write(tmp_path_factory.mktemp("film") / "film.y4m")


@pytest.fixture(scope="module")
def chromium(film):
    flags = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream",
             f"--use-file-for-fake-video-capture={film}"]
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


@contextlib.contextmanager
def opened(chromium, url, **settings):
    """Open the page; afterwards it must have made no error and asked no other host."""
    context = chromium.new_context(**settings)
    context.add_init_script(NOTES)
    page, problems = context.new_page(), []
    page.on("console", lambda message: message.type == "error" and problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: request.url.startswith((url, "blob:" + url, "data:"))
            or problems.append(request.url))
    page.goto(url)
    expect(page, "#link").not_to_have_text("loading")
    yield page
    context.close()
    assert problems == []


@pytest.fixture
def serve():
    """Serve the page in this process: a function of flags that returns its address."""
    from utils.web import server, start
    with contextlib.ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        def begin(*flags):
            patch.setattr(server, "serve", lambda one: (
                one.start(), stack.callback(one.stop), begin.servers.append(one)))
            options = demo.parse(["--serve", "0", *flags])
            start.serve(options, demo.find_weights(None), {"detect_every": 10})
            return begin.servers[-1].address.url()

        begin.servers = []
        yield begin


def expect(page, selector):
    """Wait up to a minute for what is expected of an element; the policy forbids evaluations."""
    return EXPECT(page.locator(selector))


def events(text):
    """Return [(kind, start, end)] of a CSV of events."""
    return [(row["event"], float(row["start"]), float(row["end"]))
            for row in csv.DictReader(io.StringIO(text))]


def visible_pixels(page, canvas):
    """Return how many pixels of a canvas are not transparent."""
    return page.evaluate("""(id) => {
      const canvas = document.getElementById(id);
      const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
      return data.filter((value, i) => i % 4 === 3 && value > 0).length;
    }""", canvas)


def test_a_driver_falls_asleep_before_the_camera(chromium, serve, film, tmp_path):
    demo.main(["--source", str(film), "--driver", "--events", str(tmp_path / "demo.csv")])
    expected = events((tmp_path / "demo.csv").read_text())
    assert tuple(kind for kind, *_ in expected) == lid_film.KINDS
    with opened(chromium, serve(), accept_downloads=True) as page:
        page.check("#alarm")
        page.click("#start")
        # The film repeats; it began when the camera did. All three kinds, and one more to be sure.
        expect(page, "#count").to_have_text("4")
        with page.expect_download() as download:
            page.click("#save")
        table = pathlib.Path(download.value.path()).read_bytes().decode()
        notes = page.evaluate("notes")
        spans = page.get_attribute("#eyes", "aria-label")
        drawn, charted = visible_pixels(page, "overlay"), visible_pixels(page, "turn")
        page.click("#start")
        expect(page, "#link").to_have_text("stopped")
        assert page.inner_text("#start") == "Start camera"
    # Frames are those of the film, or of the page where this machine is too busy for all of them.
    times = [time for time, _ in notes["sent"]]
    steps = sorted(b - a for a, b in zip(times, times[1:]))
    step = max(1 / lid_film.RATE, steps[int(0.95 * len(steps))])
    if step > 0.25:
        pytest.skip(f"too busy: {1 / step:.1f} frames a second, too few to see a blink")
    tolerance = 2 * step
    assert table.startswith("event,id,start,end,seconds\r\nblink,driver,")
    found = events(table)
    assert [kind for kind, *_ in found[:3]] == [kind for kind, *_ in expected]
    shift = statistics.median(
        one - other for row, wanted in zip(found, expected)
        for one, other in zip(row[1:], wanted[1:]))
    for (_, *row), (_, *wanted) in zip(found, expected):
        assert [one - shift for one in row] == pytest.approx(wanted, abs=tolerance)
    sleep = next(start for kind, start, _ in found if kind == "sleep")
    origin = statistics.median(1000 * time - now for time, now in notes["sent"])
    shown = next((now + origin) / 1000 for name, now in notes["states"] if name == "asleep")
    assert -tolerance <= shown - (sleep + 3.0) < 1 + tolerance
    charts = [tuple(map(float, span)) for span in re.findall(r"([\d.]+) to ([\d.]+) s", spans)]
    start, end = max(charts, key=lambda span: span[1] - span[0])
    assert (start, end) == pytest.approx(found[1][1:], abs=tolerance)
    assert notes["tones"] >= 3, "the alarm repeats while the driver sleeps"
    assert drawn > 500
    assert charted > 100


def test_pictures_and_keys(chromium, serve, tmp_path):
    portrait = cv2.imread(str(sources.find_source("sample")[1]))
    cv2.imwrite(str(tmp_path / "face.png"), portrait)
    (tmp_path / "text.png").write_text("not a picture")
    with opened(chromium, serve(), viewport={"width": 390, "height": 844}) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        page.set_input_files("#file", tmp_path / "text.png")
        expect(page, "#link").to_have_text("text.png: not a picture")
        page.set_input_files("#file", tmp_path / "face.png")
        expect(page, "#word").to_have_text("face")
        assert page.inner_text("#right").endswith("%")
        assert visible_pixels(page, "overlay") > 500
        assert page.evaluate("notes.sent.length") == 1
        page.evaluate("document.activeElement.blur()")
        for key, switch in (("m", "mirror"), ("p", "mesh"), ("a", "alarm")):
            before = page.is_checked(f"#{switch}")
            page.keyboard.press(key)
            assert page.is_checked(f"#{switch}") != before
        names = page.eval_on_selector_all("#weights option", "all => all.map((one) => one.value)")
        assert {"tiny.int8.onnx", "fast.int8.onnx"} <= set(names)
        page.select_option("#weights", "fast.int8.onnx")
        page.keyboard.press("Tab")
        page.evaluate("document.activeElement.blur()")
        page.keyboard.press(" ")
        expect(page, "#word").to_have_text("awake")
        assert page.inner_text("#start") == "Stop"


def test_places_and_the_end_of_the_server(chromium, serve):
    with opened(chromium, serve("--viewers", "1")) as page:
        page.click("#start")
        expect(page, "#rate").to_have_text(re.compile("^[1-9]"))
        other = page.context.new_page()
        other.goto(page.url)
        other.click("#start")
        expect(other, "#link").to_have_text("all 1 places are taken; try again later")
        expect(other, "#start").to_have_text("Start camera")
        serve.servers[-1].stop()
        expect(page, "#link").to_have_text("the server has ended")


def test_a_source_of_the_server(chromium, serve, film):
    with opened(chromium, serve("--source", str(film))) as page:
        expect(page, "#word").to_have_text("awake")
        assert page.is_hidden("#start")
        assert page.inner_text("#link") == "film.y4m"
        expect(page, "#count").to_have_text("1")
        assert visible_pixels(page, "picture") > 640 * 480 - 1
        assert visible_pixels(page, "overlay") > 500
