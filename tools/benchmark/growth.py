"""Growth: time and memory against batch size, set size, landmarks and neighbours."""
import ctypes
import pathlib
import re
import tempfile
import tracemalloc

import numpy
import torch

from nets.head import Maps, PIPHead
from tools.benchmark.common import build, measure, say, table
from utils.data import dataset
from utils.landmarks import schemes as landmarks


def growth(prepared, options):
    """Measure time and memory against batch, set size, landmarks and neighbours; plot them."""
    size = prepared.size or 256
    model = build("mobilenetv3_large_100", size, prepared.lists["train"], prepared)
    batches, sizes = (1, 2, 4, 8, 16, 32, 64), (100, 1000, 10000)
    batch_times, batch_memory = _grow_batch(model, batches, size)
    set_times, set_memory = _grow_set(prepared, sizes)
    decode = _grow_decode(prepared, options)
    _plot_growth(options.plot, batches, batch_times, batch_memory, sizes, set_times, set_memory)
    rows = [[f"{n} faces a batch", f"{1000 * t:.1f}", f"{1000 * t / n:.2f}", f"{m / 1e6:.0f}"]
            for n, t, m in zip(batches, batch_times, batch_memory)]
    rows += [[f"{n} images in the set", f"{1000 * t:.1f}", f"{1000 * t / n:.3f}", f"{m / 1e6:.1f}"]
             for n, t, m in zip(sizes, set_times, set_memory)]
    return ["Prediction of MobileNetV3-Large, and reading the lists of a set.", "",
            *table(["", "ms", "ms each", "memory, MB"], rows), "Decoding maps of 8 x 8 cells.", "",
            *table(["landmarks", "neighbours", "us a face, batch 1", "us a face, batch 32"],
                   decode)]


def _grow_batch(model, batches, size):
    """Return median seconds and peak bytes above the start, for predictions of each batch size."""
    times, memory = [], []
    # Return freed memory to the system, so that the process's memory is what is in use.
    ctypes.CDLL(None).malloc_trim(0)
    before = _reset_peak()
    with torch.inference_mode():
        # In ascending order, so that the peak so far belongs to the current batch size.
        for count in batches:
            say(f"growth: batch {count}")
            images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)
            times.append(numpy.median(measure({"": lambda images=images: model.predict(images)},
                                              max(3, 30 // count))[""]))
            memory.append(max(_peak() - before, 0))
    return times, memory


def _reset_peak():
    """Reset the process's peak memory and return the bytes in use."""
    pathlib.Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _peak()


def _peak():
    status = pathlib.Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])


def _grow_set(prepared, sizes):
    """Return median seconds and bytes of reading sets of these sizes, made of repeated lines."""
    lines = (prepared.folder / "train.txt").read_text(encoding="utf-8").splitlines()
    times, memory = [], []
    for count in sizes:
        say(f"growth: set of {count}")
        with tempfile.TemporaryDirectory() as folder:
            repeated = (lines * -(-count // len(lines)))[:count]
            pathlib.Path(folder, "train.txt").write_text("\n".join(repeated), encoding="utf-8")
            times.append(numpy.median(measure({"": lambda: dataset.PreparedSet(folder)}, 3)[""]))
            tracemalloc.start()
            kept = dataset.PreparedSet(folder)
            memory.append(tracemalloc.get_traced_memory()[0])
            tracemalloc.stop()
            del kept
    return times, memory


def _grow_decode(prepared, options):
    rows, face = [], landmarks.SCHEMES["300W"]
    for scheme in (landmarks.get_scheme("eyes", face), face, landmarks.SCHEMES["LaPa"]):
        for num_nb in (0, 10, 60):
            if num_nb >= scheme.points:
                continue
            head = PIPHead(8, scheme, num_nb)
            cells = []
            for batch in (1, 32):
                maps = Maps(*(torch.randn(batch, scheme.points * many, 8, 8)
                              for many in (1, 1, 1, num_nb, num_nb)))
                with torch.inference_mode():
                    found = measure({"": lambda maps=maps, head=head: head.decode(maps)},
                                    options.rounds, warm=3)[""]
                cells.append(f"{1e6 * numpy.median(found) / batch:.0f}")
            rows.append([scheme.points, num_nb, *cells])
    return rows


def _plot_growth(path, batches, batch_times, batch_memory, sizes, set_times, set_memory):
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.8), constrained_layout=True)
    for axis, counts, times, memory, title in (
            (axes[0], batches, batch_times, batch_memory, "prediction: faces per batch"),
            (axes[1], sizes, set_times, set_memory, "reading a set: images")):
        counts, times = numpy.array(counts), 1000 * numpy.array(times)
        memory = numpy.array(memory) / 1e6
        axis.loglog(counts, times, "o-", color="tab:blue", label="time")
        axis.loglog(counts, times[-1] * counts / counts[-1], ":", color="tab:blue",
                    label="linear through the last point")
        axis.set(xlabel=title, ylabel="ms")
        right = axis.twinx()
        right.loglog(counts, numpy.maximum(memory, 0.1), "s--", color="tab:orange",
                     label="memory")
        right.set_ylabel("MB")
        axis.grid(alpha=0.3)
        handles = [h for a in (axis, right) for h in a.get_legend_handles_labels()[0]]
        axis.legend(handles, [h.get_label() for h in handles], fontsize=8, loc="upper left")
    figure.savefig(path, dpi=90)
    pyplot.close(figure)
