"""Flags of the page: demo.py --serve."""
from __future__ import annotations

import argparse

from utils.tracking.flags import number


def add_page_flags(parser: argparse.ArgumentParser) -> None:
    """Add --serve, --token and --viewers to a parser."""
    group = parser.add_argument_group("Page", "a page in place of a window")
    group.add_argument("--serve", metavar="[HOST:]PORT", help="serve a page that shows landmarks, "
                       "eyes and events of the viewer's camera, or of --source [127.0.0.1:PORT]")
    group.add_argument("--token", metavar="TEXT", help="text that the page's address must contain "
                       "[none on this machine, else a random one]")
    group.add_argument("--viewers", type=number(int, 1, 64), default=4, metavar="N",
                       help="people whose cameras are processed at the same time [4]")
