"""Find faces in a photo and draw their landmarks, with an exported .onnx.

One file to copy: it needs numpy, onnxruntime and opencv-python<5, and nothing of the repository.

    python run_onnx.py weights/tiny.int8.onnx photo.jpg landmarks.png
    python run_onnx.py weights/tiny.int8.onnx photo.jpg landmarks.png --detector yunet.onnx

A detector finds the faces: Haar, which OpenCV contains, or a YuNet file. The network predicts
landmarks from a first crop of each face, and again from a crop placed around these landmarks as in
training, which is what the network is accurate on.
"""
import argparse
import json
import pathlib
import sys

import cv2
import numpy
import onnxruntime

# The square around a face's landmarks relative to the detector's box: how far its centre lies below
# that of the box, and its side, both in sides of the box. Measured on faces with 68 landmarks.
HAAR, YUNET = (0.147, 0.871), (0.123, 0.779)
# The detector runs on the photo reduced to this longer side: YuNet is made for faces of up to about
# 300 px, and Haar finds more false faces in larger photos.
DETECTOR_SIDE = 640
# Mean confidence of the landmarks below which a crop is no face, where the .onnx does not say.
MIN_CONFIDENCE = 0.15
# Predict again from a new crop while a side of it moves by more than this share of its size.
MAX_MOVE = 0.12


def find_faces(image: numpy.ndarray, detector: str = "haar") -> numpy.ndarray:
    """Find faces.

    Args:
        image: the photo, (H, W, 3) uint8 BGR.
        detector: "haar", or the path of a YuNet .onnx.

    Returns:
        Squares around the faces' landmarks, (n, 3): x and y of the centre, and side, in pixels.
    """
    zoom = min(1, DETECTOR_SIDE / max(image.shape[:2]))
    small = cv2.resize(image, [max(1, round(zoom * n)) for n in image.shape[1::-1]],
                       interpolation=cv2.INTER_AREA)
    if detector == "haar":
        file = cv2.data.haarcascades + "haarcascade_frontalface_default.xml"
        grey, (down, ratio) = cv2.cvtColor(small, cv2.COLOR_BGR2GRAY), HAAR
        boxes = cv2.CascadeClassifier(file).detectMultiScale(grey, 1.1, 3, minSize=(32, 32))
    else:
        down, ratio = YUNET
        net = cv2.FaceDetectorYN.create(detector, "", small.shape[1::-1], 0.6)
        boxes = net.detect(small)[1]
    boxes = numpy.array([box[:4] for box in (() if boxes is None else boxes)], float).reshape(-1, 4)
    side = boxes[:, 2:].max(1, keepdims=True)
    centre = boxes[:, :2] + boxes[:, 2:] / 2 + side * (0, down)
    # Pixel n covers n to n + 1, so its centre is n + 0.5 when coordinates are scaled.
    return numpy.hstack([(centre + 0.5) / zoom - 0.5, side * ratio / zoom])


def load(path: str) -> tuple[onnxruntime.InferenceSession, dict, dict, float]:
    """Load an .onnx and what its metadata says.

    Returns:
        Session, crop rule, landmark scheme, and the mean confidence below which a crop is no face.

    Raises:
        ValueError: for a file that main.py --export did not write, or that is damaged.
    """
    check_file(path)
    if path.endswith(".pt"):
        raise ValueError("is a checkpoint; main.py --export --exp PATH.pt writes the .onnx")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime raises exception types that it does not export.
        raise ValueError(f"ONNX Runtime {onnxruntime.__version__} cannot load it: "
                         f"{' '.join(str(error).split())[:160]}") from None
    try:
        return session, *read_metadata(session)
    except (AttributeError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"its metadata is damaged ({error!r}); export it again") from None


def check_file(path: str) -> None:
    """Raise ValueError where a path is no file, an empty one or a pointer of Git LFS."""
    if not pathlib.Path(path).is_file():
        raise ValueError("is a folder or a device" if pathlib.Path(path).exists() else
                         "no such file")
    with open(path, "rb") as file:
        start = file.read(40)
    if not start:
        raise ValueError("is empty")
    if start.startswith(b"version https://git-lfs"):
        raise ValueError("is a pointer of Git LFS; `git lfs pull` fetches the file itself")


def read_metadata(session: onnxruntime.InferenceSession) -> tuple[dict, dict, float]:
    """Read the crop rule, the landmark scheme and the minimum confidence from an .onnx.

    Raises:
        ValueError: for a file that main.py --export did not write.
    """
    metadata = session.get_modelmeta().custom_metadata_map
    if "crop" not in metadata or session.get_outputs()[0].name != "landmarks":
        raise ValueError("is no .onnx of main.py --export (for a .raw.onnx see decode_maps.py)")
    crop, scheme = json.loads(metadata["crop"]), json.loads(metadata["scheme"])
    min_confidence = json.loads(metadata.get("eyes", "{}")).get("face") or MIN_CONFIDENCE
    # Read here, so that a key that is missing is found before a photo is.
    crop["rule"], crop["scale"], scheme["base"], scheme["mean_face"]
    return crop, scheme, min_confidence


def read_photo(path: str) -> numpy.ndarray:
    """Read a photo, upright, as (H, W, 3) uint8 BGR.

    Raises:
        ValueError: where OpenCV cannot read it.
    """
    check_file(path)
    try:
        # Unlike imread, this reads paths with any letters on Windows.
        image = cv2.imdecode(numpy.fromfile(path, numpy.uint8), cv2.IMREAD_COLOR)
    except cv2.error:
        image = None
    if image is None:
        raise ValueError("is no image that OpenCV can read; convert it to .jpg or .png")
    return image


def predict(session: onnxruntime.InferenceSession, image: numpy.ndarray, centre: numpy.ndarray,
            size: numpy.ndarray | float) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Predict the landmarks in one crop of a photo.

    Args:
        session: of the .onnx.
        image: the photo, (H, W, 3) uint8 BGR.
        centre: of the crop in pixels, (2,).
        size: of the crop in pixels: width and height (2,), or one number for a square.

    Returns:
        Landmarks (K, 2) in pixels of the photo and confidence (K,) in 0..1.
    """
    input_size = session.get_inputs()[0].shape[2]
    shrink = int(numpy.min(size) / input_size)
    if shrink > 1:
        # warpAffine interpolates between four pixels only. Reducing a large crop without averaging
        # first would move landmarks by up to 1 % of the face.
        small = cv2.resize(image, [max(1, n // shrink) for n in image.shape[1::-1]],
                           interpolation=cv2.INTER_AREA)
        ratio = numpy.divide(small.shape[1::-1], image.shape[1::-1])
        points, confidence = predict(session, small, (centre + 0.5) * ratio - 0.5, size * ratio)
        return (points + 0.5) / ratio - 0.5, confidence
    corner, zoom = centre - numpy.divide(size, 2), numpy.full(2, input_size) / size
    warp = numpy.column_stack([numpy.diag(zoom), -corner * zoom - 0.5])
    face = cv2.warpAffine(image, warp, (input_size, input_size))
    face = cv2.cvtColor(face, cv2.COLOR_BGR2RGB)
    # The graph takes (N, 3, S, S) uint8 RGB, and returns landmarks in 0..1 of the crop.
    points, confidence = session.run(None, {"images": face.transpose(2, 0, 1)[None]})
    return points[0] * size + corner, confidence[0]


def place_crop(points: numpy.ndarray, crop: dict,
               scheme: dict) -> tuple[numpy.ndarray, numpy.ndarray | float]:
    """Return centre and size of the crop that training places around landmarks (K, 2).

    Args:
        points: landmarks in pixels.
        crop: `rule` and `scale` of the metadata.
        scheme: of the metadata.
    """
    if scheme["base"] is None and crop["rule"] != "box":
        low, high = points.min(0), points.max(0)
        size = (high - low) * crop["scale"]
        return (low + high) / 2, size.max() if crop["rule"] == "square" else size
    # Landmarks of a part of the face, or a crop that followed a face box: the mean face, which lies
    # in a unit square, is fitted to the landmarks by rotation, scale and shift (least squares), and
    # the crop is where its square then lies. Points are complex numbers x + iy, so that rotation
    # and scale are one factor.
    mean, found = numpy.array(scheme["mean_face"]) @ (1, 1j), points @ (1, 1j)
    source = mean - mean.mean()
    factor = numpy.vdot(source, found - found.mean()) / numpy.vdot(source, source)
    middle = found.mean() + factor * (0.5 + 0.5j - mean.mean())
    return numpy.array([middle.real, middle.imag]), abs(factor)


def refine(session: onnxruntime.InferenceSession, image: numpy.ndarray, centre: numpy.ndarray,
           size: numpy.ndarray | float, crop: dict,
           scheme: dict) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Predict landmarks, and again from the crop that training places around them.

    The crop is placed once more, up to twice, while it moves by more than MAX_MOVE of its size.

    Args:
        session: of the .onnx.
        image: the photo, (H, W, 3) uint8 BGR.
        centre: of the first crop in pixels, (2,).
        size: of the first crop, see predict.
        crop: of the metadata.
        scheme: of the metadata.

    Returns:
        Landmarks (K, 2) in pixels of the photo and confidence (K,) in 0..1.
    """
    points, _ = predict(session, image, centre, size)
    for _ in range(3):
        previous = centre, size
        centre, size = place_crop(points, crop, scheme)
        points, confidence = predict(session, image, centre, size)
        # The largest distance that a side of the crop moved.
        move = abs(centre - previous[0]) + abs(numpy.subtract(size, previous[1])) / 2
        if move.max() <= MAX_MOVE * numpy.max(previous[1]):
            break
    return points, confidence


def fail(path: str, problem: object) -> None:
    """Print one line about a file and end the program with exit code 2."""
    print(f"error: {path}: {problem}", file=sys.stderr)
    sys.exit(2)


def main() -> None:
    """Find the faces of a photo, print and draw their landmarks, and save the picture."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", help="the .onnx of an experiment")
    parser.add_argument("photo")
    parser.add_argument("output", help="the picture to write")
    parser.add_argument("--detector", default="haar", help="haar, or the path of a YuNet .onnx")
    options = parser.parse_args()
    # OpenCV prints messages of its own about damaged files.
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    path = options.weights
    try:
        session, crop, scheme, min_confidence = load(path)
        image = read_photo(path := options.photo)
        path = options.detector
        if path == "haar" and not hasattr(cv2, "CascadeClassifier"):
            raise ValueError(f"OpenCV {cv2.__version__} has no Haar detector; pip install "
                             f"'opencv-python<5', or give a YuNet file")
        if path != "haar":
            check_file(path)
        faces = find_faces(image, path)
    except (OSError, ValueError) as error:
        fail(path, getattr(error, "strerror", None) or error)
    except cv2.error:
        fail(path, "OpenCV cannot use it as a YuNet .onnx")
    drawn, count = image.copy(), 0
    for x, y, side in faces:
        try:
            points, confidence = refine(session, image, numpy.array([x, y]), side * crop["scale"],
                                        crop, scheme)
        except Exception as error:  # Again a type that ONNX Runtime does not export.
            fail(options.weights, f"fails in use: {' '.join(str(error).split())[:160]}")
        if confidence.mean() < min_confidence:
            continue
        count += 1
        print(f"face at {points.mean(0).round(1).tolist()}, confidence {confidence.mean():.2f}")
        for px, py in points:
            cv2.circle(drawn, (round(float(px)), round(float(py))), max(2, round(side / 100)),
                       (0, 255, 0), -1)
    write(options.output, options.photo, drawn)
    print(f"{count} faces: {options.output}" + ("" if count else (
        f" ({len(faces)} boxes of the detector in which the network sees no face)" if len(faces)
        else " (the detector found none; YuNet finds more than Haar: --detector yunet.onnx)")))


def write(path: str, photo: str, image: numpy.ndarray) -> None:
    """Write a picture; end the program where it cannot be written or would replace the photo."""
    target = pathlib.Path(path)
    if target.exists() and target.samefile(photo):
        fail(path, "is the photo itself; give another name")
    try:
        encoded, content = cv2.imencode(target.suffix or ".", image)
    except cv2.error:
        encoded = False
    if not encoded:
        fail(path, "cannot be written; give a .png or .jpg")
    try:
        target.write_bytes(content.tobytes())
    except OSError as error:
        fail(path, f"cannot be written: {error.strerror}")


if __name__ == "__main__":
    main()
