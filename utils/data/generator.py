"""Turn photos and annotations into a prepared set: cropped faces and lists for training and test.

A reader (utils.data.readers) reads the annotations, each face is cropped (utils.data.cropping), and
a prepared set is written, a folder with:

  images/          the crops; each shows the nominal crop, enlarged by `margin` about its centre
  train.txt        one face a line: image path, then x and y of its K landmarks in units of the
                   nominal crop; likewise val.txt, test.txt and test_<name>.txt
  indices.txt      the mean face of the training faces
  sources.csv      photo, nominal and published crop in photo pixels, and hidden points of each face
  set.yaml         size, margin, crop rule and landmark scheme
"""
from __future__ import annotations

import argparse
import collections
import concurrent.futures.process
import contextlib
import csv
import dataclasses
import functools
import hashlib
import pathlib
import shutil
from collections.abc import Sequence

import numpy
import tqdm
import yaml

from utils.args import Parser
from utils.data import cropping, readers, sheet, table
from utils.data.cropping import CroppedFace
from utils.data.readers.face import Face, Source
from utils.data.readers.pts import unique_name
from utils.errors import UserError, printable, shell_word
from utils.files import read_text
from utils.landmarks import crop as crops
from utils.landmarks.schemes import MAPPINGS, Scheme, get_scheme
from utils.machine import available_cores, check_main_guard, without_main_module

# Columns of sources.csv.
SOURCES = ("image", "photo", "layout", "x_min", "y_min", "x_max", "y_max", "published_x_min",
           "published_y_min", "published_x_max", "published_y_max")
# Options for photos without landmarks: as an unlabelled set, and with pseudo-labels of a teacher.
UNLABELLED_OPTIONS = {"labelled", "boxes", "detector"}
TEACHER_OPTIONS = {"labelled", "teacher", "detector", "names"}


@dataclasses.dataclass
class Options:
    """How a set is prepared; the keyword arguments of DataGenerator.

    Attributes:
        layout: name of the reader; None: recognised from the files.
        scheme: landmark scheme to map to (WFLW to 300W), or that of the user's own data: a name or
            a YAML file.
        crop: crop rule, see landmarks.crop.face_box.
        scale: side of the nominal crop relative to the face's box.
        margin: side of the stored image relative to the nominal crop.
        val: share of the training photos held out for validation. With 0 there is no validation
            list, and training keeps the last epoch as the best.
        workers: number of worker processes; 1: none, this process does the work; None: one per
            core.
        labelled: prepared set with which photos without landmarks are trained, see
            unlabelled.prepare.
        boxes: CSV file of face boxes of photos without landmarks.
        detector: detector for photos without landmarks: "haar" or an .onnx file.
        exif: "obey" if labels refer to photos with their EXIF orientation applied, "ignore" if they
            refer to the pixels as stored; None: "ignore" for published sets, else "obey".
        one_based: True if pixels of the user's own data count from 1 (.pts files always do).
        teacher: weights, or a list of weights, that label photos without landmarks, which are then
            added to a copy of `labelled`, see pseudo_labels.prepare.
        names: which photos of closed/ and open/ the teacher labels, see eye_states.list_photos.

    Raises:
        UserError: a value is out of range or unknown.
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
        self.workers = self.workers or available_cores()
        try:
            self.scale, self.margin, self.val = (
                float(self.scale), float(self.margin), float(self.val))
            in_range = (1 <= self.margin < numpy.inf and 0 < self.scale < numpy.inf
                        and 0 <= self.val < 1)
        except (TypeError, ValueError):
            in_range = False
        if not in_range:
            raise UserError(f"margin {self.margin} (1 or more), scale {self.scale} (above 0), val "
                            f"{self.val} (0 to 1): one is out of range")
        if self.crop not in crops.RULES:
            raise UserError(f"crop must be one of {', '.join(crops.RULES)}, found {self.crop!r}")
        if self.exif not in (None, "obey", "ignore"):
            raise UserError(f"exif must be obey or ignore, found {self.exif!r}")
        if self.teacher is not None and self.boxes is not None:
            raise UserError("boxes: not with a teacher, for which the detector finds the faces; "
                            "leave --boxes out")
        if isinstance(self.teacher, str | pathlib.Path):
            self.teacher = [self.teacher]


class DataGenerator:
    """Prepares a set from one or several folders of photos; call `run`.

    Args:
        data_dir: a folder, or several to merge: "300W + WFLW", or a list.
        target_size: side of the nominal crop in pixels; default: 256.
        output_dir: folder of the prepared set; default: <data_dir>-<target_size>.
        **options: see Options.

    Raises:
        UserError: an option is out of range, unknown or without effect.
    """

    def __init__(self, data_dir: str | pathlib.Path | Sequence[str | pathlib.Path] = "300W",
                 target_size: int | None = None, output_dir: str | pathlib.Path | None = None,
                 **options):
        folders = data_dir
        if not isinstance(data_dir, (list, tuple)):
            folders = [data_dir] if pathlib.Path(data_dir).exists() else str(data_dir).split("+")
        # On the command line, 300W + WFLW is three words.
        self.folders = [pathlib.Path(str(folder).strip()) for folder in folders if folder != "+"]
        specified = {name for name, value in {**options, "target_size": target_size}.items()
                     if value is not None}
        target_size = 256 if target_size is None else target_size
        try:
            self.target_size = int(target_size)
        except (TypeError, ValueError):
            self.target_size = 0
        if self.target_size < 16:
            raise UserError(f"target_size {target_size}: is out of range (16 or more)")
        self.options = Options(**options)
        self._check_effective(specified)
        name = "+".join(f.name for f in self.folders)
        self.output = pathlib.Path(output_dir or self.folders[0].parent / f"{name}-{target_size}")
        self.output_dir = output_dir

    def _check_effective(self, specified: set[str]) -> None:
        """Raise UserError if one of the specified options, or a second folder, has no effect."""
        options = self.options
        if options.labelled is None:
            unused = specified & (UNLABELLED_OPTIONS | TEACHER_OPTIONS)
            reason = ("for photos without landmarks, which need labelled=SET: the prepared set "
                      "that they are trained with or added to (--labelled SET)")
        else:
            effective = UNLABELLED_OPTIONS if options.teacher is None else TEACHER_OPTIONS
            unused = specified - effective
            mode = "labelled" if options.teacher is None else "labelled and teacher"
            reason = (f"without effect beside {mode}; leave it out (size and crop are those of "
                      f"{options.labelled})")
        if unused:
            raise UserError(f"{', '.join(sorted(unused))}: {reason}")
        if options.labelled is not None and len(self.folders) > 1:
            raise UserError(f"{', '.join(map(str, self.folders))}: photos without landmarks are "
                            f"prepared one folder at a time; run the command once for each, with "
                            f"its own output_dir=FOLDER (--output-dir FOLDER)")

    def run(self) -> pathlib.Path:
        """Prepare the set and print the table of counts.

        Returns:
            The folder of the prepared set.

        Raises:
            UserError: nothing can be read, no face can be prepared or the set cannot be written.
        """
        check_main_guard()
        options = self.options
        if options.teacher is not None:
            from utils.data import pseudo_labels
            return pseudo_labels.prepare(self.folders[0], options.labelled, options.teacher,
                                         options.detector, options.names, self.output_dir)
        if options.labelled is not None:
            from utils.data.unlabelled import prepare  # Imports torch, which takes seconds.
            return prepare(self.folders[0], options.labelled, options.boxes, options.detector,
                           self.output_dir)
        sources, problems = self._read_all(), []
        jobs = [(face, source.layout, source.prefix + face.name)
                for source in sources for face in source.faces]
        try:
            self._make_empty_folder()
            cropped = self._crop_all(jobs, problems)
            if not cropped:
                problems = [p for source in sources for p in source.problems] + problems
                reasons = "; ".join(f"{path}: {reason}" for path, reason in problems[:2])
                raise UserError(f"{', '.join(map(str, self.folders))}: no face could be prepared"
                                + (f" ({reasons})" if reasons else ""))
            scheme = self._write(cropped, sources)
            problems += table.notes(cropped, scheme)
            table.print_counts(sources, cropped, problems, self.output)
            if any(layout != readers.drawn.NAME for _, layout, *_ in cropped):
                print(cropping.KEPT)
                table.print_sizes(cropped, self.target_size)
                print(printable(f"look at them: {sheet.overview(self.output)} (more: python -m "
                                f"utils.data.sheet {shell_word(self.output)})"))
        except OSError as error:
            raise UserError(f"{error.filename or self.output}: cannot be written "
                            f"({error.strerror}); give another output_dir=FOLDER "
                            f"(--output-dir FOLDER)") from None
        return self.output

    def _read_all(self) -> list[Source]:
        """Read all folders. Raises UserError if their landmark schemes differ."""
        sources, taken = [], set()
        for folder in self.folders:
            source = self._read(folder)
            if sources and source.scheme.name != sources[0].scheme.name:
                raise UserError(_merge_error(sources[0].scheme, source.scheme, folder))
            name = unique_name(folder.name, taken)
            if len(self.folders) > 1:
                source.prefix = f"{name}_"
                for face in source.faces:
                    if "test" in face.lists:
                        face.lists += (f"test_{name}",)
            sources.append(source)
        return sources

    def _read(self, folder: pathlib.Path) -> Source:
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
        # The annotators of the published sets ignored the EXIF orientation.
        exif = options.exif or ("obey" if reader.SCHEME is None else "ignore")
        for face in faces:
            face.upright = exif == "obey"
        scheme = scheme or native
        if scheme.name != native.name:
            mapping = MAPPINGS.get((native.name, scheme.name))
            if scheme.base == native.name:
                raise UserError(f"{folder}: {scheme.name} is a part of {native.name}: prepare the "
                                f"set without a scheme and train with --scheme "
                                f"{shell_word(options.scheme)}")
            if mapping is None:
                raise UserError(f"{folder}: no mapping from {native.name} ({native.points} points) "
                                f"to {scheme.name} ({scheme.points}); there is {_mappings()}")
            for face in faces:
                face.points, face.hidden = mapping(face.points), None
        return Source(folder, reader.NAME, reader.EXPECTED, scheme, faces, problems)

    def _make_empty_folder(self) -> None:
        """Make an empty output folder; set.yaml marks it as a prepared set that may be replaced."""
        if is_prepared_set(self.output):
            self._warn_of_other_crops()
            shutil.rmtree(self.output)
        (self.output / "images").mkdir(parents=True, exist_ok=True)
        (self.output / "set.yaml").touch()

    def _warn_of_other_crops(self) -> None:
        """Print a note if the set that is about to be replaced has crops of another rule."""
        try:
            before = yaml.safe_load(read_text(self.output / "set.yaml"))
            before = before["crop"]
        except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError):
            return
        now = {"rule": self.options.crop, "scale": self.options.scale}
        if before != now:
            print(f"note: {self.output} had crops {before} and gets {now}: models trained on it "
                  f"expect the former")

    def _crop_all(self, jobs: list[tuple[Face, str, str]], problems: list) -> list[CroppedFace]:
        """Crop the faces, in worker processes if several; skipped faces go to `problems`."""
        options = self.options
        write_face = functools.partial(
            cropping.write_face, folder=self.output / "images", size=self.target_size,
            rule=options.crop, scale=options.scale, margin=options.margin)
        cropped = []
        crops.disable_opencv_threads()
        try:
            with contextlib.ExitStack() as stack:
                if options.workers == 1:
                    results = map(write_face, jobs)
                else:
                    pool = stack.enter_context(
                        concurrent.futures.ProcessPoolExecutor(options.workers))
                    with without_main_module():
                        results = pool.map(write_face, jobs, chunksize=16)
                bar = tqdm.tqdm(zip(jobs, results), total=len(jobs), desc="crops", unit="face")
                for job, result in bar:
                    if isinstance(result, str):
                        problems.append((job[0].photo, result))
                    else:
                        cropped.append(CroppedFace(*job, *result))
        except concurrent.futures.process.BrokenProcessPool:
            raise UserError(f"a worker process was killed after {len(cropped)} faces (out of "
                            f"memory?); give workers=1 (--workers 1)") from None
        return cropped

    def _write(self, cropped: list[CroppedFace], sources: list[Source]) -> Scheme:
        """Write lists, mean face, sources.csv and set.yaml; return the scheme with its mean."""
        held_out = _validation_groups([item.face for item in cropped], self.options.val)
        lists = collections.defaultdict(list)
        rows, train_points = [], []
        for face, layout, name, box, published in cropped:
            points = crops.to_crop(face.points, box)
            line = f"images/{name}.jpg " + " ".join(f"{v:.7f}" for v in points.flatten())
            for split in face.lists:
                split = "val" if split == "train" and face.group in held_out else split
                lists[split].append(line)
                if split == "train":
                    train_points.append(points)
            photo = face.photo.resolve() if face.photo.exists() else ""
            hidden = "" if face.hidden is None else "".join(str(int(v)) for v in face.hidden)
            rows.append([f"images/{name}.jpg", photo, layout,
                         *(f"{v:.4f}" for v in (*box, *published)), hidden])
        # Without training faces (a benchmark) the mean is that of all faces.
        points = train_points or [crops.to_crop(item.face.points, item.box) for item in cropped]
        scheme = sources[0].scheme.with_mean_face(_mean_face(points))
        mean = " ".join(f"{v:.7f}" for v in scheme.mean_face.flatten())
        (self.output / "indices.txt").write_text(mean + "\n", encoding="utf-8")
        with open(self.output / "sources.csv", "w", newline="", encoding="utf-8",
                  errors="surrogateescape") as file:
            # The column is left out where no point is hidden.
            columns = [*SOURCES, *["hidden"] * any("1" in row[-1] for row in rows)]
            writer = csv.writer(file)
            writer.writerow(columns)
            writer.writerows(row[:len(columns)] for row in rows)
        options = self.options
        description = {"size": self.target_size, "margin": options.margin,
                       "crop": {"rule": options.crop, "scale": options.scale},
                       "scheme": scheme.state(),
                       "layouts": sorted({item.layout for item in cropped})}
        if any(item.face.upright for item in cropped):
            description["exif"] = "obey"
        if "train" in lists and "val" not in lists:
            description["val"] = 0
        if incomplete := table.incomplete(sources, cropped):
            description["incomplete"] = incomplete
        (self.output / "set.yaml").write_text(
            yaml.safe_dump(description, sort_keys=False, default_flow_style=None), encoding="utf-8")
        # The lists come last: a set without lists was interrupted.
        for split, lines in lists.items():
            (self.output / f"{split}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return scheme


def is_prepared_set(output: pathlib.Path) -> bool:
    """Return True for a prepared set, complete or interrupted, False for no or an empty folder.

    Raises:
        UserError: the folder holds something else.
    """
    if not output.exists() or output.is_dir() and not any(output.iterdir()):
        return False
    if not (output / "set.yaml").is_file():
        raise UserError(f"{output}: exists and is no prepared set; give another output_dir=FOLDER "
                        f"(--output-dir FOLDER) or empty it")
    return True


def _mappings() -> str:
    return ", ".join(f"{a} to {b}" for a, b in MAPPINGS)


def _merge_error(first: Scheme, second: Scheme, folder: pathlib.Path) -> str:
    hint = f"the mappings there are: {_mappings()}"
    for a, b in ((first, second), (second, first)):
        if (a.name, b.name) in MAPPINGS:
            hint = f"{a.name} maps to {b.name}: give scheme=\"{b.name}\" (--scheme {b.name})"
    return (f"{folder}: has the {second.name} scheme ({second.points} points), the set before it "
            f"{first.name} ({first.points}); they do not merge as they are; {hint}")


def _mean_face(faces: list[numpy.ndarray]) -> numpy.ndarray:
    """Return the mean (K, 2) of landmarks in crop units, ignoring unlabelled points.

    Raises UserError for a point that no face has.
    """
    faces = numpy.array(faces)
    known = numpy.isfinite(faces)
    if known.all():
        return faces.mean(0)
    unknown = numpy.flatnonzero(~known.any((0, 2)))
    if len(unknown):
        raise UserError(f"point {unknown[0]} is labelled in none of the {len(faces)} training "
                        f"faces; label it in one of them, or remove it from the scheme")
    return numpy.where(known, faces, 0).sum(0) / known.sum(0)


def _validation_groups(faces: list[Face], share: float) -> set[str]:
    """Choose the groups (photos) of training faces to hold out for validation.

    They are `share` of the groups: at least one if there are several, never all, and none with
    share 0 or if a publisher's validation list exists. The order of the names' digests decides, so
    that a set holds out nearly the same photos alone and merged with others, and a model trained on
    one can be trained further on the other without having seen its validation faces.
    """
    if any("val" in face.lists for face in faces):
        return set()
    groups = sorted({face.group for face in faces if "train" in face.lists},
                    key=lambda group: hashlib.sha256(group.encode("utf-8", "replace")).digest())
    count = min(max(1, round(share * len(groups))), len(groups) - 1) if share else 0
    return set(groups[:max(count, 0)])


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line of `python -m utils.data.generator`."""
    # Options that are absent stay unspecified, see DataGenerator._check_effective.
    parser = Parser(prog="python -m utils.data.generator", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter,
                    argument_default=argparse.SUPPRESS)
    parser.add_argument("data_dir", nargs="+",
                        help="folder of a data set, or annotation file; several are merged")
    parser.add_argument("--target-size", type=int,
                        help="side of the nominal crop in pixels [256]")
    parser.add_argument("--output-dir", help="folder of the prepared set [DATA_DIR-SIZE]")
    parser.add_argument("--layout", help=f"layout of the data set: {', '.join(readers.READERS)} "
                                         f"[recognised from its files]")
    parser.add_argument("--scheme", help="landmark scheme to map to, or that of your own data (a "
                                         "name or a .yaml file)")
    parser.add_argument("--crop", help=f"crop rule: {', '.join(crops.RULES)} [square]")
    parser.add_argument("--scale", type=float,
                        help="side of the nominal crop relative to the face's box [1.2]")
    parser.add_argument("--margin", type=float,
                        help="side of the stored image relative to the nominal crop [1.6]")
    parser.add_argument("--val", type=float,
                        help="share of the training photos to hold out for validation; with 0, "
                             "training keeps the last epoch as the best [0.05]")
    parser.add_argument("--workers", type=int,
                        help="number of worker processes; 1: none [one per core]")
    parser.add_argument("--exif", choices=("obey", "ignore"),
                        help="obey: labels refer to photos with their EXIF orientation applied; "
                             "ignore: to the pixels as stored [ignore for published sets, else "
                             "obey]")
    parser.add_argument("--one-based", action="store_true",
                        help="pixels of your own annotation file count from 1 (those of .pts "
                             "files always do)")
    group = parser.add_argument_group("photos without landmarks")
    group.add_argument("--labelled", metavar="SET",
                       help="prepared set with which the photos are trained; its size and crop "
                            "are used")
    group.add_argument("--boxes", metavar="CSV",
                       help="face boxes of the photos: image,x_min,y_min,x_max,y_max [found by "
                            "--detector]")
    group.add_argument("--detector", help="face detector: haar, or a YuNet or SCRFD .onnx file "
                                          "[haar]")
    group.add_argument("--teacher", nargs="+", metavar="WEIGHTS",
                       help="weights that label the photos, which are then added to a copy of "
                            "--labelled; the mean of several is used. Faces in folders closed/ "
                            "and open/ have closed and open eyes")
    group.add_argument("--names", metavar="LIST",
                       help="file that lists which photos of closed/ and open/ to use, or "
                            "LIST:PART for one part of it [all]")
    DataGenerator(**vars(parser.parse_args(argv))).run()


if __name__ == "__main__":
    from utils.errors import run
    run(main)
