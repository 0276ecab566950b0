"""Write examples/web/rules.json, the constants that the browser example shares with the packages.

python -m tools.browser_rules

The page reads the file, so that its rules are those of `demo.py`; tests/test_browser_example.py
compares the file with the packages.
"""
import inspect
import json

from utils.args import ROOT
from utils.detection import detector, refine
from utils.drowsiness import driver, eyes, intervals, states
from utils.landmarks import crop
from utils.tracking import one_euro, tracker

PATH = ROOT / "examples" / "web" / "rules.json"
MODULES = (detector, refine, crop, tracker, one_euro, eyes, intervals, states, driver)


def rules() -> dict[str, dict]:
    """Return the constants of each module by its name, and the tracker's default settings."""
    found = {module.__name__.rpartition(".")[2]: _constants(module) for module in MODULES}
    settings = inspect.signature(tracker.Tracker).parameters.values()
    found["tracker"] |= {one.name: one.default for one in settings
                         if one.default is not inspect.Parameter.empty}
    return found


def _constants(module):
    """Return the numbers, and tables of them, that a module names in capitals."""
    constants = {}
    for name, value in vars(module).items():
        value = value.tolist() if hasattr(value, "tolist") else value
        if name == "STATES":
            value = {state: vars(one) for state, one in value.items()}
        if name.isupper() and type(value) in (int, float, list, tuple, dict):
            constants[name] = value
    return constants


def main() -> None:
    """Write the file."""
    PATH.write_text(json.dumps(rules(), indent=1) + "\n", encoding="utf-8")
    print(PATH.relative_to(ROOT))


if __name__ == "__main__":
    main()
