"""args.yaml and the command line: one set of names, read once, checked once."""
import argparse
import dataclasses
import difflib
import pathlib
import re
import typing

import yaml

from utils.errors import UserError
from utils.files import atomic_write

ROOT = pathlib.Path(__file__).resolve().parent.parent
DEFAULTS = ROOT / "args.yaml"
# Types are kept here and not read off args.yaml, so that a mistake in that file is found.
TYPES = {
    str: "data_dir data scheme mean_face cache backbone activation head merge pretrained "
         "offset_loss precision boxes report exp device unlabelled_dir gssl_preset "
         "teacher names sync_bn",
    int: "workers num_nb stride input_size epochs batch_size effective_batch seed detect_every "
         "gssl_rounds gssl_epochs dump_pseudo opset",
    float: "cls reg eye_weight lr min_lr warmup_epochs weight_decay clip ema save_minutes rotation "
           "scaling shift aspect flip colour grey blur shut occlusion occlusion_size "
           "min_confidence filter_min_cutoff filter_beta gssl_keep teacher_share",
    bool: "flip_test by_pose gssl tensorboard hidden deterministic compile",
}
KINDS = {name: kind for kind, names in TYPES.items() for name in names.split()}
CHOICES = {
    "data": ("none", "samples"), "cache": ("auto", "none", "ram", "device"),
    "activation": ("prelu", "relu"),
    "head": ("pip", "regression"), "merge": ("plain", "padded", "confidence"),
    "stride": (16, 32), "offset_loss": ("l1", "smooth_l1", "wing"),
    "precision": ("auto", "fp32", "bf16", "fp16"), "gssl_preset": ("default", "paper"),
    "sync_bn": ("auto", "always", "never"),
}
# Least and largest value of numbers; everything else that is a number must not be negative.
LEAST = {"input_size": 32, "epochs": 1, "batch_size": 1, "effective_batch": 1, "save_minutes": 0.01,
         "detect_every": 1, "gssl_rounds": 1, "gssl_keep": 0.01, "opset": 11}
LARGEST = {"flip": 1, "colour": 1, "grey": 1, "blur": 1, "occlusion": 1, "occlusion_size": 1,
           "shut": 1, "ema": 1, "min_confidence": 1, "shift": 1, "rotation": 180, "gssl_keep": 1,
           "teacher_share": 1, "opset": 20, "seed": 2 ** 63 - 1}
ACTIONS = {
    "train": "train, choose the best epoch on the validation list",
    "test": "score the test lists with PyTorch",
    "export": "write the .onnx beside the weights",
    "int8": "export, and a .int8.onnx calibrated on training crops of --data-dir or --data",
    "raw": "export, and a .raw.onnx of the maps alone for OpenCV, ncnn, TensorRT and their like",
    "test_onnx": "score the test lists with ONNX Runtime, exporting first if need be",
    "fit_shape": "fit what a .pt's landmarks together say of each one's error, on --data-dir",
    "fit_eyes": "find a model's limits of eyes and faces on --data-dir with closed/ and open/",
    "test_eyes": "score shut and open eyes on such a folder",
    "compare": "print the table of all experiments",
    "resume": "train on with --exp from its last.pt and its own args.yaml; flags typed now win",
}
CHANGING = {"fit_shape", "fit_eyes", "export"}  # Those that write the files of a trained model.


def read_help(path=DEFAULTS):
    """The comments of args.yaml: group title to setting names, and setting name to its sentence."""
    groups, helps, title = {}, {}, ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if re.match(r"# \w[^:]*: ", line):
            title = line[2:]
        setting = re.match(r"(\w+): *[^#]*# (.*)", line)
        if setting and setting[1] in KINDS:
            groups.setdefault(title, []).append(setting[1])
            helps[setting[1]] = setting[2]
    return groups, helps


class UniqueLoader(yaml.SafeLoader):
    """yaml.SafeLoader that refuses a key which is there twice; else the last would win unseen."""

    def construct_mapping(self, node, deep=False):
        """The dict of a mapping."""
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"key {key} is there twice")
        return super().construct_mapping(node, deep)


class Parser(argparse.ArgumentParser):
    """argparse whose mistakes are a UserError with the nearest known flag."""

    def error(self, message):
        unknown = re.search(r"unrecognized arguments: (\S+)", message)
        if unknown:
            flag = unknown[1].split("=")[0]
            near = difflib.get_close_matches(flag, self._option_string_actions, 1, 0.5)
            message = f"unknown flag {flag}" + (f"; nearest: {near[0]}" if near else "")
        raise UserError(f"{message} (see {self.prog} --help)")


def build_parser(description, prog=None):
    """The argument parser with one flag a setting, grouped and explained as in args.yaml."""
    groups, helps = read_help()
    parser = Parser(prog=prog, description=description, allow_abbrev=False)
    for title, names in groups.items():
        group = parser.add_argument_group(*title.split(": ", 1))
        for name in names:
            # A switch may stand alone, --gssl is --gssl true; --exp means the newest experiment.
            alone = {"nargs": "?", "const": "true"} if KINDS[name] is bool else (
                {"nargs": "?", "const": ""} if name == "exp" else {})
            group.add_argument(_flag(name), metavar=KINDS[name].__name__.upper(), **alone,
                               default=argparse.SUPPRESS, help=helps[name].replace("%", "%%"))
    return parser


def _flag(name):
    return "--" + name.replace("_", "-")


def load_args(given=(), path=DEFAULTS):
    """Resolved args as a namespace.

    given: name to value (strings from the command line, or typed values from a checkpoint), which
    win over the file at path, which wins over the shipped args.yaml. Raises UserError for unknown
    names, wrong types and values out of range.
    """
    values = _read_file(DEFAULTS)
    missing = [name for name in KINDS if name not in values]
    if missing:
        raise UserError(f"{DEFAULTS.name}: missing key {missing[0]}; git has the shipped file")
    if pathlib.Path(path).resolve() != DEFAULTS:
        values.update(_read_file(pathlib.Path(path)))
    values.update({name: check(name, value, _flag(name)) for name, value in dict(given).items()})
    return argparse.Namespace(**values)


def _read_file(path):
    try:
        found = yaml.load(path.read_text(encoding="utf-8"), UniqueLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: expected lines of the form key: value")
    for name, value in found.items():
        # 007 would be the experiment 7, and `on` the experiment True.
        if KINDS.get(name) is str and isinstance(value, (bool, int, float)):
            raise UserError(f"{path}: {name}: {value!r} is no text to YAML; put it into quotes")
    return {name: check(name, value, f"{path}: {name}") for name, value in found.items()}


def check(name, value, where):
    """Value in the type and range of setting `name`. Raises UserError that begins with where."""
    if name not in KINDS:
        near = difflib.get_close_matches(str(name), KINDS, 1, 0.5)
        raise UserError(f"{where}: unknown key" + (f"; nearest: {near[0]}" if near else ""))
    value = _convert(value, KINDS[name], where)
    if name in CHOICES and value not in CHOICES[name]:
        raise UserError(f"{where}: must be one of {', '.join(map(str, CHOICES[name]))}, "
                        f"found {value}")
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        least, largest = LEAST.get(name, 0), LARGEST.get(name, float("inf"))
        if not least <= value <= largest or value == float("inf"):
            raise UserError(f"{where}: must be "
                            + (f"{least} to {largest}" if largest < float("inf")
                               else f"at least {least}") + f", found {value}")
    return value


def _convert(value, kind: type, where) -> typing.Any:
    if kind is str:
        if value is None:
            return "none"
        if isinstance(value, (list, tuple)):
            return ",".join(map(str, value))
        return str(value)
    if kind is bool:
        if isinstance(value, bool):
            return value
        if str(value).lower() in ("true", "false"):
            return str(value).lower() == "true"
    elif not isinstance(value, bool):
        try:
            if kind is int and re.fullmatch(r"\s*[+-]?\d+\s*", str(value)):
                return int(value)  # A float of a large one is another one.
            number = float(value)
            if kind is float and number == number:
                return number
            if kind is int and number == int(number):
                return int(number)
        except (TypeError, ValueError, OverflowError):
            pass
    raise UserError(f"{where}: expected {kind.__name__}, found {value!r}")


def save_args(args, path):
    """Write the resolved args as YAML, in the order and groups of args.yaml."""
    groups, _ = read_help()
    lines = []
    for title, names in groups.items():
        lines += [f"# {title}", *(yaml.safe_dump({n: getattr(args, n)}).strip() for n in names), ""]
    with atomic_write(path) as temporary:
        temporary.write_text("\n".join(lines), encoding="utf-8")


@dataclasses.dataclass(frozen=True)
class Request:
    """A parsed command line: resolved args, the actions asked for, and the settings typed."""
    args: argparse.Namespace
    actions: frozenset
    typed: dict


def parse(argv=None):
    """main.py's command line to a Request. Raises UserError; --help exits."""
    parser = build_parser("Train, test and export PIPNet facial landmark models.", "main.py")
    group = parser.add_argument_group("Actions", "what to do; several may be given")
    for name, sentence in ACTIONS.items():
        group.add_argument(_flag(name), action="store_true", help=sentence)
    group.add_argument("--args", default=str(DEFAULTS), metavar="FILE",
                       help="another args.yaml, whose keys count as typed")
    found = vars(parser.parse_args(argv))
    path = found.pop("args")
    actions = frozenset(name for name in ACTIONS if found.pop(name))
    if actions & {"int8", "raw"}:
        actions |= {"export"}
    if "data_dir" in found and found.get("data", "none") != "none":
        raise UserError("--data-dir and --data both say what to train on; give one of them")
    if "data_dir" in found:
        found.setdefault("data", "none")
    if not actions and "dump_pseudo" not in found:
        raise UserError("nothing to do: give --train, --test, --export, --test-onnx, --fit-shape, "
                        "--fit-eyes, --test-eyes or --compare (see main.py --help)")
    if "resume" in actions:
        actions |= {"train"}
    if {"train", "raw"} <= actions and found.get("head") == "regression":
        raise UserError("--raw: a regression has no maps; its .onnx holds no decoding and is all "
                        "it needs")
    if pathlib.Path(path).resolve() != DEFAULTS:
        # A file that is named is as good as typed: it wins over what an experiment was begun with.
        found = {**_read_file(pathlib.Path(path)), **found}
    args = load_args(found)
    changing = sorted(actions & CHANGING)
    if changing and "train" not in actions and args.exp == "none":
        raise UserError(f"{_flag(changing[0])} writes a model's files: say which model with --exp "
                        f"NAME or --exp PATH.pt")
    return Request(args, actions, found)
