"""Messages between the page and the server: JPEGs in, JSON out.

A frame of the page is HEADER (kind FRAME or STILL, time in seconds) and a JPEG. Answers are JSON
objects with a `type`: model, frame, still, events, stopped, refused or ended. A frame of the
server's own source is `with_picture`: the JSON and the JPEG in one message.
"""
from __future__ import annotations

import io
import json
import math
import struct
from collections.abc import Iterable

import cv2
import numpy
import PIL.Image

from utils import draw
from utils.drowsiness.states import STATES
from utils.landmarks.schemes import Scheme
from utils.pipeline import Observation
from utils.tracking import outputs

HEADER = struct.Struct("<Bd")
FRAME, STILL = 0, 1
MAX_BYTES, MIN_SIDE, MAX_SIDE = 4 << 20, 16, 4096  # Of a JPEG; sides in pixels.


class Refused(Exception):
    """A message that is not processed; its text is the reason, which the page shows."""


def split(message: bytes) -> tuple[int, float, bytes]:
    """Split a binary message of the page into kind, seconds and JPEG.

    Raises:
        Refused: for another form.
    """
    if len(message) < HEADER.size:
        raise Refused(f"message of {len(message)} bytes; expected kind, time and a JPEG")
    kind, seconds = HEADER.unpack_from(message)
    if kind not in (FRAME, STILL) or not 0 <= seconds < 1e8:
        raise Refused("message with an unknown kind or time; expected kind, time and a JPEG")
    return kind, seconds, message[HEADER.size:]


def decode(content: bytes) -> numpy.ndarray:
    """Decode a JPEG to RGB uint8 (H, W, 3); its size is checked first.

    Raises:
        Refused: for another format, damaged, too large and too small pictures.
    """
    if len(content) > MAX_BYTES:
        raise Refused(f"picture of {len(content) / 2 ** 20:.1f} MB; at most {MAX_BYTES >> 20} MB")
    try:
        with PIL.Image.open(io.BytesIO(content), formats=["JPEG"]) as header:
            width, height, progressive = *header.size, "progressive" in header.info
    except Exception:
        # Pillow raises exceptions of many types for damaged headers.
        raise Refused("not a JPEG") from None
    if max(width, height) > MAX_SIDE or min(width, height) < MIN_SIDE:
        raise Refused(f"picture of {width}x{height} px; sides may have {MIN_SIDE} to {MAX_SIDE} px")
    # A few kilobytes of a progressive JPEG can take seconds to decode.
    if progressive:
        raise Refused("a progressive JPEG; expected a baseline JPEG")
    # OpenCV fills what is missing at the end with grey.
    if not content.rstrip(b"\0").endswith(b"\xff\xd9"):
        raise Refused("a JPEG that is cut off")
    image = cv2.imdecode(numpy.frombuffer(content, numpy.uint8),
                         cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    if image is None:
        raise Refused("a damaged JPEG")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def about(source: str | None, weights: Iterable[str]) -> dict:
    """Return what the page needs before it connects.

    Args:
        source: name of the server's own source; None: the page sends frames.
        weights: names to choose from, the default first.
    """
    states = {name: {"colour": state.colour, "closed": state.eyes_closed,
                     "alarm": state.alarm_after} for name, state in STATES.items()}
    return {"source": source, "weights": list(weights), "states": states,
            "header": outputs.EVENT_HEADER}


def model(name: str, scheme: Scheme) -> dict:
    """Return the message about the weights in use: how their landmarks are drawn."""
    regions = [{"colour": draw.colour_of(region), "closed": draw.is_closed(region, indices),
                "points": list(indices)} for region, indices in scheme.regions.items()]
    return {"type": "model", "name": name, "points": scheme.points, "regions": regions}


def frame(kind: str, seen: Observation, seconds: float, shape: tuple[int, ...] | None) -> dict:
    """Return the message about a frame or a still.

    Args:
        kind: "frame" or "still".
        seen: what the pipeline knows about it.
        seconds: its time.
        shape: (H, W, ...) of the image; None where there is none.
    """
    faces = []
    for i, track in enumerate(seen.tracks):
        angles = seen.poses[i] if seen.poses else ()
        faces.append({"id": track.id, "box": track.box.round(1).tolist(),
                      "points": track.points_px.round(1).ravel().tolist(),
                      "confidence": round(float(track.confidence.mean()), 3),
                      "pose": [round(angle, 1) if math.isfinite(angle) else None
                               for angle in angles] or None,
                      **seen.readings[i]})
    person = None if seen.driver is None else {"id": seen.driver[0], **seen.driver[1]}
    return {"type": kind, "time": round(seconds, 3), "faces": faces, "person": person,
            "size": None if shape is None else [shape[1], shape[0]]}


def events(lines: list[str]) -> dict:
    """Return the message of lines of outputs.event_row."""
    return {"type": "events", "lines": lines}


def text(message: dict) -> str:
    """Return a message as JSON."""
    return json.dumps(message, separators=(",", ":"), allow_nan=False)


def with_picture(message: dict, jpeg: bytes) -> bytes:
    """Return a message and a JPEG as one: length of the JSON (uint32), JSON, JPEG."""
    content = text(message).encode()
    return struct.pack("<I", len(content)) + content + jpeg
