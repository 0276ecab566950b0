"""Data loading: samples per second and core, against the published pipeline of PIPNet."""
import contextlib
import random
import sys
import tempfile
import time

import cv2
import numpy
import PIL.Image
import PIL.ImageFilter
import torch
import torchvision

from nets import head
from nets.model import LandmarkNet
from tools.benchmark.common import measure, ms, table
from utils.args import load_args
from utils.data import augment, cache, dataset
from utils.training import ddp, loss

# The augmentation of the published code as settings of args.yaml; 30 px of 256 are 0.117.
PUBLISHED = {"rotation": 30, "scaling": 0, "aspect": 0, "shift": 0.117, "flip": 0.5, "colour": 0,
           "grey": 0.2, "blur": 0.3, "occlusion": 0.5, "occlusion_size": 0.4}


class PublishedDataset(torch.utils.data.Dataset):
    """The published data pipeline of PIPNet, written anew.

    Pillow resamples once per augmentation, with its default (nearest), as published. A sample is a
    normalised float image and dense target maps, filled landmark by landmark.

    Args:
        paths: image files of square crops.
        points: their landmarks (N, K, 2) in crop units.
        scheme: landmark scheme.
        num_nb: neighbours per landmark.
        grid: cells along a side of the maps.
    """

    def __init__(self, paths, points, scheme, num_nb=10, grid=8):
        self.paths, self.points, self.flip = paths, points, scheme.flip
        self.neighbours, self.grid = head.nearest_neighbours(scheme.mean_face, num_nb), grid
        self.finish = torchvision.transforms.Compose([
            torchvision.transforms.ToTensor(),
            torchvision.transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])])

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        with PIL.Image.open(self.paths[index]) as file:
            image = file.convert("RGB")
        image, points = self._geometry(image, self.points[index].copy())
        image = self._photometric(image)
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

    def _photometric(self, image):
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
    """Measure samples per second and core: published pipeline, this one, and `cache: ram`."""
    size, batch, count = prepared.size or 256, 16, 128
    train = prepared.lists["train"]
    faces = train.select(random.Random(0).sample(range(len(train)), min(count, len(train))))
    scheme = prepared.scheme
    neighbours = torch.from_numpy(head.nearest_neighbours(scheme.mean_face, 10))
    normalise = LandmarkNet(scheme)
    normalise.backbone = normalise.head = torch.nn.Identity()

    def ours(settings, cached=False):
        samples = dataset.FaceDataset(faces, prepared.margin, size, scheme.indices,
                                      augment.Augment(load_args(settings), scheme.flip))
        if cached:
            with contextlib.redirect_stdout(sys.stderr):
                samples.cache = cache.CropCache(samples, ddp.Ranks())
        return samples

    def read_all(samples):
        loader = torch.utils.data.DataLoader(samples, batch)

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
        stored = ours(PUBLISHED)
        batches = list(torch.utils.data.DataLoader(stored, batch))
        # One core, and processor time, which other processes hardly change.
        threads = torch.get_num_threads(), cv2.getNumThreads()
        torch.set_num_threads(1)
        cv2.setNumThreads(1)
        functions = {
            "published": read_all(published), "this repository": read_all(stored),
            "with `cache: ram`": read_all(ours(PUBLISHED, True)),
            "default augmentation": read_all(ours({})),
            "default augmentation, `cache: ram`": read_all(ours({}, True)),
            "published, samples alone": lambda: [published[i] for i in range(len(faces))],
            "decoding alone": lambda: [stored.read(i) for i in range(len(faces))],
            "normalisation and targets, in the training step": step_part}
        found = measure(functions, options.rounds, time.process_time)
        torch.set_num_threads(threads[0])
        cv2.setNumThreads(threads[1])
    base = numpy.median(found["published"])
    rows = [[name, ms(seconds / len(faces)), f"{len(faces) / numpy.median(seconds):.0f}",
             f"{base / numpy.median(seconds):.2f}"] for name, seconds in found.items()]
    return [f"{len(faces)} faces a round, batches of {batch}, input {size}, stored at margin "
            f"{prepared.margin:g}; processor time. The published loader returns normalised images "
            f"and dense targets. This repository's loader returns uint8 images and landmarks; the "
            f"training step does the rest for a whole batch on its device (last row, on this "
            f"core).", "",
            *table(["loader", "ms a sample", "samples/s and core", "times as fast"], rows)]
