"""The old name of utils/data/generator.py, which people's notes and scripts hold."""
from utils.data.generator import *  # noqa: F403
from utils.data.generator import main
from utils.errors import run

if __name__ == "__main__":
    run(main)
