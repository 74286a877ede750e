"""Arrays from other people's bytes: a header is believed only as far as there are bytes behind it.

    shape, fortran, dtype = header(file, "actions.npy")
    actions = lay(data, np.dtype("<i8"), (100, 1))

    with npz(Path("reach-v2.npz")) as columns:          # {name: Column}
        states = columns["observations"].rows(200)       # the next 200 rows

NumPy's own reader asks for the memory that a header promises before it looks whether the file is that long, and
reads whole arrays. What it trades away: structured, text and object arrays.
"""

from __future__ import annotations

import math
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from lram.datasets.specs import BadInput

_HEADERLESS = (ValueError, TypeError, EOFError, RecursionError, MemoryError, SyntaxError, tokenize.TokenError)
"""What parsing a crafted header can end in: NumPy hands it to Python's own parser."""


class Damaged(BadInput):
    """A file is truncated, corrupt or not of its format: nothing in it can be believed, but nothing is unsafe."""


def header(file: Any, name: str) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Reads the header of an `.npy` stream, the way there only: what follows are the values.

    Args:
        file: Something with `read`, at the start of the stream.
        name: What to call it in messages.

    Returns:
        Shape, whether the array is in Fortran order, and dtype.

    Raises:
        Damaged: It is not one.
        BadInput: It describes neither numbers nor objects.
    """
    try:
        version = np.lib.format.read_magic(file)
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version not in readers:
            raise ValueError(f"version {version}, expected 1.0 or 2.0")
        shape, fortran, dtype = readers[version](file)
        if any(size < 0 for size in shape):
            raise ValueError(f"an array of shape {shape}")
    except _HEADERLESS as error:
        raise Damaged(f"{name}: not an .npy file that is understood ({error})") from error
    if dtype.fields is not None or dtype.subdtype is not None or dtype.kind not in "biufcO":
        raise BadInput(f"{name}: an array of {dtype}, expected numbers")
    return shape, fortran, dtype


def lay(data: Any, dtype: np.dtype, shape: Any, fortran: bool = False) -> np.ndarray:
    """Lays an array over bytes of a file, without a copy.

    Raises:
        Damaged: The shape is no shape, or the bytes are not as many as it needs.
    """
    whole = isinstance(shape, tuple) and all(isinstance(size, int) and size >= 0 for size in shape)
    if not whole or len(shape) > 32:
        raise Damaged(f"an array of shape {shape!r:.80}")
    data = data.encode("latin-1") if isinstance(data, str) else data  # text in pickles of Python 2
    if not isinstance(data, bytes | bytearray) or len(data) != math.prod(shape) * dtype.itemsize:
        held = len(data) if isinstance(data, bytes | bytearray) else type(data).__name__
        raise Damaged(f"an array of {dtype} {shape} promises {math.prod(shape) * dtype.itemsize} bytes, holds {held}")
    flat = np.frombuffer(data, dtype) if data else np.empty(0, dtype)
    return flat.reshape(shape, order="F" if fortran else "C")


@dataclass
class Column:
    """One array of an `.npz` file, read from its first row to its last.

    Attributes:
        name: "<file>: <array>", for messages.
        shape: Its shape; () for a number alone.
        dtype: Its type, numbers always.
        file: The stream, at the next row.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    file: IO[bytes]

    def rows(self, count: int) -> np.ndarray:
        """Returns the next `count` rows, shape (count, ...).

        Raises:
            Damaged: There are fewer.
        """
        shape = (count, *self.shape[1:])
        try:
            return lay(self.file.read(math.prod(shape) * self.dtype.itemsize), self.dtype, shape)
        except (EOFError, OSError, ValueError, zipfile.BadZipFile, zlib.error) as error:
            raise Damaged(f"{self.name}: cannot be read to its end ({error})") from error

    def whole(self) -> np.ndarray:
        """Returns all of it, with the shape that it has."""
        return self.rows(self.shape[0]) if self.shape else lay(self.file.read(self.dtype.itemsize), self.dtype, ())


@contextmanager
def npz(source: Path | IO[bytes], name: str = "") -> Iterator[dict[str, Column]]:
    """Opens an `.npz` file, compressed or not.

    Args:
        source: Its path, or the file itself.
        name: What to call it in messages, its path when empty.

    Yields:
        Its arrays by name.

    Raises:
        Damaged: It is no zip file, or an array in it is shorter than its header says.
        BadInput: An array is in Fortran order or holds no numbers.
    """
    name = name or str(source)
    with ExitStack() as stack:
        try:
            archive = stack.enter_context(zipfile.ZipFile(source))
            files = {
                member.filename.removesuffix(".npy"): (member, stack.enter_context(archive.open(member)))
                for member in archive.infolist()
                if member.filename.endswith(".npy")
            }
        except (OSError, ValueError, RuntimeError, NotImplementedError, zipfile.BadZipFile) as error:
            raise Damaged(f"{name}: not an .npz file ({error})") from error
        columns = {}
        for key, (member, file) in files.items():
            place = f"{name}: {key}"
            shape, fortran, dtype = header(file, place)
            if dtype.hasobject or (fortran and len(shape) > 1):
                raise BadInput(f"{place}: objects or columns in Fortran order, expected rows of numbers")
            size = math.prod(shape) * dtype.itemsize
            if member.file_size - file.tell() != size:
                raise Damaged(f"{place}: the header promises {size} bytes, not {member.file_size - file.tell()}")
            columns[key] = Column(place, shape, dtype, file)
        yield columns
