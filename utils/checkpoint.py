"""Saving and loading: atomic files of tensors and plain values, read with weights_only=True."""
import argparse
import os
import pathlib

import torch

from nets.backbone import reparameterise
from nets.model import LandmarkNet, check_size
from utils.args import KNOBS, load_args
from utils.errors import UserError
from utils.landmarks import Scheme

FORMAT = "pipnet-1"
# What a run cannot change and still be the same run; the rest may change on --resume.
FIXED = ("data", "data_dir", "scheme", "mean_face", "backbone", "activation", "head", "num_nb",
         "stride", "input_size", "epochs", "effective_batch", "batch_size", "seed", "precision", "ema")


def save(state, path):
    """Write state to path so that a crash at any moment leaves the old file or the new one.

    Raises UserError where the disk is full or cannot be written; the old file is then untouched.
    """
    path = pathlib.Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        # torch's zip writer reports a full disk as a RuntimeError.
        temporary.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or "the disk may be full"
        raise UserError(f"{path}: could not be saved ({reason}); an earlier file is "
                        f"untouched") from None


def _sync_folder(folder):
    """Make the rename itself durable; not every system lets a folder be synced."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)


def read(path):
    """A file of `save` as a dict. Raises UserError in one line for anything else."""
    path = pathlib.Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file")
    if not path.is_file():
        raise UserError(f"{path}: is no file")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # torch.load raises a dozen kinds for damaged files; none of them ran anything of the file.
        text = str(error)
        reason = ("it holds pickled code or classes, which are never run"
                  if "weights_only" in text.lower() or "unsupported" in text.lower()
                  else " ".join(text.split())[:120] or type(error).__name__)
        raise UserError(f"{path}: is no checkpoint of this repository: {reason}") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UserError(f"{path}: is no checkpoint of this repository: no format {FORMAT!r} in it")
    return state


def describe(args, scheme, crop, neighbour_face=None, **more):
    """What a published checkpoint says of itself beside its weights."""
    return {"format": FORMAT, "args": vars(args), "scheme": scheme.state(), "crop": dict(crop),
            "neighbour_face": None if neighbour_face is None else
            [[float(x), float(y)] for x, y in neighbour_face], **more}


def build_model(args, scheme, neighbour_face=None, timm_weights=False):
    """A LandmarkNet as resolved args say. Raises UserError."""
    check_size(args.input_size, args.stride)
    return LandmarkNet(scheme, args.backbone, args.head, args.num_nb, args.stride, args.merge,
                       args.activation, timm_weights, neighbour_face)


def load_model(path, device="cpu", **overrides):
    """A published checkpoint as a model in evaluation mode, ready to predict and export.

    It gets the attributes `args` (resolved knobs), `scheme`, `crop` ({"rule", "scale"}) and
    `input_size`. overrides: knobs of the model to change, such as merge. Raises UserError.
    """
    state = read(path)
    try:
        known = {k: v for k, v in state["args"].items() if k in KNOBS}
        args = load_args({**known, **overrides})
        scheme = Scheme.from_state(state["scheme"])
        crop = {"rule": str(state["crop"]["rule"]), "scale": float(state["crop"]["scale"])}
        weights = state["weights"]
        model = build_model(args, scheme, state.get("neighbour_face"))
        floats = {k: v.float() if v.is_floating_point() else v for k, v in weights.items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: is damaged or of another version: {type(error).__name__}: "
                        f"{str(error)[:100]}") from None
    try:
        model.load_state_dict(floats)
    except RuntimeError as error:
        raise UserError(f"{path}: its weights do not fit its own arguments: "
                        f"{' '.join(str(error).split())[:160]}") from None
    if not all(torch.isfinite(v).all() for v in floats.values()):
        raise UserError(f"{path}: holds weights that are not finite numbers")
    model = reparameterise(model.eval()).to(device)
    model.args, model.crop, model.input_size = args, crop, args.input_size
    return model


def load_pretrained(model, path):
    """Start model from a checkpoint of this repository, or from a released IRNet file.

    Layers of another shape (heads of another scheme) keep their fresh weights. Returns the names
    left out. Raises UserError where nothing of the backbone fits.
    """
    ours = model.state_dict()
    try:
        weights = read(path)["weights"]
    except UserError as refused:
        from nets.released import map_irnet, read_released
        if not pathlib.Path(path).is_file():
            raise
        try:
            released = read_released(path)
        except UserError as error:
            raise UserError(f"{error} (nor a checkpoint of this repository: {refused})") from None
        weights, left_out = map_irnet(released, ours)
        model.load_state_dict(weights, strict=False)
        return left_out
    fits = {k: v.to(ours[k].dtype) for k, v in weights.items()
            if k in ours and v.shape == ours[k].shape}
    if not any(k.startswith("backbone") for k in fits):
        raise UserError(f"{path}: nothing of its backbone fits; is it another backbone?")
    model.load_state_dict(fits, strict=False)
    return sorted(k for k in ours if k not in fits)


def changed(old, new):
    """[(knob, old, new)] where a resumed run's args (dict, namespace) differ.

    Raises UserError for a change that would make it another run.
    """
    new = vars(new) if isinstance(new, argparse.Namespace) else new
    pairs = [(k, old[k], new[k]) for k in new if k in old and old[k] != new[k]]
    fixed = [p for p in pairs if p[0] in FIXED]
    if fixed:
        name, before, after = fixed[0]
        raise UserError(f"--resume cannot change {name} from {before} to {after}: it would be another "
                        f"run; give it a new --exp (its weights as --pretrained, if wanted)")
    return pairs
