"""Names of points as people write them."""
import pytest

from utils.data.readers.names import match, numbers

FIVE = ("right eye", "left eye", "nose", "right mouth", "left mouth")


@pytest.mark.parametrize("names", [
    ("right eye", "left eye", "nose", "right mouth", "left mouth"),
    ("Right_Eye", "LEFT-EYE", "Nose", "right__mouth", "leftmouth"),
    ("R_eye", "L_eye", "nose_tip", "R_mouth", "L_mouth"),
    ("REye", "LEye", "N", "RMouth", "LMouth"), ("re", "le", "n", "rm", "lm"),
    ("reye", "leye", "nose", "rmouth", "lmouth"),
    ("eye_right", "eye_left", "NoseTip", "mouth_right_corner", "mouth_left_corner"),
    ("right eye center", "leftEye", "tip of the nose", "right lip corner", "left mouth corner")])
def test_short_forms_are_the_names_of_the_scheme(names):
    assert match(names[::-1], FIVE) == {name: i for i, name in enumerate(names)}


def test_what_may_be_two_points_is_none():
    assert match(["eye", "left_brow", "mouth", "l"], FIVE) == {}
    # Inner and outer corners are different points, and two names do not share one.
    corners = ("left eye inner corner", "left eye outer corner")
    assert match(["outer_left_eye", "L eye inner"], corners) == {"outer_left_eye": 1,
                                                                 "L eye inner": 0}
    assert match(["left eye corner", "left eye tip"], FIVE) == {}
    # An exact name comes before a similar one.
    assert match(["nose_tip", "nose"], FIVE) == {"nose": 2}
    assert match(["a"], ()) == {}


def test_names_that_are_numbers():
    assert numbers(["1", "2", "3"]) == [0, 1, 2]
    assert numbers(["p2", "p0", "p1"]) == [2, 0, 1]
    for names in (["1", "2", "4"], ["a1", "b2"], ["2", "3"], ["1", "1"], ["1", "x"], []):
        assert numbers(names) is None
