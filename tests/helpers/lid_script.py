"""A script of a driver's eyelids, with its true events and PERCLOS."""
import dataclasses

import numpy

FINE = 0.001  # Seconds between the samples from which the true PERCLOS is computed.


@dataclasses.dataclass(frozen=True)
class Part:
    """A closure: lids close from `start`, stay at `level` and are open after `seconds`.

    Closing and opening take `ramp` seconds each.
    """
    start: float
    seconds: float
    ramp: float = 0.05
    level: float = 0.0

    def openness(self, time):
        """Return the openness 0..1 at time (n,) in seconds."""
        inside = numpy.minimum(time - self.start, self.start + self.seconds - time) / self.ramp
        return 1 - (1 - self.level) * numpy.clip(inside, 0, 1)

    def half(self):
        """Return when the lids pass half open, closing and opening."""
        return self.start + self.ramp / 2, self.start + self.seconds - self.ramp / 2


BLINKS = [Part(start, (0.15, 0.3)[i % 2]) for i, start in enumerate(
    [2.013, 5.5, 9.021, 13.007, 21.034, 25.0, 29.55, 33.5, 40.01, 53.3, 79.2, 83.017])]
MICROSLEEPS = [Part(31.2, 0.6), Part(36.003, 2.0, 0.1)]
DROOP = Part(42.0, 9.0, 3.5, 0.55)
SLEEP = Part(56.0, 20.0, 0.1)
HAND, SECONDS = (16.0, 19.0), 86.0


def openness(time):
    """Return the openness of both eyes at time (n,)."""
    time = numpy.asarray(time, float)
    parts = [*BLINKS, *MICROSLEEPS, DROOP, SLEEP]
    return numpy.min([part.openness(time) for part in parts], axis=0)


def seen(time):
    """Return whether the eyes are not covered by a hand at time (n,)."""
    return (numpy.asarray(time) < HAND[0]) | (numpy.asarray(time) >= HAND[1])


def events():
    """Return [(kind, start, end)] by end; a closure lasts from half open to half open."""
    found = [("blink", *part.half()) for part in BLINKS]
    found += [("microsleep", *part.half()) for part in MICROSLEEPS]
    found += [("sleep", *SLEEP.half()), ("not visible", *HAND)]
    return sorted(found, key=lambda event: event[2])


_SAMPLES = numpy.arange(0, SECONDS, FINE)
_SEEN = seen(_SAMPLES).cumsum() * FINE
_CLOSED = (seen(_SAMPLES) & (openness(_SAMPLES) <= 0.2)).cumsum() * FINE


def perclos(time):
    """Return PERCLOS: share of the seen time of the last minute with lids closed by 80 %."""
    start, end = numpy.searchsorted(_SAMPLES, [max(time - 60, 0), time]).clip(0, len(_SEEN) - 1)
    return float((_CLOSED[end] - _CLOSED[start]) / (_SEEN[end] - _SEEN[start]))
