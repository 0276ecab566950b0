"""Alias of utils.data.generator, which data preparation scripts import or run by this name."""
from utils.data.generator import DataGenerator, Options, main
from utils.errors import run

__all__ = ["DataGenerator", "Options", "main"]

if __name__ == "__main__":
    run(main)
