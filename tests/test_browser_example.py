"""The page of examples/web in Chromium, compared with the packages that it ports."""
import base64
import csv
import io
import json
import math
import random
import re
import shutil
import urllib.parse

import cv2
import numpy
import pytest
from helpers import browser

import demo
from tools import browser_rules, drawn_driver
from utils.args import ROOT
from utils.data.drawn_faces import render
from utils.data.photo import read_photo
from utils.detection import refine
from utils.detection.detector import get_detector
from utils.drowsiness.states import Drowsiness
from utils.landmarks import crop
from utils.predictor import Predictor
from utils.tracking.one_euro import FaceFilter

INT8 = ROOT / "weights" / "tiny.int8.onnx"
SOURCES = sorted(browser.WEB.glob("*.js"))
# Loads modules and a model into the page's globals.
LOAD = """async ([model, detector]) => {
  const ort = await import('/runtime/ort.wasm.min.mjs');
  Object.assign(ort.env.wasm, {numThreads: 1, wasmPaths: location.origin + '/runtime/'});
  const get = async (path) => new Uint8Array(await (await fetch(path)).arrayBuffer());
  for (const name of ['image', 'model', 'tracker', 'drowsiness']) {
    window[name] = await import(`/examples/web/${name}.js`);
  }
  window.landmarks = model && await window.model.loadModel(ort, await get(model));
  window.detect = detector && await window.model.loadDetector(ort, await get(detector));
  window.pixels = (data, width, height) => (
    {width, height, data: Uint8ClampedArray.from(atob(data), (c) => c.charCodeAt(0))});
  window.text = (bytes) => btoa(Array.from(bytes, (v) => String.fromCharCode(v)).join(''));
}"""


@pytest.fixture(scope="module")
def chromium():
    with browser.chromium() as started:
        yield started


@pytest.fixture(scope="module")
def runtime(tmp_path_factory):
    return browser.runtime(tmp_path_factory.mktemp("npm"))


@pytest.fixture(scope="module")
def float_model(tmp_path_factory):
    """tiny.onnx in float32, exported from the shipped weights."""
    from utils.deploy.export import export_weights
    folder = tmp_path_factory.mktemp("float")
    shutil.copy(ROOT / "weights" / "tiny.pt", folder)
    return export_weights(folder / "tiny.pt")


@pytest.fixture
def modules(chromium, runtime):
    """A function that opens a page with the modules, and a model and a detector if given.

    Playwright's evaluate needs a page without content security policy.
    """
    context = chromium.new_context(bypass_csp=True)
    more = {"/runtime": runtime}
    with browser.serve(more) as address:
        page = context.new_page()

        def load(model=None, detector=None):
            more.update({f"/{key}.onnx": path for key, path in
                         (("model", model), ("detector", detector)) if path})
            page.goto(f"{address}/examples/web/style.css")
            page.evaluate(LOAD, [model and "/model.onnx", detector and "/detector.onnx"])
            return page

        yield load
    context.close()


def packed(image):
    """An RGB image as arguments of `pixels` in the page: RGBA in base64, width and height."""
    rgba = cv2.cvtColor(numpy.ascontiguousarray(image), cv2.COLOR_RGB2RGBA)
    return [base64.b64encode(rgba.tobytes()).decode(), image.shape[1], image.shape[0]]


def drawn_photo(seed, size, shape=(480, 640)):
    """A drawn face of `size` px in a grey frame, and its landmarks' crop."""
    image = numpy.full((*shape, 3), 110, numpy.uint8)
    face, points = render.render(seed, size)
    image[40:40 + size, 100:100 + size] = face
    return image, crop.face_box(points + (100, 40))


def farthest(points, other):
    """The largest distance of two sets of points (K, 2)."""
    return numpy.linalg.norm(numpy.asarray(points) - other, axis=-1).max()


def test_the_page_is_small_and_asks_no_other_host():
    code = [line for path in SOURCES for line in path.read_text(encoding="utf-8").splitlines()]
    assert max(map(len, code)) <= 100
    for path in [*SOURCES, browser.WEB / "index.html", browser.WEB / "style.css"]:
        assert not re.search(r"https?://|@import", path.read_text(encoding="utf-8")), path
    wanted = json.loads((browser.WEB / "package.json").read_text())["dependencies"]
    lock = json.loads((browser.WEB / "package-lock.json").read_text())["packages"]
    assert lock[""]["dependencies"] == wanted
    for package, version in wanted.items():
        assert re.fullmatch(r"\d+\.\d+\.\d+", version)
        assert lock[f"node_modules/{package}"]["version"] == version
    assert all(one["integrity"].startswith("sha512-") for key, one in lock.items() if key)


def test_the_rules_are_those_of_the_packages():
    written = json.loads(browser_rules.PATH.read_text(encoding="utf-8"))
    assert written == json.loads(json.dumps(browser_rules.rules())), (
        "run python -m tools.browser_rules")


def test_metadata_and_crops_are_equal(modules):
    """Crops of all kinds: upright, turned, beyond the frame, and reduced by whole numbers."""
    page = modules(INT8)
    predictor = Predictor(INT8)
    found = page.evaluate("(({crop, eyes, scheme}) => ({crop, eyes, scheme}))(landmarks)")
    assert found["crop"] == predictor.crop
    assert found["eyes"] == predictor.eyes.state()
    assert found["scheme"]["regions"] == predictor.scheme.regions
    rng = numpy.random.default_rng(0)
    image = cv2.GaussianBlur(rng.integers(0, 256, (480, 640, 3), numpy.uint8), (0, 0), 1.5)
    image = cv2.normalize(image, None, 0, 255, cv2.NORM_MINMAX)
    cases = [([100.3, 90.2, 250.7, 240.6], 0.0), ([-30.1, -33.3, 170.0, 166.8], 0.0),
             ([500.2, 300.9, 700.5, 501.2], 0.4), ([150.5, 100.1, 230.9, 180.5], -1.3),
             ([20.3, 30.9, 300.8, 311.4], 0.0), ([-60.7, 3.1, 430.2, 494.0], 0.7),
             ([9.5, 11.5, 470.9, 472.9], 2.2), ([-90.0, -80.0, 560.5, 570.5], 0.0)]
    crops = page.evaluate("""([data, width, height, cases]) => cases.map(([box, roll]) => {
      const out = new Uint8Array(3 * 128 * 128);
      image.cut(pixels(data, width, height), box, 128, roll, out, 0);
      return text(out);
    })""", [*packed(image), cases])
    for (box, roll), found in zip(cases, crops):
        expected = crop.cut(image, numpy.array(box), 128, roll).astype(int)
        found = numpy.frombuffer(base64.b64decode(found), numpy.uint8).reshape(3, 128, 128)
        difference = abs(found.transpose(1, 2, 0) - expected)
        assert difference.max() <= 1, (box, roll)
        assert (difference > 0).mean() < 2e-3, (box, roll)


@pytest.mark.parametrize("shape", [(300, 220), (683, 1024)], ids=str)
def test_frames_are_resized_for_the_detector_as_opencv_does(modules, shape):
    rng = numpy.random.default_rng(1)
    image = cv2.GaussianBlur(rng.integers(0, 256, (*shape, 3), numpy.uint8), (0, 0), 1.5)
    scale = 640 / max(shape)
    size = [round(side * scale) for side in shape[::-1]]
    found = base64.b64decode(modules().evaluate("""([data, width, height, size]) => text(
      image.resize(pixels(data, width, height), [0, 0], [width, height], size).data)""",
                                                [*packed(image), size]))
    found = numpy.frombuffer(found, numpy.uint8).reshape(*size[::-1], 4)[..., :3].astype(int)
    interpolation = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    difference = abs(found - cv2.resize(image, size, interpolation=interpolation))
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-3


def test_smoothing_is_that_of_the_one_euro_filter(modules):
    rng = numpy.random.default_rng(2)
    points = rng.normal(0, 2, (40, 68, 2)).cumsum(0) + rng.uniform(100, 300, (68, 2))
    lids = list(range(36, 48))
    found = modules().evaluate("""([frames, lids]) => {
      const smooth = tracker.faceFilter(lids);
      return frames.map((points, i) => smooth(points, 200, i % 2 ? 0.04 : 0.03));
    }""", [points.tolist(), lids])
    smooth = FaceFilter(1.2, 5.0, lids)
    for i, one in enumerate(points):
        assert farthest(found[i], smooth(one, 200, 0.04 if i % 2 else 0.03)) < 1e-9


def observations(seed, rate, seconds=150):
    """Random openness of eyes that blink, droop, sleep and go out of sight: (openness, time)."""
    rng, time, rows, mode = random.Random(seed), 0.0, [], "open"
    until, level = 0.0, 0.9
    while time < seconds:
        if time >= until:
            mode = rng.choice(("open", "open", "blink", "droop", "closed", "away", "nearly"))
            until = time + {"blink": rng.uniform(0.02, 0.5), "open": rng.uniform(0.05, 6)}.get(
                mode, rng.uniform(0.1, 5))
        level = {"open": 0.9, "blink": 0.1, "droop": 0.4, "closed": 0.05, "nearly": 0.15,
                 "away": None}[mode]
        eyes = [None if level is None or rng.random() < 0.1 else
                min(max(level + rng.gauss(0, 0.05), 0), 1) for _ in "rl"]
        rows.append((eyes, round(time, 4)))
        time += rng.uniform(0.8, 1.2) / rate
    return rows


@pytest.mark.parametrize("rate", [30, 3])
def test_states_and_events_are_those_of_the_rule(modules, rate):
    page = modules()
    for seed in range(2 if rate > 10 else 6):
        rows, expected, drowsiness = [], [], Drowsiness()
        for eyes, time in observations(seed, rate):
            judged = [value for value in eyes if value is not None]
            closed = sum(judged) / len(judged) <= 0.2 if judged else None
            # Glances of two seconds and yawns, both over whatever the eyes do.
            down, mouth = bool(judged) and time % 20 < 2, 0.8 if 30 < time % 60 < 33 else 0.1
            closed = closed and not down
            rows.append([eyes, closed, time, down, mouth])
            ended = drowsiness.update(tuple(eyes), closed, time, down, mouth)
            expected.append([drowsiness.state, drowsiness.perclos, drowsiness.blinks_per_minute,
                             [vars(event) for event in ended]])
        found, last = page.evaluate("""(rows) => {
          const one = new drowsiness.Drowsiness(), out = rows.map((row) => {
            const events = one.update(...row);
            return [one.state, one.perclos, one.blinksPerMinute, events];
          });
          return [out, one.finish()];
        }""", rows)
        for row, (state, perclos, blinks, events) in zip(found, expected):
            assert row[0] == state
            assert row[1:3] == pytest.approx([perclos, blinks], abs=1e-5)
            assert row[3] == [pytest.approx(event) for event in events] or events == row[3]
        assert last == [vars(event) for event in drowsiness.finish()]
        assert len({row[0] for row in found}) >= 3


def predict_both(page, predictor, image, box, passes):
    """Landmarks of a face in Chromium and here: in one crop (passes 1), or refined from it."""
    if passes == 1:
        here = refine.predict_boxes(predictor, image, box[None])[0][0]
        there = page.evaluate("""async ([data, width, height, box]) => (
          await landmarks.predict(pixels(data, width, height), [box], [0]))[0].points""",
                              [*packed(image), box.tolist()])
    else:
        here = refine.refine(predictor, image, box[None])[0][0]
        there = page.evaluate("""async ([data, width, height, box]) => (
          await tracker.refine(landmarks, pixels(data, width, height), box)).points""",
                              [*packed(image), box.tolist()])
    return numpy.array(there), here


def test_the_8_bit_model_agrees_within_its_rounding(modules):
    """Runtimes round 8-bit layers differently; each is as far from the float model."""
    page, predictor, shares = modules(INT8), Predictor(INT8, threads=1), []
    for seed in range(2):
        image, box = drawn_photo(seed, 150 + 180 * seed)
        there, here = predict_both(page, predictor, image, box, 1)
        shares.append(numpy.linalg.norm(there - here, axis=-1) / numpy.ptp(here, axis=0).max())
    assert numpy.median(shares) < 0.005
    assert numpy.mean(shares) < 0.01


@pytest.mark.slow
def test_landmarks_of_50_drawn_faces_are_equal(modules, float_model):
    page, predictor = modules(float_model), Predictor(float_model, threads=1)
    refined = []
    for seed in range(50):
        image, box = drawn_photo(seed, 150 + 5 * seed)
        there, here = predict_both(page, predictor, image, box, 1)
        assert farthest(there, here) < 0.01
        there, here = predict_both(page, predictor, image, box, 4)
        refined.append(farthest(there, here) / numpy.linalg.norm(here[36] - here[45]))
    # A crop that differs by 1e-4 px may round a pixel, and a landmark's best cell, differently.
    assert numpy.median(refined) < 1e-4
    assert max(refined) < 0.005


@pytest.mark.slow
def test_landmarks_of_50_photos_are_equal_from_the_jpeg_on(modules, float_model, shared):
    """From the file to the landmarks: decoding, YuNet, crops and the network."""
    yunet = shared / "models" / "yunet_n_640_640.onnx"
    page, predictor = modules(float_model, yunet), Predictor(float_model, threads=1)
    detector, same_crop, shares = get_detector(yunet), [], []
    for path in sorted((shared / "data/300W/lfpw/testset").glob("*.jpg"))[:50]:
        image = read_photo(path, upright=True)
        crops = detector.to_crop(detector(image), predictor.crop["scale"])
        here = refine.refine(predictor, image, crops[:1])[0][0]
        boxes = crop.face_boxes(here[None], predictor.crop, predictor.scheme)
        there, again = predict_both(page, predictor, image, boxes[0], 1)
        same_crop.append(farthest(there, again))
        found = page.evaluate("""async (data) => {
          const bytes = pixels(data, 1, 1).data;
          const photo = await createImageBitmap(new Blob([bytes], {type: 'image/jpeg'}));
          const pen = new OffscreenCanvas(photo.width, photo.height).getContext('2d');
          pen.drawImage(photo, 0, 0);
          const frame = pen.getImageData(0, 0, photo.width, photo.height), out = [];
          for (const box of await detect(frame, landmarks.crop.scale)) {
            out.push((await tracker.refine(landmarks, frame, box)).points);
          }
          return out;
        }""", base64.b64encode(path.read_bytes()).decode())
        eyes = numpy.linalg.norm(here[36] - here[45])
        shares.append(min(farthest(points, here) for points in found) / eyes)
    assert max(same_crop) < 0.01
    assert max(shares) < 0.005
    assert numpy.median(shares) < 1e-4


def openness_at(time):
    """Openness of the film's driver: a blink at 1.6 s, closed eyes from 3 to 7 s."""
    return 0.0 if 1.6 <= time < 1.8 or 3 <= time < 7 else 1.0


def draw_film(path, rate, seconds):
    """Write a film of a driver who sleeps, and is out of sight from 8.5 to 10 s."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"VP80"), rate, (320, 240))
    if not writer.isOpened():
        pytest.skip("needs an OpenCV that writes VP8")
    for n in range(round(rate * seconds)):
        frame = numpy.full((240, 320, 3), 120, numpy.uint8)
        if not 8.5 <= n / rate < 10:
            shift = round(15 * math.sin(n / rate))
            frame[40:200, 80 + shift:240 + shift] = drawn_driver.face(openness_at(n / rate))[0]
        writer.write(frame[..., ::-1])
    writer.release()


@pytest.fixture
def page(chromium, runtime, shared):
    """The page as people open it, with YuNet in its address."""
    context = chromium.new_context(viewport={"width": 1280, "height": 800})
    more = {"/runtime": runtime, "/yunet.onnx": shared / "models" / "yunet_n_640_640.onnx"}
    with browser.serve(more) as address:
        opened = context.new_page()
        # The content security policy forbids Playwright's evaluate, but not scripts of the start.
        opened.add_init_script("""document.addEventListener('frame', ({ detail }) => {
          const seen = JSON.parse(document.documentElement.dataset.seen ?? '[]');
          seen.push([detail.time, detail.state]);
          document.documentElement.dataset.seen = JSON.stringify(seen);
        })""")
        opened.errors = []
        opened.on("pageerror", lambda error: opened.errors.append(str(error)))
        opened.on("request", lambda request: opened.errors.append(request.url) if not
                  request.url.startswith((address, "blob:", "data:")) else None)
        opened.address = f"{address}/examples/web/?runtime=/runtime/&detector=/yunet.onnx"
        opened.goto(opened.address)
        opened.get_by_text("Ready.").wait_for()
        yield opened
        assert not opened.errors
    context.close()


def test_a_film_has_the_events_and_states_of_the_demo(page, shared, tmp_path, monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    rate, film = 15, tmp_path / "trip.webm"
    draw_film(film, rate, 11.5)
    demo.main(["--source", str(film), "--driver", "--events", str(tmp_path / "events.csv"),
               "--landmarks", str(tmp_path / "trip.json"), "--detector",
               str(shared / "models" / "yunet_n_640_640.onnx")])
    text = (tmp_path / "events.csv").read_text(encoding="utf-8")
    expected = list(csv.DictReader(io.StringIO(text)))
    states = [frame["driver"]["state"] for frame in
              json.loads((tmp_path / "trip.json").read_text())["frames"]]
    page.fill("#rate", str(rate))
    page.set_input_files("#source", str(film))
    page.get_by_text(f"{len(states)} frames done.").wait_for(timeout=120000)
    seen = json.loads(page.get_attribute("html", "data-seen"))
    assert [time for time, _ in seen] == pytest.approx([n / rate for n in range(len(states))])
    for n, (_, state) in enumerate(seen):
        assert state in states[max(0, n - 2):n + 3]
    assert page.inner_text("#state") == states[-1]
    address = page.get_attribute("#csv", "href")
    found = list(csv.DictReader(io.StringIO(urllib.parse.unquote(address.partition(",")[2]))))
    assert [row["event"] for row in found] == [row["event"] for row in expected]
    assert {"blink", "sleep", "not visible"} <= {row["event"] for row in expected}
    for row, other in zip(found, expected):
        assert row["id"] == other["id"]
        for key in ("start", "end"):
            assert abs(float(row[key]) - float(other[key])) <= 2 / rate + 1e-3
