"""Whose eyes are watched: everyone's, or those of the driver alone."""
import math

from utils.drowsiness.states import WINDOW, Drowsiness
from utils.tracking.tracker import MEMORY

# A face that comes back is the driver's if its centre lies within so many sides of his crop of
# where he was last, and its side within this ratio of his. A passenger sits farther off.
NEAR, RATIO = 1.0, 1.6
# Another face takes over when it has had so much more of size and centre for so many seconds, or as
# much as he had while he is away: who was the only one in sight at first, or a thing that passed
# for a face, is not the driver for good. One seen for less than that gives way at once.
BETTER, PATIENCE = 1.5, 5.0


class Everyone:
    """Each face has its own minute. `watch` frame by frame, `finish` at the end.

    Who goes out of sight with shut eyes is watched on, for a WINDOW or until a face is where he
    was; others are forgotten when the tracker forgets them.
    """

    def __init__(self):
        self._people = {}  # A track's id to (Drowsiness, when it was last seen, its box there).

    @property
    def watched(self):
        """{name: Drowsiness} of all, in sight or not."""
        return {i: one for i, (one, *_) in self._people.items()}

    def watch(self, tracks, looks, shape, time):
        """Tracks of a frame of shape (H, W, ...) and the eyes.Eyes of each, at time in seconds.

        Returns {track id: Drowsiness} and the events that are over: [(track id, Event)].
        """
        events = []
        for track, look in zip(tracks, looks):
            drowsiness = self._people.get(track.id, (None,))[0] or Drowsiness()
            self._people[track.id] = drowsiness, time, track.box
            over = drowsiness.update(look.openness, look.closed, time)
            events += [(track.id, event) for event in over]
        for i, (drowsiness, seen, box) in list(self._people.items()):
            # After so long the tracker gives the face another id.
            if time - seen <= MEMORY:
                continue
            if drowsiness.shut and time - seen <= WINDOW and not any(
                    distance(box, track.box) <= NEAR for track in tracks):
                over = drowsiness.update((None, None), None, time)
            else:
                over = self._people.pop(i)[0].finish()
            events += [(i, event) for event in over]
        return {track.id: self._people[track.id][0] for track in tracks}, events

    def finish(self):
        """The events that were still going on: [(track id, Event)]."""
        return [(i, event) for i, (one, *_) in self._people.items() for event in one.finish()]


class Driver:
    """The largest, most central face. `watch` and `finish` are as in Everyone, for him alone.

    `drowsiness` is his, over lost tracks, and starts anew with another driver. After a WINDOW out
    of sight nothing of his minute is left, and who is seen next is the driver.
    """

    def __init__(self):
        self.drowsiness, self._before = Drowsiness(), []
        self._id = self._box = self._time = None
        self._rival = None  # (id, since when) of a face that may take over.

    @property
    def watched(self):
        """As Everyone's: {"driver": Drowsiness}."""
        return {"driver": self.drowsiness}

    def watch(self, tracks, looks, shape, time):
        """As Everyone.watch; without him in sight the first is empty, and his state goes on."""
        track = self.find(tracks, shape, time)
        events, self._before = self._before, []
        look = next((look for one, look in zip(tracks, looks) if one is track), None)
        openness, closed = (look.openness, look.closed) if look else ((None, None), None)
        events += self.drowsiness.update(openness, closed, time)
        return ({track.id: self.drowsiness} if track else {},
                [("driver", event) for event in events])

    def finish(self):
        """The events that were still going on: [("driver", Event)]."""
        return [("driver", event) for event in self.drowsiness.finish()]

    def find(self, tracks, shape, time):
        """The Track of tracks that is the driver's, or None."""
        track = self._known(tracks, time)
        best = max(tracks, key=lambda one: fitness(one.box, shape), default=None)
        if self._box is None:
            track = best
        elif best is None or best is track or fitness(best.box, shape) < (
                1.0 if track is None else BETTER) * fitness(self._box, shape):
            self._rival = None
        else:
            if self._rival is None or self._rival[0] != best.id:
                self._rival = best.id, time
            known = self.drowsiness.minute.seen >= PATIENCE
            if not known or time - self._rival[1] >= PATIENCE:
                self._forget()
                track = best
        if track is not None:
            self._id, self._box, self._time = track.id, track.box, time
        return track

    def _known(self, tracks, time):
        """The driver's track among tracks, or None; forgets him where others are seen after a
        WINDOW out of sight.
        """
        if self._box is None or not tracks:
            return None
        if time - self._time > WINDOW:
            self._forget()
            return None
        same = [track for track in tracks if track.id == self._id]
        return next(iter(same), None) or min(
            (track for track in tracks if distance(self._box, track.box) <= NEAR),
            key=lambda track: distance(self._box, track.box), default=None)

    def _forget(self):
        self._id = self._box = self._time = self._rival = None
        self._before, self.drowsiness = self.drowsiness.finish(), Drowsiness()


def fitness(box, shape):
    """How large and central a face is: the side of its box (4,) in pixels, times 1 in the middle of
    the picture of shape (H, W, ...) down to 0 in its corners.
    """
    x, y, side = _place(box)
    away = math.hypot(x - shape[1] / 2, y - shape[0] / 2) / math.hypot(shape[1] / 2, shape[0] / 2)
    return side * max(1 - away, 0.0)


def distance(box, other):
    """How far other (4,) lies from box (4,), in sides of box; infinite where RATIO parts them."""
    (x, y, side), (there_x, there_y, other_side) = _place(box), _place(other)
    if not side <= other_side * RATIO <= side * RATIO ** 2:
        return math.inf
    return math.hypot(there_x - x, there_y - y) / max(side, 1e-9)


def _place(box):
    """Centre x, y and larger side of a box (4,). Plain numbers: numpy is slow on so few."""
    x_min, y_min, x_max, y_max = (float(v) for v in box)
    return (x_min + x_max) / 2, (y_min + y_max) / 2, max(x_max - x_min, y_max - y_min)
