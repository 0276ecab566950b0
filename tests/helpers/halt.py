"""A request to stop a training after a number of tests."""
from utils.training.control import Stop


class Halt(Stop):
    """Requests a stop after it has been tested `after` times."""

    def __init__(self, after):
        super().__init__()
        self.after = after

    @property
    def requested(self):
        self.after -= 1
        return self.after < 0

    @requested.setter
    def requested(self, value):
        pass
