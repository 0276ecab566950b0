"""Flags of the demo for its source and its tracker, and the argparse types of their values."""
from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable

# Keyword arguments of Tracker, which are flags: type, default, smallest and largest value, help.
TRACKING = {
    "detect_every": (int, 10, 1, math.inf, "frames within which a new face is found; 6 times as "
                     "many for a small face beside others"),
    "min_confidence": (float, 0.0, 0, 1, "mean confidence, 0 to 1, below which a face is lost; 0: "
                       "the threshold of the weights"),
    "filter_min_cutoff": (float, 1.2, 0, math.inf, "minimum cutoff frequency of the One Euro "
                          "filter in Hz; lower: less jitter at rest; 0: no filter"),
    "filter_beta": (float, 5.0, 0, math.inf, "speed coefficient of the One Euro filter in Hz per "
                    "face side a second; higher: less lag"),
}


def add_source_flags(parser: argparse.ArgumentParser) -> None:
    """Add --source and the flags that describe a camera or a film."""
    group = parser.add_argument_group("Input")
    group.add_argument("--source", metavar="0|VIDEO|STREAM|IMAGE|FOLDER|sample",
                       help="number or /dev/video0 of a camera, rtsp:// or http:// address, path, "
                       "or sample: a portrait [0; with --serve the viewers' cameras]")
    group.add_argument("--camera-size", type=camera_size, metavar="WxH",
                       help="size to request from the camera, such as 1280x720 [its default]")
    group.add_argument("--camera-rate", type=frame_rate, metavar="N",
                       help="frames a second to request from the camera, or those of a film whose "
                       "time stamps are missing or wrong [its default]")
    group.add_argument("--aspect", type=aspect_ratio, metavar="W:H", help="width to height of the "
                       "picture, such as 16:9, of a video, stream or camera that reports a wrong "
                       "one [as reported]")


def add_tracker_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of TRACKING to a parser."""
    group = parser.add_argument_group("Tracking")
    for name, (kind, default, least, most, sentence) in TRACKING.items():
        group.add_argument("--" + name.replace("_", "-"), type=number(kind, least, most),
                           default=default, metavar=kind.__name__.upper(),
                           help=f"{sentence} [{default}]")


def camera_size(text: str) -> tuple[int, int]:
    """Return (width, height) of a text such as 1280x720; an argparse type."""
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    if not found or "0" in found.groups():
        raise argparse.ArgumentTypeError(f"expected WIDTHxHEIGHT, such as 1280x720, found {text}")
    return int(found[1]), int(found[2])


def aspect_ratio(text: str) -> float:
    """Return width to height of a text such as 16:9; an argparse type."""
    found = re.fullmatch(r"(\d+):(\d+)", text)
    if not found or "0" in found.groups():
        raise argparse.ArgumentTypeError(f"expected WIDTH:HEIGHT, such as 16:9, found {text}")
    aspect = int(found[1]) / int(found[2])
    if not 1 / 4 <= aspect <= 4:
        raise argparse.ArgumentTypeError(f"must be 1:4 to 4:1, found {text}")
    return aspect


def frame_rate(text: str) -> float:
    """Return frames a second, up to 1000; an argparse type."""
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not 0 < rate <= 1000:
        raise argparse.ArgumentTypeError(f"expected frames a second, 1 to 1000, found {text}")
    return rate


def number(kind: type, least: float, most: float) -> Callable[[str], float]:
    """Return an argparse type for int or float (kind) from least to most, without infinity."""
    def convert(text):
        try:
            value = float(text)
            if value != kind(value):
                raise ValueError
        except (ValueError, OverflowError):
            raise argparse.ArgumentTypeError(f"expected {kind.__name__}, found {text}") from None
        if not least <= value <= most or value == math.inf:
            limits = f"at least {least}" if most == math.inf else f"{least} to {most}"
            raise argparse.ArgumentTypeError(f"must be {limits}, found {text}")
        return kind(value)
    return convert
