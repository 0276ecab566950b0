"""Time stamps of files: variable, missing, repeated and reset ones."""
import pytest

from utils.tracking.clock import FileClock


def seconds(stamps, rate=25):
    clock = FileClock(rate)
    return [clock(None if stamp is None else stamp / 1000) for stamp in stamps]


def test_stamps_are_kept_with_their_gaps():
    assert seconds([0, 20, 75, 90, 5090]) == pytest.approx([0, 0.02, 0.075, 0.09, 5.09])


def test_the_first_frame_is_0():
    assert seconds([7000, 7040, 7100]) == pytest.approx([0, 0.04, 0.1])


@pytest.mark.parametrize("nothing", [0.0, float("nan"), None, -1.0])
def test_without_stamps_the_frame_rate_gives_the_time(nothing):
    assert seconds([nothing] * 4) == pytest.approx([0, 0.04, 0.08, 0.12])


def test_a_stamp_that_lies_back_is_replaced():
    # The frame rate gives the time of two frames, then the file's stamps do again.
    assert seconds([0, 40, 80, 60, 80, 200]) == pytest.approx([0, 0.04, 0.08, 0.12, 0.16, 0.2])


def test_time_always_increases():
    times = seconds([0, 40, 10000, 40, 80, 80, 120, float("nan"), 0])
    assert all(after > before for before, after in zip(times, times[1:]))


def test_two_recordings_in_one_file_follow_each_other():
    assert seconds([0, 5000, 5040, 0, 40, 80]) == pytest.approx([0, 5, 5.04, 5.08, 5.12, 5.16])
