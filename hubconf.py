"""Entry point of torch.hub.

`torch.hub.load("path/of/this/repository", "pipnet", source="local")` returns a trained model.
"""
from nets.model import LandmarkNet
from utils import checkpoint, experiment

dependencies = ["torch", "torchvision", "timm", "numpy", "yaml"]


def pipnet(weights: str = "fast", device: str = "cpu") -> LandmarkNet:
    """Load a trained model in evaluation mode, without gradients.

    `model.predict(images)` takes uint8 RGB crops (N, 3, S, S), S = model.input_size, and returns
    landmarks (N, K, 2) in crop units and confidence (N, K). `model.crop` is the rule of the crops,
    `model.scheme` the landmark scheme.

    `.half()` and `.bfloat16()` convert the backbone; the heads stay in float32, and so do landmarks
    and confidence. `torch.compile(model.predict)` works; torch.export takes a module whose forward
    calls predict. The model called itself returns the maps of the head.

    Args:
        weights: name of a shipped model (tiny, fast, accurate, eyes, irnet18), an experiment, or
            the path of a .pt.
        device: device of the model.

    Raises:
        UserError: there are no such weights.
    """
    # Without gradients, results do not keep a graph. To train the model, call requires_grad_().
    return checkpoint.load_model(experiment.find_weights(weights), device).requires_grad_(False)
