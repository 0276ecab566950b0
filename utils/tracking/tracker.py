"""Faces followed through the frames of a video."""
import concurrent.futures
import copy
import dataclasses
import math

import cv2
import numpy

from utils.detection.detector import matches, overlap
from utils.detection.refine import crop_rolls, has_moved, place_crops, predict_boxes, refine
from utils.landmarks.eyelids import EyeThresholds
from utils.tracking.one_euro import FaceFilter

# Nothing else shows a shot cut as well: on 275 frames of video with three cuts the correlation of
# thumbnails fell to 0.24 or less at the cuts and never below 0.64 within a shot.
SAME_SHOT = 0.45
# Mean confidence below which a face is given up where weights say nothing of faces (main.py
# --fit-eyes), or so many times what they ask of eyes: where both were fitted, 1.1 to 1.6 times.
MIN_CONFIDENCE, OF_EYES = 0.15, 1.4
# Times min_confidence that a face needs which the detector does not see: with 1.25 `tiny` loses a
# face whose lower half is covered in 388 of 1850 frames that Haar looks at, with 1.12 in 79.
UNSEEN = 1.12
MISSED = 2  # Looks in a row that do not see a face, where confidence says nothing: it is lost.
SAME_FACE = 0.5  # Overlap above which two crops are of one face.
MEMORY = 0.5  # Seconds for which a lost face's id waits for it.
# While faces are followed, the detector looks for others on a thread of its own, and what it sees
# is used so many frames later (or less, with a small `every`): a fixed number, as a film must give
# the same landmarks each time. Two frames of the smallest network take as long as a quick look.
LAG = 2
# After so many quick looks comes one at the whole size, for the small faces that they miss.
THOROUGH = 6


@dataclasses.dataclass(eq=False)
class Track:
    """A face followed through frames. points_px (K, 2) steadied, raw_px (K, 2) as predicted,
    confidence (K,), box: its nominal crop (4,); all in pixels of the frame; time in seconds;
    missed: how many of the detector's last looks did not see it.
    """
    id: int
    points_px: numpy.ndarray
    raw_px: numpy.ndarray
    confidence: numpy.ndarray
    box: numpy.ndarray
    time: float
    steady: FaceFilter | None
    velocity: tuple = (0.0, 0.0)
    missed: int = 0

    def __post_init__(self):
        self._steady()

    def expected(self, time):
        """The box (4,) where the face should be at `time`, at its last velocity."""
        x, y = (speed * (time - self.time) for speed in self.velocity)
        return self.box + (x, y, x, y)

    def move(self, points_px, confidence, box, time):
        """Go on to this frame's measurement."""
        step = max(time - self.time, 1e-3)
        self.velocity = tuple(
            (speed + (new - old) / step) / 2
            for speed, old, new in zip(self.velocity, _centre(self.box), _centre(box)))
        self.raw_px, self.confidence, self.box, self.time = points_px, confidence, box, time
        self._steady(step)

    def _steady(self, step=None):
        self.points_px = self.steady(self.raw_px, _side(self.box), step) if self.steady \
            else self.raw_px


@dataclasses.dataclass(frozen=True)
class _Look:
    """A look of the detector that is under way: image as it was, track ids to their boxes then, the
    frame in which it is used, whether it is a quick one, and the boxes to come.
    """
    image: numpy.ndarray
    tracks: dict
    due: int
    quick: bool
    boxes: concurrent.futures.Future


class Tracker:
    """Faces of a video: `update(image, time)` frame by frame gives the list of Tracks.

    every: within so many frames a new face is found. The detector looks at once, at the whole size,
    at shot cuts, when a face is lost and each `every` frames where none is followed. Beside faces
    that are followed it takes quick looks in the background, LAG frames long, and after THOROUGH of
    them one at the whole size; small faces wait for that. What is found depends on the frames
    alone, never on how long a look takes.
    min_confidence: a face whose mean confidence is below it is lost; 0: what the weights say, else
    MIN_CONFIDENCE: networks differ in how sure they are, by how long they were trained.
    filter_min_cutoff (Hz) and filter_beta (Hz per face side a second) of the One Euro filter;
    min_cutoff 0 switches it off.
    """

    def __init__(self, predictor, detector, every=10, min_confidence=0.0, filter_min_cutoff=1.2,
                 filter_beta=5.0):
        self.predictor, self.detector = predictor, detector
        limits = getattr(predictor, "eyes", EyeThresholds())
        self.scored = getattr(predictor, "scored", True)
        self.every = every
        # A face that appears just after a look is seen by the next one, and is there LAG later.
        self.lag = min(LAG, (every - 1) // 2)
        self.min_confidence = (min_confidence or limits.face or OF_EYES * limits.min_confidence
                               or MIN_CONFIDENCE)
        self.filter_settings = filter_min_cutoff, filter_beta
        self.tracks, self.lost = [], []
        self.frame, self.next_detection, self.next_id, self.thumbnail = 0, 0, 1, None
        self.look, self.quick_looks, self.background = None, 0, None
        self.refused = 0  # Boxes of the detector in which the network saw no face.

    def update(self, image, time):
        """The faces of the next frame, RGB uint8 (H, W, 3), at `time` in seconds."""
        if self._is_cut(image):
            # The network may believe in what took a face's place: a new shot starts from nothing.
            self.tracks, self.lost, self.next_detection = [], [], self.frame
            self._forget_look()
        self.lost = [track for track in self.lost if time - track.time <= MEMORY]
        before = len(self.tracks)
        self._follow(image, time)
        if len(self.tracks) < before:
            self._detect(image, time)
        elif self.look and self.frame >= self.look.due:
            self._use_look(image, time)
        if self.frame >= self.next_detection:
            if self.tracks and not self.lost and self.lag:
                self._begin_look(image, self.frame + self.lag)
                self.next_detection = self.frame + self.every - self.lag
            else:
                self._detect(image, time)
        self.frame += 1
        # Copies: what the caller keeps must not change with the next frame.
        return [copy.copy(track) for track in self.tracks]

    def _is_cut(self, image):
        # Single pixels first: the mean of all of a large frame takes longer than a crop.
        small = cv2.resize(image, (64, 36), interpolation=cv2.INTER_NEAREST)
        small = cv2.resize(small, (32, 18), interpolation=cv2.INTER_AREA)
        grey = cv2.cvtColor(small, cv2.COLOR_RGB2GRAY).ravel().astype(numpy.float64)
        grey -= grey.mean()
        size = math.sqrt(grey @ grey)
        last, self.thumbnail = self.thumbnail, (grey, size)
        return last is not None and bool(last[0] @ grey < SAME_SHOT * last[1] * size)

    def _follow(self, image, time):
        if not self.tracks:
            return
        boxes = numpy.array([track.box for track in self.tracks])
        rolls = crop_rolls(numpy.array([track.raw_px for track in self.tracks]), self.predictor.scheme)
        points, confidence = predict_boxes(self.predictor, image, boxes, rolls)
        wanted, rolls = place_crops(self.predictor, points)
        again = [i for i in range(len(boxes)) if has_moved(boxes[i], wanted[i])]
        if again:
            points[again], confidence[again] = predict_boxes(self.predictor, image, wanted[again],
                                                         rolls[again])
            wanted[again] = place_crops(self.predictor, points[again])[0]
        # Where two tracks come to lie on one face, the one that jumps there goes, and waits at its
        # own velocity: behind a face that passes in front, it is found again on the other side.
        jump = [math.dist(_centre(box), _centre(track.expected(time)))
                for track, box in zip(self.tracks, wanted)] if len(wanted) > 1 else [0]
        kept = []
        for i in sorted(range(len(jump)), key=jump.__getitem__):
            track = self.tracks[i]
            if self._is_face(confidence[i], wanted[i], image) and _is_apart(wanted[i], kept):
                track.move(points[i], confidence[i], wanted[i], time)
                kept.append(track)
            else:
                self.lost.append(track)
        self.tracks = sorted(kept, key=lambda track: track.id)

    def _is_face(self, confidence, box, image):
        x, y = _centre(box)
        inside = 0 <= x < image.shape[1] and 0 <= y < image.shape[0]
        # Not mean(), which does the same in Python and takes five times as long.
        return bool(inside and confidence.sum() >= self.min_confidence * len(confidence))

    def _detect(self, image, time):
        """Look at once, at the whole size."""
        self._forget_look()
        boxes = self._boxes(self.detector, image)
        new, doubtful = self._compare({track.id: track.box for track in self.tracks}, boxes)
        self._drop(doubtful)
        self._add(*self._start(image, boxes[new]), time)
        # A face just lost is looked for more often than a new one.
        self.next_detection = self.frame + (max(1, self.every // 3) if self.lost else
                                            self.every - self.lag if self.tracks else self.every)

    def _forget_look(self):
        """Let a look that is out of date end, as a detector does one thing at a time."""
        if self.look:
            concurrent.futures.wait([self.look.boxes])
            self.look = None

    def _begin_look(self, image, due, quick=True):
        if self.background is None:
            self.background = concurrent.futures.ThreadPoolExecutor(1, "detector")
        detector = self.detector.quick() if quick else self.detector
        # The caller may write the next frame to the same memory.
        image = image.copy()
        self.look = _Look(image, {track.id: track.box for track in self.tracks}, due,
                          detector is not self.detector,
                          self.background.submit(self._boxes, detector, image))

    def _use_look(self, image, time):
        look, self.look = self.look, None
        boxes = look.boxes.result()
        new, doubtful = self._compare(look.tracks, boxes)
        # What was no face then would else be looked for in vain each time.
        then = self._start(look.image, boxes[new])[2]
        if len(then) and look.tracks:
            then = then[overlap(then, list(look.tracks.values())).max(1) <= SAME_FACE]
        now = self._start(image, then)
        if len(now[2]) < len(then) or (look.quick and doubtful):
            self._detect(image, time)
            return
        self._drop(doubtful)
        self._add(*now, time)
        if self.lost:
            self.next_detection = min(self.next_detection, self.frame + max(1, self.every // 3))
        elif look.quick:
            self.quick_looks += 1
            if self.quick_looks % THOROUGH == 0:
                # It sees large faces too, so the next quick one can wait for it.
                self.next_detection = self.frame + self.every - self.lag
                self._begin_look(image, self.next_detection, quick=False)

    def _boxes(self, detector, image):
        """Nominal crops (n, 4) of the faces that detector sees."""
        return detector.to_crop(detector(image), self.predictor.crop["scale"])

    def _compare(self, known, boxes):
        """Which of boxes are none of known {track id: box}, and the tracks among these that have no
        box and are not certain enough without one, or had none the last time either.
        """
        ids = list(known)
        pairs = _pairs(list(known.values()), boxes, matches, 0)
        seen = {ids[i] for i in pairs}
        looked_for = [track for track in self.tracks if track.id in known]
        for track in looked_for:
            track.missed = 0 if track.id in seen else track.missed + 1
        # A hand may pass for a face in one frame: what the detector misses must look better.
        doubtful = [track for track in looked_for if track.missed and (
            track.confidence.mean() < UNSEEN * self.min_confidence if self.scored
            else track.missed >= MISSED)]
        return [j for j in range(len(boxes)) if j not in pairs.values()], doubtful

    def _drop(self, doubtful):
        self.tracks = [track for track in self.tracks if track not in doubtful]
        self.lost += doubtful

    def _start(self, image, boxes):
        """Points (n, K, 2), confidence (n, K) and nominal crops (n, 4) of those boxes in which, or
        near which, there is a face.
        """
        points, confidence, wanted = refine(self.predictor, image, boxes)
        good = [i for i in range(len(boxes)) if self._is_face(confidence[i], wanted[i], image)
                and matches(wanted[[i]], boxes[[i]]) > 0]
        self.refused += len(boxes) - len(good)
        return points[good], confidence[good], wanted[good]

    def _add(self, points, confidence, wanted, time):
        """Tracks of new faces, or of lost ones that are back."""
        lost = list(self.lost)
        expected = [track.expected(time) for track in lost]
        back = {j: i for i, j in _pairs(expected, wanted, overlap, 0.3).items()}
        for j in range(len(wanted)):
            if not _is_apart(wanted[j], self.tracks):
                continue
            track = Track(self.next_id, points[j], points[j], confidence[j], wanted[j], time,
                          self._filter())
            if j in back:
                track.id, track.velocity = lost[back[j]].id, lost[back[j]].velocity
                self.lost.remove(lost[back[j]])
            else:
                self.next_id += 1
            self.tracks.append(track)
        self.tracks.sort(key=lambda track: track.id)

    def _filter(self):
        lids = sum(self.predictor.scheme.eyes or (), [])
        return FaceFilter(*self.filter_settings, lids) if self.filter_settings[0] else None


def largest(tracks):
    """The Track with the largest crop, or None where there is none."""
    return max(tracks, default=None, key=lambda track: (track.box[2:] - track.box[:2]).prod())


def _centre(box):
    """x, y of the middle of a box (4,). Plain numbers: numpy is slow on so few."""
    x_min, y_min, x_max, y_max = (float(v) for v in box)
    return (x_min + x_max) / 2, (y_min + y_max) / 2


def _side(box):
    """The longer side of a box (4,)."""
    x_min, y_min, x_max, y_max = (float(v) for v in box)
    return max(x_max - x_min, y_max - y_min)


def _is_apart(box, tracks):
    """Whether box (4,) is another face than those of tracks."""
    return not tracks or overlap(box[None], [track.box for track in tracks]).max() <= SAME_FACE


def _pairs(boxes, others, share, least):
    """{i: j} of boxes and others whose share is more than `least`, best first, each used once."""
    shared = share(numpy.reshape(boxes, (-1, 4)), numpy.reshape(others, (-1, 4)))
    pairs = {}
    while shared.size and shared.max() > least:
        i, j = (int(v) for v in numpy.unravel_index(shared.argmax(), shared.shape))
        pairs[i] = j
        shared[i], shared[:, j] = 0, 0
    return pairs
