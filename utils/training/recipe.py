"""Recipes: files that hold all of a training, such as recipes/fast.yaml.

A recipe has settings of args.yaml that differ from it, and two more keys:

    stages:                 in their order, each from the best weights of the one before
    - name: small           letters, digits and . _ -
      input_size: 128       settings that this stage changes
      epochs: 40
    after:                  what follows the training; actions of main.py
      fit_eyes: {data_dir: eyes, names: "tools/splits/eyes.txt:choose"}   settings of it alone
      test: true

Flags win over settings and over those of every stage. An experiment keeps stages and what follows
in its own recipe.yaml, so that --resume does not depend on the file that it was started with.
"""
from __future__ import annotations

import argparse
import dataclasses
import pathlib
import re
import typing
from collections.abc import Collection

import yaml

from utils.args import ACTIONS, OPTION_TABLE, ROOT, SETTINGS, check, read_yaml
from utils.errors import UserError
from utils.files import atomic_write

# Settings that all stages of an experiment have in common: those of the machine, and what the
# weights that pass from stage to stage must fit.
COMMON = {name for name, setting in SETTINGS.items() if setting.machine} | {
    "scheme", "mean_face", "backbone", "activation", "head", "num_nb", "stride", "recipe"}
AFTER = {"fit_shape", "fit_eyes", "export", "int8", "raw", "test", "test_onnx", "test_eyes"}
FILE = "recipe.yaml"  # In the folder of an experiment.


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A recipe.

    Attributes:
        settings: that differ from args.yaml, by name.
        stages: settings that each stage changes, and its `name`; empty for a single stage.
        after: settings of each action that follows the training, by action.
    """
    settings: dict[str, typing.Any]
    stages: list[dict[str, typing.Any]]
    after: dict[str, dict[str, typing.Any]]

    def apply(self, args: argparse.Namespace, typed: Collection[str]) -> argparse.Namespace:
        """Return settings with those of the recipe, except the ones that were typed.

        The result has two more attributes, `stages` and `after`, as above.
        """
        settings = {k: v for k, v in self.settings.items() if k not in typed}
        stages = [{k: v for k, v in stage.items() if k not in typed} for stage in self.stages]
        return argparse.Namespace(**{**vars(args), **settings, "stages": stages,
                                     "after": self.after})

    def save(self, folder: pathlib.Path) -> None:
        """Write stages and what follows, if there are any, into the folder of an experiment."""
        if not (self.stages or self.after):
            return
        with atomic_write(folder / FILE) as temporary:
            temporary.write_text(yaml.safe_dump({"stages": self.stages, "after": self.after},
                                                sort_keys=False), encoding="utf-8")


def read_recipe(path: pathlib.Path | str) -> Recipe:
    """Read a recipe.

    Raises:
        UserError: naming the file and the stage, for what cannot be read, unknown keys, wrong
            types and values out of range.
    """
    path = find_recipe(path)
    values = read_yaml(path)
    stages, after = values.pop("stages", None) or [], values.pop("after", None) or {}
    settings = _settings(values, SETTINGS, f"{path}:", "recipe")
    if not isinstance(stages, list) or not all(isinstance(stage, dict) for stage in stages):
        raise UserError(f"{path}: stages: expected a list of mappings, such as '- name: small'")
    if not isinstance(after, dict) or not all(isinstance(v, dict | bool) for v in after.values()):
        raise UserError(f"{path}: after: expected lines of the form 'test: true'")
    for action in after:
        if action not in AFTER:
            raise UserError(f"{path}: after: unknown action {action}; there are "
                            f"{', '.join(sorted(AFTER))}")
    after = {action: _settings(value if isinstance(value, dict) else {},
                               {**SETTINGS, **OPTION_TABLE}, f"{path}: after: {action}:")
             for action, value in after.items() if value is not False}
    stages = [_stage(path, i, stage) for i, stage in enumerate(stages)]
    names = [stage["name"] for stage in stages]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{path}: stages: two are called {name}")
    return Recipe(settings, stages, after)


def find_recipe(path: pathlib.Path | str) -> pathlib.Path:
    """Return the file of a recipe that is given by path, or by name for one in recipes/.

    Raises:
        UserError: where there is none; lists those in recipes/.
    """
    for file in (pathlib.Path(path), ROOT / path, ROOT / "recipes" / f"{path}.yaml"):
        if file.is_file():
            return file
    known = sorted(file.stem for file in (ROOT / "recipes").glob("*.yaml"))
    raise UserError(f"--recipe {path}: no such file; there are {', '.join(known) or 'none'} in "
                    f"recipes/")


def recipe_name(path: pathlib.Path | str) -> str:
    """Return recipes/NAME.yaml for a recipe of the repository, the file's name for another."""
    path = find_recipe(path)
    inside = path.resolve().parent == ROOT / "recipes"
    return f"recipes/{path.name}" if inside else path.name


def _stage(path, index, stage):
    name = str(stage.get("name", index + 1))
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise UserError(f"{path}: stage {index + 1}: a name has letters, digits and . _ -, found "
                        f"{name!r}")
    where = f"{path}: stage {name}:"
    found = _settings({k: v for k, v in stage.items() if k != "name"}, SETTINGS, where)
    for key in found:
        if key in COMMON:
            raise UserError(f"{where} {key}: is the same in all stages; move it to the top")
    return {"name": name, **found}


def _settings(values, known, where, *refused):
    for name in values:
        if name in refused or name in ACTIONS:
            raise UserError(f"{where} {name}: has no meaning here")
        if name not in known:
            check(name, None, f"{where} {name}")
    return {name: check(name, value, f"{where} {name}") for name, value in values.items()}


def recipe_of(args: argparse.Namespace) -> Recipe:
    """Return the recipe in settings that `Recipe.apply` returned; an empty one for others."""
    return Recipe({}, getattr(args, "stages", []), getattr(args, "after", {}))


def last_stage(args: argparse.Namespace) -> argparse.Namespace:
    """Return settings with those of the last stage, which the trained weights have."""
    changes = dict(recipe_of(args).stages[-1]) if recipe_of(args).stages else {}
    changes.pop("name", None)
    return argparse.Namespace(**{**vars(args), **changes})


def action_settings(args: argparse.Namespace, action: str) -> argparse.Namespace:
    """Return settings with those that the recipe gives one action after the training."""
    return argparse.Namespace(**{**vars(args), **recipe_of(args).after.get(action, {})})
