"""A .pt or .onnx file as one function: crops in, landmarks and confidence out."""
import json
import pathlib

import numpy

from utils.errors import UserError
from utils.landmarks.eyelids import EyeThresholds
from utils.landmarks.schemes import Scheme


class Predictor:
    """Landmarks of crops, from a checkpoint or an ONNX file of this repository.

    device: auto, cpu or cuda. threads: of the CPU, else all. lids: False leaves out what the lid
    head of a .pt says of shut eyes. flip_test: it must average with the mirrored face; a .pt does
    so then, an .onnx was exported so or not. `input_size`, `scheme` (a Scheme), `crop` ({"rule",
    "scale"}) and `eyes` (eyelids.EyeThresholds) come from the file; `scored`: whether confidence means
    anything, as a regression's is 1 of all it sees; `model` is the LandmarkNet of a .pt, else None.
    Raises UserError for a file that is neither.
    """

    def __init__(self, path, device="cpu", threads=None, lids=True, flip_test=False):
        self.path, self.model = pathlib.Path(path), None
        if not self.path.is_file():
            raise UserError(f"{path}: no such file" if not self.path.exists() else
                            f"{path}: is no file")
        if self.path.suffix == ".onnx":
            self._load_onnx(device, threads, flip_test)
        else:
            self._load_torch(device, threads, lids, flip_test)

    def __call__(self, images):
        """uint8 RGB (N, S, S, 3) to landmarks (N, K, 2) in crop units and confidence (N, K).

        Raises ValueError for other images: a network of torch would take them, and see nothing.
        """
        images, size = numpy.asarray(images), self.input_size
        if not len(images):
            empty = numpy.zeros((0, self.scheme.points, 2), numpy.float32)
            return empty, empty[..., 0]
        if images.dtype != numpy.uint8 or images.shape[1:] != (size, size, 3):
            raise ValueError(f"images are {images.dtype} {images.shape}, expected uint8 "
                             f"(N, {size}, {size}, 3)")
        return self._run(numpy.ascontiguousarray(images.transpose(0, 3, 1, 2)))

    def _load_onnx(self, device, threads, flip_test):
        import onnxruntime
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        # Threads that wait at full speed make a prediction a quarter faster, but between two of
        # them they only take a core from whatever else runs.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if threads:
            options.intra_op_num_threads = threads
        try:
            session = onnxruntime.InferenceSession(str(self.path), options,
                                                   providers=_providers(device))
        except UserError:
            raise
        except Exception as error:
            # ONNX Runtime raises its own kinds, which are not exported by name.
            raise UserError(f"{self.path}: cannot be used as an ONNX model: "
                            f"{' '.join(str(error).split())[:160]}") from None
        if device.startswith("cuda") and "CUDAExecutionProvider" not in session.get_providers():
            raise UserError(f"{self.path}: ONNX Runtime {onnxruntime.__version__} cannot use the "
                            f"GPU here; its package onnxruntime-gpu must fit the CUDA and cuDNN "
                            f"that are installed, or give --device cpu")
        described = session.get_modelmeta().custom_metadata_map
        try:
            self.input_size = int(described["input_size"])
            self.scheme = Scheme.from_state(json.loads(described["scheme"]))
            crop = json.loads(described["crop"])
            self.crop = {"rule": str(crop["rule"]), "scale": float(crop["scale"])}
            self.eyes = EyeThresholds.from_state(json.loads(described.get("eyes", "null")))
        except UserError as error:
            raise UserError(f"{self.path}: {error}") from None
        except (KeyError, ValueError, TypeError) as error:
            raise UserError(f"{self.path}: an ONNX model, but not of this repository (metadata: "
                            f"{error!r}); export it with main.py --export") from None
        self.flip_test = described.get("flip_test") == "true"
        if flip_test and not self.flip_test:
            raise UserError(f"{self.path}: does not average with the mirrored face; export it so: "
                            f"main.py --export --flip-test")
        images, outputs = session.get_inputs()[0], [o.name for o in session.get_outputs()]
        if images.type != "tensor(uint8)" or outputs != ["landmarks", "confidence"]:
            raise UserError(f"{self.path}: takes {images.type} and gives {', '.join(outputs)}; "
                            f"expected uint8 and landmarks, confidence")
        self.session, name = session, images.name
        self._run = lambda images: session.run(None, {name: images})
        size, points = self.input_size, self.scheme.points
        try:
            found = self._run(numpy.zeros((1, 3, size, size), numpy.uint8))
        except Exception:
            # ONNX Runtime's own kinds again.
            found = []
        if [o.shape for o in found] != [(1, points, 2), (1, points)]:
            raise UserError(f"{self.path}: does not give {points} landmarks of a {size} px crop, "
                            f"as its metadata says; export it again with main.py --export")
        # Of a black image: files do not name their head.
        self.scored = bool((found[1] < 1).any())

    def _load_torch(self, device, threads, lids, flip_test):
        import torch

        from utils.checkpoint import load_model
        from utils.machine import choose_device
        if threads:
            torch.set_num_threads(threads)
        device = choose_device(device)
        self.model = model = load_model(self.path, device, lids, flip_test=flip_test)
        self.input_size, self.scheme, self.crop = model.input_size, model.scheme, model.crop
        self.eyes, self.scored = model.eyes, model.args.head == "pip"
        self.flip_test = model.flip_test

        def predict(images):
            with torch.inference_mode():
                landmarks, confidence = model.predict(torch.from_numpy(images).to(device))
            return landmarks.cpu().numpy(), confidence.cpu().numpy()

        self._run = predict


def _providers(device):
    """ONNX Runtime's providers; CUDA is listed by its package even where there is no GPU."""
    if device == "cpu":
        return ["CPUExecutionProvider"]
    from utils.machine import choose_device
    chosen = choose_device(device)
    if chosen.type == "cpu":
        return ["CPUExecutionProvider"]
    return [("CUDAExecutionProvider", {"device_id": chosen.index or 0}), "CPUExecutionProvider"]
