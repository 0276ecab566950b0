"""When best.pt and last.pt are written, and in which order."""
from __future__ import annotations

import contextlib
import pathlib
import time
from collections.abc import Iterator, Mapping

import torch

from utils import checkpoint
from utils.errors import DiskError, UserError, shell_word
from utils.training.ddp import Ranks

# Seconds between saves after epochs, which may be much shorter than a save.
EPOCH_SECONDS = 60


@contextlib.contextmanager
def resumable(folder: pathlib.Path) -> Iterator[None]:
    """Add to the error of a file that cannot be written how the training is resumed."""
    try:
        yield
    except DiskError as error:
        raise UserError(f"{error}, then go on with --resume --exp "
                        f"{shell_word(folder.name)}") from None


class Saver:
    """Writes the checkpoints of a training; rank 0 alone writes.

    The best weights wait in memory, on the CPU, until last.pt is written too. best.pt is written
    first, because last.pt holds its score, which the epochs after a resume are compared with. A
    kill before best.pt, or between the two, leaves a last.pt from which the same epochs follow.

    Args:
        folder: of the experiment.
        ranks: process group.
    """

    def __init__(self, folder: pathlib.Path, ranks: Ranks):
        self.folder, self.ranks = folder, ranks
        self.best, self.saved_at = None, time.monotonic()

    def is_due(self, minutes: float, after_epoch: bool = False) -> bool:
        """Return whether rank 0 wants a save; False on other ranks.

        Args:
            minutes: the setting save_minutes.
            after_epoch: whether an epoch has just ended; the time is then EPOCH_SECONDS at most.
        """
        seconds = min(EPOCH_SECONDS, 60 * minutes) if after_epoch else 60 * minutes
        return self.ranks.is_main and time.monotonic() - self.saved_at > seconds

    def keep_best(self, description: Mapping, weights: Mapping[str, torch.Tensor]) -> None:
        """Copy the best weights so far; the next save writes them to best.pt.

        Args:
            description: what best.pt holds beside the weights.
            weights: state_dict of the network that is evaluated.
        """
        self.best = {**description, "weights": {
            name: value.detach().to("cpu", copy=True) for name, value in weights.items()}}

    def save(self, state: Mapping) -> None:
        """Write best.pt, if there are new best weights, then last.pt. All ranks must call this.

        Args:
            state: content of last.pt.

        Raises:
            UserError: on every rank, if a file cannot be written.
        """
        self.ranks.broadcast_result(self._write, state)
        self.saved_at = time.monotonic()

    def keep_stage(self, name: str, last: Mapping) -> None:
        """Write the best weights as best-NAME.pt, and last-NAME.pt. All ranks must call this.

        Args:
            name: of a complete stage, after its last save.
            last: description and weights of its last epoch.

        Raises:
            UserError: on every rank, if a file cannot be written.
        """
        self.ranks.broadcast_result(self._write_stage, name, last)

    def _write_stage(self, name, last):
        with resumable(self.folder):
            best = checkpoint.read(self.folder / "best.pt")
            checkpoint.save(best, self.folder / f"best-{name}.pt")
            checkpoint.save(last, self.folder / f"last-{name}.pt")

    def _write(self, state):
        with resumable(self.folder):
            if self.best is not None:
                checkpoint.save(self.best, self.folder / "best.pt")
                self.best = None
            checkpoint.save(state, self.folder / "last.pt")
