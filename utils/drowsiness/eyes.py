"""Eye state in one image: how open each eye is, whether both are closed, whether they look down.

`read_eyes` turns the landmarks of a face into eye aspect ratios, converts these to openness with
the thresholds that come with the model, and leaves out eyes that are too small, turned away,
uncertain or outside the image. With the image, it corrects the openness by what patches of the
eyes show (eye_patch.py), and tells eyes that look down from closed ones.
`utils.drowsiness.states` follows the result over time.
"""
from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy

from utils.drowsiness import eye_patch
from utils.landmarks import pose
from utils.landmarks.eyelids import aspect_ratio, aspect_ratios

if TYPE_CHECKING:
    from utils.landmarks.eyelids import EyeThresholds
    from utils.landmarks.schemes import Scheme

# Smallest width of an eye between its corners in pixels. On 209 faces with open and closed eyes,
# reduced in size, the area under the ROC curve falls from 0.996 (10 px) over 0.994 (8 px) and 0.986
# (6 px) to 0.958 (4 px), which is still useful for a small face.
MIN_WIDTH = 4.0
# Smallest width of an eye as a share of the other one's: a narrower eye is turned away.
MIN_WIDTH_RATIO = 0.45
# Yaw in degrees beyond which the far eye is not judged, whatever its landmarks look like.
FAR_YAW = 35.0
# A pitched head is evidence of looking down: per degree below PITCH_FROM, PITCH_WEIGHT is added to
# the logit of `down`, for PITCH_RANGE degrees at most. The pitch of 184 faces that look down and of
# 508 with shut eyes has means of -14 and -4 degrees and a deviation of 11: their log odds grow by
# 10 / 11 ** 2 a degree, and are even at -9.
PITCH_FROM, PITCH_WEIGHT, PITCH_RANGE = -9.0, 0.083, 20.0
# The log odds of a shut eye in a patch, less SHUT_FROM, reduce the openness by PATCH_WEIGHT each,
# and by PATCH_LIMIT at most; lower odds raise it. The other eye's logits count with OTHER_EYE. With
# the landmarks of `tiny`, 97 % of the shut faces of the part `choose` of tools/splits are called
# closed, 6 % of those that look down and 1.1 % of the open ones, laughing and squinting ones among
# them (a SHUT_FROM of -1.4 with a limit of 0.6: 99, 12 and 2.7 %). Lids apart by 0.6, as landmarks
# are where make-up hides that they are closed, need log odds of 0.75.
SHUT_FROM, PATCH_WEIGHT, PATCH_LIMIT, OTHER_EYE = -0.4, 0.35, 0.5, 0.3
# Patches raise the openness to RAISED_OPENNESS at most: more than any model's threshold of closed
# eyes, and less than the level of a blink, so that drooping lids and blinks keep their openness.
RAISED_OPENNESS = 0.4
# A patch with a standard deviation below MIN_CONTRAST grey levels shows nothing of an eye.
MIN_CONTRAST = 3.0
# With both eyes at least this open by their landmarks, no patch is cut, which saves time while a
# driver looks at the road: lowered lids read less, also where make-up hides them (0.6).
WIDE_OPEN = 0.85
# Least openness of an eye that looks down: above the level that ends a blink.
DOWN_OPENNESS = 0.6


@dataclasses.dataclass(frozen=True)
class Eyes:
    """The eyes of a face in one image.

    Attributes:
        openness: of the right and left eye, 0 (closed) to 1; None for an eye that cannot be judged.
            At least DOWN_OPENNESS where the face looks down.
        closed: whether the eyes are closed; None where neither can be judged.
        ratios: eye aspect ratios of the right and left eye.
        down: probability that the right and left eye look down, with the lid lowered and the iris
            in sight, 0 where both are wide open; None for an eye that cannot be judged, or where
            this was not asked for.
        looks_down: whether the face looks down, `closed` is False then; None where not known.
        levels: the openness of the right and left eye before it is limited, also of eyes that
            cannot be judged: what faces are ranked by.
        mouth: height to width of the opening of the mouth; None where the scheme has no contour
            of it.
        yaw: of the head in degrees, as of pose.head_pose; NaN or None where not known.
    """
    openness: tuple[float | None, float | None]
    closed: bool | None
    ratios: tuple[float, float]
    down: tuple[float | None, float | None] = (None, None)
    looks_down: bool | None = None
    levels: tuple[float, float] | None = None
    mouth: float | None = None
    yaw: float | None = None


def read_eyes(points_px: numpy.ndarray, confidence: numpy.ndarray, scheme: Scheme,
              thresholds: EyeThresholds, shape: tuple[int, ...] | None = None,
              image: numpy.ndarray | None = None) -> Eyes:
    """Read the eyes of a face from its landmarks.

    The openness is a linear function of the eye aspect ratio (Soukupova and Cech, "Real-Time Eye
    Blink Detection using Facial Landmarks", 2016), see EyeThresholds.

    Args:
        points_px: landmarks (K, 2) in pixels, without smoothing.
        confidence: (K,).
        scheme: of the landmarks.
        thresholds: of the model that predicted them.
        shape: (H, W, ...) of the image; eyes outside of it are not judged. None: not known.
        image: RGB uint8 (H, W, 3), in which eyes that look down are told from closed ones; None:
            `down` and `looks_down` are not known.

    Raises:
        UserError: where the scheme has no eye contours.
    """
    ratios = tuple(float(ratio) for ratio in aspect_ratios(points_px, scheme))
    corners = [[contour[0], contour[len(contour) // 2]] for contour in scheme.eyes]
    widths = [float(numpy.linalg.norm(points_px[b] - points_px[a])) for a, b in corners]
    min_width = max(MIN_WIDTH, MIN_WIDTH_RATIO * max(widths))
    shape = image.shape if shape is None and image is not None else shape
    judged = [width >= min_width and confidence[contour].mean() >= thresholds.min_confidence
              and (shape is None or _is_inside(points_px[contour], shape))
              for width, contour in zip(widths, scheme.eyes)]
    angles = pose.head_pose(points_px, scheme) if image is not None and pose.is_known(scheme) \
        else (numpy.nan,) * 3
    # A face turned to the right of the image hides the person's left eye, which is still evidence.
    shown = judged
    judged = [known and not angle > FAR_YAW for known, angle in zip(judged, (-angles[0],
                                                                             angles[0]))]
    lips = scheme.regions.get("inner lips", ())
    mouth = float(aspect_ratio(points_px, lips)) if len(lips) > 4 else None
    levels = [(ratio - thresholds.shut) / (thresholds.open - thresholds.shut) for ratio in ratios]
    openness, logits = [min(max(level, 0.0), 1.0) for level in levels], None
    is_wide = min(openness) >= WIDE_OPEN
    if image is not None and any(judged) and not is_wide:
        logits = _logits(points_px, scheme, image, angles[1])
    if logits is not None:
        blended = logits + OTHER_EYE * (logits[::-1] - logits) if all(shown) else logits
        levels = [value - _correction(row) for value, row in zip(openness, blended)]
        openness = [max(min(level, max(value, RAISED_OPENNESS)), 0.0)
                    for level, value in zip(levels, openness)]
    openness = [value if known else None for value, known in zip(openness, judged)]
    # An eye that is clearly shut outweighs one that is hidden or blurred.
    known = [value if logits is None else level
             for level, value in zip(levels, openness) if value is not None]
    closed = sum(known) / len(known) <= thresholds.closed_below if known else None
    if logits is None:
        certain = image is not None and is_wide and any(judged)
        down = tuple(0.0 if certain and one else None for one in judged)
        return Eyes(tuple(openness), closed, ratios, down, False if certain else None,
                    tuple(levels), mouth, angles[0])
    mean = numpy.mean([row for row, one in zip(logits, shown) if one], 0)
    looks_down = bool(not closed and mean[1] > mean[0])
    if looks_down:
        openness = [None if value is None else max(value, DOWN_OPENNESS) for value in openness]
    odds = numpy.exp(logits - logits.max(1, keepdims=True))
    down = tuple(float(row[1] / row.sum()) if one else None for row, one in zip(odds, judged))
    return Eyes(tuple(openness), closed, ratios, down, looks_down, tuple(levels), mouth,
                angles[0])


def _logits(points_px, scheme, image, pitch):
    """Return logits (2, 3) of open, looking down and shut, the pitch of the head included.

    None where no patch has contrast; where one has none, both rows are those of the other.
    """
    patches = eye_patch.cut_eyes(image, points_px, scheme)
    clear = patches.std((1, 2)) >= MIN_CONTRAST
    if not clear.any():
        return None
    logits = eye_patch.shipped()(patches)
    if not clear.all():
        logits[~clear] = logits[clear]
    if numpy.isfinite(pitch):
        logits[:, 1] += PITCH_WEIGHT * min(max(PITCH_FROM - pitch, 0.0), PITCH_RANGE)
    return logits


def _correction(logits):
    """Return by how much the logits (3,) of an eye's patch reduce its openness."""
    evidence = float(logits[2] - numpy.logaddexp(logits[0], logits[1]))
    return min(max(PATCH_WEIGHT * (evidence - SHUT_FROM), -PATCH_LIMIT), PATCH_LIMIT)


def _is_inside(points_px, shape):
    return bool((points_px >= 0).all() and (points_px <= (shape[1] - 1, shape[0] - 1)).all())
