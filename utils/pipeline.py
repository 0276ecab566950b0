"""From a frame to what is told of it: faces, eyes, states, a picture, files and an alarm."""
import sys

from utils import draw
from utils.drowsiness import eyes
from utils.drowsiness.alarm import Alarm
from utils.drowsiness.driver import Driver, Everyone
from utils.landmarks import pose
from utils.tracking import outputs
from utils.tracking.tracker import Tracker

COLOURS = {"awake": (80, 220, 100), "drowsy": (255, 210, 0), "microsleep": (255, 130, 0),
           "asleep": (255, 50, 50), "not visible": (190, 190, 190)}


class Pipeline:
    """Finds the faces of a frame, follows them, reads their eyes, draws and writes them.

    given: a namespace that says what is asked of it: eyes, pose and driver (bools), landmarks and
    events (paths or None), alarm (a way of Alarm, or None) and the detector's name. settings: of
    the Tracker. draws: whether anybody sees the frames. `close` finishes the landmark and event
    files.
    """

    def __init__(self, predictor, detector, given, settings, draws=True):
        self.predictor, self.detector, self.given = predictor, detector, given
        self.settings, self.draws = settings, draws
        # EyeThresholds of shut and open eyes that came with the weights, where they have some.
        self.limits = getattr(predictor, "eyes", eyes.EyeThresholds())
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
        it; rate: frames a second.
        """
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
        poses = [pose.head_pose(track.points_px, self.predictor.scheme)
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
        return draw.lines(drawn, lines)

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
        for person, drowsiness in self.people.watched.items():
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
