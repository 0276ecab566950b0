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

from utils import experiment, machine  # noqa: E402
from utils.args import Parser, load_args  # noqa: E402
from utils.data.photo import WRITABLE_SUFFIXES, read_photo, why_unread  # noqa: E402
from utils.detection.detector import get_detector  # noqa: E402
from utils.errors import UserError, run  # noqa: E402
from utils.pipeline import Pipeline  # noqa: E402
from utils.tracking import outputs, sources  # noqa: E402

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


def find_weights(weights, device=None):
    """The file that --weights means; without it the shipped one in eight bits, unless a GPU is
    asked for. Raises UserError.
    """
    small = experiment.WEIGHTS / f"{experiment.SHIPPED}.int8.onnx"
    if weights is None and device in (None, "cpu") and small.is_file():
        return small
    return experiment.find_weights(weights or "none", ".onnx", experiment.WEIGHTS)


def get_predictor(weights, device=None):
    """The Predictor of what --weights means. torch is imported for a .pt only. Raises UserError."""
    from utils.predictor import Predictor
    path = find_weights(weights, device)
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
    known = WRITABLE_SUFFIXES if kind == "image" else set(outputs.CODECS)
    if path.suffix.lower() not in known:
        raise UserError(f"output {path}: this source is written as {', '.join(sorted(known))}, not "
                        f"{path.suffix or 'a name without suffix'}")
    return path


def refuse(kind, what, output, given):
    """Raise UserError where something would be written over the source or another output, or not
    be what its name says.
    """
    files = what if kind == "folder" else [what] if kind in ("image", "video") else []
    written = [("output", output / name) for name in outputs.picture_names(files).values()] \
        if kind == "folder" and output else [("output", output)]
    named = [(flag, pathlib.Path(getattr(given, flag))) for flag in ("landmarks", "events")
             if getattr(given, flag)]
    for flag, path in named:
        outputs.check_suffix(flag, path)
    outputs.refuse_sources([pair for pair in dict.fromkeys(written + named) if pair[1]], files)


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


def run_images(pipeline, kind, what, output):
    """Draw one image or those of a folder; write them to output, or show them, or neither."""
    from tqdm import tqdm
    paths = what if kind == "folder" else [what]
    names = outputs.picture_names(paths)
    shown = pipeline.draws and output is None
    for path in tqdm(paths, "images", disable=kind == "image" or shown):
        try:
            image = read_image(path)
        except UserError as error:
            if kind == "image":
                raise
            tqdm.write(f"{error}; left out", sys.stderr)
            continue
        pipeline.restart(still=True)
        drawn = pipeline(image, 0.0, path.name)
        if drawn is None:
            continue
        if output is None:
            if show(drawn, 0):
                break
        else:
            target = output / names[path] if kind == "folder" else output
            outputs.write_picture(target, drawn)
    if not pipeline.frames:
        raise UserError(f"{paths[0].parent}: none of its {len(paths)} pictures could be read")


def run_video(pipeline, source, output, window):
    """Draw the frames of a sources.Recording or Live; write them to output, show them, or both, or
    neither. Returns whether a Live was given up.
    """
    from tqdm import tqdm
    last = time.monotonic()
    speed = drawn = None
    ended = False
    video = None if output is None else outputs.VideoFile(output, source.rate)
    # What --alarm line writes there is for programs.
    bar = tqdm(total=source.count, desc="frames", unit="frame",
               disable=(window and output is None) or pipeline.given.alarm == "line")
    try:
        while True:
            taken = source.read()
            ended = taken is None
            if ended:
                break
            if taken[0] is None:
                pipeline.wait(taken[1])
                if window and drawn is not None and show(drawn, 1):
                    break
                continue
            image, seconds = cv2.cvtColor(taken[0], cv2.COLOR_BGR2RGB), taken[1]
            drawn = pipeline(image, seconds, source.name, speed)
            now = time.monotonic()
            instant = 1 / max(now - last, 1e-6)
            speed, last = instant if speed is None else 0.9 * speed + 0.1 * instant, now
            if video is not None:
                video.write(drawn, seconds)
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
    if pipeline.frames == 0:
        raise UserError(f"{source.name}: no frame could be read; the file or the camera is damaged")
    missed = 0 if source.live else source.missed
    if missed:
        print(f"{source.name}: {missed} frames could not be decoded and were left out",
              file=sys.stderr)
    if ended and not source.live and pipeline.frames + missed < (source.count or 0):
        print(f"{source.name}: ended after {pipeline.frames} of {source.count} frames; the file is "
              f"cut off", file=sys.stderr)
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
    machine.tune_malloc()
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
    find_weights(given.weights, given.device)
    # Before the seconds that weights take to load.
    source = None if still else sources.open_source(kind, what, given.camera_size,
                                                    given.camera_rate)
    detector = get_detector(given.detector)
    pipeline = Pipeline(get_predictor(given.weights, given.device), detector, given,
                        tracker_settings(given), draws=write or has_display())
    lost = False
    try:
        if still:
            run_images(pipeline, kind, what, output)
        else:
            live = kind in ("camera", "stream")
            lost = run_video(pipeline, source, output, has_display() and (not write or live))
    finally:
        pipeline.close()
    if not pipeline.faces:
        print(pipeline.hint(), file=sys.stderr)
    where = [str(path) for path in (output, given.landmarks, given.events) if path]
    print(f"{pipeline.frames} frames, {pipeline.faces} faces" + (": " if where else "")
          + ", ".join(where))
    if lost:
        raise UserError(f"{source.name}: gives no more frames; the camera or the server went away")


if __name__ == "__main__":
    run(main)
