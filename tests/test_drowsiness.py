"""Events, PERCLOS and states of scripted lids, at any frame rate, with noise and gaps."""
import time as clock

import numpy
import pytest
from helpers import lid_script

from utils.drowsiness.states import MAX_GAP, MIN_SEEN, STATES, Drowsiness

RATE = 30


def times(kind):
    """Return time stamps for the script of lid_script."""
    if kind.isdigit():
        return numpy.arange(0, lid_script.SECONDS, 1 / int(kind))
    random = numpy.random.default_rng(1)
    if kind == "variable":  # A phone's: 20 to 50 frames a second.
        steps = random.uniform(0.02, 0.05, 4000).cumsum()
        return steps[steps < lid_script.SECONDS]
    even = numpy.arange(0, lid_script.SECONDS, 1 / RATE)
    return even[random.random(len(even)) > 0.1]  # Every tenth frame dropped.


def play(stamps, noise=0.0, narrow=1.0):
    """Return [(time, state, perclos)] and events of the script; narrow: level of open eyes."""
    random, person = numpy.random.default_rng(0), Drowsiness()
    found, log = [], []
    for t, level, seen in zip(stamps, lid_script.openness(stamps), lid_script.seen(stamps)):
        pair = (level * narrow + random.normal(0, noise, 2)).clip(0, 1)
        pair = tuple(pair) if seen else (None, None)
        found += person.update(pair, sum(pair) / 2 <= 0.2 * narrow if seen else None, t)
        log.append((t, person.state, person.perclos))
    return log, found + person.finish()


@pytest.mark.parametrize("kind", ["15", "30", "60", "variable", "dropped"])
@pytest.mark.parametrize(("noise", "narrow"), [(0.0, 1.0), (0.04, 1.0), (0.03, 0.6)])
def test_every_event_is_found_and_none_invented(kind, noise, narrow):
    stamps = times(kind)
    log, found = play(stamps, noise, narrow)
    true = lid_script.events()
    found = sorted(found, key=lambda event: event.end)
    assert [event.kind for event in found] == [event[0] for event in true]
    # Two frames, as long as they last here.
    frame = numpy.diff(stamps).max() if kind == "variable" else 1 / RATE if kind == "dropped" \
        else 1 / int(kind)
    for event, (_, start, end) in zip(found, true):
        assert abs(event.start - start) <= 2 * frame
        assert abs(event.end - end) <= 2 * frame
    numbers = [(t, value) for t, _, value in log if value is not None]
    for t, value in numbers[::7]:
        assert value == pytest.approx(lid_script.perclos(t), abs=0.02)
    # Three seconds of the first half minute were unseen.
    assert numbers[0][0] == pytest.approx(MIN_SEEN + 3, abs=0.3)


def test_states_of_the_script():
    stamps = times("30")
    log, _ = play(stamps)
    at = {round(t * RATE): state for t, state, _ in log}

    def during(start, end):
        return {at[i] for i in range(round(start * RATE), round(end * RATE) + 1)}

    assert during(0, 16.3) == {"awake"}
    assert during(16.7, 18.9) == {"not visible"}
    assert during(19.1, 31.2) == {"awake"}  # Covered eyes do not count as closed.
    assert during(36.75, 37.8) == {"microsleep"}
    assert during(38.3, 56) == {"awake"}
    assert during(56.7, 59) == {"microsleep"}
    assert during(59.2, 75.9) == {"asleep"}
    assert during(76.3, 85.9) == {"drowsy"}
    assert {state for _, state, _ in log} == set(STATES) - {"looks down"}


def watch(level_of, seconds, rate=RATE, person=None, start=0.0):
    """Return a Drowsiness after some seconds of eyes with openness level_of(time), None: unseen."""
    person = person or Drowsiness()
    for i in range(int(seconds * rate)):
        level = level_of(start + i / rate)
        person.update((level, level), None if level is None else level <= 0.2, start + i / rate)
    return person


def test_drowsy_has_hysteresis():
    # Closed for 0.4 of 2 s (PERCLOS 0.2), then for 0.4 of 4 s (0.1), then not at all.
    person = watch(lambda t: 0.0 if t % 2 < 0.4 else 1.0, 60)
    assert person.state == "drowsy"
    assert person.perclos == pytest.approx(0.2, abs=0.02)
    assert watch(lambda t: 0.0 if t % 4 < 0.4 else 1.0, 60, person=person, start=60).perclos \
        == pytest.approx(0.1, abs=0.02)
    assert person.state == "drowsy"
    assert watch(lambda t: 1.0, 60, person=person, start=120).state == "awake"
    assert watch(lambda t: 0.0 if t % 4 < 0.4 else 1.0, 60, person=person, start=180).state \
        == "awake"


def test_a_person_who_sleeps_all_the_time():
    """Closed eyes have some predicted height, and no open eyes are known to compare with."""
    person = Drowsiness()
    for i in range(60 * RATE):
        person.update((0.35, 0.3), True, i / RATE)
        if i / RATE > 3.1:
            assert person.state == "asleep"
    assert person.perclos == 1.0
    event, = person.finish()
    assert event.kind == "sleep"
    assert (event.start, event.end) == (0.0, pytest.approx(60, abs=0.1))


def test_time_unseen_counts_neither_way_and_is_reported():
    person = watch(lambda t: None if 10 <= t < 30 else 0.0 if t < 10 else 1.0, 59)
    assert person.window.unseen == pytest.approx(20, abs=0.1)
    assert person.perclos == pytest.approx(10 / 39, abs=0.01)
    # Missing frames count like frames without visible eyes.
    gap = watch(lambda t: 0.0, 10)
    watch(lambda t: 1.0, 29, person=gap, start=30)
    assert gap.perclos == pytest.approx(person.perclos, abs=0.01)
    assert gap.window.unseen == pytest.approx(20, abs=0.1)


def test_no_perclos_before_enough_was_seen():
    person = watch(lambda t: 1.0 if t % 2 < 0.9 else None, 50)
    assert person.perclos is None
    assert person.blinks_per_minute is None
    assert person.blinks == 0
    assert watch(lambda t: 1.0, 29.5).perclos is None
    assert watch(lambda t: 1.0, 30.5).perclos == 0


@pytest.mark.parametrize(("closed", "openness"), [(None, (0.1, 0.1)), (True, (None, None))])
def test_not_judged_is_not_visible(closed, openness):
    person = Drowsiness()
    for i in range(60):
        assert person.update(openness, closed, i / RATE) == []
        assert person.state == "not visible"


def test_one_eye_is_enough():
    person = Drowsiness()
    events = []
    for i in range(120):
        closed = 60 <= i < 66
        events += person.update((None, 0.0 if closed else 0.9), closed, i / RATE)
    assert [(event.kind, event.start, event.end) for event in events] == [("blink", 2.0, 2.2)]


@pytest.mark.parametrize(("after", "blinks"), [([], 0), ([None] * 60, 1), ([0.9], 1)],
                         ids=["the end", "unseen", "open again"])
def test_a_blink_opens_the_eye_again_or_goes_out_of_sight(after, blinks):
    person, events = Drowsiness(), []
    for i, level in enumerate([0.9] * 60 + [0.1] * 5 + after):
        events += person.update((level, level), None if level is None else level < 0.2, i / RATE)
    assert len([event for event in events + person.finish() if event.kind == "blink"]) == blinks


@pytest.mark.parametrize(("rate", "blinks"), [(15, 1), (24, 1), (29.97, 1), (60, 0)])
def test_a_blink_may_be_a_single_frame(rate, blinks):
    """Measured on a man in a car: 1.0, 1.0, 0.0, 0.99, 1.0 at 29.97 frames a second."""
    person, events = Drowsiness(), []
    for i, level in enumerate([1.0] * 40 + [0.0, 0.99] + [1.0] * 20):
        events += person.update((level, level), level < 0.2, round(i / rate, 3))
    assert [event.kind for event in events] == ["blink"] * blinks == ["blink"] * person.blinks


def test_a_short_loss_keeps_the_state_and_the_event():
    def level(t):
        return None if 2.5 <= t < 2.5 + MAX_GAP - 0.1 else 0.0 if 1 <= t < 5 else 1.0

    person, events, states = Drowsiness(), [], []
    for i in range(180):
        one = level(i / RATE)
        events += person.update((one, one), None if one is None else one == 0, i / RATE)
        states.append(person.state)
    assert [event.kind for event in events] == ["sleep"]
    assert set(states[75:90]) == {"microsleep"}


@pytest.mark.parametrize(("level", "seconds", "found"), [
    (0.35, 0.4, [("sleep", 4.0)]),        # Briefly a third open.
    (0.22, 0.9, [("sleep", 4.0)]),        # Nearly closed, as sleeping eyes may be predicted.
    (0.35, 0.6, [("sleep", 3.0)]),        # Too long; what follows is too short for a microsleep.
    (0.90, 0.2, [("sleep", 3.0)]),        # Open for six frames.
    (0.90, 0.05, [("sleep", 4.0)])])      # Faster than eyelids move.
def test_short_openings_do_not_end_a_sleep(level, seconds, found):
    def openness(t):
        return 1.0 if not 10 <= t < 14 else level if 13 <= t < 13 + seconds else 0.0

    person, events = Drowsiness(), []
    for i in range(480):
        one = openness(i / RATE)
        events += person.update((one, one), one <= 0.2, i / RATE)
    assert person.state == "drowsy", "after a sleep"
    long = [event for event in events if event.kind == "sleep"]
    assert [(event.kind, round(event.end - event.start, 0)) for event in long] == found


def test_a_half_open_gap_between_nearly_closed_lids():
    """Measured on a sleeper with glasses: nearly closed for 0.4 s, wider for 0.15 s, and again."""
    steps = [(0.4, 0.0), (0.83, 0.1), (0.98, 0.32), (1.4, 0.14), (4.0, 0.0)]

    def openness(t):
        return next((level for end, level in steps if 10 <= t < 10 + end), 1.0)

    person, events = Drowsiness(), []
    for i in range(16 * RATE):
        one = openness(i / RATE)
        events += person.update((one, one), one <= 0.04, i / RATE)
    event, = events
    assert event.kind == "sleep"
    assert event.end - event.start == pytest.approx(4, abs=0.1)


@pytest.mark.parametrize("every", [30, 2])
def test_narrow_eyes_that_blink_are_awake(every):
    """Laughing eyes are nearly closed for longer than a sleeper's seem to be."""
    def openness(t):
        return 1.0 if t < 10 else 0.0 if t % every < 0.2 else 0.22

    person, events = Drowsiness(), []
    for i in range(30 * RATE):
        one = openness(i / RATE)
        events += person.update((one, one), one <= 0.2, i / RATE)
        assert person.state in ("awake", "drowsy")
    assert {event.kind for event in events} <= {"blink"}


@pytest.mark.parametrize("rate", [15, 30, 60])
def test_held_nearly_closed_eyes_are_asleep(rate):
    """Just above the threshold for closed eyes for 20 s, and a little wider for a second."""
    def openness(t):
        return 1.0 if t < 30 or t >= 50 else 0.2 if 35 <= t < 36 else 0.07 + 0.03 * numpy.sin(t)

    person, events, perclos = Drowsiness(), [], None
    for t in numpy.arange(60 * rate) / rate:
        one = openness(t)
        events += person.update((one, one), one <= 0.02, t)
        if 30 <= t < 31.9:
            assert person.state == "awake"
        if 33.1 <= t < 50:
            assert person.state == "asleep"
        perclos = person.perclos if t < 50 else perclos
    event, = events
    assert event.kind == "sleep"
    assert abs(event.start - 30) < 0.15
    assert abs(event.end - 50) < 0.15
    # The first HELD_SECONDS are not counted.
    assert perclos == pytest.approx(18 / 50, abs=0.01)


@pytest.mark.parametrize(("level", "seconds"), [(0.1, 1.8), (0.16, 10)])
def test_a_laugh_is_no_sleep(level, seconds):
    person, events = Drowsiness(), []
    for i in range(30 * RATE):
        one = level if 10 <= i / RATE < 10 + seconds else 1.0
        events += person.update((one, one), False, i / RATE)
        assert person.state == "awake"
    assert not events


def test_nearly_closed_eyes_are_not_held_through_a_gap():
    person, events = Drowsiness(), []
    for i in range(4 * RATE):
        hand = 1.2 <= i / RATE < 2.4
        events += person.update((None, None) if hand else (0.1, 0.1), None if hand else False,
                                i / RATE)
    assert {event.kind for event in events + person.finish()} == {"not visible"}


@pytest.mark.parametrize("open_level", [0.55, 0.8, 1.0])
@pytest.mark.parametrize("rate", [15, 30, 60])
def test_blinks_are_counted(open_level, rate):
    """A blink of 0.2 s every 4 s, with eyes of any width and at any frame rate."""
    person = watch(lambda t: 0.05 if t % 4 > 3.8 else open_level, 90, rate)
    assert person.blinks == 22
    assert person.blinks_per_minute == pytest.approx(15, abs=1.1)


def test_memory_does_not_grow():
    person = watch(lambda t: 0.0 if t % 4 > 3.8 else 1.0, 400, 10)
    sizes = [len(value) for value in vars(person).values() if hasattr(value, "__len__")]
    assert max(sizes) < 700
    assert len(person.window._steps) < 700


if __name__ == "__main__":
    people = Drowsiness()
    begin = clock.perf_counter()
    watch(lambda t: 0.0 if t % 4 > 3.8 else 1.0, 600, person=people)
    print(f"{(clock.perf_counter() - begin) / (600 * RATE) * 1e6:.1f} us a frame")


def test_a_time_without_a_face_is_one_event():
    person, stamps = Drowsiness(), numpy.arange(0, 4, 1 / RATE)
    assert [event for t in stamps for event in person.update((None, None), None, t)] == []
    gone, = person.finish()
    assert (gone.kind, gone.start, gone.end) == ("not visible", 0.0, stamps[-1])
    gone, = person.update((0.9, 0.9), False, 4.0)
    assert (gone.kind, gone.start, gone.end) == ("not visible", 0.0, 4.0)
    # Up to MAX_GAP before the first observation does not count.
    late = Drowsiness()
    assert late.update((None, None), None, 7.0) == late.update((0.9, 0.9), False, 7.5) == []
    assert Drowsiness().finish() == []


@pytest.mark.parametrize("rate", [1, 1.5, 2, 5])
def test_sleep_is_detected_at_low_frame_rates(rate):
    person, states, events = Drowsiness(), {}, []
    for t in numpy.arange(0, 60, 1 / rate):
        asleep = 20 <= t < 40
        events += person.update((0.05 if asleep else 1.0,) * 2, asleep, t)
        states[t] = person.state
    assert not person.frame_rate_too_low
    (event,) = [event for event in events if event.kind != "blink"]
    assert event.kind == "sleep"
    assert abs(event.start - 20) <= 1 / rate
    assert abs(event.end - 40) <= 1 / rate
    assert {states[t] for t in states if 24 < t < 40} == {"asleep"}
    assert {states[t] for t in states if 3 < t < 20} == {"awake"}
    assert person.window.unseen <= 2


def test_a_blink_in_one_frame_of_a_slow_camera_is_no_microsleep():
    person, events = Drowsiness(), []
    for t in range(60):
        events += person.update((0.05 if t == 30 else 1.0,) * 2, t == 30, t)
    assert [event.kind for event in events] == ["blink"]


def test_nobody_is_visible_at_too_low_a_frame_rate():
    person = Drowsiness()
    for t in range(0, 60, 3):
        person.update((1.0, 1.0), False, t)
    assert person.frame_rate_too_low
    assert person.state == "not visible"


@pytest.mark.parametrize(("away", "kinds"), [
    (1.0, ["sleep"]), (4.0, ["not visible", "sleep", "sleep"])])
def test_a_gap_between_closed_eyes_counts_as_closed(away, kinds):
    person, events, states = Drowsiness(), [], {}
    for t in numpy.arange(0, 20, 1 / RATE):
        if 9 <= t < 9 + away:
            events += person.update((None, None), None, t)
        else:
            closed = 5 <= t < 17
            events += person.update((0.05 if closed else 1.0,) * 2, closed, t)
        states[t] = person.state
    assert sorted(event.kind for event in events) == kinds
    back = min(t for t in states if t >= 9 + away)
    assert states[back] == ("asleep" if away < 2 else "microsleep")
    assert states[19.0] == "drowsy"


def test_a_sleep_ends_before_a_gap_that_is_followed_by_open_eyes():
    person, events = Drowsiness(), []
    for t in numpy.arange(0, 20, 1 / RATE):
        if 9 <= t < 10:
            events += person.update((None, None), None, t)
        else:
            events += person.update((0.05 if 5 <= t < 9 else 1.0,) * 2, 5 <= t < 9, t)
    sleep, = [event for event in events if event.kind == "sleep"]
    assert sleep.end == pytest.approx(9, abs=0.05)


def observe(readings, rate=RATE, person=None, start=0.0):
    """Return a Drowsiness and its events; readings: [(seconds, openness, looks_down, mouth)]."""
    person, events, frame = person or Drowsiness(), [], 0
    for seconds, openness, down, mouth in readings:
        for _ in range(round(seconds * rate)):
            seen = [value for value in openness or () if value is not None]
            closed = (sum(seen) / len(seen) <= 0.2 and not down) if seen else None
            events += person.update(openness or (None, None), closed, start + frame / rate, down,
                                    mouth)
            frame += 1
    return person, events + person.finish()


def kinds(events):
    return [event.kind for event in events]


@pytest.mark.parametrize("eyes", [(0.0, 1.0), (0.95, 0.1)])
def test_one_shut_eye_is_a_wink_and_no_closure(eyes):
    person, events = observe([(2, (1.0, 1.0), None, None), (0.4, eyes, None, None),
                              (2, (1.0, 1.0), None, None)])
    assert kinds(events) == ["wink"]
    assert events[0].start == pytest.approx(2.0)
    assert events[0].end == pytest.approx(2.4, abs=0.02)
    assert person.blinks == person.window.closed == 0


def test_eyes_that_close_one_frame_apart_are_a_blink():
    _, events = observe([(2, (1.0, 1.0), None, None), (1 / RATE, (0.0, 1.0), None, None),
                         (0.15, (0.0, 0.0), None, None), (1 / RATE, (1.0, 0.0), None, None),
                         (2, (1.0, 1.0), None, None)])
    assert kinds(events) == ["blink"]


def test_looking_down_is_a_state_and_not_closed():
    person, events = Drowsiness(), []
    states = []
    for i in range(40 * RATE):
        down = 10 <= i / RATE < 35
        events += person.update((0.6, 0.7) if down else (1.0, 1.0), False, i / RATE, down)
        states.append(person.state)
    assert states[round(10.2 * RATE)] == "awake"
    assert set(states[round(10.4 * RATE):35 * RATE]) == {"looks down"}
    assert states[-1] == "awake"
    assert kinds(events) == ["looks down"]
    assert (events[0].start, events[0].end) == pytest.approx((10, 35), abs=0.05)
    assert person.perclos == 0
    assert person.window.unseen == 0


def test_a_blink_divides_a_look_down_and_a_sleep_ends_it():
    down, shut = ((0.6, 0.6), True, None), ((0.0, 0.0), False, None)
    _, events = observe([(1, (1.0, 1.0), False, None), (2, *down), (0.2, *shut), (2, *down),
                         (4, *shut), (1, (1.0, 1.0), False, None)])
    assert kinds(events) == ["looks down", "blink", "looks down", "sleep"]
    assert all(one.end <= other.start for one, other in zip(events, events[1:]))


@pytest.mark.parametrize(("seconds", "found"), [(1.2, []), (1.7, ["yawn"]), (4.0, ["yawn"])])
def test_a_yawn_is_an_event_and_does_not_shut_the_eyes(seconds, found):
    eyes = (0.7, 0.7)
    person, events = observe([(2, eyes, None, 0.1), (seconds, eyes, None, 0.8),
                              (2, eyes, None, 0.1)])
    assert kinds(events) == found
    assert person.window.closed == 0


@pytest.mark.parametrize("away", [0.2, 0.45, 1.5, 10.0])
def test_unseen_time_does_not_extend_a_blink(away):
    """A blink while the head turns, seen again with eyes that read shut for a moment."""
    person, events, states = Drowsiness(), [], set()
    for i in range(20 * RATE):
        t = i / RATE
        if 5.2 <= t < 5.2 + away:
            events += person.update((None, None), None, t)
        else:
            shut = 5 <= t < 5.2 or 5.2 + away <= t < 5.3 + away
            events += person.update((0.0 if shut else 1.0,) * 2, shut, t)
        states.add(person.state)
    assert not states & {"microsleep", "asleep"}
    assert set(kinds(events)) <= {"blink", "not visible"}
    assert events[0].end == pytest.approx(5.2, abs=0.05)


def test_two_open_frames_end_a_closure_at_ten_frames_a_second():
    random = numpy.random.default_rng(0)
    stamps = 0.1 * numpy.arange(60) + random.uniform(-0.02, 0.02, 60)
    person, events = Drowsiness(), []
    for i, t in enumerate(stamps):
        shut = 20 <= i < 30 or 32 <= i < 42
        events += person.update((0.0 if shut else 1.0,) * 2, shut, float(t))
    assert kinds(events) == ["microsleep", "microsleep"]


@pytest.mark.parametrize("rate", [10, 15, 30, 60])
@pytest.mark.parametrize("seconds", [0.3, 0.5, 0.7, 1.0])
def test_a_slow_closure_is_at_most_one_event(rate, seconds):
    for seed in range(5):
        random, person, events = numpy.random.default_rng(seed), Drowsiness(), []
        for i in range(6 * rate):
            t = i / rate
            level = 1 - numpy.clip(min(t - 3, 3 + seconds - t) / (seconds * 0.4), 0, 1)
            pair = tuple(float(v) for v in (level + random.normal(0, 0.05, 2)).clip(0, 1))
            events += person.update(pair, sum(pair) / 2 <= 0.2, t)
        events += person.finish()
        assert len([one for one in events if one.kind != "wink"]) <= 1
        assert all(one.end <= other.start for one, other in zip(events, events[1:]))
