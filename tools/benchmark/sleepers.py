"""Who sleeps before the camera, and who does not: python -m tools.benchmark.sleepers FOLDER.

FOLDER has photos of faces in closed/ and open/ (as main.py --test-eyes reads them). Each pair of
them is a film of its own: three seconds of somebody awake, then four of a face with shut eyes, both
swaying before the camera, at 30 frames a second. The film goes through the tracker as in the demo
and the largest face to Drowsiness. Told are the films in which the sleep was seen as one, in which
it was taken for microsleeps alone, or not seen, and those with an alarm while the face was awake.
Photos whose shorter side is less than 90 pixels are left out.
"""
import math

import cv2
import numpy

from tools.benchmark.common import model_parser, say, table
from utils.data.eye_states import list_photos
from utils.data.photo import read_photo
from utils.detection.detector import get_detector
from utils.drowsiness import eyes
from utils.drowsiness.states import Drowsiness
from utils.errors import UserError
from utils.errors import run as guarded
from utils.predictor import Predictor
from utils.tracking.tracker import Tracker, largest

RATE = 30
SIZE, FACE = (640, 360), 300  # Pixels of a frame, and of the photo in it.
AWAKE, ASLEEP = 3.0, 4.0  # Seconds.
SWAY, PERIOD = (6, 3), 2.0  # Pixels across and down, seconds.
SMALLEST = 90
# The tracker needs some frames to see that the face is another, the lids some to be believed.
MARGIN = 0.5


def frames(photos):
    """(seconds, RGB uint8 frame) of a film of two photos, the first awake and the second asleep."""
    for number in range(round((AWAKE + ASLEEP) * RATE)):
        time = number / RATE
        photo = photos[time >= AWAKE]
        scale, turn = FACE / max(photo.shape[:2]), 2 * math.pi * time / PERIOD
        left = (SIZE[0] - scale * photo.shape[1]) / 2 + SWAY[0] * math.sin(turn)
        top = (SIZE[1] - scale * photo.shape[0]) / 2 + SWAY[1] * math.cos(turn)
        yield time, cv2.warpAffine(photo, numpy.array([[scale, 0, left], [0, scale, top]]), SIZE,
                                   borderValue=(80, 80, 80))


def watch(predictor, detector, film):
    """The drowsiness.Events of the largest face of a film [(seconds, frame)]."""
    tracker, drowsiness, events = Tracker(predictor, detector), Drowsiness(), []
    for time, frame in film:
        face = largest(tracker.update(frame, time))
        look = face and eyes.look(face.raw_px, face.confidence, predictor.scheme, predictor.eyes,
                                  frame.shape)
        seen = (look.openness, look.closed) if look else ((None, None), None)
        events += drowsiness.update(*seen, time)
    return events + drowsiness.finish()


def judge(events):
    """(what was seen of the sleep: sleep, microsleeps or nothing; whether there was an alarm
    before) of the Events of a film.
    """
    alarms = [event for event in events if event.kind in ("sleep", "microsleep")]
    late = {event.kind for event in alarms if event.end > AWAKE + MARGIN}
    seen = "sleep" if "sleep" in late else "microsleeps" if late else "nothing"
    return seen, any(event.start < AWAKE - MARGIN for event in alarms)


def pairs(folder, names, count):
    """Up to count [(awake, asleep)] photos, RGB uint8. Raises UserError where there is none."""
    found = {True: [], False: []}
    for path, closed in list_photos(folder, names):
        photo = read_photo(path, upright=True) if len(found[closed]) < count else None
        if photo is not None and min(photo.shape[:2]) >= SMALLEST:
            found[closed].append(photo)
    if not all(found.values()):
        raise UserError(f"{folder}: has no photo of {SMALLEST} px or more in closed/ or open/")
    return list(zip(found[False], found[True]))


def parse(argv=None):
    """The command line as a namespace."""
    parser = model_parser("tools.benchmark.sleepers", __doc__, "that watch")
    parser.add_argument("folder", metavar="FOLDER", help="with photos in closed/ and open/")
    parser.add_argument("--names", default="none", metavar="LIST[:PART]",
                        help="which photos, as of main.py --test-eyes [all]")
    parser.add_argument("--count", type=int, default=40, help="of films, at most [40]")
    return parser.parse_args(argv)


def run():
    """Film, watch, and print the Markdown table."""
    options, rows = parse(), []
    photos = pairs(options.folder, options.names, options.count)
    for name in options.weights:
        predictor, found = Predictor(name), []
        for number, pair in enumerate(photos, 1):
            found.append(judge(watch(predictor, get_detector(options.detector), frames(pair))))
            if found[-1] != ("sleep", False):
                say(f"{name}, film {number}: saw {found[-1][0]}"
                    + ", and an alarm before" * found[-1][1])
        seen = [what for what, _ in found]
        rows.append([name, len(found), *(seen.count(what) for what in
                                         ("sleep", "microsleeps", "nothing")),
                     sum(alarm for _, alarm in found)])
    print("\n".join(table(["", "films", "a sleep", "microsleeps alone", "nothing",
                           "an alarm while awake"], rows)))


if __name__ == "__main__":
    guarded(run)
