"""Stages of a training: those of a recipe, and the rounds of self-training within them.

Each stage has settings, a task and a start. A training without a recipe and without --gssl has one
stage. trainer.py runs them in their order; last.pt holds the number of the current one.
"""
from __future__ import annotations

import argparse
import dataclasses
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence

from utils.errors import UserError
from utils.training.recipe import recipe_of

# Tasks of the paper's rounds: cls3 trains only the 2x2 score map of an 8x8 grid on unlabelled
# faces, cls2 only the 4x4 one, std all maps.
PAPER = ("cls3", "cls2", "std", "std", "std")
# (mirrored, degrees) of the views of a face whose mean is its pseudo-label in the default preset.
VIEWS = ((False, 0), (True, 0), (False, 15), (True, -15), (False, -15), (True, 15))
# In the default preset labelled faces are repeated up to this share of a round's list, and steps
# grow by this factor. A step then has as many labelled faces as in the supervised stage.
LABELLED, LARGER = 1 / 2, 2
# Each stage has a seed of its own.
SEED_STEP = 100003


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of a training.

    Attributes:
        number: from 0.
        name: in results.csv, in lines of output and in names of files.
        settings: those of the training with the changes of this stage of the recipe.
        epochs: length.
        first_epoch: epochs in all earlier stages.
        start: what the weights start from. `pretrained`: what the setting of that name says.
            `best`: the averaged weights of the best epoch of the stage before. `state`: all of the
            stage before goes on, optimiser and average included.
        task: `supervised`, or what the unlabelled faces train (`std`, `cls2`, `cls3`).
        views: (mirrored, degrees) of the views that pseudo-labels are averaged over.
        keep_share: share of the pseudo-labels to keep, see gssl.reject_doubtful.
        labelled_share: least share of labelled faces in the list.
        start_epoch: epochs of this stage's learning-rate cosine that lie in earlier stages.
        cosine_epochs: length of that cosine; None for `epochs`, 0 for a constant rate after the
            warm-up, which later stages bring down.
        batch_factor: faces per step as a multiple of effective_batch.
    """
    number: int
    name: str
    settings: argparse.Namespace
    epochs: int
    first_epoch: int = 0
    start: str = "pretrained"
    task: str = "supervised"
    views: tuple = VIEWS[:1]
    keep_share: float = 1.0
    labelled_share: float = 0.0
    start_epoch: int = 0
    cosine_epochs: int | None = None
    batch_factor: int = 1

    @property
    def fresh(self) -> bool:
        """Whether optimiser, average and learning rate start anew."""
        return self.start != "state"

    def args(self) -> argparse.Namespace:
        """Return the settings as this stage trains with them.

        Rounds with a fresh start spend the same share of their epochs on the warm-up.
        """
        args = self.settings
        warm_up = args.warmup_epochs * self.epochs / args.epochs if self.fresh else 0.0
        return argparse.Namespace(**{
            **vars(args), "epochs": self.epochs, "seed": args.seed + SEED_STEP * self.number,
            "effective_batch": self.batch_factor * args.effective_batch,
            "warmup_epochs": warm_up,
            "min_lr": args.lr if self.cosine_epochs == 0 else args.min_lr})


def plan(args: argparse.Namespace) -> list[Stage]:
    """Return the stages of a training.

    Args:
        args: resolved settings, with the recipe's `stages` (recipe.Recipe) where there is one.

    Raises:
        UserError: for settings that self-training cannot use.
    """
    stages = []
    for changes in recipe_of(args).stages or [{"name": "train"}]:
        changes = dict(changes)
        name = changes.pop("name")
        first_epoch = stages[-1].first_epoch + stages[-1].epochs if stages else 0
        settings = argparse.Namespace(**{**vars(args), **changes})
        start = "best" if stages and "pretrained" not in changes else "pretrained"
        first = Stage(len(stages), name, settings, settings.epochs, first_epoch, start)
        stages.append(first)
        if settings.gssl:
            stages[-1:] = _with_rounds(first)
    return stages


def stage_of(saved: Mapping, stages: Sequence[Stage], path: pathlib.Path) -> int:
    """Return the number of the stage that a last.pt is of.

    Args:
        saved: content of the file.
        stages: of the training that is resumed.
        path: its file, for error messages.

    Raises:
        UserError: where the training has no such stage.
    """
    # Files of earlier versions count rounds of self-training.
    number = saved.get("stage", saved.get("round", 0))
    if not isinstance(number, int) or not 0 <= number < len(stages):
        raise UserError(f"{path}: is of stage {number}, and the training has {len(stages)}")
    return number


def _with_rounds(first) -> Iterator[Stage]:
    """Yield a supervised stage, then the rounds of self-training that follow it."""
    args = first.settings
    if args.head != "pip":
        raise UserError(f"--gssl trains the maps of the pip head, not head: {args.head}")
    grid = args.input_size // args.stride
    paper = args.gssl_preset == "paper"
    if paper and grid % 4:
        raise UserError(f"gssl_preset: paper needs score maps of a half and a quarter of the grid; "
                        f"input_size {args.input_size} with stride {args.stride} gives {grid} x "
                        f"{grid} cells, which 4 does not divide")
    half = math.ceil(args.epochs / 2)
    if paper:
        epochs, number = args.gssl_epochs or args.epochs, len(PAPER)
    else:
        epochs = args.gssl_epochs or math.ceil(half / args.gssl_rounds)
        number = args.gssl_rounds if args.gssl_epochs else math.ceil(half / epochs)
    yield dataclasses.replace(first, cosine_epochs=None if paper else 0)
    for i in range(number):
        stage = dataclasses.replace(
            first, number=first.number + i + 1, name=f"{first.name}-round-{i + 1}", epochs=epochs,
            first_epoch=first.first_epoch + args.epochs + i * epochs)
        # The paper starts each round anew. The default is one continuous training whose
        # pseudo-labels are renewed often: at equal steps, few long rounds that start from the
        # average learn less, and so do rounds with a cosine each.
        yield dataclasses.replace(stage, start="pretrained", task=PAPER[i]) if paper else \
            dataclasses.replace(
                stage, start="state", task="std", views=VIEWS, keep_share=args.gssl_keep,
                labelled_share=LABELLED, start_epoch=i * epochs, cosine_epochs=number * epochs,
                batch_factor=LARGER)
