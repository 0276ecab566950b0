"""One module per layout: NAME, SCHEME (None: the user's choice, given to read() as a third
argument), LAYOUT (what is looked for), EXPECTED (subset to published count), matches(folder),
read(folder, problems) -> [Face] and, where photos are inside a container file, image_of(face) ->
RGB. `problems` gets (path, reason) of all that could not be read; a reason that begins with "note:"
costs no face.
"""
import difflib

from utils.data.readers import aflw, annotations, cofw, custom, drawn, lapa, w300, wflw
from utils.errors import UserError

READERS = {module.NAME: module for module in (w300, wflw, cofw, aflw, lapa, custom,
                                              annotations, drawn)}
PUBLISHED = (w300, wflw, cofw, aflw, lapa)


def get(name):
    """The reader called `name`, letter case aside. Raises UserError."""
    for known, module in READERS.items():
        if known.lower() == str(name).lower():
            return module
    near = difflib.get_close_matches(str(name), READERS, 1, 0.3)
    raise UserError(f"unknown layout {name!r}; known: {', '.join(READERS)}"
                    + (f" (nearest: {near[0]})" if near else ""))


def recognise(folder):
    """The reader whose layout the folder (pathlib.Path; or a file of own data) has.

    Raises UserError where there is no such folder or its layout is none or more than one of those
    known.
    """
    for module in (custom, annotations) if folder.is_file() else ():
        if module.matches(folder):
            return module
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the folder of a data set or a .csv "
                        f"file (.json, .xml)")
    if (folder / "set.yaml").is_file():
        raise UserError(f"{folder}: is a prepared set already; train with --data-dir {folder}")
    found = [module for module in PUBLISHED if module.matches(folder)]
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"{folder}: holds {' and '.join(module.NAME for module in found)}; name "
                        f"the one to read")
    # Before custom, which looks into subfolders and would take the photos of a published set.
    for inner in sorted(path for path in folder.iterdir() if path.is_dir()):
        for module in PUBLISHED:
            if module.matches(inner):
                raise UserError(f"{folder}: its folder {inner.name} has the layout of "
                                f"{module.NAME}; give {inner}")
    for module in (custom, annotations):
        if module.matches(folder):
            return module
    content = sorted(path.name for path in folder.iterdir())
    looked = "; ".join(f"{name}: {module.LAYOUT}" for name, module in READERS.items()
                       if module is not drawn)
    raise UserError(f"{folder}: no known layout; it holds {', '.join(content[:5]) or 'nothing'}"
                    f"{', ...' if len(content) > 5 else ''}. Looked for {looked}")
