"""Draw assets/models.png: NME against GMACs, shipped models beside published ones.

Run as python -m tools.plot_models [--output FILE]. The two panels measure on different faces:

* left: the 554 faces of 300W common, the only list on which published models and these can be
  compared;
* right: its 224 faces from LFPW, on which the repository measures float and int8 files.
"""
import argparse
import pathlib

ROOT = pathlib.Path(__file__).resolve().parent.parent
# GMACs of the shipped files by nets.model.gmacs. NME on 300W common by python main.py --test;
# NME on LFPW, float and int8, by python main.py --test --test-onnx (README.md, docs/results.md).
# `eyes` predicts 12 points, whose NME cannot be compared with that of 68.
OURS = {
    # name: (GMACs, 300W common, LFPW, LFPW in int8)
    "tiny": (0.16, 2.91, 2.95, 2.95),
    "fast": (0.37, 2.84, 2.88, 2.90),
    "accurate": (0.51, 2.81, 2.86, 2.88),
    "irnet18": (2.0, 2.82, 2.89, 2.90),
}
# NME on 300W common from arXiv 2003.03771 (PIPNet) and arXiv 2306.02763 (STAR). GMACs of PIPNet by
# nets.model.gmacs of the same backbone, heads and input (256 px, stride 32, 10 neighbours); those
# of STAR are not stated.
PUBLISHED = {
    # name: (GMACs or None, 300W common)
    "PIPNet R18": (2.37, 2.91),
    "PIPNet R50": (5.35, 2.80),
    "PIPNet R101": (10.2, 2.78),
    "STAR": (None, 2.52),
}
BLUE, RED, GREY = "#1f6fb4", "#c44e26", "#666666"


def draw(path: pathlib.Path) -> None:
    """Draw both panels and write them to a picture file."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    pyplot.rcParams.update({"font.size": 9.5, "axes.spines.top": False, "axes.spines.right": False})
    figure, (common, lfpw) = pyplot.subplots(1, 2, figsize=(8, 3.7), layout="constrained",
                                             sharey=True, width_ratios=(5, 4))

    _mark(common, {name: (row[0], row[1]) for name, row in OURS.items()}, BLUE, "o",
          "shipped with this repository", below=("accurate",))
    known = {name: row for name, row in PUBLISHED.items() if row[0]}
    _mark(common, known, RED, "s", "published", below=("PIPNet R101",))
    for name, (work, nme) in PUBLISHED.items():
        if not work:
            common.axhline(nme, color=RED, linestyle="--", linewidth=1)
            common.annotate(f"{name}, 13 M parameters, GMACs not stated", (0.115, nme),
                            (0, 4), textcoords="offset points", color=RED)
    common.set(title="300W common, 554 faces", ylabel="NME %, divided by the outer eye corners")
    common.set_xlim(0.1, 20)

    _mark(lfpw, {name: (row[0], row[2]) for name, row in OURS.items()}, BLUE, "o", "float32",
          below=OURS)
    lfpw.scatter([row[0] for row in OURS.values()], [row[3] for row in OURS.values()], 42,
                 marker="D", facecolor="none", edgecolor=GREY, label="int8")
    lfpw.set(title="LFPW test, 224 of these faces")
    lfpw.set_xlim(0.1, 4)

    for axes in (common, lfpw):
        axes.set(xscale="log", xlabel="GMACs a face", ylim=(2.45, 3.02))
        ticks = [tick for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20) if tick <= axes.get_xlim()[1]]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.25)
        axes.legend(loc="lower left", frameon=False, bbox_to_anchor=(0, 0.16))
    figure.savefig(path, dpi=125)


def _mark(axes, points, colour, marker, label, below=()):
    """Plot named (GMACs, NME) points with their names above or below them."""
    axes.scatter(*zip(*points.values()), 42, color=colour, marker=marker, label=label, zorder=3)
    for name, (work, nme) in points.items():
        axes.annotate(name, (work, nme), (0, -16 if name in below else 8),
                      textcoords="offset points", ha="center", color=colour)


def main() -> None:
    """Parse the command line and draw."""
    parser = argparse.ArgumentParser(prog="python -m tools.plot_models", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=pathlib.Path, default=ROOT / "assets" / "models.png")
    draw(parser.parse_args().output)


if __name__ == "__main__":
    main()
