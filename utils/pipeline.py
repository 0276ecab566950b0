"""The demo's pipeline: a frame in, a drawn frame out.

For each frame, `Pipeline` tracks the faces, reads their eyes, updates the drowsiness of each person
(or of the driver alone), writes landmarks and events, rings the alarm and draws the result.
`Pipeline.observe` does all but the drawing.
"""
from __future__ import annotations

import dataclasses
import math
import sys
from typing import TYPE_CHECKING

import numpy

from utils import draw
from utils.detection.detector import INSTALL
from utils.detection.refine import mirror_errors
from utils.drowsiness.alarm import Alarm
from utils.drowsiness.driver import Driver, Everyone
from utils.drowsiness.eyes import read_eyes
from utils.drowsiness.states import STATES
from utils.landmarks import pose
from utils.landmarks.eyelids import EyeThresholds, aspect_ratios
from utils.tracking import outputs
from utils.tracking.tracker import Tracker

if TYPE_CHECKING:
    import argparse

    from utils.detection.detector import Detector
    from utils.drowsiness.states import Event
    from utils.predictor import Predictor
    from utils.tracking.tracker import Track


MAX_FRAMES_APART = 3  # Frames of too low a rate, in a row, until a note says so.


@dataclasses.dataclass(frozen=True)
class Observation:
    """What is known about one frame.

    Attributes:
        tracks: its faces.
        readings: of the eyes of each face, as outputs.eye_readings returns.
        poses: (yaw, pitch, roll) of each face in degrees; empty without options.pose.
        driver: (track id or None, readings) of the driver, where one is watched.
        events: (track id or `driver`, Event) of the events that have ended.
    """
    tracks: list[Track]
    readings: list[dict]
    poses: list[tuple[float, float, float]]
    driver: tuple[int | None, dict] | None
    events: list[tuple[int | str, Event]]


class Pipeline:
    """Processes the frames of one source; `close` completes the landmark and event files.

    Args:
        predictor: the landmark model.
        detector: the face detector.
        options: what to do: eyes, pose and driver (bools), landmarks and events (paths or None),
            alarm (a kind of Alarm, or None), and the detector's name.
        tracker_settings: keyword arguments of Tracker.
        draws: whether frames are drawn.

    Attributes:
        frames: number of frames so far.
        faces: number of faces in them.

    Raises:
        UserError: where the scheme does not suit the options, or a file cannot be written.
    """

    def __init__(self, predictor: Predictor, detector: Detector, options: argparse.Namespace,
                 tracker_settings: dict, draws: bool = True):
        self.predictor, self.detector, self.options = predictor, detector, options
        self.tracker_settings, self.draws = tracker_settings, draws
        self.thresholds = getattr(predictor, "eyes", EyeThresholds())
        # These two raise a UserError for a scheme without eye contours or pose points.
        if options.eyes:
            aspect_ratios(predictor.scheme.mean_face, predictor.scheme)
        if options.pose:
            pose.model_points(predictor.scheme)
        self.with_mirror = bool(options.landmarks and getattr(options, "flip_test", False))
        self.landmark_file = outputs.LandmarkFile(
            options.landmarks, predictor.scheme, options.eyes, options.pose,
            self.with_mirror) if options.landmarks else None
        self.event_file = outputs.EventFile(options.events) if options.events else None
        self.alarm = Alarm(options.alarm) if options.alarm else None
        self.frames = self.faces = self.rejected = 0
        self.frames_apart = 0  # Frames in a row of a rate that is too low.
        self.tracker = None
        self.restart()

    def restart(self, still: bool = False) -> None:
        """Drop all faces; with `still`, the next frame is a single image."""
        settings = self.tracker_settings | ({"filter_min_cutoff": 0} if still else {})
        detector = self.detector.with_retry() if still else self.detector
        self.rejected += self.tracker.rejected if self.tracker else 0
        self.tracker = Tracker(self.predictor, detector, **settings)
        self.people = Driver() if self.options.driver else None if still else Everyone()

    def __call__(self, image: numpy.ndarray, seconds: float, name: str,
                 frame_rate: float | None = None) -> numpy.ndarray | None:
        """Process a frame.

        Args:
            image: RGB uint8 (H, W, 3).
            seconds: its time.
            name: of the source, for the landmark file.
            frame_rate: frames a second to show, if known.

        Returns:
            A drawn copy of image, or None where frames are not drawn.
        """
        seen = self.observe(image, seconds, name)
        if not self.draws:
            return None
        drawn = self._draw(image, seen.tracks, seen.readings, seen.driver)
        lines = [f"{frame_rate:.0f} FPS"] if frame_rate else []
        if self.options.eyes:
            lines += [f"{track.id}: {_describe(one)}"
                      for track, one in zip(seen.tracks, seen.readings)]
        lines += ["{}: yaw {:+.0f}, pitch {:+.0f}, roll {:+.0f}".format(track.id, *angles)
                  for track, angles in zip(seen.tracks, seen.poses)]
        return draw.text_lines(drawn, lines)

    def observe(self, image: numpy.ndarray, seconds: float, name: str) -> Observation:
        """Process a frame without drawing it; the arguments are those of `__call__`."""
        tracks = self.tracker.update(image, seconds)
        eyes, states, events = [None] * len(tracks), {}, []
        if self.options.eyes:
            # Of the landmarks as predicted: the lag of the filter would hide short blinks.
            eyes = [read_eyes(track.raw_px, track.confidence, self.predictor.scheme,
                              self.thresholds, image=image) for track in tracks]
            if self.people:
                states, events = self.people.watch(tracks, eyes, image.shape, seconds)
                self._report(states, events, seconds)
        for track, one in zip(tracks, eyes):
            self._hide(track, one)
        readings = [outputs.eye_readings(one, states.get(track.id))
                    for track, one in zip(tracks, eyes)]
        driver = self._driver(next(iter(states), None))
        poses = [pose.head_pose(track.points_px, self.predictor.scheme)
                 for track in tracks] if self.options.pose else []
        if self.landmark_file:
            mirror = mirror_errors(self.predictor, image, numpy.array(
                [track.raw_px for track in tracks])) if self.with_mirror else ()
            self.landmark_file.write((self.frames, seconds, name), tracks, readings, driver, poses,
                                     mirror)
        self.frames, self.faces = self.frames + 1, self.faces + len(tracks)
        return Observation(tracks, readings, poses, driver, events)

    def wait(self, seconds: float) -> Observation:
        """Advance the time to `seconds` without a frame: nobody is visible."""
        events = []
        if self.people:
            _, events = self.people.watch([], [], (1, 1), seconds)
            self._report({}, events, seconds)
        return Observation([], [], [], self._driver(None), events)

    def hint(self) -> str:
        """Return one line on why no face was found."""
        rejected = self.rejected + self.tracker.rejected
        if rejected:
            return (f"the detector found {rejected} boxes in which the network sees no face; "
                    f"--min-confidence {self.tracker.min_confidence / 2:.2f} accepts more of them")
        if self.tracker.detector.name == "haar":
            return f"the detector found no face; YuNet finds more: {INSTALL}"
        return "the detector found no face"

    def close(self) -> list[tuple[int | str, Event]]:
        """End the run: write the events that are still open, close both files, return these events.

        Raises:
            UserError: where a file cannot be written.
        """
        events = self.people.finish() if self.people else []
        try:
            if self.event_file:
                self.event_file.write(events)
        finally:
            for file in (self.event_file, self.landmark_file):
                if file:
                    file.close()
        return events

    def _hide(self, track, eyes):
        """Set the confidence of the landmarks that the head hides to 0."""
        scheme = self.predictor.scheme
        if not pose.is_known(scheme):
            return
        yaw = pose.head_pose(track.raw_px, scheme)[0] if eyes is None else eyes.yaw
        hidden = pose.hidden_half(math.nan if yaw is None else yaw, scheme)
        if hidden.any():
            track.confidence = numpy.where(hidden, 0, track.confidence)

    def _driver(self, number):
        """Return (track id, readings) of the driver, or None where none is watched."""
        return (number, outputs.eye_readings(drowsiness=self.people.drowsiness)) \
            if self.options.driver else None

    def _report(self, states, events, seconds):
        """Write events and ring the alarm; warn about a low frame rate."""
        # A single gap of dropped frames is no low rate. The note comes once.
        if self.frames_apart < MAX_FRAMES_APART:
            too_low = any(drowsiness.frame_rate_too_low for drowsiness in states.values())
            self.frames_apart = self.frames_apart + 1 if too_low else 0
            if self.frames_apart == MAX_FRAMES_APART:
                print("note: frames are more than 2 s apart, too far to tell whether eyes are "
                      "closed; nobody counts as visible", file=sys.stderr)
        if self.event_file:
            self.event_file.write(events)
        if self.alarm:
            for person, drowsiness in self.people.watched.items():
                self.alarm.update(person, drowsiness.state, seconds)

    def _draw(self, image, tracks, readings, driver):
        drawn = image
        for track, one in zip(tracks, readings):
            state = one["state"]
            colour = STATES[state].colour if state else (255, 255, 255)
            drawn = draw.landmarks(drawn, track.points_px, self.predictor.scheme, track.confidence,
                                   track.box, str(track.id), colour=colour)
            if state and driver is None:
                x_min, _, x_max, y_max = track.box
                drawn = draw.banner(drawn, state, (x_min, y_max), max((x_max - x_min) / 9, 9),
                                    colour)
        if driver is not None:
            state, height = driver[1]["state"], drawn.shape[0]
            drawn = draw.banner(drawn, state, (0, height), height / 10, STATES[state].colour,
                                tuple(STATES))
        return drawn


def _describe(readings):
    """Return the eye readings of a face in one line; - stands for what is not known."""
    openness = (readings["openness_right"], readings["openness_left"])
    parts = ["eyes " + " ".join("-" if value is None else f"{value:.0%}" for value in openness)]
    if readings["state"] is None:
        closed = {True: "shut", False: "open", None: "cannot be assessed"}[readings["closed"]]
        return f"{parts[0]}, {closed}"
    blinks, perclos = readings["blinks_per_minute"], readings["perclos"]
    parts += ["- blinks/min" if blinks is None else f"{blinks:.0f} blinks/min",
              "PERCLOS -" if perclos is None else f"PERCLOS {perclos:.0%}"]
    if readings["unseen"] >= 1:
        parts.append(f"unseen {readings['unseen']:.0f} s")
    return ", ".join(parts)
