"""Frame times of video files.

Containers may give no time stamps, repeat them, or start again at zero in the middle. `FileClock`
turns the stamps of consecutive frames into seconds that always increase.
"""
from __future__ import annotations

import math

RESTART_SECONDS = 1.0  # A stamp that lies back by more than this starts another recording.


class FileClock:
    """Converts time stamps to seconds since the first frame.

    Where a stamp is missing, repeated or lies back, the frame rate gives the time instead. Variable
    rates and gaps of dropped frames are kept.

    Args:
        rate: frames a second.
    """

    def __init__(self, rate: float):
        self.step, self.seconds, self._shift = 1 / rate, None, 0.0

    def __call__(self, stamp: float | None) -> float:
        """Convert the stamp of the next frame, in seconds, to seconds since the first frame."""
        stamp = None if stamp is None or not math.isfinite(stamp) else stamp
        if self.seconds is None:
            # A recording that was cut out of a longer one need not begin at 0.
            self.seconds, self._shift = 0.0, -(stamp or 0.0)
            return self.seconds
        expected = self.seconds + self.step
        if stamp is None:
            self.seconds = expected
        elif stamp + self._shift > self.seconds:
            self.seconds = stamp + self._shift
        else:
            if stamp + self._shift < self.seconds - RESTART_SECONDS:
                self._shift = expected - stamp
            self.seconds = expected
        return self.seconds
