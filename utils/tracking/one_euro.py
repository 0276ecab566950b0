"""Temporal smoothing of a face's landmarks with the One Euro filter.

`OneEuroFilter` is the published filter over an array of points. `FaceFilter` applies it to the
landmarks of one tracked face: to the face's centre and to the points relative to it, separately.

Source: Casiez, Roussel and Vogel, "1 Euro Filter: A Simple Speed-based Low-pass Filter for Noisy
Input in Interactive Systems", CHI 2012.
"""
from __future__ import annotations

import math
from collections.abc import Sequence

import numpy

D_CUTOFF = 2.0  # Hz.
# For lid points, beta is multiplied by LID_BETA_FACTOR and d_cutoff is LID_D_CUTOFF. A drawn blink
# of a still face (30 Hz) has eye aspect ratios 0.31 0.16 0 0 0 0.13 0.25 0.32. With the settings of
# the other points they become 0.32 0.27 0.16 0.09 0.06 0.08 0.12 0.19, with these 0.32 0.21 0.06
# 0.02 0.01 0.07 0.20 0.28; jitter of the lids at rest grows by a third.
LID_BETA_FACTOR, LID_D_CUTOFF = 4.0, 6.0
# Factor on min_cutoff for the face's centre. Chosen at 30 Hz with min_cutoff 1.2 Hz and beta 5. On
# five LFPW photos with noise, re-encoded, and a model of 6 epochs, jitter falls by at least 70 % at
# rest and by 69, 67 and 59 % (mean) at 1, 2 and 5 pixels a frame, with a lag of at most 0.85, 0.75
# and 0.57 frames. On a mean face with 0.4 % noise per point and 0.15 % in common it falls by 77 and
# 66 %.
CENTRE_CUTOFF_FACTOR = 4


class OneEuroFilter:
    """The One Euro filter over points (K, 2).

    The speed is measured in face sides a second, so that results do not depend on the size of the
    face in pixels, and is that of the point, not of each coordinate.

    Args:
        min_cutoff: minimum cutoff frequency in Hz; lower means less jitter at rest.
        beta: increase of the cutoff frequency with speed, in Hz per face side a second; higher
            means less lag.
        d_cutoff: cutoff frequency of the derivative's low-pass filter in Hz.

    Each is a number, or (K, 1) with one value per point.
    """

    def __init__(self, min_cutoff: float | numpy.ndarray, beta: float | numpy.ndarray,
                 d_cutoff: float | numpy.ndarray = D_CUTOFF):
        self.min_cutoff, self.beta, self.d_cutoff = min_cutoff, beta, d_cutoff
        self.filtered = self.derivative = None

    def __call__(self, points: numpy.ndarray, side: float, period: float | None) -> numpy.ndarray:
        """Filter the next sample.

        Args:
            points: (K, 2) in pixels.
            side: side of the face in pixels.
            period: seconds since the previous sample; not used for the first one.

        Returns:
            Filtered points (K, 2) in pixels.
        """
        if self.filtered is None:
            self.filtered, self.derivative = points, numpy.zeros_like(points)
            return points
        change = points - self.filtered
        self.derivative = self.derivative + _alpha(self.d_cutoff, period) * (
            change / period - self.derivative)
        speed = numpy.hypot(self.derivative[:, :1], self.derivative[:, 1:])
        cutoff = self.min_cutoff + speed * (self.beta / side)
        self.filtered = self.filtered + _alpha(cutoff, period) * change
        return self.filtered


def _alpha(cutoff, period):
    """Return the smoothing factor of a low-pass filter with this cutoff frequency in Hz."""
    return 1 / (1 + 1 / (2 * math.pi * cutoff * period))


class FaceFilter:
    """Smooths the landmarks (K, 2) of one face.

    The mean of K points has little noise, so the filter of the centre may have a higher cutoff and
    follow motion at once, while the points relative to it stay still.

    Args:
        min_cutoff: see OneEuroFilter.
        beta: see OneEuroFilter.
        lids: indices of the lid points, which move fast in a blink and are smoothed less.
    """

    def __init__(self, min_cutoff: float, beta: float, lids: Sequence[int] = ()):
        self.min_cutoff, self.beta, self.lids, self.one_euro = min_cutoff, beta, list(lids), None

    def __call__(self, points_px: numpy.ndarray, side: float,
                 period: float | None) -> numpy.ndarray:
        """Filter the next sample; see OneEuroFilter.__call__."""
        # The centre is one more row: NumPy takes as long for one point as for seventy.
        rows = numpy.empty((len(points_px) + 1, 2))
        rows[0] = points_px.sum(0) / len(points_px)
        numpy.subtract(points_px, rows[0], out=rows[1:])
        if self.one_euro is None:
            min_cutoff, beta, d_cutoff = (numpy.full((len(rows), 1), float(value)) for value in
                                          (self.min_cutoff, self.beta, D_CUTOFF))
            min_cutoff[0] *= CENTRE_CUTOFF_FACTOR
            lid_rows = [1 + index for index in self.lids]
            beta[lid_rows] *= LID_BETA_FACTOR
            d_cutoff[lid_rows] = LID_D_CUTOFF
            self.one_euro = OneEuroFilter(min_cutoff, beta, d_cutoff)
        rows = self.one_euro(rows, side, period)
        return rows[1:] + rows[0]
