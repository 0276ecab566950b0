"""For torch.hub: torch.hub.load("path/of/this/repository", "pipnet", source="local")."""
from utils import checkpoint, experiment

dependencies = ["torch", "torchvision", "timm", "numpy", "yaml"]


def pipnet(weights="fast", device="cpu"):
    """A trained nets.model.LandmarkNet in evaluation mode.

    weights: shipped ones by name (tiny, fast, accurate, eyes, irnet18), an
    experiment, or the path of a .pt.
    `model.predict(images)` takes uint8 RGB crops (N, 3, S, S), S = model.input_size, and gives
    landmarks (N, K, 2) in crop units and confidence (N, K); model.crop says how a crop is laid,
    model.scheme what the points are. Raises utils.errors.UserError.
    """
    # Who trains it on turns this back; who does not would keep a graph with each result.
    return checkpoint.load_model(experiment.find_weights(weights), device).requires_grad_(False)
