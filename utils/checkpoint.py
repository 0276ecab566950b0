"""Saving and loading: files of tensors and plain values, read with weights_only=True."""
import contextlib
import io
import pathlib
import re
import warnings

import torch

from nets.backbone import reparameterise
from nets.lids import LidHead
from nets.model import LandmarkNet, check_size
from nets.shape import ShapeHead
from utils.args import KINDS, load_args
from utils.errors import UserError
from utils.files import atomic_write
from utils.landmarks.eyelids import EyeThresholds
from utils.landmarks.schemes import Scheme

FORMAT = "pipnet-1"
# What a run cannot change and still be the same run; the rest may change on --resume,
# data_dir to where the same faces lie now (see Trainer.restore).
FIXED = ("data", "scheme", "mean_face", "backbone", "activation", "head", "num_nb",
         "stride", "input_size", "epochs", "effective_batch", "batch_size", "seed", "ema",
         "gssl", "unlabelled_dir", "gssl_preset", "gssl_rounds", "gssl_epochs", "gssl_keep",
         "teacher", "teacher_share", "pretrained")


LARGE = 1024  # Numbers in a kernel that is worth storing otherwise.


def save(state, path):
    """Write state to path so that a crash at any moment leaves the old file or the new one.

    Raises UserError where the disk is full or cannot be written; the old file is then untouched.
    """
    # Through memory: torch's own writer hides why a disk refuses, and may abort the process.
    content = io.BytesIO()
    torch.save(state, content)
    with atomic_write(path) as temporary:
        temporary.write_bytes(content.getbuffer())


def read(path):
    """A file of `save` as a dict. Raises UserError in one line for anything else."""
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"{path}: " + ("is no file" if path.exists() else "no such file"))
    refused = f"{path}: is no checkpoint of this repository"
    try:
        with open(path, "rb") as file:
            begin = file.read(4)
        if begin != b"PK\x03\x04":
            raise UserError(f"{refused}: it is empty" if not begin else
                            f"{refused}: it does not begin as a file of torch.save does")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except UserError:
        raise
    except Exception as error:
        # torch.load raises a dozen kinds for damaged files; none of them ran anything of the file.
        named = re.search(r"(?:GLOBAL|global:?) ([\w.]+\.\w+)", str(error))
        raise UserError(f"{refused}: it names {named[1]}, and nothing that a file names is ever run"
                        if named else f"{refused}: it is damaged or cut off") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UserError(f"{refused}: no format {FORMAT!r} in it")
    return state


def weights_of(state):
    """The weights to predict with: those published, or of a last.pt the average, or the model's."""
    return {name: stored[0] * stored[1] if isinstance(stored, tuple) else stored
            for name, stored in _stored(state).items()}


def in_bytes(weights):
    """Weights as a smaller file has them: the backbone's large kernels as whole numbers (int8) and
    a factor for each output channel, the rest as halves.

    Heads stay halves, as their numbers become coordinates: in 8 bits they would cost `accurate`
    0.07 of 2.76 % on the validation list, while kernels cost it nothing.
    """
    return {name: to_bytes(value) if name.startswith("backbone.") and value.dim() > 1
            and value.numel() >= LARGE else halved(value) for name, value in weights.items()}


def to_bytes(kernel):
    """A kernel (C, ...) as whole numbers, int8, and factors (C, 1, ...): their product is nearly
    the kernel, and gives the same again.
    """
    # A channel that training has switched off may hold nothing but zeros.
    factor = kernel.float().flatten(1).abs().amax(1).clamp(min=1e-9) / 127
    factor = factor.reshape(-1, *[1] * (kernel.dim() - 1))
    return (kernel / factor).round().to(torch.int8), factor


def halved(value):
    """A tensor as halves, if it is of floats."""
    return value.half() if value.is_floating_point() else value


def with_head(state, name, head):
    """A state with `head`, a module, fitted as `name` in the place of the one before; the other
    weights stay as they are stored.
    """
    return {**state, "weights": without(_stored(state), name) | {
        f"{name}.{key}": value.detach() for key, value in head.state_dict().items()}}


def _stored(state):
    return state["weights"] if "weights" in state else state["ema"] or state["model"]


def describe(args, scheme, crop, neighbour_face=None, **more):
    """What a published checkpoint says of itself beside its weights."""
    return {"format": FORMAT, "args": vars(args), "scheme": scheme.state(), "crop": dict(crop),
            "neighbour_face": None if neighbour_face is None else
            [[float(x), float(y)] for x, y in neighbour_face], **more}


def set_name(folder, args):
    """The name of a prepared set's folder without its size, as its user calls it."""
    return pathlib.Path(folder).name.removesuffix(f"-{args['input_size']}")


def teachers(setting):
    """The .pt files that the setting `teacher` names: none, A.pt, or A.pt,B.pt and so on."""
    return [] if setting == "none" else [pathlib.Path(p.strip()) for p in setting.split(",")]


def data_sets(args):
    """Names of the sets whose faces made weights of these settings (a dict), each once: its own,
    and those of the .pt files that it began with and was taught by, where they are at hand.
    """
    names = _own_sets(args)
    for path in (pathlib.Path(args["pretrained"]), *teachers(args["teacher"])):
        if path.suffix == ".pt" and path.is_file():
            # What others made is of no set of ours, and what is damaged is told where it is used.
            with contextlib.suppress(UserError, KeyError, TypeError):
                names += sets_of(read(path))
    return list(dict.fromkeys(names))


def sets_of(state):
    """The names of data_sets of a checkpoint (a dict), or as far as its settings tell them."""
    return state.get("sets") or _own_sets({**vars(load_args()), **state["args"]})


def _own_sets(args):
    if args["data"] != "none":
        return [args["data"]]
    folders = [args["data_dir"], *[args["unlabelled_dir"]] * bool(args["gssl"])]
    # A set that is merged of others is named A+B.
    return [name for folder in folders for name in set_name(folder, args).split("+")]


def build_model(args, scheme, neighbour_face=None, timm_weights=False):
    """A LandmarkNet as resolved args say. Raises UserError."""
    check_size(args.input_size, args.stride)
    model = LandmarkNet(scheme, args.backbone, args.head, args.num_nb, args.stride, args.merge,
                        args.activation, timm_weights, neighbour_face)
    check_size(args.input_size, args.stride, args.backbone, model.backbone.only_size)
    return model


FITTED = ("lids", "shape")


def without(weights, *heads):
    """Weights without those of heads that main.py --fit-eyes (`lids`) and --fit-shape (`shape`) add
    to a trained network.
    """
    return {k: v for k, v in weights.items() if k.split(".")[0] not in heads}


def load_model(path, device="cpu", lids=True, shape=True, flip_test=False, **overrides):
    """A published checkpoint as a model in evaluation mode, ready to predict and export.

    It gets the attributes `args` (resolved args), `scheme`, `crop` ({"rule", "scale"}),
    `input_size`, `eyes` (eyelids.EyeThresholds) and `sets` (see data_sets). lids, shape: whether the heads
    that were fitted to it, if they were, draw shut lids together and correct shapes. flip_test:
    whether it averages with the mirrored face, even if it was not published so. overrides: settings
    of the model to change, such as merge. Raises UserError.
    """
    state = read(path)
    try:
        known = {k: v for k, v in state["args"].items() if k in KINDS}
        args = load_args({**known, **overrides})
        scheme = Scheme.from_state(state["scheme"])
        crop = {"rule": str(state["crop"]["rule"]), "scale": float(state["crop"]["scale"])}
        eyes, sets = EyeThresholds.from_state(state.get("eyes")), sets_of(state)
        model = build_model(args, scheme, state.get("neighbour_face"))
        weights = {k: v.float() if v.is_floating_point() else v
                   for k, v in weights_of(state).items()}
        unwanted = [name for name, wanted in (("lids", lids), ("shape", shape)) if not wanted]
        weights = without(weights, *unwanted)
        if "lids.weight" in weights and scheme.eyes:
            model.lids = LidHead(model.backbone.channels, scheme)
        if "shape.weight" in weights:
            model.shape = ShapeHead(scheme.points)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{path}: is damaged or of another version: {type(error).__name__}: "
                        f"{' '.join(str(error).split())[:100]}") from None
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"{path}: its weights do not fit its own arguments: "
                        f"{' '.join(str(error).split())[:160]}") from None
    if not all(torch.isfinite(v).all() for v in weights.values()):
        raise UserError(f"{path}: holds weights that are not finite numbers")
    model = reparameterise(model.eval()).to(device)
    model.args, model.crop, model.input_size, model.eyes = args, crop, args.input_size, eyes
    model.sets, model.flip_test = sets, bool(flip_test or state.get("flip_test"))
    if model.flip_test and not scheme.mirrors:
        raise UserError(f"{path}: --flip-test: scheme {scheme.name} has flip: none, so that "
                        f"mirrored faces say nothing of it")
    return model


def load_pretrained(model, path):
    """Start model from a checkpoint of this repository, or from a released IRNet file.

    Layers of another shape (heads of another scheme) keep their fresh weights. Returns the names
    left out. Raises UserError where nothing of the backbone fits.
    """
    ours = model.state_dict()
    try:
        weights = weights_of(read(path))
    except (AttributeError, KeyError, RuntimeError, TypeError) as error:
        raise UserError(f"{path}: is damaged: it has no weights ({error})") from None
    except UserError as refused:
        from nets.released import map_irnet, read_released
        if not pathlib.Path(path).is_file():
            raise
        try:
            weights, left_out = map_irnet(read_released(path), ours)
        except UserError as error:
            raise UserError(f"{refused}; nor a released IRNet: {error}") from None
        model.load_state_dict(weights, strict=False)
        return left_out
    fits = {k: weights[k].to(v.dtype) for k, v in ours.items()
            if getattr(weights.get(k), "shape", None) == v.shape}
    fitting, needed = (sum(v.numel() for k, v in state.items() if k.startswith("backbone"))
                       for state in (fits, ours))
    if fitting < needed / 2:
        found = f"{fitting} of {needed} numbers" if fitting else "nothing"
        raise UserError(f"{path}: {found} of its backbone fits; is it another backbone?")
    model.load_state_dict(fits, strict=False)
    return sorted(k for k in ours if k not in fits)


def changed(old, new):
    """[(setting, old, new)] where a resumed run's settings differ (dict of its last.pt, namespace).

    Raises UserError for a change that would make it another run.
    """
    if not isinstance(old, dict):
        raise UserError("last.pt: is damaged: it has no args")
    new = vars(new)
    pairs = [(k, old[k], new[k]) for k in new if k in old and old[k] != new[k]]
    fixed = [p for p in pairs if p[0] in FIXED]
    if fixed:
        name, before, after = fixed[0]
        raise UserError(f"last.pt: --resume cannot change {name} from {before} to {after}: it "
                        f"would be another run; give it a new --exp, perhaps with --pretrained")
    return pairs
