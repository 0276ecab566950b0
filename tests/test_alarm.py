"""When the alarm rings, and how."""
import pytest

from utils.drowsiness.alarm import AGAIN, AWAY, Alarm


def ring(states, capsys, kind="line", rate=10):
    """The lines for states that last [(state, seconds)]."""
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


def test_sleep_rings_again_and_again(capsys):
    assert ring([("awake", 1), ("asleep", 5 * AGAIN)], capsys).count("driver asleep") == 5


@pytest.mark.parametrize(("seconds", "times"), [(AWAY - 0.5, 0), (AWAY + 5, 1)])
def test_out_of_sight_rings_late_and_once(seconds, times, capsys):
    assert ring([("awake", 1), ("not visible", seconds)], capsys).count("not visible") == times


@pytest.mark.parametrize(("before", "times"), [("asleep", 6), ("microsleep", 6), ("drowsy", 1)])
def test_who_went_out_of_sight_with_shut_eyes_is_rung_for_until_he_is_seen(before, times, capsys):
    text = ring([(before, 2), ("not visible", 6 * AGAIN), ("awake", 2), ("not visible", 2)], capsys)
    assert text.count("not visible") == times


def test_the_bell_is_the_terminals(capsys):
    assert ring([("awake", 1), ("drowsy", 5)], capsys, "bell") == "\a"
