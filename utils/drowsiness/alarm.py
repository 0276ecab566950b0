"""A bell or a line when a person's state asks for it."""
import sys

from utils.drowsiness.states import SHUT

AGAIN = 1.0  # Seconds after which it rings again for eyes that stay shut.
AWAY = 3.0  # Seconds out of sight before that is worth an alarm, as for a long look away.


class Alarm:
    """`update(person, state, time)` frame by frame. kind: bell (of the terminal) or line; both go
    to stderr, of which a program that started this one may read.

    Once for what is worth it, and AGAIN and AGAIN for eyes that are shut, or were when they went
    out of sight.
    """

    def __init__(self, kind):
        self.kind = kind
        # A person to (state, since when, when it last rang or None, whether eyes are shut).
        self._known = {}

    def update(self, person, state, time):
        """Ring if need be; state: one of drowsiness.STATES, time in seconds."""
        before, since, rang, shut = self._known.get(person, ("awake", time, None, False))
        if state != before:
            since, rang = time, None
            shut = state in SHUT or state == "not visible" and shut
        if rang is None:
            due = state != "awake" and (shut or state != "not visible" or time - since >= AWAY)
        else:
            due = shut and time - rang >= AGAIN
        if due:
            rang = time
            text = "\a" if self.kind == "bell" else f"{time:.2f} s: {person} {state}\n"
            print(text, end="", file=sys.stderr, flush=True)
        self._known[person] = state, since, rang, shut
