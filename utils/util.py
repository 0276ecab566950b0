"""What a person imports at the command line: `from utils import util; util.DataGenerator(...)`."""
from utils.generator import DataGenerator
from utils.landmarks import SCHEMES, get_scheme
from utils.metrics import fr_auc, nme, summary

__all__ = ["DataGenerator", "SCHEMES", "get_scheme", "fr_auc", "nme", "summary"]
