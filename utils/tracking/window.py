"""The demo's window: whether one can be opened, and showing pictures in it."""
from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import cv2
import numpy

from utils import draw
from utils.errors import UserError, printable

WINDOW = "landmarks: q quits, s saves"
# A display at the end of a broken network connection does not answer.
PROBE_SECONDS = 20
# Opens and closes a window. Qt ends the process where it cannot reach the display, so this runs in
# a process of its own.
PROBE = """
import sys
import cv2
try:
    cv2.namedWindow("probe", cv2.WINDOW_NORMAL)
    cv2.destroyAllWindows()
except cv2.error:
    sys.exit(7)
"""
NO_WINDOW_SYSTEM = 7


def why_no_window() -> str | None:
    """Return why no window can be opened, or None if one can.

    The reason is empty where no display is named (on Linux), which is usual on servers. Otherwise a
    child process opens a window.
    """
    names = [name for name in ("DISPLAY", "WAYLAND_DISPLAY") if os.environ.get(name)]
    if sys.platform.startswith("linux") and not names:
        return ""
    try:
        code = subprocess.run([sys.executable, "-c", PROBE], stdin=subprocess.DEVNULL,
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                              timeout=PROBE_SECONDS).returncode
    except subprocess.TimeoutExpired:
        code = None
    if code == 0:
        return None
    if code == NO_WINDOW_SYSTEM:
        return ("this OpenCV cannot open windows (opencv-python-headless is built without them; "
                "opencv-python has them)")
    display = " ".join(f"{name}={printable(os.environ[name])}" for name in names)
    return f"no window can be opened on this display ({display})" if display else \
        "no window can be opened"


def show(image: numpy.ndarray, wait: int) -> bool:
    """Show an RGB image in the window.

    Args:
        image: RGB uint8 (H, W, 3).
        wait: milliseconds to wait for a key; 0: until there is one.

    Returns:
        Whether the user quits.

    Raises:
        UserError: this OpenCV cannot open windows.
    """
    try:
        cv2.imshow(WINDOW, image[..., ::-1])
        existed = _exists()
        key = cv2.waitKey(wait) & 0xff
    except cv2.error:
        raise UserError("this OpenCV cannot open windows; give --output PATH") from None
    if key == ord("s"):
        number = 1
        while pathlib.Path(f"snapshot_{number}.png").exists():
            number += 1
        draw.save(f"snapshot_{number}.png", image)
        print(f"snapshot_{number}.png")
    return key in (ord("q"), 27) or _is_closed(existed)


def _state(name):
    """Return a property of the window, -1 where OpenCV does not tell it, None without windows."""
    try:
        return cv2.getWindowProperty(WINDOW, name)
    except cv2.error:
        return None  # Qt, once the last window is closed.


def _exists():
    """Return whether OpenCV has the window; False also where it does not tell."""
    state = _state(cv2.WND_PROP_AUTOSIZE)
    return state is not None and state >= 0


def _is_closed(existed):
    """Return whether the window's close button was pressed.

    Args:
        existed: what _exists returned before keys and clicks were handled.
    """
    visible = _state(cv2.WND_PROP_VISIBLE)
    if visible is None:
        return True
    # -1: unknown. GTK builds answer it for a visible window, and forget a window that was closed.
    return visible < 1 if visible >= 0 else existed and not _exists()
