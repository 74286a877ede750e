"""Reads the gzipped arrays of a DQN-Replay checkpoint in blocks of rows, and believes no header more than its bytes.

    capacity, blocks = open_array(Path("$store$_observation_ckpt.0.gz"), "observation")
    for rows in blocks: ...                                # (M, 84, 84) uint8

The checksum is verified at the end, and a stream that breaks off gives the rows that came before. What it trades
away: no random access; an array is read from its start.
"""

from __future__ import annotations

import ast
import itertools
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from zlib_ng import zlib_ng

from lram.datasets.specs import BadInput

LARGEST = 1 << 24
"""Rows of one checkpoint at most; the recordings have a million."""
HEADER = 4096
"""Characters of a .npy header at most; the recordings' have 118."""
BLOCK = 1 << 15
"""Compressed bytes read at once: some 400 frames, and 34 MB at most, whatever a file holds."""
KINDS: dict[str, tuple[np.dtype, tuple[int, ...]]] = {
    "add_count": (np.dtype("<i8"), ()),
    "action": (np.dtype("<i4"), ()),
    "reward": (np.dtype("<f4"), ()),
    "terminal": (np.dtype("u1"), ()),
    "observation": (np.dtype("u1"), (84, 84)),
}
"""Type and shape of a row of each file of a checkpoint that is read; add_count is a single number."""


class Cut(Exception):
    """A file ends before its content does; what came before is good."""


class Broken(Cut):
    """A file's content is damaged, nobody knows where."""


def open_array(path: Path, kind: str, block: int = BLOCK) -> tuple[int, Iterator[np.ndarray]]:
    """Opens an array; returns the rows that its header declares, and its content in pieces of whole rows.

    Raises:
        BadInput: The file cannot be read, or holds another array than a checkpoint's file of this kind.
        Cut: The header is cut; the content raises it, too.
    """
    stream = _inflate(path, block)
    head, size = b"", 12
    while len(head) < size:
        piece = next(stream, None)
        if piece is None:
            raise BadInput(f"{path}: holds {len(head)} bytes, expected a .npy array")
        head += piece
        if len(head) >= 12:  # Magic, version, length of the header (numpy.lib.format).
            if not head.startswith(b"\x93NUMPY") or head[6] not in (1, 2, 3):
                raise BadInput(f"{path}: holds no .npy array, as files of a checkpoint do")
            width = 2 if head[6] == 1 else 4
            size = 8 + width + int.from_bytes(head[8 : 8 + width], "little")
            if size > HEADER:
                raise BadInput(f"{path}: declares a header of {size:,} bytes, expected at most {HEADER:,}")
    capacity = _capacity(path, kind, head[:size])
    return capacity, _rows(path, kind, capacity, head[size:], stream)


def _capacity(path: Path, kind: str, head: bytes) -> int:
    """Checks a .npy header; returns the number of rows that it declares."""
    dtype, row_shape = KINDS[kind]
    try:
        fields = ast.literal_eval(head[10 if head[6] == 1 else 12 :].decode())
        shape, fortran_order, found = (fields[key] for key in ("shape", "fortran_order", "descr"))
        known = all(type(length) is int for length in shape) and isinstance(shape, tuple)
    except (ValueError, TypeError, KeyError, SyntaxError, RecursionError, MemoryError) as error:
        raise BadInput(f"{path}: its .npy header cannot be read") from error
    if found != dtype.str or (fortran_order and row_shape):
        order = " in Fortran order" if fortran_order else ""
        raise BadInput(f"{path}: holds numbers of type {str(found)[:60]}{order}, expected {dtype.str}")
    one = kind == "add_count"
    if one and shape == ():
        return 1
    if not known or one or len(shape) != 1 + len(row_shape) or shape[1:] != row_shape or not 0 < shape[0] <= LARGEST:
        was = f"shape {shape}" if known and len(shape) < 4 else f"{len(shape)} dimensions"
        wanted = "a single number" if one else f"1 to {LARGEST:,} rows of shape {row_shape}"
        raise BadInput(f"{path}: declares an array of {was}, expected {wanted}")
    return shape[0]


def _rows(path: Path, kind: str, capacity: int, rest: bytes, stream: Iterator[bytes]) -> Iterator[np.ndarray]:
    """Yields an array's content in pieces of whole rows; refuses more than was declared, and raises Cut for less."""
    dtype, row_shape = KINDS[kind]
    size = dtype.itemsize * math.prod(row_shape)
    left = capacity
    for piece in itertools.chain([b""], stream):
        rest += piece
        rows = len(rest) // size
        left -= rows
        if left < 0 or (left == 0 and len(rest) > rows * size):
            raise BadInput(f"{path}: holds more than the {capacity:,} rows that its header declares")
        if rows:
            yield np.frombuffer(rest, dtype, rows * size // dtype.itemsize).reshape(rows, *row_shape)
            rest = rest[rows * size :]
    if left:
        raise Cut("ends early")


def _inflate(path: Path, block: int) -> Iterator[bytes]:
    """Decompresses a file of gzip members; raises Cut where it ends early, Broken where it is damaged."""
    member = zlib_ng.decompressobj(zlib_ng.MAX_WBITS | 16)
    try:
        with open(path, "rb") as file:
            while data := file.read(block):
                while data:
                    if member.eof:
                        if not (data := data.lstrip(b"\0")):  # gzip allows zeros behind a member.
                            break
                        member = zlib_ng.decompressobj(zlib_ng.MAX_WBITS | 16)
                    yield member.decompress(data)
                    data = member.unused_data
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from error
    except zlib_ng.error as error:  # type: ignore[misc]
        raise Broken(f"is no gzip file, or damaged ({error})") from error
    if not member.eof:
        raise Cut("is cut")
