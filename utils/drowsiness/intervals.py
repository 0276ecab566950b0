"""Events, and the time during which a condition holds."""
from __future__ import annotations

import collections
import dataclasses
import math

WINDOW = 60.0  # Seconds over which PERCLOS and the blink rate are computed.
# The eyes open at an unknown time between two frames; it counts as at most this many seconds after
# the last frame with closed eyes.
MAX_END_DELAY = 0.25
# Eyes that seem open for less than this between closed ones count as closed: lids are not so fast.
OPEN_GAP = 0.1
_TOLERANCE = 1e-3  # Time stamps of files are rounded to milliseconds.


@dataclasses.dataclass(frozen=True)
class Event:
    """An event that has ended.

    Attributes:
        kind: a name in states.EVENTS.
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
