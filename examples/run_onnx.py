"""Landmarks of the faces in a photo; needs numpy, onnxruntime and opencv-python<5 alone.

python run_onnx.py weights/tiny.int8.onnx photo.jpg landmarks.png                   Haar, built in
python run_onnx.py weights/tiny.int8.onnx photo.jpg landmarks.png --detector yunet.onnx
"""
import argparse
import json
import pathlib

import cv2
import numpy
import onnxruntime

# Where the square around a face's landmarks lies in the detector's: shift down, and side. Measured
# on 68-point faces, see utils/detection/detector.py.
HAAR, YUNET = (0.147, 0.871), (0.123, 0.779)
# The longer side at which detectors look: YuNet is made for faces of up to some 300 px, and Haar
# finds ever more false ones in a larger photo.
SIDE = 640
# Mean confidence below which there is no face, where the file does not say.
MIN_CONFIDENCE = 0.15
# As a share of a crop's size, how far one of its sides must have gone for the face to be looked at
# again.
MOVED = 0.12


def find_faces(image, detector="haar"):
    """Centres and sides (n, 3) of the squares around faces' landmarks, in pixels of BGR image."""
    zoom = min(1, SIDE / max(image.shape[:2]))
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
    return numpy.hstack([(centre + 0.5) / zoom - 0.5, side * ratio / zoom])


def read_metadata(session):
    """What the file says of itself: crop rule, scheme, and the least mean confidence of a face.

    Raises ValueError for other files than main.py --export writes.
    """
    meta = session.get_modelmeta().custom_metadata_map
    if "crop" not in meta or session.get_outputs()[0].name != "landmarks":
        raise ValueError("is no .onnx of main.py --export (for a .raw.onnx see decode_maps.py)")
    least = json.loads(meta.get("eyes", "{}")).get("face") or MIN_CONFIDENCE
    return json.loads(meta["crop"]), json.loads(meta["scheme"]), least


def landmarks(session, image, centre, size):
    """Landmarks (K, 2) in pixels of BGR image and confidence (K,), from the crop with this centre
    (2,) and this size, a number or (2,).
    """
    pixels = session.get_inputs()[0].shape[2]
    shrink = int(numpy.min(size) / pixels)
    if shrink > 1:
        # Averaged down: a warp looks at four pixels alone, and points would move by up to 1 %.
        small = cv2.resize(image, [max(1, n // shrink) for n in image.shape[1::-1]],
                           interpolation=cv2.INTER_AREA)
        ratio = numpy.divide(small.shape[1::-1], image.shape[1::-1])
        points, confidence = landmarks(session, small, (centre + 0.5) * ratio - 0.5, size * ratio)
        return (points + 0.5) / ratio - 0.5, confidence
    corner, zoom = centre - numpy.divide(size, 2), numpy.full(2, pixels) / size
    warp = numpy.column_stack([numpy.diag(zoom), -corner * zoom - 0.5])
    face = cv2.cvtColor(cv2.warpAffine(image, warp, (pixels, pixels)), cv2.COLOR_BGR2RGB)
    points, confidence = session.run(None, {"images": face.transpose(2, 0, 1)[None]})
    return points[0] * size + corner, confidence[0]


def lay_crop(points, crop, scheme):
    """Centre and size of the crop that training lays around landmarks (K, 2)."""
    if scheme["base"] is None and crop["rule"] != "box":
        low, high = points.min(0), points.max(0)
        size = (high - low) * crop["scale"]
        return (low + high) / 2, size.max() if crop["rule"] == "square" else size
    # Points of a part of the face: the crop is the unit square in which the mean face, turned and
    # scaled, fits them best. x and y are one complex number.
    mean, found = numpy.array(scheme["mean_face"]) @ (1, 1j), points @ (1, 1j)
    source = mean - mean.mean()
    turn = numpy.vdot(source, found - found.mean()) / numpy.vdot(source, source)
    middle = found.mean() + turn * (0.5 + 0.5j - mean.mean())
    return numpy.array([middle.real, middle.imag]), abs(turn)


def refine(session, image, centre, size, crop, scheme):
    """landmarks() of a crop laid again around them, as training cuts its faces: once, and up to
    twice more where that moves it by more than MOVED of its size.
    """
    points, _ = landmarks(session, image, centre, size)
    for _ in range(3):
        before = centre, size
        centre, size = lay_crop(points, crop, scheme)
        points, confidence = landmarks(session, image, centre, size)
        # How far the farthest side of the crop went.
        went = abs(centre - before[0]) + abs(numpy.subtract(size, before[1])) / 2
        if went.max() <= MOVED * numpy.max(before[1]):
            break
    return points, confidence


def main():
    """Find, draw and save."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", help="the .onnx of an experiment")
    parser.add_argument("photo")
    parser.add_argument("output", help="the picture to write")
    parser.add_argument("--detector", default="haar", help="haar, or the path of a YuNet .onnx")
    given = parser.parse_args()
    for path in (given.weights, given.detector):
        if path != "haar" and not pathlib.Path(path).is_file():
            parser.error(f"{path}: no such file")
    session = onnxruntime.InferenceSession(given.weights, providers=["CPUExecutionProvider"])
    image = cv2.imread(given.photo)
    if image is None:
        parser.error(f"{given.photo}: is no image that OpenCV can read")
    try:
        crop, scheme, least = read_metadata(session)
    except ValueError as error:
        parser.error(f"{given.weights}: {error}")
    try:
        faces = find_faces(image, given.detector)
    except cv2.error:
        parser.error(f"{given.detector}: OpenCV does not take it for a YuNet .onnx")
    drawn, count = image.copy(), 0
    for x, y, side in faces:
        points, confidence = refine(session, image, numpy.array([x, y]), side * crop["scale"],
                                    crop, scheme)
        if confidence.mean() < least:
            continue
        count += 1
        print(f"face at {points.mean(0).round(1).tolist()}, confidence {confidence.mean():.2f}")
        for px, py in points:
            cv2.circle(drawn, (round(float(px)), round(float(py))), max(2, round(side / 100)),
                       (0, 255, 0), -1)
    try:
        written = cv2.imwrite(given.output, drawn)
    except cv2.error:
        written = False
    if not written:
        parser.error(f"{given.output}: cannot be written; give a .png or .jpg")
    print(f"{count} faces: {given.output}")


if __name__ == "__main__":
    main()
