"""What a whole tracked frame costs: python -m tools.benchmark.tracking.

One face in a video of 640x360 and of 1280x720: a pan over a photo, forth and back, or a film of
your own. Each network alone (the same ONNX session, one prepared crop), the tracker without looks
of its detector, and the tracker as the demo has it take turns in shuffled order, a block of frames
each, in one process. MediaPipe's face mesh in video mode takes turns with them where it is
installed (mediapipe before 0.10.30, which brings its model).

The mean is of a block, its median over the rounds; median and 95th percentile are of single frames.
The detector's share is the mean with its looks less the mean without them. Ratios are of means of
the same round, medians again. Frames follow each other without a pause, as those of a file do:
beside a camera, what the detector does in the background waits for no frame.
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
NEVER = 10 ** 9  # Frames between two looks.
PAUSE = 0.03  # Seconds between two turns, in which the threads of the last way come to rest.
WARM = 3  # Frames at the start of a block, after which caches hold what this way needs.


def pan(photo, size, frames):
    """A film of frames, RGB uint8 of size (width, height), that sways over a photo and ends where
    it begins.
    """
    width, height = size
    scale = 1.4 * height / photo.shape[0]
    film = []
    for frame in range(frames):
        turn = 2 * math.pi * frame / frames
        x = width / 2 - scale * photo.shape[1] / 2 + 0.1 * height * math.sin(turn)
        y = 0.03 * height * math.sin(2 * turn)
        film.append(cv2.warpAffine(photo, numpy.array([[scale, 0, x], [0, scale, y]]), size,
                                   flags=cv2.INTER_AREA))
    return film


def film_of(source, size, frames, skip):
    """A film of at most so many frames of size, of a photo or of a video without its first skip
    frames. Raises UserError.
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
    film = [cv2.cvtColor(cv2.resize(frame, size), cv2.COLOR_BGR2RGB)
            for frame, _ in itertools.islice(found, skip, skip + frames)]
    recording.release()
    if not film:
        raise UserError(f"{what}: has no frame after its first {skip}")
    # Forth and back: a jump to its beginning would be a shot cut.
    return film + film[-2:0:-1]


def bare(predictor, film, detector):
    """The network alone: a function that runs it on the crop of the first frame's face."""
    tracks = Tracker(predictor, detector).update(film[0], 0.0)
    if not tracks:
        raise UserError("no face is found in the first frame of the film")
    face = crop.cut(film[0], tracks[0].box, predictor.input_size)
    feed = {predictor.session.get_inputs()[0].name:
            numpy.ascontiguousarray(face.transpose(2, 0, 1)[None])}
    return lambda frame: len(predictor.session.run(None, feed)[0])


def tracked(predictor, detector, **settings):
    """The tracker: a function of a frame that says how many faces there are."""
    tracker, seconds = Tracker(predictor, detector, **settings), itertools.count()
    return lambda frame: len(tracker.update(frame, next(seconds) / RATE))


def meshed(net):
    """MediaPipe: a function of a frame that says how many faces there are."""
    return lambda frame: len(net.process(frame).multi_face_landmarks or ())


def ways_of(options, film, mesh):
    """Name to a function of a frame that gives the number of faces seen, of all that take turns;
    mesh: of MediaPipe, or None.
    """
    ways = {}
    for path in options.weights:
        predictor, name = Predictor(path), pathlib.Path(path).name
        if predictor.model is not None:
            raise UserError(f"{path}: the bare network is timed as an .onnx file")
        ways[name, "network alone"] = bare(predictor, film, get_detector(options.detector))
        ways[name, "tracked, no looks"] = tracked(predictor, get_detector(options.detector),
                                                  every=NEVER)
        ways[name, "tracked"] = tracked(predictor, get_detector(options.detector))
    if mesh:
        ways["MediaPipe", "face mesh"] = meshed(mesh)
    return ways


def watch(ways, film, block, rounds):
    """Name to (seconds (rounds, block) of its frames, share of frames with one face)."""
    shuffler, order = random.Random(0), list(ways)
    films = {name: itertools.cycle(film) for name in ways}
    seconds = {name: numpy.zeros((rounds, block)) for name in ways}
    alone, frame = dict.fromkeys(ways, 0), numpy.empty_like(film[0])
    for number in range(-1, rounds):
        shuffler.shuffle(order)
        for name in order:
            time.sleep(PAUSE)
            for place in range(-WARM, block):
                # As it lies in the cache just after it was decoded.
                numpy.copyto(frame, next(films[name]))
                begun = time.perf_counter()
                faces = ways[name](frame)
                passed = time.perf_counter() - begun
                if number >= 0 and place >= 0:
                    seconds[name][number, place] = passed
                    alone[name] += faces == 1
    return {name: (seconds[name], alone[name] / (rounds * block)) for name in ways}


def rows_of(size, found):
    """Rows of the table of what `watch` found in a film of size."""
    means = {name: seconds.mean(1) for name, (seconds, _) in found.items()}
    mesh = means.get(("MediaPipe", "face mesh"))
    rows = []
    for (model, what), (seconds, alone) in found.items():
        mean, network = means[model, what], means.get((model, "network alone"))
        share = mean - means[model, "tracked, no looks"] if what == "tracked" else None
        rows.append([
            "{}x{}".format(*size), model, what, ms(mean), ms(seconds), ms(seconds, 95),
            "-" if share is None else ms(share),
            "-" if network is None else f"{numpy.median(mean / network):.2f}",
            "-" if mesh is None else f"{numpy.median(mean / mesh):.2f}", f"{alone:.0%}"])
    return rows


def parse(argv=None):
    """The command line as a namespace."""
    parser = model_parser("tools.benchmark.tracking", __doc__, "to time", "FILE.onnx")
    parser.add_argument("--source", default="sample", metavar="PHOTO|VIDEO|sample",
                        help="where the face is from [the portrait that comes with matplotlib]")
    parser.add_argument("--skip", type=int, default=0, metavar="FRAMES",
                        help="leave out so many frames at the start of a video [0]")
    parser.add_argument("--frames", type=int, default=120, help="of the film [120]")
    # Four quick looks and a thorough one are 28 frames.
    parser.add_argument("--block", type=int, default=56, metavar="FRAMES",
                        help="that a way has before the next one's turn [56]")
    parser.add_argument("--rounds", type=int, default=15, help="of turns [15]")
    return parser.parse_args(argv)


def run():
    """Film, follow, and print the Markdown table."""
    options = parse()
    rows, mesh = [], face_mesh()
    for size in SIZES:
        say("{}x{}".format(*size))
        film = film_of(options.source, size, options.frames, options.skip)
        ways = ways_of(options, film, mesh)
        rows += rows_of(size, watch(ways, film, options.block, options.rounds))
    name = pathlib.Path(options.detector).stem
    print(f"Detector: {name}. {len(os.sched_getaffinity(0))} cores, load of the machine at the end "
          f"{os.getloadavg()[0]:.1f}.\n")
    print("\n".join(table(["video", "model", "what", "mean ms", "median", "95 %",
                           "detector's share", "of the network", "of MediaPipe", "one face seen"],
                          rows)))


if __name__ == "__main__":
    guarded(run)
