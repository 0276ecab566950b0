"""An experiment's best weights as files to ship: a small .pt, .onnx of the same numbers, card."""
import argparse
import functools
import json
import pathlib
import re
import shlex

import yaml

from utils import checkpoint, experiment
from utils.args import DEFAULTS, KINDS, load_args
from utils.data.dataset import PreparedSet
from utils.data.sets import set_folder
from utils.deploy import export
from utils.errors import UserError, run
from utils.evaluation import score
from utils.training import gssl, launch

# Settings of where and how a run was started, which say nothing of the model.
PLACES = (*launch.OF_ONE_COMMAND, "exp", "device", "workers", "cache", "save_minutes",
          "detect_every", "min_confidence", "filter_min_cutoff", "filter_beta", "tensorboard",
          "compile")
# Those that name sets of faces.
SET_ARGS = ("data_dir", "unlabelled_dir")


def publish(source, target, with_onnx=True, other=None, share=0.0, sets=(), flip_test=False,
            bits=16):
    """Write the weights of checkpoint `source` in 16 or 8 bits to `target`, its .onnx beside it.

    sets: names of those that it was trained on which it does not say itself. flip_test: it is to
    average with the mirrored face, in twice the time.
    other: a checkpoint that it was trained on from, of which the published weights hold `share`: a
    mean of both keeps more of what the first one knew (Wortsman et al., CVPR 2022). The ONNX file
    comes from the rounded weights, so both score the same. Paths of the machine that trained are
    cut to their last part. Raises UserError.
    """
    state = checkpoint.read(source)
    if other is not None:
        # What was fitted to one network's features says nothing of the mean of two.
        state = {**state, "eyes": None,
                 "weights": _mean_weights(state, checkpoint.read(other), share)}
    args = {**_named(state["args"]), **dict.fromkeys(("exp", "report", "boxes"), "none")}
    weights = checkpoint.weights_of(state)
    weights = checkpoint.in_bytes(weights) if bits == 8 else {
        name: checkpoint.halved(value) for name, value in weights.items()}
    shown = {k: state.get(k) for k in ("format", "scheme", "crop", "neighbour_face", "epoch",
                                       "val_nme", "eyes")}
    sets = dict.fromkeys([*checkpoint.sets_of(state), *sets])
    flip_test = flip_test or state.get("flip_test", False)
    checkpoint.save({**shown, "sets": list(sets), "flip_test": flip_test, "args": args,
                     "weights": weights}, target)
    if with_onnx:
        export.export(checkpoint.load_model(target), target.with_suffix(".onnx"))


def _mean_weights(state, other, share):
    weights, others = (checkpoint.without(checkpoint.weights_of(s), *checkpoint.FITTED)
                       for s in (state, other))
    if {k: v.shape for k, v in weights.items()} != {k: v.shape for k, v in others.items()}:
        raise UserError("weights of another network have no mean; give those it was trained from")
    return {k: (1 - share) * v.float() + share * others[k].float() if v.is_floating_point() else v
            for k, v in weights.items()}


def chain(source):
    """The checkpoints to be trained for one, in this order: those that it began with, from the
    first one on, then its teachers', and itself last.
    """
    args, found = checkpoint.read(source)["args"], []
    begun = pathlib.Path(args.get("pretrained", "none"))
    for path in (begun, *checkpoint.teachers(args.get("teacher", "none"))):
        if path.is_file():
            found += [before for before in chain(path) if before not in found]
    return [*found, pathlib.Path(source)]


def recipe(sources):
    """(commands, seconds) that train the checkpoints of a chain; shipped ones as their cards say.

    Raises UserError where a shipped one has no card.
    """
    commands, seconds = [], 0.0
    for path in sources:
        if path.stem == "best":
            commands.append(command(path))
            seconds += experiment.read_epochs(path.parent)[-1]["seconds"]
            continue
        text = _read_card(path)
        commands += [line for line in text.splitlines() if line.startswith("bash main.sh")
                     and line not in commands]
        seconds += 60 * float(re.search(r"training time: ([\d.]+) minutes", text)[1])
    return commands, seconds


def sets_named(commands):
    """Names of the sets in a recipe's commands."""
    return [name for folder in re.findall(r"--(?:data|unlabelled)-dir (\S+)", "\n".join(commands))
            for name in folder.split("+")]


def _read_card(path):
    """The card beside shipped weights. Raises UserError."""
    card = path.with_suffix(".md")
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    if not re.search(r"training time: [\d.]+ minutes", text) or "--exp " not in text:
        raise UserError(f"{card}: is not the card of {path.name}, which says how it was trained")
    return text


def command(source):
    """The command that trains a checkpoint: what differs from the shipped args.yaml."""
    args = _named(checkpoint.read(source)["args"])
    shipped = yaml.safe_load(DEFAULTS.read_text(encoding="utf-8"))
    typed = {k: v for k, v in args.items() if k in KINDS and k not in PLACES and v != shipped[k]
             and (args["gssl"] or not k.startswith("gssl_"))}
    flags = [f"--{k.replace('_', '-')}" + ("" if v is True else f" {shlex.quote(str(v))}")
             for k, v in typed.items()]
    return " ".join(["bash main.sh 1 --train --exp", source.parent.name, *flags])


def _named(args):
    """Settings with sets and weights named as the repository's user would, without the machine's
    paths: FOLDER of a set prepared as FOLDER-SIZE, weights/EXP/best.pt.
    """
    sets = {setting: checkpoint.set_name(args[setting], args) for setting in SET_ARGS}
    teachers = checkpoint.teachers(args.get("teacher", "none"))
    return {**args, **sets, "pretrained": _weights_name(args.get("pretrained", "none")),
            "teacher": ",".join(map(_weights_name, teachers)) or "none"}


def _weights_name(path):
    """weights/EXP/best.pt of any path that ends so, and of shipped weights, by their card; `none`
    and `timm` as they are.
    """
    if pathlib.Path(path).is_file() and pathlib.Path(path).stem != "best":
        names = re.findall(r"--exp (\S+)", _read_card(pathlib.Path(path)))
        return f"weights/{names[-1]}/best.pt"
    parts = pathlib.Path(path).parts[-2:]
    return "/".join(("weights", *parts)) if len(parts) == 2 else parts[0]


def card(sources, report, title, recipe, notes=()):
    """A model card as Markdown.

    sources: the chain of a checkpoint. report: of `main.py --test --report`. recipe: what recipe()
    gives for it. notes: more lines, such as on weights averaged with others.
    """
    commands, seconds = recipe
    state = checkpoint.read(sources[-1])
    args, scheme = _named(state["args"]), state["scheme"]
    begun = {"none": "random weights", "timm": "timm's ImageNet weights of {backbone}"}
    first = _named(checkpoint.read(sources[0])["args"])
    begun = begun.get(first["pretrained"], first["pretrained"]).format(**first)
    if sources[0].stem != "best":
        begun = re.search(r"trained from (.*), by", _read_card(sources[0]))[1]
    last = gssl.plan(argparse.Namespace(**args))[-1]
    more = f", and {args['unlabelled_dir']} without landmarks" if args["gssl"] else ""
    sets = dict.fromkeys([*checkpoint.sets_of(state), *sets_named(commands)])
    lines = [
        f"# {title}", "",
        f"* {len(scheme['flip'])} points ({scheme['name']}), {args['backbone']}, {args['head']} "
        f"head, stride {args['stride']}, input {args['input_size']} px, crop "
        f"{state['crop']['rule']} x {state['crop']['scale']}",
        f"* data: {args['data_dir']}, training list{more}; epoch {state['epoch']} of "
        f"{last.first + last.epochs} was best on the validation list (NME "
        f"{state['val_nme']:.3f} %); seed {args['seed']}",
        f"* trained from {begun}, by the commands below",
        f"* training time: {seconds / 60:.0f} minutes in all",
        f"* licence: {export.licence(sets)}",
        *[f"* {what}, fitted after them with --{flag}" for part, flag, what in (
            ("shape", "fit-shape", "a shape head"), ("lids", "fit-eyes", "a lid head and limits"))
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


def main(argv=None):
    """Python -m utils.deploy.publish EXP NAME --data-dir SET"""
    parser = argparse.ArgumentParser(prog="python -m utils.deploy.publish", description=__doc__)
    parser.add_argument("exp", help="the experiment whose best.pt is shipped")
    parser.add_argument("name", help="its name in weights/, such as fast")
    parser.add_argument("--data-dir", help="set to score on [that of the training]")
    parser.add_argument("--no-onnx", action="store_true", help="ship the .pt alone")
    parser.add_argument("--flip-test", action="store_true",
                        help="ship a model that averages with the mirrored face")
    parser.add_argument("--average", metavar="PT",
                        help="weights it was trained on from, of which to keep a share")
    parser.add_argument("--share", type=float, default=0.3, help="that share, 0 to 1 [0.3]")
    parser.add_argument("--bits", type=int, choices=(16, 8), default=16,
                        help="of a stored number; 8: of those of the backbone's kernels [16]")
    given = parser.parse_args(argv)
    if not 0 <= given.share <= 1:
        raise UserError(f"--share must be 0 to 1, found {given.share}")
    source = experiment.find_weights(given.exp)
    target = experiment.WEIGHTS / f"{given.name}.pt"
    if target == source:
        raise UserError(f"{target}: is what it would be made from")
    # Before anything is overwritten: shipped weights that it began with may be the target, and a
    # set that is not there leaves no card.
    args = checkpoint.read(source)["args"]
    data = {"data": "none", "data_dir": given.data_dir} if given.data_dir else {
        name: args[name] for name in ("data", "data_dir")}
    scored = load_args({"exp": str(target), "report": str(target.with_suffix(".json")), **data,
                        "input_size": args["input_size"]})
    PreparedSet(set_folder(scored))
    sources = chain(source)
    how, notes = recipe(sources), []
    if given.average is not None:
        notes.append(f"mean of the last command's weights and {given.share:g} of "
                     f"{_weights_name(given.average)} (--average)")
    if given.flip_test:
        notes.append("averages with the mirrored face (--flip-test), which is in its GMACs and ms")
    if given.bits == 8:
        notes.append("the backbone's kernels are stored in 8 bits (--bits 8)")
    text = functools.partial(card, sources, title=given.name, recipe=how, notes=notes)
    publish(source, target, not given.no_onnx, given.average, given.share, sets_named(how[0]),
            given.flip_test, given.bits)
    report = pathlib.Path(scored.report)
    actions = {"test"} if given.no_onnx else {"test", "test_onnx"}
    score.test(scored, actions)
    text = text(report=json.loads(report.read_text(encoding="utf-8")))
    target.with_suffix(".md").write_text(text, encoding="utf-8")
    report.unlink()
    print(f"{target}: {target.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    run(main)
