"""Measure the driver's events and states on films whose truth is known.

    python -m tools.benchmark.films FOLDER [--truth FILE.csv] [--weights FILE ...] [--films NAME]

Each film runs through the pipeline of `demo.py --driver`. The truth is a CSV file with the columns
film (name of a file in FOLDER), kind, start and end (seconds). Kinds:

* blink, microsleep, sleep, wink, yawn: an event that must be found. Its times are those at which
  the lids pass half open.
* looks down, not visible: the state in which the person is. No event needs to be found.
* no face: no eyes of a person are in sight; a face with a state other than `not visible` is wrong.
* ignore: neither events nor states of this time count.

Films without a row in the file, and rows of films that the folder lacks, are left out. A film in
which nothing must be found has a row `ignore` from 0 to 0.

An event is a hit where one of the same kind overlaps it, give or take NEAR seconds, and each counts
once. `false` counts the other events of these kinds. `times` is the mean distance of the start and
the end of the hits from the truth. `wrong state` is the time in which the state says that the eyes
are closed although they are not, that nobody is visible although somebody is, or that somebody is
visible where the truth says `no face`, more than SETTLE seconds after the truth changed.
Intervals are the 2.5 and 97.5 percentiles of resampled films. Takes minutes.
"""
from __future__ import annotations

import argparse
import csv
import dataclasses
import pathlib
from typing import TYPE_CHECKING

import cv2
import numpy

from tools.benchmark.common import model_parser, say, table
from utils.args import ROOT
from utils.detection.detector import get_detector
from utils.drowsiness.states import STATES
from utils.errors import UserError
from utils.errors import run as guarded
from utils.pipeline import Pipeline
from utils.predictor import Predictor
from utils.tracking import sources

if TYPE_CHECKING:
    from collections.abc import Iterable

TRUTH = ROOT / "tools" / "splits" / "films.csv"
EVENTS = ("blink", "microsleep", "sleep", "wink", "yawn")
KINDS = (*EVENTS, "looks down", "not visible", "no face", "ignore")
NEAR, SETTLE = 0.15, 1.0  # Seconds.
RESAMPLES = 2000


@dataclasses.dataclass(frozen=True)
class Span:
    """A time in a film, in seconds."""
    kind: str
    start: float
    end: float

    def overlap(self, start: float, end: float, margin: float = 0.0) -> float:
        """Return the seconds shared with another time, both extended by half of `margin`."""
        return min(self.end, end) - max(self.start, start) + margin


@dataclasses.dataclass
class Score:
    """What was found in one film; the seconds of `times` are per hit."""
    hits: int = 0
    misses: int = 0
    false: int = 0
    times: list[float] = dataclasses.field(default_factory=list)
    wrong: float = 0.0
    notes: list[str] = dataclasses.field(default_factory=list)


def read_truth(path: str | pathlib.Path) -> dict[str, list[Span]]:
    """Return {film: spans} of a truth file.

    Raises:
        UserError: where it is not one.
    """
    films = {}
    try:
        with open(path, newline="", encoding="utf-8") as file:
            for number, row in enumerate(csv.DictReader(file), 2):
                try:
                    span = Span(row["kind"], float(row["start"]), float(row["end"]))
                except (KeyError, TypeError, ValueError):
                    raise UserError(f"{path}: line {number} has not film,kind,start,end") from None
                if span.kind not in KINDS or not span.start <= span.end:
                    raise UserError(f"{path}: line {number}: {span.kind} {span.start} {span.end}; "
                                    f"expected one of {', '.join(KINDS)} and start <= end")
                films.setdefault(row["film"], []).append(span)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    return films


def score(truth: list[Span], events: Iterable, states: Iterable[tuple[float, str]]) -> Score:
    """Compare events and states with the truth.

    Args:
        truth: of the film.
        events: states.Event of the driver.
        states: (seconds, name) of each frame.
    """
    found, ignored = Score(), [span for span in truth if span.kind == "ignore"]
    left = [event for event in events if event.kind in EVENTS]
    for span in (span for span in truth if span.kind in EVENTS):
        near = [event for event in left if event.kind == span.kind
                and span.overlap(event.start, event.end, 2 * NEAR) > 0]
        best = max(near, key=lambda event: span.overlap(event.start, event.end), default=None)
        if best is not None:
            left.remove(best)
            found.hits += 1
            found.times += [abs(best.start - span.start), abs(best.end - span.end)]
        elif not any(one.overlap(span.start, span.end) > 0 for one in ignored):
            found.misses += 1
            found.notes.append(f"missed {span.kind} {span.start:.2f}-{span.end:.2f}")
    for event in left:
        if not any(span.overlap(event.start, event.end) > 0 for span in ignored):
            found.false += 1
            found.notes.append(f"false {event.kind} {event.start:.2f}-{event.end:.2f}")
    last = None
    for seconds, state in states:
        if last is not None and _is_wrong(truth, seconds, state):
            found.wrong += seconds - last
        last = seconds
    return found


def _is_wrong(truth, seconds, state):
    """Return whether the state contradicts the truth, which did not change just before."""
    def during(*kinds, before=0.0, after=0.0):
        return any(span.kind in kinds and span.start - before <= seconds <= span.end + after
                   for span in truth)

    if during("ignore", after=SETTLE):
        return False
    if STATES[state].eyes_closed:
        return not during("microsleep", "sleep", after=SETTLE) and not during("blink", after=0.1)
    if during("no face"):
        return state != "not visible"
    return state == "not visible" and seconds > SETTLE and not during(
        "not visible", after=SETTLE)


def run_film(predictor: Predictor, detector, path: pathlib.Path, film: list[Span]) -> Score:
    """Run a film through the pipeline of the demo and compare it with its truth."""
    options = argparse.Namespace(eyes=True, driver=True, pose=False, landmarks=None, events=None,
                                 alarm=None)
    pipeline = Pipeline(predictor, detector, options, {}, draws=False)
    source = sources.open_source("video", path)
    events, states = [], []
    try:
        while (taken := source.read()) is not None:
            image = cv2.cvtColor(taken[0], cv2.COLOR_BGR2RGB)
            seen = pipeline.observe(image, taken[1], path.name)
            events += [event for _, event in seen.events]
            states.append((taken[1], seen.driver[1]["state"]))
    finally:
        source.release()
    return score(film, events + [event for _, event in pipeline.close()], states)


def interval(scores: list[Score], figure, seed: int = 0) -> str:
    """Return a figure of all films with its interval by resampling films, as text."""
    random = numpy.random.default_rng(seed)
    values = [figure([scores[i] for i in random.integers(0, len(scores), len(scores))])
              for _ in range(RESAMPLES)]
    low, high = numpy.nanpercentile(values, (2.5, 97.5))
    return f"{figure(scores):.2f} ({low:.2f} to {high:.2f})"


def _found(scores):
    count = sum(one.hits + one.misses for one in scores)
    return sum(one.hits for one in scores) / count if count else numpy.nan


def _times(scores):
    values = sum((one.times for one in scores), [])
    return float(numpy.mean(values)) if values else numpy.nan


def rows(names: list[str], scores: list[Score]) -> list[list]:
    """Return the cells of a table: a row per film and one of all."""
    found = [[name, one.hits, one.misses, one.false, f"{_times([one]):.2f}", f"{one.wrong:.1f}",
              "; ".join(one.notes) or "right"] for name, one in zip(names, scores)]
    found.append(["all: share found, false and wrong a film", interval(scores, _found), "",
                  interval(scores, lambda some: sum(one.false for one in some) / len(some)),
                  interval(scores, _times),
                  interval(scores, lambda some: sum(one.wrong for one in some) / len(some)), ""])
    return found


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = model_parser("tools.benchmark.films", __doc__, "to measure")
    parser.add_argument("folder", type=pathlib.Path, metavar="FOLDER", help="with the films")
    parser.add_argument("--truth", default=str(TRUTH), metavar="FILE.csv",
                        help="[tools/splits/films.csv]")
    parser.add_argument("--films", nargs="+", metavar="NAME", help="only these films [all]")
    return parser.parse_args(argv)


def run(argv: list[str] | None = None) -> None:
    """Run every model on every film and print a Markdown table each."""
    options = parse(argv)
    truth = {name: film for name, film in read_truth(options.truth).items()
             if (options.folder / name).is_file() and name in (options.films or [name])}
    if not truth:
        raise UserError(f"{options.folder}: has none of the films of {options.truth}")
    for weights in options.weights:
        predictor, scores = Predictor(weights), []
        for name, film in truth.items():
            scores.append(run_film(predictor, get_detector(options.detector),
                                   options.folder / name, film))
            say(f"{name}: {'; '.join(scores[-1].notes) or 'right'}, "
                f"wrong state {scores[-1].wrong:.1f} s")
        print(f"{weights}, {options.detector}\n")
        print("\n".join(table(["film", "hits", "missed", "false", "times (s)", "wrong state (s)",
                               "what"], rows(list(truth), scores))), flush=True)


if __name__ == "__main__":
    guarded(run)
