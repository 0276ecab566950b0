"""The driver among faces: choice by size and position, recognition, and separate drowsiness."""
import dataclasses

import numpy
import pytest

from utils.drowsiness.driver import (
    RETURN_SECONDS,
    TAKEOVER_SECONDS,
    Driver,
    Everyone,
    distance,
    driver_score,
)
from utils.drowsiness.eyes import Eyes
from utils.drowsiness.states import MAX_CLOSED_GAP, WINDOW

RATE, SHAPE = 10, (480, 640, 3)
OPEN, SHUT = Eyes((1.0, 1.0), False, (0.3, 0.3)), Eyes((0.0, 0.0), True, (0.05, 0.05))
DRIVER, PASSENGER, BEHIND = (300, 220, 160), (560, 260, 130), (420, 120, 60)


@dataclasses.dataclass
class Face:
    """The attributes of a Track that are used."""
    id: int
    box: numpy.ndarray


def face(number, place):
    """Return a Face at (x, y, side)."""
    x, y, side = place
    return Face(number, numpy.array([x - side / 2, y - side / 2, x + side / 2, y + side / 2]))


def watch(people, seconds, faces, start=0.0):
    """Show faces [(Face, Eyes)] for some seconds; return the last states by id and all events."""
    all_events = []
    for i in range(round(seconds * RATE)):
        states, events = people.watch([one for one, _ in faces], [seen for _, seen in faces], SHAPE,
                                      start + i / RATE)
        all_events += events
    return states, all_events


def test_the_largest_most_central_face_is_the_driver():
    faces = [(face(1, PASSENGER), SHUT), (face(2, DRIVER), OPEN), (face(3, BEHIND), SHUT)]
    people = Driver()
    states, events = watch(people, 40, faces)
    assert set(states) == {2}
    assert states[2] is people.drowsiness
    assert people.drowsiness.perclos == 0
    assert events == []
    # A central face may score higher than a larger one near a corner.
    central, corner = face(1, (320, 240, 100)), face(1, (90, 60, 150))
    assert driver_score(central.box, SHAPE) > driver_score(corner.box, SHAPE)


def test_the_drivers_window_survives_a_lost_track():
    people = Driver()
    watch(people, 30, [(face(1, DRIVER), SHUT), (face(2, PASSENGER), OPEN)])
    before = people.drowsiness
    # The driver's face is covered; only the passenger is visible.
    states, _ = watch(people, 4, [(face(2, PASSENGER), OPEN)], 30)
    assert states == {}
    assert before.state == "not visible"
    # The driver is back with another id, a little larger.
    back = [(face(2, PASSENGER), OPEN), (face(7, (330, 235, 190)), OPEN)]
    states, events = watch(people, 10, back, 34)
    assert set(states) == {7}
    assert states[7] is before
    assert ("driver", "not visible") in [(who, event.kind) for who, event in events]
    assert before.perclos == pytest.approx(0.75, abs=0.02)
    assert before.window.unseen == pytest.approx(4, abs=0.2)


def test_another_driver_has_another_window():
    people = Driver()
    watch(people, 30, [(face(1, DRIVER), SHUT)])
    before = people.drowsiness
    states, events = watch(people, 1, [(face(9, PASSENGER), OPEN)], 30 + WINDOW + 1)
    assert set(states) == {9}
    assert people.drowsiness is not before
    assert people.drowsiness.blinks == 0
    # The events of the first driver are not lost.
    assert [event.kind for _, event in events] == ["sleep"]


@pytest.mark.parametrize(("alone", "patience"), [
    (TAKEOVER_SECONDS - 2, 0), (TAKEOVER_SECONDS + 2, TAKEOVER_SECONDS)])
def test_a_passenger_who_was_visible_alone_is_replaced_by_the_driver(alone, patience):
    people = Driver()
    watch(people, alone, [(face(1, PASSENGER), OPEN)])
    both = [(face(1, PASSENGER), OPEN), (face(2, DRIVER), OPEN)]
    if patience:
        assert set(watch(people, patience - 1, both, alone)[0]) == {1}
    assert set(watch(people, 2, both, alone + max(patience - 1, 0))[0]) == {2}
    # The driver stays.
    assert set(watch(people, 20, both, alone + patience + 2)[0]) == {2}


def test_a_driver_who_moved_the_seat_is_found_again():
    people = Driver()
    watch(people, 10, [(face(1, DRIVER), OPEN)])
    moved = [(face(2, (280, 240, 300)), OPEN), (face(3, PASSENGER), SHUT)]
    before = people.drowsiness
    assert watch(people, RETURN_SECONDS - 0.1, moved, 10)[0] == {}
    assert watch(people, 1, moved, 10 + RETURN_SECONDS - 0.1)[0] == {2: before}


def test_the_only_face_is_the_driver_again_wherever_and_however_large():
    people = Driver()
    watch(people, 10, [(face(1, DRIVER), OPEN)])
    before = people.drowsiness
    assert watch(people, 1, [(face(2, (120, 80, 60)), SHUT)], 12)[0] == {2: before}


def test_a_passenger_seen_beside_the_driver_is_not_the_driver():
    people = Driver()
    watch(people, 10, [(face(1, DRIVER), OPEN), (face(2, PASSENGER), OPEN)])
    # Alone, and with another id after a loss.
    assert watch(people, 3, [(face(2, PASSENGER), SHUT)], 10)[0] == {}
    assert watch(people, 3, [(face(3, PASSENGER), SHUT)], 13)[0] == {}
    both = [(face(3, PASSENGER), SHUT), (face(4, DRIVER), OPEN)]
    assert set(watch(people, 1, both, 16)[0]) == {4}


def test_distance_of_boxes():
    box = face(1, (100, 100, 50)).box
    assert distance(box, face(1, (130, 140, 50)).box) == pytest.approx(1)
    assert distance(box, face(1, (100, 100, 120)).box) == float("inf")
    assert distance(box, face(1, (100, 100, 20)).box) == float("inf")


def test_everyone_has_a_separate_drowsiness():
    people = Everyone()
    states, _ = watch(people, 40, [(face(1, DRIVER), SHUT), (face(2, PASSENGER), OPEN)])
    assert states[1].perclos == 1
    assert states[2].perclos == 0
    assert states[1].state == "asleep"
    assert states[2].state == "awake"
    # The first one is gone: the sleep ends with the last frame that showed the face.
    states, events = watch(people, MAX_CLOSED_GAP + 0.5, [(face(2, PASSENGER), OPEN)], 40)
    assert set(states) == {2}
    (who, event), = events
    assert (who, event.kind) == (1, "sleep")
    assert event.end == pytest.approx(40, abs=0.2)
    # A sleeper is watched until another face is in the same place.
    assert people.watched[1].state == "not visible"
    assert people.watched[1].eyes_closed
    states, events = watch(people, 1, [(face(3, DRIVER), OPEN)], 43)
    assert states[3].state == "awake"
    assert states[3].perclos is None
    assert (1, "not visible") in [(who, event.kind) for who, event in events]
    # The passenger was awake before disappearing, and is dropped.
    assert set(people.watched) == {3}


def test_a_sleeper_who_disappears_is_watched_for_a_minute():
    people = Everyone()
    watch(people, 4, [(face(1, DRIVER), SHUT)])
    for seconds in (4 + WINDOW - 1, 4 + WINDOW + 1):
        states, _ = people.watch([], [], SHAPE, seconds)
        assert states == {}
        assert set(people.watched) == ({1} if seconds < WINDOW + 4 else set())


def test_finish_returns_the_events_that_have_not_ended():
    for people, who in ((Driver(), "driver"), (Everyone(), 5)):
        watch(people, 2, [(face(5, DRIVER), SHUT)])
        (person, event), = people.finish()
        assert (person, event.kind, event.start) == (who, "microsleep", 0.0)
