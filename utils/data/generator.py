"""Photos and annotations to a prepared set: crops with margin, lists, mean face, set.yaml.

A prepared set is a folder with images/, one list a split (`train.txt`, `val.txt`, `test.txt`,
`test_<name>.txt`; a line is an image path and K times x y in units of the nominal crop),
`indices.txt` (the mean face), `sources.csv` (photo and boxes in photo pixels, and K digits, 1 for
each point that is hidden) and `set.yaml`.
An image shows the nominal crop grown by `margin` about its centre.
"""
import argparse
import collections
import concurrent.futures.process
import csv
import dataclasses
import hashlib
import itertools
import os
import pathlib
import shutil

import numpy
import tqdm
import yaml

from utils.args import Parser
from utils.data import cropping, readers, sheet, table
from utils.data.readers.pts import unique_name
from utils.errors import UserError
from utils.landmarks import crop as crops
from utils.landmarks.schemes import MAPPINGS, Scheme, get_scheme

SOURCES = ("image", "photo", "layout", "x_min", "y_min", "x_max", "y_max", "published_x_min",
           "published_y_min", "published_x_max", "published_y_max")
# The options that photos without landmarks have, to be trained with or to be labelled by a teacher.
UNLABELLED = {"labelled", "boxes", "detector"}
LABELLED_BY_TEACHER = {"labelled", "teacher", "detector", "names"}


@dataclasses.dataclass
class Source:
    """What was read of one folder; problems are (path, reason), expected the published counts."""
    folder: pathlib.Path
    layout: str
    expected: dict
    scheme: Scheme
    faces: list
    problems: list
    prefix: str


@dataclasses.dataclass
class Options:
    """How a set is prepared; keyword arguments of DataGenerator. Raises UserError.

    layout: the reader's name, else recognised. scheme: of the set, to map to (98 to 68 points) or,
    for a custom set, a YAML file. crop, scale: see crop.face_box. margin: how much larger than the
    nominal crop the images are. val: share of the training photos held out; 0: none, and the last
    epoch of a training is its best. workers: processes,
    else one a core. labelled: the prepared set that photos without landmarks are to be trained with
    (see unlabelled.prepare); boxes, detector: of such photos. teacher: weights, or a list of them,
    that lay the landmarks of such photos, which then join the labelled ones (see
    pseudo_labels.prepare); names: which of those in closed/ and open/. exif: "obey"
    where labels were made on photos as a person sees them, "ignore" where on the pixels as stored,
    None: ignore in the published sets, whose annotators did, else obey. one_based: whether the
    pixels of a CSV file count from 1.
    """
    layout: str | None = None
    scheme: str | None = None
    crop: str = "square"
    scale: float = 1.2
    margin: float = 1.6
    val: float = 0.05
    workers: int | None = None
    labelled: str | None = None
    boxes: str | None = None
    detector: str = "haar"
    exif: str | None = None
    one_based: bool = False
    teacher: str | list | None = None
    names: str = "none"

    def __post_init__(self):
        self.workers = self.workers or os.cpu_count() or 1
        try:
            self.scale, self.margin, self.val = (
                float(self.scale), float(self.margin), float(self.val))
            fine = (1 <= self.margin < numpy.inf and 0 < self.scale < numpy.inf
                    and 0 <= self.val < 1)
        except (TypeError, ValueError):
            fine = False
        if not fine:
            raise UserError(f"margin {self.margin} (1 or more), scale {self.scale} (above 0), val "
                            f"{self.val} (0 to 1): one is out of range")
        if self.crop not in crops.RULES:
            raise UserError(f"crop must be one of {', '.join(crops.RULES)}, found {self.crop!r}")
        if self.exif not in (None, "obey", "ignore"):
            raise UserError(f"exif must be obey or ignore, found {self.exif!r}")
        if self.teacher is not None and self.boxes is not None:
            raise UserError("boxes are for an unlabelled set; where a teacher lays the landmarks, "
                            "the detector finds the faces (leave --boxes out)")
        if isinstance(self.teacher, str | pathlib.Path):
            self.teacher = [self.teacher]


class DataGenerator:
    """Publisher's folders to a prepared set. Call run().

    data_dir: a folder, or several to merge ("300W + WFLW", or a list). target_size: side of the
    nominal crop in pixels, 256 where it is not given. output_dir: default <data_dir>-<target_size>.
    options: see Options. Raises UserError.
    """

    def __init__(self, data_dir="300W", target_size=None, output_dir=None, **options):
        parts = data_dir
        if not isinstance(data_dir, (list, tuple)):
            parts = [data_dir] if pathlib.Path(data_dir).exists() else str(data_dir).split("+")
        self.folders = [pathlib.Path(str(part).strip()) for part in parts if part != "+"]
        given = {name for name, value in {**options, "target_size": target_size}.items()
                 if value is not None}
        target_size = 256 if target_size is None else target_size
        try:
            self.target_size = int(target_size)
        except (TypeError, ValueError):
            self.target_size = 0
        if self.target_size < 16:
            raise UserError(f"target_size {target_size}: is out of range (16 or more)")
        self.options = Options(**options)
        self._check_given(given)
        name = "+".join(f.name for f in self.folders)
        self.output = pathlib.Path(output_dir or self.folders[0].parent / f"{name}-{target_size}")
        self.output_dir = output_dir

    def _check_given(self, given):
        """Raises UserError where an option of these names, or a second folder, has no effect."""
        options = self.options
        if options.labelled is None:
            useless = given & (UNLABELLED | LABELLED_BY_TEACHER)
            why = ("for photos without landmarks, which need labelled=SET: the prepared set that "
                   "they are trained with or join (--labelled SET)")
        else:
            useless = given - (UNLABELLED if options.teacher is None else LABELLED_BY_TEACHER)
            beside = "labelled" if options.teacher is None else "labelled and teacher"
            why = (f"without effect beside {beside}; leave it out (size and crop are those of "
                   f"{options.labelled})")
        if useless:
            raise UserError(f"{', '.join(sorted(useless))}: {why}")
        if options.labelled is not None and len(self.folders) > 1:
            raise UserError(f"{', '.join(map(str, self.folders))}: of photos without landmarks one "
                            f"folder is prepared at a time; give them one after the other, each "
                            f"with its output_dir=FOLDER (--output-dir FOLDER)")

    def run(self):
        """Prepare the set, print the table of counts, return the set's folder."""
        options = self.options
        if options.teacher is not None:
            from utils.data import pseudo_labels
            return pseudo_labels.prepare(self.folders[0], options.labelled, options.teacher,
                                         options.detector, options.names, self.output_dir)
        if options.labelled is not None:
            from utils.data.unlabelled import prepare  # It imports torch, which takes seconds.
            return prepare(self.folders[0], options.labelled, options.boxes, options.detector,
                           self.output_dir)
        sources, problems = self._read_all(), []
        jobs = [(face, source.layout, source.prefix + face.name)
                for source in sources for face in source.faces]
        try:
            self._clear()
            done = self._cut_all(jobs, problems)
            if not done:
                problems = [p for source in sources for p in source.problems] + problems
                reasons = "; ".join(f"{path}: {reason}" for path, reason in problems[:2])
                raise UserError(f"{', '.join(map(str, self.folders))}: no face could be prepared"
                                + (f" ({reasons})" if reasons else ""))
            scheme = self._write(done, sources)
            problems += table.notes(done, scheme)
            table.print_counts(sources, done, problems, self.output)
            if any(layout != "samples" for _, layout, *_ in done):
                print(cropping.KEPT)
                table.print_sizes(done, self.target_size)
                print(f"look at them: {sheet.overview(self.output)} (more: python -m "
                      f"utils.data.sheet {self.output})")
        except OSError as error:
            raise UserError(f"{error.filename or self.output}: cannot be written "
                            f"({error.strerror}); give another output_dir=FOLDER "
                            f"(--output-dir FOLDER)") from None
        return self.output

    def _read_all(self):
        """The Sources, all of one scheme. Raises UserError where they are not."""
        sources, taken = [], set()
        for folder in self.folders:
            source = self._read(folder)
            if sources and source.scheme.name != sources[0].scheme.name:
                raise UserError(_refuse_merge(sources[0].scheme, source.scheme, folder))
            name = unique_name(folder.name, taken)
            if len(self.folders) > 1:
                source.prefix = f"{name}_"
                for face in source.faces:
                    if "test" in face.lists:
                        face.lists += (f"test_{name}",)
            sources.append(source)
        return sources

    def _read(self, folder):
        options = self.options
        reader = readers.get(options.layout) if options.layout else readers.recognise(folder)
        scheme = None if options.scheme is None else get_scheme(options.scheme)
        problems = []
        if reader.SCHEME is None:
            faces = reader.read(folder, problems, scheme, one_based=options.one_based)
            native = scheme
        else:
            faces = reader.read(folder, problems)
            native = get_scheme(reader.SCHEME)
        obeyed = "obey" if reader.SCHEME is None else "ignore"
        for face in faces:
            face.upright = (options.exif or obeyed) == "obey"
        scheme = scheme or native
        if scheme.name != native.name:
            mapping = MAPPINGS.get((native.name, scheme.name))
            if scheme.base == native.name:
                raise UserError(f"{folder}: {scheme.name} is a part of {native.name}: prepare the "
                                f"set without a scheme and train with --scheme {options.scheme}")
            if mapping is None:
                raise UserError(f"{folder}: no mapping from {native.name} ({native.points} points) "
                                f"to {scheme.name} ({scheme.points}); there is {_mappings()}")
            for face in faces:
                face.points, face.hidden = mapping(face.points), None
        return Source(folder, reader.NAME, reader.EXPECTED, scheme, faces, problems, "")

    def _clear(self):
        """Make an empty output folder. Its set.yaml marks it as ours, its lists as finished."""
        if is_filled(self.output):
            self._tell_change()
            shutil.rmtree(self.output)
        (self.output / "images").mkdir(parents=True, exist_ok=True)
        (self.output / "set.yaml").touch()

    def _tell_change(self):
        """Say that the set which is about to go had other crops, on which models may rest."""
        try:
            before = yaml.safe_load((self.output / "set.yaml").read_text(encoding="utf-8"))
            before = before["crop"]
        except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError):
            return
        now = {"rule": self.options.crop, "scale": self.options.scale}
        if before != now:
            print(f"note: {self.output} had crops {before} and gets {now}: models trained on it "
                  f"expect the former")

    def _cut_all(self, jobs, problems):
        """[(face, layout, image name, box, published box)] of all faces that could be cut."""
        options = self.options
        settings = (self.output / "images", self.target_size, options.crop, options.scale,
                    options.margin)
        done = []
        crops.prepare_fork()
        try:
            with concurrent.futures.ProcessPoolExecutor(self.options.workers) as pool:
                results = pool.map(cropping.cut, jobs, itertools.repeat(settings), chunksize=16)
                bar = tqdm.tqdm(zip(jobs, results), total=len(jobs), desc="crops", unit="face")
                for job, result in bar:
                    if isinstance(result, str):
                        problems.append((job[0].photo, result))
                    else:
                        done.append((*job, *result))
        except concurrent.futures.process.BrokenProcessPool:
            raise UserError(f"a worker process was killed after {len(done)} faces (out of memory?)"
                            f"; give workers=1 (--workers 1)") from None
        return done

    def _write(self, done, sources):
        held_out = _held_out([d[0] for d in done], self.options.val)
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
            hidden = "" if face.hidden is None else "".join(str(int(v)) for v in face.hidden)
            rows.append([f"images/{name}.jpg", photo, layout,
                         *(f"{v:.4f}" for v in (*box, *published)), hidden])
        # A set of test faces alone (a benchmark) still needs the order of magnitude of its points.
        points = means or [crops.to_crop(d[0].points, d[3]) for d in done]
        scheme = sources[0].scheme.with_mean_face(_mean_face(points))
        mean = " ".join(f"{v:.7f}" for v in scheme.mean_face.flatten())
        (self.output / "indices.txt").write_text(mean + "\n", encoding="utf-8")
        with open(self.output / "sources.csv", "w", newline="", encoding="utf-8",
                  errors="surrogateescape") as file:
            # A column that says nothing is left out.
            columns = [*SOURCES, *["hidden"] * any("1" in row[-1] for row in rows)]
            writer = csv.writer(file)
            writer.writerow(columns)
            writer.writerows(row[:len(columns)] for row in rows)
        options = self.options
        description = {"size": self.target_size, "margin": options.margin,
                       "crop": {"rule": options.crop, "scale": options.scale},
                       "scheme": scheme.state(),
                       "layouts": sorted({d[1] for d in done})}
        if any(d[0].upright for d in done):
            description["exif"] = "obey"
        if "train" in lists and "val" not in lists:
            description["val"] = 0
        if incomplete := table.incomplete(sources, done):
            description["incomplete"] = incomplete
        (self.output / "set.yaml").write_text(
            yaml.safe_dump(description, sort_keys=False, default_flow_style=None), encoding="utf-8")
        # Last, so that a set which was interrupted has no list and is not taken for whole.
        for split, lines in lists.items():
            (self.output / f"{split}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return scheme


def is_filled(output):
    """Whether a folder holds a prepared set, perhaps an interrupted one. Raises UserError where it
    holds something else.
    """
    if not output.exists() or output.is_dir() and not any(output.iterdir()):
        return False
    if not (output / "set.yaml").is_file():
        raise UserError(f"{output}: exists and is no prepared set; give another output_dir=FOLDER "
                        f"(--output-dir FOLDER) or empty it")
    return True


def _mappings():
    return ", ".join(f"{a} to {b}" for a, b in MAPPINGS)


def _refuse_merge(first, second, folder):
    way = f"the mappings there are: {_mappings()}"
    for a, b in ((first, second), (second, first)):
        if (a.name, b.name) in MAPPINGS:
            way = f"{a.name} maps to {b.name}: give scheme=\"{b.name}\" (--scheme {b.name})"
    return (f"{folder}: has the {second.name} scheme ({second.points} points), the set before it "
            f"{first.name} ({first.points}); they do not merge as they are; {way}")


def _mean_face(faces):
    """The mean of landmarks (K, 2) in crop units, of each point over the faces that have it.

    Raises UserError where none has one of them.
    """
    faces = numpy.array(faces)
    known = numpy.isfinite(faces)
    if known.all():
        return faces.mean(0)
    unknown = numpy.flatnonzero(~known.any((0, 2)))
    if len(unknown):
        raise UserError(f"point {unknown[0]} is labelled in none of {len(faces)} faces to train "
                        f"on; label it in one, or leave it out of the scheme")
    return numpy.where(known, faces, 0).sum(0) / known.sum(0)


def _held_out(faces, share):
    """Groups (photos) of training faces for validation: `share` of them, at least one of several.

    By the digest of a group's name: what one set holds out is held out where it is merged with
    others, so that a training that goes on from it has not seen those, but for a few at the margin.
    """
    if any("val" in face.lists for face in faces):
        return set()
    groups = sorted({face.group for face in faces if "train" in face.lists},
                    key=lambda group: hashlib.sha256(group.encode("utf-8", "replace")).digest())
    count = min(max(1, round(share * len(groups))), len(groups) - 1) if share else 0
    return set(groups[:max(count, 0)])


def main(argv=None):
    """The command line of `python -m utils.data.generator`."""
    parser = Parser(prog="python -m utils.data.generator", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter,
                    argument_default=argparse.SUPPRESS)  # Only what is given: see _check_given.
    parser.add_argument("data_dir", nargs="+", help="folder(s) as published; several are merged")
    parser.add_argument("--target-size", type=int, help="side of the nominal crop [256]")
    parser.add_argument("--output-dir", help="where the set goes [DATA_DIR-SIZE]")
    parser.add_argument("--layout", help=f"{', '.join(readers.READERS)} [recognised]")
    parser.add_argument("--scheme", help="map to this scheme, or the .yaml of a custom one")
    parser.add_argument("--crop", help=f"{', '.join(crops.RULES)} [square]")
    parser.add_argument("--scale", type=float,
                        help="nominal crop against the face's box [1.2]")
    parser.add_argument("--margin", type=float, help="image against the nominal crop [1.6]")
    parser.add_argument("--val", type=float, help="share of photos for validation; 0: none, and "
                                                  "the last epoch is the best [0.05]")
    parser.add_argument("--workers", type=int, help="processes [one a core]")
    parser.add_argument("--labelled", help="for photos without landmarks: the prepared set to "
                                           "train them with, whose size and crop they get")
    parser.add_argument("--boxes", help="face boxes of such photos, a .csv of "
                                        "image,x_min,y_min,x_max,y_max [--detector finds them]")
    parser.add_argument("--detector", help="haar, or a YuNet or SCRFD .onnx [haar]")
    parser.add_argument("--exif", choices=("obey", "ignore"),
                        help="whether labels were made on photos as a person sees them, or on the "
                             "pixels as stored [published sets: ignore, else obey]")
    parser.add_argument("--one-based", action="store_true",
                        help="the pixels of the .csv file count from 1")
    parser.add_argument("--teacher", nargs="+",
                        help="weights that label photos without landmarks (several: their mean), "
                             "which join --labelled; eyes in closed/ are shut, in open/ open")
    parser.add_argument("--names", help="which photos of closed/ and open/: a list of files, or "
                                        "LIST:PART of one with parts")
    DataGenerator(**vars(parser.parse_args(argv))).run()


if __name__ == "__main__":
    from utils.errors import run
    run(main)
