"""Measure the time of a tracked frame, with and without the face detector.

    python -m tools.benchmark.tracking [--weights FILE.onnx ...] [--source VIDEO]

The video has one face, at 640x360 and at 1280x720: a pan over a photo, or a video file. Three
variants run alternately in random order in one process, a block of frames each: the network alone
(one ONNX session on one prepared crop), the tracker without its detector, and the tracker with the
settings of the demo. MediaPipe's face mesh in video mode is a fourth one if it is installed
(mediapipe<0.10.30 contains the model).

"mean ms" is the median over the rounds of the mean of a block; "median" and "95 %" are of single
frames. "detector" is the difference of the means with and without detector. Ratios are medians of
the ratios of the means of one round. The frames follow each other without a pause, as in a file.
With a camera the detector also works between frames. Takes minutes a model.
"""
import itertools
import math
import os
import pathlib
import random
import time

import cv2
import numpy

from tools.benchmark.common import face_mesh, model_parser, ms, say, table
from utils.data.photo import read_photo
from utils.detection.detector import get_detector
from utils.errors import UserError
from utils.errors import run as guarded
from utils.landmarks import crop
from utils.predictor import Predictor
from utils.tracking import sources
from utils.tracking.tracker import Tracker

RATE = 30
SIZES = (640, 360), (1280, 720)
NO_DETECTOR = "tracked, no detector"
NEVER = 10 ** 9  # Frames between two detections: more than a video has.
PAUSE = 0.03  # Seconds between two blocks, in which the threads of the last variant stop spinning.
WARM = 3  # Frames at the start of a block that fill the processor's caches and are not measured.


def pan(photo, size, frames):
    """Return frames, RGB uint8 of size (width, height), of a closed pan over a photo."""
    width, height = size
    scale = 1.4 * height / photo.shape[0]
    video = []
    for frame in range(frames):
        phase = 2 * math.pi * frame / frames
        x = width / 2 - scale * photo.shape[1] / 2 + 0.1 * height * math.sin(phase)
        y = 0.03 * height * math.sin(2 * phase)
        video.append(cv2.warpAffine(photo, numpy.array([[scale, 0, x], [0, scale, y]]), size,
                                    flags=cv2.INTER_AREA))
    return video


def load_video(source, size, frames, skip):
    """Return frames, RGB uint8, of a pan over a photo, or of a video forwards and backwards.

    Args:
        source: a photo, a video file or "sample".
        size: width and height of the frames.
        frames: largest number of frames that are read.
        skip: number of frames at the start of a video file that are left out.

    Raises:
        UserError: if the source cannot be read or has too few frames.
    """
    kind, what = sources.find_source(source)
    if kind == "image":
        photo = read_photo(what, upright=True)
        if photo is None:
            raise UserError(f"{what}: cannot be read as an image")
        return pan(photo, size, frames)
    if kind != "video":
        raise UserError(f"source {source}: expected a photo, a video or sample")
    recording = sources.open_source(kind, what)
    found = iter(recording.read, None)
    video = [cv2.cvtColor(cv2.resize(frame, size), cv2.COLOR_BGR2RGB)
             for frame, _ in itertools.islice(found, skip, skip + frames)]
    recording.release()
    if not video:
        raise UserError(f"{what}: has no frame after its first {skip}")
    # Repeated from its start it would have a shot cut.
    return video + video[-2:0:-1]


def network_alone(predictor, video, detector):
    """Return a function that runs only the network, on the crop of the first frame's face."""
    tracks = Tracker(predictor, detector).update(video[0], 0.0)
    if not tracks:
        raise UserError("no face is found in the first frame of the video")
    face = crop.cut(video[0], tracks[0].box, predictor.input_size)
    feed = {predictor.session.get_inputs()[0].name:
            numpy.ascontiguousarray(face.transpose(2, 0, 1)[None])}
    return lambda frame: len(predictor.session.run(None, feed)[0])


def tracked(predictor, detector, **settings):
    """Return a function that tracks a frame and returns the number of faces."""
    tracker, seconds = Tracker(predictor, detector, **settings), itertools.count()
    return lambda frame: len(tracker.update(frame, next(seconds) / RATE))


def face_mesh_runner(net):
    """Return a function that runs MediaPipe on a frame and returns the number of faces."""
    return lambda frame: len(net.process(frame).multi_face_landmarks or ())


def make_variants(options, video, mesh):
    """Return {(model, variant): function of a frame that returns the number of faces}.

    Args:
        options: the parsed command line.
        video: frames, RGB uint8.
        mesh: MediaPipe's face mesh, or None.
    """
    variants = {}
    for path in options.weights:
        predictor, name = Predictor(path), pathlib.Path(path).name
        if predictor.model is not None:
            raise UserError(f"{path}: expected an .onnx file")
        variants[name, "network alone"] = network_alone(predictor, video,
                                                        get_detector(options.detector))
        variants[name, NO_DETECTOR] = tracked(predictor, get_detector(options.detector),
                                              detect_every=NEVER)
        variants[name, "tracked"] = tracked(predictor, get_detector(options.detector))
    if mesh:
        variants["MediaPipe", "face mesh"] = face_mesh_runner(mesh)
    return variants


def measure(variants, video, block, rounds):
    """Time the variants alternately, a block of frames each.

    Returns:
        {(model, variant): (seconds (rounds, block) of the frames, share of frames with one face)}.
    """
    shuffler, order = random.Random(0), list(variants)
    frames = {name: itertools.cycle(video) for name in variants}
    seconds = {name: numpy.zeros((rounds, block)) for name in variants}
    single, frame = dict.fromkeys(variants, 0), numpy.empty_like(video[0])
    for number in range(-1, rounds):
        shuffler.shuffle(order)
        for name in order:
            time.sleep(PAUSE)
            for index in range(-WARM, block):
                # The copy puts the frame into the processor's cache, as decoding does.
                numpy.copyto(frame, next(frames[name]))
                start = time.perf_counter()
                faces = variants[name](frame)
                duration = time.perf_counter() - start
                if number >= 0 and index >= 0:
                    seconds[name][number, index] = duration
                    single[name] += faces == 1
    return {name: (seconds[name], single[name] / (rounds * block)) for name in variants}


def make_rows(size, found):
    """Return the table rows of the results of measure() at a frame size."""
    means = {name: seconds.mean(1) for name, (seconds, _) in found.items()}
    mesh = means.get(("MediaPipe", "face mesh"))
    rows = []
    for (model, variant), (seconds, single) in found.items():
        mean, network = means[model, variant], means.get((model, "network alone"))
        detector = mean - means[model, NO_DETECTOR] if variant == "tracked" else None
        rows.append([
            "{}x{}".format(*size), model, variant, ms(mean), ms(seconds), ms(seconds, 95),
            "-" if detector is None else ms(detector),
            "-" if network is None else f"{numpy.median(mean / network):.2f}",
            "-" if mesh is None else f"{numpy.median(mean / mesh):.2f}", f"{single:.0%}"])
    return rows


def parse(argv=None):
    """Parse the command line."""
    parser = model_parser("tools.benchmark.tracking", __doc__, "to measure", "FILE.onnx")
    parser.add_argument("--source", default="sample", metavar="PHOTO|VIDEO|sample",
                        help="photo or video of a face [the portrait that comes with matplotlib]")
    parser.add_argument("--skip", type=int, default=0, metavar="FRAMES",
                        help="frames to leave out at the start of a video [0]")
    parser.add_argument("--frames", type=int, default=120, help="length of the video [120]")
    # 28 frames are one cycle of the tracker's detections: four at low and one at full resolution.
    parser.add_argument("--block", type=int, default=56, metavar="FRAMES",
                        help="frames in a block [56]")
    parser.add_argument("--rounds", type=int, default=15, help="blocks of each variant [15]")
    return parser.parse_args(argv)


def run():
    """Measure at both frame sizes and print a Markdown table."""
    options = parse()
    rows, mesh = [], face_mesh()
    for size in SIZES:
        say("{}x{}".format(*size))
        video = load_video(options.source, size, options.frames, options.skip)
        variants = make_variants(options, video, mesh)
        rows += make_rows(size, measure(variants, video, options.block, options.rounds))
    name = pathlib.Path(options.detector).stem
    print(f"Detector: {name}. {len(os.sched_getaffinity(0))} cores, system load at the end "
          f"{os.getloadavg()[0]:.1f}.\n")
    print("\n".join(table(["video", "model", "variant", "mean ms", "median", "95 %", "detector",
                           "/ network", "/ MediaPipe", "frames with one face"], rows)))


if __name__ == "__main__":
    guarded(run)
