"""The One Euro filter on landmarks, and the tracks that use it."""
import numpy
import pytest
from helpers import painted_faces

from utils.landmarks.eyelids import aspect_ratio
from utils.landmarks.schemes import SCHEMES
from utils.tracking.one_euro import FaceFilter
from utils.tracking.tracker import Tracker

RATE = 30
MEAN = SCHEMES["300W"].mean_face


def noisy(velocity, frames=300, side=200.0):
    """Return true and noisy landmarks of a face that moves at velocity (face sides a second)."""
    random, seconds = numpy.random.default_rng(0), numpy.arange(frames)[:, None, None] / RATE
    true = (MEAN - 0.5) * side / 1.2 + seconds * side * numpy.array([velocity, 0.3 * velocity])
    # Independent noise per landmark and common noise, in sides of the face.
    return true, true + random.normal(0, 0.004, true.shape) * side \
        + random.normal(0, 0.0015, (frames, 1, 2)) * side


def jitter(points):
    return numpy.linalg.norm(numpy.diff(points, axis=0), axis=-1).mean()


@pytest.mark.parametrize("velocity", [0, 0.1, 0.3, 1, 3])
def test_filter_cuts_jitter_and_lags_less_than_a_frame(velocity):
    true, measured = noisy(velocity)
    face_filter = FaceFilter(*Tracker(painted_faces.Painted(), None).filter_settings)
    found = numpy.stack([face_filter(points, 200.0, 1 / RATE) for points in measured])
    error, before = (found - true)[30:], (measured - true)[30:]
    assert jitter(error) <= 0.4 * jitter(before)
    if velocity:
        step = (true[1] - true[0]).mean(0)
        assert -(error.mean((0, 1)) @ step) / (step @ step) < 1


def test_a_blink_of_three_frames_remains_after_filtering():
    _, measured = noisy(0, 90)
    eyes = SCHEMES["300W"].eyes
    openness = []
    for lids in ((), sum(eyes, [])):
        face_filter = FaceFilter(*Tracker(painted_faces.Painted(), None).filter_settings, lids)
        found = []
        for frame, points in enumerate(measured):
            points = points.copy()
            for contour in eyes:
                for upper, lower in ((1, 5), (2, 4)):
                    if 60 <= frame < 63:
                        points[contour[upper]] = points[contour[lower]]
            found.append(aspect_ratio(face_filter(points, 200.0, 1 / RATE)[None], eyes[0])[0])
        openness.append(numpy.array(found) / numpy.median(found))
    default, lid = openness
    assert lid[62] < 0.1 < 0.2 < default[62]
    assert lid[64] > default[64] + 0.1


def test_filter_does_not_depend_on_the_size_of_the_frame():
    _, measured = noisy(0.5, 40)
    small, large = FaceFilter(1, 5), FaceFilter(1, 5)
    for points in measured:
        assert numpy.allclose(2 * small(points, 200, 1 / RATE), large(2 * points, 400, 1 / RATE))


def test_tracks_have_filtered_and_raw_landmarks():
    predictor = painted_faces.Painted()
    predictor.noise = 0.004
    made = Tracker(predictor, painted_faces.detector())
    image = painted_faces.paint(painted_faces.background(), (1, 150, 120, 60))
    first_tracks = [made.update(image, i / RATE)[0] for i in range(3)]
    points, raw = [], []
    for i in range(3, 60):
        track = made.update(image, i / RATE)[0]
        points.append(track.points_px)
        raw.append(track.raw_px)
    assert first_tracks[0].id == track.id
    assert jitter(numpy.array(points)) < 0.4 * jitter(numpy.array(raw))
