"""Draw synthetic faces whose 68 landmarks of 300W are known exactly.

`render` makes one face from a seed. utils.data.drawn_faces.shape gives its 3D shape, pose and
shading; the functions here paint background, body, facial features, hair, glasses and occluders,
and finally the exposure and noise of a photo. All colours are float32 RGB in 0..255 until then.
"""
from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy

from utils.data.drawn_faces.shape import MESH, MESH_SHAPE, face_shape, lighting, pose, smooth

_SKINS = numpy.array([
    (255, 224, 196), (240, 200, 172), (228, 184, 150), (214, 160, 124), (190, 134, 98),
    (156, 104, 72), (118, 76, 52), (84, 54, 40)])
_HAIRS = numpy.array([
    (22, 19, 18), (44, 30, 22), (78, 52, 34), (116, 78, 46), (186, 146, 92), (224, 196, 140),
    (120, 58, 30), (150, 148, 146), (222, 220, 216)])
_IRISES = ((70, 46, 30), (44, 28, 20), (90, 110, 130), (90, 100, 60))


def _stamp(image, outline, paint, alpha=1.0, blur=0.0, width=None, closed=True):
    """Blend paint into a float32 image (H, W, 3), in place.

    Args:
        image: the image.
        outline: polygon (n, 2) in pixels.
        paint: a colour, or an image like `image`.
        alpha: opacity.
        blur: standard deviation of the soft edge in pixels.
        width: width of a line along the outline; None: fill the outline.
        closed: whether the line is closed.
    """
    if alpha < .02 or len(outline) < 2:
        return
    outline = numpy.ascontiguousarray(numpy.asarray(outline)[:, :2], numpy.float32)
    coarse = max(1, int(blur / 1.5))
    x, y, wide, high = cv2.boundingRect(outline)
    grow = 2 + int(2.5 * blur) + (width or 0)
    x0, x1 = max(x - grow, 0), min(x + wide + grow, image.shape[1])
    y0, y1 = max(y - grow, 0), min(y + high + grow, image.shape[0])
    if x1 <= x0 or y1 <= y0:
        return
    # A soft mask is drawn at low resolution, where a wide blur costs little.
    mask = numpy.zeros((-(-(y1 - y0) // coarse), -(-(x1 - x0) // coarse)), numpy.uint8)
    points = [numpy.round(((outline - (x0, y0) + .5) / coarse - .5) * 16).astype(numpy.int32)]
    if width is None:
        cv2.fillPoly(mask, points, 255, cv2.LINE_AA, 4)
    else:
        cv2.polylines(mask, points, closed, 255, max(1, width // coarse), cv2.LINE_AA, 4)
    if blur > .3:
        mask = cv2.GaussianBlur(mask, (0, 0), blur / coarse)
    if coarse > 1:
        mask = cv2.resize(mask, (mask.shape[1] * coarse, mask.shape[0] * coarse))
        mask = mask[:y1 - y0, :x1 - x0]
    part = image[y0:y1, x0:x1]
    paint = paint[y0:y1, x0:x1] if getattr(paint, "ndim", 1) == 3 else numpy.float32(paint)
    part += (paint - part) * (mask * numpy.float32(alpha / 255))[..., None]


def _noise(rng, shape, size):
    small = rng.standard_normal(shape, numpy.float32)
    return cv2.resize(small, (size, size), interpolation=cv2.INTER_CUBIC)


def _backdrop(rng, size):
    image = _noise(rng, (*rng.integers(2, 9, 2), 3), size) * rng.uniform(5, 60)
    image += numpy.float32(rng.uniform(40, 220))
    for _ in range(rng.integers(0, 9)):
        place = rng.uniform(0, size, 2) + rng.normal(0, size / 5, (rng.integers(3, 7), 2))
        _stamp(image, place, rng.uniform(0, 255, 3), rng.uniform(.2, 1), rng.choice([0, 2, 4]),
               rng.choice([None, 2, 5]))
    grey = image.mean(2, keepdims=True)
    return grey + (image - grey) * numpy.float32(rng.uniform(.05, .8))


def _body(rng, image, project, points, turn, unit, skin, hair, strands):
    """Paint shoulders, neck, the hair behind the face and the ears."""
    sphere = numpy.array([(numpy.cos(a) * numpy.cos(b), numpy.sin(b), numpy.sin(a) * numpy.cos(b))
                          for a in numpy.arange(0, 6.28, .4) for b in numpy.arange(-1.5, 1.6, .3)])
    volume = rng.choice([1.0, rng.uniform(1.02, 1.12), rng.uniform(1.1, 1.4)])
    skull = project(sphere * (1.06 * volume, 1.12 * volume, 1.15) + (0, -.72, -.95))
    neck = numpy.array([(-.62, .3, -1), (-.56, 1.3, -1.1), (-.95, 1.75, -1.1), (-2.3, 2.2, -1.2),
                        (-3, 5, -1.2)])
    neck = project(numpy.concatenate([neck, neck[::-1] * (-1, 1, 1)]))
    collar = project([(.8, 1.75, -.9), (0, rng.uniform(1.6, 2.6), -.8), (-.8, 1.75, -.9)])
    dress = numpy.concatenate([neck[3:7] + rng.normal(0, unit / 12, (4, 2)), collar])
    if rng.random() < .4:
        fall, wide = rng.uniform(.2, 2.2), rng.uniform(1, 1.5)
        low = project([(-wide, fall, -1.2), (wide, fall, -1.2)])
        fall = cv2.convexHull(numpy.concatenate([skull, low]).astype(numpy.float32))[:, 0]
        fall = smooth(fall + rng.normal(0, unit * .035, fall.shape))
        _stamp(image, fall, strands * numpy.float32(.7), 1, 1)
    throat = numpy.full_like(image, skin * rng.uniform(.75, .95))
    _stamp(throat, points[2:15] + turn[:2, 1] * unit * .2, skin * .3, .7, unit * .12)
    for side in (slice(0, 3), slice(7, 10)):
        _stamp(throat, neck[side], skin * .4, .5, unit * .1, int(unit * .25), False)
    _stamp(image, neck, throat)
    _stamp(image, dress, rng.uniform(10, 245, 3))
    hull = cv2.convexHull(skull.astype(numpy.float32))[:, 0]
    hull = smooth(hull + rng.normal(0, unit * .017, hull.shape), steps=2)
    _stamp(image, hull, strands if hair is not None else skin * .8, 1, .8)
    for side in (-1, 1):
        a = numpy.arange(0, 6.28, .5)[:, None]
        ear = numpy.array([1.0, -.33, -1.12]) * (side, 1, 1) + numpy.sin(a) * (0, .33, .03) + \
            numpy.cos(a) * (side * .1, 0, -.17)
        ear = project(ear)
        _stamp(image, ear, skin * .85)
        _stamp(image, ear * .55 + ear.mean(0) * .45, skin * .55, .7, unit * .02)


def _features(rng, face, p, at, skin, hair, unit, gaze, turn):
    """Paint brows, eyes, nose and lips over the skin, without shading.

    Args:
        rng: random number generator.
        face: float32 image of the skin.
        p: landmarks (68, 2) in its pixels.
        at: the face's unit vectors to the right and down, (2, 2), in the image.
        skin: its colour.
        hair: its colour, or None for a bald head.
        unit: half the width of the face in pixels.
        gaze: shift (2,) of the irises in pixels.
        turn: rotation (3, 3) of the head.
    """
    dark, thin = skin * (.42, .36, .36), max(1, round(unit / 60))
    brow = skin * .3 if hair is None else .5 * dark + .5 * hair * rng.uniform(.4, 1)
    lip = skin * (.92, .66, .66)
    lip = rng.choice([lip, rng.uniform((120, 20, 40), (220, 90, 110))], p=[.7, .3])
    _stamp(face, p[[3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 54, 35, 33, 31, 48]], brow,
           rng.choice([0, 0, rng.uniform(0, .35), rng.uniform(.3, .9)]), unit * .09)
    colour, lash = _IRISES[rng.integers(len(_IRISES))], int(rng.integers(0, 2))
    for first, eye in ((17, 36), (22, 42)):
        lids = p[eye:eye + 6]
        middle, wide = lids.mean(0), numpy.linalg.norm(lids[3] - lids[0])
        _stamp(face, middle + (lids - middle) * (1.35, 2.2), skin * (.7, .62, .62),
               rng.uniform(.15, .7), wide * .14)
        _stamp(face, lids[:4] + (lids[:4] - lids[3:].mean(0)) * .25 - at[1] * wide * .12, dark,
               rng.uniform(.2, .7), .5, thin, False)
        upper, lower = smooth(lids[:4], False), smooth(lids[[3, 4, 5, 0]], False)
        opening = numpy.concatenate([upper, lower[1:-1]])
        x, y = numpy.clip(middle - wide, 0, len(face) - 8).astype(int)
        view = face[y:y + int(2 * wide) + 2, x:x + int(2 * wide) + 2]
        inner, centre = view.copy(), (middle + lids[[1, 2]].mean(0)) / 2 + gaze - (x, y)
        _stamp(inner, opening - (x, y), rng.uniform(195, 245) * numpy.array([1, .96, .94]))
        ring = numpy.arange(0, 6.28, .45)[:, None]
        iris = (numpy.cos(ring) * turn[:2, 0] + numpy.sin(ring) * turn[:2, 1]) * unit * .098
        _stamp(inner, centre + iris, colour, 1, .4)
        _stamp(inner, centre + iris * .45, (12, 10, 10))
        _stamp(inner, centre + iris * .18 - unit * .03, (255, 255, 255), .9)
        _stamp(inner, upper - (x, y), (20, 10, 10), .5, unit * .02, thin + 1, False)
        _stamp(view, opening - (x, y), inner)
        _stamp(face, upper, dark * .5, rng.uniform(.6, 1), .4, thin + lash, False)
        _stamp(face, lower, dark, rng.uniform(.2, .8), .4, thin, False)
        line = smooth(p[first:first + 5], False)
        thick = unit * rng.uniform(.03, .065) * numpy.interp(
            numpy.arange(17), (0, 10, 16), (.35, 1, .9)[::1 if first == 17 else -1])[:, None]
        line = numpy.concatenate([line - at[1] * thick, (line + at[1] * thick)[::-1]])
        _stamp(face, line, brow, rng.uniform(.55, 1), unit * .012)
    for wing, middle, side in ((31, 32, 48), (35, 34, 54)):
        _stamp(face, p[[wing, middle, 33]] + at[1] * unit * .02, dark, .5, unit * .02, thin, False)
        hole = p[middle] * .75 + p[wing] * .25 - at[1] * unit * .035
        _stamp(face, hole + (numpy.cos(ring) * at[0] + numpy.sin(ring) * at[1] * .5) * unit * .05,
               dark * .6, .9, unit * .012)
        edge = p[wing] + numpy.outer((-.15, -.07, 0), at[1]) * unit + (p[wing] - p[33]) * .12
        _stamp(face, edge, dark, rng.uniform(.2, .6), unit * .015, thin, False)
        fold = p[[wing, side]] + (p[[wing, side]] - p[33]) * .14
        _stamp(face, fold, dark, rng.uniform(0, .45), unit * .025, thin + 1, False)
    _stamp(face, p[27:31] - at[1] * unit * .02, (255, 255, 255), .16, unit * .025, 2 * thin, False)
    outer = numpy.concatenate([smooth(p[48:55], False),
                               smooth(p[[54, 55, 56, 57, 58, 59, 48]], False)[1:-1]])
    _stamp(face, p[55:60] + at[1] * unit * .09, dark, .35, unit * .04, 3 * thin, False)
    _stamp(face, outer, lip, rng.uniform(.55, 1), unit * .01)
    mouth = numpy.concatenate([smooth(p[60:65], False), smooth(p[[64, 65, 66, 67, 60]], False)])
    _stamp(face, mouth, (52, 18, 20))
    if rng.random() < .75:
        teeth = numpy.concatenate([p[60:65], p[[63, 62, 61]] * .45 + p[[65, 66, 67]] * .55])
        _stamp(face, teeth, rng.uniform(190, 240) * numpy.array([1, .97, .9]), .95)
    _stamp(face, mouth, dark * .6, .9, .4, thin, True)


def _extras(rng, image, project, controls, mesh, p, hair, strands, unit):
    """Paint fringe, side hair, glasses and occluders."""
    # The far side of the hairline is hidden when the head is turned.
    seen = numpy.less(*numpy.linalg.norm(mesh[[12, 14], :, :2] - p[27], axis=2))
    if hair is not None:
        # Inner rings of the mesh are lower on the forehead; without a fringe only the hairline is
        # softened.
        low = rng.uniform(.95, .99)
        if rng.random() < .5:
            low = rng.uniform(.74, .95) + rng.uniform(-.1, .1) * numpy.linspace(-1, 1, 19)
        rays = numpy.arange(33, 52)[seen[33:52]]
        at = numpy.clip((low + rng.normal(0, .012, 19)) * 14, 9.5, 13.9)[seen[33:52]]
        share, ring = (at % 1)[:, None], at.astype(int)
        edge = mesh[ring, rays] * (1 - share) + mesh[ring + 1, rays] * share
        edge = numpy.concatenate([edge, (mesh[14, rays] * 1.03 - .03 * mesh[0, 0])[::-1]])
        _stamp(image, edge, strands * numpy.float32(rng.uniform(.85, 1.1)), 1, unit * .025)
    if hair is not None and rng.random() < .3:
        last, out = rng.integers(2, 8), rng.uniform(1.15, 1.35)
        for rays in (numpy.r_[43:52, 0:2 * last], numpy.r_[41:32 - 2 * last:-1]):
            lock = mesh[14, rays[seen[rays]], :2]
            inner = lock + (p[30] - lock) * rng.uniform(.02, .12)
            lock = numpy.concatenate([lock * out + (1 - out) * p[30], inner[:2:-1]])
            _stamp(image, lock, strands, 1, unit * .02)
    if rng.random() < .16:
        ring = numpy.arange(0, 6.28, .3)[:, None]
        wide, high, power = rng.uniform(.3, .4), rng.uniform(.2, .34), rng.uniform(.5, 1)
        shape = numpy.concatenate([numpy.cos(ring), numpy.sin(ring)], 1)
        shape = numpy.sign(shape) * numpy.abs(shape) ** power * (wide, high)
        colour, width = rng.uniform(0, 120, 3) * rng.random(), int(rng.integers(1, 5))
        tint = rng.choice([0, .12, .9], p=[.5, .3, .2])
        for side, eye, ear in ((-1, 36, 0), (1, 42, 16)):
            centre = controls[eye:eye + 6].mean(0) * (1, 1, 0) + (0, .05, .02)
            lens = project(numpy.column_stack([shape, 0 * ring]) + centre)[:, :2]
            _stamp(image, lens, colour * .5, tint)
            _stamp(image, lens, colour, 1, 0, width)
            arm = project([centre + (side * wide, 0, 0), controls[ear] + (0, -.1, 0)])[:, :2]
            _stamp(image, arm, colour, (arm[1] - arm[0]) @ (arm[0] - p[27]) > 0, 0, width, False)
        bridge = project([(-.12, -.55, .08), (0, -.6, .12), (.12, -.55, .08)])
        _stamp(image, bridge, colour, 1, 0, width, False)
    if rng.random() < .12:
        spot = p[rng.integers(0, 68)] + rng.normal(0, unit * .3, 2)
        for i in range(rng.integers(1, 5)):
            end = spot + rng.normal(0, unit * .7, 2)
            _stamp(image, [spot + i * unit * .15, end + i * unit * .15], rng.uniform(60, 220, 3),
                   1, .6, int(unit * rng.uniform(.12, .3)), False)


def _develop(rng, image):
    """Add exposure, colour cast, greyscale, softness and grain; convert float32 to uint8."""
    image = cv2.convertScaleAbs(cv2.max(image, 0.))
    if rng.random() < .12:
        image = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    curve = numpy.linspace(0, 1, 256)[:, None] ** (numpy.exp(rng.normal(0, .25, 1)))
    curve = curve * rng.normal(1, .05, 3) * rng.uniform(.72, 1.05) + rng.uniform(0, .08)
    image = cv2.LUT(image, (numpy.clip(curve, 0, 1) * 255).astype(numpy.uint8)[None])
    if rng.random() < .5:
        small = [int(len(image) * rng.uniform(.3, 1))] * 2
        image = cv2.resize(cv2.resize(image, small, interpolation=cv2.INTER_AREA), image.shape[:2])
    grain = rng.standard_normal(image.shape[:2], numpy.float32) * numpy.float32(rng.uniform(0, 9))
    return cv2.add(image, cv2.merge([grain] * 3), dtype=cv2.CV_8U)


def render(seed: int | Sequence[int], size: int = 320, rasterise: bool = True
           ) -> tuple[numpy.ndarray | None, numpy.ndarray]:
    """Draw a face.

    Args:
        seed: determines the face completely.
        size: side of the image in pixels.
        rasterise: if False, compute only the landmarks.

    Returns:
        Image, RGB uint8 (size, size, 3), or None; and 300W landmarks (68, 2) in its pixels.
    """
    rng = numpy.random.default_rng(seed)
    controls = face_shape(rng)
    project, points, turn, unit = pose(rng, controls, size)
    if not rasterise:
        return None, points
    skin = _SKINS[int(len(_SKINS) * rng.random() ** 1.4)] * rng.normal(rng.uniform(.74, 1), .04, 3)
    hair = _HAIRS[rng.integers(len(_HAIRS))] * rng.uniform(.8, 1.2, 3)
    hair = rng.choice([hair, rng.uniform(10, 240, 3)], p=[.92, .08]) if rng.random() > .07 else None
    half = (size + 1) // 2
    streaks = 1 + numpy.float32(.25) * _noise(rng, (rng.integers(4, 12), 90), half)[..., None]
    strands = numpy.float32(skin * .8 if hair is None else hair) * streaks
    light = rng.normal((0, -.35, .75), (.6, .35, .15))
    mesh = project(MESH @ controls).reshape(*MESH_SHAPE, 3)
    # Everything behind the face is drawn at half size, which is faster and as soft as in photos.
    image = _backdrop(rng, half)
    _body(rng, image, lambda points: project(points)[:, :2] / 2 - .25, points / 2 - .25, turn,
          unit / 2, skin, hair, strands)
    image, strands = cv2.resize(image, (size, size)), cv2.resize(strands, (size, size))
    corner = numpy.clip(mesh[..., :2].min((0, 1)) - 4, 0, size).astype(int)
    far = numpy.clip(mesh[..., :2].max((0, 1)) + 4, 0, size).astype(int)
    view = image[corner[1]:far[1], corner[0]:far[0]]
    spots = _noise(rng, (24, 24), size)[:len(view), :view.shape[1], None]
    face = numpy.float32(skin) * (1 + numpy.float32(.02) * spots)
    _features(rng, face, points - corner, turn[:2, :2].T, skin, hair, unit,
              rng.normal(0, .03, 2) * unit, turn)
    shade, cover = lighting((mesh - (*corner, 0)) * (1, 1, unit), light, rng.uniform(.45, .8),
                            view.shape[:2])
    view += (face * shade - view) * cover
    _extras(rng, image, project, controls, mesh, points, hair, strands, unit)
    return _develop(rng, image), points
