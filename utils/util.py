"""What a person imports at the command line: `from utils import util; util.DataGenerator(...)`."""
from utils.data.generator import DataGenerator
from utils.landmarks.metrics import fr_auc, nme, summary
from utils.landmarks.schemes import SCHEMES, get_scheme

__all__ = ["DataGenerator", "SCHEMES", "get_scheme", "fr_auc", "nme", "summary"]
