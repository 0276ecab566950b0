"""Distillation: move training labels towards the predictions of trained models."""
from __future__ import annotations

import torch

from utils import checkpoint, provenance
from utils.errors import UserError
from utils.landmarks import eyelids, schemes


class Teacher:
    """Moves labels towards the mean prediction of one or more trained models.

    Eyes that the labels show closed stay as labelled, because a teacher that saw few of them would
    open them.

    Args:
        setting: A.pt, or several as A.pt,B.pt: checkpoints of this repository, of any backbone and
            input size.
        scheme: of the labels; each model must predict at least these landmarks.
        share: how far to move labels, from 0 (not at all) to 1 (to the prediction).
        device: where the models run.

    Raises:
        UserError: if a model does not predict the landmarks of the scheme.
    """

    def __init__(self, setting: str, scheme: schemes.Scheme, share: float,
                 device: torch.device | str = "cpu"):
        self.share, self.models, self.points = share, [], []
        for path in provenance.teacher_paths(setting):
            model = checkpoint.load_model(path, device)
            known = model.scheme
            same = (known.name, known.points) == (scheme.name, scheme.points)
            if not same and not schemes.is_part_of(scheme, known):
                raise UserError(f"teacher: {path}: has the {known.name} scheme ({known.points} "
                                f"points), which does not hold {scheme.name} ({scheme.points})")
            self.models.append(model)
            # A tensor on the device: a list as index would be copied there in each step.
            self.points.append(slice(None) if same else
                               torch.tensor(list(scheme.indices), device=device))
        self.eyes = [(contour, torch.tensor(contour, device=device))
                     for contour in scheme.eyes or ()]

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, landmarks: torch.Tensor) -> torch.Tensor:
        """Return the moved labels.

        Args:
            images: uint8 (N, 3, S, S).
            landmarks: labels (N, K, 2) in crop units; NaN stays NaN.
        """
        found = sum(model.predict(_resize(images, model.input_size))[0][:, points]
                    .to(landmarks.dtype) for model, points in zip(self.models, self.points))
        move = self.share * (found / len(self.models) - landmarks)
        for contour, indices in self.eyes:
            closed = eyelids.aspect_ratio(landmarks.double(), contour) < eyelids.NEARLY_SHUT
            move[:, indices] *= ~closed[:, None, None]
        return landmarks + move


def _resize(images, size):
    if images.shape[-1] != size:
        images = torch.nn.functional.interpolate(images.float(), (size, size), mode="bilinear",
                                                 antialias=True)
        images = images.round().clamp(0, 255).to(torch.uint8)
    return images.contiguous(memory_format=torch.channels_last)
