"""Face detectors: frames in, boxes out. They only start a face; the landmarks take over."""
import dataclasses
import functools
import pathlib

import cv2
import numpy

from utils.errors import UserError

SIDE = 640  # The longer side at which every detector looks at a photo.
# And at which it takes a quick look. On LFPW faces in frames of 640 x 360 with landmarks 32, 48, 64
# and 96 px wide, yunet finds 79, 96, 100 and 100 % of them so, haar 28, 81, 89 and 97 %; at SIDE
# yunet finds all and haar 91, 99, 99 and 99 %, for three to four times the work.
QUICK_SIDE = 320
HINT = ("use haar (built in), or the path of a YuNet or SCRFD .onnx file (the README says where to "
        "get them)")
# Where the square around a face's 68 landmarks (its side: the larger side of their box) lies in the
# detector's box: shift of the centre, and side, in sides of the detector's box. Medians over the
# 2012 training photos of ../shared/data/300W (afw, helen, lfpw) where the face was found (overlap
# of 0.3 or more: haar 1891, yunet and scrfd 2012); dx, at most 0.006, is 0 by symmetry. Measure
# again after a change to a detector's settings.
RELATIONS = {"haar": (0, 0.147, 0.871), "yunet": (0, 0.123, 0.779), "scrfd": (0, 0.130, 0.776)}
# A face whose box is larger than this share of the picture's longer side may be cut off by it, and
# is looked for again with this border. Of 1396 tight crops of ../shared/data/eyes yunet finds 1364
# at the first look and 1394 at both, and its score goes up by 0.13 (median).
FILLED, BORDER = 0.6, 0.5


@dataclasses.dataclass(frozen=True)
class Detector:
    """A face detector: `detector(image)` for RGB uint8 (H, W, 3) gives (n, 5) float64 rows x_min,
    y_min, x_max, y_max in pixels and score, best first.

    relation: (dx, dy, ratio) of the landmarks' square to the box; see RELATIONS. find_quick: a
    cheaper find that may miss small faces, where there is one.
    """
    name: str
    find: object
    relation: tuple
    find_quick: object = None

    def __call__(self, image):
        boxes = numpy.asarray(self.find(image), numpy.float64).reshape(-1, 5)
        whole = (boxes[:, 2:4] > boxes[:, :2]).all(1) & numpy.isfinite(boxes).all(1)
        boxes = boxes[whole]
        # By place where scores are equal: Haar's threads give boxes in any order.
        return boxes[numpy.lexsort((boxes[:, 1], boxes[:, 0], -boxes[:, 4]))]

    def quick(self):
        """This detector at a look of a few ms, in which it misses small faces; itself where it has
        none.
        """
        return dataclasses.replace(self, find=self.find_quick) if self.find_quick else self

    def thorough(self):
        """This detector for single pictures: where no face is found, or one that fills the picture,
        it looks again at the picture with a border, and keeps what it is surer of.

        Detectors expect the rest of a head about a face; in tight crops their boxes are too small.
        """
        return dataclasses.replace(self, find=functools.partial(_look_twice, self),
                                   find_quick=None)

    def to_crop(self, boxes, scale=1.2):
        """The square (n, 4) in which a face's landmarks are expected, grown by scale: the nominal
        crop to start with. boxes: (n, 4) or (n, 5) of this detector.
        """
        boxes = numpy.asarray(boxes, numpy.float64)[..., :4].reshape(-1, 4)
        shift_x, shift_y, ratio = self.relation
        side = (boxes[:, 2:] - boxes[:, :2]).max(1, keepdims=True)
        centre = (boxes[:, :2] + boxes[:, 2:]) / 2 + side * (shift_x, shift_y)
        half = side * ratio * scale / 2
        return numpy.concatenate([centre - half, centre + half], 1)

    def same_face(self, boxes, face):
        """The one (4,) of this detector's boxes (n, 5) that is of the face with a box (4,) round
        its landmarks, or None.
        """
        found = matches(face[None], self.to_crop(boxes))[0]
        return boxes[found.argmax(), :4] if found.any() else None


def _look_twice(detector, image):
    boxes = detector(image)
    longer = max(image.shape[:2])
    if len(boxes) and (boxes[0, 2:4] - boxes[0, :2]).max() < FILLED * longer:
        return boxes
    border = round(BORDER * longer)
    wider = cv2.copyMakeBorder(image, *(border,) * 4, cv2.BORDER_REPLICATE)
    again = detector(wider) - (border, border, border, border, 0)
    return max(boxes, again, key=lambda found: found[0, 4] if len(found) else -1)


def get_detector(name):
    """The Detector for `haar` or for a YuNet or SCRFD .onnx file, told apart by their outputs.

    Raises UserError for an unknown name, a missing file and a model of another kind.
    """
    if str(name) == "haar":
        return _haar()
    path = pathlib.Path(name)
    if not path.is_file():
        found = "a folder" if path.is_dir() else "no such file"
        raise UserError(f"detector {name}: {found}; {HINT}")
    import onnxruntime  # Haar alone must not pay for this import.
    options = onnxruntime.SessionOptions()
    # Threads that wait for work at full speed would take a core from the landmarks' network.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        session = onnxruntime.InferenceSession(str(path), options,
                                               providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no public base class.
        raise UserError(f"detector {name}: not a readable ONNX model "
                        f"({str(error).strip().splitlines()[0][:80]}); {HINT}") from None
    outputs = [output.name for output in session.get_outputs()]
    steps = (8, 16, 32)
    if set(outputs) == {f"{kind}_{s}" for kind in ("cls", "obj", "bbox", "kps") for s in steps}:
        return _yunet(path, session)
    if set(outputs) >= {f"{kind}_{s}" for kind in ("score", "bbox") for s in steps}:
        return Detector("scrfd", functools.partial(_find_scrfd, session), RELATIONS["scrfd"],
                        functools.partial(_find_scrfd, session, sides=(QUICK_SIDE,)))
    raise UserError(f"detector {name}: a model with outputs {', '.join(outputs[:4])} is neither "
                    f"YuNet (cls_8, obj_8 ...) nor SCRFD (score_8, bbox_8 ...); {HINT}")


def overlap(boxes, other):
    """Intersection over union (n, m) of boxes (n, 4+) and other (m, 4+)."""
    boxes = numpy.asarray(boxes, numpy.float64)[:, None, :4]
    other = numpy.asarray(other, numpy.float64)[None, :, :4]
    shared = (numpy.minimum(boxes[..., 2:], other[..., 2:])
              - numpy.maximum(boxes[..., :2], other[..., :2])).clip(0).prod(-1)
    area = (boxes[..., 2:] - boxes[..., :2]).prod(-1) + (other[..., 2:] - other[..., :2]).prod(-1)
    return shared / numpy.maximum(area - shared, 1e-9)


def matches(faces, crops):
    """Which boxes (n, 4) round landmarks and crops (m, 4) of a detector may be of one face: their
    overlap (n, m) where the middle of the landmarks lies in the crop, else 0.

    However small that is: points from eyes to mouth fill a quarter of such a crop.
    """
    faces, crops = (numpy.asarray(boxes, numpy.float64) for boxes in (faces, crops))
    middle = (faces[:, None, :2] + faces[:, None, 2:4]) / 2
    inside = (middle > crops[:, :2]) & (middle < crops[:, 2:4])
    return overlap(faces, crops) * inside.all(-1)


def _haar():
    if not hasattr(cv2, "CascadeClassifier"):
        raise UserError(f"detector haar: OpenCV {cv2.__version__} has no Haar cascades; install "
                        f"'opencv-python<5' or give a YuNet or SCRFD .onnx file")
    path = pathlib.Path(cv2.data.haarcascades) / "haarcascade_frontalface_default.xml"
    cascade = cv2.CascadeClassifier(str(path))
    if cascade.empty():
        raise UserError(f"detector haar: {path.name} is missing from OpenCV; reinstall "
                        f"'opencv-python<5'")
    # Faces of 24 to 31 px would cost a quarter more time (72 against 57 ms on a 640 x 360 frame).
    # Twice the step between two sizes and a hit less for a face halve a quick look, which finds 89
    # instead of 91 % of faces of 64 px.
    return Detector("haar", functools.partial(_find_haar, cascade, SIDE, (1.1, 3, 32)),
                    RELATIONS["haar"],
                    functools.partial(_find_haar, cascade, QUICK_SIDE, (1.2, 2, 24)))


def _find_haar(cascade, side, settings, image):
    """Boxes in the image at a longer side of at most `side`; settings: factor between two sizes,
    least hits, least size in pixels.
    """
    step, hits, least = settings
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    scale = min(1.0, side / max(grey.shape))
    if scale < 1:
        size = [max(1, round(side * scale)) for side in grey.shape[::-1]]
        grey = cv2.resize(grey, size, interpolation=cv2.INTER_AREA)
    boxes, count = cascade.detectMultiScale2(grey, step, hits, minSize=(least, least))
    if not len(boxes):
        return []
    boxes = numpy.asarray(boxes, numpy.float64)
    # Pixel centres: x lies (x + 0.5) / scale - 0.5 in the photo.
    corner = numpy.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)
    count = numpy.asarray(count, numpy.float64).reshape(-1, 1)
    return numpy.concatenate([(corner + 0.5) / scale - 0.5, count / (count + 10)], 1)


def _letterbox(image, height, width):
    """The image, scaled to fit, at the top left of a black height x width one; and the scale."""
    scale = min(height / image.shape[0], width / image.shape[1])
    size = [max(1, min(limit, round(side * scale)))
            for side, limit in zip(image.shape[1::-1], (width, height))]
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    canvas = numpy.zeros((height, width, 3), numpy.uint8)
    canvas[:size[1], :size[0]] = cv2.resize(image, size, interpolation=method)
    return canvas, scale


def _fitting(image, side, band=0):
    """(height, width): the image's shape at a longer side of `side`, with at least so many pixels
    of black band at the shorter one, in multiples of 32.
    """
    fit = side / max(image.shape[:2])
    return [max(32, min(side, -(-round(length * fit + band) // 32) * 32))
            for length in image.shape[:2]]


def _yunet(path, session):
    sides = session.get_inputs()[0].shape[2:]
    side = max(sides) if all(isinstance(one, int) for one in sides) else SIDE

    def load(side, band):
        # Each with a net of its own: another input size costs as much as a look.
        net = cv2.FaceDetectorYN.create(str(path), "", (side, side), 0.6, 0.3, 100)
        return functools.partial(_find_yunet, net, side, band)

    try:
        # Below a band of 64 px the rest of a square of black changes no box, on 112 LFPW photos.
        return Detector("yunet", load(side, 64), RELATIONS["yunet"],
                        load(QUICK_SIDE, 0) if side > QUICK_SIDE else None)
    except cv2.error:
        raise UserError(f"detector {path}: OpenCV {cv2.__version__} cannot load it as YuNet; "
                        f"{HINT}") from None


def _find_yunet(net, side, band, image):
    # Whatever shape the file names: OpenCV takes any, and black is not worth its time.
    height, width = _fitting(image, side, band)
    if tuple(net.getInputSize()) != (width, height):
        net.setInputSize((width, height))
    canvas, scale = _letterbox(image, height, width)
    faces = net.detect(canvas[..., ::-1].copy())[1]
    if faces is None:
        return []
    corner = numpy.concatenate([faces[:, :2], faces[:, :2] + faces[:, 2:4]], 1)
    return numpy.concatenate([(corner + 0.5) / scale - 0.5, faces[:, -1:]], 1)


def _find_scrfd(session, image, min_score=0.5, max_overlap=0.4, sides=(SIDE, SIDE // 2)):
    height, width = session.get_inputs()[0].shape[2:]
    if isinstance(height, int) and isinstance(width, int):
        sizes = [(height, width)]
    else:
        # Any multiple of 32 will do: nothing is computed on a letterbox's black half. The half size
        # finds the large faces that the small model loses (92.7 to 100 % of 301 training photos).
        sizes = [_fitting(image, side) for side in sides]
    boxes = numpy.concatenate([_scrfd_boxes(session, image, *size, min_score) for size in sizes])
    sides = boxes[:, 2:4] - boxes[:, :2]
    kept = cv2.dnn.NMSBoxes(numpy.hstack([boxes[:, :2], sides]), boxes[:, 4], 0, max_overlap)
    return boxes[kept]


def _scrfd_boxes(session, image, height, width, min_score):
    canvas, scale = _letterbox(image, height, width)
    # Normalisation, centres and distances in strides as in insightface's SCRFD.
    batch = (canvas.transpose(2, 0, 1)[None].astype(numpy.float32) - 127.5) / 128
    steps = (8, 16, 32)
    names = [f"{kind}_{step}" for step in steps for kind in ("score", "bbox")]
    outputs = session.run(names, {session.get_inputs()[0].name: batch})
    found = []
    for step, score, distance in zip(steps, outputs[::2], outputs[1::2]):
        score, distance = score.reshape(-1), distance.reshape(-1, 4) * step
        columns = width // step
        kept = numpy.flatnonzero(score >= min_score)
        cell = kept // 2  # Two anchors a cell, one after the other.
        centre = numpy.stack([cell % columns, cell // columns], 1) * step
        corners = numpy.concatenate([centre - distance[kept, :2], centre + distance[kept, 2:]], 1)
        found.append(numpy.concatenate([(corners + 0.5) / scale - 0.5, score[kept, None]], 1))
    return numpy.concatenate(found)
