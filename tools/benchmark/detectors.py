"""Measure face detectors: faces found, boxes without a face, and time.

    python -m tools.benchmark.detectors SOURCE ... [--detectors NAME ...] [--reference FILE]

A SOURCE is a folder of photos or a video. A photo with a .pts file of the same name shows the face
of these landmarks; any other photo shows one in its middle. Frames of a video show the faces that
the reference detector finds. Photos are processed as demo.py processes single pictures, frames as
its tracker does. A face is found if a box, converted to a crop, has an IoU of 0.3 or more with its
landmarks, or contains the middle of the photo. A box is false if it shows no such face and none
that the reference detector finds in the same picture. The CPU time is that of a grey frame of
640 x 360 with the photo in its middle, or of a video's frame reduced to that size.
"""
import argparse
import pathlib
import statistics
import time

import cv2
import numpy

from tools.benchmark.common import say, table
from utils.data.photo import IMAGE_SUFFIXES, read_photo
from utils.detection.detector import get_detector, iou
from utils.errors import UserError
from utils.errors import run as guarded

MIN_IOU = 0.3
FRAME = (640, 360)  # Width and height of the timed frames.
TIMED = 20  # Frames of each source that are timed.


def read_pts(path):
    """Return the bounding box (4,) of the landmarks in a .pts file, whose origin is 1."""
    text = path.read_text(encoding="utf-8")
    points = numpy.array(text.split("{")[1].split("}")[0].split(), float).reshape(-1, 2) - 1
    return numpy.concatenate([points.min(0), points.max(0)])


def pictures(source, step):
    """Yield (RGB image, box (4,) of the face, or of one point, or None) of a source.

    Raises:
        UserError: for a source without pictures.
    """
    count = 0
    if source.is_dir():
        photos = sorted(p for p in source.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
        for path in photos[::step]:
            image, points = read_photo(path, upright=True), path.with_suffix(".pts")
            if image is None:
                continue
            middle = numpy.array(image.shape[1::-1]) / 2
            yield image, read_pts(points) if points.is_file() else numpy.tile(middle, 2)
            count += 1
    else:
        video = cv2.VideoCapture(str(source))
        for number in range(10 ** 9):
            read, frame = video.read()
            if not read:
                break
            if number % step == 0:
                yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB), None
                count += 1
    if not count:
        raise UserError(f"{source}: no photo or frame in it could be read; give a folder of photos "
                        f"or a video")


def shows(crops, face):
    """Return which crops (n, 4) show a face, given as a box (4,) or as a point twice, (n,)."""
    if (face[2:] > face[:2]).all():
        return iou(crops, face[None])[:, 0] >= MIN_IOU
    return ((crops[:, :2] < face[:2]) & (face[:2] < crops[:, 2:])).all(1)


def score_picture(crops, face, reference):
    """Score the crops (n, 4) of a picture.

    Args:
        crops: of the detector, without margin.
        face: the known face, see `pictures`; None for those of the reference.
        reference: crops (m, 4) of the reference detector, or None.

    Returns:
        Numbers of faces, of faces found and of false boxes.
    """
    faces = list(reference if face is None and reference is not None else
                 [] if face is None else [face])
    known = faces if reference is None else [*faces, *reference]
    hits = [shows(crops, one) for one in known]
    false = len(crops) - int(numpy.any(hits, 0).sum()) if hits else len(crops)
    return len(faces), sum(bool(hit.any()) for hit in hits[:len(faces)]), false


def timed_frame(image):
    """Return an image as a frame of FRAME's size on grey, reduced where it is larger."""
    width, height = FRAME
    scale = min(1, width / image.shape[1], height / image.shape[0])
    size = [max(1, round(side * scale)) for side in image.shape[1::-1]]
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    frame = numpy.full((height, width, 3), 127, numpy.uint8)
    left, top = (width - size[0]) // 2, (height - size[1]) // 2
    frame[top:top + size[1], left:left + size[0]] = small
    return frame


def measure(source, detectors, reference, step):
    """Return a table row for each detector {name: Detector} on a source."""
    counts = {name: numpy.zeros(4, int) for name in detectors}
    seconds, still = {name: [] for name in detectors}, source.is_dir()
    for image, face in pictures(source, step):
        found = None if reference is None else reference.to_crop(
            (reference.with_retry() if still else reference)(image), 1.0)
        for name, detector in detectors.items():
            crops = detector.to_crop((detector.with_retry() if still else detector)(image), 1.0)
            counts[name] += (1, *score_picture(crops, face, found))
            if len(seconds[name]) < TIMED:
                frame = timed_frame(image)
                start = time.process_time()
                detector(frame)
                seconds[name].append(time.process_time() - start)
    return [[source.name, name, total, faces, f"{100 * hit / faces:.1f}" if faces else "", false,
             f"{1000 * statistics.median(seconds[name]):.0f}"]
            for name, (total, faces, hit, false) in counts.items()]


def parse(argv=None):
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.benchmark.detectors",
                                     description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", type=pathlib.Path, metavar="SOURCE",
                        help="folders of photos, and videos")
    parser.add_argument("--detectors", nargs="+", default=["haar", "yunet"], metavar="NAME",
                        help="as --detector of demo.py [haar yunet]")
    parser.add_argument("--reference", metavar="FILE", help="detector whose boxes count as faces")
    parser.add_argument("--step", type=int, default=1, help="take every N-th picture [1]")
    parser.add_argument("--threads", type=int, default=1, help="threads of OpenCV [1]")
    return parser.parse_args(argv)


def run():
    """Measure every detector on every source and print a Markdown table."""
    options, rows = parse(), []
    cv2.setNumThreads(options.threads)
    detectors = {pathlib.Path(name).stem: get_detector(name) for name in options.detectors}
    reference = options.reference and get_detector(options.reference)
    for source in options.sources:
        say(f"{source}")
        rows += measure(source, detectors, reference, options.step)
    print("\n".join(table(["source", "detector", "pictures", "faces", "found %", "false boxes",
                           "CPU ms"], rows)))


if __name__ == "__main__":
    guarded(run)
