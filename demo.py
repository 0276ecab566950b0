"""Landmarks on a webcam, a stream, a video, an image or a folder: python demo.py [--source ...].

python demo.py                                   first webcam, shipped weights; q quits, s saves
python demo.py --source sample                   the portrait that comes with matplotlib
python demo.py --source clip.mp4 --output out.mp4 --landmarks out.csv --eyes
python demo.py --source 0 --driver --events trip.csv --alarm      a camera that watches a driver
"""
import argparse
import os
import pathlib
import re
import sys
import time

# OpenCV and its FFmpeg print their own complaints beside ours; set before the import.
os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")

import cv2  # noqa: E402

from utils import draw, experiment, machine  # noqa: E402
from utils.args import Parser, load_args  # noqa: E402
from utils.data.photo import read_photo, why_unread  # noqa: E402
from utils.errors import UserError, run  # noqa: E402
from utils.landmarks import pose  # noqa: E402
from utils.video import eyes, outputs, sources  # noqa: E402
from utils.video.alarm import Alarm  # noqa: E402
from utils.video.detector import get_detector  # noqa: E402
from utils.video.driver import Driver, Everyone  # noqa: E402
from utils.video.tracker import Tracker  # noqa: E402

COLOURS = {"awake": (80, 220, 100), "drowsy": (255, 210, 0), "microsleep": (255, 130, 0),
           "asleep": (255, 50, 50), "not visible": (190, 190, 190)}
SETTINGS = ("detect_every", "min_confidence", "filter_min_cutoff", "filter_beta")
WINDOW = "landmarks: q quits, s saves"


def parse(argv=None):
    """The command line as a namespace. Raises UserError; --help exits."""
    parser = Parser(prog="demo.py", allow_abbrev=False, description="Landmarks on a webcam, a "
                    "stream, a video, an image or a folder of images.")
    parser.add_argument("--source", default="0", metavar="0|VIDEO|STREAM|IMAGE|FOLDER|sample",
                        help="number or /dev/video0 of a camera, rtsp:// or http:// address, a "
                        "path, or sample: a portrait [0]")
    parser.add_argument("--camera-size", type=_size, metavar="WxH",
                        help="size asked of the camera, such as 1280x720 [its own]")
    parser.add_argument("--camera-rate", type=_rate, metavar="N",
                        help="frames a second asked of the camera [its own]")
    parser.add_argument("--weights", metavar="PATH|EXP",
                        help="[the shipped weights, else the newest experiment's]")
    parser.add_argument("--detector", default="haar", metavar="haar|PATH.onnx",
                        help="face detector: haar, or a YuNet or SCRFD file [haar]")
    parser.add_argument("--output", metavar="PATH",
                        help="write an image, a video or a folder instead of opening a window")
    parser.add_argument("--landmarks", metavar="FILE", help="write landmarks to a .csv or .json")
    parser.add_argument("--pose", action="store_true", help="how each head is turned: yaw, pitch "
                        "and roll in degrees, in the picture and the landmark file")
    parser.add_argument("--eyes", action="store_true", help="how open the eyes of each face are, "
                        "blinks a minute, PERCLOS and state: awake, drowsy, microsleep, asleep")
    parser.add_argument("--driver", action="store_true", help="--eyes of one person: the largest, "
                        "most central face, known again after he was out of sight")
    parser.add_argument("--events", metavar="FILE.csv", help="--eyes, and write blinks, "
                        "microsleeps, sleep and time out of sight with start and end")
    parser.add_argument("--alarm", nargs="?", const="bell", choices=("bell", "line"),
                        help="--eyes, and ring the terminal's bell, or write a line to stderr, "
                        "when a person is not awake or out of sight [bell]")
    parser.add_argument("--device", metavar="DEVICE",
                        help="auto, cpu or cuda [.pt: auto, .onnx: cpu]")
    for name in SETTINGS:
        parser.add_argument("--" + name.replace("_", "-"), metavar="N", help="see args.yaml")
    given = parser.parse_args(argv)
    given.eyes = bool(given.eyes or given.driver or given.events or given.alarm)
    return given


def _size(text):
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    if not found or "0" in found.groups():
        raise argparse.ArgumentTypeError(f"expected WIDTHxHEIGHT, such as 1280x720, found {text}")
    return int(found[1]), int(found[2])


def _rate(text):
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not 0 < rate <= 1000:
        raise argparse.ArgumentTypeError(f"expected frames a second, 1 to 1000, found {text}")
    return rate


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
        raise UserError(f"{path}: {why_unread(path)}")
    return image


def has_display():
    """Whether a window can be opened; only Linux says so beforehand."""
    return not sys.platform.startswith("linux") or bool(os.environ.get("DISPLAY")
                                                        or os.environ.get("WAYLAND_DISPLAY"))


def output_path(output, kind, what):
    """Where to write: --output, or a name made of the source's. Raises UserError."""
    stem = {"camera": f"camera{what}", "stream": "stream"}.get(kind) or outputs.fitting(
        what[0].parent.resolve().name if kind == "folder" else what.stem)
    name = {"image": f"demo_{stem}.png", "folder": f"demo_{stem}"}.get(kind, f"demo_{stem}.mp4")
    path = pathlib.Path(output or name)
    if kind == "folder":
        if path.is_file() or path.resolve() == what[0].parent.resolve():
            raise UserError(f"output {path}: a folder's pictures need a folder of their own")
        return path
    if path.is_dir():
        path = path / name
    known = sources.PICTURES if kind == "image" else set(outputs.CODECS)
    if path.suffix.lower() not in known:
        raise UserError(f"output {path}: this source is written as {', '.join(sorted(known))}, not "
                        f"{path.suffix or 'a name without suffix'}")
    return path


def refuse(kind, what, output, given):
    """Raise UserError where something would be written over the source or another output, or not
    be what its name says."""
    files = what if kind == "folder" else [what] if kind in ("image", "video") else []
    written = [("output", output / name) for name in outputs.picture_names(files).values()] \
        if kind == "folder" and output else [("output", output)]
    named = [(flag, pathlib.Path(getattr(given, flag))) for flag in ("landmarks", "events")
             if getattr(given, flag)]
    for flag, path in named:
        outputs.check_suffix(flag, path)
    outputs.refuse_sources([pair for pair in dict.fromkeys(written + named) if pair[1]], files)


class Demo:
    """What the sources share: find faces in a frame, read their eyes, draw and write them.

    given: the namespace of `parse`. draws: whether anybody sees the frames. `close` finishes the
    landmark and event files.
    """

    def __init__(self, predictor, detector, given, draws=True):
        self.predictor, self.detector, self.given = predictor, detector, given
        self.draws = draws
        self.settings = tracker_settings(given)
        # Limits of shut and open eyes that came with the weights, where they have some.
        self.limits = getattr(predictor, "eyes", eyes.Limits())
        if given.eyes:
            eyes.aspect_ratios(predictor.scheme.mean_face, predictor.scheme)  # Or say: it has none.
        if given.pose:
            pose.model_points(predictor.scheme)
        self.landmark_file = outputs.LandmarkFile(
            given.landmarks, predictor.scheme, given.eyes, given.pose) if given.landmarks else None
        self.event_file = outputs.EventFile(given.events) if given.events else None
        self.alarm = Alarm(given.alarm) if given.alarm else None
        self.frames = self.faces = self.refused = 0
        self.rare = False  # Whether frames come too rarely to see anybody sleep.
        self.tracker = None
        self.restart()

    def restart(self, still=False):
        """Forget all faces; still: the next frame is an image of its own, without a past."""
        settings = self.settings | ({"filter_min_cutoff": 0} if still else {})
        detector = self.detector.thorough() if still else self.detector
        self.refused += self.tracker.refused if self.tracker else 0
        self.tracker = Tracker(self.predictor, detector, **settings)
        self.people = Driver() if self.given.driver else None if still else Everyone()

    def __call__(self, image, seconds, name, rate=None):
        """A drawn copy of the frame, RGB uint8 (H, W, 3), at `seconds`, or None where nobody sees
        it; rate: frames a second."""
        tracks = self.tracker.update(image, seconds)
        looks, states = [None] * len(tracks), {}
        if self.given.eyes:
            # As predicted: the filter's lag would hide short blinks.
            looks = [eyes.look(track.raw_px, track.confidence, self.predictor.scheme, self.limits,
                               image.shape) for track in tracks]
            if self.people:
                states, events = self.people.watch(tracks, looks, image.shape, seconds)
                self._tell(states, events, seconds)
        told = [outputs.readings(look, states.get(track.id)) for track, look in zip(tracks, looks)]
        driver = None
        if self.given.driver:
            driver = next(iter(states), None), outputs.readings(None, self.people.drowsiness)
        poses = [pose.head_pose(track.points_px, self.predictor.scheme, image.shape[1::-1])
                 for track in tracks] if self.given.pose else []
        if self.landmark_file:
            self.landmark_file.write((self.frames, seconds, name), tracks, told, driver, poses)
        self.frames, self.faces = self.frames + 1, self.faces + len(tracks)
        if not self.draws:
            return None
        drawn = self._draw(image, tracks, told, driver)
        lines = [f"{rate:.0f} FPS"] if rate else []
        if self.given.eyes:
            lines += [f"{track.id}: {_text(one)}" for track, one in zip(tracks, told)]
        lines += ["{}: yaw {:+.0f}, pitch {:+.0f}, roll {:+.0f}".format(track.id, *angles)
                  for track, angles in zip(tracks, poses)]
        return _write_lines(drawn, lines)

    def wait(self, seconds):
        """Let time go on, to `seconds`, without a frame: nobody is seen."""
        if self.people:
            _, events = self.people.watch([], [], (1, 1), seconds)
            self._tell({}, events, seconds)

    def hint(self):
        """Why no face was found, in a line."""
        seen = self.refused + self.tracker.refused
        return (f"the detector saw {seen} boxes in which the network takes nothing for a face; "
                f"--min-confidence {self.tracker.min_confidence / 2:.2f} asks less of it" if seen
                else "the detector saw no face" + (
                    "; YuNet or SCRFD (--detector PATH.onnx) see more"
                    if self.given.detector == "haar" else ""))

    def close(self):
        """Write the events that were still going on, and finish the files. Raises UserError."""
        try:
            if self.event_file and self.people:
                self.event_file.write(self.people.finish())
        finally:
            for file in (self.event_file, self.landmark_file):
                if file:
                    file.close()

    def _tell(self, states, events, seconds):
        if not self.rare and any(drowsiness.rare for drowsiness in states.values()):
            self.rare = True
            print("frames come more than two seconds apart: too rarely to see whether eyes are "
                  "shut; nobody counts as visible", file=sys.stderr)
        if self.event_file:
            self.event_file.write(events)
        if not self.alarm:
            return
        people = {"driver": self.people.drowsiness} if self.given.driver else states
        for person, drowsiness in people.items():
            self.alarm.update(person, drowsiness.state, seconds)

    def _draw(self, image, tracks, told, driver):
        drawn = image
        for track, one in zip(tracks, told):
            colour = COLOURS.get(one["state"], (255, 255, 255))
            drawn = draw.landmarks(drawn, track.points_px, self.predictor.scheme, track.confidence,
                                   track.box, str(track.id), colour=colour)
            if one["state"] and driver is None:
                x_min, _, x_max, y_max = track.box
                drawn = draw.headline(drawn, one["state"], (x_min, y_max),
                                      max((x_max - x_min) / 9, 9), colour)
        if driver is not None:
            state, high = driver[1]["state"], drawn.shape[0]
            drawn = draw.headline(drawn, state, (0, high), high / 10, COLOURS[state])
        return drawn


def _text(told):
    """Readings of a face's eyes in a line; what is not known yet is -."""
    openness = (told["openness_right"], told["openness_left"])
    parts = ["eyes " + " ".join("-" if value is None else f"{value:.0%}" for value in openness)]
    if told["state"] is None:
        shut = {True: "shut", False: "open", None: "cannot be judged"}[told["closed"]]
        return f"{parts[0]}, {shut}"
    blinks, perclos = told["blinks_per_minute"], told["perclos"]
    parts += ["- blinks/min" if blinks is None else f"{blinks:.0f} blinks/min",
              "PERCLOS -" if perclos is None else f"PERCLOS {perclos:.0%}"]
    return ", ".join(parts + ([f"unseen {told['unseen']:.0f} s"] if told["unseen"] >= 1 else []))


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
        outputs.write_picture(f"snapshot_{number}.png", image)
        print(f"snapshot_{number}.png")
    # Closing the window by its button quits as well.
    closed = cv2.getWindowProperty(WINDOW, cv2.WND_PROP_VISIBLE) < 1
    return key in (ord("q"), 27) or closed


def run_images(demo, kind, what, output):
    """Draw one image or those of a folder; write them to output, or show them, or neither."""
    from tqdm import tqdm
    paths = what if kind == "folder" else [what]
    names = outputs.picture_names(paths)
    for path in tqdm(paths, "images", disable=kind == "image" or (demo.draws and output is None)):
        try:
            image = read_image(path)
        except UserError as error:
            if kind == "image":
                raise
            tqdm.write(f"{error}; left out", sys.stderr)
            continue
        demo.restart(still=True)
        drawn = demo(image, 0.0, path.name)
        if drawn is None:
            continue
        if output is None:
            if show(drawn, 0):
                break
        else:
            target = output / names[path] if kind == "folder" else output
            outputs.write_picture(target, drawn)


def run_video(demo, source, output, window):
    """Draw the frames of a sources.Recording or Live; write them to output, show them, or both, or
    neither. Returns whether a Live was given up."""
    from tqdm import tqdm
    last = time.monotonic()
    speed = drawn = None
    ended = False
    video = None if output is None else outputs.VideoFile(output, source.rate)
    # What --alarm line writes there is for programs.
    bar = tqdm(total=source.count, desc="frames", unit="frame",
               disable=(window and output is None) or demo.given.alarm == "line")
    try:
        while True:
            taken = source.read()
            ended = taken is None
            if ended:
                break
            if taken[0] is None:
                demo.wait(taken[1])
                if window and drawn is not None and show(drawn, 1):
                    break
                continue
            drawn = demo(cv2.cvtColor(taken[0], cv2.COLOR_BGR2RGB), taken[1], source.name, speed)
            now = time.monotonic()
            instant = 1 / max(now - last, 1e-6)
            speed, last = instant if speed is None else 0.9 * speed + 0.1 * instant, now
            if video is not None:
                video.write(drawn, taken[1])
            bar.update()
            if window and show(drawn, 1):
                break
    except KeyboardInterrupt:
        pass  # The user's wish, not the end of the video; what is written stays.
    finally:
        bar.close()
        source.release()
        if video is not None:
            video.close()
    if demo.frames == 0:
        raise UserError(f"{source.name}: no frame could be read; the file or the camera is damaged")
    missed = 0 if source.live else source.missed
    if missed:
        print(f"{source.name}: {missed} frames could not be decoded and were left out",
              file=sys.stderr)
    if ended and not source.live and demo.frames + missed < (source.count or 0):
        print(f"{source.name}: ended after {demo.frames} of {source.count} frames; the file is cut "
              f"off", file=sys.stderr)
    return ended and source.live


def main(argv=None):
    """Run the demo as the command line says. Raises UserError."""
    with machine.signals_interrupt() as signals:
        try:
            demonstrate(parse(argv))
        except KeyboardInterrupt:
            if not signals:
                raise
    if signals:
        sys.exit(128 + signals[0])


def demonstrate(given):
    """Find, draw, show and write, as a namespace of `parse` says. Raises UserError."""
    machine.keep_freed()
    kind, what = sources.find_source(given.source)
    still = kind in ("image", "folder")
    if still and (given.driver or given.events or given.alarm):
        raise UserError("--driver, --events and --alarm need a video, a camera or a stream; for "
                        "pictures there is --eyes")
    if kind != "camera" and (given.camera_size or given.camera_rate):
        raise UserError("--camera-size and --camera-rate are asked of a camera, which this source "
                        "is not")
    # Who asked for files or an alarm did not ask for hours of film.
    told = given.landmarks or given.events or given.alarm
    write = bool(given.output) or not (has_display() or told)
    output = output_path(given.output, kind, what) if write else None
    refuse(kind, what, output, given)
    experiment.find_weights(given.weights or "none", ".onnx")
    # Before the seconds that weights take to load.
    source = None if still else sources.open_source(kind, what, given.camera_size,
                                                    given.camera_rate)
    detector = get_detector(given.detector)
    demo = Demo(get_predictor(given.weights, given.device), detector, given,
                draws=write or has_display())
    lost = False
    try:
        if still:
            run_images(demo, kind, what, output)
        else:
            live = kind in ("camera", "stream")
            lost = run_video(demo, source, output, has_display() and (not write or live))
    finally:
        demo.close()
    if not demo.faces:
        print(demo.hint(), file=sys.stderr)
    where = [str(path) for path in (output, given.landmarks, given.events) if path]
    print(f"{demo.frames} frames, {demo.faces} faces" + (": " if where else "") + ", ".join(where))
    if lost:
        raise UserError(f"{source.name}: gives no more frames; the camera or the server went away")


if __name__ == "__main__":
    run(main)
