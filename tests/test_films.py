"""The benchmark of films with a truth file."""
import pytest

from tools.benchmark import films
from tools.benchmark.films import Span, read_truth, score
from utils.detection.detector import get_detector
from utils.drowsiness.intervals import Event
from utils.errors import UserError
from utils.predictor import Predictor

TRUTH = [Span("blink", 1.0, 1.2), Span("sleep", 5.0, 9.0), Span("not visible", 12.0, 15.0),
         Span("ignore", 18.0, 19.0)]


def steps(*spans):
    """Return [(seconds, state)] at 10 frames a second; spans: (until, state)."""
    found, frame = [], 0
    for until, state in spans:
        while frame / 10 < until:
            found.append((frame / 10, state))
            frame += 1
    return found


def test_what_is_right_has_no_error():
    events = [Event("blink", 1.02, 1.2), Event("sleep", 5.0, 9.1), Event("blink", 18.2, 18.4),
              Event("not visible", 12, 15)]
    found = score(TRUTH, events, steps((5.5, "awake"), (9, "asleep"), (12.5, "drowsy"),
                                       (15, "not visible"), (20, "looks down")))
    assert (found.hits, found.misses, found.false, found.wrong) == (2, 0, 0, 0)
    assert found.times == pytest.approx([0.02, 0, 0, 0.1])
    assert found.notes == []


def test_what_is_wrong_is_counted():
    events = [Event("microsleep", 5.0, 7.0), Event("blink", 1.3, 1.5), Event("blink", 1.1, 1.2)]
    found = score(TRUTH, events, steps((3, "awake"), (5, "microsleep"), (7, "asleep"),
                                       (11, "not visible"), (12, "awake")))
    assert (found.hits, found.misses, found.false) == (1, 1, 2)
    assert found.wrong == pytest.approx(2 + 4, abs=0.2)
    assert any("missed sleep 5.00-9.00" in note for note in found.notes)


def test_a_state_where_no_face_is_counts_as_wrong():
    truth = [Span("no face", 0, 10)]
    assert score(truth, [], steps((10, "not visible"))).wrong == 0
    assert score(truth, [], steps((10, "awake"))).wrong == pytest.approx(9.9)


@pytest.mark.parametrize(("text", "wrong"), [
    ("film,kind,start,end\na.mp4,blink,1\n", "line 2"),
    ("film,kind,start,end\na.mp4,sneeze,1,2\n", "sneeze"),
    ("film,kind,start,end\na.mp4,blink,2,1\n", "line 2"), (None, "cannot be read")])
def test_a_wrong_truth_file_is_one_line(text, wrong, tmp_path):
    path = tmp_path / "truth.csv"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=wrong):
        read_truth(path)


def test_the_shipped_truth_is_one():
    assert len(read_truth(films.TRUTH)) == 10


def test_the_table_has_an_interval_by_resampling_films():
    scores = [films.Score(hits=2, times=[0.1, 0.1]), films.Score(misses=2, false=1, wrong=3.0)]
    *_, total = films.rows(["a", "b"], scores)
    assert total[1] == "0.50 (0.00 to 1.00)"
    assert total[3] == "0.50 (0.00 to 1.00)"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["leaned_close_then_back.mp4", "turn_away_blink.mp4",
                                  "madeup_shut_4s.mp4"])
def test_films_of_people_are_right(name, shared):
    folder = shared / "data" / "films"
    detector = shared / "models" / "yunet_n_640_640.onnx"
    if not (folder / name).is_file() or not detector.is_file():
        pytest.skip("needs shared films and YuNet")
    found = films.run_film(Predictor("weights/tiny.int8.onnx"), get_detector(str(detector)),
                           folder / name, read_truth(films.TRUTH)[name])
    assert found.false == 0
    assert found.wrong == 0
    assert [note for note in found.notes if "sleep" in note] == []
