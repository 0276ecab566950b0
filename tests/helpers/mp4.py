"""Edits of MP4 files: the times of frames, and the rotation tag of a phone."""
import struct

_CONTAINERS = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"edts")


def _rebuild(content, edit):
    """Return content with the body of each box replaced by edit(kind, body)."""
    made, at = b"", 0
    while at < len(content):
        size, kind = struct.unpack(">I4s", content[at:at + 8])
        body = content[at + 8:at + size]
        body = _rebuild(body, edit) if kind in _CONTAINERS else edit(kind, body)
        made += struct.pack(">I4s", len(body) + 8, kind) + body
        at += size
    return made


def turn(content, degrees):
    """Return the file with the tag of a camera rotated clockwise by 90, 180 or 270 degrees."""
    sin, cos = {90: (1, 0), 180: (0, -1), 270: (-1, 0)}[degrees]
    one = 1 << 16
    matrix = struct.pack(">9i", cos * one, sin * one, 0, -sin * one, cos * one, 0, 0, 0, 1 << 30)
    return _rebuild(content, lambda kind, body: body[:40] + matrix + body[76:]
                    if kind == b"tkhd" else body)


def retime(content, seconds):
    """Return the file with frames that last `seconds`, one number per frame."""
    scale = {}

    def note(kind, body):
        if kind in (b"mvhd", b"mdhd"):
            scale[kind], = struct.unpack(">I", body[12:16])
        return body

    _rebuild(content, note)
    whole = sum(seconds)

    def length(kind):
        return struct.pack(">I", round(whole * scale[kind]))

    def edit(kind, body):
        if kind in scale:
            return body[:16] + length(kind) + body[20:]
        if kind == b"tkhd":
            return body[:20] + length(b"mvhd") + body[24:]
        if kind == b"elst":
            return body[:8] + length(b"mvhd") + body[12:]
        if kind == b"stts":
            steps = [struct.pack(">II", 1, round(step * scale[b"mdhd"])) for step in seconds]
            return struct.pack(">II", 0, len(steps)) + b"".join(steps)
        return body

    return _rebuild(content, edit)
