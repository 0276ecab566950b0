"""Plots of results as PNG files: training curves, cumulative error distributions, ROC curves.

matplotlib is imported when the first plot is drawn, because the import is slow.
"""
from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence

import numpy

from utils.experiment import read_epochs


def plot_curves(folder: pathlib.Path) -> None:
    """Plot an experiment's results.csv as curves.png: loss, validation NME and learning rate."""
    pyplot = _pyplot()
    rows = read_epochs(folder)
    titles = {"loss": "training loss", "val_nme": "validation NME, %", "lr": "learning rate"}
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 3.8), constrained_layout=True)
    for axis, (key, title) in zip(axes, titles.items()):
        axis.plot([r["epoch"] for r in rows], [r[key] for r in rows], marker=".")
        # Dashed lines separate the stages.
        for before, after in zip(rows, rows[1:]):
            if before["stage"] != after["stage"]:
                axis.axvline(after["epoch"] - 0.5, color="grey", linestyle="--", linewidth=1)
        axis.set(title=title, xlabel="epoch")
        axis.grid(alpha=0.3)
    axes[0].set_yscale("log")
    figure.savefig(folder / "curves.png", dpi=90)
    pyplot.close(figure)


def plot_ced(errors: Mapping[str, numpy.ndarray], path: pathlib.Path | str) -> None:
    """Plot cumulative error distributions.

    Args:
        errors: by label, the NMEs (N,) as fractions; NaN where a face was not found.
        path: of the .png to write.
    """
    pyplot = _pyplot()
    figure, axis = pyplot.subplots(figsize=(6, 4.4), constrained_layout=True)
    for label, values in errors.items():
        values = 100 * numpy.sort(values[numpy.isfinite(values)])
        share = numpy.arange(1, len(values) + 1) / len(values)
        mean = f"{values.mean():.2f}" if len(values) else "none"
        axis.step([0, *values], [0, *share], where="post", label=f"{label}: {mean}")
    axis.set(xlim=(0, 10), ylim=(0, 1), xlabel="NME, %", ylabel="share of faces",
             title="cumulative error distribution")
    axis.grid(alpha=0.3)
    axis.legend(title="list: mean NME, %", loc="lower right")
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def plot_roc(closed: Sequence[float], opened: Sequence[float], path: pathlib.Path | str) -> None:
    """Plot the ROC curve of eye aspect ratios, which are lower where eyes are closed.

    Args:
        closed: ratios (n,) of closed eyes.
        opened: ratios (m,) of open eyes.
        path: of the .png to write.
    """
    pyplot = _pyplot()
    figure, axis = pyplot.subplots(figsize=(6, 4.4), constrained_layout=True)
    thresholds = numpy.unique(numpy.concatenate([closed, opened]))
    rates = [100 * numpy.searchsorted(numpy.sort(values), thresholds, "right") / len(values)
             for values in (opened, closed)]
    axis.step(*([0, *values] for values in rates), where="post")
    axis.set(xlim=(0, 10), ylim=(50, 100), xlabel="false alarms, % of open eyes",
             ylabel="recall, % of closed eyes", title="closed eyes by eye aspect ratio (ROC)")
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def _pyplot():
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    return pyplot
