"""Drowsiness of one person over time: blinks, microsleeps, sleep, PERCLOS and a state.

`Drowsiness.update` takes the openness of the eyes frame by frame (`utils.drowsiness.eyes`), returns
the events that have ended and updates the state. STATES is the table of all states, with how each
is drawn and when it triggers the alarm. To add a state, add it there and to `Drowsiness._decide`.
"""
from __future__ import annotations

import collections
import dataclasses
import math
import statistics

import numpy

WINDOW = 60.0  # Seconds over which PERCLOS and the blink rate are computed.
# PERCLOS is None until this many seconds of the window were observed. The state drowsy then takes
# at least 4.5 s of closed eyes, more than blinks and one microsleep.
MIN_SEEN = 30.0
# A gap of more than MAX_GAP seconds without an observation of the eyes is unseen time: neither open
# nor closed. At low frame rates the limit is GAP_INTERVALS times the frame interval (median of the
# last MEDIAN_INTERVALS), at most MAX_INTERVAL. With longer frame intervals no state is reported.
MAX_GAP, GAP_INTERVALS, MAX_INTERVAL, MEDIAN_INTERVALS = 0.5, 1.5, 2.0, 9
# A gap of up to this many seconds between two closed-eye observations counts as closed.
MAX_CLOSED_GAP = 2.0
# The eyes open at an unknown time between two frames; it counts as at most this many seconds after
# the last frame with closed eyes.
MAX_END_DELAY = 0.25
# A blink closes the eye by half and opens it again within 100 to 400 ms (Schiffman, Sensation and
# Perception, 2001). Up to 0.8 s is counted, because landmarks of a tired eye lag. Levels are shares
# of the person's own open eye. Of nine blinks in videos of 24 and 30 frames a second, five are
# below half in a single frame. At these rates noise is not counted: 312 s of swaying faces with
# open eyes and noise (`tiny`, ninety photos) have no blink. At 60 frames a second it may be.
BLINK_CLOSE_LEVEL, BLINK_OPEN_LEVEL = 0.45, 0.6
BLINK_MIN_SECONDS, BLINK_MAX_SECONDS = 0.03, 0.8
# Eyes that seem open for less than this between closed ones count as closed: lids are not so fast.
OPEN_GAP = 0.1
# The same for lids that do not get past half open: opening lids do within LID_SECONDS. Measured on
# a sleeping face with glasses, whose eyes seemed to open by a third for 0.4 s.
HALF_OPEN_GAP = 0.5
# The same for lids that stay nearly closed, below a level of NEARLY_CLOSED. A swaying sleeper reads
# 0.09 to 0.33 for 0.8 s at a time, which would make three microsleeps. Laughing eyes stay there for
# longer.
NEARLY_CLOSED, NEARLY_CLOSED_GAP = 0.25, 1.5
# Lids that stay below a level of HELD_CLOSED for HELD_SECONDS are closed even if the threshold for
# single images, which allows for laughing faces, says otherwise. Two of forty sleepers read 0.06
# and 0.09 while they slept. Of 119 faces with open eyes at most one reads less, with any model.
HELD_CLOSED, HELD_SECONDS = 0.12, 2.0
LID_SECONDS = 0.1  # Longest time that lids take between half open and closed, each way.
# Closed eyes are a microsleep from 0.5 s (Schleicher et al., Ergonomics 51, 2008) and sleep from
# 3 s (Euro NCAP, Safe Driving, driver monitoring, 2023). Like blinks, they last from half closed to
# half open, as far as lids move within LID_SECONDS; drooping lids are not asleep.
MICROSLEEP_SECONDS, SLEEP_SECONDS = 0.5, 3.0
# PERCLOS from which a person is drowsy, and below which awake again (Wierwille et al., DOT HS 808
# 247, 1994, call the range between questionable).
DROWSY_PERCLOS, AWAKE_PERCLOS = 0.15, 0.075
# Limits of the person's own open level; otherwise sleep would become the reference.
MIN_OPEN_LEVEL, MAX_OPEN_LEVEL = 0.5, 1.0
_TOLERANCE = 1e-3  # Time stamps of files are rounded to milliseconds.


@dataclasses.dataclass(frozen=True)
class State:
    """A driver state.

    Attributes:
        colour: in which it is drawn, RGB.
        eyes_closed: whether the eyes are closed; None: unknown, they count as in the state before.
        alarm_after: seconds in this state until the alarm rings; None: never. While the eyes are
            closed it rings at once and repeats.
    """
    colour: tuple[int, int, int]
    eyes_closed: bool | None
    alarm_after: float | None


# A look away from the road for 3 s is worth an alarm.
STATES = {"awake": State((80, 220, 100), eyes_closed=False, alarm_after=None),
          "drowsy": State((255, 210, 0), eyes_closed=False, alarm_after=0.0),
          "microsleep": State((255, 130, 0), eyes_closed=True, alarm_after=0.0),
          "asleep": State((255, 50, 50), eyes_closed=True, alarm_after=0.0),
          "not visible": State((190, 190, 190), eyes_closed=None, alarm_after=3.0)}


@dataclasses.dataclass(frozen=True)
class Event:
    """An event that has ended.

    Attributes:
        kind: blink, microsleep, sleep or not visible.
        start: in seconds.
        end: in seconds.
    """
    kind: str
    start: float
    end: float


class Interval:
    """The time during which a condition holds; short interruptions do not end it.

    Attributes:
        start: when it began, in seconds; None while there is none.
        gap: when the present interruption began, or None.
    """

    def __init__(self):
        self.start = self.gap = self._last = None

    def update(self, holds: bool, time: float, max_gap: float = OPEN_GAP,
               since: float = -math.inf) -> tuple[float, float] | None:
        """Add the next observation.

        Args:
            holds: whether the condition holds.
            time: in seconds.
            max_gap: an interruption ends the interval when it has lasted this long.
            since: the interruption is measured from here where this is later than its start.

        Returns:
            (start, end) of the interval if it has ended, else None.
        """
        if holds:
            self.start, self.gap = time if self.start is None else self.start, None
            self._last = time
        elif self.start is not None:
            self.gap = time if self.gap is None else self.gap
            if time - max(self.gap, since) >= max_gap - _TOLERANCE:
                return self.finish(time)
        return None

    def finish(self, time: float) -> tuple[float, float] | None:
        """End the interval at `time` or at its present interruption; return (start, end) or None.

        None means that there was no interval.
        """
        ended = None if self.start is None else (self.start, self.end(time))
        self.start = self.gap = None
        return ended

    def end(self, time: float) -> float:
        """Return when the interval ended, as far as is known at `time`."""
        return time if self.gap is None else min(self.gap, self._last + MAX_END_DELAY)


class SlidingWindow:
    """Seconds seen, closed (of these) and unseen within the last WINDOW."""

    def __init__(self):
        self._steps = collections.deque()  # (time, microseconds, is seen, is closed)
        self._seen = self._closed = self._unseen = 0  # Integers, because sums of floats drift.

    seen = property(lambda self: self._seen / 1e6)
    closed = property(lambda self: self._closed / 1e6)
    unseen = property(lambda self: self._unseen / 1e6)

    def add(self, time: float, step: float, seen: bool, closed: bool) -> None:
        """Add the `step` seconds that end at `time`, and drop what has left the window."""
        self._steps.append((time, round(min(step, WINDOW) * 1e6), seen, closed))
        self._count(1, self._steps[-1])
        while self._steps[0][0] <= time - WINDOW:
            self._count(-1, self._steps.popleft())

    def _count(self, sign, step):
        _, length, seen, closed = step
        self._seen += sign * length * seen
        self._closed += sign * length * closed
        self._unseen += sign * length * (not seen)


class Drowsiness:
    """Drowsiness of one person; call `update` once a frame.

    Attributes:
        state: a name in STATES.
        perclos: percentage of eye closure (PERCLOS, Wierwille et al., 1994): share 0..1 of the seen
            time in the window with closed eyes; None until MIN_SEEN seconds of it were seen.
        blinks_per_minute: of seen time; None as perclos.
        blinks: since the first frame.
        window: the SlidingWindow; its unseen time counts neither as open nor as closed.
        eyes_closed: whether the state had closed eyes when they were last seen.
    """

    def __init__(self):
        self.state, self.perclos, self.blinks_per_minute, self.blinks = "not visible", None, None, 0
        self.window = SlidingWindow()
        self._closed, self._half_closed, self._held = Interval(), Interval(), Interval()
        self._wide_since = None  # Since when the lids are more than nearly closed.
        self._blink_times = collections.deque()  # Ends of the blinks in the window.
        # Times of the first frame, the last frame, and the last frame with visible eyes.
        self._first_time = self._time = self._seen_time = None
        self.eyes_closed = False
        self._was_seen = self._slept = self._drowsy = self._still_closed = False
        self._drowsy_until = float("-inf")
        self._open_level, self._levels = MAX_OPEN_LEVEL, collections.deque()
        self._next_learning = None
        self._intervals, self._interval = collections.deque(maxlen=MEDIAN_INTERVALS), 0.0

    @property
    def frame_rate_too_low(self) -> bool:
        """Whether frames are more than MAX_INTERVAL apart, which is too far to detect sleep."""
        return self._interval > MAX_INTERVAL

    def update(self, openness: tuple[float | None, float | None], closed: bool | None,
               time: float) -> list[Event]:
        """Add the observation of the next frame.

        Args:
            openness: of the right and left eye, 0..1; None for an eye that cannot be judged.
            closed: whether the eyes are closed; None where neither can be judged.
            time: in seconds, never decreasing.

        Returns:
            The events that have ended.
        """
        judged = [value for value in openness if value is not None]
        seen = closed is not None and bool(judged)
        step = 0.0 if self._time is None else max(time - self._time, 0.0)
        if step:
            self._intervals.append(step)
            self._interval = statistics.median(self._intervals)
        observed = seen and self._was_seen and step <= self._max_gap()
        events = []
        self._first_time = time if self._first_time is None else self._first_time
        gap = time - self._last_seen()
        if gap > self._max_gap():
            in_closure = self._closed.start is not None and self._closed.gap is None
            if not in_closure or gap > MAX_CLOSED_GAP + _TOLERANCE or seen and not closed:
                events += self._end_closures(self._last_seen())
            if seen:
                events.append(Event("not visible", self._last_seen(), time))
                self._still_closed = self.eyes_closed and closed
        if seen:
            level = sum(judged) / len(judged)
            ended, closed = self._update_closures(level, closed, time)
            events += ended
            self._still_closed = self._still_closed and closed
            self._seen_time = time
        self.window.add(time, step, observed or step == 0, bool(observed and closed))
        self._time, self._was_seen = time, seen
        self._count(events, time)
        self._decide(time)
        return events

    def finish(self) -> list[Event]:
        """Return the events that had not ended at the last frame."""
        if self._time is None:
            return []
        away = self._is_away(self._time)
        events = self._end_closures(self._last_seen() if away else self._time)
        if away:
            events.append(Event("not visible", self._last_seen(), self._time))
        self._count(events, self._time)
        return events

    def _is_away(self, time):
        return time - self._last_seen() > self._max_gap()

    def _max_gap(self):
        return min(max(MAX_GAP, GAP_INTERVALS * self._interval), MAX_INTERVAL) + _TOLERANCE

    def _last_seen(self):
        """Return when the eyes were last seen; before that, the time of the first frame."""
        return self._first_time if self._seen_time is None else self._seen_time

    def _update_closures(self, level, closed, time):
        """Return the ended events, and whether the eyes are closed or held nearly closed."""
        self._learn_open_level(level, time)
        half_limit = self._open_level * (
            BLINK_CLOSE_LEVEL if self._half_closed.start is None else BLINK_OPEN_LEVEL)
        half_closed = closed or level < half_limit
        nearly_closed = closed or level < NEARLY_CLOSED * self._open_level
        if nearly_closed:
            self._wide_since = None
        elif self._wide_since is None:
            self._wide_since = time
        # Nearly closed lids do not count towards the gap of half-open ones.
        max_gap, since = (NEARLY_CLOSED_GAP, -math.inf) if nearly_closed else (
            HALF_OPEN_GAP if half_closed else OPEN_GAP, self._wide_since)
        self._held.update(closed or level < HELD_CLOSED * self._open_level, time, max_gap, since)
        start = self._held.start
        if nearly_closed and start is not None and time - start >= HELD_SECONDS - _TOLERANCE:
            closed = True
            self._closed.start = start if self._closed.start is None else min(start,
                                                                              self._closed.start)
        closure = self._with_lid_motion(self._closed.update(closed, time, max_gap, since), time)
        return self._classify(closure, self._half_closed.update(half_closed, time)), closed

    def _end_closures(self, time):
        self._held.finish(time)
        self._wide_since = None
        closure = self._with_lid_motion(self._closed.finish(time), time)
        opened = self._half_closed.gap is not None
        return self._classify(closure, self._half_closed.finish(time), opened)

    def _with_lid_motion(self, closure, time):
        """Extend the (start, end) of closed eyes by the closing and opening; None stays None."""
        return closure and (max(closure[0] - LID_SECONDS, self._half_closed.start),
                            min(closure[1] + LID_SECONDS, self._half_closed.end(time)))

    def _classify(self, closure, half_closure, opened=True):
        """Return the events that ended intervals of closed and half-closed eyes are.

        opened: whether the eyes were seen to open again, as a blink requires.
        """
        events = []
        if closure is not None and _lasts(closure, MICROSLEEP_SECONDS):
            kind = "sleep" if _lasts(closure, SLEEP_SECONDS) else "microsleep"
            events.append(Event(kind, *closure))
            self._slept = True
        if half_closure is not None:
            brief = (_lasts(half_closure, BLINK_MIN_SECONDS)
                     and not _lasts(half_closure, BLINK_MAX_SECONDS))
            if opened and brief and not self._slept:
                events.append(Event("blink", *half_closure))
            self._slept = False
        return events

    def _learn_open_level(self, level, time):
        """Update once a second how open this person's eyes typically are."""
        self._levels.append((time, level))
        if self._next_learning is None:
            self._next_learning = time + 1
        if time >= self._next_learning:
            self._next_learning = time + 1
            while self._levels[0][0] <= time - WINDOW:
                self._levels.popleft()
            typical = numpy.percentile(numpy.fromiter((v for _, v in self._levels), float), 75)
            self._open_level = float(min(max(typical, MIN_OPEN_LEVEL), MAX_OPEN_LEVEL))

    def _count(self, events, time):
        """Update blinks, PERCLOS and the blink rate."""
        for event in events:
            if event.kind == "blink":
                self.blinks += 1
                self._blink_times.append(event.end)
            elif event.kind == "sleep":
                self._drowsy_until = event.end + WINDOW
        while self._blink_times and self._blink_times[0] <= time - WINDOW:
            self._blink_times.popleft()
        seen = self.window.seen
        enough = seen >= MIN_SEEN - _TOLERANCE
        self.perclos = self.window.closed / seen if enough else None
        self.blinks_per_minute = len(self._blink_times) * 60 / seen if enough else None

    def _decide(self, time):
        """Set the state."""
        if self.perclos is not None:
            self._drowsy = self.perclos >= (AWAKE_PERCLOS if self._drowsy else DROWSY_PERCLOS)
        closed_seconds = 0.0
        if self._closed.start is not None:
            start, end = self._with_lid_motion((self._closed.start, self._closed.end(time)), time)
            closed_seconds = end - start + _TOLERANCE
        if self._seen_time is None or self._is_away(time) or self.frame_rate_too_low:
            self.state = "not visible"
        elif closed_seconds >= SLEEP_SECONDS:
            self.state = "asleep"
        elif closed_seconds >= MICROSLEEP_SECONDS or self._still_closed:
            self.state = "microsleep"
        else:
            # After sleep the state is drowsy for a while, even before PERCLOS is known.
            self.state = "drowsy" if self._drowsy or time < self._drowsy_until else "awake"
        eyes_closed = STATES[self.state].eyes_closed
        if eyes_closed is not None:
            self.eyes_closed = eyes_closed


def _lasts(interval, seconds):
    return interval[1] - interval[0] >= seconds - _TOLERANCE
