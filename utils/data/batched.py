"""Records of augmentation carried out for a whole batch in torch, on any device.

The twin of augment.carry_out: the same records give the same images but for rounding. OpenCV's
bilinear positions are multiples of 1/32 pixel and its blur has weights of eight bits, so a value
differs by one level or two, rarely by more where neighbouring pixels are far apart. Noise has other
values of the same distribution. Nothing here makes a GPU wait for the host, and no loop is over
faces.
"""
import typing

import numpy
import torch

from utils.data import augment, shutting
from utils.landmarks import eyelids


class EyeNumbers(typing.NamedTuple):
    """A eyelids.Eye that is to be shut, as numbers, or as a tensor (N, 1, 1) of each.

    `along` and `across` are as long as the eye is wide, so that products with them, times scale,
    are in its widths. Of upper, lower and meeting, curves a + b s, `skew` is b. share: of the way
    to where the lids meet.
    """
    x: float
    y: float
    along_x: float
    along_y: float
    across_x: float
    across_y: float
    scale: float
    upper: float
    upper_skew: float
    lower: float
    lower_skew: float
    meeting: float
    meeting_skew: float
    share: float


class Batch:
    """Carries out records: called with stored crops and their records, gives images.

    size: side of the images in pixels. scheme: whose eyes may be shut, None where none are.
    """

    def __init__(self, size, device="cpu", scheme=None):
        self.size, self.device, self.scheme = size, torch.device(device), scheme
        line = torch.arange(size, device=self.device)
        self.y, self.x = torch.meshgrid(line, line, indexing="ij")

    @torch.no_grad()
    def __call__(self, stored, records):
        """Stored (N, T, T, 3) uint8 on the device, black beyond a crop that is smaller than T;
        N augment.Records. Returns (N, size, size, 3) uint8 on the device.
        """
        images = self._warp(stored, records)
        for name, change in (("shut", self._shut), ("grey", self._grey), ("tone", self._tone),
                             ("keep", self._keep), ("blur", self._blur), ("motion", self._motion),
                             ("low", self._low), ("noise", self._noise), ("patch", self._cover)):
            chosen = [i for i, record in enumerate(records) if getattr(record, name) is not None]
            if chosen:
                indices = self.send(numpy.array(chosen))
                changed = change(images[indices], [getattr(records[i], name) for i in chosen])
                images.index_copy_(0, indices, changed.round_().clamp_(0, 255))
        return images.permute(0, 2, 3, 1).to(torch.uint8)

    def send(self, array):
        """A numpy array on the device; of float64, as float32."""
        tensor = torch.from_numpy(numpy.ascontiguousarray(array))
        if tensor.dtype is torch.float64:
            tensor = tensor.float()
        if self.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    def _warp(self, stored, records):
        forward = numpy.zeros((len(records), 3, 3))
        forward[:, :2], forward[:, 2, 2] = [record.matrix for record in records], 1
        back = self.send(numpy.linalg.inv(forward)[:, :2])[..., None, None]
        x = back[:, :, 0] * self.x + back[:, :, 1] * self.y + back[:, :, 2]
        return _sample(stored.permute(0, 3, 1, 2).float(), x[:, 0], x[:, 1], "zeros").round_()

    def _shut(self, images, shuts):
        """As shutting.shut: one eye after the other, lid skin stretched over the eyeball."""
        for side in range(2):
            rows = numpy.array([_eye_numbers(points, share, self.scheme.eyes[side])
                                for points, share in shuts])
            eye = EyeNumbers(*self.send(rows)[..., None, None].unbind(1))
            away_x, away_y = self.x - eye.x, self.y - eye.y
            s = (away_x * eye.along_x + away_y * eye.along_y) * eye.scale
            t = (away_x * eye.across_x + away_y * eye.across_y) * eye.scale
            upper = _height(eye.upper, eye.upper_skew, s)
            lower = torch.maximum(_height(eye.lower, eye.lower_skew, s), upper)
            meeting = _height(eye.meeting, eye.meeting_skew, s)
            source = shutting.source(t, upper, lower, meeting, eye.share, torch.where)
            moved = torch.where((s > 0) & (s < 1), source, t) - t
            x, y = self.x + moved * eye.across_x, self.y + moved * eye.across_y
            images = _sample(images, x, y, "border").round_()
        return images

    def _grey(self, images, weights):
        weights = self.send(numpy.stack(weights))
        return (images * weights[..., None, None]).sum(1, keepdim=True).expand_as(images).clone()

    def _tone(self, images, tables):
        tables = self.send(numpy.stack(tables)).permute(0, 2, 1)
        levels = images.flatten(2).long()
        return tables.gather(2, levels).view(images.shape).float()

    def _keep(self, images, keeps):
        mixes = self.send(numpy.stack([augment.mixing(keep) for keep in keeps]))
        return torch.einsum("nij,njhw->nihw", mixes, images)

    def _blur(self, images, sigmas):
        # The length of OpenCV's kernel of bytes.
        reach = numpy.array([round(6 * sigma + 1) | 1 for sigma in sigmas]) // 2
        at = numpy.arange(-reach.max(), reach.max() + 1)
        kernels = numpy.exp(-at ** 2 / (2 * numpy.array(sigmas)[:, None] ** 2))
        kernels[abs(at) > reach[:, None]] = 0
        kernels = self.send(kernels / kernels.sum(1, keepdims=True))
        images = _correlate(images, kernels[:, None, :])
        return _correlate(images, kernels[:, :, None])

    def _motion(self, images, motions):
        reach = max(max(*anchor, kernel.shape[1] - 1 - anchor[0], kernel.shape[0] - 1 - anchor[1])
                    for kernel, anchor in motions)
        kernels = numpy.zeros((len(motions), 2 * reach + 1, 2 * reach + 1), numpy.float32)
        for whole, (kernel, (x, y)) in zip(kernels, motions):
            whole[reach - y:, reach - x:][:kernel.shape[0], :kernel.shape[1]] = kernel
        return _correlate(images, self.send(kernels))

    def _low(self, images, sides):
        """Means of areas on a coarse grid, rounded, and bilinear back, as products of matrices."""
        size, most = self.size, max(sides)
        sides = self.send(numpy.array(sides, numpy.float64))[:, None, None]
        line, row = self.x[0].float(), torch.arange(most, device=self.device)[:, None]
        step = size / sides
        overlap = torch.minimum((row + 1) * step, line + 1) - torch.maximum(row * step, line)
        down = overlap.clamp(min=0) * (row < sides) / step
        low = (down[:, None] @ images @ down.mT[:, None]).round_()
        at = ((line[:, None] + 0.5) / step - 0.5).clamp(min=0).minimum(sides - 1)
        up = (1 - (at - row[:, 0]).abs()).clamp(min=0)
        return up[:, None] @ low @ up.mT[:, None]

    def _noise(self, images, noises):
        seeds, spreads = (numpy.array(values) for values in zip(*noises))
        first, second = (self._uniform(seeds, images.shape, turn) for turn in range(2))
        # Box and Muller's two uniform numbers to a normal one.
        normal = (-2 * (1 - first).log()).sqrt() * (2 * torch.pi * second).cos()
        return images + (normal * self.send(spreads)[:, None, None, None]).round_()

    def _uniform(self, seeds, shape, turn=0):
        """Numbers from 0 below 1 for each value of images of this shape, which follow from their
        seed, the place in the image and `turn`, whatever else is in the batch.
        """
        place = torch.arange(shape[1] * shape[2] * shape[3], device=self.device)
        mixed = _mixed(self.send(seeds.astype(numpy.int64))[:, None] * 2 + turn)
        return (_mixed(mixed ^ place) >> 8).view(-1, *shape[1:]) / float(1 << 24)

    def _cover(self, images, patches):
        numbers = self.send(numpy.array([(p.y, p.x, p.height, p.width) for p in patches]))
        y, x, height, width = numbers[:, :, None, None].unbind(1)
        inside = (self.y >= y) & (self.y < y + height) & (self.x >= x) & (self.x < x + width)
        to = numpy.array([p.source or (p.y, p.x) for p in patches])
        from_y, from_x = self.send(to)[:, :, None, None].unbind(1)
        at = torch.where(inside, (self.y + from_y - y) * self.size + self.x + from_x - x,
                         self.y * self.size + self.x)
        out = images.flatten(2).gather(2, at.flatten(1)[:, None].expand(-1, 3, -1))
        out, inside = out.view(images.shape), inside[:, None]
        seeds = numpy.array([-1 if p.seed is None else p.seed for p in patches])
        if (seeds >= 0).any():
            noise = (self._uniform(seeds, images.shape) * 256).floor_()
            out = torch.where(inside & self.send(seeds >= 0)[:, None, None, None], noise, out)
        colours = numpy.array([(-1,) * 3 if p.colour is None else p.colour for p in patches])
        colours = self.send(colours.astype(numpy.float32))[..., None, None]
        return torch.where(inside & (colours >= 0), colours, out)


class BatchedLoader:
    """Batches as a DataLoader of a FaceDataset gives them, from crops that lie on the device.

    (images (n, S, S, 3) uint8 there, landmarks (n, K, 2) float32, indices (n,) and `bad` (n,) on
    the host): the same faces and landmarks, and images as Batch makes them. dataset: with an
    Augment. sampler: an EpochSampler. cache: a DeviceCache.
    """

    def __init__(self, dataset, sampler, cache):
        self.dataset, self.sampler, self.cache = dataset, sampler, cache
        self.device = cache.crops.device
        self.batch = Batch(dataset.size, self.device, dataset.augmentation.scheme)

    def __len__(self):
        return len(self.sampler)

    def __iter__(self):
        data = self.dataset
        for keys in self.sampler:
            wanted = [turn % len(data) for _, turn in keys]
            found = [data.readable(index, self._side) for index in wanted]
            bad = [-1 if index == asked else asked for asked, (index, _) in zip(wanted, found)]
            records = [data.augmentation.draw(data.points[index], data.margin, side, data.size,
                                              data.generator(epoch, turn - asked + index))
                       for (epoch, turn), asked, (index, side) in zip(keys, wanted, found)]
            indices = [index for index, _ in found]
            crops = self.cache.crops[self.batch.send(numpy.array(indices))]
            landmarks = torch.from_numpy(numpy.stack([record.landmarks for record in records]))
            if self.device.type == "cuda":
                landmarks = landmarks.pin_memory()
            yield (self.batch(crops, records), landmarks, torch.tensor(indices),
                   torch.tensor(bad))

    def _side(self, index):
        """Of a crop in pixels, None where it cannot be read."""
        return self.cache.sides[index] or None


def _sample(images, x, y, outside):
    """Images (N, C, H, W) at pixels x, y (N, S, S), bilinear; outside: `zeros` or `border`."""
    height, width = images.shape[2:]
    grid = torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], -1)
    return torch.nn.functional.grid_sample(images, grid, padding_mode=outside, align_corners=False)


def _correlate(images, kernels):
    """Each image (C, H, W) of N with its own kernel (N, h, w) of odd sides, mirrored at the rim."""
    count, channels, *_ = images.shape
    down, across = kernels.shape[1] // 2, kernels.shape[2] // 2
    padded = torch.nn.functional.pad(images, (across, across, down, down), mode="reflect")
    out = torch.nn.functional.conv2d(
        padded.flatten(0, 1)[None],
        kernels.repeat_interleave(channels, 0)[:, None], groups=count * channels)
    return out.view(images.shape)


def _eye_numbers(points, share, contour):
    """EyeNumbers as an array; nothing moves where a landmark is missing or the eye is tiny."""
    eye = None if numpy.isnan(points[contour]).any() else eyelids.Eye(points, contour)
    if eye is None or eye.width < 2:
        return numpy.zeros(len(EyeNumbers._fields))
    return numpy.concatenate([eye.origin, eye.along, eye.across, [eye.width ** -2], eye.upper,
                              eye.lower, eye.meeting, [share]])


def _height(first, second, s):
    s = s.clamp(0, 1)
    return s * (1 - s) * (first + second * s)


def _mixed(x):
    """32-bit numbers in int64 to ones that seem to have nothing to do with them."""
    for multiplier in (0x7feb352d, 0x846ca68b):
        x = x ^ x >> 16
        x = x * multiplier & 0xffffffff
    return x ^ x >> 15
