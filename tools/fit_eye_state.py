"""Train weights/eye_state.onnx, which tells eyes that look down from shut and open ones.

    python -m tools.fit_eye_state FOLDER --detector yunet.onnx

FOLDER has the photos as folders or links: eyes (closed/ and open/), lfw, faces-wild, 300W and
300W-small. Labels are in tools/splits/eyes.txt and tools/splits/down.txt. With --gather OUT it
copies the listed faces of a part into OUT/closed, OUT/open and OUT/down instead, for main.py
--test-eyes.
"""
import argparse
import pathlib
import shutil

import numpy

from utils.args import ROOT
from utils.detection.detector import get_detector
from utils.errors import run as guarded
from utils.files import OutputFile
from utils.predictor import Predictor
from utils.training import eye_patch_data, eye_patch_fit

FOLDERS = {"shut": "closed", "open": "open", "down": "down"}


def parse(argv=None):
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.fit_eye_state", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="FOLDER", type=pathlib.Path, help="with the photos")
    parser.add_argument("--detector", default="haar", metavar="haar|PATH.onnx",
                        help="face detector, as of demo.py [haar]")
    parser.add_argument("--weights", default=str(ROOT / "weights/tiny.int8.onnx"), metavar="FILE",
                        help="model that finds the landmarks [tiny.int8.onnx]")
    parser.add_argument("--teacher", default=str(ROOT / "weights/fast.pt"), metavar="FILE.pt",
                        help="model whose features are learned [fast.pt]")
    parser.add_argument("--labels", default=str(ROOT / "tools/splits/down.txt"), metavar="LIST",
                        help="[tools/splits/down.txt]")
    parser.add_argument("--eyes", default=str(ROOT / "tools/splits/eyes.txt"), metavar="LIST",
                        help="[tools/splits/eyes.txt]")
    parser.add_argument("--out", default=str(ROOT / "weights/eye_state.onnx"), metavar="FILE.onnx",
                        help="file to write [weights/eye_state.onnx]")
    parser.add_argument("--seed", type=int, default=0, help="[0]")
    parser.add_argument("--epochs", type=int, default=eye_patch_fit.EPOCHS,
                        help=f"[{eye_patch_fit.EPOCHS}]")
    parser.add_argument("--cache", type=pathlib.Path, metavar="FILE.npz",
                        help="keeps landmarks and features for the next run")
    parser.add_argument("--gather", nargs=2, metavar=("OUT", "PART"),
                        help="copy the listed faces of a part")
    return parser.parse_args(argv)


def gather(faces, folder, part):
    """Copy the listed faces of a part into closed/, open/ and down/ of a folder."""
    for face in faces:
        if face.listed and face.part == part:
            target = folder / FOLDERS[face.state] / face.name.replace("/", "_")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(face.path, target)


def read_inputs(faces, options, teacher):
    """Return landmarks and features by name; from the cache where it has them."""
    if options.cache and options.cache.is_file():
        with numpy.load(options.cache, allow_pickle=False) as file:
            names = file["names"].tolist()
            return dict(zip(names, file["landmarks"])), dict(zip(names, file["features"]))
    landmarks = eye_patch_data.find_landmarks(faces, Predictor(options.weights),
                                              get_detector(options.detector))
    features = eye_patch_fit.teacher_features(faces, landmarks, teacher)
    if options.cache:
        numpy.savez(options.cache, names=numpy.array(list(features)),
                    landmarks=numpy.stack([landmarks[name] for name in features]),
                    features=numpy.stack(list(features.values())))
    return landmarks, features


def run():
    """Train, print the scores and write the file."""
    options = parse()
    faces = eye_patch_data.list_faces(options.folder, options.eyes, options.labels)
    if options.gather:
        gather(faces, pathlib.Path(options.gather[0]), options.gather[1])
        return
    teacher = Predictor(options.teacher)
    landmarks, features = read_inputs(faces, options, teacher)
    eyes = eye_patch_fit.collect(faces, landmarks, teacher, features)
    choose = eyes.part("choose")

    def report(epoch, loss, network):
        if epoch % 6 == 0 or epoch == options.epochs:
            print(f"epoch {epoch}, loss {loss:.3f}: " + _words(eye_patch_fit.score(network,
                                                                                  choose)))

    network = eye_patch_fit.train(eyes.part("train"), options.seed, options.epochs, report)
    OutputFile(options.out, "--out").write(network.to_onnx())
    print(f"{options.out}, part choose: {_words(eye_patch_fit.score(network, choose))}")


def _words(scores):
    return ", ".join(f"{name.replace('_', ' ')} {value:.1f} %" for name, value in scores.items())


if __name__ == "__main__":
    guarded(run)
