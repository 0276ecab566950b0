"""The weights that the page can choose from, and a pipeline for each viewer."""
from __future__ import annotations

import argparse
import contextlib
import importlib.util
import pathlib
import threading

from utils.detection.detector import get_detector
from utils.drowsiness import eye_patch
from utils.errors import UserError
from utils.experiment import WEIGHTS
from utils.landmarks import pose
from utils.landmarks.schemes import Scheme
from utils.pipeline import Pipeline
from utils.predictor import Predictor
from utils.web.messages import Refused


class Models:
    """Loads each weights file once, and makes pipelines that share it.

    ONNX Runtime runs a file with one thread: that of the viewer. Viewers do not wait for each other
    and no thread spins.

    Args:
        default: the weights file that a viewer starts with.
        detector: haar, or the path of a detector.
        device: auto, cpu or cuda; None: auto for a .pt, cpu for an .onnx.
        tracker_settings: keyword arguments of Tracker.
        folder: whose weights can be chosen besides.

    Attributes:
        paths: {name: file}, the default first.
    """

    def __init__(self, default: pathlib.Path, detector: str, device: str | None,
                 tracker_settings: dict, folder: pathlib.Path = WEIGHTS):
        self.detector, self.device, self.settings = detector, device, tracker_settings
        files = [default, *sorted(folder.glob("*.onnx")), *sorted(folder.glob("*/best.onnx"))]
        if importlib.util.find_spec("torch"):
            files += [*sorted(folder.glob("*.pt")), *sorted(folder.glob("*/best.pt"))]
        self.paths = {}
        for path in files:
            # A .raw.onnx ends in the maps; other suffixes are parts of a file being written. The
            # eye state is no landmark model.
            if not path.name.endswith((".raw.onnx", eye_patch.WEIGHTS.name)) \
                    and path.resolve() not in self.paths.values():
                self.paths[_name(path, folder)] = path.resolve()
        self._predictors, self._lock = {}, threading.Lock()

    @property
    def default(self) -> str:
        """Name of the weights that a viewer starts with."""
        return next(iter(self.paths))

    def predictor(self, name: str) -> Predictor:
        """Return the model of this name; it is loaded at the first call.

        Raises:
            Refused: where there is none of this name or it cannot be loaded.
        """
        if name not in self.paths:
            raise Refused(f"weights {name[:80]}: not one of the server's")
        with self._lock:
            if name not in self._predictors:
                path = self.paths[name]
                device = self.device or ("auto" if path.suffix == ".pt" else "cpu")
                try:
                    self._predictors[name] = Predictor(path, device, threads=1)
                except UserError as error:
                    # The page shows the name alone, not the folders of this machine.
                    raise Refused(str(error).replace(str(path), name)) from None
            return self._predictors[name]

    def pipeline(self, name: str, still: bool = False) -> Pipeline:
        """Return a new pipeline with these weights and a detector of its own.

        It watches one person and estimates the head's pose where the scheme of the weights has the
        landmarks for it. It writes no file.

        Args:
            name: of the weights.
            still: whether it takes single pictures instead of a video.

        Raises:
            Refused: see `predictor`.
        """
        predictor = self.predictor(name)
        options = argparse.Namespace(
            eyes=False, driver=False, pose=False, landmarks=None, events=None, alarm=None,
            detector=self.detector)
        watch_all(options, predictor.scheme)
        options.driver = options.driver and not still
        return Pipeline(predictor, get_detector(self.detector), options, self.settings, draws=False)


def watch_all(options: argparse.Namespace, scheme: Scheme) -> None:
    """Turn on the eyes of one person and the head pose in options, where a scheme has them."""
    if scheme.eyes is not None:
        options.eyes = options.driver = True
    with contextlib.suppress(UserError):
        pose.model_points(scheme)
        options.pose = True


def _name(path, folder):
    path = path.resolve()
    inside = path.is_relative_to(folder.resolve())
    return path.relative_to(folder.resolve()).as_posix() if inside else path.name
