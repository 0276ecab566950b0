"""One person's eyes over time: blinks, microsleeps, sleep, PERCLOS, and a state to act on."""
import collections
import dataclasses
import math
import statistics

import numpy

WINDOW = 60.0  # Seconds over which blinks and PERCLOS are counted.
# Half of the window must have been seen before its PERCLOS is a number: to reach DROWSY then takes
# at least 4.5 s of shut eyes, which blinks and one microsleep are not.
MIN_SEEN = 30.0
# Eyes not seen, or no frame, for longer is time unseen: neither awake nor asleep. With a camera of
# few frames a second it is OF_STEP times the time between two, up to RARE: who looks less often
# than that sees nobody sleep.
UNSEEN, OF_STEP, RARE, STEPS = 0.5, 1.5, 2.0, 9
# Lids that were shut before they went out of sight, and are when they come back within so many
# seconds, were shut all the time.
OUT_OF_SIGHT = 2.0
# Of lids that open between two frames nobody knows when: so long after the first at the latest.
BETWEEN = 0.25
# A blink shuts the eye past half and opens it again, within 100 to 400 ms (Schiffman 2001); up to
# 0.8 s is counted, as landmarks of a tired eye come late. Of nine blinks in films of 24 and 30
# frames a second five are past half in a single frame; noise is not: of 312 s of swaying faces with
# open eyes and noise (tiny, ninety photos) none is taken for a blink. At 60 it may be.
BLINK_BELOW, BLINK_ABOVE, BLINK_SHORTEST, BLINK_LONGEST = 0.45, 0.6, 0.03, 0.8
BRIDGE = 0.1  # Eyes that seem open for less, amid shut ones, were not: no lid is that fast.
# Nor for so long where lids that were shut never got past half: one that opens is there within LID.
# Read off a sleeping face with glasses, whose eyes seemed to open by a third for 0.4 s.
QUIVER = 0.5
# Nor for longer where they stay nearly shut: a sleeper who swayed before the camera read 0.09 to
# 0.33 for 0.8 s at a time, and three microsleeps. Eyes of one who laughs are so for longer.
NEARLY, DOZE = 0.25, 1.5
# Lids that stay all but shut for so long are shut, whatever the limit of a single picture, which
# spares faces that laugh: two of forty sleepers read 0.06 and 0.09 as long as they slept. Of 119
# faces with open eyes at most one reads less, whichever the model.
ALL_BUT, HELD = 0.12, 2.0
LID = 0.1  # Seconds that lids take at most between half open and shut, each way.
# Shut for 0.5 s or longer is a microsleep (Schleicher et al., Ergonomics 51, 2008); from 3 s on it
# is sleep, as in Euro NCAP's assessment of driver monitoring (Safe Driving, 2023). As blinks, they
# last from half shut to half open, if the lids move so fast; lids that droop are not asleep.
MICROSLEEP, SLEEP = 0.5, 3.0
# PERCLOS from which a person is drowsy, and below which awake again; between is doubtful
# (Wierwille et al., DOT HS 808 247, 1994).
DROWSY, AWAKE = 0.15, 0.075
# A person's own open eyes, between narrow and wide ones, or sleep would become the norm.
NARROWEST, WIDEST = 0.5, 1.0
SHUT = ("microsleep", "asleep")  # The states of shut eyes.
STATES = ("awake", "drowsy", *SHUT, "not visible")
_TOLERANCE = 1e-3  # Time stamps of files are rounded to milliseconds.


@dataclasses.dataclass(frozen=True)
class Event:
    """kind: blink, microsleep, sleep or not visible; start and end in seconds."""
    kind: str
    start: float
    end: float


class Stretch:
    """The time for which something holds, from `start`; a lapse of less than `bridge` is no end,
    and counts from `since` where that is later.
    """

    def __init__(self):
        self.start = self.lapse = self._last = None

    def update(self, holds, time, bridge=BRIDGE, since=-math.inf):
        """The (start, end) that is over by now, or None."""
        if holds:
            self.start, self.lapse = time if self.start is None else self.start, None
            self._last = time
        elif self.start is not None:
            self.lapse = time if self.lapse is None else self.lapse
            if time - max(self.lapse, since) >= bridge - _TOLERANCE:
                return self.finish(time)
        return None

    def finish(self, time):
        """End it, at `time` or where it lapsed before: (start, end), or None."""
        whole = None if self.start is None else (self.start, self.end(time))
        self.start = self.lapse = None
        return whole

    def end(self, time):
        """When it ended, as far as is known at `time`."""
        return time if self.lapse is None else min(self.lapse, self._last + BETWEEN)


class Minute:
    """Seconds `seen`, `closed` (of these) and `unseen` within the last WINDOW."""

    def __init__(self):
        self._steps = collections.deque()  # (time, microseconds, is seen, is closed)
        self._seen = self._closed = self._unseen = 0  # Whole numbers, as sums of floats drift.

    seen = property(lambda self: self._seen / 1e6)
    closed = property(lambda self: self._closed / 1e6)
    unseen = property(lambda self: self._unseen / 1e6)

    def add(self, time, step, seen, closed):
        """Take in the `step` seconds that end at `time`."""
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
    """`update(openness, closed, time)` frame by frame gives the Events that are over; then read
    `state` (one of STATES), `perclos` and `blinks_per_minute` (None until MIN_SEEN of the last
    minute were seen), `blinks` since the start, and `minute`, whose `unseen` counts neither way.
    Eyes that were shut when they went out of sight and come back shut are so at once.
    """

    def __init__(self):
        self.state, self.perclos, self.blinks_per_minute, self.blinks = "not visible", None, None, 0
        self.minute = Minute()
        self._shut, self._half, self._held = Stretch(), Stretch(), Stretch()
        self._wide = None  # Since when lids are not even nearly shut.
        self._blinks = collections.deque()  # When each of the last minute ended.
        # Of the first frame, the last one, and the last that showed the eyes.
        self._begun = self._time = self._seen = None
        self.shut = False  # Whether the eyes were shut, as asleep, when they were last seen.
        self._was_seen = self._slept = self._drowsy = self._still = False
        self._sleepy_until = float("-inf")
        self._open, self._levels, self._next_look = WIDEST, collections.deque(), None
        self._steps, self._step = collections.deque(maxlen=STEPS), 0.0  # The last ones; usually.

    @property
    def rare(self):
        """Whether frames come too rarely to see anybody sleep."""
        return self._step > RARE

    def update(self, openness, closed, time):
        """Openness (right, left): 0 to 1, None for an eye that cannot be judged. closed: whether
        the eyes are shut, None where that cannot be judged. time in seconds, never backwards.
        """
        judged = [value for value in openness if value is not None]
        seen = closed is not None and bool(judged)
        step = 0.0 if self._time is None else max(time - self._time, 0.0)
        if step:
            self._steps.append(step)
            self._step = statistics.median(self._steps)
        known = seen and self._was_seen and step <= self._unseen()
        events = []
        self._begun = time if self._begun is None else self._begun
        away = time - self._last_seen()
        if away > self._unseen():
            held = self._shut.start is not None and self._shut.lapse is None
            if not held or away > OUT_OF_SIGHT + _TOLERANCE or seen and not closed:
                events += self._end_lids(self._last_seen())
            if seen:
                events.append(Event("not visible", self._last_seen(), time))
                self._still = self.shut and closed
        if seen:
            level = sum(judged) / len(judged)
            over, closed = self._watch_lids(level, closed, time)
            events += over
            self._still = self._still and closed
            self._seen = time
        self.minute.add(time, step, known or step == 0, bool(known and closed))
        self._time, self._was_seen = time, seen
        self._count(events, time)
        self._decide(time)
        return events

    def finish(self):
        """The Events that were still going on at the last frame."""
        if self._time is None:
            return []
        away = self._is_away(self._time)
        events = self._end_lids(self._last_seen() if away else self._time)
        if away:
            events.append(Event("not visible", self._last_seen(), self._time))
        self._count(events, self._time)
        return events

    def _is_away(self, time):
        return time - self._last_seen() > self._unseen()

    def _unseen(self):
        """Seconds after which time without eyes is unseen."""
        return min(max(UNSEEN, OF_STEP * self._step), RARE) + _TOLERANCE

    def _last_seen(self):
        """When the eyes were last seen, and before that the first frame."""
        return self._begun if self._seen is None else self._seen

    def _watch_lids(self, level, closed, time):
        """The Events that are over, and whether the lids are shut: those held so long are."""
        self._learn(level, time)
        limit = self._open * (BLINK_BELOW if self._half.start is None else BLINK_ABOVE)
        half, nearly = closed or level < limit, closed or level < NEARLY * self._open
        self._wide = None if nearly else time if self._wide is None else self._wide
        # What is nearly shut meanwhile is no part of a quiver.
        bridge, since = (DOZE, -math.inf) if nearly else (QUIVER if half else BRIDGE, self._wide)
        self._held.update(closed or level < ALL_BUT * self._open, time, bridge, since)
        start = self._held.start
        if nearly and start is not None and time - start >= HELD - _TOLERANCE:
            closed = True
            self._shut.start = start if self._shut.start is None else min(start, self._shut.start)
        shut = self._with_lids(self._shut.update(closed, time, bridge, since), time)
        return self._name(shut, self._half.update(half, time)), closed

    def _end_lids(self, time):
        self._held.finish(time)
        self._wide = None
        shut = self._with_lids(self._shut.finish(time), time)
        opened = self._half.lapse is not None
        return self._name(shut, self._half.finish(time), opened)

    def _with_lids(self, shut, time):
        """A stretch (start, end) of shut eyes with the ways of the lids; None stays None."""
        return shut and (max(shut[0] - LID, self._half.start),
                         min(shut[1] + LID, self._half.end(time)))

    def _name(self, shut, half, opened=True):
        """The Events that stretches (start, end) of shut and half shut eyes are; None: no such.
        opened: whether the eyes were seen to open again, as after a blink.
        """
        events = []
        if shut is not None and _lasts(shut, MICROSLEEP):
            events.append(Event("sleep" if _lasts(shut, SLEEP) else "microsleep", *shut))
            self._slept = True
        if half is not None:
            brief = _lasts(half, BLINK_SHORTEST) and not _lasts(half, BLINK_LONGEST)
            if opened and brief and not self._slept:
                events.append(Event("blink", *half))
            self._slept = False
        return events

    def _learn(self, level, time):
        """How open this person's eyes mostly are, looked up each second."""
        self._levels.append((time, level))
        if self._next_look is None:
            self._next_look = time + 1
        if time >= self._next_look:
            self._next_look = time + 1
            while self._levels[0][0] <= time - WINDOW:
                self._levels.popleft()
            typical = numpy.percentile(numpy.fromiter((v for _, v in self._levels), float), 75)
            self._open = float(min(max(typical, NARROWEST), WIDEST))

    def _count(self, events, time):
        for event in events:
            if event.kind == "blink":
                self.blinks += 1
                self._blinks.append(event.end)
            elif event.kind == "sleep":
                self._sleepy_until = event.end + WINDOW
        while self._blinks and self._blinks[0] <= time - WINDOW:
            self._blinks.popleft()
        seen = self.minute.seen
        enough = seen >= MIN_SEEN - _TOLERANCE
        self.perclos = self.minute.closed / seen if enough else None
        self.blinks_per_minute = len(self._blinks) * 60 / seen if enough else None

    def _decide(self, time):
        if self.perclos is not None:
            self._drowsy = self.perclos >= (AWAKE if self._drowsy else DROWSY)
        shut = 0.0
        if self._shut.start is not None:
            start, end = self._with_lids((self._shut.start, self._shut.end(time)), time)
            shut = end - start + _TOLERANCE
        if self._seen is None or self._is_away(time) or self.rare:
            self.state = "not visible"
        elif shut >= SLEEP:
            self.state = "asleep"
        elif shut >= MICROSLEEP or self._still:
            self.state = "microsleep"
        else:
            # Who has just slept is not awake yet, though a minute may not have been seen.
            self.state = "drowsy" if self._drowsy or time < self._sleepy_until else "awake"
        if self.state != "not visible":
            self.shut = self.state in SHUT


def _lasts(stretch, seconds):
    return stretch[1] - stretch[0] >= seconds - _TOLERANCE
