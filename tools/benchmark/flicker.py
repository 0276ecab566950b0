"""How still the points stand, and how far they lag: python -m tools.benchmark.flicker.

The portrait that comes with matplotlib is filmed twice for `--seconds`: held still, and carried
about on a known path (it sways, turns and comes nearer), each frame with noise of its own and
compressed as a camera would. Where a point must be in a frame follows from where it is at rest, so
no label is needed. Jitter is the change of a point from frame to frame beside that of the path,
root of the mean square, in % of the distance of the outer eye corners; lag is how many frames the
face's centre is late. MediaPipe's face mesh in video mode stands beside them where it is installed
(mediapipe before 0.10.30, which brings its model).
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
WARM = 15  # Frames in which detectors find the face and filters come to rest.
NOISE, QUALITY = 3.0, 85  # Standard deviation in grey values; of JPEG.
MESH_EYES = 33, 263  # Outer eye corners in MediaPipe's mesh.


def path(frame):
    """The 2 x 3 affine of a frame of the moving film, against the film at rest."""
    seconds = frame / RATE
    angle = math.radians(6) * math.sin(1.1 * seconds)
    scale = 0.9 + 0.1 * math.cos(0.7 * seconds)
    middle = numpy.array([WIDTH, HEIGHT]) / 2
    shift = numpy.array([70 * math.sin(1.9 * seconds), 25 * math.sin(1.3 * seconds)])
    turn = scale * numpy.array([[math.cos(angle), -math.sin(angle)],
                                [math.sin(angle), math.cos(angle)]])
    return numpy.column_stack([turn, middle + shift - turn @ middle])


def carried(points, matrix):
    """Points (..., 2) through a 2 x 3 affine."""
    return points @ matrix[:, :2].T + matrix[:, 2]


def film(portrait, matrices):
    """Frames, RGB uint8 (480, 640, 3), of the portrait under each of the matrices."""
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


def figures(points, rest, matrices, side):
    """(jitter in %, lag in frames) of points (N, K, 2) in N frames.

    rest: (K, 2), where the points are at rest. side: distance of the eye corners there, in pixels.
    lag is NaN where nothing moves.
    """
    true = numpy.stack([carried(rest, matrix) for matrix in matrices])
    error = points - true
    jitter = math.sqrt((numpy.diff(error, axis=0) ** 2).sum(-1).mean())
    speed = numpy.gradient(true.mean(1), axis=0)
    moved = (speed ** 2).sum()
    # What is late by t frames is off by -t times the speed.
    lag = -(error.mean(1) * speed).sum() / moved if moved > 1e-9 else math.nan
    return 100 * jitter / side, lag


def ours(weights, detector, **settings):
    """A function: frame and seconds to points (K, 2); and the indices of its eye corners."""
    predictor = Predictor(weights)
    if not isinstance(predictor.scheme.divisor, tuple):
        raise UserError(f"{weights}: jitter is told beside the distance of the two points that "
                        f"divide NME; scheme {predictor.scheme.name} has none")
    tracker = Tracker(predictor, get_detector(detector), **settings)

    def follow(frame, seconds):
        faces = tracker.update(frame, seconds)
        return faces[0].points_px if faces else None

    return follow, predictor.scheme.divisor


def mesh():
    """The same for MediaPipe's face mesh, or None where it is not installed."""
    net = face_mesh()
    if net is None:
        return None

    def follow(frame, _):
        found = net.process(frame).multi_face_landmarks
        return numpy.array([(p.x * WIDTH, p.y * HEIGHT) for p in found[0].landmark]) \
            if found else None

    return follow, MESH_EYES


def watch(make, portrait, frames):
    """[jitter still, jitter moving, lag] of the follower that make() gives."""
    still, moving = [numpy.eye(2, 3)] * frames, [path(frame) for frame in range(frames)]
    rest, side, found = None, None, []
    for matrices in (still, moving):
        follow, (right, left) = make()
        points = [follow(frame, number / RATE)
                  for number, frame in enumerate(film(portrait, matrices))][WARM:]
        seen = [number for number, one in enumerate(points) if one is not None]
        if len(seen) < len(points):
            say(f"lost in {len(points) - len(seen)} of {len(points)} frames")
            return [math.nan] * 3
        points = numpy.stack(points)
        if rest is None:
            rest = points.mean(0)
            side = numpy.linalg.norm(rest[left] - rest[right])
        found.append(figures(points, rest, matrices[WARM:], side))
    return [found[0][0], *found[1]]


def parse(argv=None):
    """The command line as a namespace."""
    parser = model_parser("tools.benchmark.flicker", __doc__, "to film")
    parser.add_argument("--seconds", type=float, default=6.0, help="of each film [6]")
    return parser.parse_args(argv)


def run():
    """Film, follow, and print the Markdown table."""
    options = parse()
    portrait = read_photo(sources.find_source("sample")[1], upright=True)
    ways = {}
    for name in options.weights:
        ways[f"{name}, no filter"] = lambda name=name: ours(name, options.detector,
                                                            filter_min_cutoff=0)
        ways[f"{name}, as the demo"] = lambda name=name: ours(name, options.detector)
    if mesh():
        ways["MediaPipe face mesh"] = mesh
    rows = []
    for name, make in ways.items():
        say(name)
        still, moving, lag = watch(make, portrait, round(options.seconds * RATE))
        rows.append([name, f"{still:.3f}", f"{moving:.3f}", f"{lag:.2f}"])
    print("\n".join(table(["", "jitter at rest, %", "jitter moving, %", "lag, frames"], rows)))


if __name__ == "__main__":
    guarded(run)
