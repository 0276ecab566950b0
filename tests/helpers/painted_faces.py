"""Frames with painted squares as faces, and a model and a detector that find them exactly."""
import cv2
import numpy

from utils.detection.detector import Detector
from utils.landmarks.schemes import SCHEMES

SIZE = 64


def background(seed=0, height=240, width=320):
    """Return a textured RGB uint8 frame without a face; its green is bright, that of faces dark."""
    rough = numpy.random.default_rng(seed).integers(90, 200, (9, 12, 3), numpy.uint8)
    return cv2.resize(rough, (width, height), interpolation=cv2.INTER_CUBIC)


def paint(image, *faces):
    """Return image with faces (number 1..20, centre x, centre y, side), later ones in front."""
    image = image.copy()
    for number, x, y, side in faces:
        x_min, y_min, x_max, y_max = (int(v + half) for half in (-side / 2, side / 2)
                                      for v in (x, y))
        cv2.rectangle(image, (x_min, y_min), (x_max - 1, y_max - 1), (40 + 10 * number, 0, 255), -1)
    return image


def _faces(image):
    """Return {number: mask of its pixels} of the faces in an image."""
    # Wide limits: JPEG and video codecs change colours and blur them at edges.
    is_face = (image[..., 2] > 200) & (image[..., 1] < 60)
    number = numpy.where(is_face, (image[..., 0].astype(int) - 35) // 10, 0)
    found = {}
    for n in numpy.unique(number[(number >= 1) & (number <= 20)]):
        # The largest patch: compression leaves stray pixels of other numbers along edges.
        _, labels, stats, _ = cv2.connectedComponentsWithStats((number == n).astype(numpy.uint8))
        found[int(n)] = labels == 1 + stats[1:, cv2.CC_STAT_AREA].argmax()
    return found


def _extent(mask):
    y, x = numpy.nonzero(mask)
    return numpy.array([x.min(), y.min(), x.max() + 1, y.max() + 1], float)


def find(image):
    """Return painted faces as (n, 5) boxes; a face that is mostly covered is not found."""
    boxes = []
    for mask in _faces(image).values():
        box = _extent(mask)
        side = (box[2:] - box[:2]).max()
        if mask.sum() > 0.7 * side ** 2 and side > 8:
            boxes.append([*(box - 0.5), 0.9])
    return numpy.array(boxes, float).reshape(-1, 5)


class Painted:
    """Stands in for Predictor: the landmarks of the face nearest to the centre of the crop.

    batches: the size of each call. confidence: of a face; without a face it is `blind`.
    """
    input_size = SIZE

    def __init__(self, scheme=SCHEMES["300W"], rule="square", blind=0.05):
        mean = scheme.mean_face
        self.shape = (mean - mean.min(0)) / (mean.max(0) - mean.min(0))
        # The mean face in units of a square crop of scale 1.2 around a painted square.
        self.scheme = scheme.with_mean_face((self.shape - 0.5) / 1.2 + 0.5)
        self.crop = {"rule": rule, "scale": 1.2}
        self.confidence, self.blind, self.noise, self.batches = 0.9, blind, 0.0, []
        self.random = numpy.random.default_rng(0)

    def __call__(self, images):
        assert images.dtype == numpy.uint8
        assert images.shape[1:] == (SIZE, SIZE, 3)
        self.batches.append(len(images))
        points = numpy.tile(self.shape * 0.7 + 0.15, (len(images), 1, 1))
        confidence = numpy.full(points.shape[:2], self.blind)
        for i, image in enumerate(images):
            boxes = [_extent(mask) for mask in _faces(image).values() if mask.sum() > 80]
            if boxes:
                middle = [abs((box[:2] + box[2:]) / 2 - SIZE / 2).max() for box in boxes]
                box = boxes[int(numpy.argmin(middle))] / SIZE
                points[i] = box[:2] + self.shape * (box[2:] - box[:2])
                confidence[i] = self.confidence
        points += self.random.normal(0, 1, points.shape) * self.noise
        return points.astype(numpy.float32), confidence.astype(numpy.float32)


def detector():
    """Return a Detector of painted faces, whose boxes are those of the landmarks."""
    return Detector("painted", find, (0.0, 0.0, 1.0))
