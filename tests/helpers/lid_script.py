"""A driver's lids by a script, and what is true of them: events, PERCLOS, states."""
import dataclasses

import numpy

FINE = 0.001  # Seconds between the moments at which the truth is counted.


@dataclasses.dataclass(frozen=True)
class Part:
    """Lids that close from `start` on, stay at `level` and are open again after `seconds`; each way
    takes `ramp` seconds.
    """
    start: float
    seconds: float
    ramp: float = 0.05
    level: float = 0.0

    def openness(self, time):
        """Openness 0..1 at time (n,) in seconds."""
        inside = numpy.minimum(time - self.start, self.start + self.seconds - time) / self.ramp
        return 1 - (1 - self.level) * numpy.clip(inside, 0, 1)

    def half(self):
        """When the lids pass half open, down and up again."""
        return self.start + self.ramp / 2, self.start + self.seconds - self.ramp / 2


BLINKS = [Part(start, (0.15, 0.3)[i % 2]) for i, start in enumerate(
    [2.013, 5.5, 9.021, 13.007, 21.034, 25.0, 29.55, 33.5, 40.01, 53.3, 79.2, 83.017])]
MICROSLEEPS = [Part(31.2, 0.6), Part(36.003, 2.0, 0.1)]
DROOP = Part(42.0, 9.0, 3.5, 0.55)
SLEEP = Part(56.0, 20.0, 0.1)
HAND, SECONDS = (16.0, 19.0), 86.0


def openness(time):
    """Openness of both eyes at time (n,)."""
    time = numpy.asarray(time, float)
    parts = [*BLINKS, *MICROSLEEPS, DROOP, SLEEP]
    return numpy.min([part.openness(time) for part in parts], axis=0)


def seen(time):
    """Whether no hand is before the eyes at time (n,)."""
    return (numpy.asarray(time) < HAND[0]) | (numpy.asarray(time) >= HAND[1])


def events():
    """[(kind, start, end)] by their end; lids are shut from half open to half open."""
    told = [("blink", *part.half()) for part in BLINKS]
    told += [("microsleep", *part.half()) for part in MICROSLEEPS]
    told += [("sleep", *SLEEP.half()), ("not visible", *HAND)]
    return sorted(told, key=lambda event: event[2])


_MOMENTS = numpy.arange(0, SECONDS, FINE)
_SEEN = seen(_MOMENTS).cumsum() * FINE
_CLOSED = (seen(_MOMENTS) & (openness(_MOMENTS) <= 0.2)).cumsum() * FINE


def perclos(time):
    """Share of the seen time of the minute before `time` with lids shut by 80 % or more."""
    start, end = numpy.searchsorted(_MOMENTS, [max(time - 60, 0), time]).clip(0, len(_SEEN) - 1)
    return float((_CLOSED[end] - _CLOSED[start]) / (_SEEN[end] - _SEEN[start]))
