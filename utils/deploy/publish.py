"""Publish an experiment's best weights: a small .pt, its .onnx and a model card.

The .pt holds the weights in 16 or 8 bits and none of the training state or local paths; the .onnx
is exported from it, so that both give the same numbers. The card (.md) has the commands that
trained the model, including those of the checkpoints it started from, and its scores.
"""
from __future__ import annotations

import argparse
import json
import pathlib
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence

from utils import checkpoint, experiment, packing, provenance
from utils.args import SETTINGS, load_args, training_settings, upgrade
from utils.data.dataset import PreparedSet
from utils.data.sets import set_folder
from utils.deploy import export
from utils.errors import UserError, run
from utils.evaluation import score
from utils.files import write_text
from utils.training import stages
from utils.training.recipe import last_stage, read_recipe

# Settings that name a data set.
SET_SETTINGS = ("data_dir", "unlabelled_dir")


def publish(source: pathlib.Path | str, target: pathlib.Path | str, with_onnx: bool = True,
            other: pathlib.Path | str | None = None, share: float = 0.0, sets: Iterable[str] = (),
            flip_test: bool = False, bits: int = 16) -> None:
    """Write a checkpoint as a published .pt, and its .onnx beside it.

    Args:
        source: the checkpoint.
        target: path of the .pt to write.
        with_onnx: whether to export the .onnx.
        other: a checkpoint that `source` was trained on from. The published weights are a mean of
            both, which keeps more of what the first one had learnt (Wortsman et al., CVPR 2022).
        share: of `other` in the mean, 0 to 1.
        sets: names of training sets that the checkpoint does not record.
        flip_test: the model averages with the mirrored face, in twice the time.
        bits: of a stored number, see packing.pack.

    Raises:
        UserError: where a file cannot be read or written, or `other` is another network.
    """
    target = pathlib.Path(target)
    state = checkpoint.read(source)
    if other is not None:
        # Thresholds that were fitted to one network are invalid for the mean of two.
        state = {**state, "eyes": None,
                 "weights": _mean_weights(state, checkpoint.read(other), share)}
    args = _public_settings(state["args"])
    weights = packing.pack(checkpoint.weights_of(state), bits)
    public = {k: state.get(k) for k in ("format", "scheme", "crop", "neighbour_face", "epoch",
                                        "val_nme", "eyes")}
    sets = dict.fromkeys([*provenance.recorded_sets(state), *sets])
    flip_test = flip_test or state.get("flip_test", False)
    checkpoint.save({**public, "sets": list(sets), "flip_test": flip_test, "args": args,
                     "weights": weights}, target)
    if with_onnx:
        export.export_onnx(checkpoint.load_model(target), target.with_suffix(".onnx"))


def _mean_weights(state, other, share):
    """Return the mean of two checkpoints' weights, without fitted heads."""
    weights, others = (checkpoint.without_heads(checkpoint.weights_of(s), *checkpoint.FITTED_HEADS)
                       for s in (state, other))
    if {k: v.shape for k, v in weights.items()} != {k: v.shape for k, v in others.items()}:
        raise UserError("weights of another network have no mean; give those it was trained from")
    return {k: (1 - share) * v.float() + share * others[k].float() if v.is_floating_point() else v
            for k, v in weights.items()}


def lineage(source: pathlib.Path | str) -> list[pathlib.Path]:
    """Return the checkpoints that must be trained for one, in the order of training.

    These are the checkpoint that it started from, with its own lineage, its teachers with theirs,
    and itself last. A recipe is complete: it names the recipes of its teachers.
    """
    args, found = checkpoint.read(source)["args"], []
    if _has_recipe(args):
        return [pathlib.Path(source)]
    start = pathlib.Path(args.get("pretrained", "none"))
    for path in (start, *provenance.teacher_paths(args.get("teacher", "none"))):
        if path.is_file():
            found += [before for before in lineage(path) if before not in found]
    return [*found, pathlib.Path(source)]


def training_commands(sources: Iterable[pathlib.Path]) -> tuple[list[str], float]:
    """Return the commands that train a lineage, and the seconds that they took.

    Args:
        sources: of lineage. The commands of published weights are those of their cards.

    Raises:
        UserError: where published weights have no card.
    """
    commands, seconds = [], 0.0
    for path in sources:
        if path.stem == "best":
            commands.append(training_command(path))
            seconds += experiment.read_epochs(path.parent)[-1]["seconds"]
            continue
        text = _read_card(path)
        commands += [line for line in text.splitlines() if line.startswith("bash main.sh")
                     and line not in commands]
        seconds += 60 * float(re.search(r"training time: ([\d.]+) minutes", text)[1])
    return commands, seconds


def sets_in(commands: Iterable[str]) -> list[str]:
    """Return the names of the data sets in training commands."""
    words = [word for command in commands for word in shlex.split(command)]
    return [name for flag, folder in zip(words, words[1:])
            if flag in ("--data-dir", "--unlabelled-dir") for name in folder.split("+")]


def _read_card(path):
    """Return the text of the card beside published weights."""
    card = path.with_suffix(".md")
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    if not (re.search(r"training time: [\d.]+ minutes", text)
            and re.search("--exp |--recipe ", text)):
        raise UserError(f"{card}: is not the model card of {path.name} with its commands")
    return text


def training_command(source: pathlib.Path) -> str:
    """Return the command that trains a checkpoint, with the settings that differ from args.yaml."""
    args = _public_settings(checkpoint.read(source)["args"])
    defaults = training_settings(load_args())
    words = ["bash main.sh 1 --train --exp", shlex.quote(source.parent.name)]
    if _has_recipe(args):
        # What the recipe's last stage has was not typed.
        recipe = read_recipe(args["recipe"]).apply(argparse.Namespace(**defaults), ())
        defaults = {**vars(last_stage(recipe)), "recipe": args["recipe"]}
        words = ["bash main.sh 1 --train --recipe", shlex.quote(args["recipe"])]
    typed = {k: v for k, v in args.items() if v != defaults[k]
             and (args["gssl"] or not k.startswith("gssl_"))}
    flags = [f"--{k.replace('_', '-')}" + ("" if v is True else f" {shlex.quote(str(v))}")
             for k, v in typed.items()]
    return " ".join([*words, *flags])


def _has_recipe(args):
    return args.get("recipe", "none") != "none"


def _public_settings(args):
    """Return the settings of a training without those of its machine, and without local paths.

    A set prepared as FOLDER-SIZE becomes FOLDER, and weights become weights/EXP/best.pt.
    """
    args = {k: v for k, v in upgrade(args).items() if not SETTINGS[k].machine}
    sets = {setting: provenance.set_name(args[setting], args) for setting in SET_SETTINGS}
    teachers = provenance.teacher_paths(args.get("teacher", "none"))
    return {**args, **sets, "pretrained": _weights_name(args.get("pretrained", "none")),
            "teacher": ",".join(map(_weights_name, teachers)) or "none"}


def _weights_name(path):
    """Return weights/EXP/best.pt for a path of weights; `none` and `timm` stay as they are.

    The experiment of published weights is the last one in their card; those of a recipe keep their
    name.
    """
    if pathlib.Path(path).is_file() and pathlib.Path(path).stem != "best":
        names = re.findall(r"--exp (\S+)", _read_card(pathlib.Path(path)))
        return f"weights/{names[-1]}/best.pt" if names else f"weights/{pathlib.Path(path).name}"
    parts = pathlib.Path(path).parts[-2:]
    if len(parts) == 1 or parts[0] == "weights":
        return "/".join(parts)
    return "/".join(("weights", *parts))


def model_card(sources: Sequence[pathlib.Path], report: Mapping, title: str,
               commands: Sequence[str], seconds: float, notes: Iterable[str] = ()) -> str:
    """Return a model card as Markdown.

    Args:
        sources: the lineage of a checkpoint.
        report: of evaluation.score.run_test.
        title: heading of the card.
        commands: of training_commands.
        seconds: of training_commands.
        notes: more lines, such as on averaged weights.
    """
    state = checkpoint.read(sources[-1])
    args, scheme = _public_settings(state["args"]), state["scheme"]
    start = {"none": "random weights", "timm": "timm's ImageNet weights of {backbone}"}
    first = _public_settings(checkpoint.read(sources[0])["args"])
    start = start.get(first["pretrained"], first["pretrained"]).format(**first)
    if sources[0].stem != "best":
        start = re.search(r"trained from (.*), by", _read_card(sources[0]))[1]
    settings = argparse.Namespace(**args)
    if _has_recipe(args):
        settings = read_recipe(args["recipe"]).apply(settings, ())
    last = stages.plan(settings)[-1]
    unlabelled = f", and {args['unlabelled_dir']} without landmarks" if args["gssl"] else ""
    sets = dict.fromkeys([*provenance.recorded_sets(state), *sets_in(commands)])
    lines = [
        f"# {title}", "",
        f"* {len(scheme['flip'])} points ({scheme['name']}), {args['backbone']}, {args['head']} "
        f"head, stride {args['stride']}, input {args['input_size']} px, crop "
        f"{state['crop']['rule']} x {state['crop']['scale']}",
        f"* data: {args['data_dir']}, training list{unlabelled}; epoch {state['epoch']} of "
        f"{last.first_epoch + last.epochs} was best on the validation list (NME "
        f"{state['val_nme']:.3f} %); seed {args['seed']}",
        f"* trained from {start}, by the "
        + ("command" if _has_recipe(args) else "commands") + " below",
        f"* training time: {seconds / 60:.0f} minutes in all",
        f"* licence: {export.licence(sets)}",
        *[f"* {what}, fitted after training with --{flag}" for part, flag, what in (
            ("shape", "fit-shape", "a shape head"),
            ("lids", "fit-eyes", "a lid head and eye thresholds"))
          if any(name.startswith(f"{part}.") for name in checkpoint.weights_of(state))],
        *[f"* {note}" for note in notes], "", "```", *commands, "```", "",
        "| list | faces | NME % | FR8 % | AUC8 | FR10 % | AUC10 | NME % published units |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |"]
    for name, n in report["pytorch"].items():
        lines.append(f"| {name} | {n['faces']} | {n['nme']:.3f} | {n['fr8']:.2f} | "
                     f"{n['auc8']:.4f} | {n['fr10']:.2f} | {n['auc10']:.4f} | "
                     f"{n['nme_crop']:.3f} |")
    if "onnx" in report:
        difference = max(abs(report["onnx"][k]["nme"] - n["nme"])
                         for k, n in report["pytorch"].items())
        lines += ["", f"The ONNX file differs by {difference:.4f} NME at most, "
                      f"{report['max_abs_diff_px']:.4f} px in a coordinate."]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Publish an experiment under a name in weights/, and score it for its card."""
    parser = argparse.ArgumentParser(prog="python -m utils.deploy.publish", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("exp", help="the experiment whose best.pt is published")
    parser.add_argument("name", help="its name in weights/, such as fast")
    parser.add_argument("--data-dir", help="set to score on [that of the training]")
    parser.add_argument("--no-onnx", action="store_true", help="publish the .pt only")
    parser.add_argument("--flip-test", action="store_true",
                        help="publish a model that averages with the mirrored face")
    parser.add_argument("--average", metavar="PT",
                        help="weights that it was trained on from, to average with")
    parser.add_argument("--share", type=float, default=0.3,
                        help="of --average in the mean, 0 to 1 [0.3]")
    parser.add_argument("--bits", type=int, choices=(16, 8), default=16,
                        help="of a stored number; 8: of those of the backbone's kernels [16]")
    options = parser.parse_args(argv)
    if not 0 <= options.share <= 1:
        raise UserError(f"--share must be 0 to 1, found {options.share}")
    source = experiment.find_weights(options.exp)
    target = experiment.WEIGHTS / f"{options.name}.pt"
    if target == source:
        raise UserError(f"{target}: cannot be published under its own name; give another NAME")
    args = checkpoint.read(source)["args"]
    test_args = load_args({"exp": str(target), "report": str(target.with_suffix(".json")),
                           "data_dir": options.data_dir or args["data_dir"],
                           "input_size": args["input_size"]})
    # Read the set and the cards first: a missing set would leave weights without a card, and
    # publish() may overwrite weights of the lineage.
    PreparedSet(set_folder(test_args))
    sources, notes = lineage(source), []
    commands, seconds = training_commands(sources)
    if options.average is not None:
        notes.append(f"mean of the last command's weights and {options.share:g} of "
                     f"{_weights_name(options.average)} (--average)")
    if options.flip_test:
        notes.append("averages with the mirrored face (--flip-test), which is in its GMACs and ms")
    if options.bits == 8:
        notes.append("the backbone's kernels are stored in 8 bits (--bits 8)")
    publish(source, target, not options.no_onnx, options.average, options.share,
            sets_in(commands), options.flip_test, options.bits)
    score.run_test(test_args, {"test"} if options.no_onnx else {"test", "test_onnx"})
    report = pathlib.Path(test_args.report)
    write_text(target.with_suffix(".md"), model_card(
        sources, json.loads(report.read_text(encoding="utf-8")), options.name, commands, seconds,
        notes))
    report.unlink()
    print(f"{target}: {target.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    run(main)
