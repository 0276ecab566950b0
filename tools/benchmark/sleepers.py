"""Measure the detection of sleep in short videos made of photos with open and closed eyes.

    python -m tools.benchmark.sleepers FOLDER [--weights FILE ...] [--names LIST:PART]

FOLDER has photos of faces in closed/ and open/, as main.py --test-eyes reads them. Each pair makes
a video at 30 frames/s: three seconds of the face with open eyes, then four of the one with closed
eyes, both with a small sway. The video runs through the tracker of the demo, and the largest face
through Drowsiness. The table counts the videos whose sleep is detected as a sleep, only as
microsleeps or not at all, and those with an alarm while the eyes are open. Photos with a shorter
side below 90 pixels are left out. Takes some seconds a video.
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
# Seconds around the change of photos whose events count as neither: the tracker and the eye states
# need some frames to notice the new face.
MARGIN = 0.5


def frames(photos):
    """Yield (seconds, frame, RGB uint8) of a video of two photos, first awake, then asleep."""
    for number in range(round((AWAKE + ASLEEP) * RATE)):
        time = number / RATE
        photo = photos[time >= AWAKE]
        scale, phase = FACE / max(photo.shape[:2]), 2 * math.pi * time / PERIOD
        left = (SIZE[0] - scale * photo.shape[1]) / 2 + SWAY[0] * math.sin(phase)
        top = (SIZE[1] - scale * photo.shape[0]) / 2 + SWAY[1] * math.cos(phase)
        yield time, cv2.warpAffine(photo, numpy.array([[scale, 0, left], [0, scale, top]]), SIZE,
                                   borderValue=(80, 80, 80))


def detect_events(predictor, detector, video):
    """Return the drowsiness Events of the largest face of a video [(seconds, frame)]."""
    tracker, drowsiness, events = Tracker(predictor, detector), Drowsiness(), []
    for time, frame in video:
        face = largest(tracker.update(frame, time))
        state = face and eyes.read_eyes(face.raw_px, face.confidence, predictor.scheme,
                                        predictor.eyes, image=frame)
        events += drowsiness.update(state.openness, state.closed, time, state.looks_down,
                                    state.mouth) if state else drowsiness.update(
            (None, None), None, time)
    return events + drowsiness.finish()


def classify(events):
    """Classify the Events of a video.

    Returns:
        What the sleep was detected as, "sleep", "microsleeps" or "nothing", and whether there was
        an alarm before it.
    """
    alarms = [event for event in events if event.kind in ("sleep", "microsleep")]
    late = {event.kind for event in alarms if event.end > AWAKE + MARGIN}
    detected = "sleep" if "sleep" in late else "microsleeps" if late else "nothing"
    return detected, any(event.start < AWAKE - MARGIN for event in alarms)


def pairs(folder, names, count):
    """Return up to `count` pairs (awake, asleep) of photos, RGB uint8.

    Raises:
        UserError: if there is no usable photo of one of the two states.
    """
    found = {True: [], False: []}
    for path, closed in list_photos(folder, names):
        photo = read_photo(path, upright=True) if len(found[closed]) < count else None
        if photo is not None and min(photo.shape[:2]) >= SMALLEST:
            found[closed].append(photo)
    if not all(found.values()):
        raise UserError(f"{folder}: has no photo of at least {SMALLEST} px in closed/ or in open/")
    return list(zip(found[False], found[True]))


def parse(argv=None):
    """Parse the command line."""
    parser = model_parser("tools.benchmark.sleepers", __doc__, "to measure")
    parser.add_argument("folder", metavar="FOLDER", help="with photos in closed/ and open/")
    parser.add_argument("--names", default="none", metavar="LIST[:PART]",
                        help="which photos, as of main.py --test-eyes [all]")
    parser.add_argument("--count", type=int, default=40, help="largest number of videos [40]")
    return parser.parse_args(argv)


def run():
    """Run every model on every video and print a Markdown table."""
    options, rows = parse(), []
    photos = pairs(options.folder, options.names, options.count)
    for name in options.weights:
        predictor, found = Predictor(name), []
        for number, pair in enumerate(photos, 1):
            events = detect_events(predictor, get_detector(options.detector), frames(pair))
            detected, false_alarm = classify(events)
            found.append((detected, false_alarm))
            if (detected, false_alarm) != ("sleep", False):
                say(f"{name}, video {number}: detected {detected}"
                    + ", and an alarm before" * false_alarm)
        kinds = [detected for detected, _ in found]
        rows.append([name, len(found),
                     *(kinds.count(kind) for kind in ("sleep", "microsleeps", "nothing")),
                     sum(false_alarm for _, false_alarm in found)])
    print("\n".join(table(["model", "videos", "sleep", "only microsleeps", "nothing",
                           "alarm while awake"], rows)))


if __name__ == "__main__":
    guarded(run)
