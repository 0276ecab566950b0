"""The alarm: a terminal bell or a line of text when a person's state requires one.

`Alarm.update` takes the state of each person frame by frame. When the alarm rings follows from the
table `states.STATES`.
"""
from __future__ import annotations

import sys

from utils.drowsiness.states import STATES

REPEAT_SECONDS = 1.0  # Time between two alarms while the eyes are closed.


class Alarm:
    """Rings on stderr, which the program that started this one may read.

    It rings once in a state that has an alarm, and repeats while the eyes are closed, and while a
    person who was asleep before is out of sight.

    Args:
        kind: `bell` rings the terminal's bell, `line` writes "TIME s: PERSON STATE", with
            "(asleep before)" after the state where that is why it rings.
    """

    def __init__(self, kind: str):
        self.kind = kind
        # Person to (state, since when, time of the last alarm or None, whether the last state in
        # which the eyes were seen was asleep).
        self._people = {}

    def update(self, person: str | int, name: str, time: float) -> None:
        """Ring where the state of a person requires it.

        Args:
            person: id of a face, or driver.
            name: of the state, in STATES.
            time: of the frame, in seconds.
        """
        last, since, last_alarm, asleep = self._people.get(person, ("awake", time, None, False))
        state = STATES[name]
        if name != last:
            since, last_alarm = time, None
            asleep = asleep if state.eyes_closed is None else name == "asleep"
        hidden = state.eyes_closed is None and asleep
        closed = state.eyes_closed or hidden
        if last_alarm is None:
            ring = state.alarm_after is not None and (closed or time - since >= state.alarm_after)
        else:
            ring = closed and time - last_alarm >= REPEAT_SECONDS
        if ring:
            last_alarm = time
            line = f"{time:.2f} s: {person} {name}{' (asleep before)' if hidden else ''}\n"
            print("\a" if self.kind == "bell" else line, end="", file=sys.stderr, flush=True)
        self._people[person] = name, since, last_alarm, asleep
