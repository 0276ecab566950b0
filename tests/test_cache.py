"""`cache: ram`: the same samples, from memory that all processes share, without leftover files."""
import argparse
import os
import pathlib
import subprocess
import sys

import cv2
import numpy
import pytest
import torch

from utils import args
from utils.data import cache, face_list
from utils.errors import UserError
from utils.landmarks.schemes import SCHEMES
from utils.training.ddp import Ranks
from utils.training.loader import make_loader

SCHEME = SCHEMES["300W"]
FACES = 12


@pytest.fixture
def prepared(tmp_path):
    """What make_loader needs of a prepared set: crops of several sizes, two damaged, one oblong."""
    rng = numpy.random.default_rng(0)
    shapes = [(103, 103)] * 5 + [(60, 60)] * 4 + [(300, 300), (80, 103), (103, 103)]
    paths = [tmp_path / f"{i}.jpg" for i in range(FACES)]
    for path, shape in zip(paths, shapes):
        cv2.imwrite(str(path), rng.integers(0, 256, (*shape, 3), numpy.uint8))
    paths[3].write_bytes(b"no image")
    paths[11].write_bytes(paths[0].read_bytes()[:300])
    points = numpy.tile(SCHEME.mean_face, (FACES, 1, 1))
    unit = numpy.tile(numpy.array([0.0, 0, 1, 1]), (FACES, 1))
    return argparse.Namespace(lists=face_list.FaceList(paths, points, unit, unit, None), margin=1.6)


def loader(prepared, **settings):
    """The training loader of make_loader at 64 px, in its second epoch."""
    settings = args.load_args({"input_size": 64, "batch_size": 4, "seed": 5, **settings})
    found, sampler = make_loader(prepared.lists, prepared, SCHEME, settings, Ranks(), 1)
    sampler.set_epoch(1)
    return found


def left_files():
    """Cache files that still have a name."""
    return {p for folder in ("/dev/shm", os.environ.get("TMPDIR", "/tmp"))
            for p in pathlib.Path(folder).glob("pipnet-cache-*")}


@pytest.mark.parametrize("workers", [0, 2])
def test_cached_samples_are_the_uncached_ones_bit_for_bit(prepared, workers):
    plain = list(loader(prepared, workers=0, cache="none"))
    cached = list(loader(prepared, workers=workers, cache="ram"))
    assert len(plain) == len(cached) == FACES // 4
    for ours, theirs in zip(cached, plain):
        for a, b in zip(ours, theirs):
            assert torch.equal(a, b)
    assert any(3 in batch[3] for batch in cached), "the damaged image must be reported"


def test_processes_share_one_memory_whose_crops_are_read_only(prepared):
    found = loader(prepared, workers=0, cache="ram")
    crops = found.dataset.cache
    assert crops[3] is None
    assert crops[11] is None
    with pytest.raises(ValueError, match="read-only"):
        crops[0][:] = 0
    # A change that a forked process makes is seen here: the pages are shared.
    start = int(crops._starts[0])
    before = crops[0].copy()
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        crops._memory[start] = 255 - int(before.flat[0])
        os.write(writer, b"x")
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reader, 1) == b"x"
    assert crops[0].flat[0] == 255 - int(before.flat[0])


def test_size_is_announced_and_nothing_is_left_behind(prepared, capsys):
    before = left_files()
    found = loader(prepared, workers=0, cache="ram")
    size = sum(3 * found.dataset.read(i).shape[0] ** 2 for i in range(FACES) if i not in (3, 11))
    # The truncated file has a valid header, so its memory is reserved too.
    size += 3 * 103**2
    assert f"cache: 12 crops take {size / 1e6:.0f} MB" in capsys.readouterr().out
    assert left_files() == before


@pytest.mark.parametrize("what", ["memory", "folders"])
def test_a_cache_that_does_not_fit_is_refused_before_memory_is_taken(prepared, monkeypatch, what):
    before = left_files()
    if what == "memory":
        monkeypatch.setattr(cache, "_available", lambda: cache.RESERVE)
    else:
        usage = argparse.Namespace(free=1000)
        monkeypatch.setattr(cache.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(UserError, match="cache: ram: needs .*--cache none"):
        loader(prepared, workers=0, cache="ram")
    assert left_files() == before


RANK = """
import pathlib, sys
sys.path.insert(0, sys.argv[1])
import numpy
from utils.data import cache, dataset, face_list
from utils.training import ddp
paths = sorted(pathlib.Path(sys.argv[2]).glob("*.jpg"))
unit = numpy.zeros((len(paths), 4))
faces = face_list.FaceList(paths, numpy.zeros((len(paths), 68, 2)), unit, unit, None)
ranks = ddp.start("cpu")
data = dataset.FaceDataset(faces, 1.6, 64)
reads = []
read = data.read
data.read = lambda index: reads.append(index) or read(index)
crops = cache.CropCache(data, ranks)
before = len(reads)
kept = cache.DeviceCache(data, ranks)
again = len(reads) - before
same = all((crops[i] is None) if read(i) is None else (crops[i] == read(i)).all()
           and (kept.crops[i, :kept.sides[i], :kept.sides[i]].numpy() == read(i)).all()
           for i in range(len(paths)))
same = same and (again > 0) == ranks.is_main
# Rank 1 changes a byte after both have compared; rank 0 must see it.
ranks.all_gather(None)
if not ranks.is_main:
    crops._memory[0] = 7
ranks.all_gather(None)
# One write per line, because both ranks share the output.
sys.stdout.write(f"{ranks.rank} {same} {len(reads) > 0} {crops._memory[0] == 7}\\n")
ddp.stop()
"""


def test_ranks_share_one_cache_and_only_the_first_decodes(prepared, tmp_path):
    before = left_files()
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    root = str(pathlib.Path(__file__).resolve().parent.parent)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         str(script), root, str(tmp_path)], capture_output=True, text=True, timeout=120)
    lines = sorted(line for line in done.stdout.splitlines() if line[:2] in ("0 ", "1 "))
    # Only rank 0 reads headers and decodes.
    assert lines == ["0 True True True", "1 True False True"], done.stdout + done.stderr
    assert left_files() == before


def test_what_torch_keeps_of_the_memory_of_a_gpu_counts_as_free(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 9000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 5000)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2000)
    made = []
    monkeypatch.setattr(cache.torch, "zeros", lambda shape, **options: made.append(shape))
    gpu = torch.device("cuda", 0)
    cache._allocate((10, 10, 10, 1), gpu, 0.25)
    assert made == [(10, 10, 10, 1)]
    with pytest.raises(UserError, match="25% may be used"):
        cache._allocate((11, 10, 10, 1), gpu, 0.25)


@pytest.mark.parametrize("kept", ["device", "ram", "none"])
def test_auto_keeps_what_it_chose_before_a_resume(prepared, monkeypatch, kept):
    def make(name, kept_cache, free):
        monkeypatch.setattr(cache, "_available", lambda: free)
        settings = args.load_args({"input_size": 64, "batch_size": 4, "workers": 0, "cache": name})
        batches, _ = make_loader(prepared.lists, prepared, SCHEME, settings, Ranks(), 1, kept_cache)
        return cache.cache_name(getattr(batches, "cache", None) or batches.dataset.cache)

    tight = cache.RESERVE + 5_000_000  # `auto` alone would take half of it.
    assert make("auto", kept, tight) == kept
    assert make("auto", None, tight) == "ram"
    assert make("ram", kept, tight) == "ram", "what is typed wins"
    # Where it fits no longer, `auto` goes on with the next kind.
    assert make("auto", kept, 1000) == "none"
