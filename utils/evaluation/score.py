"""Score a model on the test lists of a prepared set with PyTorch, ONNX Runtime or both.

run_test (main.py --test, --test-onnx) loads the weights in each runtime, predicts every list, and
prints a table of NME, failure rate and AUC. The numbers go into the .json file of --report and into
weights/results.csv. Then it writes, beside the weights, faces.csv (the NME of every face), ced.png
(cumulative error distribution) and worst.png (largest errors).
"""
from __future__ import annotations

import argparse
import csv
import json
import math
import pathlib
import typing
from collections.abc import Callable, Collection, Mapping

import numpy

from utils import checkpoint, draw, experiment, machine, plots
from utils.data import dataset
from utils.data.dataset import PreparedSet
from utils.data.face_list import FaceList
from utils.data.sets import set_folder
from utils.detection.detector import get_detector
from utils.errors import UserError, as_note
from utils.evaluation import boxes, conditions, predict
from utils.files import OutputFile, atomic_write
from utils.landmarks import crop, schemes
from utils.landmarks.schemes import Scheme
from utils.predictor import Predictor

TRUTH = (0, 255, 0)  # RGB colour of annotated landmarks in worst.png.
# Limits in degrees of the bins of |yaw| for --by-pose.
YAWS = (0, 15, 30, 60, 90)

# By list: landmarks (N, K, 2) in crop units, and NMEs (N,) as fractions.
Results = dict[str, tuple[numpy.ndarray, numpy.ndarray]]


def run_test(args: argparse.Namespace, actions: Collection[str],
             typed: Collection[str] = ()) -> None:
    """Score the test lists; print, plot, record and report the numbers.

    Args:
        args: resolved settings: `exp` names the weights, `data_dir` the set, `boxes` a detector.
        actions: holds "test" (PyTorch), "test_onnx" (ONNX Runtime) or both.
        typed: names of the settings on the command line, to warn of those without effect.

    Raises:
        UserError: where weights, set or detector are missing or do not fit each other.
    """
    check_settings(args)
    path = experiment.find_weights(args.exp, ".pt" if "test" in actions else ".onnx")
    weights = path.with_suffix(".pt")
    if "test" in actions and not weights.is_file():
        raise UserError(f"{weights}: no such file; for an ONNX file alone give --test-onnx")
    prepared = PreparedSet(set_folder(args))
    has_test_list = bool(prepared.test_lists)
    if not has_test_list:
        _test_on_validation(prepared)
    prepared.warn_incomplete()
    runtimes = _load_runtimes(args, actions, path)
    models = {runtime: model for runtime, (model, _) in runtimes.items()}
    _warn_fixed(next(iter(models.values())), args, typed)
    yaws = conditions.true_yaws(prepared) if args.by_pose else {}
    kinds = conditions.parse_kinds(args.by)
    report, results = {}, {}
    for runtime, (model, function) in runtimes.items():
        schemes.check_scheme(model.scheme, prepared.scheme, str(path))
        prepared.warn_crop(model.crop)
        prepared.warn_size(model.input_size)
        report[runtime], results[runtime] = (
            score_lists(function, model, prepared, args.workers) if args.boxes == "none" else
            boxes.score_detected(model, get_detector(args.boxes), prepared))
        print_table(runtime, report[runtime], prepared.has_photos)
        print_normalised(report[runtime], prepared.scheme)
        _add_breakdowns(report[runtime], results[runtime], model.scheme, prepared, yaws)
        if kinds:
            nmes = {name: nme for name, (_, nme) in results[runtime].items()}
            rows = conditions.by_conditions(kinds, function, model, prepared, nmes, args.workers)
            conditions.print_conditions(rows)
            for name, found in rows.items():
                report[runtime][name]["by"] = found
    if len(runtimes) == 2:
        report["max_abs_diff_px"] = largest_difference(*results.values(), prepared,
                                                       model.input_size)
        print(f"largest difference of a coordinate: {report['max_abs_diff_px']:.4f} px")
    flip_tests = {model.flip_test for model in models.values()}
    if len(flip_tests) == 2:
        print("note: only the ONNX file averages with the mirrored face; give --flip-test to test "
              "both so, or --export to write the file without")
    if args.report != "none":
        text = json.dumps(_without_nan(report), indent=2)
        OutputFile(args.report, "--report").write(text.encode())
    if args.boxes == "none" and has_test_list and not any(flip_tests):
        with as_note(path.parent.parent / "results.csv"):
            experiment.record_score(path, report, experiment.data_name(args, prepared.folder))
    write_side_files(next(iter(results.values())), model.scheme, prepared,
                     _output_prefix(path, args.boxes, args.flip_test))


def check_settings(args: argparse.Namespace) -> None:
    """Check early, before a training that ends in a test, that the test can be done.

    Raises:
        UserError: if the folder of --report is missing, the detector of --boxes does not load or
            --by has an unknown name.
    """
    if args.report != "none" and not pathlib.Path(args.report).parent.is_dir():
        raise UserError(f"--report {args.report}: there is no such folder")
    synthetic = set(conditions.parse_kinds(args.by)) - {"yaw"}
    if args.boxes != "none":
        if synthetic:
            raise UserError(f"--by {args.by}: of detected boxes there is only yaw; leave out "
                            f"--boxes or {','.join(sorted(synthetic))}")
        get_detector(args.boxes)


def _test_on_validation(prepared):
    """Let the validation faces be the test list of a set that has none."""
    if not len(prepared.lists["val"]):
        raise UserError(f"{prepared.folder}: has no test list and no validation faces; give "
                        f"some faces the split test (or put them into a folder test/) and "
                        f"prepare the set again")
    prepared.lists["test_val"] = prepared.lists["val"]
    print(f"note: {prepared.folder} has no test list; scored on its validation faces, which "
          f"chose the best epoch")


def _warn_fixed(model, args, typed):
    """Print which typed settings have no effect because the model has others."""
    fixed = getattr(getattr(model, "model", None) or model, "args", None)
    if fixed is not None:
        for name in ("backbone", "head", "num_nb", "merge", "stride", "input_size"):
            if name in typed and getattr(fixed, name) != getattr(args, name):
                print(f"note: --{name.replace('_', '-')} {getattr(args, name)} without effect: the "
                      f"model was trained with {getattr(fixed, name)}")


def _load_runtimes(args, actions, path):
    """Return {"pytorch" | "onnx": (model, function)} as score_lists takes them."""
    runtimes = {}
    if "test" in actions and args.boxes == "none":
        device = machine.choose_device(args.device)
        model = checkpoint.load_model(path.with_suffix(".pt"), device, flip_test=args.flip_test)
        runtimes["pytorch"] = model, predict.torch_predict(model, device)
    elif "test" in actions:
        # score_detected takes a Predictor and needs no function.
        runtimes["pytorch"] = Predictor(path.with_suffix(".pt"), args.device,
                                        flip_test=args.flip_test), None
    if "test_onnx" in actions:
        predictor = Predictor(path.with_suffix(".onnx"), args.device, flip_test=args.flip_test)
        runtimes["onnx"] = predictor, lambda images: predictor(
            images.permute(0, 2, 3, 1).numpy())[0]
    return runtimes


def score_lists(function: Callable, model: typing.Any, prepared: PreparedSet,
                workers: int = 0) -> tuple[dict, Results]:
    """Score all test lists of a prepared set from the annotated boxes.

    Args:
        function: predicts crops, see predict.predict_list.
        model: has `scheme` and `input_size`.
        prepared: the set.
        workers: processes of the data loader.

    Returns:
        By list, the numbers of predict.summarise: `nme`, `fr8` ... in photo pixels, `nme_crop`,
        `fr8_crop` ... in published units, and `normalised` of predict.normalised. By list,
        landmarks and NMEs.
    """
    numbers, results = {}, {}
    for name, faces, (predicted,) in predict.predict_lists(prepared.test_lists, lambda faces: [
            predict.predict_list(function, faces, prepared.margin, model.input_size,
                                 workers=workers)]):
        nme, published = predict.list_nme(predicted, faces, model.scheme, prepared.scheme)
        numbers[name] = predict.summarise(nme, published) | {
            "normalised": predict.normalised(predicted, faces, model.scheme, prepared.scheme)}
        results[name] = predicted, nme
    return numbers, results


def print_table(title: str, numbers: Mapping[str, Mapping], has_photos: bool = True) -> None:
    """Print the numbers of score_lists, one line a list.

    Args:
        title: of the table.
        numbers: by list.
        has_photos: whether the set knows the size of its photos. Without, both halves of the table
            are in units of the crops.
    """
    unit = "photo pixels" if has_photos else "crop pixels "
    print(f"{title:<12}{'':>7} | {unit}{'':<33} | published units (stretched crop)")
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


def print_normalised(numbers: Mapping[str, Mapping], scheme: Scheme) -> None:
    """Print NME by eye distances and, where the scheme asks for it, by the box's diagonal.

    Args:
        numbers: of score_lists.
        scheme: of the set.
    """
    texts = {"inter_ocular": "outer eye corners", "inter_pupil": "eye centres (mean of an eye's "
             "points)"}
    if scheme.divisor == "diagonal":
        texts["box_diagonal"] = "diagonal of the face's box"
    for name, n in numbers.items():
        cells = [f"{text} {n['normalised'][key]['nme']:.3f}" for key, text in texts.items()
                 if math.isfinite(n["normalised"][key]["nme"])]
        if cells:
            print(f"{name}: NME %, divided by {', '.join(cells)}")


def _add_breakdowns(numbers, results, scheme, prepared, yaws):
    """Add NME by visibility and by yaw to the numbers of each list, and print it."""
    for name, faces in prepared.test_lists.items():
        if faces.hidden is not None:
            numbers[name]["by_visibility"] = by_visibility(*results[name], faces, scheme,
                                                           prepared.scheme)
            print_by_visibility(name, numbers[name]["by_visibility"])
    for name, yaw in yaws.items():
        numbers[name]["by_yaw"] = by_yaw(results[name][1], yaw)
        print_by_yaw(name, numbers[name]["by_yaw"])


def by_visibility(predicted: numpy.ndarray, nme: numpy.ndarray, faces: FaceList, scheme: Scheme,
                  set_scheme: Scheme) -> dict[str, dict]:
    """Split the NME of a list by visible and hidden landmarks.

    Args:
        predicted: landmarks (N, K, 2) in crop units.
        nme: of each face (N,).
        faces: a list whose annotation says which landmarks are hidden.
        scheme: of the predicted landmarks.
        set_scheme: of the annotation.

    Returns:
        For `visible` and `hidden`: `faces` that are scored and have such landmarks, their number of
        `points`, and `nme` over these in %, None where there are none.
    """
    parts, scored = {}, numpy.isfinite(nme)
    subset = slice(None) if scheme.indices is None else list(scheme.indices)
    annotated = numpy.isfinite(faces.points).all(-1)
    for name, counted in (("visible", annotated & ~faces.hidden),
                          ("hidden", annotated & faces.hidden)):
        values, _ = predict.list_nme(predicted, faces, scheme, set_scheme, counted)
        values = values[scored & numpy.isfinite(values)]
        parts[name] = {"faces": len(values), "points": int(counted[scored][:, subset].sum()),
                       "nme": 100 * float(values.mean()) if len(values) else None}
    return parts


def print_by_visibility(name: str, parts: Mapping[str, Mapping]) -> None:
    """Print the result of by_visibility for a list in one line."""
    cells = [f"{part}: " + (f"{n['nme']:.3f} ({n['points']} points of {n['faces']} faces)"
                            if n["faces"] else "no point") for part, n in parts.items()]
    print(f"{name}: NME % of points, {', '.join(cells)}")


def by_yaw(nme: numpy.ndarray, yaw: numpy.ndarray) -> list[dict]:
    """Split the NME of a list by head yaw.

    Args:
        nme: of each face (N,), NaN where it was not found.
        yaw: |yaw| in degrees (N,).

    Returns:
        For each bin of YAWS: its limits `yaw`, its number of `faces` and their mean `nme` in %,
        None where there are none. The last bin has no upper limit.
    """
    rows = []
    for low, high in zip(YAWS, YAWS[1:]):
        inside = (yaw >= low) & ((yaw < high) | (high == YAWS[-1]))
        values = nme[inside & numpy.isfinite(nme)]
        rows.append({"yaw": [low, high], "faces": len(values),
                     "nme": 100 * float(values.mean()) if len(values) else None})
    return rows


def print_by_yaw(name: str, rows: list[dict]) -> None:
    """Print the result of by_yaw for a list in one line."""
    cells = [f"{row['yaw'][0]}-{row['yaw'][1]}: " + (
        f"{row['nme']:.3f} ({row['faces']} faces)" if row["faces"] else "no face") for row in rows]
    print(f"{name}: NME % by |yaw| in degrees: {', '.join(cells)}")


def largest_difference(first: Results, second: Results, prepared: PreparedSet,
                       input_size: int) -> float:
    """Return the largest difference of a coordinate between two predictions of all lists.

    Args:
        first: of score_lists.
        second: of another runtime.
        prepared: the set.
        input_size: side of the crop in pixels.

    Returns:
        Photo pixels, or pixels of the input where the set does not know its photos.
    """
    unit = 1 if prepared.has_photos else input_size
    return unit * float(numpy.max([numpy.abs(
        crop.to_photo(first[name][0], faces.boxes)
        - crop.to_photo(second[name][0], faces.boxes)).max()
        for name, faces in prepared.test_lists.items()]))


def write_side_files(results: Results, scheme: Scheme, prepared: PreparedSet,
                     prefix: str) -> None:
    """Write faces.csv, ced.png and worst.png; print a note on each that cannot be written.

    The arguments are those of draw_worst.
    """
    with as_note(f"{prefix}faces.csv"):
        write_faces(results, prepared, prefix)
    with as_note(f"{prefix}ced.png"):
        plots.plot_ced({name: nme for name, (_, nme) in results.items()}, f"{prefix}ced.png")
    with as_note(f"{prefix}worst.png"):
        draw_worst(results, scheme, prepared, prefix)


def draw_worst(results: Results, scheme: Scheme, prepared: PreparedSet, prefix: str) -> None:
    """Write worst.png with the 16 largest errors of the first list.

    Args:
        results: of score_lists.
        scheme: of the predicted landmarks.
        prepared: the set.
        prefix: start of the paths to write.
    """
    name, faces = next(iter(prepared.test_lists.items()))
    predicted, nme = results[name]
    size = prepared.size or 256
    crops = dataset.FaceDataset(faces, prepared.margin, size)
    truth = faces.points if scheme.base is None else faces.points[:, list(scheme.indices)]
    # argsort puts NaN, of faces without a score, last.
    worst = numpy.argsort(-nme)[:16]
    images = []
    for i in worst:
        image = draw.rings(crops[int(i)][0].numpy(), truth[i] * size - 0.5, TRUTH)
        images.append(draw.landmarks(image, predicted[i] * size - 0.5, scheme))
    captions = [f"{100 * nme[i]:.1f} % {faces.images[i].stem}" for i in worst]
    draw.save(f"{prefix}worst.png", draw.sheet(images, 4, 320, captions))


def write_faces(results: Results, prepared: PreparedSet, prefix: str) -> None:
    """Write faces.csv: list, image, photo and NME in % of every test face.

    Args:
        results: of score_lists. The NME of a face without a score is left empty.
        prepared: the set.
        prefix: start of the path to write.
    """
    with (atomic_write(f"{prefix}faces.csv") as temporary,
          open(temporary, "w", newline="", encoding="utf-8", errors="backslashreplace") as file):
        writer = csv.writer(file)
        writer.writerow(["list", "image", "photo", "nme"])
        for name, (_, nme) in results.items():
            faces = prepared.test_lists[name]
            for i, value in enumerate(nme):
                photo = faces.photos[i] if faces.photos else ""
                writer.writerow([name, faces.images[i].name, photo,
                                 "" if numpy.isnan(value) else f"{100 * value:.4f}"])


def _output_prefix(weights, detector, flip_test):
    """Return the start of the paths of plots and tables, which lie beside the weights.

    Weights at the top of weights/ share their folder with others, so their name is part of it.
    """
    names = ["" if weights.stem == "best" else f"{weights.stem}-",
             "" if detector == "none" else "boxes-", "flip-" if flip_test else ""]
    return f"{weights.parent.as_posix()}/{''.join(names)}"


def _without_nan(value):
    """Return a report with None for numbers that are not finite, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _without_nan(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
