"""Augmentation of a batch in torch: equal to that of each face in OpenCV, and its loader."""
import contextlib
import itertools

import numpy
import pytest
import torch

from tools.benchmark.launches import OperationCounter
from utils.args import load_args
from utils.data import augment, batched, cache, dataset, operations, pixel_grid
from utils.errors import UserError
from utils.training.ddp import Ranks
from utils.training.loader import make_loader

STILL = dict.fromkeys(("rotation", "scaling", "shift", "aspect", "flip", "colour", "grey", "blur",
                       "shut", "occlusion"), 0)
MOVED = {"rotation": 40, "scaling": 0.12, "shift": 0.08, "aspect": 0.05, "flip": 0.5}
SIZE = 96


@pytest.fixture(scope="module")
def faces(drawn_set):
    """(PreparedSet, the stored crops of its training list)."""
    prepared = dataset.PreparedSet(drawn_set)
    data = dataset.FaceDataset(prepared.lists["train"], prepared.margin, SIZE)
    return prepared, [data.read(i) for i in range(len(data))]


def draw_params(faces, seeds, **settings):
    """AugmentParams of one face per seed, and the faces' stored crops."""
    prepared, crops = faces
    points = prepared.lists["train"].points
    drawing = augment.Augment(load_args({**STILL, **settings}), prepared.scheme.flip,
                              prepared.scheme)
    chosen = [seed % len(crops) for seed in seeds]
    return [drawing.draw_params(points[i], prepared.margin, crops[i].shape[0], SIZE,
                                numpy.random.default_rng(seed))
            for i, seed in zip(chosen, seeds)], [crops[i] for i in chosen]


def augment_both(params, crops):
    """The images of OpenCV and those of torch, (N, S, S, 3) int each."""
    packed = pixel_grid.Packed(augment.pack_params(params, crops[0].shape[0], SIZE))
    ours = augment.BatchAugment(SIZE)(torch.from_numpy(numpy.stack(crops)),
                                      packed.send(torch.device("cpu")))
    assert ours.dtype == torch.uint8
    assert ours.shape == (len(crops), SIZE, SIZE, 3)
    theirs = [augment.apply_params(face, crop, SIZE) for face, crop in zip(params, crops)]
    return numpy.stack(theirs).astype(int), ours.numpy().astype(int)


@pytest.mark.parametrize("settings", [
    MOVED, {"grey": 1}, {"colour": 1}, {"shut": 1}, {"blur": 1}, {"occlusion": 1},
    {**MOVED, "grey": 0.3, "colour": 0.7, "shut": 0.3, "blur": 0.5, "occlusion": 0.5}],
    ids=lambda settings: "all" if len(settings) > 5 else next(iter(settings)))
def test_images_equal_those_of_opencv_but_for_rounding(faces, settings):
    params, crops = draw_params(faces, range(48), **settings)
    # Noise has other values; a test below compares its distribution.
    kept = [i for i, face in enumerate(params)
            if face.noise is None and (face.occluder is None or face.occluder.seed is None)]
    params, crops = [params[i] for i in kept], [crops[i] for i in kept]
    assert len(kept) > 15
    theirs, ours = augment_both(params, crops)
    off = abs(theirs - ours)
    assert off.mean() < 0.25
    assert numpy.percentile(off, 99.9) <= 4
    assert (off.mean((1, 2, 3)) < 1.0).all(), "a face differs as a whole"


def test_every_operation_is_drawn(faces):
    params, _ = draw_params(faces, range(48), **MOVED, grey=0.5, colour=1, shut=0.5, blur=1,
                            occlusion=1)
    for kind in operations.OPERATIONS:
        assert any(getattr(face, kind) is not None for face in params), kind
    occluders = [face.occluder for face in params]
    for kind in ("colour", "seed", "source"):
        assert any(getattr(occluder, kind) is not None for occluder in occluders), kind


def test_noise_has_the_same_distribution(faces):
    params, crops = draw_params(faces, range(8))
    for face, spread in zip(params, (3, 6, 9, 12, 15, 18, 4, 5)):
        face.noise = spread * 1000, float(spread)
    plain, _ = augment_both(draw_params(faces, range(8))[0], crops)
    changed = augment_both(params, crops)
    # Only where noise is not clipped to 0..255.
    inside = (plain > 80) & (plain < 175)
    for found in changed:
        for i, face in enumerate(params):
            noise = (found - plain)[i][inside[i]]
            assert len(noise) > 500
            assert abs(noise.mean()) < 5 * face.noise[1] / len(noise) ** 0.5 + 0.1
            assert noise.std() == pytest.approx(face.noise[1], rel=0.1)
            assert abs(noise).max() > 2.5 * face.noise[1]
    first, second = (changed[1] - plain)[:2]
    assert abs(numpy.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.05


def test_an_occluder_of_noise_is_uniform_and_at_the_place_of_opencv_s(faces):
    params, crops = draw_params(faces, range(4))
    for i, face in enumerate(params):
        face.occluder = operations.Occluder(10 + i, 20, 40, 30, seed=i)
    theirs, ours = augment_both(params, crops)
    plain, _ = augment_both(draw_params(faces, range(4))[0], crops)
    for i in range(4):
        place = numpy.zeros((SIZE, SIZE), bool)
        place[10 + i:50 + i, 20:50] = True
        assert abs(ours[i] - plain[i])[~place].max() <= 4
        assert (theirs[i] == plain[i])[~place].all()
        for found in (theirs[i][place], ours[i][place]):
            assert abs(found.mean() - 127.5) < 6
            assert abs(found.std() - 73.9) < 4
            assert len(numpy.unique(found)) > 240


def test_an_image_does_not_depend_on_the_others_of_the_batch(faces):
    params, crops = draw_params(faces, range(24), **MOVED, grey=0.3, colour=0.7, shut=0.3, blur=1,
                                occlusion=1)
    _, together = augment_both(params, crops)
    for i in range(24):
        _, alone = augment_both(params[i:i + 1], crops[i:i + 1])
        assert abs(alone[0] - together[i]).max() <= 1


def test_a_crop_may_be_padded_to_a_larger_side(faces):
    params, crops = draw_params(faces, range(6), **MOVED)
    _, expected = augment_both(params, crops)
    wide = [numpy.pad(crop, ((0, 40), (0, 40), (0, 0))) for crop in crops]
    _, found = augment_both(params, wide)
    assert abs(found - expected).max() <= 1


def test_the_loader_gives_the_faces_and_landmarks_of_a_data_loader(faces, tmp_path, capsys):
    prepared = faces[0]
    listed = prepared.lists["train"].select(numpy.arange(20))
    listed.images[7] = tmp_path / "missing.jpg"
    args = load_args({"input_size": 64, "batch_size": 4, "seed": 5, "workers": 0, "blur": 0,
                      "occlusion": 0})
    found = {}
    for args.cache in ("none", "device"):
        loader, sampler = make_loader(listed, prepared, prepared.scheme, args, Ranks(), 1)
        sampler.set_epoch(2)
        assert len(loader) == 5
        found[args.cache] = list(loader)
    assert isinstance(loader, batched.BatchedLoader)
    assert "cache: 20 crops take" in capsys.readouterr().out
    for ours, theirs in zip(found["device"], found["none"], strict=True):
        for a, b in zip(ours[1:], theirs[1:], strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)
        assert ours[0].dtype == torch.uint8
        assert ours[0].shape == theirs[0].shape
        assert (ours[0].int() - theirs[0].int()).abs().float().mean() < 0.3
    assert any(7 in batch[3] for batch in found["device"]), "the missing image must be reported"
    listed.images[:] = [tmp_path / "missing.jpg"] * 20
    with pytest.raises(UserError, match="missing.jpg and all others"):
        next(iter(make_loader(listed, prepared, prepared.scheme, args, Ranks(), 1)[0]))


def test_auto_takes_the_cache_that_fits_and_prints_it(faces, monkeypatch, capsys):
    prepared = faces[0]
    data = dataset.FaceDataset(prepared.lists["train"], prepared.margin, SIZE)
    size = 3 * sum(data.read(i).shape[0] ** 2 for i in range(len(data)))
    assert isinstance(cache.make_cache("auto", data, Ranks()), cache.CropCache)
    assert "MB of memory" in capsys.readouterr().out
    monkeypatch.setattr(cache, "_available", lambda: 2 * size - 1)
    assert cache.make_cache("auto", data, Ranks()) is None
    assert "cache: ram: needs" in capsys.readouterr().out
    monkeypatch.undo()

    def allocate(shape, device, share):
        if share * free < numpy.prod(shape):
            raise UserError("cache: device: needs more; use --cache ram")
        return torch.zeros(shape, dtype=torch.uint8)

    monkeypatch.setattr(cache, "_allocate", allocate)
    ranks, free = Ranks(device=torch.device("cuda", 0)), 4 * size
    assert isinstance(cache.make_cache("auto", data, ranks), cache.DeviceCache)
    free = 4 * size - 4
    assert isinstance(cache.make_cache("auto", data, ranks), cache.CropCache)
    assert "cache: device: needs more; not used" in capsys.readouterr().out
    assert isinstance(cache.make_cache("device", data, ranks), cache.DeviceCache)
    free = size - 1
    with pytest.raises(UserError, match="cache: device: needs more; use --cache ram"):
        cache.make_cache("device", data, ranks)
    assert cache.make_cache("none", data, ranks) is None


def test_a_device_that_is_too_small_is_reported_before_memory_is_taken(faces, monkeypatch):
    data = dataset.FaceDataset(faces[0].lists["train"], faces[0].margin, SIZE)
    monkeypatch.setattr(cache, "_available", lambda: cache.RESERVE + 1000)
    with pytest.raises(UserError, match="cache: device: needs .* GB of cpu's memory are free"):
        cache.make_cache("device", data, Ranks())


@pytest.fixture
def loader(faces):
    """A BatchedLoader of five batches of four faces."""
    prepared = faces[0]
    args = load_args({"input_size": 64, "batch_size": 4, "seed": 5, "workers": 0, "shut": 0.3,
                      "cache": "device"})
    listed = prepared.lists["train"].select(numpy.arange(20))
    found, sampler = make_loader(listed, prepared, prepared.scheme, args, Ranks(), 1)
    sampler.set_epoch(2)
    return found


def test_loader_processes_draw_the_same_batches(faces, loader):
    prepared = faces[0]
    args = load_args({"input_size": 64, "batch_size": 4, "seed": 5, "workers": 2, "shut": 0.3,
                      "cache": "device"})
    listed = prepared.lists["train"].select(numpy.arange(20))
    other, sampler = make_loader(listed, prepared, prepared.scheme, args, Ranks(), 1)
    sampler.set_epoch(2)
    for ours, theirs in zip(other, loader, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a, b)
        # As those of the other loaders, so that convolutions take their fast path.
        assert ours[0].permute(0, 3, 1, 2).is_contiguous(memory_format=torch.channels_last)


def test_a_batch_is_launched_one_ahead_on_its_own_stream(loader, monkeypatch):
    calls, numbers = [], itertools.count(1)

    class Stream:
        """Write down what is asked of a stream."""

        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            calls.append(f"{self.name} waits for {other.name}")

        def record_event(self):
            calls.append(f"{self.name} launched")
            return next(numbers)

        def wait_event(self, event):
            calls.append(f"{self.name} waits for batch {event}")

    main = Stream("main")
    loader.stream = Stream("side")
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.Tensor, "record_stream",
                        lambda tensor, stream: calls.append(f"kept for {stream.name}"),
                        raising=False)
    batches = iter(loader)
    next(batches)
    kept = ["kept for main"] * 2
    assert calls == ["side waits for main", "side launched", "side launched",
                     "main waits for batch 1", *kept]
    calls.clear()
    assert len(list(batches)) == 4
    assert calls == [call for batch in range(2, 6) for call in
                     (["side launched"] * (batch < 5) + [f"main waits for batch {batch}"] + kept)]


def test_arrays_survive_packing_and_need_one_copy():
    arrays = {"a": numpy.arange(3), "b": numpy.array([True, False, True]),
              "c": numpy.arange(6, dtype=numpy.float64).reshape(2, 3) / 7,
              "d": numpy.zeros((0, 2), numpy.float32), "e": numpy.arange(5, dtype=numpy.uint8)}
    packed = pixel_grid.Packed(arrays)
    for found in (packed.on_host(), packed.send(torch.device("cpu"))):
        assert list(found) == list(arrays)
        for name, array in arrays.items():
            numpy.testing.assert_allclose(found[name].numpy(), array, rtol=1e-6)
            assert found[name].untyped_storage().data_ptr() == packed.buffer.data_ptr()
    assert found["c"].dtype == torch.float32


def test_a_batch_takes_few_operations(faces):
    params, crops = draw_params(faces, range(48), **MOVED, grey=0.3, colour=0.7, blur=0.5,
                                occlusion=0.5, shut=0.3)
    for kind in operations.OPERATIONS:
        assert any(getattr(face, kind) is not None for face in params), kind
    stored, batch = torch.from_numpy(numpy.stack(crops)), augment.BatchAugment(SIZE)
    packed = pixel_grid.Packed(augment.pack_params(params, crops[0].shape[0], SIZE))
    with OperationCounter() as counter:
        batch(stored, packed.send(torch.device("cpu")))
    assert sum(counter.counts.values()) < 180, counter.counts
