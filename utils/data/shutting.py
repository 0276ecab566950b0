"""Open eyes to shut ones: a picture's lids are drawn together, and the landmarks with them."""
import cv2
import numpy

from utils.landmarks import eyelids

# How far above the upper and below the lower lid skin is stretched, in widths of the eye: to the
# brow, and half way to the cheekbone.
ABOVE, BELOW = 0.55, 0.4
EDGE = 0.04  # The lid's dark edge and the lashes, which come along with it.


def shut(image, points, scheme, share=1.0):
    """A face with its lids drawn together: image (S, S, 3) uint8 and landmarks (K, 2) in pixels.

    share: of the way to where the lids meet. The eyeball goes, lid skin is stretched over it, and
    nothing moves beyond brow and cheek; the landmarks are exact by construction.
    """
    for contour in scheme.eyes:
        if numpy.isnan(points[contour]).any():
            continue  # Without all its landmarks an eye stays as it is.
        image = _shut_eye(image, eyelids.Eye(points, contour), share)
    return image, eyelids.close(points, scheme, share)


def _shut_eye(image, eye, share):
    height, width = image.shape[:2]
    middle = eye.origin + eye.along / 2
    reach = eye.width * 1.2
    left, top = numpy.maximum(numpy.floor(middle - reach), 0).astype(int)
    right, bottom = numpy.minimum(numpy.ceil(middle + reach) + 1, (width, height)).astype(int)
    if right - left < 2 or bottom - top < 2 or eye.width < 2:
        return image
    grid = numpy.stack(numpy.meshgrid(numpy.arange(left, right), numpy.arange(top, bottom)), -1)
    local = eye.local(grid.astype(numpy.float64))
    s, t = local[..., 0], local[..., 1]
    upper, lower, meeting = (eye.height(curve, s)
                             for curve in (eye.upper, eye.lower, eye.meeting))
    moved = source(t, upper, numpy.maximum(lower, upper), meeting, share)
    local[..., 1] = numpy.where((s > 0) & (s < 1), moved, t)
    at = eye.outer(local).astype(numpy.float32)
    image = image.copy()
    image[top:bottom, left:right] = cv2.remap(image, at[..., 0], at[..., 1], cv2.INTER_LINEAR,
                                              borderMode=cv2.BORDER_REPLICATE)
    return image


def source(t, upper, lower, meeting, share, where=numpy.where):
    """Where a picture of lids drawn together takes its pixels from, along columns of an eye.

    t: of the pixels, down across the eye; upper, lower, meeting: of the lids' curves above or below
    them, all in widths of the eye, as arrays or, with torch.where, tensors. share: of the way.
    """
    # The band of each column, before and after; beyond it nothing moves.
    first, last = upper - ABOVE, lower + BELOW
    edge = ((lower - upper) / 2).clip(max=EDGE)
    new_upper = upper + share * (meeting - upper)
    new_lower = lower + share * (meeting - lower)
    from_upper = upper + share * edge
    above = first + (t - first) * (from_upper - first) / (new_upper - first).clip(min=1e-6)
    below = last - (last - t) * (last - lower) / (last - new_lower).clip(min=1e-6)
    between = from_upper + (t - new_upper) * (lower - from_upper) \
        / (new_lower - new_upper).clip(min=1e-6)
    moved = where(t < new_upper, above, where(t > new_lower, below, between))
    return where((t > first) & (t < last), moved, t)
