"""A drawn face whose lids and head follow a script, with its true landmarks."""
import contextlib
import functools

import numpy

from utils.data.drawn_faces import render

SEED, WIDE_OPEN = 3, 0.32  # Eye aspect ratio of its open eyes.


class Posed:
    """A random generator whose head pose is given: yaw, pitch and roll in degrees."""

    def __init__(self, rng, yaw):
        self.rng, self.yaw = rng, yaw

    def __getattr__(self, name):
        return getattr(self.rng, name)

    def normal(self, mean, spread):
        """The pose, where pose() asks for one."""
        self.rng.normal(mean, spread)
        return numpy.array([self.yaw, 0.0, 0.0])


@contextlib.contextmanager
def scripted(openness, yaw):
    """render.render() draws lids that are open by `openness`, 0..1, and a head turned by yaw."""
    shape, pose = render.face_shape, render.pose

    def face_shape(rng):
        controls = shape(rng)
        for eye in (numpy.arange(36, 42), numpy.arange(42, 48)):
            wide = numpy.linalg.norm(controls[eye[3], :2] - controls[eye[0], :2])
            line = controls[eye[[0, 3]], 1].mean()
            # Shut lids meet a little below the corners; annotated ones still have some height.
            height = wide * (0.02 + openness * (WIDE_OPEN - 0.02))
            controls[eye[[1, 2]], 1] = line + 0.02 - 0.6 * height
            controls[eye[[5, 4]], 1] = line + 0.02 + 0.4 * height
        return controls

    render.face_shape = face_shape
    render.pose = lambda rng, controls, size: pose(Posed(rng, yaw), controls, size)
    try:
        yield
    finally:
        render.face_shape, render.pose = shape, pose


@functools.lru_cache(None)
def face(openness, yaw=0.0, size=160, seed=SEED):
    """RGB uint8 (size, size, 3) and landmarks (68, 2) in pixels."""
    with scripted(openness, yaw):
        return render.render(seed, size)
