"""Save checkpoints, and load them as models.

A checkpoint is a dict of tensors and plain values: settings, scheme, crop rule and weights.
best.pt and published files hold the weights to predict with (`weights`); last.pt holds the whole
training state (`model`, `ema` ...). Files are read with weights_only=True, so nothing in them runs.
load_model turns one into a network that predicts, which evaluation, export and Predictor use.
"""
from __future__ import annotations

import argparse
import io
import pathlib
import re
import typing
import warnings
from collections.abc import Mapping

import torch

from nets.backbone import fuse_branches
from nets.lids import LidHead
from nets.model import LandmarkNet, check_size
from nets.shape import ShapeHead
from utils import packing, provenance
from utils.args import SAMPLES, SETTINGS, load_args, training_settings, upgrade
from utils.errors import UserError
from utils.files import atomic_write, refuse_lfs_pointer
from utils.landmarks.eyelids import EyeThresholds
from utils.landmarks.schemes import Scheme

FORMAT = "pipnet-1"
# Heads that are fitted after training, by --fit-eyes and --fit-shape.
FITTED_HEADS = ("lids", "shape")


def save(state: Mapping, path: pathlib.Path | str) -> None:
    """Write a checkpoint whole or not at all.

    Raises:
        UserError: where the disk is full or cannot be written; the old file is then unchanged.
    """
    # torch's own writer hides the cause of a failed write and may abort the process.
    content = io.BytesIO()
    torch.save(state, content)
    with atomic_write(path) as temporary:
        temporary.write_bytes(content.getbuffer())


def read(path: pathlib.Path | str) -> dict:
    """Read a checkpoint as a dict on the CPU.

    Raises:
        UserError: where there is no such file, or it is not a checkpoint of this repository.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"{path}: " + ("is not a file" if path.exists() else "no such file"))
    refused = f"{path}: is no checkpoint of this repository"
    try:
        refuse_lfs_pointer(path)
        with open(path, "rb") as file:
            start = file.read(4)
        if start != b"PK\x03\x04":
            raise UserError(f"{refused}: it " + ("does not start like a file of torch.save" if start
                                                 else "is empty"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except UserError:
        raise
    except Exception as error:
        # torch.load raises a dozen kinds of error for damaged files, none after running their code.
        named = re.search(r"(?:GLOBAL|global:?) ([\w.]+\.\w+)", str(error))
        raise UserError(f"{refused}: it refers to {named[1]}; code in a checkpoint is never run"
                        if named else f"{refused}: it is damaged or cut off") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UserError(f"{refused}: it has no format {FORMAT!r}")
    return state


def weights_of(state: Mapping) -> dict[str, torch.Tensor]:
    """Return the weights to predict with; of a last.pt the averaged ones, if it has them."""
    return packing.unpack(_stored(state))


def _stored(state):
    return state["weights"] if "weights" in state else state["ema"] or state["model"]


def with_head(state: Mapping, name: str, head: torch.nn.Module) -> dict:
    """Return a checkpoint with a fitted head added or replaced; other weights stay as stored.

    Args:
        state: the checkpoint.
        name: of the head, one of FITTED_HEADS.
        head: LidHead or ShapeHead.
    """
    return {**state, "weights": without_heads(_stored(state), name) | {
        f"{name}.{key}": value.detach() for key, value in head.state_dict().items()}}


def without_heads(weights: Mapping, *heads: str) -> dict:
    """Return weights without those of the heads of these names (of FITTED_HEADS)."""
    return {k: v for k, v in weights.items() if k.split(".")[0] not in heads}


def describe(args: argparse.Namespace, scheme: Scheme, crop: Mapping,
             neighbour_face: typing.Iterable | None = None, **more) -> dict:
    """Return what a checkpoint holds beside its weights.

    Args:
        args: resolved settings of the training.
        scheme: of the model.
        crop: {"rule", "scale"} of the prepared set.
        neighbour_face: landmarks (K, 2) that the neighbours were chosen on; None: those of the
            scheme.
        more: further entries.
    """
    return {"format": FORMAT, "args": training_settings(args), "scheme": scheme.state(),
            "crop": dict(crop), "neighbour_face": None if neighbour_face is None else
            [[float(x), float(y)] for x, y in neighbour_face], **more}


def build_model(args: argparse.Namespace, scheme: Scheme,
                neighbour_face: typing.Iterable | None = None,
                timm_weights: bool = False) -> LandmarkNet:
    """Build the network that resolved settings describe.

    Args:
        args: resolved settings.
        scheme: of the landmarks to predict.
        neighbour_face: see describe.
        timm_weights: whether the backbone starts from timm's ImageNet weights.

    Raises:
        UserError: where input size and stride do not fit the backbone.
    """
    check_size(args.input_size, args.stride)
    model = LandmarkNet(scheme, args.backbone, args.head, args.num_nb, args.stride, args.merge,
                        args.activation, timm_weights, neighbour_face)
    check_size(args.input_size, args.stride, args.backbone, model.backbone.fixed_size)
    return model


def load_model(path: pathlib.Path | str, device: torch.device | str = "cpu", lids: bool = True,
               shape: bool = True, flip_test: bool = False, **overrides) -> LandmarkNet:
    """Load a published checkpoint as a model in evaluation mode.

    Args:
        path: of the .pt.
        device: to put the model on.
        lids: whether to apply its lid head, if it has one.
        shape: whether to apply its shape head, if it has one.
        flip_test: average with the mirrored face even where the checkpoint does not ask for it.
        overrides: settings of the model to change, such as merge.

    Returns:
        The model with the attributes `args` (resolved settings), `crop` ({"rule", "scale"}),
        `input_size`, `eyes` (EyeThresholds), `sets` (names of the sets that it was trained on) and
        `flip_test`.

    Raises:
        UserError: where the file is missing, damaged or of other settings.
    """
    state = read(path)
    try:
        args = load_args({**upgrade(state["args"]), **overrides})
        scheme = Scheme.from_state(state["scheme"])
        crop = {"rule": str(state["crop"]["rule"]), "scale": float(state["crop"]["scale"])}
        eyes = EyeThresholds.from_state(state.get("eyes"))
        sets = provenance.recorded_sets(state)
        model = build_model(args, scheme, state.get("neighbour_face"))
        weights = {k: v.float() if v.is_floating_point() else v
                   for k, v in weights_of(state).items()}
        unwanted = [name for name, wanted in (("lids", lids), ("shape", shape)) if not wanted]
        weights = without_heads(weights, *unwanted)
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
        raise UserError(f"{path}: its weights do not fit its settings: "
                        f"{' '.join(str(error).split())[:160]}") from None
    if not all(torch.isfinite(v).all() for v in weights.values()):
        raise UserError(f"{path}: contains weights that are not finite")
    model = fuse_branches(model.eval()).to(device)
    model.args, model.crop, model.input_size, model.eyes = args, crop, args.input_size, eyes
    model.sets, model.flip_test = sets, bool(flip_test or state.get("flip_test"))
    if model.flip_test and not scheme.mirrors:
        raise UserError(f"{path}: --flip-test: scheme {scheme.name} has flip: none, so mirrored "
                        f"predictions cannot be mapped back")
    return model


def load_pretrained(model: LandmarkNet, path: pathlib.Path | str) -> list[str]:
    """Initialise a model from a checkpoint of this repository or a released IRNet file.

    Layers of another shape, such as the head of another scheme, keep their initial weights.

    Returns:
        The names of the weights that were not loaded.

    Raises:
        UserError: where the file is neither, or less than half of the backbone fits.
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


def changed_settings(old: Mapping, new: argparse.Namespace) -> list[tuple]:
    """Compare the settings of a resumed training with those in its last.pt.

    Args:
        old: settings in last.pt.
        new: resolved settings.

    Returns:
        (name, old value, new value) of each setting that differs.

    Raises:
        UserError: for a change that would make it another training.
    """
    if not isinstance(old, dict):
        raise UserError("last.pt: is damaged: it has no args")
    old, new = upgrade(old), training_settings(new)
    pairs = [(k, old[k], new[k]) for k in new if k in old and old[k] != new[k]]
    # The folder of a set may change, but drawn faces cannot replace a set or the reverse.
    fixed = [p for p in pairs if SETTINGS[p[0]].fixed or p[0] == "data_dir" and SAMPLES in p[1:]]
    if fixed:
        name, before, after = fixed[0]
        raise UserError(f"last.pt: --resume cannot change {name} from {before} to {after}: it "
                        f"would be another run; give it a new --exp, perhaps with --pretrained")
    return pairs
