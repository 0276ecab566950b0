"""Settings and command line of main.py: args.yaml, flags, and one table of what each may hold.

args.yaml has the name, default and one-line help of each setting; SETTINGS has its type, limits
and scope. The parser, what a checkpoint stores, what --resume refuses and what a model card lists
follow from these two. To add a setting, edit both (a probability in the group Augmentation:
args.yaml alone). OPTIONS are the flags of a single command, which no experiment keeps.
"""
import argparse
import dataclasses
import difflib
import math
import pathlib
import re
import typing

import yaml

from utils.errors import UserError, shell_word
from utils.files import atomic_write, read_text

ROOT = pathlib.Path(__file__).resolve().parent.parent
DEFAULTS = ROOT / "args.yaml"
SAMPLES = "samples"  # As data_dir: faces that the repository draws.


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a setting or option may hold.

    Attributes:
        kind: str, int, float or bool. A wrong value in args.yaml is found because the type is not
            read off that file.
        choices: the only allowed values, if any.
        least: smallest allowed number.
        most: largest allowed number; infinite values are never allowed.
        fixed: --resume cannot change it, because the result would be another training.
        machine: where and how a training runs, not what is trained; checkpoints do not store it.
        default: of an option; args.yaml has that of a setting.
        help: of an option, as above.
    """
    kind: type = float
    choices: tuple = ()
    least: float = 0
    most: float = math.inf
    fixed: bool = False
    machine: bool = False
    default: typing.Any = None
    help: str = ""


PROBABILITY = Setting(most=1)
# data_dir is not fixed: a training may go on where the same faces lie in another folder.
SETTINGS = {
    "data_dir": Setting(str),
    "scheme": Setting(str, fixed=True),
    "mean_face": Setting(str, fixed=True),
    "cache": Setting(str, ("auto", "none", "ram", "device"), machine=True),
    "workers": Setting(int, machine=True),

    "backbone": Setting(str, fixed=True),
    "activation": Setting(str, ("prelu", "relu"), fixed=True),
    "head": Setting(str, ("pip", "regression"), fixed=True),
    "num_nb": Setting(int, fixed=True),
    "merge": Setting(str, ("plain", "padded", "confidence")),
    "stride": Setting(int, (16, 32), fixed=True),
    "input_size": Setting(int, least=32, fixed=True),
    "pretrained": Setting(str, fixed=True),

    "cls": Setting(),
    "reg": Setting(),
    "offset_loss": Setting(str, ("l1", "smooth_l1", "wing")),
    "eye_weight": Setting(),
    "hidden": Setting(bool),
    "teacher": Setting(str, fixed=True),
    "teacher_share": Setting(most=1, fixed=True),

    "epochs": Setting(int, least=1, fixed=True),
    "batch_size": Setting(int, least=1),
    "effective_batch": Setting(int, least=1, fixed=True),
    "lr": Setting(),
    "min_lr": Setting(),
    "warmup_epochs": Setting(),
    "weight_decay": Setting(),
    "clip": Setting(),
    "ema": Setting(most=1, fixed=True),
    "precision": Setting(str, ("auto", "fp32", "bf16", "fp16")),
    "sync_bn": Setting(str, ("auto", "always", "never")),
    "deterministic": Setting(bool),
    "compile": Setting(bool, machine=True),
    "save_minutes": Setting(least=0.01, machine=True),

    "gssl": Setting(bool, fixed=True),
    "unlabelled_dir": Setting(str, fixed=True),
    "gssl_preset": Setting(str, ("default", "paper"), fixed=True),
    "gssl_rounds": Setting(int, least=1, fixed=True),
    "gssl_epochs": Setting(int, fixed=True),
    "gssl_keep": Setting(least=0.01, most=1, fixed=True),

    "rotation": Setting(most=180),
    "scaling": Setting(),
    "aspect": Setting(),

    "exp": Setting(str, machine=True),
    "device": Setting(str, machine=True),
    "tensorboard": Setting(bool, machine=True),
    "seed": Setting(int, most=2 ** 63 - 1, fixed=True),
    "recipe": Setting(str, fixed=True),
}
OPTIONS = {
    "Options of the test": {
        "flip_test": Setting(bool, default=False, help="average with the mirrored face, in the "
                             "test and in the .onnx that --export writes"),
        "boxes": Setting(str, default="none", help="haar, or a detector's .onnx: score from "
                         "detected boxes instead of annotated ones"),
        "by_pose": Setting(bool, default=False, help="also print NME by the head's yaw, fitted to "
                           "the annotation"),
        "by": Setting(str, default="none", help="also print NME by condition, out of yaw,size,blur,"
                      "dark,covered,mirror"),
        "names": Setting(str, default="none", help="photos of --fit-eyes and --test-eyes: LIST, "
                         "LIST:PART or LIST:PART,PART"),
        "report": Setting(str, default="none", help="write the numbers to this .json file"),
    },
    "Options of the export": {
        "opset": Setting(int, least=11, most=20, default=13, help="ONNX opset of --raw; the .onnx "
                         "with its decoding always has 18"),
    },
    "Options of self-training": {
        "dump_pseudo": Setting(int, default=0, help="write a sheet of this many pseudo-labels, "
                               "least confident first"),
    },
}
ACTIONS = {
    "train": "train, and keep the best epoch on the validation list",
    "test": "score the test lists with PyTorch",
    "export": "write the .onnx beside the weights",
    "int8": "export, and also write a .int8.onnx, calibrated on training crops of --data-dir",
    "raw": "export, and also write a .raw.onnx of the maps alone, for OpenCV, ncnn, TensorRT",
    "test_onnx": "score the test lists with ONNX Runtime; exports first where needed",
    "fit_shape": "fit the shape head (residual correction of all landmarks) of a .pt on --data-dir",
    "fit_eyes": "fit the lid head and eye thresholds on --data-dir, which holds closed/ and open/",
    "test_eyes": "score closed and open eyes on such a folder",
    "compare": "print the table of all experiments",
    "resume": "continue --exp from its last.pt and its own args.yaml; typed flags win",
}
# Actions that write the files of a trained model.
WRITING = {"fit_shape", "fit_eyes", "export"}


def read_help(path: pathlib.Path = DEFAULTS) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Read the comments of args.yaml.

    Returns:
        Group title ("Data: what to ...") to names of settings, and setting to its one-line help.
    """
    groups, helps, title = {}, {}, ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if re.match(r"# \w[^:.]*: ", line):
            title = line[2:]
        setting = re.match(r"(\w+): *[^#]*# (.*)", line)
        if setting:
            groups.setdefault(title, []).append(setting[1])
            helps[setting[1]] = setting[2]
    return groups, helps


GROUPS, HELPS = read_help()
SETTINGS |= {name: PROBABILITY for title, names in GROUPS.items()
             if title.startswith("Augmentation") for name in names if name not in SETTINGS}
OPTION_TABLE = {name: option for options in OPTIONS.values() for name, option in options.items()}


class UniqueLoader(yaml.SafeLoader):
    """yaml.SafeLoader that refuses a repeated key, of which YAML would silently use the last."""

    def construct_mapping(self, node, deep=False):
        """Construct the dict of a mapping."""
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"key {key} is there twice")
        return super().construct_mapping(node, deep)


class Parser(argparse.ArgumentParser):
    """argparse.ArgumentParser that raises a UserError and suggests the nearest known flag."""

    def error(self, message):
        """Raise a UserError in place of printing usage."""
        unknown = re.search(r"unrecognized arguments: (\S+)", message)
        if unknown:
            flag = unknown[1].split("=")[0]
            near = difflib.get_close_matches(flag, self._option_string_actions, 1, 0.5)
            message = f"unknown flag {flag}" + (f"; nearest: {near[0]}" if near else "")
        raise UserError(f"{message} (see {self.prog} --help)")


def build_parser() -> Parser:
    """Build main.py's parser: actions, options of single commands, one flag per setting."""
    parser = Parser(prog="main.py", usage="main.py --ACTION ... [--SETTING VALUE ...]",
                    allow_abbrev=False,
                    description="Train, test and export PIPNet facial landmark models.")
    group = parser.add_argument_group("Actions", "what to do; several may be given")
    for name, sentence in ACTIONS.items():
        group.add_argument(flag_of(name), action="store_true", help=sentence)
    for title, options in OPTIONS.items():
        group = parser.add_argument_group(title)
        for name, option in options.items():
            _add_flag(group, name, option, option.help)
    parser.add_argument("--args", default=str(DEFAULTS), metavar="FILE",
                        help="another args.yaml, whose keys count as typed")
    parser.add_argument("--data", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    for title, names in GROUPS.items():
        group = parser.add_argument_group(*title.split(": ", 1))
        for name in names:
            _add_flag(group, name, SETTINGS[name], HELPS[name])
    return parser


def _add_flag(group, name, setting, sentence):
    if setting.choices:
        sentence += f" ({', '.join(map(str, setting.choices))})"
    # A switch may stand alone: --gssl is --gssl true; a bare --exp is the newest experiment.
    alone = {"nargs": "?", "const": "true"} if setting.kind is bool else (
        {"nargs": "?", "const": ""} if name == "exp" else {})
    group.add_argument(flag_of(name), metavar=setting.kind.__name__.upper(), **alone,
                       default=argparse.SUPPRESS, help=sentence.replace("%", "%%"))


def flag_of(name: str) -> str:
    """Return the flag of a setting, option or action."""
    return "--" + name.replace("_", "-")


def load_args(given: typing.Mapping[str, typing.Any] | typing.Iterable = (),
              path: pathlib.Path = DEFAULTS, saved: bool = False) -> argparse.Namespace:
    """Resolve all settings and options; `stages` and `after` are empty (training/recipe.py).

    Args:
        given: name to value, strings of the command line or typed values of a checkpoint. They win
            over the file at `path`, which wins over the shipped args.yaml.
        path: an args.yaml.
        saved: `path` was written by save_args, perhaps by an earlier version: names that are no
            settings any more are left out.

    Raises:
        UserError: for unknown names, wrong types and values out of range.
    """
    values = {name: option.default for name, option in OPTION_TABLE.items()} | _read_file(DEFAULTS)
    missing = [name for name in SETTINGS if name not in values]
    if missing:
        raise UserError(f"{DEFAULTS.name}: missing key {missing[0]}; git has the shipped file")
    if pathlib.Path(path).resolve() != DEFAULTS:
        values.update(_read_file(pathlib.Path(path), saved))
    values.update({name: check(name, value, flag_of(name)) for name, value in dict(given).items()})
    return argparse.Namespace(**values, stages=[], after={})


def upgrade(values: dict[str, typing.Any]) -> dict[str, typing.Any]:
    """Return settings that an earlier version stored, by their present names.

    `data: samples` became `data_dir: samples`, and options of single commands are not stored.
    """
    return {name: value for name, value in _rename_data(values).items() if name in SETTINGS}


def _rename_data(values):
    data = values.get("data", "none")
    renamed = {name: value for name, value in values.items() if name != "data"}
    return renamed if data == "none" else {**renamed, "data_dir": data}


def training_settings(args: argparse.Namespace) -> dict[str, typing.Any]:
    """Return the settings that say what is trained, as a checkpoint stores them."""
    return {name: getattr(args, name) for name, setting in SETTINGS.items()
            if not setting.machine}


def read_yaml(path: pathlib.Path) -> dict[str, typing.Any]:
    """Read a YAML file of lines `key: value`.

    Raises:
        UserError: where it cannot be read, holds something else, or has a key twice.
    """
    try:
        found = yaml.load(read_text(path), UniqueLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: expected lines of the form key: value")
    return found


def _read_file(path, saved=False):
    found = read_yaml(path)
    found = upgrade(found) if saved else _rename_data(found)
    for name, value in found.items():
        if name in OPTION_TABLE:
            raise UserError(f"{path}: {name} is no setting but a flag of one command: type "
                            f"{flag_of(name)}")
        # YAML reads 007 as the number 7, and `on` as true.
        if isinstance(value, bool | int | float) and getattr(SETTINGS.get(name), "kind", 0) is str:
            raise UserError(f"{path}: {name}: {value!r} is no text to YAML; put it into quotes")
    return {name: check(name, value, f"{path}: {name}") for name, value in found.items()}


def check(name: str, value: typing.Any, where: str) -> typing.Any:
    """Convert a value to the type of setting or option `name` and check its range.

    Raises:
        UserError: beginning with `where`.
    """
    setting = SETTINGS.get(name) or OPTION_TABLE.get(name)
    if setting is None:
        near = difflib.get_close_matches(str(name), SETTINGS, 1, 0.5)
        raise UserError(f"{where}: unknown key" + (f"; nearest: {near[0]}" if near else ""))
    value = _convert(value, setting.kind, where)
    if setting.choices and value not in setting.choices:
        raise UserError(f"{where}: must be one of {', '.join(map(str, setting.choices))}, "
                        f"found {value}")
    if (setting.kind in (int, float)
            and (not setting.least <= value <= setting.most or value == math.inf)):
        limits = (f"{setting.least} to {setting.most}" if setting.most < math.inf
                  else f"at least {setting.least}")
        raise UserError(f"{where}: must be {limits}, found {value}")
    return value


def _convert(value, kind, where):
    if kind is str:
        if value is None:
            return "none"
        if isinstance(value, list | tuple):
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
                return int(value)  # Through float a large seed would become another one.
            number = float(value)
            if kind is float and number == number:
                return number
            if kind is int and number == int(number):
                return int(number)
        except (TypeError, ValueError, OverflowError):
            pass
    raise UserError(f"{where}: expected {kind.__name__}, found {value!r}")


def save_args(args: argparse.Namespace, path: pathlib.Path) -> None:
    """Write the settings as YAML, in the order and groups of args.yaml."""
    lines = []
    for title, names in GROUPS.items():
        lines += [f"# {title}", *(yaml.safe_dump({n: getattr(args, n)}).strip() for n in names), ""]
    with atomic_write(path) as temporary:
        temporary.write_text("\n".join(lines), encoding="utf-8")


@dataclasses.dataclass(frozen=True)
class Request:
    """A parsed command line.

    Attributes:
        args: all settings and options.
        actions: names of ACTIONS that were asked for.
        typed: settings and options of the command line and of the file of --args, by name.
    """
    args: argparse.Namespace
    actions: frozenset
    typed: dict


def parse(argv: list[str] | None = None) -> Request:
    """Parse main.py's command line; --help exits.

    Raises:
        UserError: for unknown flags, wrong values, no action, and flags that do not go together.
    """
    found = vars(build_parser().parse_args(argv))
    path = pathlib.Path(found.pop("args"))
    actions = frozenset(name for name in ACTIONS if found.pop(name))
    if actions & {"int8", "raw"}:
        actions |= {"export"}
    if "resume" in actions:
        actions |= {"train"}
    if "data" in found and "data_dir" in found:
        raise UserError("--data is the old name of --data-dir; give one of them")
    data = found.pop("data", "none")
    if data not in (SAMPLES, "none"):
        raise UserError(f"--data: must be one of {SAMPLES}, none, found {data}; a prepared set is "
                        f"given as --data-dir {shell_word(data)}")
    if data == SAMPLES:
        found["data_dir"] = SAMPLES
    if not actions and "dump_pseudo" not in found:
        raise UserError("nothing to do: give --train, --test, --export, --test-onnx, --fit-shape, "
                        "--fit-eyes, --test-eyes or --compare (see main.py --help)")
    if {"train", "raw"} <= actions and found.get("head") == "regression":
        raise UserError("--raw: a regression head has no maps; its .onnx needs no decoding")
    if path.resolve() != DEFAULTS:
        # Its keys count as typed: they win over what an experiment was started with.
        found = {**_read_file(path), **found}
    args = load_args(found)
    writing = sorted(actions & WRITING)
    if writing and "train" not in actions and args.exp == "none":
        raise UserError(f"{flag_of(writing[0])} writes a model's files: say which model with --exp "
                        f"NAME or --exp PATH.pt")
    return Request(args, actions, found)
