"""Reader of released PIPNet checkpoints: plain, damaged and hostile files.

The released files are not part of the repository. The tests save modules with the same names and
shapes (irnet_checkpoint_keys.json) under classes that no longer exist when the file is read.
"""

import argparse
import collections
import contextlib
import copyreg
import io
import json
import math
import pathlib
import pickle
import struct
import sys
import types
import zipfile

import numpy
import pytest
import torch

from nets import irnet, released
from utils.errors import UserError

KEYS = json.loads((pathlib.Path(__file__).parent / "irnet_checkpoint_keys.json").read_text())
HEADS = ("score", "offset_x", "offset_y", "neighbor_x", "neighbor_y")


pytestmark = [pytest.mark.filterwarnings(f"ignore:{start}") for start in (
    "Couldn't retrieve source code", "`torch.jit")]


def imported():
    """Names of the imported modules, without the text codecs that zipfile and pickle use."""
    return {name for name in sys.modules if not name.startswith("encodings.")}


@pytest.fixture
def publisher():
    """Saves under classes of the module nets.nn, which exists only while saving."""
    module = types.ModuleType("nets.nn")
    for name in ("Conv", "Residual", "PIPNet"):
        setattr(module, name, type(name, (torch.nn.Module,), {"__module__": "nets.nn"}))

    def save(model, path, **options):
        sys.modules["nets.nn"] = module
        try:
            torch.save(model, path, **options)
        finally:
            del sys.modules["nets.nn"]
        return path

    return types.SimpleNamespace(classes=module, save=save)


def fake(shapes, classes):
    """A module tree with the names and shapes of a json entry and random contents."""
    def build(prefix):
        inner = {name[len(prefix):].split(".")[0]: None for name in shapes
                 if name.startswith(prefix)}
        if prefix + "running_mean" in shapes:
            return torch.nn.BatchNorm2d(*shapes[prefix + "weight"])
        if "weight" in inner:
            shape = shapes[prefix + "weight"]
            if len(shape) == 1:
                return torch.nn.PReLU(*shape)
            return torch.nn.Conv2d(shape[1], shape[0], shape[2], bias="bias" in inner)
        if all(name.isdigit() for name in inner):
            return torch.nn.Sequential(*(build(f"{prefix}{name}.") for name in inner))
        kind = classes.PIPNet if not prefix else (
            classes.Conv if "norm" in inner else classes.Residual)
        node = kind()
        for name in inner:
            node.add_module(name, build(f"{prefix}{name}."))
        return node

    with torch.device("meta"):
        model = build("")
    model.to_empty(device="cpu")
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape))
        else:
            tensor.fill_(7)
    # The released modules have these plain attributes too.
    model.args = argparse.Namespace(input_size=256, local_rank=0)
    model.params = {"num_lms": 68, "num_nb": 10, "flip_index": [17, 16]}
    model.mean_indices = [numpy.arange(10), numpy.arange(10)]
    model.max_len = numpy.int64(22)
    return model


def assert_same(tensors, state):
    """Same names in the same order, same kinds, same values."""
    assert list(tensors) == list(state)
    for name, tensor in tensors.items():
        assert tensor.dtype == state[name].dtype, name
        assert torch.equal(tensor, state[name]), name


@pytest.mark.parametrize("depth", [
    18, *(pytest.param(depth, marks=pytest.mark.slow) for depth in (50, 100))])
def test_names_shapes_and_values_are_read_without_the_classes(depth, publisher, tmp_path):
    shapes = KEYS[f"IRNet{depth}"]
    model = fake(shapes, publisher.classes).half()
    path = publisher.save({"model": model}, tmp_path / "IR.pth")
    modules, state = imported(), torch.get_rng_state()
    tensors = released.read_released(path)
    assert imported() == modules
    assert torch.equal(torch.get_rng_state(), state)
    assert {name: list(tensor.shape) for name, tensor in tensors.items()} == shapes
    assert_same(tensors, model.state_dict())


def small(classes):
    """A tree of few weights with a shared, a strided, a hidden and an absent tensor."""
    model = classes.PIPNet()
    model.body = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.BatchNorm2d(3))
    model.turned = torch.nn.Parameter(torch.rand(4, 6).t()[1:])
    model.again = model.body[0]
    model.register_buffer("hidden", torch.zeros(2), persistent=False)
    model.register_parameter("absent", None)
    model.register_buffer("empty", torch.zeros(0, 3))
    model.register_buffer("view", torch.arange(10)[3:7])
    return model


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("form", ["dict", "bare", "parallel", "state_dict", "state_dict in dict"])
def test_file_contents_and_formats(form, legacy, publisher, tmp_path):
    model = small(publisher.classes)
    model.slopes = torch.nn.PReLU(4)
    if form == "parallel":
        model = torch.nn.DataParallel(model)
    content = {"dict": {"epoch": 3, "model": model}, "bare": model, "parallel": {"model": model},
               "state_dict": model.state_dict(),
               "state_dict in dict": {"model": model.state_dict()}}[form]
    path = publisher.save(content, tmp_path / "x.pth", _use_new_zipfile_serialization=not legacy)
    assert_same(released.read_released(path), model.state_dict())


def test_newer_pickle_protocols(publisher, tmp_path):
    model = small(publisher.classes)
    for protocol in (3, 4, 5):
        path = publisher.save({"model": model}, tmp_path / "x.pth", pickle_protocol=protocol)
        assert_same(released.read_released(path), model.state_dict())


def test_all_dtypes(tmp_path):
    state = {str(kind): torch.arange(3).to(kind) for kind in released.STORAGES.values()}
    torch.save({"model": state}, tmp_path / "x.pth")
    assert_same(released.read_released(tmp_path / "x.pth"), state)


def model_state(depth, points=68, neighbours=10, activation="prelu"):
    """state_dict of backbone and heads as nets/model.py names them."""
    with torch.device("meta"):
        model = torch.nn.ModuleDict({
            "backbone": irnet.IRNet(depth, activation),
            "head": torch.nn.ModuleDict({
                name: torch.nn.Conv2d(512, points * (neighbours if "neigh" in name else 1), 1)
                for name in ("score", "offset_x", "offset_y", "neighbour_x", "neighbour_y")})})
    return model.state_dict()


def tensors_of(depth):
    """What read_released returns for a file of this depth, as meta tensors."""
    return {name: torch.empty(shape, device="meta", dtype=torch.half if shape else torch.int64)
            for name, shape in KEYS[f"IRNet{depth}"].items()}


@pytest.mark.parametrize("depth", [18, 50, 100])
def test_every_released_name_is_mapped(depth):
    state = model_state(depth)
    mapped, left_out = released.map_irnet(tensors_of(depth), state)
    assert set(mapped) == set(state)
    assert not left_out
    for name, tensor in mapped.items():
        assert tensor.shape == state[name].shape
        assert tensor.dtype == state[name].dtype


def test_mapped_weights_compute_what_the_released_network_does(publisher):
    torch.manual_seed(0)
    model = fake(KEYS["IRNet18"], publisher.classes).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 4:
                parameter.sub_(0.5).mul_(math.sqrt(24 / parameter[0].numel()))

    def layer(conv, x, stride):
        weight = conv.conv.weight
        x = torch.nn.functional.conv2d(x, weight, None, stride, weight.shape[-1] // 2)
        x = conv.norm(x)
        return conv.relu(x) if "relu" in conv._modules else x

    def network(x):
        """IRNet with the released parameter names."""
        x = layer(model.p1[0], x, 2)
        for stage in (model.p2, model.p3, model.p4, model.p5):
            for index, block in enumerate(stage):
                stride = 2 if index == 0 else 1
                branch = layer(block.conv2[1], block.conv2[0](x), 1)
                branch = layer(block.conv2[2], branch, stride)
                wider = "conv1" in block._modules
                x = branch + (layer(block.conv1, x, stride) if wider else
                              x[..., ::stride, ::stride])
        return x

    with torch.device("meta"):
        backbone = irnet.IRNet(18).eval()
    prefixed = {f"backbone.{name}": value for name, value in backbone.state_dict().items()}
    mapped, left_out = released.map_irnet(model.state_dict(), prefixed)
    backbone.load_state_dict({name.removeprefix("backbone."): v for name, v in mapped.items()},
                             assign=True)
    assert {name.split(".")[0] for name in left_out} == set(HEADS)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = network(x)
        torch.testing.assert_close(backbone(x)[-1], expected)
    assert expected.std() > 0.01


@pytest.mark.parametrize(("points", "neighbours", "left"), [
    (98, 10, HEADS), (68, 5, ("neighbor_x", "neighbor_y"))])
def test_heads_of_another_size_are_left_out(points, neighbours, left):
    mapped, left_out = released.map_irnet(tensors_of(18), model_state(18, points, neighbours))
    assert left_out == [f"{head}.{kind}" for head in left for kind in ("weight", "bias")]
    assert sum(name.startswith("head.") for name in mapped) == 10 - len(left_out)


@pytest.mark.parametrize(("file", "model", "words"), [
    (18, model_state(50), ["backbone.stages.0.2.norm.weight", "(64,)"]),
    (50, model_state(18), ["p2.2.conv2.0.weight", "(64,)", "nothing"]),
    (18, model_state(18, activation="relu"), ["p1.0.relu.weight", "(64,)", "prelu"])])
def test_another_backbone_is_refused_with_its_first_key(file, model, words):
    with pytest.raises(UserError) as caught:
        released.map_irnet(tensors_of(file), model)
    assert all(word in str(caught.value) for word in words)


def test_another_shape_is_refused_with_both_shapes():
    tensors = tensors_of(18)
    tensors["p3.0.conv1.conv.weight"] = torch.empty(96, 64, 1, 1)
    with pytest.raises(UserError, match=r"p3\.0\.conv1\.conv\.weight.*\(96, 64.*\(128, 64"):
        released.map_irnet(tensors, model_state(18))


# Hostile files. TRIPPED grows if anything in the file runs.

TRIPPED = []
LEGACY_HEADER = (torch.serialization.MAGIC_NUMBER, torch.serialization.PROTOCOL_VERSION,
                 {"little_endian": True})


def trip(*_, **__):
    """A function that a hostile file tries to run."""
    TRIPPED.append(True)


class Tripwire:
    """Every method through which pickle can run a class's code."""

    def __new__(cls, *_):
        trip()
        return object.__new__(cls)

    def __init__(self, *_):
        trip()

    def __setstate__(self, state):
        trip()


class Calls:
    """Pickles as a call of `function(*arguments)`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def text(value):
    """BINUNICODE of a short text."""
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def refused(path):
    """Assert that a file is refused in one line and nothing ran; the message without the path."""
    TRIPPED.clear()
    modules = imported()
    with pytest.raises(UserError) as caught:
        released.read_released(path)
    message = str(caught.value)
    assert not TRIPPED
    assert imported() == modules
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert len(message) < 600
    return message.removeprefix(f"{path}: ")


def zip_of(path, pickled, records=None, compression=zipfile.ZIP_STORED):
    """A zip in the layout of torch.save, with any pickle."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        for key, value in (records or {"data/0": bytes(16)}).items():
            archive.writestr(f"archive/{key}", value)
    return path


HERE = __name__.encode()
CALLS = {
    "os.system": pickle.dumps({"model": Calls(__import__("os").system, "true")}, 2),
    "posix.system by text": b"\x80\x02cposix\nsystem\nX\x04\0\0\0true\x85R.",
    "builtins.eval": b"\x80\x02c__builtin__\neval\n" + text("1") + b"\x85R.",
    "builtins.exec": b"\x80\x02cbuiltins\nexec\n" + text("1") + b"\x85R.",
    "getattr": pickle.dumps(Calls(getattr, "", "join"), 4),
    "a function of ours": pickle.dumps({"model": Calls(trip)}, 2),
    "a class of ours": pickle.dumps({"model": Calls(Tripwire)}, 2),
    "a dotted name": pickle.dumps(0, 4)[:2] + b"\x8c" + bytes([len(HERE)]) + HERE
    + b"\x8c\x0dTRIPPED.clear\x93)R.",
    "a module's import": b"\x80\x02cthis\ns\n)R.",
    "torch's own loader": pickle.dumps(Calls(torch.load, "x"), 2),
    "a type made by a call": b"\x80\x02c__builtin__\ntype\n" + text("T") + b")}\x87R.",
    "a tensor with a hook": b"\x80\x02ctorch._utils\n_rebuild_parameter\nc" + HERE
    + b"\ntrip\n)R\x88)\x87R.",
    "a call of a result": b"\x80\x02ccollections\nOrderedDict\n)R)R.",
}


@pytest.mark.parametrize("name", CALLS)
def test_a_file_that_calls_is_refused(name, tmp_path):
    message = refused(zip_of(tmp_path / "x.pth", CALLS[name]))
    assert message.startswith("calls ") or name == "a call of a result"
    if name in ("builtins.exec", "posix.system by text"):
        assert name.split()[0] in message


def test_objects_from_the_extension_registry_are_refused(tmp_path):
    # Once loaded, such an object stays in a cache that bypasses find_class.
    copyreg.add_extension(__name__, "trip", 0x77)
    try:
        call = b"\x80\x02\x82\x77)R."
        pickle.loads(call)
        assert TRIPPED
        assert "EXT1" in refused(zip_of(tmp_path / "x.pth", call))
    finally:
        copyreg.remove_extension(__name__, "trip", 0x77)


NAMED = b"\x80\x02c" + HERE + b"\nTripwire\n"
FORGED = {
    "new object of a class": NAMED + b")\x81}b.",
    "new object with arguments": b"\x80\x04\x8c" + bytes([len(HERE)]) + HERE
    + b"\x8c\x08Tripwire\x93)}\x92.",
    "instance opcode": b"(i" + HERE + b"\nTripwire\n.",
    "object opcode": b"(c" + HERE + b"\nTripwire\no.",
    "extension registry": b"\x82\x01.",
    "text persistent id": b"Pos.system\n.",
    "state of a class": NAMED + b"}" + text("path") + text("torch.Size") + b"sb.",
    "slots of a builder": b"\x80\x02ctorch._utils\n_rebuild_parameter\nN}" + text("path")
    + text("x") + b"s\x86b.",
    "huge memo index": b"\x80\x02}r\xff\xff\xff\x7f.",
    "huge text": b"\x80\x04\x8d" + struct.pack("<Q", 2 ** 40) + b"x.",
    "huge bytes": b"\x80\x04\x8e" + struct.pack("<Q", 2 ** 62) + b"x.",
    "huge frame": b"\x80\x04\x95" + struct.pack("<Q", 2 ** 50) + b"N.",
    "huge number text": b"L" + b"9" * 10 ** 5 + b"L\n.",
    "nothing": b"",
    "no end": b"\x80\x02}q\0",
    "no pickle": b"\xff\xfe\xfd",
    "stack underflow": b"\x80\x02u.",
    "number": b"\x80\x02K\x05.",
    "empty dict": b"\x80\x02}.",
    "name with a line break": b"\x80\x02ctorch\x1b[31m\nx\n)R.",
}


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_pickle_is_refused(name, tmp_path):
    message = refused(zip_of(tmp_path / "x.pth", FORGED[name]))
    assert "\x1b" not in message


class PersistentId:
    """Pickles as the given persistent id."""

    def __init__(self, pid):
        self.pid = pid


def dump(content):
    """Pickle `content`, each PersistentId in it as one."""
    stream = io.BytesIO()
    pickler = type("P", (pickle.Pickler,), {
        "persistent_id": lambda _, item: item.pid if isinstance(item, PersistentId) else None})
    pickler(stream, 2).dump(content)
    return stream.getvalue()


def tensor_file(path, pid=None, offset=0, size=(4,), stride=(1,), records=None):
    """A file with one float tensor `w`, whose storage has 4 numbers of record data/0."""
    if pid is None:
        pid = ("storage", torch.FloatStorage, "0", "cpu", 4)
    tensor = Calls(torch._utils._rebuild_tensor_v2, PersistentId(pid), offset, size, stride, False,
                   collections.OrderedDict())
    return zip_of(path, dump({"model": {"w": tensor}}), records)


def test_the_unmodified_tensor_file_is_read(tmp_path):
    data = numpy.arange(4, dtype="float32").tobytes()
    path = tensor_file(tmp_path / "x.pth", size=(2, 2), stride=(1, 2), records={"data/0": data})
    assert released.read_released(path)["w"].tolist() == [[0, 2], [1, 3]]


@pytest.mark.parametrize("view", [
    {"size": (5,)}, {"offset": 1}, {"stride": (2,)}, {"offset": -1}, {"stride": (-1,)},
    {"size": (-4,)}, {"size": (2 ** 40,), "stride": (0,)}, {"size": (2, 4), "stride": (0, 1)},
    {"size": (2, 2)}, {"size": (2.0,)}, {"size": (True,)}, {"size": [4]}, {"offset": None},
    {"size": (2 ** 30, 2 ** 30), "stride": (0, 0)}, {"offset": 2 ** 70}, {"size": 4},
    {"size": (1,) * 9, "stride": (1,) * 9}])
def test_a_view_outside_its_storage_is_refused(view, tmp_path):
    assert "tensor" in refused(tensor_file(tmp_path / "x.pth", **view))


@pytest.mark.parametrize("pid", [
    ("storage", torch.FloatStorage, "0", "cpu", 5), ("storage", torch.FloatStorage, "0", "cpu", 3),
    ("storage", torch.FloatStorage, "0", "cpu", 2 ** 60),
    ("storage", torch.DoubleStorage, "0", "cpu", 4),
    ("storage", torch.FloatStorage, "1", "cpu", 4),
    ("storage", torch.FloatStorage, "../data.pkl", "cpu", 4),
    ("storage", torch.FloatStorage, 0, "cpu", 4), ("storage", torch.FloatStorage, "0", "cpu", -4),
    ("storage", torch.FloatStorage, "0", "cpu", "4"), ("storage", Tripwire, "0", "cpu", 4),
    ("storage", "FloatStorage", "0", "cpu", 4), ("storage", torch.FloatStorage, "0", "cpu"),
    ("storage", torch.FloatStorage, "0", "cpu", 4, ("v", 0, 4)), ("module", "os", "x", "y"),
    ("module", torch.FloatStorage, "x", "y"), ("other",), ("",), "0", 0])
def test_a_wrong_persistent_id_is_refused(pid, tmp_path):
    refused(tensor_file(tmp_path / "x.pth", pid=pid))


def test_many_tensors_of_one_storage_are_refused_before_memory_is_allocated(tmp_path, monkeypatch):
    monkeypatch.setattr(released, "MAX_BYTES", 4000)
    storage = PersistentId(("storage", torch.FloatStorage, "0", "cpu", 100))
    tensors = {str(i): Calls(torch._utils._rebuild_tensor_v2, storage, 0, (100,), (1,), False, {})
               for i in range(11)}
    path = zip_of(tmp_path / "x.pth", dump(tensors), {"data/0": bytes(400)})
    assert "declares more than" in refused(path)


def test_recursive_modules_are_refused(tmp_path):
    loop = torch.nn.Sequential(torch.nn.Linear(1, 1))
    loop._modules["1"] = loop
    torch.save({"model": loop}, tmp_path / "x.pth")
    assert "deep" in refused(tmp_path / "x.pth")


@pytest.mark.parametrize("legacy", [False, True])
def test_a_truncated_file_is_refused_wherever_it_ends(legacy, publisher, tmp_path):
    whole = publisher.save({"model": small(publisher.classes)}, tmp_path / "x.pth",
                           _use_new_zipfile_serialization=not legacy).read_bytes()
    cut = tmp_path / "cut.pth"
    for length in [0, 1, 3, 4, 50, *range(100, len(whole), 397), len(whole) - 1]:
        cut.write_bytes(whole[:length])
        refused(cut)


@pytest.mark.parametrize("last", ["empty", "hidden"])
def test_a_truncated_legacy_file_with_an_unused_end_is_refused(last, publisher, tmp_path):
    model = publisher.classes.PIPNet()
    model.register_parameter("weight", torch.nn.Parameter(torch.rand(2)))
    # Storages are in the order of their addresses, so that one of these is almost surely the last.
    for number in range(9):
        model.register_buffer(f"{last}{number}", torch.zeros(0 if last == "empty" else 2),
                              persistent=False)
    whole = publisher.save(model, tmp_path / "x.pth",
                           _use_new_zipfile_serialization=False).read_bytes()
    cut = tmp_path / "cut.pth"
    for length in range(len(whole) - 40, len(whole)):
        cut.write_bytes(whole[:length])
        refused(cut)


@pytest.mark.parametrize("legacy", [False, True])
def test_damaged_bytes_never_run_or_crash(legacy, publisher, tmp_path):
    whole = publisher.save({"model": small(publisher.classes)}, tmp_path / "x.pth",
                           _use_new_zipfile_serialization=not legacy).read_bytes()
    generator = numpy.random.default_rng(0)
    path = tmp_path / "damaged.pth"
    for _ in range(150):
        data = bytearray(whole)
        for place in generator.integers(0, len(data), 4):
            data[place] = generator.integers(256)
        path.write_bytes(data)
        modules = imported()
        with contextlib.suppress(UserError):
            released.read_released(path)
        assert imported() == modules


def test_a_legacy_file_that_calls_is_refused(tmp_path):
    path = tmp_path / "x.pth"
    parts = [*LEGACY_HEADER, {"model": Calls(trip)}, []]
    path.write_bytes(b"".join(pickle.dumps(part, 2) for part in parts))
    assert "calls" in refused(path)


@pytest.mark.parametrize("place", [0, 1, 2, 4])
def test_a_call_in_any_pickle_of_a_legacy_file_does_not_run(place, tmp_path):
    path = tmp_path / "x.pth"
    parts = [*LEGACY_HEADER, {}, []]
    parts[place] = Calls(trip)
    path.write_bytes(b"".join(pickle.dumps(part, 2) for part in parts))
    refused(path)


def test_a_zip_bomb_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
        archive.writestr("archive/data/0", bytes(10 ** 7))
    assert "compressed" in refused(tmp_path / "x.pth")


def test_a_zip_with_too_large_records_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(released, "MAX_BYTES", 900)
    path = zip_of(tmp_path / "x.pth", b"\x80\x02}.", {"data/0": bytes(100)})
    data = path.read_bytes()
    directory = data.rindex(b"PK\x01\x02")
    path.write_bytes(data[:directory + 24] + struct.pack("<I", 2 ** 32 - 2)
                     + data[directory + 28:])
    assert "unpack to more than" in refused(path)


def test_other_files_are_refused_with_their_kind(tmp_path):
    path = tmp_path / "x.pth"
    path.write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "neither a zip file" in refused(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert "not one that torch.save wrote" in refused(path)
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), path)
    refused(path)
    zip_of(path, b"\x80\x02}.", {"byteorder": b"big"})
    assert "big-endian" in refused(path)
    assert "cannot be read" in refused(tmp_path / "absent.pth")
    assert "cannot be read" in refused(tmp_path)


def test_the_pickle_size_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(released, "MAX_PICKLE_BYTES", 1000)
    path = zip_of(tmp_path / "x.pth", pickle.dumps({"model": "x" * 1000}, 2))
    assert "pickle over" in refused(path)
    # The limit applies before the end of the pickle is found.
    assert "pickle over" in refused(zip_of(path, b"\x80\x02" + b"N0" * 1000))
