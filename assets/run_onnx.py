"""Landmarks of the faces in a photo; needs numpy, onnxruntime and opencv-python<5 alone.

python run_onnx.py weights/fast.onnx photo.jpg landmarks.png                     Haar, built in
python run_onnx.py weights/fast.onnx photo.jpg landmarks.png --detector yunet.onnx
"""
import argparse
import json

import cv2
import numpy
import onnxruntime

# Where the square around a face's landmarks lies in the detector's: shift down, and side. Measured
# on 68-point faces, see utils/video/detector.py.
HAAR, YUNET = (0.147, 0.871), (0.123, 0.779)


def find_faces(image, detector="haar"):
    """Centres and sides (n, 3) of the squares around faces' landmarks, in pixels of BGR image."""
    if detector == "haar":
        file = cv2.data.haarcascades + "haarcascade_frontalface_default.xml"
        grey, (down, ratio) = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY), HAAR
        boxes = cv2.CascadeClassifier(file).detectMultiScale(grey, 1.1, 3, minSize=(32, 32))
    else:
        down, ratio = YUNET
        net = cv2.FaceDetectorYN.create(detector, "", image.shape[1::-1], 0.6)
        boxes = net.detect(image)[1]
    boxes = numpy.array([box[:4] for box in (() if boxes is None else boxes)], float).reshape(-1, 4)
    side = boxes[:, 2:].max(1, keepdims=True)
    centre = boxes[:, :2] + boxes[:, 2:] / 2 + side * (0, down)
    return numpy.hstack([centre, side * ratio])


def landmarks(session, image, square):
    """Landmarks (K, 2) in pixels of BGR image and confidence (K,); square: (x, y, side)."""
    meta = session.get_modelmeta().custom_metadata_map
    size, scale = int(meta["input_size"]), json.loads(meta["crop"])["scale"]
    x, y, side = square
    side *= scale
    zoom, left, top = size / side, x - side / 2, y - side / 2
    warp = numpy.array([[zoom, 0, -left * zoom - 0.5], [0, zoom, -top * zoom - 0.5]])
    face = cv2.cvtColor(cv2.warpAffine(image, warp, (size, size)), cv2.COLOR_BGR2RGB)
    points, confidence = session.run(None, {"images": face.transpose(2, 0, 1)[None]})
    return points[0] * side + (left, top), confidence[0]


def main():
    """Find, draw and save."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", help="the .onnx of an experiment")
    parser.add_argument("photo")
    parser.add_argument("output", help="the picture to write")
    parser.add_argument("--detector", default="haar", help="haar, or the path of a YuNet .onnx")
    given = parser.parse_args()
    session = onnxruntime.InferenceSession(given.weights, providers=["CPUExecutionProvider"])
    image = cv2.imread(given.photo)
    if image is None:
        parser.error(f"{given.photo}: is no image that OpenCV can read")
    faces = find_faces(image, given.detector)
    for square in faces:
        points, _ = landmarks(session, image, square)
        # Again from where the landmarks are, which is how training cuts its faces.
        low, high = points.min(0), points.max(0)
        points, confidence = landmarks(session, image, (*(low + high) / 2, (high - low).max()))
        print(f"face at {points.mean(0).round(1).tolist()}, confidence {confidence.mean():.2f}")
        for x, y in points:
            cv2.circle(image, (round(float(x)), round(float(y))), 2, (0, 255, 0), -1)
    if not cv2.imwrite(given.output, image):
        parser.error(f"{given.output}: cannot be written")
    print(f"{len(faces)} faces: {given.output}")


if __name__ == "__main__":
    main()
