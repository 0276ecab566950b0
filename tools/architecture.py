"""Draw assets/architecture.png: the network from a crop to landmarks and confidence.

Run as python -m tools.architecture [--output FILE].
"""
import argparse
import pathlib

from tools import drawn_driver

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Pixels of the drawn face, the side of its picture in units of the drawing, cells of the grid.
FACE, SIDE, GRID = 320, 14, 8
# Channels of the five 1 x 1 convolutions for K landmarks with M neighbours each.
HEADS = (("score", "K"), ("offset x", "K"), ("offset y", "K"),
         ("neighbour x", "K·M"), ("neighbour y", "K·M"))
BACKBONE, MAP, HEAD, DECODE, LINE = "#dce9f5", "#1f6fb4", "#fbe5d6", "#e3efda", "#444444"


def draw(path: pathlib.Path) -> None:
    """Draw the network and write it to a picture file."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Polygon, Rectangle
    figure = pyplot.figure(figsize=(8, 3.2))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 100), ylim=(0, 40))
    axes.axis("off")
    face, landmarks = drawn_driver.face(1.0, size=FACE)

    _picture(axes, face, 1)
    axes.text(8, 13, "crop, uint8 RGB\n3 x S x S", ha="center", va="top")
    _arrow(axes, 15.4, 18.2)

    axes.add_patch(Polygon([(18.6, 33), (18.6, 11), (32, 16), (32, 28)], facecolor=BACKBONE,
                           edgecolor=LINE))
    axes.text(25.3, 22, "normalise,\nbackbone,\nstride 16\nor 32", ha="center", va="center")
    _arrow(axes, 32.4, 35.2)

    cell = 10 / GRID
    for row in range(GRID):
        for column in range(GRID):
            axes.add_patch(Rectangle((35.6 + column * cell, 17 + row * cell), cell, cell,
                                     facecolor=BACKBONE, edgecolor=MAP, linewidth=0.8))
    axes.text(40.6, 16, "features\nC x G x G", ha="center", va="top")

    for index, (name, channels) in enumerate(HEADS):
        y = 34 - 6 * index
        axes.add_patch(Rectangle((49.5, y - 2.2), 16.5, 4.4, facecolor=HEAD, edgecolor=LINE))
        axes.text(50.4, y, name, ha="left", va="center")
        axes.text(65.2, y, channels, ha="right", va="center", color=MAP)
        _line(axes, [(46, 22), (47.7, 22), (47.7, y), (49.4, y)])
        _line(axes, [(66.1, y), (67.6, y), (67.6, 22), (68.4, 22)])
    axes.text(57.7, 6.6, "five 1 x 1 convolutions,\nmaps of G x G cells", ha="center", va="top")
    _arrow(axes, 67.6, 70)

    axes.add_patch(Rectangle((70.2, 14), 11.4, 16, facecolor=DECODE, edgecolor=LINE))
    axes.text(75.9, 22, "decode:\nbest cell,\nits offset,\nmean with\nneighbours", ha="center",
              va="center")
    _arrow(axes, 82, 84.8)

    _picture(axes, face, 85)
    scale = SIDE / FACE
    axes.scatter(85 + landmarks[:, 0] * scale, 22 + SIDE / 2 - landmarks[:, 1] * scale, 2,
                 color="#20d020", zorder=3)
    axes.text(92, 13, "landmarks K x 2\nconfidence K", ha="center", va="top")
    figure.savefig(path, dpi=125)


def _picture(axes, image, left):
    """Show an image as a square, centred on the line of the arrows."""
    axes.imshow(image, extent=(left, left + SIDE, 22 - SIDE / 2, 22 + SIDE / 2), aspect="auto",
                zorder=2)


def _line(axes, points):
    """Draw a thin polyline."""
    axes.plot(*zip(*points), color=LINE, linewidth=0.9, solid_capstyle="round", zorder=1)


def _arrow(axes, start, end):
    """Draw an arrow to the right along the middle line."""
    axes.annotate("", (end, 22), (start, 22), arrowprops={"arrowstyle": "->", "color": LINE})


def main() -> None:
    """Parse the command line and draw."""
    parser = argparse.ArgumentParser(prog="python -m tools.architecture", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=pathlib.Path, default=ROOT / "assets" / "architecture.png")
    draw(parser.parse_args().output)


if __name__ == "__main__":
    main()
