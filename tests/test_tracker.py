"""Tracks of faces through the frames of a video, and when the detector runs."""
import dataclasses
import time

import numpy
import pytest
from helpers import painted_faces

from utils.detection.detector import Detector
from utils.detection.refine import TRIAL_ROLLS
from utils.landmarks.eyelids import EyeThresholds
from utils.tracking import tracker

RATE = 30


def make(predictor=None, **settings):
    settings = {"filter_min_cutoff": 0, **settings}
    predictor = predictor or painted_faces.Painted()
    return tracker.Tracker(predictor, painted_faces.detector(), **settings)


def play(faces_of, frames, **settings):
    """Return the tracks of each frame of a video; faces_of(frame) gives its painted faces."""
    made, ground = make(**settings), painted_faces.background()
    return [made.update(painted_faces.paint(ground, *faces_of(i)), i / RATE) for i in range(frames)]


def middle(track):
    return (track.box[:2] + track.box[2:]) / 2


def test_a_slow_face_needs_one_pass_and_a_jump_two():
    predictor = painted_faces.Painted()
    made, ground = make(predictor, detect_every=100), painted_faces.background()
    made.update(painted_faces.paint(ground, (1, 100, 120, 60)), 0)
    assert predictor.batches == [1, 1]
    for i in range(1, 6):
        made.update(painted_faces.paint(ground, (1, 100 + 2 * i, 120, 60)), i / RATE)
    assert predictor.batches == [1] * 7
    tracks = made.update(painted_faces.paint(ground, (1, 130, 120, 60)), 0.2)
    assert predictor.batches == [1] * 9
    assert abs(middle(tracks[0])[0] - 130) < 1.5


def counting(calls, find=painted_faces.find, **more):
    """A detector of painted faces that adds the number of each `numbered` frame to calls."""
    return Detector("counting", lambda image: calls.append(int(image[0, 0, 0])) or find(image),
                    (0, 0, 1), **more)


def numbered(number, *faces):
    """A painted frame that carries its number in its first pixel."""
    image = painted_faces.paint(painted_faces.background(), *faces)
    image[0, 0] = number
    return image


def test_points_that_fill_part_of_a_detectors_box():
    predictor = painted_faces.Painted()
    made = make(predictor, detect_every=3, min_confidence=0.4)
    made.detector = Detector("wide", painted_faces.find, (0, 0.1, 2.0))
    # With this confidence, an undetected face would be lost.
    predictor.confidence = 0.42
    image = painted_faces.paint(painted_faces.background(), (1, 150, 120, 60))
    for i in range(12):
        assert [track.id for track in made.update(image, i / RATE)] == [1]
    # Three passes in the first frame, one of them rotated, then one a frame: it is never new.
    assert predictor.batches == [1, len(TRIAL_ROLLS)] + [1] * 13


def test_detector_runs_before_every_nth_frame_and_when_a_face_is_lost():
    made, calls = make(detect_every=10), []
    made.detector = counting(calls)
    for i in range(35):
        made.update(numbered(i, *[(1, 100, 120, 60)] if i < 25 else []), i / RATE)
    assert calls[:4] == [0, 8, 16, 24]
    assert 25 in calls
    assert len([i for i in calls if i > 25]) >= 2


def test_without_a_face_the_detector_runs_every_nth_frame():
    made, calls = make(detect_every=10), []
    made.detector = counting(calls)
    for i in range(35):
        made.update(numbered(i), i / RATE)
    assert calls == [0, 10, 20, 30]


@pytest.mark.parametrize("every", [1, 2, 3, 5, 10])
@pytest.mark.parametrize("low_res", [None, painted_faces.find])
def test_a_new_face_beside_another_is_found_within_so_many_frames(every, low_res):
    # This includes the sixth low-resolution detection and the full one after it.
    for appears in range(4 * every, 7 * every):
        made, tracked = make(detect_every=every), []
        made.detector = counting([], detect_low_res=low_res)
        for i in range(appears + every):
            faces = [(1, 80, 120, 60)] + [(2, 240 - i % 5, 120, 50)] * (i >= appears)
            tracked.append(len(made.update(numbered(i, *faces), i / RATE)))
        assert set(tracked[:appears]) == {1}
        assert tracked[-1] == 2


def large(image):
    """Find painted faces as a low-resolution detection does: the large ones."""
    boxes = painted_faces.find(image)
    return boxes[boxes[:, 2] - boxes[:, 0] > 40]


def test_small_faces_wait_for_full_resolution():
    made, seen, calls = make(detect_every=10), [], []
    made.detector = counting(calls, detect_low_res=large)
    for i in range(10 * (tracker.FULL_RES_INTERVAL + 2)):
        faces = [(1, 80, 120, 60)] + [(2, 240, 120, 30)] * (i > 0)
        seen.append(len(made.update(numbered(i, *faces), i / RATE)))
    assert seen[0] == 1
    assert seen[-1] == 2
    assert len(calls) == 2


def test_a_face_missed_at_low_resolution_is_searched_at_full_resolution():
    predictor, calls = painted_faces.Painted(), []
    made = make(predictor, min_confidence=0.4)
    made.detector = counting(calls, detect_low_res=large)
    predictor.confidence = 0.42
    for i in range(40):
        assert len(made.update(numbered(i, (1, 80, 120, 30)), i / RATE)) == 1
    # With this confidence, an undetected face would be lost.
    assert calls == [0, 10, 20, 30]


def slow(find, seconds):
    def wait(image):
        time.sleep(seconds)
        return find(image)
    return wait


def test_the_duration_of_a_detection_changes_nothing():
    def play_at(seconds, reuse):
        made, buffer = make(detect_every=5, filter_min_cutoff=1.2), None
        ground = painted_faces.background()
        made.detector = Detector("slow", slow(painted_faces.find, seconds), (0, 0, 1),
                                 slow(large, seconds))
        frames_of_tracks = []
        for i in range(60):
            image = painted_faces.paint(ground, (1, 60 + 3 * i, 90, 50), *[
                (2, 250 - 2 * i, 180, 45)] * (i > 20), *[(3, 40, 200, 30)] * (i > 3))
            # A caller may reuse the buffer.
            buffer = image if buffer is None or not reuse else buffer
            buffer[:] = image
            frames_of_tracks.append([(track.id, *track.points_px.ravel())
                          for track in made.update(buffer, i / RATE)])
        return frames_of_tracks

    frames_of_tracks = play_at(0, False)
    assert {len(tracks) for tracks in frames_of_tracks} == {1, 2, 3}
    assert frames_of_tracks == play_at(0.01, True)


def test_a_detection_from_before_a_cut_is_not_used():
    # This network is confident everywhere.
    made, calls = make(painted_faces.Painted(blind=0.9), detect_every=10), []
    made.detector = counting(calls)
    for i in range(9):
        faces = [(1, 80, 120, 60)] + [(2, 240, 120, 50)] * (i == 8)
        assert len(made.update(numbered(i, *faces), i / RATE)) == 1
    for i in range(9, 19):
        assert made.update(painted_faces.background(1), i / RATE) == []
    assert calls[:2] == [0, 8]


def test_a_new_face_that_moved_far_since_the_detection_is_found():
    made, calls = make(detect_every=10), []
    made.detector = counting(calls)
    for i in range(11):
        faces = [(1, 60, 60, 60)] + [(2, 60 + 40 * (i - 8), 180, 40)] * (i >= 8)
        tracks = made.update(numbered(i, *faces), i / RATE)
    assert calls == [0, 8, 10]
    assert abs(middle(tracks[1])[0] - 140) < 1.5


def test_an_error_in_the_background_is_raised():
    def broken(image):
        raise ValueError("no detection")

    made, image = make(detect_every=10), numbered(0, (1, 100, 120, 60))
    assert len(made.update(image, 0)) == 1
    made.detector = Detector("broken", broken, (0, 0, 1))
    for i in range(1, 10):
        made.update(image, i / RATE)
    with pytest.raises(ValueError, match="no detection"):
        made.update(image, 10 / RATE)


def test_a_single_image_needs_no_thread():
    made = make()
    made.update(painted_faces.paint(painted_faces.background(), (1, 100, 120, 60)), 0)
    assert made.executor is None


def test_twenty_faces_are_one_batch_and_keep_their_ids():
    predictor = painted_faces.Painted()
    made, ground = make(predictor), painted_faces.background(0, 480, 640)
    for i in range(12):
        faces = [(n + 1, 60 + 125 * (n % 5) + i, 60 + 115 * (n // 5), 60) for n in range(20)]
        tracks = made.update(painted_faces.paint(ground, *faces), i / RATE)
        assert [track.id for track in tracks] == list(range(1, 21))
    assert set(predictor.batches) == {20}


def test_two_faces_swap_places():
    def faces(i):
        return (1, 60 + 4 * i, 110, 50), (2, 260 - 4 * i, 130, 50)

    frames_of_tracks = play(faces, 50, detect_every=5)
    first = {track.id: middle(track) for track in frames_of_tracks[0]}
    last = {track.id: middle(track) for track in frames_of_tracks[-1]}
    assert set(first) == set(last) == {1, 2}
    left = min(first, key=lambda i: first[i][0])
    assert abs(first[left][0] - 60) < 3
    assert abs(last[left][0] - 256) < 3
    assert abs(last[3 - left][0] - 64) < 3


def test_a_face_that_leaves_and_returns():
    def faces(away):
        return lambda i: [] if 20 <= i < 20 + away else [(1, 150, 120, 60)]

    brief, long = play(faces(8), 60), play(faces(40), 80)
    assert all(not tracks for tracks in brief[20:28] + long[20:60])
    assert [track.id for track in brief[-1]] == [1]
    assert [track.id for track in long[-1]] == [2]


def test_two_boxes_on_one_face_become_one_track():
    twice = Detector("twice", lambda image: numpy.concatenate([painted_faces.find(image)] * 2)
                     + [[0, 0, 0, 0, 0], [9, -9, 12, -6, -0.1]], (0, 0, 1))
    made = tracker.Tracker(painted_faces.Painted(), twice, detect_every=2)
    image = painted_faces.paint(painted_faces.background(), (1, 150, 120, 60))
    for i in range(6):
        assert [track.id for track in made.update(image, i / RATE)] == [1]


def test_low_confidence_ends_a_track():
    predictor = painted_faces.Painted()
    made = make(predictor, min_confidence=0.5)
    image = painted_faces.paint(painted_faces.background(), (1, 150, 120, 60))
    assert len(made.update(image, 0)) == 1
    predictor.confidence = 0.45
    assert made.update(image, 1 / RATE) == []


def test_the_confidence_threshold_comes_with_the_weights():
    predictor = painted_faces.Painted()
    assert make(predictor).min_confidence == tracker.MIN_CONFIDENCE
    predictor.eyes = EyeThresholds(min_confidence=0.27)
    assert make(predictor).min_confidence == tracker.EYE_CONFIDENCE_FACTOR * 0.27
    predictor.eyes = EyeThresholds(min_confidence=0.27, face=0.31)
    assert make(predictor).min_confidence == 0.31
    assert make(predictor, min_confidence=0.1).min_confidence == 0.1
    predictor.eyes = EyeThresholds()
    assert make(predictor).min_confidence == tracker.MIN_CONFIDENCE


def test_undetected_faces_need_more_confidence():
    def last(confidence):
        predictor = painted_faces.Painted()
        made = make(predictor, min_confidence=0.4, detect_every=3)
        image = painted_faces.paint(painted_faces.background(), (1, 150, 120, 60))
        assert len(made.update(image, 0)) == 1
        made.detector = Detector("blind", lambda image: [], (0, 0, 1))
        predictor.confidence = confidence
        for i in range(1, 8):
            tracks = made.update(image, i / RATE)
        return tracks

    assert len(last(0.6)) == 1
    assert last(0.42) == []


def test_without_confidence_the_detections_decide():
    def ids(detect_low_res, gone):
        predictor = painted_faces.Painted(blind=1.0)
        predictor.confidence, predictor.has_confidence = 1.0, False
        made, tracked = make(predictor), []
        made.detector = counting([], detect_low_res=detect_low_res)
        for i in range(100):
            faces = [(1, 80, 120, 60)] * (i < gone) + [(2, 240, 120, 30)]
            tracked.append([track.id for track in made.update(numbered(i, *faces), i / RATE)])
        return tracked

    tracked = ids(painted_faces.find, 20)
    assert tracked[19] == [1, 2]
    assert tracked[20 + 10 * tracker.MAX_MISSED:] == [[2]] * 60
    # A small face, which no low-resolution detection finds, stays.
    assert ids(large, 100) == [[1, 2]] * 100


def test_no_track_survives_a_cut_to_a_faceless_shot():
    # This network is confident everywhere.
    made = make(painted_faces.Painted(blind=0.9), detect_every=100)
    image = painted_faces.paint(painted_faces.background(0), (1, 150, 120, 60))
    assert len(made.update(image, 0)) == 1
    assert made.update(painted_faces.background(1), 1 / RATE) == []
    assert made.update(painted_faces.background(1), 2 / RATE) == []


def test_the_detector_runs_at_once_after_any_cut():
    """Whether or not a detection of the old shot is pending, at low or at full resolution."""
    for cut in range(46, 58):
        made = make(detect_every=10)
        made.detector = dataclasses.replace(made.detector, detect_low_res=made.detector.detect)
        old = painted_faces.paint(painted_faces.background(0), (1, 80, 120, 60))
        for i in range(cut):
            made.update(old, i / RATE)
        shot = painted_faces.paint(painted_faces.background(1), (1, 240, 120, 40))
        tracks = made.update(shot, cut / RATE)
        assert len(tracks) == 1, cut
        assert abs(middle(tracks[0])[0] - 240) < 1.5, cut


def test_ids_are_new_after_a_cut():
    made, face = make(detect_every=100), (1, 150, 120, 30)
    for seed, expected in ((0, 1), (0, 1), (1, 2), (1, 2)):
        tracks = made.update(painted_faces.paint(painted_faces.background(seed), face), 0)
        assert [track.id for track in tracks] == [expected]


def test_a_flash_is_no_cut():
    made = make()
    dark = painted_faces.background() // 2
    assert not made._is_cut(dark)
    assert not made._is_cut(painted_faces.background())
    assert made._is_cut(painted_faces.background(1))


def test_a_face_that_walks_out_of_the_frame_is_gone():
    frames_of_tracks = play(lambda i: [(1, 250 + 5 * i, 120, 60)], 40)
    assert len(frames_of_tracks[5]) == 1
    assert frames_of_tracks[-1] == []


class Turning(painted_faces.Painted):
    """Predicts faces that are turned by `roll` degrees."""
    roll = 0.0

    def __call__(self, crops):
        points, confidence = super().__call__(crops)
        angle = numpy.radians(self.roll)
        turn = numpy.array([[numpy.cos(angle), numpy.sin(angle)],
                            [-numpy.sin(angle), numpy.cos(angle)]])
        return (points - 0.5) @ turn + 0.5, confidence


@pytest.mark.parametrize(("roll", "kept"), [(30.0, True), (90.0, False), (-90.0, False)])
def test_a_face_that_is_turned_within_a_frame_is_not_the_same(roll, kept):
    predictor = Turning()
    made = make(predictor)
    image = painted_faces.paint(painted_faces.background(), (1, 150, 120, 60))
    for i in range(5):
        assert [track.id for track in made.update(image, i / RATE)] == [1]
    predictor.roll = roll
    assert [track.id for track in made.update(image, 5 / RATE)] == [1] * kept
