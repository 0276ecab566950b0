"""Face tracking: frames of a video in, tracked faces with landmarks out.

In each frame the network runs once per known face, in the crop that the landmarks of the previous
frame give (`utils.detection.refine`); the detector is needed only for new and lost faces and runs
every few frames, in the background while faces are tracked. Each `Track` has an id and landmarks
smoothed by the One Euro filter.
"""
from __future__ import annotations

import concurrent.futures
import copy
import dataclasses
import math
from typing import TYPE_CHECKING

import cv2
import numpy

from utils.detection.detector import iou, match_scores
from utils.detection.face_score import KEEP_SCORE, MIN_SCORE, face_score
from utils.detection.refine import crop_rolls, has_moved, place_crops, predict_boxes, refine
from utils.landmarks.eyelids import EyeThresholds
from utils.tracking.one_euro import FaceFilter

if TYPE_CHECKING:
    from utils.detection.detector import Detector
    from utils.predictor import Predictor

# Correlation of two frames' thumbnails below which a new shot begins. On 275 frames of video with
# three cuts it is 0.24 or less at the cuts and at least 0.64 within a shot.
SAME_SHOT_CORRELATION = 0.45
# Mean confidence below which a face is lost, where the weights have no face threshold (main.py
# --fit-eyes): EYE_CONFIDENCE_FACTOR times their threshold for eyes, else MIN_CONFIDENCE. Where both
# thresholds were fitted, that of faces is 1.1 to 1.6 times that of eyes.
MIN_CONFIDENCE, EYE_CONFIDENCE_FACTOR = 0.15, 1.4
# A face that the detector misses needs this many times min_confidence. With a factor of 1.25 `tiny`
# loses a face whose lower half is covered in 388 of 1850 frames with Haar, with 1.12 in 79.
UNDETECTED_FACTOR = 1.12
# The face score of a track is a running mean over every SCORE_INTERVAL-th frame. From START_SCORE a
# new face is lost after one score near 0, one that was seen for a while after two.
SCORE_INTERVAL, START_SCORE = 20, 0.55
MAX_MISSED = 2  # Without confidence, a face is lost after this many detections in a row miss it.
# A face that is found again within LOST_SECONDS, or followed into the next frame, is rolled by at
# most this many radians against where it was: a network sees heads on their side in hair.
MAX_ROLL_CHANGE = math.radians(60)
SAME_FACE_IOU = 0.5  # Two crops with a higher IoU show the same face.
LOST_SECONDS = 0.5  # A face that returns within this time gets its id back.
# Frames between the start of a background detection and the use of its result (fewer with a small
# detect_every). The number is fixed so that a video always gives the same landmarks. Two frames of
# the smallest network take as long as a low-resolution detection.
DETECTION_LAG = 2
FULL_RES_INTERVAL = 6  # Low-resolution detections before one at full resolution, for small faces.


@dataclasses.dataclass(eq=False)
class Track:
    """A tracked face in one frame; all coordinates are pixels of the frame.

    Attributes:
        id: number of the face, from 1.
        points_px: smoothed landmarks (K, 2).
        raw_px: landmarks (K, 2) as predicted.
        confidence: (K,), 0..1.
        box: nominal crop (4,).
        time: of the frame, in seconds.
        face_filter: smooths raw_px to points_px; None for no smoothing.
        velocity: of the crop's centre (x, y), in pixels a second.
        missed: latest detections in a row that did not find the face.
        face_score: running mean of utils.detection.face_score, below KEEP_SCORE for no face.
    """
    id: int
    points_px: numpy.ndarray
    raw_px: numpy.ndarray
    confidence: numpy.ndarray
    box: numpy.ndarray
    time: float
    face_filter: FaceFilter | None
    velocity: tuple[float, float] = (0.0, 0.0)
    missed: int = 0
    face_score: float = START_SCORE

    def __post_init__(self):
        self._smooth()

    def predicted_box(self, time: float) -> numpy.ndarray:
        """Extrapolate the box (4,) to `time` in seconds, at constant velocity."""
        x, y = (speed * (time - self.time) for speed in self.velocity)
        return self.box + (x, y, x, y)

    def move(self, points_px: numpy.ndarray, confidence: numpy.ndarray, box: numpy.ndarray,
             time: float) -> None:
        """Update the track with the prediction of the next frame."""
        step = max(time - self.time, 1e-3)
        self.velocity = tuple(
            (speed + (new - old) / step) / 2
            for speed, old, new in zip(self.velocity, _centre(self.box), _centre(box)))
        self.raw_px, self.confidence, self.box, self.time = points_px, confidence, box, time
        self._smooth(step)

    def _smooth(self, step=None):
        self.points_px = self.raw_px if self.face_filter is None else \
            self.face_filter(self.raw_px, _side(self.box), step)


@dataclasses.dataclass(frozen=True)
class _Detection:
    """A detection in the background.

    Attributes:
        image: a copy of the frame it started in.
        track_boxes: track id to box (4,) in that frame.
        frame: number of the frame that uses the result.
        low_resolution: whether it may miss small faces.
        crops: future of the nominal crops (n, 4).
    """
    image: numpy.ndarray
    track_boxes: dict
    frame: int
    low_resolution: bool
    crops: concurrent.futures.Future


class Tracker:
    """Tracks the faces of a video, one `update` a frame.

    The detector runs in the foreground at full resolution on the first frame, at shot cuts, when a
    face is lost, and every `detect_every` frames while there is no face. While faces are tracked it
    runs in the background at low resolution, and after FULL_RES_INTERVAL of these detections once
    at full resolution; small new faces wait for that one. Results depend on the frames alone, not
    on how long a detection takes.

    Args:
        predictor: the landmark model.
        detector: the face detector.
        detect_every: a new face is found within this many frames.
        min_confidence: mean confidence below which a face is lost. 0 takes the threshold that comes
            with the weights, else MIN_CONFIDENCE: models differ in their confidence.
        filter_min_cutoff: minimum cutoff frequency of the One Euro filter in Hz; 0 for no filter.
        filter_beta: its speed coefficient, in Hz per face side a second.

    Attributes:
        rejected: boxes of the detector in which the network found no face.
    """

    def __init__(self, predictor: Predictor, detector: Detector, detect_every: int = 10,
                 min_confidence: float = 0.0, filter_min_cutoff: float = 1.2,
                 filter_beta: float = 5.0):
        self.predictor, self.detector = predictor, detector
        thresholds = getattr(predictor, "eyes", EyeThresholds())
        self.has_confidence = getattr(predictor, "has_confidence", True)
        self.detect_every = detect_every
        # A face may appear just after a detection starts: it waits for the next one and its lag.
        self.lag = min(DETECTION_LAG, (detect_every - 1) // 2)
        self.min_confidence = (min_confidence or thresholds.face
                               or EYE_CONFIDENCE_FACTOR * thresholds.min_confidence
                               or MIN_CONFIDENCE)
        self.filter_settings = filter_min_cutoff, filter_beta
        self.tracks, self.lost = [], []
        self.frame, self.next_detection, self.next_id, self.thumbnail = 0, 0, 1, None
        self.detection, self.low_res_detections, self.executor = None, 0, None
        self.rejected = 0

    def update(self, image: numpy.ndarray, time: float) -> list[Track]:
        """Track the faces of the next frame.

        Args:
            image: RGB uint8 (H, W, 3).
            time: of the frame, in seconds.

        Returns:
            Copies of the tracks, by id.
        """
        if self._is_cut(image):
            # In a new shot, the network may take whatever is in a face's place for that face.
            self.tracks, self.lost, self.next_detection = [], [], self.frame
            self._cancel_detection()
        self.lost = [track for track in self.lost if time - track.time <= LOST_SECONDS]
        tracked = len(self.tracks)
        self._follow(image, time)
        if len(self.tracks) < tracked:
            self._detect_now(image, time)
        elif self.detection and self.frame >= self.detection.frame:
            self._use_detection(image, time)
        if self.frame >= self.next_detection:
            if self.tracks and not self.lost and self.lag:
                self._start_detection(image, self.frame + self.lag)
                self.next_detection = self.frame + self.detect_every - self.lag
            else:
                self._detect_now(image, time)
        self.frame += 1
        return [copy.copy(track) for track in self.tracks]

    def _is_cut(self, image):
        # Nearest pixels first: averaging all pixels of a large frame takes longer than a crop.
        small = cv2.resize(image, (64, 36), interpolation=cv2.INTER_NEAREST)
        small = cv2.resize(small, (32, 18), interpolation=cv2.INTER_AREA)
        grey = cv2.cvtColor(small, cv2.COLOR_RGB2GRAY).ravel().astype(numpy.float64)
        grey -= grey.mean()
        norm = math.sqrt(grey @ grey)
        previous, self.thumbnail = self.thumbnail, (grey, norm)
        return previous is not None and bool(
            previous[0] @ grey < SAME_SHOT_CORRELATION * previous[1] * norm)

    def _follow(self, image, time):
        """Predict the known faces in this frame; those that are not found become `lost`."""
        if not self.tracks:
            return
        boxes = numpy.array([track.box for track in self.tracks])
        rolls_before = crop_rolls(numpy.array([track.raw_px for track in self.tracks]),
                                  self.predictor.scheme)
        points, confidence = predict_boxes(self.predictor, image, boxes, rolls_before)
        crops, rolls = place_crops(self.predictor, points)
        moved = [i for i in range(len(boxes)) if has_moved(boxes[i], crops[i])]
        if moved:
            points[moved], confidence[moved] = predict_boxes(self.predictor, image, crops[moved],
                                                             rolls[moved])
            crops[moved], rolls[moved] = place_crops(self.predictor, points[moved])
        if self.frame % SCORE_INTERVAL == 0:
            scores = face_score(self.predictor, image, points, confidence)
            for track, score in zip(self.tracks, scores):
                track.face_score = (track.face_score + score) / 2
        # Where two tracks land on one face, the one that jumped farther is lost and moves on at its
        # last velocity: a face behind a passing one is found again on the other side.
        jumps = [math.dist(_centre(crop), _centre(track.predicted_box(time)))
                 for track, crop in zip(self.tracks, crops)] if len(crops) > 1 else [0]
        kept = []
        for i in sorted(range(len(jumps)), key=jumps.__getitem__):
            track = self.tracks[i]
            if (track.face_score >= KEEP_SCORE and self._is_face(confidence[i], crops[i], image)
                    and abs(_turn(rolls_before[i], rolls[i])) <= MAX_ROLL_CHANGE
                    and _is_apart(crops[i], kept)):
                track.move(points[i], confidence[i], crops[i], time)
                kept.append(track)
            else:
                self.lost.append(track)
        self.tracks = sorted(kept, key=lambda track: track.id)

    def _is_face(self, confidence, box, image):
        x, y = _centre(box)
        inside = 0 <= x < image.shape[1] and 0 <= y < image.shape[0]
        # confidence.mean() gives the same and takes five times as long.
        return bool(inside and confidence.sum() >= self.min_confidence * len(confidence))

    def _detect_now(self, image, time):
        """Detect in the foreground, at full resolution."""
        self._cancel_detection()
        crops = self._detect_crops(self.detector, image)
        new, doubtful = self._match({track.id: track.box for track in self.tracks}, crops)
        self._lose(doubtful)
        self._add(*self._verify(image, crops[new]), time)
        # A lost face is searched for more often than a new one.
        self.next_detection = self.frame + (
            max(1, self.detect_every // 3) if self.lost else
            self.detect_every - self.lag if self.tracks else self.detect_every)

    def _cancel_detection(self):
        """Wait for the background detection and drop its result: detectors are not reentrant."""
        if self.detection:
            concurrent.futures.wait([self.detection.crops])
            self.detection = None

    def _start_detection(self, image, frame, low_resolution=True):
        if self.executor is None:
            self.executor = concurrent.futures.ThreadPoolExecutor(1, "detector")
        detector = self.detector.low_resolution() if low_resolution else self.detector
        image = image.copy()  # The caller may reuse the buffer for the next frame.
        self.detection = _Detection(
            image, {track.id: track.box for track in self.tracks}, frame,
            detector is not self.detector,
            self.executor.submit(self._detect_crops, detector, image))

    def _use_detection(self, image, time):
        detection, self.detection = self.detection, None
        crops = detection.crops.result()
        new, doubtful = self._match(detection.track_boxes, crops)
        # First in the old frame: a box without a face there would always trigger a new detection.
        then = self._verify(detection.image, crops[new])[2]
        if len(then) and detection.track_boxes:
            known = list(detection.track_boxes.values())
            then = then[iou(then, known).max(1) <= SAME_FACE_IOU]
        now = self._verify(image, then)
        if len(now[2]) < len(then) or (detection.low_resolution and doubtful):
            self._detect_now(image, time)
            return
        self._lose(doubtful)
        self._add(*now, time)
        if self.lost:
            self.next_detection = min(self.next_detection,
                                      self.frame + max(1, self.detect_every // 3))
        elif detection.low_resolution:
            self.low_res_detections += 1
            if self.low_res_detections % FULL_RES_INTERVAL == 0:
                # It finds large faces too, so the next low-resolution detection can wait for it.
                self.next_detection = self.frame + self.detect_every - self.lag
                self._start_detection(image, self.next_detection, low_resolution=False)

    def _detect_crops(self, detector, image):
        """Return the nominal crops (n, 4) of the faces that the detector finds."""
        return detector.to_crop(detector(image), self.predictor.crop["scale"])

    def _match(self, track_boxes, crops):
        """Match detected crops to tracks, given as {track id: box}.

        Returns the indices of crops that match no track, and the doubtful tracks: those that match
        no crop and have too low a confidence, or have been missed too often.
        """
        ids = list(track_boxes)
        pairs = _greedy_pairs(list(track_boxes.values()), crops, match_scores, 0)
        detected = {ids[i] for i in pairs}
        candidates = [track for track in self.tracks if track.id in track_boxes]
        for track in candidates:
            track.missed = 0 if track.id in detected else track.missed + 1
        # A hand may pass for a face in one frame, so an undetected face needs more confidence.
        doubtful = [track for track in candidates if track.missed and (
            track.confidence.mean() < UNDETECTED_FACTOR * self.min_confidence if self.has_confidence
            else track.missed >= MAX_MISSED)]
        return [j for j in range(len(crops)) if j not in pairs.values()], doubtful

    def _lose(self, doubtful):
        self.tracks = [track for track in self.tracks if track not in doubtful]
        self.lost += doubtful

    def _verify(self, image, crops):
        """Return landmarks, confidence and refined crops of the crops that show a face."""
        points, confidence, refined = refine(self.predictor, image, crops)
        faces = [i for i in range(len(crops)) if self._is_face(confidence[i], refined[i], image)
                 and match_scores(refined[[i]], crops[[i]]) > 0]
        scores = face_score(self.predictor, image, points[faces], confidence[faces])
        faces = [i for i, score in zip(faces, scores) if score >= MIN_SCORE]
        self.rejected += len(crops) - len(faces)
        return points[faces], confidence[faces], refined[faces]

    def _add(self, points, confidence, crops, time):
        """Start tracks of new faces, and resume those of lost faces that returned."""
        lost = list(self.lost)
        predicted = [track.predicted_box(time) for track in lost]
        returned = {j: i for i, j in _greedy_pairs(predicted, crops, iou, 0.3).items()}
        rolls = crop_rolls(points, self.predictor.scheme) if lost else ()
        for j in range(len(crops)):
            if not _is_apart(crops[j], self.tracks) or j in returned and abs(_turn(
                    crop_rolls(lost[returned[j]].raw_px[None], self.predictor.scheme)[0],
                    rolls[j])) > MAX_ROLL_CHANGE:
                continue
            track = Track(self.next_id, points[j], points[j], confidence[j], crops[j], time,
                          self._face_filter())
            if j in returned:
                track.id, track.velocity = lost[returned[j]].id, lost[returned[j]].velocity
                self.lost.remove(lost[returned[j]])
            else:
                self.next_id += 1
            self.tracks.append(track)
        self.tracks.sort(key=lambda track: track.id)

    def _face_filter(self):
        lids = sum(self.predictor.scheme.eyes or (), [])
        return FaceFilter(*self.filter_settings, lids) if self.filter_settings[0] else None


def largest(tracks: list[Track]) -> Track | None:
    """Return the track with the largest crop, or None where there is none."""
    return max(tracks, default=None, key=lambda track: (track.box[2:] - track.box[:2]).prod())


def _centre(box):
    # Plain numbers here and in _side: NumPy is slow on so few.
    x_min, y_min, x_max, y_max = (float(v) for v in box)
    return (x_min + x_max) / 2, (y_min + y_max) / 2


def _side(box):
    """Return the longer side of a box (4,)."""
    x_min, y_min, x_max, y_max = (float(v) for v in box)
    return max(x_max - x_min, y_max - y_min)


def _turn(roll, other):
    """Return the angle from one roll to another, in radians from -pi to pi."""
    return (other - roll + math.pi) % math.tau - math.pi


def _is_apart(box, tracks):
    """Return whether a box (4,) shows none of the tracked faces."""
    return not tracks or iou(box[None], [track.box for track in tracks]).max() <= SAME_FACE_IOU


def _greedy_pairs(boxes, others, score, min_score):
    """Return {i: j} of boxes and others that score above min_score, best first, each used once."""
    scores = score(numpy.reshape(boxes, (-1, 4)), numpy.reshape(others, (-1, 4)))
    pairs = {}
    while scores.size and scores.max() > min_score:
        i, j = (int(v) for v in numpy.unravel_index(scores.argmax(), scores.shape))
        pairs[i] = j
        scores[i], scores[:, j] = 0, 0
    return pairs
