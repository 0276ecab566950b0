"""Reads the IRNet checkpoints that PIPNet repositories release (IR18.pth and the like: a whole
pickled module) without running anything in them, and maps them to our names.

torch.load(weights_only=True) with stand-ins in torch.serialization.safe_globals would be shorter,
but up to torch 2.14 it
* refuses whole modules in the format before torch 1.6 (their persistent ids name classes), and
  pickle protocols 4 and 5;
* prefers its own list of names to any stand-in: bytearray(2 ** 32) or FloatTensor(2 ** 31) in a
  file is called, and so was _rebuild_qtensor with unchecked strides (pytorch issue 184652);
* unpacks compressed records, however large they become;
and its older releases give a tensor that claims more than its record the memory behind it.
Each of these needs the pickle or the zip read by us, so they are read once: by zipfile and by
pickle.Unpickler in its documented restricted form. `find_class` imports nothing and makes every
name an inert `Record` class; calling one is refused unless `BUILDERS` has a stand-in for it.
"""

import collections
import io
import math
import pathlib
import pickle
import pickletools
import re
import zipfile

import torch

import utils.errors

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
# find_class; the others are older or out-of-band ways to call and to fetch.
FORBIDDEN_OPCODES = {"EXT1", "EXT2", "EXT4", "INST", "OBJ", "PERSID", "NEXT_BUFFER",
                     "READONLY_BUFFER"}


class Refused(Exception):
    """Why a file is not read, one line without its path; `read_released` adds that."""


class _Name(type):
    """The type of Record classes: calling one asks BUILDERS, and never what the file named."""

    def __call__(cls, *arguments):
        if cls.path not in BUILDERS:
            raise Refused(f"calls {_short(cls.path)}, which no plain checkpoint needs")
        return BUILDERS[cls.path](*arguments)


class Record(metaclass=_Name):
    """An object of the file: the dotted `path` of its class and its `state`, nothing else."""

    path = ""
    state = {}

    def __new__(cls, *_):
        """Pickle's way to create an object without calling its class."""
        return object.__new__(cls)

    def __setstate__(self, state):
        self.state = state


class _Ordered(dict):
    """Stands for collections.OrderedDict; a saved state_dict has attributes, which are dropped."""

    def __setstate__(self, state):
        pass


# A claim on the file, `count` numbers of `dtype` in the record `key`; and a view of one.
_Storage = collections.namedtuple("_Storage", "dtype key count")
_Tensor = collections.namedtuple("_Tensor", "storage offset size stride")

BUILDERS = {
    "torch._utils._rebuild_tensor_v2": lambda *claim: _Tensor(*claim[:4]),
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    "collections.OrderedDict": _Ordered,
    # A set stays the list it is made from: hashing what a file holds can be made to take forever.
    **dict.fromkeys(("__builtin__.set", "builtins.set"), list.copy),
    # numpy arrays and the like hang on released modules as attributes that nothing here reads.
    **dict.fromkeys((
        "numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct",
        "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy.dtype",
        "_codecs.encode", "torch.Size", "torch.device"), lambda *_: Record.__new__(Record)),
}


class _Unpickler(pickle.Unpickler):
    """Pickle's machine with every way out closed: names are Records, persistent ids are checked.
    `claims` gathers storage key -> _Storage.
    """

    def __init__(self, stream):
        super().__init__(stream)
        self.claims = {}

    def find_class(self, module, name):
        """A Record class for `module.name`; imports nothing."""
        return _Name("Record", (Record,), {"path": f"{module}.{name}"})

    def persistent_load(self, claim):
        """('storage', class, key, device, count[, view]) -> _Storage; the format before torch 1.6
        also wraps a module's class as ('module', class, source file, source).
        """
        if type(claim) is tuple and 4 <= len(claim) <= 6 and isinstance(claim[1], _Name):
            role, name, key, _, count, view = (*claim, None, None)[:6]
            if role == "module" and len(claim) == 4:
                return name
            dtype = STORAGES.get(re.sub(r"^torch\.(cuda\.)?", "", name.path))
            if (role == "storage" and dtype and type(key) is str and key.isdecimal()
                    and type(count) is int and view is None):
                self.claims[key] = _Storage(dtype, key, count)
                return self.claims[key]
        raise Refused("has a persistent id that is no plain storage")


def read_released(path):
    """The checkpoint `path` of a PIPNet repository -> dict: parameter or buffer name -> tensor,
    in the file's own precision, as `module.state_dict()` would give. Takes {'model': module}, a
    bare module or a state_dict, in both of torch.save's formats. Runs nothing in the file.
    UserError if it is damaged, calls anything, or holds no parameters.
    """
    try:
        if pathlib.Path(path).stat().st_size > MAX_BYTES:
            raise Refused(f"is larger than {MAX_BYTES >> 30} GiB, no IRNet is")
        with open(path, "rb") as file:
            read = _read_zip if file.read(4) == b"PK\x03\x04" else _read_legacy
            file.seek(0)
            root, storages = read(file)
        if isinstance(root, dict) and "model" in root:
            root = root["model"]
        names = {}
        if isinstance(root, dict):
            names = {name: value for name, value in root.items() if isinstance(value, _Tensor)}
        else:
            _walk(root, "", names, 0)
        if not names or not all(type(name) is str for name in names):
            raise Refused("holds no module with parameters; expected {'model': module}")
        views = {name: _view(name, claim, storages) for name, claim in names.items()}
        if sum(view.numel() * view.itemsize for view in views.values()) > MAX_BYTES:
            raise Refused(f"claims more than {MAX_BYTES >> 30} GiB of tensors")
        return {name: view.clone(memory_format=torch.contiguous_format)
                for name, view in views.items()}
    except OSError as error:
        raise utils.errors.UserError(f"{path}: cannot be read ({error.strerror})") from None
    except Exception as error:
        # A damaged or forged pickle or zip can fail in any way (KeyError, MemoryError ...).
        reason = error if isinstance(error, Refused) else f"is damaged or forged ({_short(error)})"
        raise utils.errors.UserError(
            f"{path}: {reason}. Nothing in it was run; give a checkpoint as it was released"
        ) from None


def _read_zip(file):
    """-> (root object, dict storage key -> bytearray) of torch.save's format since 1.6."""
    with zipfile.ZipFile(file) as archive:
        infos = archive.infolist()
        sizes = {info.filename: info.file_size for info in infos}
        pickles = [name for name in sizes if re.fullmatch(r"[^/]+/data\.pkl", name)]
        if len(sizes) < len(infos) or len(pickles) != 1:
            raise Refused("is a zip file, but not one that torch.save wrote")
        if sum(sizes.values()) > MAX_BYTES:
            raise Refused(f"would unpack to more than {MAX_BYTES >> 30} GiB")
        if any(info.compress_type != zipfile.ZIP_STORED for info in infos):
            # Stored records cannot be larger than the file: no zip bomb.
            raise Refused("has compressed records, which torch.save never writes")
        folder = pickles[0][:-len("data.pkl")]
        if folder + "byteorder" in sizes and archive.read(folder + "byteorder") != b"little":
            raise Refused("was saved on a big-endian machine, which is not supported")
        root, claims = _unpickle(io.BytesIO(archive.read(pickles[0])))
        return root, {key: bytearray(archive.read(f"{folder}data/{key}")) for key in claims
                      if f"{folder}data/{key}" in sizes}


def _read_legacy(file):
    """-> (root object, dict storage key -> bytearray) of the format before 1.6: five pickles
    (magic, version, machine, object, storage keys), then each storage as a count and numbers.
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
    root, claims = _unpickle(stream)
    keys, _ = _unpickle(stream)
    if type(keys) is not list or not all(type(key) is str and key in claims for key in keys):
        raise Refused("lists storages that no tensor uses")
    storages = {}
    for key in keys:
        count, length = stream.read(8), claims[key].count * claims[key].dtype.itemsize
        storages[key] = bytearray(stream.read(length))
        # Also of storages that no parameter uses: which one a file ends with is chance.
        if count != claims[key].count.to_bytes(8, "little") or len(storages[key]) != length:
            raise Refused(f"is truncated or damaged: storage {_short(key)} has another size")
    return root, storages


def _unpickle(stream):
    """The next pickle of a BytesIO, read inertly -> (object, dict storage key -> _Storage); leaves
    the stream behind it.
    """
    start = stream.tell()
    for count, (opcode, argument, place) in enumerate(pickletools.genops(stream)):
        if opcode.name in FORBIDDEN_OPCODES:
            raise Refused(f"uses the pickle opcode {opcode.name}, which torch.save never does")
        if opcode.name.endswith("PUT") and argument > count:
            # Pickle's memo is an array: a large index alone would allocate gigabytes.
            raise Refused("has a damaged pickle (memo index)")
        if place - start > MAX_PICKLE_BYTES:
            raise Refused(f"has a pickle over {MAX_PICKLE_BYTES >> 20} MiB")
    stream.seek(start)
    unpickler = _Unpickler(stream)
    return unpickler.load(), unpickler.claims


def _walk(record, prefix, names, depth):
    """Adds to `names` what state_dict() of the recorded torch module would hold."""
    if depth > MAX_NESTING:
        raise Refused(f"nests modules more than {MAX_NESTING} deep")
    state = record.state if isinstance(record, Record) else None
    if not isinstance(state, dict):
        raise Refused(f"has no module at {_short(prefix or 'its root')}")
    parts = [state.get(key, {}) for key in ("_parameters", "_buffers", "_modules")]
    hidden = state.get("_non_persistent_buffers_set", [])
    if not all(isinstance(part, dict) for part in parts) or not isinstance(hidden, (list, set)):
        raise Refused(f"has no module at {_short(prefix or 'its root')}")
    for part in parts:
        for key, value in part.items():
            name = f"{prefix}{key}"
            if type(key) is not str or name in names:
                raise Refused(f"has a bad or repeated name {_short(name)}")
            if value is None or part is parts[1] and key in hidden:
                continue
            if part is parts[2]:
                _walk(value, name + ".", names, depth + 1)
            elif isinstance(value, _Tensor):
                names[name] = value
            else:
                raise Refused(f"has no tensor at {_short(name)}")


def _view(name, claim, storages):
    """The tensor that a claim stands for, as a view of its storage's bytes: no memory yet."""
    (dtype, key, count), offset, size, stride = claim
    data = storages.get(key, b"")
    if len(data) != count * dtype.itemsize:
        raise Refused(f"is truncated or damaged: {_short(name)} needs {count} numbers of {dtype}, "
                      f"found {len(data)} bytes")
    # Stride 0 could claim any size from one number, hence the test of the product as well.
    if type(size) is not tuple or type(stride) is not tuple or len(size) > 8 or not all(
            type(number) is int for number in (offset, *size, *stride)) or math.prod(size) > count:
        raise Refused(f"has a tensor {_short(name)} of a bad size, stride or offset")
    try:
        numbers = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        return numbers.as_strided(size, stride, offset)
    except (RuntimeError, ValueError):
        raise Refused(f"has a tensor {_short(name)} that reaches outside its storage") from None


def _short(text):
    """Text of the file, safe to print on one line."""
    text = str(text)
    return (text if len(text) <= 80 else text[:77] + "...").encode(
        "unicode_escape").decode("ascii")


# Released names -> ours, applied in this order. The heads are single convolutions.
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


def map_irnet(released, state):
    """Released IRNet tensors (from `read_released`) -> (dict in the names of our model, list of
    released names left out). `state` is our model's state_dict, `backbone.*` and `head.*`. Heads
    of another size are left out; floats become float32. UserError unless the backbone fits.
    """
    mapped, left_out = {}, []
    for name, tensor in released.items():
        ours = name
        for pattern, replacement in RENAMES:
            ours = re.sub(pattern, replacement, ours)
        expected = state.get(ours)
        if expected is not None and tensor.shape == expected.shape:
            mapped[ours] = tensor.float() if tensor.is_floating_point() else tensor
        elif ours.startswith("backbone."):
            wanted = "nothing" if expected is None else tuple(expected.shape)
            raise utils.errors.UserError(
                f"released weights: {name} is {tuple(tensor.shape)}, this model expects {wanted} "
                "there; choose the IRNet depth of the file, with activation prelu")
        else:
            left_out.append(name)
    for name, expected in state.items():
        if name.startswith("backbone.") and name not in mapped:
            raise utils.errors.UserError(
                f"released weights: nothing in them for {name} {tuple(expected.shape)}; choose "
                "the IRNet depth of the file, with activation prelu")
    return mapped, left_out
