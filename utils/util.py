"""What a person imports at the command line: `from utils import util; util.DataGenerator(...)`."""
from utils.data.generator import DataGenerator
from utils.errors import show_on_one_line
from utils.landmarks.metrics import fr_auc, nme, summary
from utils.landmarks.schemes import SCHEMES, get_scheme

__all__ = ["DataGenerator", "SCHEMES", "get_scheme", "fr_auc", "nme", "summary"]

# Its users type one-liners: a mistake there is one line, too.
show_on_one_line()
