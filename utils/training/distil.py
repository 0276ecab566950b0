"""Distillation: trained models correct the landmarks that another one learns from."""
import torch

from utils import checkpoint
from utils.errors import UserError
from utils.landmarks import eyelids, schemes


class Teacher:
    """Called with images and their landmarks, gives landmarks moved towards what it sees itself.

    setting: a .pt of this repository, of any backbone and input size, or several, A.pt,B.pt, of
    whose landmarks it is the mean. scheme: of the landmarks, which may be some of each model's.
    share: how far they move, 0 (not at all) to 1. Eyes that the labels shut stay as they are: a
    teacher that has seen few such would open them. Raises UserError where a model knows other
    points.
    """

    def __init__(self, setting, scheme, share, device="cpu"):
        self.share, self.models, self.points = share, [], []
        for path in checkpoint.teachers(setting):
            model = checkpoint.load_model(path, device)
            known = model.scheme
            same = (known.name, known.points) == (scheme.name, scheme.points)
            if not same and not schemes.fits(scheme, known):
                raise UserError(f"teacher: {path}: has the {known.name} scheme ({known.points} "
                                f"points), which does not hold {scheme.name} ({scheme.points})")
            self.models.append(model)
            # On the device: a list as an index would be copied there each time.
            self.points.append(slice(None) if same else
                               torch.tensor(list(scheme.indices), device=device))
        self.eyes = [(contour, torch.tensor(contour, device=device))
                     for contour in scheme.eyes or ()]

    @torch.no_grad()
    def __call__(self, images, landmarks):
        """Images (N, 3, S, S) of 0..255 and landmarks (N, K, 2) in crop units to such landmarks."""
        found = sum(model.predict(_resized(images, model.input_size))[0][:, points]
                    .to(landmarks.dtype) for model, points in zip(self.models, self.points))
        move = self.share * (found / len(self.models) - landmarks)
        for contour, indices in self.eyes:
            shut = eyelids.aspect_ratio(landmarks.double(), contour) < eyelids.NEARLY_SHUT
            move[:, indices] *= ~shut[:, None, None]
        return landmarks + move


def _resized(images, size):
    if images.shape[-1] != size:
        images = torch.nn.functional.interpolate(images.float(), (size, size), mode="bilinear",
                                                 antialias=True)
        images = images.round().clamp(0, 255).to(torch.uint8)
    return images.contiguous(memory_format=torch.channels_last)
