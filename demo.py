"""Facial landmarks on a webcam, a stream, a video, an image or a folder of images.

python demo.py                                   first webcam, shipped weights; q quits, s saves
python demo.py --source sample                   the portrait that comes with matplotlib
python demo.py --source clip.mp4 --output out.mp4 --landmarks out.csv --eyes
python demo.py --source 0 --driver --events trip.csv --alarm      driver monitoring
python demo.py --serve 8000                      a page that uses the camera of the browser

`run_demo` opens the source (`utils.tracking.sources`), loads detector and model, and passes each
frame to `utils.pipeline.Pipeline`, which tracks, writes and draws.
"""
from __future__ import annotations

import argparse
import os
import pathlib
import sys
import time
from typing import TYPE_CHECKING

# These imports come first, because the package checks the version of Python.
from utils import experiment, machine

# OpenCV and FFmpeg print messages of their own; these must be set before the import.
os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")

import cv2  # noqa: E402

from utils import draw  # noqa: E402
from utils.args import Parser  # noqa: E402
from utils.data.photo import read_image  # noqa: E402
from utils.detection.detector import get_detector  # noqa: E402
from utils.drowsiness.states import STATES  # noqa: E402
from utils.errors import UserError, printable, run  # noqa: E402
from utils.pipeline import Pipeline  # noqa: E402
from utils.tracking import output_names, outputs, sources  # noqa: E402
from utils.tracking.flags import TRACKING, add_source_flags, add_tracker_flags  # noqa: E402
from utils.tracking.recording import report_damage  # noqa: E402
from utils.tracking.window import show, why_no_window  # noqa: E402
from utils.web.flags import add_page_flags  # noqa: E402

if TYPE_CHECKING:
    from utils.predictor import Predictor


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; --help exits.

    Raises:
        UserError: for unknown flags and wrong values.
    """
    parser = Parser(prog="demo.py", allow_abbrev=False, description="Facial landmarks on a webcam, "
                    "a stream, a video, an image or a folder of images.")
    add_source_flags(parser)
    group = parser.add_argument_group("Model")
    group.add_argument("--weights", metavar="PATH|EXP",
                       help="a .pt or .onnx file, or an experiment [the shipped weights, else "
                       "the newest experiment's]")
    group.add_argument("--detector", default="auto", metavar="auto|yunet|haar|PATH.onnx",
                       help="face detector: yunet, haar, or a YuNet or SCRFD file [auto: yunet if "
                       "its package is installed, else haar]")
    group.add_argument("--device", metavar="DEVICE",
                       help="auto, cpu or cuda [.pt: auto, .onnx: cpu]")
    group.add_argument("--flip-test", action="store_true", help="average with the mirrored face, "
                       "which needs a .pt and twice the time; with --landmarks each face also has "
                       "its mirror_error, in twice the time again")
    group = parser.add_argument_group("Output")
    group.add_argument("--output", metavar="PATH",
                       help="write an image, a video or a folder instead of opening a window")
    group.add_argument("--landmarks", metavar="FILE", help="write landmarks to a .csv or .json")
    group = parser.add_argument_group("What to show and write")
    group.add_argument("--pose", action="store_true", help="yaw, pitch and roll of each head in "
                       "degrees")
    group.add_argument("--eyes", action="store_true", help="openness of the eyes of each face, "
                       f"blinks a minute, PERCLOS and state: {', '.join(STATES)}")
    group = parser.add_argument_group("Driver monitoring", "these flags imply --eyes")
    group.add_argument("--driver", action="store_true", help="watch one person, the largest, most "
                       "central face, also after it was out of sight")
    group.add_argument("--events", metavar="FILE.csv", help="write blinks, winks, microsleeps, "
                       "sleep, yawns, looks down and time out of sight, with start and end in "
                       "seconds")
    group.add_argument("--alarm", nargs="?", const="bell", choices=("bell", "line"),
                       help="ring the terminal's bell, or write a line to stderr, when a person is "
                       "not awake or is out of sight [bell]")
    add_page_flags(parser)
    add_tracker_flags(parser)
    options = parser.parse_args(argv)
    options.eyes = bool(options.eyes or options.driver or options.events or options.alarm)
    return options


def main(argv: list[str] | None = None) -> None:
    """Run the demo; SIGTERM and SIGHUP complete the outputs before they end the process.

    Raises:
        UserError: for mistakes of the user.
    """
    with machine.interrupt_on_signals() as signals:
        try:
            run_demo(parse(argv))
        except KeyboardInterrupt:
            if not signals:
                raise
    if signals:
        sys.exit(128 + signals[0])


def run_demo(options: argparse.Namespace) -> None:
    """Run the demo with the options that `parse` returns.

    Raises:
        UserError: for mistakes of the user.
    """
    tracker_settings = {name: getattr(options, name) for name in TRACKING}
    if options.serve:
        from utils.web.start import serve
        serve(options, find_weights(options.weights, options.device), tracker_settings)
        return
    machine.tune()
    if options.flip_test:
        options.weights = str(experiment.find_weights(options.weights or "none", ".pt",
                                                      experiment.WEIGHTS))
    kind, what = (("camera", 0) if options.source is None
                  else sources.find_source(options.source))
    still = kind in ("image", "folder")
    if still and (options.driver or options.events or options.alarm):
        raise UserError("--driver, --events and --alarm need a video, a camera or a stream; for "
                        "pictures there is --eyes")
    if kind != "camera" and options.camera_size:
        raise UserError("--camera-size needs a camera, which this source is not")
    if still and (options.camera_rate or options.aspect):
        raise UserError("--camera-rate and --aspect need a camera, a stream or a video")
    live = kind in ("camera", "stream")
    # A live source is shown while it is written.
    obstacle = why_no_window() if live or not options.output else ""
    # Without a window a video is written, unless the user asks for other outputs only.
    other_outputs = options.landmarks or options.events or options.alarm
    write = bool(options.output) or not (obstacle is None or other_outputs)
    output = output_names.output_path(options.output, kind, what) if write else None
    output_names.check_outputs(kind, what, output, options)
    if obstacle:
        print(f"note: {obstacle}; " + (f"{printable(output)} is written" if output else
                                       "nothing is shown"), file=sys.stderr)
    # Mistakes in the command line are reported before a model is loaded, which takes seconds.
    find_weights(options.weights, options.device)
    source = None if still else sources.open_source(kind, what, options.camera_size,
                                                    options.camera_rate, options.aspect)
    detector = get_detector(options.detector)
    predictor = get_predictor(options.weights, options.device)
    if options.flip_test:
        predictor.use_flip_test()
    pipeline = Pipeline(predictor, detector, options,
                        tracker_settings, draws=write or obstacle is None)
    lost = False
    try:
        if still:
            run_images(pipeline, kind, what, output)
        else:
            lost = run_video(pipeline, source, output, obstacle is None)
    finally:
        pipeline.close()
    if not pipeline.faces:
        print(pipeline.hint(), file=sys.stderr)
    written = [str(path) for path in (output, options.landmarks, options.events) if path]
    print(f"{pipeline.frames} frames, {pipeline.faces} faces" + (": " if written else "")
          + ", ".join(written))
    if lost:
        raise UserError(f"{source.name}: gives no more frames; the camera or the server went away")


def run_video(pipeline, source, output, window):
    """Process the frames of a sources.Recording or Live until its end or until the user quits.

    Args:
        pipeline: the Pipeline.
        source: the Recording or Live.
        output: video file to write, or None.
        window: whether to show the frames.

    Returns:
        Whether a Live ended, because the camera or the server is gone.

    Raises:
        UserError: where no frame can be read or an output cannot be written.
    """
    from tqdm import tqdm
    last = time.monotonic()
    # A film shows its own rate, a live source that at which its frames are processed.
    frame_rate, drawn = None if source.live else source.rate, None
    ended = False
    video = None if output is None else outputs.VideoFile(output, source.rate)
    # Programs read the lines of --alarm line from stderr, so there is no progress bar.
    bar = tqdm(total=source.count, desc="frames", unit="frame",
               disable=(window and output is None) or pipeline.options.alarm == "line")
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
            drawn = pipeline(image, seconds, source.name, frame_rate)
            now = time.monotonic()
            if source.live:
                current = 1 / max(now - last, 1e-6)
                frame_rate = current if frame_rate is None else 0.9 * frame_rate + 0.1 * current
            last = now
            if video is not None:
                video.write(drawn, seconds)
            bar.update()
            if window and show(drawn, 1):
                break
    except KeyboardInterrupt:
        pass  # The user quits; the outputs are completed.
    finally:
        bar.close()
        source.release()
        if video is not None:
            video.close()
    if pipeline.frames == 0:
        raise UserError(f"{source.name}: no frame could be read; the file or the camera is damaged")
    if ended and not source.live:
        report_damage(source)
    return ended and source.live


def run_images(pipeline, kind, what, output):
    """Process one image or those of a folder; write them to output, or show them if there is none.

    Raises:
        UserError: where no image can be read or an output cannot be written.
    """
    from tqdm import tqdm
    paths = what if kind == "folder" else [what]
    names = output_names.picture_names(paths)
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
            draw.save(output / names[path] if kind == "folder" else output, drawn)
    if not pipeline.frames:
        raise UserError(f"{paths[0].parent}: none of its {len(paths)} pictures could be read")


def find_weights(weights: str | None, device: str | None = None) -> pathlib.Path:
    """Find the file that --weights means.

    Without --weights it is the shipped 8-bit model, or the shipped .pt where a GPU is asked for.

    Raises:
        UserError: where there is no such file.
    """
    int8 = experiment.WEIGHTS / f"{experiment.DEFAULT_MODEL}.int8.onnx"
    if weights is None and device in (None, "cpu") and int8.is_file():
        return int8
    return experiment.find_weights(weights or "none", ".onnx", experiment.WEIGHTS)


def get_predictor(weights: str | None, device: str | None = None) -> Predictor:
    """Load the model that --weights means; torch is imported for a .pt only.

    Raises:
        UserError: where it cannot be loaded.
    """
    from utils.predictor import Predictor
    path = find_weights(weights, device)
    # `auto` imports torch to look for a GPU, which an .onnx does not need.
    return Predictor(path, device or ("auto" if path.suffix == ".pt" else "cpu"))


if __name__ == "__main__":
    run(main)
