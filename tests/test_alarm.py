"""When the alarm rings, and what it writes."""
import pytest

from utils.drowsiness.alarm import REPEAT_SECONDS, Alarm
from utils.drowsiness.states import STATES

AWAY = STATES["not visible"].alarm_after


def ring(states, capsys, kind="line", rate=10):
    """Return what the alarm writes for a sequence of [(state, seconds)]."""
    alarm, time = Alarm(kind), 0.0
    for state, seconds in states:
        for _ in range(round(seconds * rate)):
            alarm.update("driver", state, time)
            time += 1 / rate
    return capsys.readouterr().err


def test_each_state_has_its_alarm(capsys):
    text = ring([("awake", 5), ("drowsy", 5), ("awake", 1), ("microsleep", 0.5), ("awake", 1)],
                capsys)
    assert text == "5.00 s: driver drowsy\n11.00 s: driver microsleep\n"


def test_the_alarm_repeats_during_sleep(capsys):
    assert ring([("awake", 1), ("asleep", 5 * REPEAT_SECONDS)], capsys).count("driver asleep") == 5


@pytest.mark.parametrize(("seconds", "times"), [(AWAY - 0.5, 0), (AWAY + 5, 1)])
def test_not_visible_rings_once_after_a_delay(seconds, times, capsys):
    assert ring([("awake", 1), ("not visible", seconds)], capsys).count("not visible") == times


@pytest.mark.parametrize(("before", "times"), [("asleep", 6), ("microsleep", 1), ("drowsy", 1)])
def test_the_alarm_repeats_for_a_person_who_was_asleep_before(before, times, capsys):
    states = [(before, 2), ("not visible", 6 * REPEAT_SECONDS), ("awake", 2), ("not visible", 2)]
    text = ring(states, capsys)
    assert text.count("not visible") == times
    assert text.count("not visible (asleep before)\n") == (times if before == "asleep" else 0)


def test_the_bell_is_the_bell_character(capsys):
    assert ring([("awake", 1), ("drowsy", 5)], capsys, "bell") == "\a"
