"""Write small sets of own data: photos of noise, a CSV file of points and a YAML scheme."""
import cv2
import numpy

from utils.data.generator import DataGenerator

FIVE = """name: five
names: [right eye, left eye, nose, right mouth, left mouth]
flip: [[right eye, left eye], [right mouth, left mouth]]
divisor: [right eye, left eye]
"""
FACE = numpy.array([(20, 20), (60, 20), (40, 40), (28, 60), (52, 60)], float)
# Settings of a training of about one second.
QUICK = {"backbone": "test_resnet", "input_size": 64, "epochs": 1, "batch_size": 4,
         "effective_batch": 4, "workers": 0, "stride": 16}


def write(folder, scheme, faces, photos=None):
    """Write a CSV file, a scheme file and photos; return the paths of the two files.

    Args:
        folder: where to write them.
        scheme: text of the YAML file.
        faces: (split, points (K, 2)) of each face; NaN becomes an empty field.
        photos: image name of each face: 0.png, 1.png, ... or an existing file; None: one per face.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "scheme.yaml").write_text(scheme)
    rows = ["image,split," + ",".join(f"x{i},y{i}" for i in range(1, 1 + len(faces[0][1])))]
    for number, (split, points) in enumerate(faces):
        noise = numpy.random.default_rng(number).integers(0, 255, (90, 90, 3), numpy.uint8)
        cv2.imwrite(str(folder / f"{number}.png"), noise)
        name = f"{number}.png" if photos is None else photos[number]
        cells = ["" if numpy.isnan(v) else f"{v:g}" for v in numpy.ravel(points)]
        rows.append(f"{name},{split},{','.join(cells)}")
    (folder / "faces.csv").write_text("\n".join(rows) + "\n")
    return folder / "faces.csv", folder / "scheme.yaml"


def prepare(folder, scheme, faces, photos=None, **options):
    """Write such files and return the folder of their prepared set, 64 px by default."""
    table, yaml_file = write(folder, scheme, faces, photos)
    options = {"target_size": 64, "workers": 1} | options
    return DataGenerator(table, output_dir=folder / "set", scheme=str(yaml_file), **options).run()
