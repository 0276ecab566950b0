"""The order of the packages, read from their imports, and the size of functions and main.py."""
import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
FILES = [ROOT / "main.py", ROOT / "demo.py", *sorted((ROOT / "nets").rglob("*.py")),
         *sorted(p for p in (ROOT / "utils").rglob("*.py") if p != ROOT / "utils/__init__.py")]
# A package may import its own layer and those above.
LAYERS = (
    ("utils/errors",), ("utils/files",), ("nets", "utils/landmarks", "utils/args"),
    ("utils/machine", "utils/draw", "utils/plots", "utils/experiment", "utils/packing",
     "utils/provenance", "utils/checkpoint", "utils/predictor"),
    ("utils/detection",), ("utils/data",), ("utils/tracking",), ("utils/drowsiness",),
    ("utils/pipeline",), ("utils/web",), ("utils/evaluation",), ("utils/training",),
    ("utils/deploy",), ("utils/util", "utils/generator", "main", "demo"))
FLAT, LINES, PARAMETERS = 14, 150, 9


def place(path):
    """Return the package of a file and the index of its layer, or None."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    package = "/".join(parts[:2]) if parts[0] == "utils" else parts[0]
    return package, next((i for i, names in enumerate(LAYERS) if package in names), None)


def module(name):
    """Return the file of a dotted name, or None if it is not in the repository."""
    path = ROOT / name.replace(".", "/")
    return next((p for p in (path.with_suffix(".py"), path / "__init__.py") if p.is_file()), None)


def imports(path, everywhere=True):
    """Return the repository's files that a file imports; everywhere: also in functions."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = set()
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            found.update(module(alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            # `from utils.data import cache` imports the file cache.py, not only the package.
            names = [module(f"{node.module}.{alias.name}") for alias in node.names]
            found.update(names if all(names) else [module(node.module), *names])
    return found - {None, path}


def test_nothing_imports_a_layer_below_its_own():
    for path in FILES:
        package, layer = place(path)
        assert layer is not None, f"{path}: add its package to LAYERS"
        for other in imports(path):
            assert place(other)[1] <= layer, f"{path} imports {other}"


def test_packages_of_one_layer_do_not_import_each_other():
    arrows = {(place(path)[0], place(other)[0]) for path in FILES for other in imports(path)}
    assert not {(a, b) for a, b in arrows if a != b and (b, a) in arrows}


def test_there_are_no_import_cycles():
    arrows = {path: imports(path) for path in FILES}
    done = set()

    def visit(path, chain):
        assert path not in chain, " -> ".join(str(p.relative_to(ROOT)) for p in [*chain, path])
        if path not in done:
            for other in arrows.get(path, ()):
                visit(other, [*chain, path])
            done.add(path)

    for path in FILES:
        visit(path, [])


def test_nets_import_only_errors_and_landmarks():
    known = {place(other)[0] for path in FILES if place(path)[0] == "nets"
             for other in imports(path)}
    assert known == {"nets", "utils/errors", "utils/landmarks"}


def test_main_is_short_and_utils_has_few_modules():
    assert len((ROOT / "main.py").read_text(encoding="utf-8").splitlines()) <= LINES
    flat = [p.name for p in (ROOT / "utils").glob("*.py") if p.name != "__init__.py"]
    assert len(flat) <= FLAT, flat


def parameters(function):
    """Return the number of parameters of an ast function, without self or cls."""
    a = function.args
    names = [*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg]
    return sum(n is not None for n in names) - any(
        n.arg in ("self", "cls") for n in (*a.posonlyargs, *a.args)[:1])


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_function_takes_more_than_nine_parameters(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert parameters(node) <= PARAMETERS, node.name


def test_the_checks_themselves(tmp_path):
    function = ast.parse("def f(self, a, *b, c=1, **d): pass").body[0]
    assert parameters(function) == 4
    found = imports(ROOT / "utils" / "util.py")
    assert ROOT / "utils" / "data" / "generator.py" in found
    assert len(found) == 4
    # Imports in functions count too: main.py has its slow imports there.
    assert ROOT / "utils" / "training" / "trainer.py" in imports(ROOT / "main.py")
    assert ROOT / "utils" / "training" / "trainer.py" not in imports(ROOT / "main.py", False)
