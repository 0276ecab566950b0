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

from utils.drowsiness.intervals import _TOLERANCE, OPEN_GAP, WINDOW, Event, Interval, SlidingWindow

# PERCLOS is None until this many seconds of the window were observed. The state drowsy then takes
# at least 4.5 s of closed eyes, more than blinks and one microsleep.
MIN_SEEN = 30.0
# A gap of more than MAX_GAP seconds without an observation of the eyes is unseen time: neither open
# nor closed. At low frame rates the limit is GAP_INTERVALS times the frame interval (median of the
# last MEDIAN_INTERVALS), at most MAX_INTERVAL. With longer frame intervals no state is reported.
MAX_GAP, GAP_INTERVALS, MAX_INTERVAL, MEDIAN_INTERVALS = 0.5, 1.5, 2.0, 9
# A gap of up to MAX_CLOSED_GAP seconds between two closed-eye observations counts as closed where
# the eyes were closed for MICROSLEEP_SECONDS before it. A shorter closure ends with the last frame
# that shows it, also before UNSEEN_GAP seconds of frames without visible eyes.
MAX_CLOSED_GAP, UNSEEN_GAP = 2.0, 0.1
# A blink closes the eye by half and opens it again within 100 to 400 ms (Schiffman, Sensation and
# Perception, 2001). Up to 0.8 s is counted, because landmarks of a tired eye lag. Levels are shares
# of the person's own open eye. Of nine blinks in videos of 24 and 30 frames a second, five are
# below half in a single frame. At these rates noise is not counted: 312 s of swaying faces with
# open eyes and noise (`tiny`, ninety photos) have no blink. At 60 frames a second it may be.
BLINK_CLOSE_LEVEL, BLINK_OPEN_LEVEL = 0.45, 0.6
BLINK_MIN_SECONDS, BLINK_MAX_SECONDS = 0.03, 0.8
# Open eyes end a closure after OPEN_GAP, from a frame interval of SLOW_INTERVAL in two frames, and
# after HALF_OPEN_GAP where the lids do not get past half open: opening lids do within LID_SECONDS.
# Measured on a sleeping face with glasses, whose eyes seemed to open by a third for 0.4 s.
SLOW_INTERVAL, HALF_OPEN_GAP = 0.08, 0.5
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
# One eye below WINK_CLOSED of the person's own open eye and the other above BLINK_OPEN_LEVEL are a
# wink, if they stay so for WINK_MIN_SECONDS: the eyes of a blink may be a frame or two apart.
WINK_CLOSED, WINK_MIN_SECONDS, WINK_MAX_SECONDS = 0.3, 0.1, 3.0
# Eyes that look down are a state after DOWN_SECONDS, and may be read otherwise for DOWN_GAP.
DOWN_SECONDS, DOWN_GAP = 0.3, 0.3
# A mouth open by YAWN_RATIO of its width (Abtahi et al., YawDD, 2014, on such ratios) for
# YAWN_SECONDS is a yawn; it may seem less open for YAWN_GAP.
YAWN_RATIO, YAWN_SECONDS, YAWN_GAP = 0.6, 1.5, 0.2
# PERCLOS from which a person is drowsy, and below which awake again (Wierwille et al., DOT HS 808
# 247, 1994, call the range between questionable).
DROWSY_PERCLOS, AWAKE_PERCLOS = 0.15, 0.075
# Limits of the person's own open level; otherwise sleep would become the reference.
MIN_OPEN_LEVEL, MAX_OPEN_LEVEL = 0.5, 1.0


@dataclasses.dataclass(frozen=True)
class State:
    """A driver state.

    Attributes:
        colour: in which it is drawn, RGB.
        eyes_closed: whether the eyes are closed; None: unknown, they count as in the state before.
        alarm_after: seconds in this state until the alarm rings; None: never. While the eyes are
            closed it repeats.
    """
    colour: tuple[int, int, int]
    eyes_closed: bool | None
    alarm_after: float | None


EVENTS = ("blink", "microsleep", "sleep", "wink", "yawn", "looks down", "not visible")
# A look away from the road for 3 s is worth an alarm (Euro NCAP, as above: a long distraction).
STATES = {"awake": State((80, 220, 100), eyes_closed=False, alarm_after=None),
          "drowsy": State((255, 210, 0), eyes_closed=False, alarm_after=0.0),
          "microsleep": State((255, 130, 0), eyes_closed=True, alarm_after=0.0),
          "asleep": State((255, 50, 50), eyes_closed=True, alarm_after=0.0),
          "looks down": State((110, 170, 255), eyes_closed=False, alarm_after=3.0),
          "not visible": State((190, 190, 190), eyes_closed=None, alarm_after=3.0)}


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
        asleep: whether the state was `asleep` then.
    """

    def __init__(self):
        self.state, self.perclos, self.blinks_per_minute, self.blinks = "not visible", None, None, 0
        self.window = SlidingWindow()
        self._closed, self._half_closed, self._held = Interval(), Interval(), Interval()
        self._wink, self._down, self._yawn = Interval(), Interval(), Interval()
        self._last_end = -math.inf  # Of the events of the eyes.
        self._wide_since = None  # Since when the lids are more than nearly closed.
        self._blink_times = collections.deque()  # Ends of the blinks in the window.
        # Times of the first frame, the last frame, and the last frame with visible eyes.
        self._first_time = self._time = self._seen_time = None
        self._hidden_since = None  # The first frame without visible eyes after the last with them.
        self.eyes_closed = self.asleep = False
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
               time: float, looks_down: bool | None = None, mouth: float | None = None,
               ) -> list[Event]:
        """Add the observation of the next frame.

        Args:
            openness: of the right and left eye, 0..1; None for an eye that cannot be judged.
            closed: whether the eyes are closed; None where neither can be judged.
            time: in seconds, never decreasing.
            looks_down: whether the eyes look down; None where not known.
            mouth: height to width of the opening of the mouth; None where not known.

        Returns:
            The events that have ended. Only those of the mouth overlap others.
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
        events += self._end_before_gap(seen, closed, time)
        if seen:
            level, wink = self._lid_level(judged, closed)
            ended, closed = self._update_closures(level, closed and not wink, time,
                                                  learn=not (wink or looks_down))
            events += ended
            self._still_closed = self._still_closed and closed
            self._seen_time, self._hidden_since = time, None
            events += self._update_glances(wink, bool(looks_down) and not closed, time)
        elif self._hidden_since is None:
            self._hidden_since = time
        events = self._without_overlap(events) + self._update_mouth(mouth, time)
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
        end, last_end = self._last_seen() if away else self._time, self._last_end
        events = self._end_closures(end, hidden=away) + self._end_glances(end)
        if away:
            events.append(Event("not visible", self._last_seen(), self._time))
        events = self._without_overlap(events) + self._yawns(self._yawn.finish(self._time))
        self._last_end = last_end
        self._count(events, self._time)
        return events

    def _is_away(self, time):
        return time - self._last_seen() > self._max_gap()

    def _max_gap(self):
        return min(max(MAX_GAP, GAP_INTERVALS * self._interval), MAX_INTERVAL) + _TOLERANCE

    def _last_seen(self):
        """Return when the eyes were last seen; before that, the time of the first frame."""
        return self._first_time if self._seen_time is None else self._seen_time

    def _end_before_gap(self, seen, closed, time):
        """Return the events that ended when the eyes were last seen, where they were not since."""
        events, gap = [], time - self._last_seen()
        away = gap > self._max_gap()
        hidden = (self._hidden_since is not None and seen
                  and time - self._hidden_since >= UNSEEN_GAP - _TOLERANCE)
        in_closure = self._closed.start is not None and self._closed.gap is None
        bridged = (in_closure and self.eyes_closed and gap <= MAX_CLOSED_GAP + _TOLERANCE
                   and (closed or not seen))
        if (away or hidden and in_closure and not self.eyes_closed) and not bridged:
            events += self._end_closures(self._last_seen(), hidden=True)
            events += self._end_glances(self._last_seen())
        if away and seen:
            events += [] if bridged else [Event("not visible", self._last_seen(), time)]
            self._still_closed = self.eyes_closed and closed
        return events

    def _lid_level(self, judged, closed):
        """Return the level of the lids, and whether one eye alone is closed.

        A wink begins with open eyes: within a closure, one eye that is read as open does not count.
        """
        low, high = min(judged), max(judged)
        wink = (len(judged) == 2 and low < WINK_CLOSED * self._open_level
                and high >= BLINK_OPEN_LEVEL * self._open_level
                and (self._closed.start is None or not closed and self._wink.start is not None))
        return (high if wink else sum(judged) / len(judged)), wink

    def _update_glances(self, wink, down, time):
        """Add an observation of winks and of eyes that look down; return the events that ended."""
        winks = self._winks(self._wink.update(wink, time, self._open_gap()))
        return winks + self._glances(self._down.update(down, time, DOWN_GAP))

    def _end_glances(self, time):
        return self._winks(self._wink.finish(time)) + self._glances(self._down.finish(time))

    @staticmethod
    def _winks(interval):
        brief = (interval is not None and _lasts(interval, WINK_MIN_SECONDS)
                 and not _lasts(interval, WINK_MAX_SECONDS))
        return [Event("wink", *interval)] if brief else []

    @staticmethod
    def _glances(interval):
        long = interval is not None and _lasts(interval, DOWN_SECONDS)
        return [Event("looks down", *interval)] if long else []

    def _update_mouth(self, ratio, time):
        """Add an observation of the mouth; return the yawn that ended, in a list."""
        if ratio is None and self._hidden_since is not None and self._is_away(time):
            return self._yawns(self._yawn.finish(self._last_seen()))
        return [] if ratio is None else self._yawns(
            self._yawn.update(ratio >= YAWN_RATIO, time, max(YAWN_GAP, self._open_gap())))

    @staticmethod
    def _yawns(interval):
        long = interval is not None and _lasts(interval, YAWN_SECONDS)
        return [Event("yawn", *interval)] if long else []

    def _without_overlap(self, events):
        """Return events of the eyes so that none overlaps another or one returned before.

        A closure divides a time of looking down.
        """
        found = []
        for event in sorted(events, key=lambda event: event.end):
            down = self._down.start
            if event.kind in ("blink", "microsleep", "sleep") and down is not None \
                    and down < event.end:
                found += self._glances((max(down, self._last_end), event.start))
                self._down.start = event.end
            start = max(event.start, self._last_end)
            if event.end > start:
                found.append(dataclasses.replace(event, start=start))
                self._last_end = event.end
        return found

    def _open_gap(self):
        """Return how long open eyes end a closure: OPEN_GAP, or two frames of a slow camera."""
        slow = self._interval >= SLOW_INTERVAL
        return min(OPEN_GAP, self._interval / 2) if slow else OPEN_GAP

    def _update_closures(self, level, closed, time, learn=True):
        """Return the ended events, and whether the eyes are closed or held nearly closed."""
        if learn:
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
            HALF_OPEN_GAP if half_closed else self._open_gap(), self._wide_since)
        self._held.update(closed or level < HELD_CLOSED * self._open_level, time, max_gap, since)
        start = self._held.start
        if nearly_closed and start is not None and time - start >= HELD_SECONDS - _TOLERANCE:
            closed = True
            self._closed.start = start if self._closed.start is None else min(start,
                                                                              self._closed.start)
        closure = self._with_lid_motion(self._closed.update(closed, time, max_gap, since), time)
        half_closure = self._half_closed.update(half_closed, time, self._open_gap())
        if half_closure is not None and self._closed.start is not None:
            # Lids that are open end the closure too, or it would be told as two events.
            ended = self._closed.finish(time)
            closure = (max(ended[0] - LID_SECONDS, half_closure[0]),
                       min(ended[1] + LID_SECONDS, half_closure[1]))
        return self._classify(closure, half_closure), closed

    def _end_closures(self, time, hidden=False):
        """Return the events that end at `time`.

        hidden: whether the eyes went out of sight then: eyes that were closed make a blink.
        """
        self._held.finish(time)
        self._wide_since = None
        opened = self._half_closed.gap is not None or hidden and self._closed.start is not None
        closure = self._with_lid_motion(self._closed.finish(time), time)
        return self._classify(closure, self._half_closed.finish(time), opened)

    def _with_lid_motion(self, closure, time):
        """Extend the (start, end) of closed eyes by the closing and opening; None stays None."""
        return closure and (max(closure[0] - LID_SECONDS, self._half_closed.start),
                            min(closure[1] + LID_SECONDS, self._half_closed.end(time)))

    def _classify(self, closure, half_closure, opened=True):
        """Return the events that ended intervals of closed and half-closed eyes are.

        opened: whether the eyes were seen to open again, or closed before they went out of
                sight, as a blink requires.
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
            # Unseen time counts once the eyes were called closed.
            time_closed = time if self._was_seen or self.eyes_closed else self._last_seen()
            start, end = self._with_lid_motion(
                (self._closed.start, self._closed.end(time_closed)), time_closed)
            closed_seconds = end - start + _TOLERANCE
        if self._seen_time is None or self._is_away(time) or self.frame_rate_too_low:
            self.state = "not visible"
        elif closed_seconds >= SLEEP_SECONDS:
            self.state = "asleep"
        elif closed_seconds >= MICROSLEEP_SECONDS or self._still_closed:
            self.state = "microsleep"
        elif self._down.start is not None and _lasts((self._down.start, self._last_seen()),
                                                     DOWN_SECONDS):
            self.state = "looks down"
        else:
            # After sleep the state is drowsy for a while, even before PERCLOS is known.
            self.state = "drowsy" if self._drowsy or time < self._drowsy_until else "awake"
        eyes_closed = STATES[self.state].eyes_closed
        if eyes_closed is not None:
            self.eyes_closed, self.asleep = eyes_closed, self.state == "asleep"


def _lasts(interval, seconds):
    return interval[1] - interval[0] >= seconds - _TOLERANCE
