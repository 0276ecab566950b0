"""Record which data sets a model was trained on, directly and through other checkpoints.

A model inherits the licence of all faces that shaped its weights: those of its own training set, of
its unlabelled set, and of the checkpoints that it started from or was taught by. A training stores
their names in the checkpoint (`sets`); the ONNX metadata and the model card print the licence.
"""
from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Callable, Mapping

from utils.args import SAMPLES, load_args, upgrade
from utils.errors import UserError


def training_sets(settings: Mapping, read: Callable[[pathlib.Path], dict]) -> list[str]:
    """List the data sets behind weights trained with these settings.

    Args:
        settings: of the training, by name.
        read: checkpoint.read. It reads the checkpoints that the training starts from or is taught
            by, to include their sets. Missing ones and files of other projects are skipped.

    Returns:
        Names of sets, each once.
    """
    names = _own_sets(settings)
    for path in (pathlib.Path(settings["pretrained"]), *teacher_paths(settings["teacher"])):
        if path.suffix == ".pt" and path.is_file():
            # A damaged file is reported where its weights are loaded.
            with contextlib.suppress(UserError, KeyError, TypeError):
                names += recorded_sets(read(path))
    return list(dict.fromkeys(names))


def recorded_sets(state: Mapping) -> list[str]:
    """Return the data sets that a checkpoint records, or else those that its settings name."""
    return state.get("sets") or _own_sets({**vars(load_args()), **upgrade(state["args"])})


def _own_sets(settings):
    if settings["data_dir"] == SAMPLES:
        return [SAMPLES]
    folders = [settings["data_dir"], *[settings["unlabelled_dir"]] * bool(settings["gssl"])]
    # A set that was merged from others is named A+B.
    return [name for folder in folders for name in set_name(folder, settings).split("+")]


def set_name(folder: str, settings: Mapping) -> str:
    """Return the name of a prepared set's folder (NAME-SIZE) without the input size."""
    return pathlib.Path(folder).name.removesuffix(f"-{settings['input_size']}")


def teacher_paths(setting: str) -> list[pathlib.Path]:
    """Return the .pt files that the setting `teacher` names: `none`, A.pt, or A.pt,B.pt ..."""
    return [] if setting == "none" else [pathlib.Path(p.strip()) for p in setting.split(",")]
