"""When a frame was taken, in seconds from the first: the time stamps of files, made to go on."""
import math

BACK = 1.0  # Seconds by which stamps that go back have started anew, rather than slipped.


class FileClock:
    """Called with the time stamp of each frame in ms, gives its seconds, which always grow.

    rate: frames a second, which stand in where a container gives no stamp, the same one again or
    one that lies back. Variable rates and gaps of dropped frames are kept as they are.
    """

    def __init__(self, rate):
        self.step, self.seconds, self._shift = 1 / rate, None, 0.0

    def __call__(self, stamp_ms):
        stamp = stamp_ms / 1000 if stamp_ms is not None and math.isfinite(stamp_ms) else None
        if self.seconds is None:
            # Most containers begin at 0; a recording cut out of a longer one need not.
            self.seconds, self._shift = 0.0, -(stamp or 0.0)
            return self.seconds
        guess = self.seconds + self.step
        if stamp is None:
            self.seconds = guess
        elif stamp + self._shift > self.seconds:
            self.seconds = stamp + self._shift
        else:
            if stamp + self._shift < self.seconds - BACK:
                self._shift = guess - stamp  # Two recordings, one after the other.
            self.seconds = guess
        return self.seconds
