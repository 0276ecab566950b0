"""Reads the IRNet checkpoints that PIPNet repositories release (IR18.pth and the like: a whole
pickled module) without running anything in them, and maps them to our names.

`torch.load` would import and call whatever such a file names. Here every name in the file becomes
an inert `Record` class; creating one stores nothing but its state, calling one is refused unless
`BUILDERS` has our own stand-in for it. No module that the file names is ever imported."""

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

# torch.serialization: the first two pickles of a file in the format before torch 1.6.
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_VERSION = 1001

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

    def __new__(cls, *_):
        """Pickle's way to create an object without calling its class."""
        record = object.__new__(cls)
        record.state = {}
        return record

    def __setstate__(self, state):
        self.state = state


class _Ordered(dict):
    """Stands for collections.OrderedDict; a saved state_dict has attributes, which are dropped."""

    def __setstate__(self, state):
        pass


class _Storage:
    """A claim on the file: `count` numbers of `dtype` in the record `key`; read on first use."""

    def __init__(self, dtype, key, count):
        self.dtype, self.key, self.count = dtype, key, count


class _Tensor:
    """A claimed view of a storage, checked when the tensor is made."""

    def __init__(self, storage, offset, size, stride):
        self.storage, self.offset, self.size, self.stride = storage, offset, size, stride


def _build_tensor(storage, offset, size, stride, *_):
    if not isinstance(storage, _Storage):
        raise Refused("has a tensor without a storage")
    return _Tensor(storage, offset, size, stride)


def _build_parameter(tensor, *_):
    return tensor


def _build_list(items=()):
    if type(items) is not list:
        raise Refused("has a set that is not made from a list")
    return items


def _build_nothing(*_):
    return Record.__new__(Record)


# numpy arrays and the like hang on released modules as plain attributes that nothing here reads.
_UNREAD = ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct",
           "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy.dtype",
           "_codecs.encode", "torch.Size", "torch.device")

BUILDERS = {
    "torch._utils._rebuild_tensor_v2": _build_tensor,
    "torch._utils._rebuild_parameter": _build_parameter,
    "collections.OrderedDict": _Ordered,
    # A set stays a list: hashing what a file holds can be made to take forever.
    "__builtin__.set": _build_list,
    "builtins.set": _build_list,
    **dict.fromkeys(_UNREAD, _build_nothing),
}


class _Unpickler(pickle.Unpickler):
    """Pickle's machine with every way out closed: names are Records, persistent ids are checked.
    `claims` gathers storage key -> _Storage."""

    def __init__(self, stream):
        super().__init__(stream)
        self.classes = {}
        self.claims = {}

    def find_class(self, module, name):
        """The Record class for `module.name`; imports nothing."""
        path = f"{module}.{name}"
        if path not in self.classes:
            self.classes[path] = _Name("Record", (Record,), {"path": path})
        return self.classes[path]

    def persistent_load(self, claim):
        """('storage', class, key, device, count[, view]) -> _Storage; the format before torch 1.6
        also wraps a module's class as ('module', class, source file, source)."""
        if type(claim) is not tuple:
            raise Refused(f"has a persistent id of type {type(claim).__name__}")
        if len(claim) == 4 and claim[0] == "module" and isinstance(claim[1], _Name):
            return claim[1]
        if len(claim) not in (5, 6) or claim[0] != "storage" or claim[5:] not in ((), (None,)):
            raise Refused("has a persistent id that is no plain storage")
        _, kind, key, _, count = claim[:5]
        module, _, name = getattr(kind, "path", "").rpartition(".")
        if module not in ("torch", "torch.cuda") or name not in STORAGES:
            raise Refused(f"has a storage of unknown kind {_short(getattr(kind, 'path', kind))}")
        if type(key) is not str or not key.isdecimal() or type(count) is not int or count < 0:
            raise Refused("has a storage with a bad key or size")
        self.claims[key] = _Storage(STORAGES[name], key, count)
        return self.claims[key]


def read_released(path):
    """The checkpoint `path` of a PIPNet repository -> dict: parameter or buffer name -> tensor,
    in the file's own precision, as `module.state_dict()` would give. Takes {'model': module}, a
    bare module or a state_dict, in both of torch.save's formats. Runs nothing in the file.
    UserError if it is damaged, calls anything, or holds no parameters."""
    try:
        if pathlib.Path(path).stat().st_size > MAX_BYTES:
            raise Refused(f"is larger than {MAX_BYTES >> 30} GiB, no IRNet is")
        with open(path, "rb") as file:
            zipped = file.read(4) == b"PK\x03\x04"
        root, storages = _read_zip(path) if zipped else _read_legacy(path)
        if isinstance(root, dict) and "model" in root:
            root = root["model"]
        names = {}
        if isinstance(root, dict):
            names = {name: value for name, value in root.items() if isinstance(value, _Tensor)}
        else:
            _walk(root, "", names, 0)
        if not names or not all(type(name) is str for name in names):
            raise Refused("holds no module with parameters; expected {'model': module}")
        if sum(_claimed_bytes(claim) for claim in names.values()) > MAX_BYTES:
            raise Refused(f"claims more than {MAX_BYTES >> 30} GiB of tensors")
        return {name: _tensor(name, claim, storages) for name, claim in names.items()}
    except OSError as error:
        raise utils.errors.UserError(f"{path}: cannot be read ({error.strerror})") from None
    except Refused as reason:
        raise utils.errors.UserError(
            f"{path}: {reason}. Nothing in it was run; give a checkpoint as it was released"
        ) from None


def _read_zip(path):
    """-> (root object, dict storage key -> bytearray) of torch.save's format since 1.6."""
    try:
        with zipfile.ZipFile(path) as archive:
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
            if sizes.get(folder + "byteorder", 0) > 6:
                raise Refused("has a bad byteorder record")
            if folder + "byteorder" in sizes and archive.read(folder + "byteorder") != b"little":
                raise Refused("was saved on a big-endian machine, which is not supported")
            if sizes[pickles[0]] > MAX_PICKLE_BYTES:
                raise Refused(f"has a pickle over {MAX_PICKLE_BYTES >> 20} MiB")
            root, claims = _unpickle(io.BytesIO(archive.read(pickles[0])))
            records = {key: f"{folder}data/{key}" for key in claims}
            return root, {key: bytearray(archive.read(name))
                          for key, name in records.items() if name in sizes}
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        raise Refused(f"is a damaged or truncated zip file ({_short(error)})") from None


def _read_legacy(path):
    """-> (root object, dict storage key -> bytearray) of the format before 1.6: five pickles
    (magic, version, machine, object, storage keys), then each storage as a count and numbers."""
    stream = io.BytesIO(pathlib.Path(path).read_bytes())
    try:
        magic, _ = _unpickle(stream)
    except Refused:
        magic = None
    if magic != LEGACY_MAGIC:
        raise Refused("is neither a zip file nor a file of torch.save (or it is damaged)")
    if _unpickle(stream)[0] != LEGACY_VERSION:
        raise Refused("is a torch.save file of an unknown version")
    machine, _ = _unpickle(stream)
    if type(machine) is not dict or machine.get("little_endian") is not True:
        raise Refused("was saved on a big-endian machine, which is not supported")
    root, claims = _unpickle(stream)
    keys, _ = _unpickle(stream)
    if type(keys) is not list or not all(type(key) is str and key in claims for key in keys):
        raise Refused("lists storages that no tensor uses")
    storages = {}
    for key in keys:
        count = int.from_bytes(stream.read(8), "little")
        if count != claims[key].count:
            raise Refused(f"is truncated or damaged: storage {_short(key)} has another size")
        storages[key] = bytearray(stream.read(count * claims[key].dtype.itemsize))
    return root, storages


def _unpickle(stream):
    """The next pickle of a BytesIO, read inertly -> (object, dict storage key -> _Storage); leaves
    the stream behind it. Refused if the pickle is damaged or uses what torch.save does not."""
    start = stream.tell()
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
            if opcode.name in FORBIDDEN_OPCODES:
                raise Refused(f"uses the pickle opcode {opcode.name}, which torch.save never does")
            if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and argument > count:
                # Pickle's memo is an array: a large index alone would allocate gigabytes.
                raise Refused("has a damaged pickle (memo index)")
        end = stream.tell()
        if end - start > MAX_PICKLE_BYTES:
            raise Refused(f"has a pickle over {MAX_PICKLE_BYTES >> 20} MiB")
        unpickler = _Unpickler(io.BytesIO(stream.getbuffer()[start:end]))
        return unpickler.load(), unpickler.claims
    except Refused:
        raise
    except Exception as error:
        # A damaged pickle can fail in any way (KeyError, struct.error, MemoryError ...).
        raise Refused(f"has a damaged or forged pickle ({_short(error)})") from None


def _walk(record, prefix, names, depth):
    """Adds to `names` what state_dict() of the recorded torch module would hold."""
    if depth > MAX_NESTING:
        raise Refused(f"nests modules more than {MAX_NESTING} deep")
    if not isinstance(record, Record) or not isinstance(record.state, dict):
        raise Refused(f"has no module at {_short(prefix or 'its root')}")
    parts = [record.state.get(key, {}) for key in ("_parameters", "_buffers", "_modules")]
    hidden = record.state.get("_non_persistent_buffers_set", [])
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


def _claimed_bytes(claim):
    """Bytes of a claimed tensor, after a check that its view lies inside its storage."""
    numbers = (claim.offset, *claim.size, *claim.stride) if (
        type(claim.size) is tuple and type(claim.stride) is tuple) else (None,)
    if not all(type(number) is int and 0 <= number < 2 ** 40 for number in numbers) or (
            len(claim.size) != len(claim.stride) or len(claim.size) > 8):
        raise Refused("has a tensor with a bad size, stride or offset")
    count = math.prod(claim.size)
    last = claim.offset + sum((n - 1) * step for n, step in zip(claim.size, claim.stride))
    # Stride 0 could claim any size from one number, hence the test of the count as well.
    if count > claim.storage.count or count and last >= claim.storage.count:
        raise Refused("has a tensor that reaches outside its storage")
    return count * claim.storage.dtype.itemsize


def _tensor(name, claim, storages):
    """The tensor that a checked claim stands for, in memory of its own."""
    data = storages.get(claim.storage.key)
    expected = claim.storage.count * claim.storage.dtype.itemsize
    if data is None or len(data) != expected:
        raise Refused(f"is truncated or damaged: {_short(name)} needs {expected} bytes, "
                      f"found {0 if data is None else len(data)}")
    if math.prod(claim.size) == 0:
        return torch.empty(claim.size, dtype=claim.storage.dtype)
    view = torch.frombuffer(data, dtype=claim.storage.dtype).as_strided(
        claim.size, claim.stride, claim.offset)
    return view.clone(memory_format=torch.contiguous_format)


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
    of another size are left out; floats become float32. UserError unless the backbone fits."""
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
