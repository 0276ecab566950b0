"""Readers: one module for each layout of photos and annotations.

`recognise` finds the module whose layout a folder has, its `read` returns the faces, and
utils.data.generator crops them into a prepared set. To add a layout, write one module in this
folder and add it to `READERS` below. The choices of `--layout`, published counts, crops of
published NMEs and error messages are all taken from the module, which defines:

* `NAME`: the layout's name, as in `--layout NAME`.
* `SCHEME`: name of its landmark scheme; None for a user's own data, whose scheme the user gives.
* `LAYOUT`: the expected files in one line, for error messages.
* `EXPECTED`: subset to published number of faces; {} if the layout is not a published data set.
* `matches(folder)`: True if the folder (pathlib.Path) has this layout.
* `read(folder, problems)`: all faces as a list of face.Face. Append (path, reason) to `problems`
  for whatever cannot be read; start the reason with "note:" if no face is lost. Where SCHEME is
  None, `read` also takes `scheme` and `one_based`.
* `CROP` (optional): the crop in which the authors measure NME, {"rule", "scale"} as in
  landmarks.crop.face_box; default: crop.PUBLISHED_CROP.
* `image_of(face)` (optional): the photo as RGB uint8 (H, W, 3), where it is not an image file.

The helper modules are face (the `Face` class), pts (text files, file pairs, file names), names
(names of points), annotation_tools and cvat (one function for each tool), and foreign (formats
that are not read).
"""
import difflib
import pathlib
from types import ModuleType

from utils.data.readers import aflw, annotations, cofw, custom, drawn, lapa, w300, wflw
from utils.errors import UserError, shell_word

READERS = {module.NAME: module for module in (w300, wflw, cofw, aflw, lapa, custom, annotations,
                                              drawn)}
PUBLISHED = tuple(module for module in READERS.values() if module.EXPECTED)
OWN_DATA = tuple(module for module in READERS.values() if module.SCHEME is None)


def get(name: str) -> ModuleType:
    """Return the reader module called `name`, case-insensitively.

    Raises:
        UserError: no reader has that name.
    """
    for known, module in READERS.items():
        if known.lower() == str(name).lower():
            return module
    near = difflib.get_close_matches(str(name), READERS, 1, 0.3)
    raise UserError(f"unknown layout {name!r}; known: {', '.join(READERS)}"
                    + (f" (nearest: {near[0]})" if near else ""))


def recognise(folder: pathlib.Path) -> ModuleType:
    """Return the reader module for a folder, or for an annotation file of the user's own data.

    Raises:
        UserError: the folder does not exist, is a prepared set, or has no known layout or several.
    """
    if folder.is_file():
        for module in OWN_DATA:
            if module.matches(folder):
                return module
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the folder of a data set or a .csv "
                        f"file (.json, .xml)")
    if (folder / "set.yaml").is_file():
        raise UserError(f"{folder}: is a prepared set already; train with --data-dir "
                        f"{shell_word(folder)}")
    found = [module for module in PUBLISHED if module.matches(folder)]
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"{folder}: holds {' and '.join(module.NAME for module in found)}; name "
                        f"the one to read")
    # Own data is searched for in subfolders too, where it would match photos of a published set.
    for inner in sorted(path for path in folder.iterdir() if path.is_dir()):
        for module in PUBLISHED:
            if module.matches(inner):
                raise UserError(f"{folder}: its folder {inner.name} has the layout of "
                                f"{module.NAME}; give {inner}")
    for module in OWN_DATA:
        if module.matches(folder):
            return module
    if other := annotations.foreign_format(folder):
        raise UserError(f"{folder}: {other}")
    content = sorted(path.name for path in folder.iterdir())
    layouts = "; ".join(f"{module.NAME}: {module.LAYOUT}" for module in (*PUBLISHED, *OWN_DATA))
    raise UserError(f"{folder}: no known layout; it holds {', '.join(content[:5]) or 'nothing'}"
                    f"{', ...' if len(content) > 5 else ''}. Looked for {layouts}")
