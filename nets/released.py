"""Safe reader of the IRNet checkpoints that PIPNet repositories release (IR18.pth and the like).

Such a file is a whole pickled module. `read_released` reads its tensors without running anything
in it, and `map_irnet` renames them to the parameters of this repository's model.

torch.load(weights_only=True) with stand-ins in torch.serialization.safe_globals is not enough. Up
to torch 2.14 it

* refuses whole modules in the format before torch 1.6, whose persistent ids name classes, and
  pickle protocols 4 and 5;
* prefers its own list of names to any stand-in, so that a file can call bytearray(2 ** 32) or
  FloatTensor(2 ** 31), and _rebuild_qtensor with unchecked strides (pytorch issue 184652);
* unpacks compressed records of any size;
* in its older releases, lets a tensor reach beyond its record into other memory.

This module therefore reads the zip with zipfile and the pickle with pickle.Unpickler in its
documented restricted form: `find_class` imports nothing and turns every name into an inert `Record`
class. Calling such a class raises `Refused` unless `BUILDERS` has a stand-in for it.
"""
from __future__ import annotations

import collections
import io
import math
import pathlib
import pickle
import pickletools
import re
import zipfile

import torch

from utils.errors import UserError

MAX_BYTES = 2 ** 31
MAX_PICKLE_BYTES = 2 ** 24
MAX_NESTING = 50

STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}

# torch.save writes none of these. EXT takes objects from a table of the process instead of
# find_class; the others are older or out-of-band ways to call a function or to load an object.
FORBIDDEN_OPCODES = {"EXT1", "EXT2", "EXT4", "INST", "OBJ", "PERSID", "NEXT_BUFFER",
                     "READONLY_BUFFER"}


class Refused(Exception):
    """The reason why a file is refused: one line without its path, which read_released adds."""


class _Name(type):
    """Metaclass of Record classes: a call goes to BUILDERS, never to what the file names."""

    def __call__(cls, *arguments):
        if cls.path not in BUILDERS:
            raise Refused(f"calls {_short(cls.path)}, which no plain checkpoint needs")
        return BUILDERS[cls.path](*arguments)


class Record(metaclass=_Name):
    """An inert object of the file.

    Attributes:
        path: dotted name of its class.
        state: what the file passes to __setstate__.
    """

    path = ""
    state = {}

    def __new__(cls, *_):
        """Create the object without calling its class, as pickle does."""
        return object.__new__(cls)

    def __setstate__(self, state):
        self.state = state


class _Ordered(dict):
    """Stand-in for collections.OrderedDict that drops the attributes of a saved state_dict."""

    def __setstate__(self, state):
        pass


# Unchecked descriptions from the file: `count` numbers of `dtype` in the record `key`, and a view
# of such a storage.
_Storage = collections.namedtuple("_Storage", "dtype key count")
_Tensor = collections.namedtuple("_Tensor", "storage offset size stride")

BUILDERS = {
    "torch._utils._rebuild_tensor_v2": lambda *arguments: _Tensor(*arguments[:4]),
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    "collections.OrderedDict": _Ordered,
    # A set stays a list, because a file can contain objects whose hashing never ends.
    **dict.fromkeys(("__builtin__.set", "builtins.set"), list.copy),
    # Released modules have numpy arrays and other objects as attributes, which are ignored.
    **dict.fromkeys((
        "numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct",
        "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy.dtype",
        "_codecs.encode", "torch.Size", "torch.device"), lambda *_: Record.__new__(Record)),
}


class _Unpickler(pickle.Unpickler):
    """Restricted unpickler: every name becomes a Record, every persistent id is checked.

    Attributes:
        storages: storage key to _Storage.
    """

    def __init__(self, stream):
        super().__init__(stream)
        self.storages = {}

    def find_class(self, module, name):
        """Return a Record class for `module.name`; imports nothing."""
        return _Name("Record", (Record,), {"path": f"{module}.{name}"})

    def persistent_load(self, pid):
        """Convert ('storage', class, key, device, count[, view]) to a _Storage.

        The format before torch 1.6 also has ('module', class, source file, source), which gives
        the class.
        """
        if type(pid) is tuple and 4 <= len(pid) <= 6 and isinstance(pid[1], _Name):
            role, name, key, _, count, view = (*pid, None, None)[:6]
            if role == "module" and len(pid) == 4:
                return name
            dtype = STORAGES.get(re.sub(r"^torch\.(cuda\.)?", "", name.path))
            if (role == "storage" and dtype and type(key) is str and key.isdecimal()
                    and type(count) is int and view is None):
                self.storages[key] = _Storage(dtype, key, count)
                return self.storages[key]
        raise Refused("has a persistent id that is not a plain storage")


def read_released(path: str | pathlib.Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a released PIPNet checkpoint without running anything in the file.

    Args:
        path: file with {'model': module}, a bare module or a state_dict, in either of torch.save's
            formats.

    Returns:
        Parameter or buffer name to tensor, in the file's precision, as `module.state_dict()`.

    Raises:
        UserError: the file is damaged, calls a function, or has no parameters.
    """
    try:
        if pathlib.Path(path).stat().st_size > MAX_BYTES:
            raise Refused(f"is larger than {MAX_BYTES >> 30} GiB, which no IRNet is")
        with open(path, "rb") as file:
            read = _read_zip if file.read(4) == b"PK\x03\x04" else _read_legacy
            file.seek(0)
            root, records = read(file)
        if isinstance(root, dict) and "model" in root:
            root = root["model"]
        tensors = {}
        if isinstance(root, dict):
            tensors = {name: value for name, value in root.items() if isinstance(value, _Tensor)}
        else:
            _collect_tensors(root, "", tensors, 0)
        if not tensors or not all(type(name) is str for name in tensors):
            raise Refused("holds no module with parameters; expected {'model': module}")
        views = {name: _view(name, tensor, records) for name, tensor in tensors.items()}
        if sum(view.numel() * view.itemsize for view in views.values()) > MAX_BYTES:
            raise Refused(f"declares more than {MAX_BYTES >> 30} GiB of tensors")
        return {name: view.clone(memory_format=torch.contiguous_format)
                for name, view in views.items()}
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except Exception as error:
        # A damaged or forged pickle or zip can raise anything (KeyError, MemoryError ...).
        reason = error if isinstance(error, Refused) else f"is damaged or forged ({_short(error)})"
        raise UserError(
            f"{path}: {reason}. Nothing in it was run; give a checkpoint as it was released"
        ) from None


def _read_zip(file):
    """Root object, and storage key to bytearray, of torch.save's format since torch 1.6."""
    with zipfile.ZipFile(file) as archive:
        infos = archive.infolist()
        sizes = {info.filename: info.file_size for info in infos}
        pickles = [name for name in sizes if re.fullmatch(r"[^/]+/data\.pkl", name)]
        if len(sizes) < len(infos) or len(pickles) != 1:
            raise Refused("is a zip file, but not one that torch.save wrote")
        if sum(sizes.values()) > MAX_BYTES:
            raise Refused(f"would unpack to more than {MAX_BYTES >> 30} GiB")
        if any(info.compress_type != zipfile.ZIP_STORED for info in infos):
            # Uncompressed records cannot be larger than the file.
            raise Refused("has compressed records, which torch.save never writes")
        folder = pickles[0][:-len("data.pkl")]
        if folder + "byteorder" in sizes and archive.read(folder + "byteorder") != b"little":
            raise Refused("was saved on a big-endian machine, which is not supported")
        root, storages = _unpickle(io.BytesIO(archive.read(pickles[0])))
        return root, {key: bytearray(archive.read(f"{folder}data/{key}")) for key in storages
                      if f"{folder}data/{key}" in sizes}


def _read_legacy(file):
    """Root object, and storage key to bytearray, of torch.save's format before torch 1.6.

    The file has five pickles (magic, version, machine, object, storage keys), then a count and the
    numbers of each storage.
    """
    stream = io.BytesIO(file.read())
    try:
        magic, version, machine = (_unpickle(stream)[0] for _ in range(3))
    except Exception:
        magic = version = machine = None
    if (magic, version) != (torch.serialization.MAGIC_NUMBER, torch.serialization.PROTOCOL_VERSION):
        raise Refused("is neither a zip file nor a file of torch.save (or it is damaged)")
    if type(machine) is not dict or machine.get("little_endian") is not True:
        raise Refused("was saved on a big-endian machine, which is not supported")
    root, storages = _unpickle(stream)
    keys, _ = _unpickle(stream)
    if type(keys) is not list or not all(type(key) is str and key in storages for key in keys):
        raise Refused("lists storages that no tensor uses")
    records = {}
    for key in keys:
        count, length = stream.read(8), storages[key].count * storages[key].dtype.itemsize
        records[key] = bytearray(stream.read(length))
        # Storages that no parameter uses are checked too, because one of them can be the last.
        if count != storages[key].count.to_bytes(8, "little") or len(records[key]) != length:
            raise Refused(f"is truncated or damaged: storage {_short(key)} has another size")
    return root, records


def _unpickle(stream):
    """Next pickle of a BytesIO: its object, and storage key to _Storage.

    The stream is left at the end of the pickle.
    """
    start = stream.tell()
    for count, (opcode, argument, position) in enumerate(pickletools.genops(stream)):
        if opcode.name in FORBIDDEN_OPCODES:
            raise Refused(f"uses the pickle opcode {opcode.name}, which torch.save never does")
        if opcode.name.endswith("PUT") and argument > count:
            # Pickle's memo is an array, so that a large index alone allocates gigabytes.
            raise Refused("has a damaged pickle (memo index)")
        if position - start > MAX_PICKLE_BYTES:
            raise Refused(f"has a pickle over {MAX_PICKLE_BYTES >> 20} MiB")
    stream.seek(start)
    unpickler = _Unpickler(stream)
    return unpickler.load(), unpickler.storages


def _collect_tensors(record, prefix, tensors, depth):
    """Add to `tensors` what state_dict() of the recorded torch module would contain."""
    if depth > MAX_NESTING:
        raise Refused(f"nests modules more than {MAX_NESTING} deep")
    state = record.state if isinstance(record, Record) else None
    if not isinstance(state, dict):
        raise Refused(f"has no module at {_short(prefix or 'its root')}")
    parts = [state.get(key, {}) for key in ("_parameters", "_buffers", "_modules")]
    transient = state.get("_non_persistent_buffers_set", [])
    if not all(isinstance(part, dict) for part in parts) or not isinstance(transient, (list, set)):
        raise Refused(f"has no module at {_short(prefix or 'its root')}")
    for part in parts:
        for key, value in part.items():
            name = f"{prefix}{key}"
            if type(key) is not str or name in tensors:
                raise Refused(f"has a bad or repeated name {_short(name)}")
            if value is None or part is parts[1] and key in transient:
                continue
            if part is parts[2]:
                _collect_tensors(value, name + ".", tensors, depth + 1)
            elif isinstance(value, _Tensor):
                tensors[name] = value
            else:
                raise Refused(f"has no tensor at {_short(name)}")


def _view(name, tensor, records):
    """The torch tensor of a _Tensor: a view of its record's bytes, which takes no memory."""
    (dtype, key, count), offset, size, stride = tensor
    data = records.get(key, b"")
    if len(data) != count * dtype.itemsize:
        raise Refused(f"is truncated or damaged: {_short(name)} needs {count} numbers of {dtype}, "
                      f"found {len(data)} bytes")
    # With stride 0 one number has any size, so the number of elements is tested as well.
    if type(size) is not tuple or type(stride) is not tuple or len(size) > 8 or not all(
            type(number) is int for number in (offset, *size, *stride)) or math.prod(size) > count:
        raise Refused(f"has a tensor {_short(name)} of a bad size, stride or offset")
    try:
        numbers = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        return numbers.as_strided(size, stride, offset)
    except (RuntimeError, ValueError):
        raise Refused(f"has a tensor {_short(name)} that reaches outside its storage") from None


def _short(text):
    """Text of the file, at most 80 characters and safe to print on one line."""
    text = str(text)
    return (text if len(text) <= 80 else text[:77] + "...").encode(
        "unicode_escape").decode("ascii")


# Regular expressions from released parameter names to those of this repository, applied in order.
RENAMES = (
    (r"^p1\.0\.", "backbone.stem."),
    (r"^p([2-5])\.(\d+)\.", lambda match: f"backbone.stages.{int(match[1]) - 2}.{match[2]}."),
    (r"\.conv2\.0\.", ".norm."),
    (r"\.conv2\.1\.", ".first."),
    (r"\.conv2\.2\.", ".second."),
    (r"\.conv1\.", ".shortcut."),
    (r"\.relu\.", ".act."),
    (r"^(score|offset_[xy])\.", r"head.\1."),
    (r"^neighbor_([xy])\.", r"head.neighbour_\1."),
)


def map_irnet(released: dict[str, torch.Tensor], state: dict[str, torch.Tensor]
              ) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Rename released IRNet tensors to the parameters of a LandmarkNet.

    Args:
        released: what read_released returns.
        state: state_dict of the model, with `backbone.*` and `head.*`.

    Returns:
        Tensors by the model's names, floats as float32; and the released names that were left out,
        which are heads of another size.

    Raises:
        UserError: the backbone does not fit.
    """
    mapped, left_out = {}, []
    for name, tensor in released.items():
        renamed = name
        for pattern, replacement in RENAMES:
            renamed = re.sub(pattern, replacement, renamed)
        expected = state.get(renamed)
        if expected is not None and tensor.shape == expected.shape:
            mapped[renamed] = tensor.float() if tensor.is_floating_point() else tensor
        elif renamed.startswith("backbone."):
            shape = "nothing" if expected is None else tuple(expected.shape)
            raise UserError(
                f"released weights: {name} is {tuple(tensor.shape)}, this model expects {shape} "
                "there; choose the IRNet depth of the file, with activation prelu")
        else:
            left_out.append(name)
    for name, expected in state.items():
        if name.startswith("backbone.") and name not in mapped:
            raise UserError(
                f"released weights: no tensor for {name} {tuple(expected.shape)}; choose "
                "the IRNet depth of the file, with activation prelu")
    return mapped, left_out
