"""Settings of a command that names an experiment."""
from __future__ import annotations

import argparse
import pathlib
import sys

from utils import experiment
from utils.args import Request, load_args
from utils.errors import UserError
from utils.training.recipe import FILE, read_recipe, recipe_name


def resolve_newest(request: Request) -> None:
    """Replace a bare --exp by the name of the newest experiment, and a path in weights/ by a name.

    The newest experiment is printed on stderr.

    Raises:
        UserError: if there is no experiment yet, or if a new training is requested.
    """
    resume = "resume" in request.actions
    if request.args.exp:
        name = experiment.short_name(request.args.exp, experiment.WEIGHTS, files=resume)
        if name != request.args.exp:
            request.args.exp = request.typed["exp"] = name
        return
    if "train" in request.actions and not resume:
        raise UserError("--exp without a name means the newest experiment, and a training begins a "
                        "new one: give it a name, or leave --exp out for the next number")
    name = experiment.newest_experiment(*["last.pt"] * resume)
    print(f"--exp: {name}, the newest experiment", file=sys.stderr)
    request.args.exp = request.typed["exp"] = name


def requested_settings(request: Request, resume: bool = False) -> argparse.Namespace:
    """Return the settings of a training, with those of its recipe.

    Args:
        request: the command line.
        resume: they are those that the experiment was started with.

    Raises:
        UserError: for a recipe that cannot be read.
    """
    if resume:
        return experiment_settings(request)
    if request.args.recipe == "none":
        return request.args
    args = read_recipe(request.args.recipe).apply(request.args, request.typed)
    args.recipe = recipe_name(args.recipe)
    return args


def experiment_settings(request: Request) -> argparse.Namespace:
    """Return the settings that the named experiment was started with; typed ones override them.

    The experiment may also be named by one of its files. Without its args.yaml the settings of the
    request are returned. Stages and what follows are those of its recipe.yaml, if it has one.
    """
    exp = pathlib.Path(request.args.exp)
    folder = exp.parent if exp.suffix in (".pt", ".onnx") else experiment.WEIGHTS / exp
    path = folder / "args.yaml"
    if not path.is_file():
        return request.args
    args = load_args(request.typed, path, saved=True)
    recipe = folder / FILE
    return read_recipe(recipe).apply(args, request.typed) if recipe.is_file() else args
