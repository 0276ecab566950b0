"""3D shape, pose and shading of drawn faces.

The model is the mean face of 300W with hand-made depths. `face_shape` varies its control points,
`pose` rotates and projects them, and `lighting` shades the mesh that a thin-plate spline spans over
them. The unit of the model is half the width of a face; x right, y down, z towards the viewer.
"""
from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy

from utils.landmarks.schemes import SCHEMES

# Depths of jaw, brow, nose, eye and lips of one half, set by hand; the other half mirrors them.
_DEPTH = {**dict(zip(range(9), (-1.2, -1.18, -1.12, -1.02, -.88, -.7, -.48, -.25, -.1))),
          **dict(zip(range(17, 22), (-.4, -.2, -.08, -.02, 0))),
          **dict(zip(range(27, 34), (-.03, .12, .26, .4, .02, .1, .16))),
          **dict(zip(range(36, 42), (-.42, -.28, -.21, -.26, -.23, -.3))),
          **dict(zip(range(48, 52), (-.13, .03, .1, .11))), 57: .09, 58: .07, 59: -.01,
          60: -.12, 61: .05, 62: .08, 66: .07, 67: .05}
_HAIRLINE = ((1.0, -.8, -1.1), (.96, -1.15, -.85), (.8, -1.48, -.6), (.45, -1.72, -.34),
             (0, -1.8, -.26))
_INSIDE = ((.5, .05, -.1), (.82, -.12, -.45), (.86, -.55, -.58), (.66, .42, -.4), (.36, .66, -.13),
           (.5, -1.3, -.14), (.82, -1.05, -.42), (0, -1.3, 0), (0, .79, -.04), (.3, .1, -.07))
_CENTRE = numpy.array([0, -.1])


def smooth(points: numpy.ndarray, closed: bool = True, steps: int = 4) -> numpy.ndarray:
    """Return a Catmull-Rom curve through points (n, d).

    Args:
        points: the points.
        closed: whether the last point is joined to the first.
        steps: number of curve points per segment; point i is at index i * steps.

    Returns:
        Curve points (n * steps, d), or ((n - 1) * steps + 1, d) for an open curve.
    """
    points = numpy.asarray(points)
    ends = (points[-1:], points[:2]) if closed else (points[:1], points[-1:])
    p = numpy.concatenate([ends[0], points, ends[1]])
    a, b, c, d = (p[i:len(p) - 3 + i, None] for i in range(4))
    t = (numpy.arange(steps) / steps)[:, None]
    cubic, square = 1.5 * (b - c) + (d - a) / 2, a - 2.5 * b + 2 * c - d / 2
    curve = b + t * ((c - a) / 2 + t * (square + t * cubic))
    curve = curve.reshape(-1, points.shape[1])
    return curve if closed else numpy.concatenate([curve, points[-1:]])


def _build():
    """Return the values of the module constants CONTROLS to RAYS_SHAPE.

    The control points (C, 3) are 68 landmarks, 9 of the hairline and others.
    """
    scheme = SCHEMES["300W"]
    mean = (scheme.mean_face - .5) * (2.27, 2.06)
    mean = (mean + mean[scheme.flip] * (-1, 1)) / 2
    depth = numpy.array([_DEPTH.get(i, _DEPTH.get(int(scheme.flip[i]))) for i in range(68)])
    mirrored = [(-x, y, z) for x, y, z in _INSIDE if x]
    arc = [*_HAIRLINE, *[(-x, y, z) for x, y, z in _HAIRLINE[-2::-1]]]
    around = numpy.concatenate([arc, _INSIDE, mirrored]) * (1, .92, 1)
    controls = numpy.concatenate([numpy.column_stack([mean, depth]), around]) * (1, 1, .88)
    outline = smooth(numpy.concatenate([controls[:17, :2], controls[68:77, :2]]), steps=2)
    rings = numpy.linspace(0, 1, 15)[:, None, None] ** .85
    reach = numpy.linspace(.45, 1, 45)[:, None, None]
    mesh = _CENTRE + rings * (outline - _CENTRE)
    rays = _CENTRE + reach * (controls[:17, :2] - _CENTRE)

    def kernel(at, controls):
        square = ((at[:, None] - controls[None]) ** 2).sum(-1)
        return square * numpy.log(square + 1e-9)

    # A thin-plate spline is linear in its controls, so the mesh of any face is a matrix product.
    xy, count = controls[:, :2], len(controls)
    system = numpy.zeros((count + 3, count + 3))
    system[:count, :count] = kernel(xy, xy) + .002 * numpy.eye(count)
    system[:count, count:] = numpy.column_stack([numpy.ones(count), xy])
    system[count:, :count] = system[:count, count:].T
    inverse = numpy.linalg.inv(system)[:, :count]
    weights = [numpy.column_stack([kernel(at, xy), numpy.ones(len(at)), at]) @ inverse
               for at in (mesh.reshape(-1, 2), rays.reshape(-1, 2))]
    return controls, *weights, mesh.shape[:2], rays.shape[:2]


# MESH @ controls (C, 3) is the surface, of shape MESH_SHAPE (rings, rays). Ring 0 is the middle of
# the face, the last ring its outline. Ray 2 i ends at jaw point i, rays 34 to 50 at the hairline.
# RAYS @ controls are points on the rays to the jaw points, of shape RAYS_SHAPE (points, 17).
CONTROLS, MESH, RAYS, MESH_SHAPE, RAYS_SHAPE = _build()


def face_shape(rng: numpy.random.Generator) -> numpy.ndarray:
    """Return the control points (C, 3) of a random face with a random expression."""
    # The factors are close to the spread of the landmarks of 300W without pose.
    c = CONTROLS.copy()
    x, y, side = c[:, 0].copy(), c[:, 1].copy(), numpy.sign(c[:, 0])
    right, left, lips = numpy.arange(36, 42), numpy.arange(42, 48), numpy.arange(48, 68)
    n = rng.normal(size=24).clip(-2.2, 2.2)
    # Asymmetry: one brow is higher, and the mouth is slightly tilted.
    c[17:22, 1] += .015 * n[22]
    c[lips, 1] += .02 * n[23] * x[lips]
    low = numpy.clip((y + .2) / 1.2, 0, 1)
    c[:, 0] *= 1 + .05 * n[0] * low + .03 * n[1] * numpy.sin(low * numpy.pi)
    c[17:27, 0] += side[17:27] * .02 * n[2]
    arch = numpy.tile(numpy.sin(numpy.linspace(0, numpy.pi, 5)), 2)
    c[17:27, 1] += .04 * n[3] + .04 * n[4] * numpy.abs(x[17:27]) - .035 * n[5] * arch
    for eye in (right, left):
        middle = c[eye].mean(0)
        c[eye, 1] += .1 * n[6] * (numpy.abs(x[eye]) - numpy.abs(middle[0]))
        c[eye, :2] = middle[:2] + (c[eye, :2] - middle[:2]) * (.98 + .04 * n[7], 1.24 + .14 * n[8])
        c[eye, 0] += numpy.sign(middle[0]) * .022 * n[9]
    c[27:36, 0] *= .95 + .11 * n[10]
    c[28:36, 1] += .05 * n[11] * numpy.clip((y[28:36] + .6) / .7, 0, 1)
    c[28:36, 2] += .06 * n[12]
    c[30, 1] += .03 * n[13]
    c[lips, 0] *= .95 + .08 * n[14]
    centre = c[[60, 64], 1].mean()
    c[lips, 1] = centre + (c[lips, 1] - centre) * (.97 + .16 * n[15]) + .03 * n[16] + .03 * n[11]
    c[3:14, 1] += .06 * n[17] * (1 - numpy.abs(x[3:14])) ** 1.5
    c[68:77, 1] -= .13 * n[18] * numpy.clip(-y[68:77] - .8, 0, 1) - .05
    # Expression. The lips of the mean face are slightly open, so they are closed first.
    opened = rng.choice([0, 0, rng.uniform(0, .2), rng.uniform(.1, 1)])
    smile = rng.choice([0, rng.uniform(-.4, .4), rng.uniform(.2, 1.2)])
    gap = c[[67, 66, 65], 1] - c[[61, 62, 63], 1]
    c[[61, 62, 63], 1] += gap * .4
    c[55:60, 1] -= gap.mean() * .5
    c[[67, 66, 65], 1] -= gap * .5
    corner = numpy.clip(numpy.abs(x[lips]) / .4, 0, 1)
    c[lips, 0] += side[lips] * corner * (.11 * smile - .07 * opened)
    c[lips, 1] -= (corner ** 2 - .35) * .13 * smile
    c[49:54, 1] += .02 * max(smile, 0)
    drop = .42 * opened * numpy.clip((y - .2) / .7, 0, 1) * numpy.clip(1.15 - numpy.abs(x), 0, 1)
    drop[lips] = .12 * opened * corner
    lower = numpy.array([55, 56, 57, 58, 59, 65, 66, 67])
    drop[lower] = .42 * opened * numpy.array([.75, 1, 1, 1, .75, .97, 1, .97])
    drop[[49, 50, 51, 52, 53, 61, 62, 63]] = -.03 * opened
    c[:, 1] += drop
    c[17:27, 1] += .05 - rng.choice([0, rng.uniform(-.06, .14)])
    c[17:27, 1] += .04 * n[19] * (.6 - numpy.abs(x[17:27]))
    lids = rng.choice([1, rng.uniform(.75, 1.25), rng.uniform(.35, .9), rng.uniform(0, .3)],
                      p=[.3, .4, .22, .08]) - .12 * max(smile, 0) * rng.random()
    for eye in (right, left):
        lower_y = c[eye[[5, 4]], 1]
        c[eye[[1, 2]], 1] = lower_y - (lower_y - c[eye[[1, 2]], 1]) * max(lids, .03)
    c[:, :2] += rng.normal(0, .008, (len(c), 2))
    c[:, 1] *= 1 + .055 * n[20]
    c[:, 2] *= 1 + .1 * n[21]
    return c


def pose(rng: numpy.random.Generator, controls: numpy.ndarray, size: int
         ) -> tuple[Callable, numpy.ndarray, numpy.ndarray, float]:
    """Rotate a face at random and project it into an image.

    Args:
        rng: random number generator.
        controls: control points (C, 3).
        size: side of the image in pixels.

    Returns:
        A function that projects points (n, 3) to (n, 3), x and y in pixels and depth; the landmarks
        (68, 2) in pixels; the rotation (3, 3); and the pixels per unit of the model.
    """
    yaw, pitch, roll = numpy.radians(numpy.clip(rng.normal((0, 2, 0), (17, 10, 9)),
                                                (-45, -25, -35), (45, 28, 35)))
    distance = rng.uniform(5, 14)
    sin, cos = numpy.sin, numpy.cos
    turn = numpy.array([[1, 0, 0], [0, cos(pitch), sin(pitch)], [0, -sin(pitch), cos(pitch)]]) @ \
        numpy.array([[cos(yaw), 0, sin(yaw)], [0, 1, 0], [-sin(yaw), 0, cos(yaw)]])
    turn = numpy.array([[cos(roll), -sin(roll), 0], [sin(roll), cos(roll), 0], [0, 0, 1]]) @ turn

    def view(points):
        points = (points + (0, 0, .5)) @ turn.T
        return points * (distance / (distance - points[:, 2:])) ** (1, 1, 0)

    points = view(controls[:68])
    # 300W labels the visible contour: a jaw point hidden by the cheek moves along its ray to it.
    rays = view(RAYS @ controls)[:, :2].reshape(*RAYS_SHAPE, 2)
    normal = numpy.gradient(controls[:17, :2], axis=0)[:, ::-1] * (-1, 1)
    normal = normal @ turn[:2, :2].T
    outward = numpy.einsum("rjk,jk->rj", rays, normal)
    points[:17, :2] = rays[outward.argmax(0), numpy.arange(17)]
    low, high = points[:, :2].min(0), points[:, :2].max(0)
    scale = size * rng.uniform(.4, .48) / (high - low).max()
    shift = size * (.5 + rng.uniform(-.03, .03, 2)) - scale * (low + high) / 2

    def project(points):
        return view(numpy.asarray(points)) * (scale, scale, 1) + (*shift, 0)

    return project, points[:, :2] * scale + shift, turn, scale


def lighting(mesh: numpy.ndarray, light: numpy.ndarray, ambient: float, shape: tuple[int, int]
             ) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Shade a mesh.

    Args:
        mesh: projected points (rings, rays, 3) in pixels of the image.
        light: direction (3,) towards the light.
        ambient: share of the light that comes from all directions.
        shape: height and width of the image.

    Returns:
        Shade, about 1 on average, and coverage in 0..1, both (*shape, 1).
    """
    light = light / numpy.linalg.norm(light)
    ring = numpy.concatenate([mesh, mesh[:, :1]], 1)
    corners = numpy.stack([ring[:-1, :-1], ring[:-1, 1:], ring[1:, 1:], ring[1:, :-1]], 2)
    corners = corners.reshape(-1, 4, 3)
    normal = numpy.cross(corners[:, 1] - corners[:, 3], corners[:, 2] - corners[:, 0])
    normal /= numpy.linalg.norm(normal, axis=1, keepdims=True) + 1e-9
    glance = (normal @ ((light + (0, 0, 1)) / numpy.linalg.norm(light + (0, 0, 1)))).clip(0)
    value = ambient + (1 - ambient) * (normal @ light).clip(0) + .18 * glance ** 12
    value *= .6 + .4 * normal[:, 2].clip(0) ** .5
    value /= value[normal[:, 2] > .3].mean()
    half = [-(-side // 2) for side in shape]
    shade = numpy.zeros((*half, 2), numpy.uint8)
    points = numpy.round(corners[:, :, :2] * 8 - 4).astype(numpy.int32)
    order = numpy.argsort(corners[:, :, 2].mean(1))
    order = order[normal[order, 2] > 0]
    for quad, tone in zip(points[order], (value[order] * 140).clip(0, 255).tolist()):
        cv2.fillConvexPoly(shade, quad, (tone, 255), shift=4)
    # Division by the blurred coverage avoids a dark rim at the edge of the face.
    blur = numpy.ptp(mesh[..., 1]) / 130
    shade, filled = cv2.split(cv2.GaussianBlur(shade, (0, 0), blur).astype(numpy.float32))
    shade = cv2.resize(shade / (filled + 1) * numpy.float32(255 / 140), shape[::-1])
    cover = numpy.zeros(shape, numpy.uint8)
    for ring in numpy.round(mesh[4:, :, :2] * 16).astype(numpy.int32):
        cv2.fillPoly(cover, [ring], 255, cv2.LINE_AA, 4)
    return shade[..., None], cover[..., None] * numpy.float32(1 / 255)
