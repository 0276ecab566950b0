"""Photos and annotations to a prepared set: crops with margin, lists, mean face, set.yaml.

A prepared set is a folder with images/, one list a split (`train.txt`, `val.txt`, `test.txt`,
`test_<name>.txt`; a line is an image path and K times x y in units of the nominal crop),
`indices.txt` (the mean face), `sources.csv` (photo and boxes in photo pixels) and `set.yaml`.
An image shows the nominal crop grown by `margin` about its centre.
"""
import argparse
import collections
import concurrent.futures
import csv
import itertools
import os
import pathlib
import random
import shutil

import cv2
import numpy
import tqdm
import yaml

from utils import crop as crops
from utils import readers
from utils.args import ROOT
from utils.errors import UserError
from utils.landmarks import MAPPINGS, SCHEMES, get_scheme

JPEG_QUALITY = 95
# What the authors crop to before they measure NME: rule and factor; others as 300W.
PUBLISHED_CROPS = {"WFLW": ("box", 1.2), "COFW": ("box", 1.0), "AFLW": ("box", 1.0)}
# A point this far outside the photo, as a share of the face, is a mistake and no cut-off chin.
OUTSIDE = 0.15


class DataGenerator:
    """Publisher's folders to a prepared set. Call run().

    data_dir: a folder, or several to merge ("300W + WFLW", or a list). target_size: side of the
    nominal crop in pixels. output_dir: default <data_dir>-<target_size>. layout: the reader's name,
    else recognised. scheme: of the set, to map to (98 to 68 points) or, for a custom set, a YAML
    file. crop, scale: see crop.face_box. margin: how much larger than the nominal crop the images
    are. val: share of the training photos held out. Raises UserError.
    """

    def __init__(self, data_dir="300W", target_size=256, output_dir=None, layout=None, scheme=None,
                 crop="square", scale=1.2, margin=1.6, val=0.05, workers=None):
        parts = data_dir if isinstance(data_dir, (list, tuple)) else str(data_dir).split("+")
        self.folders = [pathlib.Path(str(part).strip()) for part in parts]
        name = "+".join(f.name for f in self.folders)
        self.output = pathlib.Path(output_dir or self.folders[0].parent / f"{name}-{target_size}")
        self.target_size, self.layout, self.scheme = int(target_size), layout, scheme
        self.rule, self.scale, self.margin, self.val = crop, float(scale), float(margin), val
        self.workers = workers or os.cpu_count() or 1
        if self.target_size < 16 or self.margin < 1 or self.scale <= 0 or not 0 <= val < 1:
            raise UserError(f"target_size {target_size} (16 or more), margin {margin} (1 or more), "
                            f"scale {scale} (above 0), val {val} (0 to 1): one is out of range")
        if crop not in crops.RULES:
            raise UserError(f"crop must be one of {', '.join(crops.RULES)}, "
                            f"found {crop!r}")

    def run(self):
        """Prepare the set, print the table of counts, return the set's folder."""
        problems, counts, jobs, scheme = [], [], [], None
        for folder in self.folders:
            reader = readers.get(self.layout) if self.layout else readers.recognise(folder)
            found, source_scheme = self._read(reader, folder, problems)
            if scheme is not None and scheme.name != source_scheme.name:
                raise UserError(_refuse_merge(scheme, source_scheme, folder))
            scheme = source_scheme
            prefix = f"{folder.name}_" if len(self.folders) > 1 else ""
            jobs += [(face, reader.NAME, prefix + face.name) for face in found]
            counts.append((folder, reader, found))
        self._clear()
        done = self._cut_all(jobs, problems)
        if not done:
            reasons = "; ".join(f"{path}: {reason}" for path, reason in problems[:3])
            raise UserError(f"{', '.join(map(str, self.folders))}: no face could be prepared"
                            + (f" ({reasons})" if reasons else ""))
        scheme = self._write(done, scheme)
        _print_table(counts, done, problems, self.output)
        return self.output

    def _read(self, reader, folder, problems):
        scheme = None if self.scheme is None else get_scheme(self.scheme)
        if reader.SCHEME is None:
            if scheme is None:
                raise UserError(f"{folder}: a custom set needs a scheme: a name "
                                f"({', '.join(SCHEMES)}) or a .yaml file that describes it")
            faces = reader.read(folder, problems, scheme)
            native = scheme
        else:
            faces = reader.read(folder, problems)
            native = get_scheme(reader.SCHEME)
        scheme = scheme or native
        if scheme.name != native.name:
            mapping = MAPPINGS.get((native.name, scheme.name))
            if mapping is None:
                raise UserError(f"{folder}: no mapping from {native.name} ({native.points} points) "
                                f"to {scheme.name}; there is {_mappings()}")
            for face in faces:
                face.points = mapping(face.points)
        return faces, scheme

    def _clear(self):
        if self.output.exists() and any(self.output.iterdir()):
            if not (self.output / "set.yaml").is_file():
                raise UserError(f"{self.output}: exists and is no prepared set; give another "
                                f"output_dir or empty it")
            shutil.rmtree(self.output)
        try:
            (self.output / "images").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.output}: cannot be written ({error.strerror}); give "
                            f"output_dir=FOLDER (--output-dir FOLDER)") from None

    def _cut_all(self, jobs, problems):
        """[(face, image name, box, published box)] of all faces that could be cut."""
        settings = (self.output / "images", self.target_size, self.rule, self.scale, self.margin)
        done = []
        with concurrent.futures.ProcessPoolExecutor(self.workers) as pool:
            results = pool.map(_cut, jobs, itertools.repeat(settings), chunksize=16)
            bar = tqdm.tqdm(zip(jobs, results), total=len(jobs), desc="crops", unit="face")
            for (face, layout, name), result in bar:
                if isinstance(result, str):
                    problems.append((face.photo, result))
                else:
                    face.image = None
                    done.append((face, layout, name, *result))
        return done

    def _write(self, done, scheme):
        held_out = _held_out([d[0] for d in done], self.val)
        lists = collections.defaultdict(list)
        rows, means = [], []
        for face, layout, name, box, published in done:
            points = crops.to_crop(face.points, box)
            line = f"images/{name}.jpg " + " ".join(f"{v:.7f}" for v in points.flatten())
            for split in face.lists:
                split = "val" if split == "train" and face.group in held_out else split
                lists[split].append(line)
                if split == "train":
                    means.append(points)
            photo = face.photo.resolve() if face.photo.exists() else ""
            rows.append([f"images/{name}.jpg", photo, layout,
                         *(f"{v:.4f}" for v in (*box, *published))])
        # A set of test faces alone (a benchmark) still needs the order of magnitude of its points.
        points = means or [crops.to_crop(d[0].points, d[3]) for d in done]
        scheme = scheme.with_mean_face(numpy.mean(points, 0))
        for split, lines in lists.items():
            (self.output / f"{split}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        mean = " ".join(f"{v:.7f}" for v in scheme.mean_face.flatten())
        (self.output / "indices.txt").write_text(mean + "\n", encoding="utf-8")
        with open(self.output / "sources.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["image", "photo", "layout", "x_min", "y_min", "x_max", "y_max",
                             "published_x_min", "published_y_min", "published_x_max",
                             "published_y_max"])
            writer.writerows(rows)
        description = {"size": self.target_size, "margin": self.margin,
                       "crop": {"rule": self.rule, "scale": self.scale}, "scheme": scheme.state(),
                       "layouts": sorted({d[1] for d in done})}
        (self.output / "set.yaml").write_text(
            yaml.safe_dump(description, sort_keys=False, default_flow_style=None), encoding="utf-8")
        return scheme


def prepare_samples(size):
    """The prepared set of drawn faces for an input size, made if it is not there; its folder."""
    folder = ROOT / f"samples-{size}"
    if not (folder / "set.yaml").is_file():
        print(f"drawing faces into {folder}")
        DataGenerator("samples", size, folder, layout="samples").run()
    return folder


def _mappings():
    return ", ".join(f"{a} to {b}" for a, b in MAPPINGS)


def _refuse_merge(first, second, folder):
    return (f"{folder}: has the {second.name} scheme ({second.points} points), the set before it "
            f"{first.name} ({first.points}); they merge only after a mapping (there is "
            f"{_mappings()}): give scheme=\"300W\" (--scheme 300W)")


def image_of(face, layout):
    """The photo of a face as RGB uint8 (H, W, 3), or None where it cannot be read."""
    if face.image is not None:
        return face.image
    module = readers.READERS.get(layout)
    if hasattr(module, "image_of"):
        return module.image_of(face)
    return read_photo(face.photo)


def read_photo(path):
    """A photo file as RGB uint8 (H, W, 3), or None. EXIF rotation is ignored, as annotators did."""
    try:
        data = numpy.fromfile(path, numpy.uint8)
        image = cv2.imdecode(data, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    except (OSError, cv2.error):
        return None
    return None if image is None else cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def _cut(job, settings):
    """Write one crop; (box, published box), or the reason why not."""
    face, layout, name = job
    folder, size, rule, scale, margin = settings
    cv2.setNumThreads(1)
    image = image_of(face, layout)
    if image is None:
        empty = face.photo.is_file() and face.photo.stat().st_size == 0
        return "the image file is empty" if empty else "the image cannot be read"
    height, width = image.shape[:2]
    try:
        box = crops.face_box(face.points, rule, scale, face.box)
        published = _published_box(face, layout)
    except UserError as error:
        return str(error)
    reach = OUTSIDE * float((face.points.max(0) - face.points.min(0)).max())
    outside = (face.points < -reach) | (face.points > numpy.array([width, height]) - 1 + reach)
    if outside.any():
        point = int(numpy.flatnonzero(outside.any(1))[0])
        return (f"point {point} at {face.points[point, 0]:.0f}, {face.points[point, 1]:.0f} is far "
                f"outside the photo of {width} x {height}")
    stored = crops.cut(image, crops.grow(box, margin), round(size * margin))
    path = folder / f"{name}.jpg"
    if not cv2.imwrite(str(path), cv2.cvtColor(stored, cv2.COLOR_RGB2BGR),
                       [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY]):
        return f"{path} cannot be written"
    return box, published


def _published_box(face, layout):
    rule, scale = PUBLISHED_CROPS.get(layout, ("stretch", 1.1))
    if rule == "box" and face.box is None:
        rule, scale = "stretch", 1.1
    return crops.face_box(face.points, rule, scale, face.box)


def _held_out(faces, share):
    """Groups (photos) of the training faces for validation: `share` of them, the same every time."""
    if any("val" in face.lists for face in faces):
        return set()
    groups = sorted({face.group for face in faces if "train" in face.lists})
    random.Random(0).shuffle(groups)
    count = min(max(1, round(share * len(groups))), len(groups) - 1) if share else 0
    return set(groups[:max(count, 0)])


def _print_table(counts, done, problems, output):
    prepared = collections.Counter((d[1], d[0].subset) for d in done)
    lines = []
    for folder, reader, faces in counts:
        found = collections.Counter(face.subset for face in faces)
        bad = collections.Counter()
        for path, reason in problems:
            if not reason.startswith("note:") and folder.resolve() in (
                    path.resolve(), *path.resolve().parents):
                relative = path.resolve().relative_to(folder.resolve()).as_posix()
                near = [s for s in (*reader.EXPECTED, *found) if relative.startswith(s)]
                bad[max(near, key=len) if near else "elsewhere"] += 1
        for subset in dict.fromkeys([*reader.EXPECTED, *found, *bad]):
            lines.append((reader.NAME, subset, prepared[reader.NAME, subset],
                          reader.EXPECTED.get(subset, "-"), bad[subset]))
    print(f"{'layout':<9}{'subset':<18}{'prepared':>9}{'expected':>9}{'skipped':>9}")
    for line in lines:
        print("{:<9}{:<18}{:>9}{:>9}{:>9}".format(*line))
    for path, reason in problems[:20]:
        print(f"  {path}: {reason}")
    if len(problems) > 20:
        print(f"  … and {len(problems) - 20} more")
    if problems:
        text = "".join(f"{path}: {reason}\n" for path, reason in problems)
        (output / "problems.txt").write_text(text, encoding="utf-8", errors="replace")
        print(f"all {len(problems)} are listed in {output / 'problems.txt'}")
    print(f"{len(done)} faces in {output}")


def main(argv=None):
    """The command line of `python -m utils.generator`."""
    parser = argparse.ArgumentParser(prog="python -m utils.generator", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_dir", nargs="+", help="folder(s) as published; several are merged")
    parser.add_argument("--target-size", type=int, default=256, help="side of the nominal crop [256]")
    parser.add_argument("--output-dir", help="where the set goes [DATA_DIR-SIZE]")
    parser.add_argument("--layout", help=f"{', '.join(readers.READERS)} [recognised]")
    parser.add_argument("--scheme", help="map to this scheme, or the .yaml of a custom one")
    parser.add_argument("--crop", default="square", help=f"{', '.join(crops.RULES)} [square]")
    parser.add_argument("--scale", type=float, default=1.2, help="nominal crop against the box [1.2]")
    parser.add_argument("--margin", type=float, default=1.6, help="image against nominal crop [1.6]")
    parser.add_argument("--val", type=float, default=0.05, help="share of photos for validation")
    parser.add_argument("--workers", type=int, help="processes [one a core]")
    DataGenerator(**vars(parser.parse_args(argv))).run()


if __name__ == "__main__":
    from utils.errors import run
    run(main)
