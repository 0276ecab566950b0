"""Speed, measured side by side in one process: python -m tests.benchmark --data-dir PREPARED_SET.

Ways of doing the same work take turns in shuffled order, and a table gives medians, so that a ratio
holds even where the machine is shared. Without --data-dir the faces are drawn. --only runs parts:
data, step, evaluation, deployment, irnet, growth, startup. --exp adds trained models (.pt) to the
deployment table, with the error of each variant. About a quarter of an hour on two cores.
"""
import argparse
import contextlib
import copy
import datetime
import importlib.metadata
import os
import pathlib
import platform
import random
import re
import subprocess
import sys
import tempfile
import time
import tracemalloc
import unittest.mock

import cv2
import numpy
import PIL.Image
import PIL.ImageFilter
import torch
import torchvision

import main
from nets.backbone import reparameterise
from nets.head import Maps, PIPHead
from nets.model import LandmarkNet
from utils import (
    augment,
    cache,
    checkpoint,
    dataset,
    distributed,
    engine,
    evaluation,
    experiment,
    export,
    landmarks,
    loss,
    quantize,
)
from utils.args import ROOT, load_args
from utils.errors import run as guarded
from utils.memory import give_back, keep_freed
from utils.predictor import Predictor

# Batch norms of untrained nets are brought to life by images, see build().
BACKBONES = ("resnet18", "mobilenetv2_100", "mobileone_s1", "mobilenetv3_large_100", "irnet18")
# What the authors do to a training face, in our knobs: 30 px of 256 are 0.117.
AUTHORS = {"rotation": 30, "scaling": 0, "aspect": 0, "shift": 0.117, "flip": 0.5, "colour": 0,
           "grey": 0.2, "blur": 0.3, "occlusion": 0.5, "occlusion_size": 0.4}


def say(*words):
    """Progress, on stderr: the table alone goes to stdout."""
    print(*words, file=sys.stderr, flush=True)


def measure(ways, rounds, clock=time.perf_counter, warm=1):
    """Name to seconds (rounds,) of each of the ways (name to function), in turns, shuffled."""
    order, found = list(ways), {name: [] for name in ways}
    shuffler = random.Random(0)
    for number in range(rounds + warm):
        shuffler.shuffle(order)
        for name in order:
            begun = clock()
            ways[name]()
            if number >= warm:
                found[name].append(clock() - begun)
    return {name: numpy.array(values) for name, values in found.items()}


def table(head, rows):
    """Lines of a Markdown table; head and rows are lists of cells."""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (head, ["---"] * len(head), *rows)]
    return [*lines, ""]


def ms(seconds, share=50):
    """A percentile of seconds as text in milliseconds."""
    value = 1000 * numpy.percentile(seconds, share)
    return f"{value:.2f}" if value < 100 else f"{value:.0f}"


# Data ---------------------------------------------------------------------------------------------


class PublishedDataset(torch.utils.data.Dataset):
    """The published way to a sample, written from FACTS.md: Pillow, one resampling after another,
    a normalised float image and dense target maps filled landmark by landmark.

    paths: of size x size crops. points (N, K, 2) in crop units. Pillow's own default resampling
    (nearest) is used, as published; a better one would take longer.
    """

    def __init__(self, paths, points, scheme, num_nb=10, grid=8):
        self.paths, self.points, self.flip = paths, points, scheme.flip
        self.neighbours, self.grid = landmarks.neighbours(scheme.mean_face, num_nb), grid
        self.finish = torchvision.transforms.Compose([
            torchvision.transforms.ToTensor(),
            torchvision.transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])])

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        with PIL.Image.open(self.paths[index]) as file:
            image = file.convert("RGB")
        image, points = self._geometry(image, self.points[index].copy())
        image = self._look(image)
        return self.finish(image), *self._targets(points)

    def _geometry(self, image, points):
        size = image.size[0]
        if random.random() < 0.5:
            shift = numpy.array([random.uniform(-30, 30) for _ in range(2)]) * size / 256
            image = image.transform(image.size, PIL.Image.Transform.AFFINE,
                                    (1, 0, shift[0], 0, 1, shift[1]))
            points = points - shift / size
        if random.random() < 0.5:
            image = image.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT)
            points = points[self.flip] * (-1, 1) + (1, 0)
        if random.random() < 0.5:
            angle = random.uniform(-30, 30)
            image = image.rotate(angle)
            cos, sin = numpy.cos(numpy.radians(angle)), numpy.sin(numpy.radians(angle))
            points = (points - 0.5) @ numpy.array([[cos, -sin], [sin, cos]]) + 0.5
        return image, points

    def _look(self, image):
        size = image.size[0]
        if random.random() < 0.5:
            pixels = numpy.array(image)
            height, width = (int(0.4 * size * random.random()) for _ in range(2))
            y, x = int((size - height) * random.random()), int((size - width) * random.random())
            pixels[y:y + height, x:x + width] = numpy.random.randint(0, 256, 3)
            image = PIL.Image.fromarray(pixels)
        if random.random() < 0.3:
            image = image.filter(PIL.ImageFilter.GaussianBlur(5 * random.random()))
        if random.random() < 0.2:
            image = image.convert("L").convert("RGB")
        return image

    def _targets(self, points):
        count, num_nb = self.neighbours.shape
        grid = self.grid
        maps = [numpy.zeros((channels, grid, grid)) for channels in
                (count, count, count, count * num_nb, count * num_nb)]
        score, offset_x, offset_y, neighbour_x, neighbour_y = maps
        for i in range(count):
            x = min(max(int(numpy.floor(points[i][0] * grid)), 0), grid - 1)
            y = min(max(int(numpy.floor(points[i][1] * grid)), 0), grid - 1)
            score[i, y, x] = 1
            offset_x[i, y, x] = points[i][0] * grid - x
            offset_y[i, y, x] = points[i][1] * grid - y
            near = points[self.neighbours[i]]
            for j in range(num_nb):
                neighbour_x[i * num_nb + j, y, x] = near[j][0] * grid - x
                neighbour_y[i * num_nb + j, y, x] = near[j][1] * grid - y
        return [torch.from_numpy(m).float() for m in maps]


def data(prepared, options):
    """Samples per second and core: the published way, ours, and ours with `cache: ram`."""
    size, batch, count = prepared.size or 256, 16, 128
    every = prepared.lists["train"]
    faces = every.take(random.Random(0).sample(range(len(every)), min(count, len(every))))
    scheme = prepared.scheme
    neighbours = torch.from_numpy(landmarks.neighbours(scheme.mean_face, 10))
    normalise = LandmarkNet(scheme)
    normalise.backbone = normalise.head = torch.nn.Identity()

    def ours(knobs, cached=False):
        found = dataset.FaceDataset(faces, prepared.margin, size, scheme.indices,
                                    augment.Augment(load_args(knobs), scheme.flip))
        if cached:
            with contextlib.redirect_stdout(sys.stderr):
                found.cache = cache.CropCache(found, distributed.Ranks())
        return found

    def drain(found):
        loader = torch.utils.data.DataLoader(found, batch)

        def run():
            for _ in loader:
                pass
        return run

    def step_part():
        with torch.no_grad():
            for images, points, *_ in batches:
                normalise(images.permute(0, 3, 1, 2))
                loss.encode(points, neighbours, size // 32)

    with tempfile.TemporaryDirectory() as folder:
        plain = dataset.FaceDataset(faces, prepared.margin, size)
        paths = [f"{folder}/{i}.jpg" for i in range(len(faces))]
        for i, path in enumerate(paths):
            cv2.imwrite(path, plain[i][0].numpy()[..., ::-1])
        published = PublishedDataset(paths, faces.points, scheme, grid=size // 32)
        stored = ours(AUTHORS)
        batches = list(torch.utils.data.DataLoader(stored, batch))
        # One core is what is paid for; processor time is what others on the machine do not change.
        threads = torch.get_num_threads(), cv2.getNumThreads()
        torch.set_num_threads(1)
        cv2.setNumThreads(1)
        ways = {
            "published way": drain(published), "ours": drain(stored),
            "ours, `cache: ram`": drain(ours(AUTHORS, True)),
            "ours, default augmentation": drain(ours({})),
            "ours, default, `cache: ram`": drain(ours({}, True)),
            "of it: published sample alone": lambda: [published[i] for i in range(len(faces))],
            "of it: our decoding alone": lambda: [stored.read(i) for i in range(len(faces))],
            "left to the step: normalisation and targets": step_part}
        found = measure(ways, options.rounds, time.process_time)
        torch.set_num_threads(threads[0])
        cv2.setNumThreads(threads[1])
    base = numpy.median(found["published way"])
    rows = [[name, ms(seconds / len(faces)), f"{len(faces) / numpy.median(seconds):.0f}",
             f"{base / numpy.median(seconds):.2f}"] for name, seconds in found.items()]
    return [f"{len(faces)} faces a round, batches of {batch}, input {size}, stored at margin "
            f"{prepared.margin:g}; processor time. The published loader gives normalised images "
            f"and dense targets; ours gives bytes and landmarks, and the step does the rest, on "
            f"its device and for a whole batch (last line, on this core).", "",
            *table(["way", "ms a sample", "samples/s and core", "times as fast"], rows)]


# Steps --------------------------------------------------------------------------------------------


class Watch:
    """Stands for launch.Stop: notes when each step ends, and asks to stop after `steps`."""

    def __init__(self, steps):
        self.steps, self.times = steps, []

    @property
    def asked(self):
        """Whether to stop; looked at once a step."""
        self.times.append(time.perf_counter())
        return len(self.times) > self.steps


def step(prepared, options):
    """Images per second of main.train against the same with one batch over and over."""
    rows, steps, parts = [], 12, 3
    for backbone in ("irnet18", "mobilenetv3_large_100"):
        found = {"training": [], "fixed batch": []}
        for part in range(parts):
            for way in random.Random(part).sample(sorted(found), 2):
                say(f"step: {backbone}, {way}, part {part + 1} of {parts}")
                found[way].append(_train_steps(prepared, options, backbone, way, steps))
        speed = {way: 16 / numpy.concatenate(times) for way, times in found.items()}
        share = numpy.median(speed["training"]) / numpy.median(speed["fixed batch"])
        rows.append([backbone, *(f"{numpy.median(speed[way]):.1f}" for way in found),
                     f"{100 * share:.0f} %"])
    return [f"Batch 16, default augmentation, {options.workers} loader processes; medians of "
            f"{parts * steps} steps.", "",
            *table(["backbone", "training, images/s", "fixed batch, images/s", "share"], rows)]


def _train_steps(prepared, options, backbone, way, steps):
    """Seconds of `steps` steps of main.train, after two that warm up."""
    args = load_args({"data_dir": str(prepared.folder), "backbone": backbone, "batch_size": 16,
                      "effective_batch": 16, "input_size": prepared.size or 256,
                      "workers": options.workers})
    watch = Watch(steps + 2)
    make_loader = engine.make_loader

    def fixed(*arguments):
        loader, sampler = make_loader(*arguments)
        return [next(iter(loader))] * (steps + 3), sampler

    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        out = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(out))
        stack.enter_context(unittest.mock.patch.object(
            experiment, "new_experiment", lambda *_: pathlib.Path(folder)))
        if way == "fixed batch":
            stack.enter_context(unittest.mock.patch.object(engine, "make_loader", fixed))
        main.train(args, stop=watch)
    return numpy.diff(watch.times[2:steps + 3])


# Evaluation ---------------------------------------------------------------------------------------


def evaluate(prepared, options):
    """Scoring faces in batches against one by one, images decoded in both."""
    faces = next(iter(prepared.tests.values()))
    faces = faces.take(numpy.arange(min(224, len(faces))))
    size = prepared.size or 256
    model = build("mobilenetv3_large_100", prepared.scheme, size, faces, prepared)
    predict = evaluation.torch_predict(model.to(memory_format=torch.channels_last),
                                       torch.device("cpu"))
    parts = [faces.take(part) for part in numpy.array_split(numpy.arange(len(faces)), 7)]
    found = {}
    for number in range(-(-options.rounds // len(parts))):
        say(f"evaluation: pass {number + 1}")
        for part in parts:
            times = measure({
                "ours, batch 32": lambda part=part: evaluation.predict_list(
                    predict, part, prepared.margin, size),
                "batch 1": lambda part=part: evaluation.predict_list(
                    predict, part, prepared.margin, size, batch=1)}, 1, warm=int(not found))
            for name, seconds in times.items():
                found.setdefault(name, []).append(len(part) / seconds[0])
    rate = {name: numpy.median(values) for name, values in found.items()}
    rows = [[name, f"{v:.1f}", f"{v / rate['batch 1']:.2f}"] for name, v in rate.items()]
    return [f"{len(faces)} test faces in {len(parts)} parts of about 32, MobileNetV3-Large, input "
            f"{size}, decoding included.", "",
            *table(["way", "faces/s", "times as fast"], rows)]


# Deployed models ----------------------------------------------------------------------------------


def build(backbone, scheme, size, faces, prepared, activation="prelu"):
    """An untrained model as checkpoint.load_model gives it, its batch norms moved off their start.

    timm starts the last norm of a block at zero, which would make int8 and folding look too easy.
    """
    torch.manual_seed(0)
    model = LandmarkNet(scheme, backbone, activation=activation)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1)
            torch.nn.init.normal_(module.bias, std=0.1)
            module.momentum = 0.5
        if isinstance(module, torch.nn.PReLU):
            torch.nn.init.uniform_(module.weight, 0.05, 0.5)
    found = dataset.FaceDataset(faces, prepared.margin, size)
    images = torch.stack([found[i][0] for i in range(4)]).permute(0, 3, 1, 2)
    with torch.no_grad():
        for _ in range(4):
            model(images)
    model = reparameterise(model.eval())
    model.args = load_args({"backbone": backbone, "input_size": size})
    model.crop, model.input_size = prepared.crop, size
    return model


def deployment(prepared, options):
    """Backbones as eager PyTorch, channels_last, ONNX Runtime fp32 and int8, 1 and 2 threads."""
    rows = []
    faces = prepared.lists["train"]
    models = [(name, None) for name in BACKBONES]
    models += [(pathlib.Path(path).parent.name + "/" + pathlib.Path(path).stem, path)
               for path in options.exp]
    for name, path in models:
        say(f"deployment: {name}")
        size = prepared.size or 256
        model = (build(name, prepared.scheme, size, faces, prepared) if path is None
                 else checkpoint.load_model(path))
        with tempfile.TemporaryDirectory() as folder:
            rows += _deploy(name, path, model, prepared, options, pathlib.Path(folder))
    head = ["model", "input", "variant", "threads", "median ms", "p90 ms", "faces/s, batch 1",
            "faces/s, batch 8", "int8 against fp32", "file MB", "NME %"]
    return ["The first ones are untrained, which does not change their speed; NME in photo pixels "
            "on the first test list, for trained ones.", "", *table(head, rows)]


def _deploy(name, path, model, prepared, options, folder):
    size = model.input_size
    crops = quantize.training_crops(prepared, size)
    with contextlib.redirect_stdout(sys.stderr):
        float_file = export.export(model, folder / "model.onnx")
        int8_file = quantize.quantize(float_file, crops)
    if path is None:
        torch.save(model.state_dict(), folder / "model.pt")
    megabytes = [os.path.getsize(path or folder / "model.pt"), 0, os.path.getsize(float_file),
                 os.path.getsize(int8_file)]
    megabytes[1] = megabytes[0]
    rows, errors = [], {}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        runners = _runners(model, float_file, int8_file, threads)
        one = measure({k: lambda run=run: run(crops[:1]) for k, run in runners.items()},
                      options.rounds, warm=3)
        eight = measure({k: lambda run=run: run(crops[:8]) for k, run in runners.items()},
                        max(3, options.rounds // 4))
        fp32 = numpy.median(one["ONNX Runtime fp32"])
        for (variant, run), size_mb in zip(runners.items(), megabytes):
            if path is not None and threads == 1:
                errors[variant] = _nme(run, model, prepared)
            median = numpy.median(one[variant])
            rows.append([
                name, size, variant, threads, ms(one[variant]), ms(one[variant], 90),
                f"{1 / median:.1f}", f"{8 / numpy.median(eight[variant]):.1f}",
                f"{fp32 / median:.2f}" if variant.endswith("int8") else "",
                f"{size_mb / 1e6:.1f}", f"{errors[variant]:.3f}" if errors else "-"])
    return rows


def _runners(model, float_file, int8_file, threads):
    """Variant to a function of crops (N, S, S, 3) uint8 that gives landmarks (N, K, 2)."""
    plain = model.to(memory_format=torch.contiguous_format)
    sessions = {"ONNX Runtime fp32": Predictor(float_file, threads=threads),
                "ONNX Runtime int8": Predictor(int8_file, threads=threads)}

    def eager(images, layout=torch.contiguous_format):
        with torch.inference_mode():
            images = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(memory_format=layout)
            return (plain if layout is torch.contiguous_format else last).predict(images)[0].numpy()

    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    return {"PyTorch eager": eager,
            "PyTorch channels_last": lambda images: eager(images, torch.channels_last),
            **{name: lambda images, run=run: run(images)[0] for name, run in sessions.items()}}


def _nme(run, model, prepared):
    """NME in % on the first test list, in photo pixels."""
    faces = next(iter(prepared.tests.values()))
    found = evaluation.predict_list(lambda images: run(images.permute(0, 2, 3, 1).numpy()), faces,
                                    prepared.margin, model.input_size)
    return 100 * evaluation.errors(found, faces, model.scheme, prepared.scheme)[0].mean()


# IRNet in ONNX Runtime ----------------------------------------------------------------------------


def irnet(prepared, options):
    """IRNet18 with and without PRelu nodes, and ResNet18 for comparison, in ONNX Runtime."""
    size, faces = prepared.size or 256, prepared.lists["train"]
    crops = quantize.training_crops(prepared, size)[:1]
    rows, outputs = [], {}
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        files = {}
        net = build("irnet18", prepared.scheme, size, faces, prepared)
        with unittest.mock.patch.object(export, "_SplitPReLU", lambda prelu: prelu):
            files["IRNet18, PRelu nodes"] = export.export(net, f"{folder}/plain.onnx")
        files["IRNet18, as exported"] = export.export(net, f"{folder}/split.onnx")
        for label, name in (("IRNet18, relu", "irnet18"), ("ResNet18", "resnet18")):
            other = build(name, prepared.scheme, size, faces, prepared, "relu")
            files[label] = export.export(other, f"{folder}/{label}.onnx")
        runs = {name: Predictor(file, threads=1) for name, file in files.items()}
        found = measure({k: lambda run=run: run(crops) for k, run in runs.items()},
                        options.rounds, time.process_time)
        outputs = {name: run(crops) for name, run in runs.items()}
    base = numpy.median(found["ResNet18"])
    for name, seconds in found.items():
        same = "IRNet18, " in name and "relu" not in name
        difference = max(float(numpy.abs(a - b).max()) for a, b in zip(
            outputs[name], outputs["IRNet18, PRelu nodes"])) if same else None
        rows.append([name, ms(seconds), f"{numpy.median(seconds) / base:.2f}",
                     "-" if difference is None else f"{difference:.0e}"])
    return ["One thread, batch 1, processor time. IRNet18 has 1.44 times the multiply-adds of "
            "ResNet18.", "",
            *table(["graph", "median ms", "against ResNet18", "largest difference"], rows)]


# Growth -------------------------------------------------------------------------------------------


def growth(prepared, options):
    """Time and memory against batch, set size, landmarks and neighbours; draws a plot."""
    size = prepared.size or 256
    model = build("mobilenetv3_large_100", prepared.scheme, size, prepared.lists["train"], prepared)
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
    """Median seconds and bytes (peak above rest) of predictions of so many faces."""
    times, memory = [], []
    give_back()
    before = _reset_peak()
    with torch.inference_mode():
        # From few to many: the peak so far is then that of the present count.
        for count in batches:
            say(f"growth: batch {count}")
            images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)
            times.append(numpy.median(measure({"": lambda images=images: model.predict(images)},
                                              max(3, 30 // count))[""]))
            memory.append(max(_peak() - before, 0))
    return times, memory


def _reset_peak():
    """Starts the count of the process's peak memory anew; bytes in use now."""
    pathlib.Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _peak()


def _peak():
    status = pathlib.Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])


def _grow_set(prepared, sizes):
    """Median seconds and bytes of reading a set of so many faces, its lines repeated."""
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


# Start-up -----------------------------------------------------------------------------------------


def startup(prepared, options):
    """Seconds of the command lines a person tries first, in fresh processes."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        weights = pathlib.Path(folder, "model.onnx")
        model = build("mobilenetv3_large_100", prepared.scheme, prepared.size or 256,
                      prepared.lists["train"], prepared)
        export.export(model, weights)
        commands = {
            "python -c pass": ["-c", "pass"], "main.py --help": ["main.py", "--help"],
            "demo.py --help": ["demo.py", "--help"],
            "demo.py --source sample, to the written picture": [
                "demo.py", "--source", "sample", "--output", f"{folder}/out.jpg", "--weights",
                str(weights)]}

        def start(command):
            done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True,
                                  text=True)
            # An untrained net may find no face; that is no failure of the command.
            if done.returncode not in (0, 1):
                raise RuntimeError(f"{' '.join(command)}: {done.stderr[-500:]}")

        found = measure({k: lambda c=c: start(c) for k, c in commands.items()},
                        max(3, options.rounds // 3))
    return table(["command", "median s", "p90 s"], [
        [f"`{k}`", f"{numpy.median(v):.2f}", f"{numpy.percentile(v, 90):.2f}"]
        for k, v in found.items()])


# --------------------------------------------------------------------------------------------------

PARTS = {"data": data, "step": step, "evaluation": evaluate, "deployment": deployment,
         "irnet": irnet, "growth": growth, "startup": startup}


def facts(prepared, options):
    """The machine and the versions, as Markdown lines."""
    info = pathlib.Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8") if info.is_file() else ""
    name = re.search(r"model name\s*: (.*)", text)
    flags = set((re.search(r"flags\s*: (.*)", text) or [0, ""])[1].split())
    wanted = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "avx_vnni", "amx_int8", "amx_bf16")
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in (
        "torch", "torchvision", "timm", "opencv-python", "pillow", "numpy"))
    try:
        runtime = importlib.metadata.version("onnxruntime-gpu")
    except importlib.metadata.PackageNotFoundError:
        runtime = importlib.metadata.version("onnxruntime")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return [f"# Benchmark, {datetime.date.today()}", "",
            f"* Processor: {name[1] if name else platform.processor()}, "
            f"{len(os.sched_getaffinity(0))} cores used; "
            f"{' '.join(flag for flag in wanted if flag in flags)}",
            f"* GPU: {gpu}", f"* Python {platform.python_version()}, {versions}, ONNX Runtime "
            f"{runtime}; PyTorch with {torch.get_num_threads()} threads where nothing else is said",
            f"* Faces: {'drawn' if prepared.drawn else prepared.folder.name}, "
            f"{len(prepared.lists['train'])} for training; {options.rounds} rounds; load of the "
            f"machine at the start {os.getloadavg()[0]:.1f}", ""]


def parse(argv=None):
    """The command line as a namespace."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmark", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART",
                        help="parts to run [all]")
    parser.add_argument("--data-dir", help="a prepared set [drawn faces at 256 px]")
    parser.add_argument("--exp", nargs="*", default=[], metavar="FILE.pt",
                        help="trained models for the deployment table")
    parser.add_argument("--rounds", type=int, default=30, help="of each measurement [30]")
    parser.add_argument("--workers", type=int, default=2, help="loader processes of `step` [2]")
    parser.add_argument("--output", metavar="FILE", help="also write the Markdown here")
    parser.add_argument("--plot", default=str(ROOT / "assets" / "growth.png"), metavar="FILE",
                        help="where the growth plot goes [assets/growth.png]")
    return parser.parse_args(argv)


def run():
    """Measure, print the Markdown, and write it after every part."""
    options = parse()
    keep_freed()
    args = load_args({"data_dir": options.data_dir} if options.data_dir else {"data": "samples"})
    prepared = dataset.PreparedSet(main.set_folder(args))
    lines = facts(prepared, options)
    for name in options.only:
        say(f"== {name}")
        begun, threads = time.perf_counter(), torch.get_num_threads()
        found = PARTS[name](prepared, options)
        torch.set_num_threads(threads)
        say(f"== {name}: {time.perf_counter() - begun:.0f} s")
        lines += [f"## {name}", "", *found]
        if options.output:
            pathlib.Path(options.output).write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    guarded(run)
