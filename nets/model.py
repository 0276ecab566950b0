"""Normalisation, backbone and head in one module that trains, predicts and exports."""
import torch
from torch.utils.flop_counter import FlopCounterMode

from nets.backbone import build_backbone
from nets.head import PIPHead, RegressionHead, full_precision, precise
from utils.errors import UserError

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


class LandmarkNet(torch.nn.Module):
    """uint8 RGB crops to landmarks.

    scheme: landmarks.Scheme with K points. backbone: see build_backbone. head: `pip` or
    `regression`. num_nb, merge: of the PIP head. stride: 16 or 32. neighbour_face: the mean face
    (K, 2) that decides who is whose neighbour, else the scheme's. Raises UserError.
    """

    def __init__(self, scheme, backbone="irnet18", head="pip", num_nb=10, stride=32, merge="plain",
                 activation="prelu", timm_weights=False, neighbour_face=None):
        super().__init__()
        if head not in ("pip", "regression"):
            raise UserError(f"head must be pip or regression, found {head!r}")
        self.scheme, self.stride = scheme, stride
        self.backbone = build_backbone(backbone, stride, activation, timm_weights)
        if head == "pip":
            self.head = PIPHead(self.backbone.channels, scheme if neighbour_face is None
                                else scheme.with_mean_face(neighbour_face), num_nb, merge)
        else:
            self.head = RegressionHead(self.backbone.channels, scheme)
        # Heads fitted after training, where they were: nets.shape.ShapeHead (main.py --fit-shape)
        # and nets.lids.LidHead (--fit-eyes).
        self.shape = self.lids = None
        # Whether predict() averages with what it sees in the mirrored face.
        self.flip_test = False
        self.register_buffer("flip", torch.from_numpy(scheme.flip), persistent=False)
        # The constants of ImageNet, which timm's weights expect, for pixels of 0..255.
        self.register_buffer("mean", 255 * torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(STD).view(1, 3, 1, 1), persistent=False)

    def forward(self, images):
        """(N, 3, S, S) uint8 or 0..255 floats to what the head predicts: Maps, or (N, K, 2)."""
        return self.head(self.backbone(self.normalise(images)))

    def normalise(self, images):
        """(N, 3, S, S) uint8 or 0..255 floats to floats of mean 0 and deviation 1."""
        # Laid out as a row of pixels: in channels_last, three numbers alone are a slow inner loop.
        mean, std = (values.expand(1, 3, 1, images.shape[3]).contiguous(
            memory_format=torch.channels_last) for values in (self.mean, self.std))
        return (images.to(mean.dtype) - mean) / std

    def predict(self, images):
        """uint8 RGB (N, 3, S, S) to landmarks (N, K, 2) in crop units and confidence (N, K).

        Raises ValueError for other images: it would take them, and see nothing.
        """
        if (images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != 3
                or images.shape[2] != images.shape[3] or images.shape[3] % 32):
            raise ValueError(f"images are {images.dtype} {tuple(images.shape)}, expected uint8 "
                             f"(N, 3, S, S), S a multiple of 32")
        images = self.normalise(images)
        if not self.flip_test:
            features = self.backbone(images)
            return self._mend(features, *self.head.predict(features))
        both = self.backbone(torch.cat([images, images.flip(3)]))
        features, (landmarks, mirrored), (confidence, other) = (
            v.unflatten(0, (2, -1)) for v in (both, *self.head.predict(both)))
        x, y = mirrored.index_select(1, self.flip).unbind(2)
        # What is mended after the mean stays what was fitted to faces that are not mirrored.
        return self._mend(features[0], (landmarks + torch.stack([1 - x, y], 2)) / 2,
                          (confidence + other.index_select(1, self.flip)) / 2)

    def locate(self, features):
        """Features (N, C, G, G) to landmarks and confidence, without what the lids do to them."""
        landmarks, confidence = self.head.predict(features)
        return self._shaped(landmarks), confidence

    def _mend(self, features, landmarks, confidence):
        """Landmarks as the heads fitted after training leave them, where there are any."""
        landmarks = self._shaped(landmarks)
        if self.lids is None:
            return landmarks, confidence
        with full_precision(features):
            return self.lids(precise(features), landmarks), confidence

    def _shaped(self, landmarks):
        if self.shape is None:
            return landmarks
        with full_precision(landmarks):
            return self.shape(precise(landmarks))


def check_size(input_size, stride, name="", only=None):
    """Raises UserError where the backbone's stride does not divide the input size.

    Also for output stride 16 the trunk goes down to 32, and its maps must line up. only: the one
    size that the backbone of this name takes, or None.
    """
    if only not in (None, input_size):
        raise UserError(f"backbone {name} takes images of {only} px only, found input size "
                        f"{input_size}; give --input-size {only} or another --backbone")
    if input_size < 32 or input_size % 32:
        nearest = max(32, round(input_size / 32) * 32)
        raise UserError(f"input size {input_size} is not a multiple of the backbone's total stride "
                        f"32 (output stride {stride}); nearest: {nearest}")


def check_maps(model, input_size, batch):
    """Raises UserError where a LandmarkNet's backbone gives no map of input_size / stride cells, or
    batches of so many images leave its batch norm one number a channel to learn from.
    """
    backbone, wanted = model.backbone, input_size // model.stride
    device, training = next(model.parameters()).device, model.training
    try:
        with torch.no_grad():
            found = tuple(backbone.eval()(torch.zeros(1, 3, input_size, input_size, device=device))
                          .shape[2:])
    except RuntimeError as error:
        found = " ".join(str(error).split())[:100]
    model.train(training)
    if found != (wanted, wanted):
        raise UserError(f"the backbone's map of a {input_size} px image is not {wanted} x {wanted} "
                        f"cells ({found}), as stride {model.stride} asks: it cuts its borders off; "
                        f"give another --backbone")
    if batch == 1 and input_size == 32 and any(isinstance(m, torch.nn.BatchNorm2d)
                                               for m in backbone.modules()):
        raise UserError("--batch-size 1 with --input-size 32 leaves batch norm one number a "
                        "channel; give a larger one of the two")


def gmacs(model, input_size):
    """Billions of multiply-accumulates for one image (convolutions and matrix products)."""
    device = next(model.parameters()).device
    image = torch.zeros(1, 3, input_size, input_size, dtype=torch.uint8, device=device)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model.predict(image)
    # torch counts a multiplication and an addition as two.
    return counter.get_total_flops() / 2e9


def parameters(model):
    """Number of learnable parameters."""
    return sum(p.numel() for p in model.parameters())
