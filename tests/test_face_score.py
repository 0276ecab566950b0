"""The face score: its network, its fit, the shipped file, and the tracker that uses it."""
import types

import cv2
import numpy
import pytest
import torch
from helpers import painted_faces

from tools.benchmark import face_scores
from utils.data.drawn_faces.render import render
from utils.detection import face_score
from utils.detection.detector import get_detector
from utils.errors import UserError
from utils.landmarks.eyelids import EyeThresholds
from utils.predictor import Predictor
from utils.tracking import tracker
from utils.training import face_fit

WEIGHTS = "weights/tiny.int8.onnx"


def save(path, model):
    with open(path, "wb") as file:
        numpy.savez(file, **face_fit.arrays(model))
    return face_score.FaceScore(path)


def stored_faces(count):
    """Stored crops (count, STORED, STORED) of drawn faces."""
    crops = []
    for seed in range(count):
        image, points = render([7, seed])
        box = numpy.concatenate([points.min(0), points.max(0)])
        middle, half = (box[:2] + box[2:]) / 2, 0.6 * (box[2:] - box[:2]).max()
        crops.append(face_fit.stored(image, numpy.concatenate([middle - half, middle + half]), 0))
    return numpy.stack(crops)


def textures(count, side=face_fit.STORED):
    """Smooth noise (count, side, side)."""
    rng = numpy.random.default_rng(0)
    return numpy.stack([cv2.GaussianBlur(
        rng.integers(0, 256, (side, side)).astype(numpy.float32), (0, 0), 1 + i % 5)
        for i in range(count)]).astype(numpy.uint8)


def test_numpy_and_torch_give_the_same_scores(tmp_path):
    torch.manual_seed(3)
    model = face_fit.build()
    with torch.no_grad():
        model[-1].weight *= 20
    grey = numpy.random.default_rng(1).integers(
        0, 256, (6, face_score.SIDE, face_score.SIDE)).astype(numpy.uint8)
    images = torch.from_numpy(face_score.normalise(grey))[:, None]
    for _ in range(5):
        model(images)  # Batch norm has statistics then.
    with torch.no_grad():
        expected = torch.sigmoid(model.eval()(images))[:, 0].numpy()
    assert numpy.ptp(expected) > 0.01
    assert numpy.allclose(save(tmp_path / "score.npz", model).of_grey(grey), expected, atol=2e-3)


def test_a_fit_separates_faces_from_textures(tmp_path):
    faces, others = stored_faces(48), textures(96)
    score = save(tmp_path / "score.npz", face_fit.fit(faces[:36], others[:72], epochs=50))
    margin = (face_fit.STORED - face_score.SIDE) // 2
    inner = slice(margin, margin + face_score.SIDE)
    assert score.of_grey(faces[36:, inner, inner]).min() > score.of_grey(
        others[72:, inner, inner]).max()


def test_wrongly_placed_faces_become_examples_without_a_face():
    crop, rng = stored_faces(1)[0], numpy.random.default_rng(0)
    drawn = [face_fit.vary(crop, True, rng, textures(4)) for _ in range(300)]
    assert 10 < sum(not is_face for _, is_face in drawn) < 60
    assert not any(face_fit.vary(crop, False, rng, textures(4))[1] for _ in range(50))
    assert all(image.shape == (face_score.SIDE,) * 2 for image, _ in drawn)


def test_every_second_photo_is_held_out(tmp_path):
    for i in range(7):
        cv2.imwrite(str(tmp_path / f"{i}.png"), numpy.zeros((4, 4, 3), numpy.uint8))
    fitted, held_out = face_fit.photos(tmp_path), face_fit.photos(tmp_path, held_out=True)
    assert [p.stem for p in fitted] == ["0", "2", "4", "6"]
    assert [p.stem for p in held_out] == ["1", "3", "5"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="0 photos found"):
        face_fit.photos(tmp_path / "empty")


def test_the_benchmark_counts_faces_and_other_crops(tmp_path, monkeypatch, capsys):
    (tmp_path / "faces").mkdir()
    (tmp_path / "scenes").mkdir()
    for i in range(4):
        cv2.imwrite(str(tmp_path / f"faces/{i}.png"), render([7, i])[0][..., ::-1])
        cv2.imwrite(str(tmp_path / f"scenes/{i}.png"), textures(1, 200)[0])
    monkeypatch.setattr("sys.argv", [
        "face_scores", "--faces", str(tmp_path / "faces"), "--scenes", str(tmp_path / "scenes"),
        "--detector", "haar", "--sheet", str(tmp_path / "sheet.png")])
    face_scores.run()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]]
            for line in capsys.readouterr().out.strip().splitlines()[2:]]
    counts = {kind: (int(crops), int(confident), int(scored))
              for _, _, kind, crops, confident, scored in rows}
    assert counts["face"][0] in (1, 2)
    assert counts["face"] == counts["face"][:1] * 3
    assert counts["squares"][0] == 80
    assert counts["squares"][2] == 0
    assert all(scored <= confident <= crops for crops, confident, scored in counts.values())


def test_files_that_are_no_face_score(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        face_score.FaceScore(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("weights")
    numpy.savez(tmp_path / "other.npz", mean=numpy.zeros(3))
    for name in ("text.npz", "other.npz"):
        with pytest.raises(UserError, match="not a face score") as error:
            face_score.FaceScore(tmp_path / name)
        assert "\n" not in str(error.value)


def test_models_without_a_face_threshold_have_no_score():
    image, points = render([7, 1])
    noise = numpy.random.default_rng(0).integers(0, 256, image.shape).astype(numpy.uint8)
    predictor, sure = Predictor(WEIGHTS, threads=1), numpy.full((1, 68), 0.8)
    assert face_score.face_score(predictor, image, points[None], sure)[0] > 0.5
    assert face_score.face_score(predictor, noise, points[None], sure - 0.15)[0] < 0.5
    other = types.SimpleNamespace(eyes=EyeThresholds(), scheme=predictor.scheme)
    assert face_score.face_score(other, noise, points[None], sure).tolist() == [1.0]
    assert face_score.face_score(predictor, noise, points[None][:0], sure[:0]).shape == (0,)


def test_the_mirror_error_is_computed_for_doubtful_faces(monkeypatch):
    image, points = render([7, 1])
    predictor, calls = Predictor(WEIGHTS, threads=1), []
    monkeypatch.setattr(face_score, "mirror_errors",
                        lambda predictor, image, points: calls.append(len(points))
                        or numpy.full(len(points), 0.1))
    both, confidence = numpy.stack([points, points]), numpy.full((2, 68), 0.85)
    sure = face_score.face_score(predictor, image, both, confidence)
    assert not calls
    confidence[1] = 0.6
    doubtful = face_score.face_score(predictor, image, both, confidence)
    assert calls == [1]
    assert doubtful[0] == sure[0] > doubtful[1]
    # A graph that averages with the mirrored face has no mirror error.
    predictor.flip_test = True
    assert face_score.face_score(predictor, image, both, confidence)[1] > doubtful[1]
    assert calls == [1]


def test_the_shipped_score_knows_drawn_faces_and_textures():
    assert face_score.PATH.stat().st_size < 300_000
    margin = (face_fit.STORED - face_score.SIDE) // 2
    inner = slice(margin, margin + face_score.SIDE)
    kept = face_score.shipped().of_grey(stored_faces(60)[:, inner, inner]) >= face_score.MIN_SCORE
    assert kept.mean() >= 0.9
    found = face_score.shipped().of_grey(textures(60, face_score.SIDE))
    assert (found >= face_score.MIN_SCORE).mean() <= 0.02


class Scores:
    """Replaces utils.detection.face_score.face_score: the next scores of every face."""

    def __init__(self, *scores):
        self.scores = list(scores)

    def __call__(self, predictor, image, points, confidence):
        return numpy.full(len(points), self.scores.pop(0) if len(self.scores) > 1
                          else self.scores[0])


def play(monkeypatch, scores, frames=40):
    """Return the ids of the tracked faces in each frame; one painted face is there."""
    monkeypatch.setattr(tracker, "face_score", scores)
    made = tracker.Tracker(painted_faces.Painted(), painted_faces.detector())
    image = painted_faces.paint(painted_faces.background(), (1, 150, 120, 60))
    return [[track.id for track in made.update(image, i / 30)] for i in range(frames)], made


def test_a_box_without_a_face_is_no_new_face(monkeypatch):
    tracked, made = play(monkeypatch, Scores(0.1))
    assert tracked == [[]] * 40
    assert made.rejected > 0


def test_a_track_ends_when_its_scores_are_low(monkeypatch):
    # A new face, then its scores in every twentieth frame.
    assert [] in play(monkeypatch, Scores(0.9, 0.0))[0][:tracker.SCORE_INTERVAL + 1]
    seen_for_long = play(monkeypatch, Scores(*[1.0] * 6, 0.0, 1.0), 200)[0]
    assert seen_for_long == [[1]] * 200
    assert [] in play(monkeypatch, Scores(*[1.0] * 6, 0.0), 200)[0]


def test_no_mesh_lies_on_leaves(shared):
    """Haar finds faces in the foliage of this film; the network confirms some of them."""
    video = cv2.VideoCapture(str(shared / "data/films/haar_phantoms.mp4"))
    made = tracker.Tracker(Predictor(WEIGHTS, threads=1), get_detector("haar"))
    for number in range(224):
        image = video.read()[1]
        if number % 2 == 0:
            tracks = made.update(image[..., ::-1].copy(), number / 25)
            # The woman is at 290 to 400 px.
            middles = [float(track.points_px[:, 0].mean()) for track in tracks]
            assert len(middles) == 1, (number, middles)
            assert 250 < middles[0] < 440


def test_faces_are_kept(shared):
    detector = get_detector(shared / "models/yunet_n_640_640.onnx").with_retry()
    predictor, kept = Predictor(WEIGHTS, threads=1), []
    for path in sorted((shared / "data/300W/lfpw/testset").glob("*.jpg"))[::9]:
        image = cv2.imread(str(path))[..., ::-1].copy()
        kept.append(bool(tracker.Tracker(predictor, detector).update(image, 0)))
    assert numpy.mean(kept) >= 0.96
