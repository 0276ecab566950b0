"""A drawn face with a given eye openness and head yaw, and its true landmarks.

`face` draws it with the renderer of the drawn training samples (utils.data.drawn_faces), whose
random eyelids and pose are replaced. Tests and benchmarks make videos of it.
"""
import contextlib
import functools

import numpy

from utils.data.drawn_faces import render

SEED, WIDE_OPEN = 3, 0.32  # The aspect ratio of open eyes.


class FixedYaw:
    """A random generator that returns a given head yaw, without pitch and roll, as the pose."""

    def __init__(self, rng, yaw):
        self.rng, self.yaw = rng, yaw

    def __getattr__(self, name):
        return getattr(self.rng, name)

    def normal(self, mean, spread):
        """Return (yaw, pitch, roll) in degrees; pose() draws the pose with this call."""
        self.rng.normal(mean, spread)
        return numpy.array([self.yaw, 0.0, 0.0])


@contextlib.contextmanager
def patched_render(openness, yaw):
    """Let render.render() draw eyes of this openness, 0..1, and a head of this yaw in degrees."""
    shape, pose = render.face_shape, render.pose

    def face_shape(rng):
        controls = shape(rng)
        for eye in (numpy.arange(36, 42), numpy.arange(42, 48)):
            wide = numpy.linalg.norm(controls[eye[3], :2] - controls[eye[0], :2])
            line = controls[eye[[0, 3]], 1].mean()
            # Closed lids meet a little below the corners; annotated ones still have some height.
            height = wide * (0.02 + openness * (WIDE_OPEN - 0.02))
            controls[eye[[1, 2]], 1] = line + 0.02 - 0.6 * height
            controls[eye[[5, 4]], 1] = line + 0.02 + 0.4 * height
        return controls

    render.face_shape = face_shape
    render.pose = lambda rng, controls, size: pose(FixedYaw(rng, yaw), controls, size)
    try:
        yield
    finally:
        render.face_shape, render.pose = shape, pose


@functools.lru_cache(None)
def face(openness, yaw=0.0, size=160, seed=SEED):
    """Draw a face.

    Args:
        openness: of both eyes, 0 (closed) to 1.
        yaw: of the head, in degrees.
        size: side of the image in pixels.
        seed: decides all other properties of the face.

    Returns:
        The image, RGB uint8 (size, size, 3), and its landmarks (68, 2) in pixels.
    """
    with patched_render(openness, yaw):
        return render.render(seed, size)
