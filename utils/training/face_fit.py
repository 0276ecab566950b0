"""Fit the face score (utils/detection/face_score.py) to faces and to crops without one.

    python -m utils.training.face_fit --faces FOLDER ... --scenes FOLDER ... [--output FILE.npz]

A photo of a folder of faces shows one in its middle; its landmarks are predicted and their crop is
an example of a face. Examples without a face are what the landmark network makes of squares beside
the faces (ears, hair, hands, clothes, background) and of squares and Haar's boxes in scenes, which
show nobody; furthermore crops of faces that are placed wrongly: turned, or of a part. Every second
photo is left for tests (tools/benchmark/face_scores.py). Half an hour on one CPU core.
"""
from __future__ import annotations

import argparse
import pathlib

import cv2
import numpy
import torch
import tqdm
from torch import nn

from utils.data.drawn_faces.render import render
from utils.data.photo import IMAGE_SUFFIXES, read_photo
from utils.detection.detector import Detector, get_detector, iou
from utils.detection.face_score import GROWTH, PATH, SIDE, STRIDES, cut_grey, normalise
from utils.detection.refine import place_crops, predict_boxes
from utils.errors import UserError, run
from utils.files import atomic_write
from utils.predictor import Predictor

# Examples are stored with a margin, so that they can be moved: STORED pixels show STORED / SIDE
# times as much.
STORED = 64
CHANNELS = (16, 32, 48, 64)
# Squares beside a face: how many, their side in sides of its crop, and the distance of centres.
BESIDE, BESIDE_SIDE, BESIDE_DISTANCE = 5, (0.35, 1.1), (0.55, 1.6)
# Squares of a scene: how many, and their side in shorter sides of the picture.
SCENE, SCENE_SIDE = 150, (0.06, 0.5)
# Further squares of a scene, of which those are kept that have this share of the confidence that a
# face needs.
HARD, NEARLY_SURE = 250, 0.8
PATTERNS = 0.15  # Share of the examples without a face that are drawn patterns.
# Crops that overlap a face by less are none; crops of a face agree with the detector by more.
NO_FACE_IOU, FACE_IOU = 0.2, 0.45
MIN_CONTRAST = 6.0  # Standard deviation in grey levels of an example without a face.
DRAWN = 400  # Drawn faces, which the tests and the README's pictures show.
EPOCHS, BATCH, LEARNING_RATE = 14, 128, 2e-3


def photos(folder: pathlib.Path, held_out: bool = False) -> list[pathlib.Path]:
    """Return every second photo of a folder: those of the fit, or the others."""
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    if len(found) < 2:
        raise UserError(f"{folder}: {len(found)} photos found, 2 or more are needed")
    return found[held_out::2]


def settle(predictor: Predictor, image: numpy.ndarray,
           boxes: numpy.ndarray) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Return the crops (n, 4) and rolls (n,) after two predictions from boxes (n, 4)."""
    placed = place_crops(predictor, predict_boxes(predictor, image, boxes)[0])
    return place_crops(predictor, predict_boxes(predictor, image, *placed)[0])


def examples_of_face(image: numpy.ndarray, predictor: Predictor, detector: Detector,
                     rng: numpy.random.Generator) -> tuple[list, list]:
    """Return the stored crops of the face in the middle of a photo, and of what is beside it."""
    crops = detector.to_crop(detector(image), predictor.crop["scale"])
    middle = numpy.array(image.shape[1::-1]) / 2
    holds = ((crops[:, :2] < middle) & (middle < crops[:, 2:])).all(1)
    if not holds.any():
        return [], []
    face = crops[holds.argmax()]
    found, rolls = settle(predictor, image, numpy.concatenate([
        face[None], squares_beside(face, rng)]))
    shared = iou(found, crops).max(1)
    is_face = bool(shared[0] > FACE_IOU)
    middles = (found[:, :2] + found[:, 2:]) / 2
    inside = ((middles > 0) & (middles < image.shape[1::-1])).all(1)
    beside = [i for i in range(1, len(found)) if shared[i] < NO_FACE_IOU and inside[i]]
    return [stored(image, found[0], rolls[0])] * is_face, \
        [stored(image, found[i], rolls[i]) for i in beside]


def squares_beside(face: numpy.ndarray, rng: numpy.random.Generator) -> numpy.ndarray:
    """Return random squares (BESIDE, 4) around the crop (4,) of a face."""
    side, centre = face[2] - face[0], (face[:2] + face[2:]) / 2
    angle = rng.uniform(0, 2 * numpy.pi, BESIDE)
    shift = numpy.stack([numpy.cos(angle), numpy.sin(angle)], 1) * (
        side * rng.uniform(*BESIDE_DISTANCE, (BESIDE, 1)))
    half = side * rng.uniform(*BESIDE_SIDE, (BESIDE, 1)) / 2
    return numpy.concatenate([centre + shift - half, centre + shift + half], 1)


def squares_of_scene(image: numpy.ndarray, rng: numpy.random.Generator,
                     count: int = SCENE) -> numpy.ndarray:
    """Return random squares (count, 4) of a picture."""
    side = min(image.shape[:2]) * numpy.exp(rng.uniform(*numpy.log(SCENE_SIDE), (count, 1)))
    corner = rng.uniform(0, 1, (count, 2)) * (numpy.array(image.shape[1::-1]) - side)
    return numpy.concatenate([corner, corner + side], 1)


def examples_of_scene(image: numpy.ndarray, predictor: Predictor, haar: Detector,
                      rng: numpy.random.Generator) -> list[numpy.ndarray]:
    """Return stored crops of a picture that shows nobody: of Haar's boxes and of squares."""
    shape = numpy.array(image.shape[1::-1])
    start = numpy.concatenate([haar.to_crop(haar(image), predictor.crop["scale"]),
                               squares_of_scene(image, rng)])
    rows = [settle(predictor, image, part) for part in numpy.array_split(
        start, -(-len(start) // 16))]
    return [stored(image, box, roll) for boxes, rolls in rows for box, roll in zip(boxes, rolls)
            if ((box[:2] + box[2:] > 0) & (box[:2] + box[2:] < 2 * shape)).all()]


def hard_examples_of_scene(image: numpy.ndarray, predictor: Predictor,
                           rng: numpy.random.Generator) -> list[numpy.ndarray]:
    """Return stored crops of squares of which the landmark network is nearly as sure as of faces.

    The picture is searched as it is and out of focus, as the background of a face often is.
    """
    found = []
    for sigma in (0, rng.uniform(2, 8)):
        blurred = cv2.GaussianBlur(image, (0, 0), sigma) if sigma else image
        for part in numpy.array_split(squares_of_scene(blurred, rng, HARD), -(-HARD // 16)):
            points, confidence = predict_boxes(predictor, blurred, *place_crops(
                predictor, predict_boxes(predictor, blurred, part)[0]))
            sure = confidence.mean(1) >= NEARLY_SURE * predictor.eyes.face
            found += [stored(blurred, box, roll)
                      for box, roll in zip(*place_crops(predictor, points[sure]))]
    return found


def pattern(rng: numpy.random.Generator) -> numpy.ndarray:
    """Draw rows of windows, bars or blots, which resemble eyes and a mouth, as a stored crop."""
    canvas = numpy.full((2 * STORED,) * 2, rng.uniform(0, 255), numpy.float32)
    step, size = rng.uniform(8, 50, 2), rng.uniform(0.2, 0.8, 2)
    for x in numpy.arange(rng.uniform(-20, 0), 2 * STORED, step[0]):
        for y in numpy.arange(rng.uniform(-20, 0), 2 * STORED, step[1]):
            middle = numpy.array([x, y]) + rng.normal(0, 0.06, 2) * step
            tone = float(numpy.clip(rng.normal(90, 70), 0, 255))
            half = numpy.maximum(step * size / 2 * rng.uniform(0.7, 1.3), 1)
            if rng.random() < 0.5:
                cv2.ellipse(canvas, (tuple(middle), tuple(2 * half), 0), tone, -1)
            else:
                low, high = (tuple(map(int, middle + sign * half)) for sign in (-1, 1))
                cv2.rectangle(canvas, low, high, tone, -1)
    matrix = cv2.getRotationMatrix2D((STORED, STORED), rng.normal(0, 12), rng.uniform(0.5, 1))
    matrix[:, :2] += rng.normal(0, 0.08, (2, 2))
    matrix[:, 2] -= STORED / 2
    canvas = cv2.GaussianBlur(cv2.warpAffine(canvas, matrix, (STORED, STORED),
                                             borderMode=cv2.BORDER_REFLECT), (0, 0),
                              rng.uniform(0.5, 4))
    return canvas.astype(numpy.uint8)


def stored(image: numpy.ndarray, box: numpy.ndarray, roll: float) -> numpy.ndarray:
    """Cut the grey crop (STORED, STORED) of an example."""
    return cut_grey(image, box, roll, GROWTH * STORED / SIDE, STORED)


def collect(options: argparse.Namespace) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Return the examples of faces and of no faces, each (n, STORED, STORED) uint8."""
    predictor = Predictor(options.weights, threads=1)
    detector, haar = get_detector(options.detector).low_resolution(), get_detector("haar")
    faces, others = [], []
    for folder in options.faces:
        found = photos(folder)
        for i, path in enumerate(tqdm.tqdm(found[::-(-len(found) // options.photos)],
                                           desc=folder.name)):
            image = read_photo(path, upright=True)
            if image is not None:
                one, beside = examples_of_face(image, predictor, detector,
                                               numpy.random.default_rng([0, i]))
                faces, others = faces + one, others + beside
    for seed in range(DRAWN):
        image = render([seed])[0]
        faces += examples_of_face(image, predictor, detector, numpy.random.default_rng(seed))[0]
    for folder in options.scenes:
        for i, path in enumerate(tqdm.tqdm(photos(folder), desc=folder.name)):
            others += examples_of_scene(read_photo(path, upright=True), predictor, haar,
                                        numpy.random.default_rng([1, i]))
    for folder in options.scenes:
        for i, path in enumerate(tqdm.tqdm(photos(folder), desc=f"{folder.name}, hard")):
            others += hard_examples_of_scene(read_photo(path, upright=True), predictor,
                                             numpy.random.default_rng([4, i]))
    return numpy.stack(faces), numpy.stack(others)


def vary(stored_crop: numpy.ndarray, is_face: bool, rng: numpy.random.Generator,
         textures: numpy.ndarray) -> tuple[numpy.ndarray, bool]:
    """Return a random variant (SIDE, SIDE) of a stored crop, and whether it shows a face."""
    zoom, angle = numpy.exp(rng.normal(0, 0.1)), rng.normal(0, 8)
    shift = rng.normal(0, 0.05, 2)
    if not is_face and rng.random() < PATTERNS:
        stored_crop = pattern(rng)
    if is_face and rng.random() < 0.1:
        # Placed wrongly: turned, or on a part of the face.
        is_face = False
        if rng.random() < 0.5:
            angle += rng.choice([90, 180, 270])
        else:
            zoom, shift = rng.uniform(2.2, 3), rng.uniform(-0.3, 0.3, 2)
    centre = STORED / 2 - 0.5 + shift * SIDE
    matrix = cv2.getRotationMatrix2D(centre.tolist(), angle, zoom)
    matrix[:, 2] += (SIDE / 2 - 0.5) - centre
    crop = cv2.warpAffine(stored_crop, matrix, (SIDE, SIDE), borderMode=cv2.BORDER_REPLICATE)
    if rng.random() < 0.5:
        crop = crop[:, ::-1]
    crop = crop.astype(numpy.float32)
    if rng.random() < 0.6:  # What lies outside a photo is black there, and not in films.
        crop[crop == 0] = rng.uniform(0, 255)
    if is_face and rng.random() < 0.35:
        crop = cover(crop, rng, textures)
    if rng.random() < 0.35:  # Small and blurred faces.
        small = int(rng.uniform(14, SIDE))
        crop = cv2.resize(cv2.resize(crop, (small, small), interpolation=cv2.INTER_AREA),
                          (SIDE, SIDE), interpolation=cv2.INTER_LINEAR)
    if rng.random() < 0.3:  # Light from one side.
        light = numpy.outer(*(numpy.linspace(*rng.uniform(0.4, 1.6, 2), SIDE) for _ in "yx"))
        crop = crop * light
    crop = crop * rng.uniform(0.1, 1.2) + rng.normal(0, rng.uniform(0, 8), crop.shape)
    return numpy.clip(crop, 0, 255).astype(numpy.uint8), is_face


def cover(crop: numpy.ndarray, rng: numpy.random.Generator,
          textures: numpy.ndarray) -> numpy.ndarray:
    """Cover the lower half of a face, or a rectangle, with one tone or a part of another crop."""
    texture = textures[rng.integers(len(textures))][:SIDE, :SIDE].astype(numpy.float32)
    paint = texture if rng.random() < 0.6 else numpy.full_like(texture, rng.uniform(0, 255))
    crop = crop.copy()
    if rng.random() < 0.6:
        top = int(rng.uniform(0.52, 0.8) * SIDE)
        crop[top:] = paint[top:]
    else:
        x, y = rng.integers(0, SIDE - 8, 2)
        width, height = rng.integers(6, SIDE // 2, 2)
        crop[y:y + height, x:x + width] = paint[y:y + height, x:x + width]
    return crop


def build() -> nn.Sequential:
    """Build the network: convolutions with batch norm, and one linear layer over all cells."""
    layers, before = [], 1
    for channels, stride in zip(CHANNELS, STRIDES):
        layers += [nn.Conv2d(before, channels, 3, stride, 1, bias=False),
                   nn.BatchNorm2d(channels), nn.ReLU()]
        before = channels
    cells = (SIDE // int(numpy.prod(STRIDES))) ** 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.2), nn.Linear(before * cells, 1))


def fit(faces: numpy.ndarray, others: numpy.ndarray, epochs: int = EPOCHS) -> nn.Sequential:
    """Fit the network to stored crops; both kinds have the same total weight."""
    torch.manual_seed(0)
    model = build()
    crops = numpy.concatenate([faces, others])
    labels = numpy.arange(len(crops)) < len(faces)
    steps = epochs * -(-len(crops) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, steps)
    loss_function = nn.BCEWithLogitsLoss(
        pos_weight=torch.tensor(len(others) / max(len(faces), 1)))
    rng = numpy.random.default_rng(0)
    for epoch in range(epochs):
        order, losses = rng.permutation(len(crops)), []
        for start in range(0, len(order), BATCH):
            varied = [vary(crops[i], labels[i], rng, others) for i in order[start:start + BATCH]]
            images = torch.from_numpy(normalise(numpy.stack([crop for crop, _ in varied])))
            target = torch.tensor([float(is_face) for _, is_face in varied])
            loss = loss_function(model(images[:, None])[:, 0], target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        print(f"epoch {epoch + 1} of {epochs}: loss {numpy.mean(losses):.4f}", flush=True)
    return model.eval()


def arrays(model: nn.Sequential) -> dict[str, numpy.ndarray]:
    """Return the arrays of FaceScore: batch norm in the convolutions, channels last, float16."""
    folded, modules = {}, list(model)
    for i in range(len(STRIDES)):
        conv, norm = modules[3 * i], modules[3 * i + 1]
        scale = (norm.weight / (norm.running_var + norm.eps).sqrt()).detach()
        weight = conv.weight.detach() * scale[:, None, None, None]
        folded[f"weight{i}"] = weight.permute(2, 3, 1, 0).reshape(-1, weight.shape[0])
        folded[f"bias{i}"] = norm.bias.detach() - norm.running_mean * scale
    linear = modules[-1]
    # From channel, row, column to row, column, channel.
    weight = linear.weight.detach().reshape(CHANNELS[-1], -1).T.reshape(-1, 1)
    folded |= {f"weight{len(STRIDES)}": weight, f"bias{len(STRIDES)}": linear.bias.detach()}
    return {name: value.numpy().astype(numpy.float16) for name, value in folded.items()}


def parse(argv=None):
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m utils.training.face_fit", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faces", nargs="+", type=pathlib.Path, required=True, metavar="FOLDER",
                        help="photos with a face in the middle, at any depth")
    parser.add_argument("--scenes", nargs="+", type=pathlib.Path, required=True, metavar="FOLDER",
                        help="photos that show nobody")
    parser.add_argument("--photos", type=int, default=1500, help="at most, of each folder [1500]")
    parser.add_argument("--weights", default="weights/tiny.int8.onnx", metavar="FILE",
                        help="landmark model [weights/tiny.int8.onnx]")
    parser.add_argument("--detector", default="auto", help="as of demo.py [auto]")
    parser.add_argument("--examples", type=pathlib.Path, metavar="FILE.npz",
                        help="keep the examples in this file, and read them if it exists")
    parser.add_argument("--output", type=pathlib.Path, default=PATH, metavar="FILE.npz",
                        help="file to write [weights/face_score.npz]")
    return parser.parse_args(argv)


def main():
    """Collect examples, fit, and write the file."""
    options = parse()
    cv2.setNumThreads(1)
    if options.examples and options.examples.is_file():
        with numpy.load(options.examples) as file:
            faces, others = file["faces"], file["others"]
    else:
        faces, others = collect(options)
        if options.examples:
            numpy.savez(options.examples, faces=faces, others=others)
    # Flat crops teach nothing.
    others = others[others.std((1, 2)) > MIN_CONTRAST]
    print(f"{len(faces)} faces, {len(others)} crops without a face", flush=True)
    model = fit(faces, others)
    with atomic_write(options.output) as temporary, open(temporary, "wb") as file:
        numpy.savez(file, **arrays(model))


if __name__ == "__main__":
    run(main)
