"""Distillation: a trained model corrects the landmarks that another one learns from."""
import pathlib

import torch

from utils import checkpoint
from utils.errors import UserError
from utils.landmarks import lids, schemes


class Teacher:
    """Called with images and their landmarks, gives landmarks moved towards what it sees itself.

    path: a .pt of this repository, of any backbone and input size. scheme: of the landmarks, which
    may be some of the teacher's. share: how far they move, 0 (not at all) to 1. Eyes that the
    labels shut stay as they are: a teacher that has seen few such would open them. Raises UserError
    where the teacher knows other points.
    """

    def __init__(self, path, scheme, share, device="cpu"):
        self.model, self.share = checkpoint.load_model(pathlib.Path(path), device), share
        known = self.model.scheme
        same = (known.name, known.points) == (scheme.name, scheme.points)
        if not same and not schemes.fits(scheme, known):
            raise UserError(f"teacher: {path}: has the {known.name} scheme ({known.points} "
                            f"points), which does not hold {scheme.name} ({scheme.points})")
        # Where they are used: a list as an index would be copied to the device each time.
        self.points = slice(None) if same else torch.tensor(list(scheme.indices), device=device)
        self.eyes = [(contour, torch.tensor(contour, device=device))
                     for contour in scheme.eyes or ()]

    @torch.no_grad()
    def __call__(self, images, landmarks):
        """Images (N, 3, S, S) of 0..255 and landmarks (N, K, 2) in crop units to such landmarks."""
        size = self.model.input_size
        if images.shape[-1] != size:
            images = torch.nn.functional.interpolate(images.float(), (size, size), mode="bilinear",
                                                     antialias=True)
            images = images.round().clamp(0, 255).to(torch.uint8)
        found, _ = self.model.predict(images.contiguous(memory_format=torch.channels_last))
        move = self.share * (found[:, self.points].to(landmarks.dtype) - landmarks)
        for contour, indices in self.eyes:
            shut = lids.aspect_ratio(landmarks.double(), contour) < lids.NEARLY_SHUT
            move[:, indices] *= ~shut[:, None, None]
        return landmarks + move
