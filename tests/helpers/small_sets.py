"""Write small sets of drawn faces in published layouts."""
import sys

import cv2
import numpy

from utils.data.drawn_faces import render
from utils.landmarks.schemes import SCHEMES


def face(number, size=96):
    """Return a drawn face, RGB uint8 (size, size, 3), and its landmarks (68, 2) in pixels."""
    return render.render((7, number), size)


def write_image(path, image):
    """Write an RGB image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), cv2.cvtColor(image, cv2.COLOR_RGB2BGR))


def write_pts(path, points):
    """Write a .pts file, which counts pixels from 1."""
    rows = "\n".join(f"{x + 1:.6f} {y + 1:.6f}" for x, y in points)
    path.write_text(f"version: 1\nn_points: {len(points)}\n{{\n{rows}\n}}\n")


def write_300w(folder, counts=None):
    """Write the layout of 300W with `counts` faces per subset; return the folder."""
    counts = {"afw": 6, "helen/trainset": 4, "lfpw/trainset": 3, "helen/testset": 2,
              "lfpw/testset": 2, "ibug": 2} if counts is None else counts
    number = 0
    for subset, count in counts.items():
        for i in range(count):
            image, points = face(number)
            # AFW has several faces per photo.
            stem = f"photo{i // 2}_{i % 2 + 1}" if subset == "afw" else f"image_{i:04d}"
            write_image(folder / subset / f"{stem}.png", image)
            write_pts(folder / subset / f"{stem}.pts", points)
            number += 1
    return folder


def write_wflw(folder, train=4, test=3):
    """Write the layout of WFLW without subset lists; return the folder.

    The 98 points are the mean face of WFLW, fitted into the box of the drawn face's 68 points.
    """
    mean = SCHEMES["WFLW"].mean_face
    unit = (mean - mean.min(0)) / (mean.max(0) - mean.min(0))
    annotations = folder / "WFLW_annotations"
    lists = annotations / "list_98pt_rect_attr_train_test"
    subsets = annotations / "list_98pt_test"
    lists.mkdir(parents=True)
    subsets.mkdir()
    for split, count, first in (("train", train, 100), ("test", test, 200)):
        lines = []
        for i in range(count):
            image, points = face(first + i)
            low, high = points.min(0), points.max(0)
            name = f"{split}/face_{i}.png"
            write_image(folder / "WFLW_images" / name, image)
            coordinates = " ".join(f"{v:.6f}" for v in (low + unit * (high - low)).flatten())
            box = " ".join(str(int(v)) for v in (*low, *high))
            lines.append(f"{coordinates} {box} 0 0 0 0 0 0 {name}")
        (lists / f"list_98pt_rect_attr_{split}.txt").write_text("\n".join(lines) + "\n")
    return folder


def write_lmk(folder, train=12, test=4):
    """Write a set like LMK.zip: tight crops that are not square, and paths of another machine."""
    every = []
    for split, count, first in (("train", train, 300), ("test", test, 400)):
        lines = []
        for i in range(count):
            image, points = face(first + i)
            low, high = points.min(0), points.max(0)
            centre, half = (low + high) / 2, (high - low) * 1.1 / 2
            x_min, y_min = numpy.floor(centre - half).astype(int).clip(0)
            x_max, y_max = numpy.ceil(centre + half).astype(int)
            crop = image[y_min:y_max, x_min:x_max]
            height, width = crop.shape[:2]
            units = (points - [x_min, y_min] + 0.5) / [width, height]
            write_image(folder / "images" / split / f"{i}.png", crop)
            every.append(units)
            lines.append(f"/home/some one/LMK/images/{split}/{i}.png "
                         + " ".join(f"{v:.6f}" for v in units.flatten()))
        (folder / f"{split}.txt").write_text("\n".join(lines) + "\n")
    mean = numpy.mean(every, 0).flatten()
    (folder / "indices.txt").write_text(" ".join(f"{v:.6f}" for v in mean) + "\n")
    return folder


def run_main(*argv):
    """Run main.py with argv in a process that has imported everything (see warm.py)."""
    import main
    from utils import errors
    sys.argv = ["main.py", *argv]
    errors.run(main.main)


def run_main_without_export(*argv):
    """Run main.py without the export after training, which takes longer than the training."""
    from utils.deploy import export
    export.export_weights = lambda path, flip_test=False: path
    run_main(*argv)


def run_generator(*argv):
    """Run utils.data.generator with argv in such a process."""
    from utils import errors
    from utils.data import generator
    errors.run(lambda: generator.main(argv))
