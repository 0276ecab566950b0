"""One interface to trained models: a .pt or .onnx file as a function of crops.

`Predictor` runs checkpoints with PyTorch and exported files with ONNX Runtime. Demo, evaluation and
self-training use it, so that they behave the same with either file. Finding faces and cutting crops
is left to utils/detection; `Predictor.crop` holds the rule. torch and onnxruntime are imported only
when a file needs them.
"""
from __future__ import annotations

import json
import pathlib

import numpy

from utils.errors import UserError
from utils.files import refuse_lfs_pointer
from utils.landmarks import metrics
from utils.landmarks.eyelids import EyeThresholds
from utils.landmarks.schemes import Scheme


class Predictor:
    """Predicts landmarks of face crops with a checkpoint or an ONNX file of this repository.

    Args:
        path: a .pt or .onnx file.
        device: auto, cpu or cuda.
        threads: CPU threads; None for all.
        lids: use the lid head of a .pt, if it has one.
        flip_test: average with the prediction of the mirrored crop. An .onnx must have been
            exported with --flip-test.

    Attributes:
        input_size: S, side of the crops in pixels.
        scheme: landmark scheme of the K points.
        crop: {"rule", "scale"}, how crops are cut; see utils.landmarks.crop.face_box.
        eyes: thresholds of open and closed eyes.
        has_confidence: False for a regression head, whose confidence is always 1.
        flip_test: whether predictions are averaged with those of the mirrored crop.
        model: the LandmarkNet of a .pt, else None.

    Raises:
        UserError: the file is missing, damaged or of another kind, or the device cannot be used.
    """

    def __init__(self, path: str | pathlib.Path, device: str = "cpu", threads: int | None = None,
                 lids: bool = True, flip_test: bool = False):
        self.path, self.model = pathlib.Path(path), None
        if not self.path.is_file():
            raise UserError(f"{path}: no such file" if not self.path.exists() else
                            f"{path}: not a file")
        refuse_lfs_pointer(self.path)
        if self.path.suffix == ".onnx":
            self._load_onnx(device, threads, flip_test)
        else:
            self._load_torch(device, threads, lids, flip_test)

    def __call__(self, images: numpy.ndarray) -> tuple[numpy.ndarray, numpy.ndarray]:
        """Predict landmarks and confidence.

        Args:
            images: uint8 RGB crops (N, S, S, 3); N may be 0.

        Returns:
            Landmarks (N, K, 2) in crop units, and confidence (N, K) in 0..1, both float32.

        Raises:
            ValueError: images of another type or shape, which would give meaningless landmarks.
        """
        images = numpy.asarray(images)
        if not len(images):
            empty = numpy.zeros((0, self.scheme.points, 2), numpy.float32)
            return empty, empty[..., 0]
        return self._run(self._batch(images))

    def use_flip_test(self) -> None:
        """Average with the prediction of the mirrored crop from now on, in twice the time.

        Raises:
            UserError: an .onnx, or a scheme without mirrored faces.
        """
        if self.model is None:
            raise UserError(f"{self.path}: --flip-test needs the .pt")
        if not self.scheme.mirrors:
            raise UserError(f"{self.path}: --flip-test: scheme {self.scheme.name} has flip: none")
        self.model.flip_test = self.flip_test = True

    def predict_both(self, images: numpy.ndarray) -> numpy.ndarray:
        """Predict landmarks of crops and of their mirror images, for metrics.mirror_error.

        With a .pt, these are predictions without the heads that were fitted to unmirrored faces.

        Args:
            images: uint8 RGB crops (N, S, S, 3), N at least 1.

        Returns:
            (N, 2, K, 2) in crop units of the images.

        Raises:
            UserError: an .onnx that averages both predictions.
        """
        images = numpy.asarray(images)
        if self.model is not None:
            import torch
            with torch.inference_mode():
                both = self.model.predict_both(
                    torch.from_numpy(self._batch(images)).to(self.model.mean.device))
            return both.cpu().numpy()
        if self.flip_test:
            raise UserError(f"{self.path}: averages with the mirrored face, so that their "
                            f"difference is lost; give the .pt")
        landmarks, mirrored = numpy.split(
            self(numpy.concatenate([images, images[:, :, ::-1]]))[0], 2)
        return numpy.stack([landmarks, metrics.mirror_back(mirrored, self.scheme)], 1)

    def _batch(self, images):
        size = self.input_size
        if images.dtype != numpy.uint8 or images.shape[1:] != (size, size, 3):
            raise ValueError(f"images are {images.dtype} {images.shape}, expected uint8 "
                             f"(N, {size}, {size}, 3)")
        return numpy.ascontiguousarray(images.transpose(0, 3, 1, 2))

    def _load_onnx(self, device, threads, flip_test):
        import onnxruntime
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        # Spinning threads make a prediction a quarter faster. Between predictions they would only
        # take a core from other work.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if threads:
            options.intra_op_num_threads = threads
        providers = _providers(device)
        try:
            session = onnxruntime.InferenceSession(str(self.path), options, providers=providers)
        except Exception as error:
            # ONNX Runtime raises exception types that it does not export.
            raise UserError(f"{self.path}: cannot be used as an ONNX model: "
                            f"{' '.join(str(error).split())[:160]}") from None
        if device.startswith("cuda") and "CUDAExecutionProvider" not in session.get_providers():
            raise UserError(f"{self.path}: ONNX Runtime {onnxruntime.__version__} cannot use the "
                            f"GPU here; its package onnxruntime-gpu must fit the CUDA and cuDNN "
                            f"that are installed, or give --device cpu")
        metadata = session.get_modelmeta().custom_metadata_map
        try:
            self.input_size = int(metadata["input_size"])
            self.scheme = Scheme.from_state(json.loads(metadata["scheme"]))
            crop = json.loads(metadata["crop"])
            self.crop = {"rule": str(crop["rule"]), "scale": float(crop["scale"])}
            self.eyes = EyeThresholds.from_state(json.loads(metadata.get("eyes", "null")))
        except UserError as error:
            raise UserError(f"{self.path}: {error}") from None
        except (KeyError, ValueError, TypeError) as error:
            raise UserError(f"{self.path}: an ONNX model, but not of this repository (metadata: "
                            f"{error!r}); export it with main.py --export") from None
        self.flip_test = metadata.get("flip_test") == "true"
        if flip_test and not self.flip_test:
            raise UserError(f"{self.path}: was exported without --flip-test; export it again with "
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
            # Exception types of ONNX Runtime, as above.
            found = []
        if [o.shape for o in found] != [(1, points, 2), (1, points)]:
            raise UserError(f"{self.path}: does not give {points} landmarks of a {size} px crop, "
                            f"as its metadata says; export it again with main.py --export")
        # Tested on a black image, because files do not name their head.
        self.has_confidence = bool((found[1] < 1).any())

    def _load_torch(self, device, threads, lids, flip_test):
        import torch

        from utils.checkpoint import load_model
        from utils.machine import choose_device
        if threads:
            torch.set_num_threads(threads)
        device = choose_device(device)
        self.model = model = load_model(self.path, device, lids, flip_test=flip_test)
        self.input_size, self.scheme, self.crop = model.input_size, model.scheme, model.crop
        self.eyes, self.has_confidence = model.eyes, model.args.head == "pip"
        self.flip_test = model.flip_test

        def predict(images):
            with torch.inference_mode():
                landmarks, confidence = model.predict(torch.from_numpy(images).to(device))
            return landmarks.cpu().numpy(), confidence.cpu().numpy()

        self._run = predict


def _providers(device):
    """Choose ONNX Runtime's providers; onnxruntime-gpu lists CUDA even without a GPU."""
    if device == "cpu":
        return ["CPUExecutionProvider"]
    from utils.machine import choose_device
    chosen = choose_device(device)
    if chosen.type == "cpu":
        return ["CPUExecutionProvider"]
    return [("CUDAExecutionProvider", {"device_id": chosen.index or 0}), "CPUExecutionProvider"]
