"""The test: whole lists scored with PyTorch, ONNX Runtime or both; tables, plots, report."""
import csv
import json
import math
import pathlib

import numpy

from utils import checkpoint, draw, experiment, machine
from utils.data import dataset
from utils.data.sets import set_folder
from utils.detection.detector import get_detector
from utils.errors import UserError
from utils.evaluation import boxes, predict
from utils.landmarks import crop, pose, schemes
from utils.predictor import Predictor

TRUTH = (0, 255, 0)  # The colour of annotated points beside predicted ones.
# |yaw| in degrees at which --by-pose parts the faces.
YAWS = (0, 15, 30, 60, 90)


def test(args, actions, typed=()):
    """Score the test lists with PyTorch, ONNX Runtime or both; print, plot, report.

    args: resolved. actions: holds "test", "test_onnx" or both; the .onnx must be there. typed: the
    names of settings that the user gave. Raises UserError.
    """
    check(args)
    path = experiment.find_weights(args.exp, ".pt" if "test" in actions else ".onnx")
    weights = path.with_suffix(".pt")
    if "test" in actions and not weights.is_file():
        raise UserError(f"{weights}: no such file; for an ONNX file alone give --test-onnx")
    prepared = dataset.PreparedSet(set_folder(args))
    tested = bool(prepared.tests)
    if not tested:
        if not len(prepared.lists["val"]):
            raise UserError(f"{prepared.folder}: has no test list and no validation faces; give "
                            f"some faces the split test (or put them into a folder test/) and "
                            f"prepare the set again")
        prepared.lists["test_val"] = prepared.lists["val"]
        print(f"note: {prepared.folder} has no test list; scored on its validation faces, which "
              f"chose the best epoch")
    prepared.tell_incomplete()
    ways = _ways(args, actions, path)
    _tell_fixed(next(iter(ways.values()))[0], args, typed)
    yaws = true_yaws(prepared) if args.by_pose else {}
    report, found = {}, {}
    for way, (model, function) in ways.items():
        schemes.fit_scheme(model.scheme, prepared.scheme, str(path))
        prepared.tell_crop(model.crop)
        prepared.tell_size(model.input_size)
        if args.boxes == "none":
            report[way], found[way] = score(function, model, prepared, args.workers)
        else:
            report[way], found[way] = boxes.score(model, get_detector(args.boxes), prepared)
        print_table(way, report[way], prepared.has_photos)
        for name, faces in prepared.tests.items():
            if faces.hidden is not None:
                report[way][name]["by_visibility"] = by_visibility(
                    *found[way][name], faces, model.scheme, prepared.scheme)
                print_by_visibility(name, report[way][name]["by_visibility"])
        for name, yaw in yaws.items():
            report[way][name]["by_yaw"] = by_yaw(found[way][name][1], yaw)
            print_by_yaw(name, report[way][name]["by_yaw"])
    if len(ways) == 2:
        report["max_abs_diff_px"] = largest_difference(*found.values(), prepared, model.input_size)
        print(f"largest difference of a coordinate: {report['max_abs_diff_px']:.4f} px")
    averaged = {way: model.flip_test for way, (model, _) in ways.items()}
    if len(set(averaged.values())) == 2:
        print("note: of these two only the ONNX file averages with the mirrored face; give "
              "--flip-test to compare like with like, or --export to write it without")
    prefix = _prefix(path, args.boxes, args.flip_test)
    draw_errors(next(iter(found.values())), model.scheme, prepared, prefix)
    write_faces(next(iter(found.values())), prepared, prefix)
    if args.boxes == "none" and tested and not any(averaged.values()):
        experiment.record_score(path, report, experiment.data_name(args, prepared.folder))
    if args.report != "none":
        pathlib.Path(args.report).write_text(json.dumps(_plain(report), indent=2), encoding="utf-8")


def _tell_fixed(model, args, typed):
    """Say which settings that were typed are the model's own, and others."""
    own = getattr(getattr(model, "model", None) or model, "args", None)
    if own is not None:
        for name in ("backbone", "head", "num_nb", "merge", "stride", "input_size"):
            if name in typed and getattr(own, name) != getattr(args, name):
                print(f"note: --{name.replace('_', '-')} {getattr(args, name)} without effect: the "
                      f"model has {getattr(own, name)}, with which it was trained")


def _plain(value):
    """A report as JSON has it: null where a number is none, as of no face."""
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check(args):
    """What can be said of a test's settings before a training. Raises UserError."""
    if args.report != "none" and not pathlib.Path(args.report).parent.is_dir():
        raise UserError(f"--report {args.report}: there is no such folder")
    if args.boxes != "none":
        get_detector(args.boxes)


def _ways(args, actions, path):
    """{"pytorch" | "onnx": (model, function)} as score() takes them, of the weights at a path."""
    ways = {}
    if "test" in actions and args.boxes == "none":
        device = machine.choose_device(args.device)
        model = checkpoint.load_model(path.with_suffix(".pt"), device, flip_test=args.flip_test)
        ways["pytorch"] = model, predict.torch_predict(model, device)
    elif "test" in actions:
        # From detected boxes a Predictor alone does everything.
        ways["pytorch"] = Predictor(path.with_suffix(".pt"), args.device,
                                    flip_test=args.flip_test), None
    if "test_onnx" in actions:
        predictor = Predictor(path.with_suffix(".onnx"), args.device, flip_test=args.flip_test)
        ways["onnx"] = predictor, lambda images: predictor(images.permute(0, 2, 3, 1).numpy())[0]
    return ways


def score(function, model, prepared, workers=0):
    """All test lists of a prepared set.

    function: see predict.predict_list. model: has `scheme` and `input_size`. Returns
    ({list: numbers}, {list: (landmarks, NMEs)}); numbers are metrics.summary in photo pixels plus
    `nme_crop`, `fr8_crop` ... in published units.
    """
    numbers, found = {}, {}
    for name, faces, (predicted,) in predict.once(prepared.tests, lambda faces: [
            predict.predict_list(function, faces, prepared.margin, model.input_size,
                                 workers=workers)]):
        nme, published = predict.errors(predicted, faces, model.scheme, prepared.scheme)
        numbers[name] = predict.summarise(nme, published)
        found[name] = predicted, nme
    return numbers, found


def print_table(way, numbers, has_photos=True):
    """Print the numbers of score(), one line a list; published units in the second half. Without
    photos both are of the crops as they are.
    """
    unit = "photo pixels" if has_photos else "crop pixels "
    print(f"{way:<12}{'':>7} | {unit}{'':<33} | published units (stretched crop)")
    columns = f"{'NME %':>8}{'FR8 %':>8}{'AUC8':>8}{'FR10 %':>8}{'AUC10':>8}"
    print(f"{'list':<12}{'faces':>7} |{columns}      |{columns}")
    for name, n in numbers.items():
        if "found" in n:
            print(f"{name:<12}{n['found']:>6.2f} % of the faces were found; of these:")
        cells = ["".join(f"{n[k + unit]:>8.{d}f}" for k, d in
                         (("nme", 3), ("fr8", 2), ("auc8", 4), ("fr10", 2), ("auc10", 4)))
                 for unit in ("", "_crop")]
        print(f"{name:<12}{n['faces']:>7} |{cells[0]}      |{cells[1]}")
        if "unscored" in n:
            print(f"{name:<12}{n['unscored']:>7} faces are not scored: without points, or with a "
                  f"divisor of 0")


def by_visibility(predicted, nme, faces, scheme, set_scheme):
    """{"visible" | "hidden": {faces, points, nme}} of a FaceList that says which points are hidden.

    predicted (N, K, 2), nme (N,): as of score(). faces: that have such points and are scored;
    nme: the mean of these faces' NME over such points in %, None where there are none.
    """
    parts, scored = {}, numpy.isfinite(nme)
    own = slice(None) if scheme.indices is None else list(scheme.indices)
    known = numpy.isfinite(faces.points).all(-1)
    for name, counts in (("visible", known & ~faces.hidden), ("hidden", known & faces.hidden)):
        values, _ = predict.errors(predicted, faces, scheme, set_scheme, counts)
        values = values[scored & numpy.isfinite(values)]
        parts[name] = {"faces": len(values), "points": int(counts[scored][:, own].sum()),
                       "nme": 100 * float(values.mean()) if len(values) else None}
    return parts


def print_by_visibility(name, parts):
    """Print by_visibility() of a list in one line."""
    cells = [f"{part}: " + (f"{n['nme']:.3f} ({n['points']} points of {n['faces']} faces)"
                            if n["faces"] else "no point") for part, n in parts.items()]
    print(f"{name}: NME % of points, {', '.join(cells)}")


def true_yaws(prepared):
    """{list: |yaw| in degrees (N,)} of the test lists' annotations. Raises UserError where the
    set's scheme has no pose.
    """
    pose.model_points(prepared.scheme)
    return {name: numpy.abs([pose.head_pose(points, prepared.scheme)[0] for points in
                             crop.to_photo(faces.points, faces.boxes)])
            for name, faces in prepared.tests.items()}


def by_yaw(nme, yaw):
    """NMEs (N,), NaN where no face was found, by |yaw| (N,): rows of YAWS' bins, their faces and
    their mean in %, None where there are none.
    """
    rows = []
    for low, high in zip(YAWS, YAWS[1:]):
        # The last bin holds the faces turned further, too.
        inside = (yaw >= low) & ((yaw < high) | (high == YAWS[-1]))
        values = nme[inside & numpy.isfinite(nme)]
        rows.append({"yaw": [low, high], "faces": len(values),
                     "nme": 100 * float(values.mean()) if len(values) else None})
    return rows


def print_by_yaw(name, rows):
    """Print by_yaw() of a list in one line."""
    cells = [f"{row['yaw'][0]}-{row['yaw'][1]}: " + (
        f"{row['nme']:.3f} ({row['faces']} faces)" if row["faces"] else "no face") for row in rows]
    print(f"{name}: NME % by |yaw| in degrees: {', '.join(cells)}")


def largest_difference(first, second, prepared, input_size):
    """Largest difference of a coordinate between two predictions of score(), in photo pixels, or
    where the photos are not known in those of a crop of input_size.
    """
    unit = 1 if prepared.has_photos else input_size
    return unit * float(numpy.max([numpy.abs(
        crop.to_photo(first[name][0], faces.boxes)
        - crop.to_photo(second[name][0], faces.boxes)).max()
        for name, faces in prepared.tests.items()]))


def draw_errors(found, scheme, prepared, prefix):
    """Write ced.png and worst.png (the 16 worst faces of the first list, truth in green); prefix:
    of their paths.
    """
    experiment.plot_ced({name: nme for name, (_, nme) in found.items()}, f"{prefix}ced.png")
    name, faces = next(iter(prepared.tests.items()))
    predicted, nme = found[name]
    size = prepared.size or 256
    crops = dataset.FaceDataset(faces, prepared.margin, size)
    truth = faces.points if scheme.base is None else faces.points[:, list(scheme.indices)]
    # NaN, of what was not found or cannot be scored, comes last.
    worst = numpy.argsort(-nme)[:16]
    images = []
    for i in worst:
        image = draw.points(crops[int(i)][0].numpy(), truth[i] * size - 0.5, TRUTH)
        images.append(draw.landmarks(image, predicted[i] * size - 0.5, scheme))
    captions = [f"{100 * nme[i]:.1f} % {faces.images[i].stem}" for i in worst]
    draw.save(f"{prefix}worst.png", draw.sheet(images, 4, 320, captions))


def write_faces(found, prepared, prefix):
    """Write faces.csv: list, image, photo and NME in % of every test face; prefix: of its path.

    found: as of score(). The NME is empty for a face that was not found or cannot be scored.
    """
    with open(f"{prefix}faces.csv", "w", newline="", encoding="utf-8",
              errors="backslashreplace") as file:
        writer = csv.writer(file)
        writer.writerow(["list", "image", "photo", "nme"])
        for name, (_, nme) in found.items():
            faces = prepared.tests[name]
            for i, value in enumerate(nme):
                photo = faces.photos[i] if faces.photos else ""
                writer.writerow([name, faces.images[i].name, photo,
                                 "" if numpy.isnan(value) else f"{100 * value:.4f}"])


def _prefix(weights, detector, flip_test):
    """How the paths of pictures and tables begin: beside the weights, and of weights at the top of
    weights/, which share their folder, with their name. detector: of --boxes, or none.
    """
    names = ["" if weights.stem == "best" else f"{weights.stem}-",
             "" if detector == "none" else "boxes-", "flip-" if flip_test else ""]
    return f"{weights.parent.as_posix()}/{''.join(names)}"
