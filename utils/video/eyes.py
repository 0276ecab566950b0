"""Drowsiness read-out from landmarks: eye aspect ratio, blinks a minute, PERCLOS."""
import collections

import numpy

from utils.errors import UserError

WINDOW = 60.0  # Seconds over which blinks and PERCLOS are counted.
# Eye aspect ratio of open and shut eyes: median 0.327 and second percentile 0.057 of the 4024
# annotated eyes in 2012 training photos of 300W.
OPEN, SHUT = 0.32, 0.06
# PERCLOS P80: the share of time with eyes at least 80 % shut (Wierwille et al. 1994; Dinges and
# Grace, FHWA-MCRT-98-006, 1998).
CLOSED = 0.2
# A blink shuts the eye past half and opens it again, within 100 to 400 ms (Schiffman 2001); up to
# 0.8 s is counted, as landmarks of a tired eye come late. What is longer is sleep, not a blink.
BLINK_BELOW, BLINK_ABOVE, BLINK_LONGEST = 0.45, 0.6, 0.8


def aspect_ratios(points, scheme):
    """Eye aspect ratios (right, left) of landmarks (K, 2), in any unit.

    Mean distance of opposite lid points over the distance of the corners (Soukupova and Cech,
    2016). Raises UserError where the scheme has no eye contours.
    """
    if scheme.eyes is None:
        raise UserError(f"the eyes need contours, which scheme {scheme.name} has not; use weights "
                        f"of 68, 98, 106 or 12 (eyes) points")
    ratios = []
    for contour in scheme.eyes:
        eye = numpy.asarray(points, numpy.float64)[contour]
        half = len(eye) // 2
        upper, lower = eye[1:half], eye[:half:-1]
        width = max(numpy.linalg.norm(eye[half] - eye[0]), 1e-9)
        ratios.append(float(numpy.linalg.norm(upper - lower, axis=1).mean() / width))
    return tuple(ratios)


class Drowsiness:
    """One person's eyes over time: `update(ratios, time)` frame by frame, then read the fields.

    ratios (right, left) as of the last frame; blinks: how many since the start; blinks_per_minute
    and perclos (0..1) over the last minute, or over the time so far.
    """

    def __init__(self):
        self.ratios, self.blinks, self.open_ratio = (0.0, 0.0), 0, OPEN
        self.perclos = self.blinks_per_minute = 0.0
        self._frames = collections.deque()  # (time, seconds since the last frame, ratio, is closed)
        self._blink_times = collections.deque()
        self._seen = self._closed = 0.0  # Seconds, summed over _frames.
        self._shut_since = None
        self._next_look = None  # When this person's open eyes are measured again, each second.

    def update(self, ratios, time):
        """Take in the eye aspect ratios (right, left) at `time` in seconds."""
        self.ratios = tuple(ratios)
        # Yaw narrows one eye more than the other; the mean of both is steadier than either.
        ratio = sum(ratios) / 2
        if self._next_look is None:
            self._next_look = time + 1
        step = time - self._frames[-1][0] if self._frames else 0.0
        # A face that was away was neither awake nor asleep: time unseen does not count.
        step = step if step <= 1 else 0.0
        if time >= self._next_look:
            self._next_look = time + 1
            typical = float(numpy.percentile([frame[2] for frame in self._frames], 75))
            # Between a narrow and a wide eye (5 and 95 % of 300W), or sleep would become the norm.
            self.open_ratio = min(max(typical, 0.16), 0.465)
        # 0: shut, 1: as open as this person's eyes mostly are.
        opened = min(max((ratio - SHUT) / (self.open_ratio - SHUT), 0.0), 1.0)
        self._add(1, step, opened <= CLOSED)
        self._frames.append((time, step, ratio, opened <= CLOSED))
        while self._frames[0][0] < time - WINDOW:
            _, old, _, closed = self._frames.popleft()
            self._add(-1, old, closed)
        while self._blink_times and self._blink_times[0] < time - WINDOW:
            self._blink_times.popleft()
        self._watch_blink(opened, time)
        self.perclos = min(max(self._closed / self._seen, 0.0), 1.0) if self._seen > 0 else 0.0
        # The first seconds say little about a minute.
        self.blinks_per_minute = len(self._blink_times) * 60 / max(self._seen, 10.0)
        return self

    def _add(self, sign, step, closed):
        self._seen += sign * step
        self._closed += sign * step * closed

    def _watch_blink(self, opened, time):
        if self._shut_since is None and opened < BLINK_BELOW:
            self._shut_since = time
        elif self._shut_since is not None and opened > BLINK_ABOVE:
            if time - self._shut_since <= BLINK_LONGEST:
                self.blinks += 1
                self._blink_times.append(time)
            self._shut_since = None
