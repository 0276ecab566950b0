"""Whose eyes are watched in a video: those of everyone, or of the driver alone.

`Everyone` and `Driver` take the tracks of a frame with their `eyes.Eyes`, assign each face to its
`states.Drowsiness`, and return states by track id and the events that have ended.
"""
from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy

from utils.drowsiness.states import WINDOW, Drowsiness
from utils.tracking.tracker import LOST_SECONDS

if TYPE_CHECKING:
    from utils.drowsiness.eyes import Eyes
    from utils.drowsiness.states import Event
    from utils.tracking.tracker import Track

# A returning face is the same person if its centre is at most MAX_DISTANCE sides of the last crop
# away from it and the sides differ by at most a factor of MAX_SIDE_RATIO. A passenger sits farther
# away.
MAX_DISTANCE, MAX_SIDE_RATIO = 1.0, 1.6
# Another face becomes the driver when its score (see `driver_score`) has been TAKEOVER_RATIO times
# that of the driver for TAKEOVER_SECONDS, or as high as the driver's last score while the driver is
# not visible. This corrects a choice made while only a passenger or a false detection was visible.
# A driver who was seen for less than TAKEOVER_SECONDS is replaced at once.
TAKEOVER_RATIO, TAKEOVER_SECONDS = 1.5, 5.0
# A driver who was gone is known again when a face was in the driver's place, or the only one, for
# RETURN_SECONDS. People who were seen beside the driver do not count.
RETURN_SECONDS = 0.5


class Everyone:
    """Watches each face separately.

    A person who disappears asleep is watched for another WINDOW seconds, or until a face
    appears in the same place. Others are dropped when the tracker drops them.
    """

    def __init__(self):
        self._people = {}  # Track id to (Drowsiness, time last seen, box then).

    @property
    def watched(self) -> dict[int, Drowsiness]:
        """The drowsiness of all watched people by track id, visible or not."""
        return {i: drowsiness for i, (drowsiness, *_) in self._people.items()}

    def watch(self, tracks: list[Track], eyes: list[Eyes], shape: tuple[int, ...], time: float,
              ) -> tuple[dict[int, Drowsiness], list[tuple[int | str, Event]]]:
        """Add the observations of the next frame.

        Args:
            tracks: faces of the frame.
            eyes: of each track.
            shape: (H, W, ...) of the frame.
            time: of the frame, in seconds.

        Returns:
            {track id: Drowsiness} of the tracks, and (track id, Event) of the ended events.
        """
        events = []
        for track, observed in zip(tracks, eyes):
            drowsiness = self._people.get(track.id, (None,))[0] or Drowsiness()
            self._people[track.id] = drowsiness, time, track.box
            ended = drowsiness.update(observed.openness, observed.closed, time,
                                      observed.looks_down, observed.mouth)
            events += [(track.id, event) for event in ended]
        for i, (drowsiness, last_time, box) in list(self._people.items()):
            if time - last_time <= LOST_SECONDS:
                continue
            if drowsiness.asleep and time - last_time <= WINDOW and not any(
                    distance(box, track.box) <= MAX_DISTANCE for track in tracks):
                ended = drowsiness.update((None, None), None, time)
            else:
                ended = self._people.pop(i)[0].finish()
            events += [(i, event) for event in ended]
        return {track.id: self._people[track.id][0] for track in tracks}, events

    def finish(self) -> list[tuple[int | str, Event]]:
        """Return (track id, Event) of the events that had not ended at the last frame."""
        return [(i, event) for i, (drowsiness, *_) in self._people.items()
                for event in drowsiness.finish()]


class Driver:
    """Watches the driver: the largest, most central face. Has the methods of Everyone.

    Attributes:
        drowsiness: of the driver. It continues when the track is lost and starts anew with another
            driver, or when the driver has not been visible for WINDOW seconds.
    """

    def __init__(self):
        self.drowsiness, self._pending_events = Drowsiness(), []
        self._id = self._box = self._time = None
        # (track id, since when) of a face that may become the driver, or may be the driver again.
        self._rival = self._candidate = None
        self._others = {}  # Track id to box (4,) of those seen beside the driver.

    @property
    def watched(self) -> dict[str, Drowsiness]:
        """The drowsiness of the driver by the name `driver`."""
        return {"driver": self.drowsiness}

    def watch(self, tracks: list[Track], eyes: list[Eyes], shape: tuple[int, ...], time: float,
              ) -> tuple[dict[int, Drowsiness], list[tuple[int | str, Event]]]:
        """Add the observations of the next frame; see Everyone.watch.

        While the driver is not visible the returned dict is empty, but the state is updated.
        """
        track = self.find(tracks, shape, time)
        events, self._pending_events = self._pending_events, []
        observed = next((one for other, one in zip(tracks, eyes) if other is track), None)
        events += self.drowsiness.update((None, None), None, time) if observed is None else \
            self.drowsiness.update(observed.openness, observed.closed, time, observed.looks_down,
                                   observed.mouth)
        return ({track.id: self.drowsiness} if track else {},
                [("driver", event) for event in events])

    def finish(self) -> list[tuple[int | str, Event]]:
        """Return ("driver", Event) of the events that had not ended at the last frame."""
        return [("driver", event) for event in self.drowsiness.finish()]

    def find(self, tracks: list[Track], shape: tuple[int, ...], time: float) -> Track | None:
        """Return the driver's track in a frame of this shape, or None."""
        track = self._find_known(tracks, time)
        if track is None and self._box is not None:
            track = self._find_returned(tracks, time)
        best = max(tracks, key=lambda other: driver_score(other.box, shape), default=None)
        if self._box is None:
            track = best
        elif best is None or best is track or driver_score(best.box, shape) < (
                1.0 if track is None else TAKEOVER_RATIO) * driver_score(self._box, shape):
            self._rival = None
        else:
            if self._rival is None or self._rival[0] != best.id:
                self._rival = best.id, time
            established = self.drowsiness.window.seen >= TAKEOVER_SECONDS
            if not established or time - self._rival[1] >= TAKEOVER_SECONDS:
                self._reset()
                track = best
        if track is not None:
            self._id, self._box, self._time = track.id, track.box, time
            self._candidate = None
            # Only those in sight now: a passenger may leave.
            self._others = {other.id: other.box for other in tracks if other is not track}
        return track

    def _find_known(self, tracks, time):
        """Return the present driver's track or None; drop a driver who was away for a WINDOW."""
        if self._box is None or not tracks:
            return None
        if time - self._time > WINDOW:
            self._reset()
            return None
        same = [track for track in tracks if track.id == self._id]
        return next(iter(same), None) or min(
            (track for track in self._strangers(tracks)
             if distance(self._box, track.box) <= MAX_DISTANCE),
            key=lambda track: distance(self._box, track.box), default=None)

    def _find_returned(self, tracks, time):
        """Return the driver's track once a face is in the driver's place, or is the only one.

        Its size may be any: the driver may have leaned back or moved the seat.
        """
        found = self._strangers(tracks)
        near = [track for track in found if _is_in_place(self._box, track.box)]
        found = min(near, key=lambda track: distance(self._box, track.box, math.inf),
                    default=found[0] if len(tracks) == len(found) == 1 else None)
        if found is None:
            self._candidate = None
        elif self._candidate is None or self._candidate[0] != found.id:
            self._candidate = found.id, time
        return found if found is not None and (
            time - self._candidate[1] >= RETURN_SECONDS) else None

    def _strangers(self, tracks):
        """Return the tracks that are not of people who were seen beside the driver."""
        for track in tracks:
            if track.id not in self._others and track.id != self._id and any(
                    distance(box, track.box) <= MAX_DISTANCE / 2 for box in self._others.values()):
                self._others[track.id] = track.box  # The same person, with another id.
        self._others |= {track.id: track.box for track in tracks if track.id in self._others}
        return [track for track in tracks if track.id not in self._others]

    def _reset(self):
        self._id = self._box = self._time = self._rival = self._candidate = None
        self._others = {}
        self._pending_events, self.drowsiness = self.drowsiness.finish(), Drowsiness()


def driver_score(box: numpy.ndarray, shape: tuple[int, ...]) -> float:
    """Score how large and central a face is.

    Args:
        box: (4,) in pixels.
        shape: (H, W, ...) of the image.

    Returns:
        The box's side in pixels times a weight, 1 in the centre of the image and 0 in its corners.
    """
    x, y, side = _centre_and_side(box)
    half_height, half_width = shape[0] / 2, shape[1] / 2
    off_centre = math.hypot(x - half_width, y - half_height) / math.hypot(half_width, half_height)
    return side * max(1 - off_centre, 0.0)


def distance(box: numpy.ndarray, other: numpy.ndarray,
             max_ratio: float = MAX_SIDE_RATIO) -> float:
    """Return the distance between the centres of two boxes (4,), in sides of `box`.

    It is infinite where their sides differ by more than a factor of `max_ratio`.
    """
    (x, y, side), (other_x, other_y, other_side) = _centre_and_side(box), _centre_and_side(other)
    if max(side, other_side) > max_ratio * min(side, other_side):
        return math.inf
    return math.hypot(other_x - x, other_y - y) / max(side, 1e-9)


def _is_in_place(box, other):
    """Return whether the centres of two boxes (4,) of any size are one side of the larger apart."""
    (x, y, side), (other_x, other_y, other_side) = _centre_and_side(box), _centre_and_side(other)
    return math.hypot(other_x - x, other_y - y) <= MAX_DISTANCE * max(side, other_side)


def _centre_and_side(box):
    """Return centre x, y and longer side of a box; plain numbers, as NumPy is slow on so few."""
    x_min, y_min, x_max, y_max = (float(v) for v in box)
    return (x_min + x_max) / 2, (y_min + y_max) / 2, max(x_max - x_min, y_max - y_min)
