"""Landmarks on a webcam, a video, an image or a folder: python demo.py [--source ...].

python demo.py                                   first webcam, shipped weights; q quits, s saves
python demo.py --source sample                   the portrait that comes with matplotlib
python demo.py --source clip.mp4 --output out.mp4 --landmarks out.csv --eyes
"""
import csv
import importlib.util
import json
import os
import pathlib
import sys
import time

# OpenCV and its FFmpeg print their own complaints beside ours; set before the import.
os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")

import cv2  # noqa: E402

from utils import draw, experiment, machine  # noqa: E402
from utils.args import Parser, load_args  # noqa: E402
from utils.data.photo import read_photo  # noqa: E402
from utils.errors import UserError, run  # noqa: E402
from utils.video import eyes  # noqa: E402
from utils.video.detector import get_detector  # noqa: E402
from utils.video.tracker import Tracker  # noqa: E402

IMAGES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".pgm", ".ppm"}
CODECS = {".mp4": "mp4v", ".m4v": "mp4v", ".mov": "mp4v", ".mkv": "mp4v", ".avi": "MJPG"}
SETTINGS = ("detect_every", "min_confidence", "filter_min_cutoff", "filter_beta")
WINDOW = "landmarks: q quits, s saves"


def parse(argv=None):
    """The command line as a namespace. Raises UserError; --help exits."""
    parser = Parser(prog="demo.py", allow_abbrev=False,
                    description="Landmarks on a webcam, a video, an image or a folder of images.")
    parser.add_argument("--source", default="0", metavar="0|VIDEO|IMAGE|FOLDER|sample",
                        help="number of a camera, a path, or sample: a portrait [0]")
    parser.add_argument("--weights", metavar="PATH|EXP",
                        help="[the shipped weights, else the newest experiment's]")
    parser.add_argument("--detector", default="haar", metavar="haar|PATH.onnx",
                        help="face detector: haar, or a YuNet or SCRFD file [haar]")
    parser.add_argument("--output", metavar="PATH",
                        help="write an image, a video or a folder instead of opening a window")
    parser.add_argument("--landmarks", metavar="FILE", help="write landmarks to a .csv or .json")
    parser.add_argument("--eyes", action="store_true",
                        help="eye aspect ratio, blinks a minute and PERCLOS of each face")
    parser.add_argument("--device", metavar="DEVICE",
                        help="auto, cpu or cuda [.pt: auto, .onnx: cpu]")
    for name in SETTINGS:
        parser.add_argument("--" + name.replace("_", "-"), metavar="N", help="see args.yaml")
    return parser.parse_args(argv)


def tracker_settings(given):
    """Keyword arguments of Tracker: args.yaml, overridden by flags. Raises UserError."""
    typed = {name: getattr(given, name) for name in SETTINGS if getattr(given, name) is not None}
    args = load_args(typed)
    settings = {name: getattr(args, name) for name in SETTINGS}
    return {"every": settings.pop("detect_every"), **settings}


def get_predictor(weights, device=None):
    """The Predictor of a weights file, an experiment, or (None) the shipped weights.

    torch is imported for a .pt only. Raises UserError.
    """
    from utils.predictor import Predictor
    path = experiment.find_weights(weights or "none", ".onnx")
    # Looking for a GPU means importing torch, which an .onnx does not need.
    return Predictor(path, device or ("auto" if path.suffix == ".pt" else "cpu"))


def read_image(path):
    """An image file as a person sees it, RGB uint8 (H, W, 3). Raises UserError."""
    image = read_photo(path, upright=True)
    if image is None:
        raise UserError(f"{path}: not an image that OpenCV can read (is it empty, cut off or not "
                        f"yours to read?)")
    return image


def find_source(source):
    """(kind, what): ("camera", number), ("image", path), ("folder", paths) or ("video", path).

    Raises UserError where there is no such thing.
    """
    if source.isdigit():
        return "camera", int(source)
    if source == "sample":
        package = importlib.util.find_spec("matplotlib")
        if package is None:
            raise UserError("source sample: matplotlib is not installed; pip install matplotlib")
        path = pathlib.Path(package.origin).parent / "mpl-data/sample_data/grace_hopper.jpg"
    else:
        path = pathlib.Path(source)
    if path.is_dir():
        paths = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGES and p.is_file())
        if not paths:
            raise UserError(f"source {source}: no images in this folder "
                            f"({', '.join(sorted(IMAGES))})")
        return "folder", paths
    if not path.is_file():
        raise UserError(f"source {source}: no such file or folder; give the number of a camera, a "
                        f"video, an image, a folder or sample")
    return ("image" if path.suffix.lower() in IMAGES else "video"), path


def open_video(kind, what):
    """(capture, frames a second, number of frames or None). Raises UserError."""
    capture = cv2.VideoCapture(what if kind == "camera" else str(what))
    if not capture.isOpened():
        if kind == "camera":
            raise UserError(f"camera {what}: cannot be opened; is it plugged in and free? Else "
                            f"give --source VIDEO, IMAGE, FOLDER or sample")
        raise UserError(f"{what}: neither an image nor a video that OpenCV can read (cut off?)")
    rate = capture.get(cv2.CAP_PROP_FPS)
    rate = rate if 1 <= rate <= 1000 else 30.0
    count = int(capture.get(cv2.CAP_PROP_FRAME_COUNT)) if kind == "video" else 0
    return capture, rate, count if count > 0 else None


def has_display():
    """Whether a window can be opened; only Linux says so beforehand."""
    return not sys.platform.startswith("linux") or bool(os.environ.get("DISPLAY")
                                                        or os.environ.get("WAYLAND_DISPLAY"))


def output_path(output, kind, what):
    """Where to write: --output, or a name made of the source's. Raises UserError."""
    stem = f"camera{what}" if kind == "camera" else (
        what[0].parent.resolve().name if kind == "folder" else what.stem)
    name = {"image": f"demo_{stem}.png", "folder": f"demo_{stem}"}.get(kind, f"demo_{stem}.mp4")
    path = pathlib.Path(output or name)
    if kind == "folder":
        if path.is_file() or path.resolve() == what[0].parent.resolve():
            raise UserError(f"output {path}: a folder's pictures need a folder of their own")
        path.mkdir(parents=True, exist_ok=True)
        return path
    if path.is_dir():
        path = path / name
    known = IMAGES if kind == "image" else set(CODECS)
    if path.suffix.lower() not in known:
        raise UserError(f"output {path}: this source is written as {', '.join(sorted(known))}, not "
                        f"{path.suffix or 'a name without suffix'}")
    if kind != "camera" and path.resolve() == what.resolve():
        raise UserError(f"output {path}: this is the source; give another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


class LandmarkFile:
    """Faces of each frame as CSV (a row a face and frame) or JSON (a line a frame), by suffix.

    `write(frame, seconds, name, tracks, drowsiness)`; coordinates are pixels of the frame.
    """

    def __init__(self, path, scheme, with_eyes):
        self.path, self.is_json = pathlib.Path(path), str(path).lower().endswith(".json")
        if not self.is_json and self.path.suffix.lower() != ".csv":
            raise UserError(f"landmarks {path}: written as .csv or .json, not "
                            f"{self.path.suffix or 'a name without suffix'}")
        self.with_eyes, self.frames = with_eyes, 0
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(self.path, "w", newline="", encoding="utf-8")
        except OSError as error:
            raise UserError(f"landmarks {path}: cannot be written: {error.strerror}") from None
        if self.is_json:
            self.file.write(f'{{"scheme": {json.dumps(scheme.name)}, "frames": [')
            return
        self.rows = csv.writer(self.file)
        self.rows.writerow(
            ["frame", "time", "source", "id", "x_min", "y_min", "x_max", "y_max", "confidence"]
            + (["eye_right", "eye_left", "blinks", "blinks_per_minute", "perclos"] * with_eyes)
            + [f"{axis}{i}" for i in range(scheme.points) for axis in "xy"])

    def write(self, frame, seconds, name, tracks, drowsiness):
        """One frame's faces; drowsiness: a track's id to its eyes.Drowsiness."""
        faces = []
        for track in tracks:
            face = {"id": track.id, "box": track.box.round(2).tolist(),
                    "confidence": round(float(track.confidence.mean()), 4)}
            if self.with_eyes:
                state = drowsiness[track.id]
                face |= {"eyes": [round(ratio, 4) for ratio in state.ratios],
                         "blinks": state.blinks, "perclos": round(state.perclos, 4),
                         "blinks_per_minute": round(state.blinks_per_minute, 2)}
            face["points"] = track.points_px.round(2).tolist()
            faces.append(face)
            if not self.is_json:
                read_out = [*face["eyes"], face["blinks"], face["blinks_per_minute"],
                            face["perclos"]] if self.with_eyes else []
                self.rows.writerow([frame, round(seconds, 4), name, track.id, *face["box"],
                                    face["confidence"], *read_out, *sum(face["points"], [])])
        if self.is_json:
            line = {"frame": frame, "time": round(seconds, 4), "source": name, "faces": faces}
            self.file.write(("," if self.frames else "") + "\n" + json.dumps(line))
        self.frames += 1

    def close(self):
        """Finish the file."""
        if self.is_json:
            self.file.write("\n]}\n")
        self.file.close()


class Demo:
    """What the sources share: find faces in a frame, read their eyes, draw and write them."""

    def __init__(self, predictor, detector, settings, landmark_file=None, with_eyes=False):
        self.predictor, self.detector, self.settings = predictor, detector, settings
        self.landmark_file, self.with_eyes = landmark_file, with_eyes
        self.frames = self.faces = 0
        self.restart()

    def restart(self, still=False):
        """Forget all faces; still: the next frame is an image of its own, not to be filtered."""
        settings = self.settings | ({"filter_min_cutoff": 0} if still else {})
        self.tracker = Tracker(self.predictor, self.detector, **settings)
        self.drowsiness = {}

    def __call__(self, image, seconds, name, rate=None):
        """A drawn copy of the frame, RGB uint8 (H, W, 3), at `seconds`; rate: frames a second."""
        tracks = self.tracker.update(image, seconds)
        scheme = self.predictor.scheme
        lines = [f"{rate:.0f} FPS"] if rate else []
        for track in tracks if self.with_eyes else []:
            state = self.drowsiness.setdefault(track.id, eyes.Drowsiness())
            # As predicted: the filter's lag would hide short blinks.
            state.update(eyes.aspect_ratios(track.raw_px, scheme), seconds)
            lines.append(f"{track.id}: eyes {state.ratios[0]:.2f} {state.ratios[1]:.2f}, "
                         f"{state.blinks_per_minute:.0f} blinks/min, PERCLOS {state.perclos:.0%}")
        if self.landmark_file:
            self.landmark_file.write(self.frames, seconds, name, tracks, self.drowsiness)
        drawn = image
        for track in tracks:
            drawn = draw.landmarks(drawn, track.points_px, scheme, track.confidence, track.box,
                                   str(track.id))
        self.frames, self.faces = self.frames + 1, self.faces + len(tracks)
        return _write_lines(drawn, lines)


def _write_lines(image, lines):
    image = image.copy() if lines else image
    scale = max(0.4, image.shape[0] / 900)
    for row, line in enumerate(lines, 1):
        place = 8, round(30 * scale * row)
        for colour, width in (((0, 0, 0), 3), ((255, 255, 255), 1)):
            cv2.putText(image, line, place, cv2.FONT_HERSHEY_SIMPLEX, scale, colour,
                        max(1, round(width * scale * 1.5)), cv2.LINE_AA)
    return image


def show(image, wait):
    """Show RGB image in the window for `wait` ms (0: until a key). True when the user quits."""
    try:
        cv2.imshow(WINDOW, image[..., ::-1])
        key = cv2.waitKey(wait) & 0xff
    except cv2.error:
        raise UserError("this OpenCV cannot open windows; give --output PATH") from None
    if key == ord("s"):
        number = 1
        while pathlib.Path(f"snapshot_{number}.png").exists():
            number += 1
        draw.save(f"snapshot_{number}.png", image)
        print(f"snapshot_{number}.png")
    # Closing the window by its button quits as well.
    closed = cv2.getWindowProperty(WINDOW, cv2.WND_PROP_VISIBLE) < 1
    return key in (ord("q"), 27) or closed


def run_images(demo, kind, what, output):
    """Draw one image or those of a folder; write them to output (None: show them in a window)."""
    from tqdm import tqdm
    paths = what if kind == "folder" else [what]
    for path in tqdm(paths, "images", disable=kind == "image" or output is None):
        try:
            image = read_image(path)
        except UserError as error:
            if kind == "image":
                raise
            tqdm.write(f"{error}; left out", sys.stderr)
            continue
        demo.restart(still=True)
        drawn = demo(image, 0.0, path.name)
        if output is None:
            if show(drawn, 0):
                break
        else:
            draw.save(output / f"{path.stem}.png" if kind == "folder" else output, drawn)


def run_video(demo, kind, what, output, window):
    """Draw a camera's or a video's frames; write them to output, show them in a window, or both."""
    from tqdm import tqdm
    capture, rate, count = open_video(kind, what)
    start = last = time.monotonic()
    writer = speed = None
    good = True
    bar = tqdm(total=count, desc="frames", unit="frame", disable=output is None)
    try:
        while True:
            good, frame = capture.read()
            if not good:
                break
            image = cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
            seconds = time.monotonic() - start if kind == "camera" else demo.frames / rate
            drawn = demo(image, seconds, str(what), speed)
            now = time.monotonic()
            instant = 1 / max(now - last, 1e-6)
            speed, last = instant if speed is None else 0.9 * speed + 0.1 * instant, now
            if output is not None:
                if writer is None:
                    size = drawn.shape[1::-1]
                    writer = cv2.VideoWriter(str(output), cv2.VideoWriter.fourcc(
                        *CODECS[output.suffix.lower()]), rate, size)
                    if not writer.isOpened():
                        raise UserError(f"output {output}: OpenCV cannot write this video")
                writer.write(cv2.cvtColor(drawn, cv2.COLOR_RGB2BGR))
            bar.update()
            if window and show(drawn, 1):
                break
    except KeyboardInterrupt:
        good = True  # The user's wish, not the end of the video; what is written stays.
    finally:
        bar.close()
        capture.release()
        if writer is not None:
            writer.release()
    if demo.frames == 0:
        raise UserError(f"{what}: no frame could be read; the file or the camera is damaged")
    if not good and (kind == "camera" or count and demo.frames < count):
        print(f"{what}: ended after {demo.frames} of {count or 'endless'} frames; "
              f"the file is cut off or the camera went away", file=sys.stderr)


def main(argv=None):
    """Run the demo as the command line says. Raises UserError."""
    given = parse(argv)
    machine.keep_freed()
    kind, what = find_source(given.source)
    write = bool(given.output) or not has_display()
    output = output_path(given.output, kind, what) if write else None
    settings = tracker_settings(given)
    if kind in ("camera", "video"):
        open_video(kind, what)[0].release()  # Before the seconds that weights take to load.
    detector = get_detector(given.detector)
    predictor = get_predictor(given.weights, given.device)
    if given.eyes:
        eyes.aspect_ratios(predictor.scheme.mean_face, predictor.scheme)  # Or say that it has none.
    landmark_file = None
    if given.landmarks:
        landmark_file = LandmarkFile(given.landmarks, predictor.scheme, given.eyes)
    demo = Demo(predictor, detector, settings, landmark_file, given.eyes)
    try:
        if kind in ("image", "folder"):
            run_images(demo, kind, what, output)
        else:
            run_video(demo, kind, what, output, has_display() and (not write or kind == "camera"))
    finally:
        if landmark_file:
            landmark_file.close()
    where = [str(path) for path in (output, given.landmarks) if path]
    print(f"{demo.frames} frames, {demo.faces} faces" + (": " if where else "") + ", ".join(where))


if __name__ == "__main__":
    run(main)
