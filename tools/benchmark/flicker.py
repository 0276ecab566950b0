"""Measure the jitter and the lag of tracked landmarks.

    python -m tools.benchmark.flicker [--weights FILE ...] [--seconds 6]

Two videos are made of the portrait that comes with matplotlib: one at rest, and one that moves
along a known path (translation, rotation, scale). Every frame has new noise and JPEG compression.
The true position of a landmark is its mean position at rest moved along the path, so no annotation
is needed.

Jitter is the root mean square of the change of a landmark's error from frame to frame, in % of the
distance of the outer eye corners. Lag is the delay of the mean landmark in frames. MediaPipe's face
mesh in video mode is measured too if it is installed (mediapipe<0.10.30 contains the model). Takes
a minute a model on two cores.
"""
import math

import cv2
import numpy

from tools.benchmark.common import face_mesh, model_parser, say, table
from utils.data.photo import read_photo
from utils.detection.detector import get_detector
from utils.errors import UserError
from utils.errors import run as guarded
from utils.predictor import Predictor
from utils.tracking import sources
from utils.tracking.tracker import Tracker

RATE = 30
WIDTH, HEIGHT = 640, 480
WARM = 15  # Frames that are not measured: the detector finds the face and the filter settles.
NOISE, QUALITY = 3.0, 85  # Standard deviation in grey values; JPEG quality.
MESH_EYES = 33, 263  # Outer eye corners of MediaPipe's mesh.


def path(frame):
    """Return the affine matrix (2, 3) from the video at rest to a frame of the moving one."""
    seconds = frame / RATE
    angle = math.radians(6) * math.sin(1.1 * seconds)
    scale = 0.9 + 0.1 * math.cos(0.7 * seconds)
    middle = numpy.array([WIDTH, HEIGHT]) / 2
    shift = numpy.array([70 * math.sin(1.9 * seconds), 25 * math.sin(1.3 * seconds)])
    turn = scale * numpy.array([[math.cos(angle), -math.sin(angle)],
                                [math.sin(angle), math.cos(angle)]])
    return numpy.column_stack([turn, middle + shift - turn @ middle])


def transform(points, matrix):
    """Apply an affine matrix (2, 3) to points (..., 2)."""
    return points @ matrix[:, :2].T + matrix[:, 2]


def make_video(portrait, matrices):
    """Yield a frame, RGB uint8 (480, 640, 3), of the portrait under each affine matrix (2, 3)."""
    scale = 1.4 * HEIGHT / portrait.shape[0]
    place = numpy.array([[scale, 0, WIDTH / 2 - 0.5 * scale * portrait.shape[1]], [0, scale, 0]])
    random = numpy.random.default_rng(0)
    for matrix in matrices:
        whole = matrix @ numpy.vstack([place, [0, 0, 1]])
        clean = cv2.warpAffine(portrait, whole, (WIDTH, HEIGHT), flags=cv2.INTER_AREA)
        noisy = clean + random.normal(0, NOISE, clean.shape)
        code = cv2.imencode(".jpg", numpy.clip(noisy, 0, 255).astype(numpy.uint8)[..., ::-1],
                            [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[1]
        yield cv2.imdecode(code, cv2.IMREAD_COLOR)[..., ::-1].copy()


def jitter_and_lag(points, rest, matrices, eye_distance):
    """Return the jitter in % and the lag in frames; the lag is NaN without movement.

    Args:
        points: tracked landmarks (N, K, 2) of N frames in pixels.
        rest: true landmarks (K, 2) at rest in pixels.
        matrices: N affine matrices (2, 3) from rest to each frame.
        eye_distance: distance of the outer eye corners at rest in pixels.
    """
    true = numpy.stack([transform(rest, matrix) for matrix in matrices])
    error = points - true
    jitter = math.sqrt((numpy.diff(error, axis=0) ** 2).sum(-1).mean())
    speed = numpy.gradient(true.mean(1), axis=0)
    squared_speed = (speed ** 2).sum()
    # A delay of t frames is an error of -t times the speed.
    lag = -(error.mean(1) * speed).sum() / squared_speed if squared_speed > 1e-9 else math.nan
    return 100 * jitter / eye_distance, lag


def model_tracker(weights, detector, **settings):
    """Return a function (frame, seconds) to landmarks (K, 2) or None, and its eye corner indices.

    Args:
        weights: file of the model.
        detector: "haar", or the .onnx file of a face detector.
        settings: of the Tracker.
    """
    predictor = Predictor(weights)
    if not isinstance(predictor.scheme.divisor, tuple):
        raise UserError(f"{weights}: jitter is measured relative to the distance of two landmarks "
                        f"that normalises NME; scheme {predictor.scheme.name} has none")
    tracker = Tracker(predictor, get_detector(detector), **settings)

    def follow(frame, seconds):
        faces = tracker.update(frame, seconds)
        return faces[0].points_px if faces else None

    return follow, predictor.scheme.divisor


def mesh_tracker():
    """Return the same for MediaPipe's face mesh, or None if it is not installed."""
    net = face_mesh()
    if net is None:
        return None

    def follow(frame, _):
        found = net.process(frame).multi_face_landmarks
        return numpy.array([(p.x * WIDTH, p.y * HEIGHT) for p in found[0].landmark]) \
            if found else None

    return follow, MESH_EYES


def measure(make, portrait, frames):
    """Return [jitter at rest, jitter moving, lag] of the tracker that make() returns."""
    still, moving = [numpy.eye(2, 3)] * frames, [path(frame) for frame in range(frames)]
    rest, eye_distance, results = None, None, []
    for matrices in (still, moving):
        follow, (right, left) = make()
        points = [follow(frame, number / RATE)
                  for number, frame in enumerate(make_video(portrait, matrices))][WARM:]
        lost = sum(found is None for found in points)
        if lost:
            say(f"no face in {lost} of {len(points)} frames")
            return [math.nan] * 3
        points = numpy.stack(points)
        if rest is None:
            rest = points.mean(0)
            eye_distance = numpy.linalg.norm(rest[left] - rest[right])
        results.append(jitter_and_lag(points, rest, matrices[WARM:], eye_distance))
    return [results[0][0], *results[1]]


def parse(argv=None):
    """Parse the command line."""
    parser = model_parser("tools.benchmark.flicker", __doc__, "to measure")
    parser.add_argument("--seconds", type=float, default=6.0, help="length of each video [6]")
    return parser.parse_args(argv)


def run():
    """Track both videos with every model and print a Markdown table."""
    options = parse()
    portrait = read_photo(sources.find_source("sample")[1], upright=True)
    trackers = {}
    for name in options.weights:
        trackers[f"{name}, no filter"] = lambda name=name: model_tracker(
            name, options.detector, filter_min_cutoff=0)
        trackers[f"{name}, filtered"] = lambda name=name: model_tracker(name, options.detector)
    if mesh_tracker():
        trackers["MediaPipe face mesh"] = mesh_tracker
    rows = []
    for name, make in trackers.items():
        say(name)
        still, moving, lag = measure(make, portrait, round(options.seconds * RATE))
        rows.append([name, f"{still:.3f}", f"{moving:.3f}", f"{lag:.2f}"])
    print("\n".join(table(["", "jitter at rest, %", "jitter moving, %", "lag, frames"], rows)))


if __name__ == "__main__":
    guarded(run)
