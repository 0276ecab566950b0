"""Functions for interactive use: `from utils import util; util.DataGenerator(...).run()`.

It collects what one-line commands need to prepare data and to compute metrics. A UserError there
ends the process with one line instead of a traceback.
"""
from utils.data.generator import DataGenerator
from utils.errors import install_excepthook
from utils.landmarks.metrics import fr_auc, nme, summary
from utils.landmarks.schemes import SCHEMES, get_scheme

__all__ = ["DataGenerator", "SCHEMES", "get_scheme", "fr_auc", "nme", "summary"]

install_excepthook()
