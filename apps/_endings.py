"""Where a picture ends in its file, by the structure of its format: what follows there is something else."""

from __future__ import annotations

import re

_MARKER = re.compile(rb"\xff+([^\x00\xff])", re.DOTALL)  # of a segment of a JPEG
_AFTER_SCAN = re.compile(rb"\xff+([^\x00\xd0-\xd7\xff])", re.DOTALL)  # in a scan FF00 is data, FFD0 to FFD7 restart it
_APPENDED = re.compile(rb"\0*\xff\xd8")  # phones put further JPEGs behind the first: depth, brightness, the other eye


def goes_on(content: bytes, kind: str) -> bool | None:
    """Whether something follows a picture; None where its end is missing.

    Zeros behind it are padding. A TIFF has no end that could be told: its parts lie anywhere in the file.

    Args:
        content: All of the file.
        kind: Pillow's name of its format.
    """
    find = {"PNG": _png, "JPEG": _jpeg, "WEBP": _webp, "BMP": _bmp, "GIF": _gif}.get(kind)
    end = find(content) if find else len(content)
    return None if end is None or end > len(content) else bool(content[end:].strip(b"\0"))


def _png(content: bytes) -> int | None:
    position = 8
    while position < len(content):  # chunks: length, name, data, checksum
        name = content[position + 4 : position + 8]
        position += 12 + int.from_bytes(content[position : position + 4], "big")
        if name == b"IEND":
            return position
    return None


def _jpeg(content: bytes) -> int | None:
    position, scanned = 2, False
    while found := (_AFTER_SCAN.search if scanned else _MARKER.match)(content, position):
        position, code = found.end(), found[1]
        scanned = code == b"\xda"
        if code != b"\xd9":
            position += int.from_bytes(content[position : position + 2], "big")
        elif more := _APPENDED.match(content, position):
            position = more.end()
        else:
            return position
    return None if scanned or position >= len(content) else position  # no segment begins here


def _webp(content: bytes) -> int:
    size = int.from_bytes(content[4:8], "little")
    return 8 + size + (size % 2 if len(content) > 8 + size else 0)  # not all writers pad an odd size


def _bmp(content: bytes) -> int:
    def number(at: int, size: int = 4) -> int:
        return int.from_bytes(content[at : at + size], "little", signed=True)

    stated, header = number(2) % 2**32, number(14)
    if header == 12:
        width, height, bits, packing = number(18, 2) % 2**16, number(20, 2) % 2**16, number(24, 2), 0
    else:
        width, height, bits, packing = number(18), abs(number(22)), number(28, 2), number(30)
    if packing not in (0, 3) or header == 124:  # packed rows have any length; a colour profile may follow them
        return stated
    return min(stated, number(10) + (width * bits + 31) // 32 * 4 * height)


def _gif(content: bytes) -> int | None:
    def colours(at: int) -> int:  # bytes of the table that flags announce
        flags = content[at] if at < len(content) else 0
        return 3 << (flags & 7) + 1 if flags & 0x80 else 0

    position = 13 + colours(10)
    while position < len(content):
        block = content[position : position + 1]
        if block == b";":
            return position + 1
        if block == b"!":
            position += 2
        elif block == b",":
            position += 11 + colours(position + 9)
        elif block != b"\0":
            return position
        while position < len(content) and content[position]:  # parts of a block: length, data
            position += 1 + content[position]
        position += 1
    return None
