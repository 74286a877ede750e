"""Opens HDF5 files that others made without letting them reach outside themselves, or ask for memory they do not fill.

    with opened(path) as file:
        observations = array(file, "observations", (None, 93))
        demo = group(file, "data/demo_0")

An HDF5 file may name other files in four ways: external links, soft links that lead through them, external raw
data and virtual datasets. Every link of a file is looked at when it is opened, and every array when it is asked
for; none of the four is followed. What is refused is refused in one sentence that names the file and the object.
The price: soft links inside a file are refused too (none of the source programs writes them), and so are arrays
with chunks that were never written.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
from h5py import h5d, h5l, h5p

from lram.datasets.specs import BadInput

LARGEST_CHUNK = 1 << 30
"""Bytes of one chunk at most: a reader has to hold one."""
LARGEST_CACHE = 1 << 29
"""Bytes of chunks kept in memory at most, for one array."""
LARGEST = 1 << 40
"""Bytes of one array at most: thousands of times Composuite's largest."""


@contextmanager
def opened(path: Path) -> Iterator[h5py.File]:
    """Opens a file to read, after checking that all its links are plain names of objects inside it.

    Args:
        path: The file.

    Raises:
        BadInput: It is no whole HDF5 file, or holds a soft or external link.
    """
    try:
        file = h5py.File(path, "r", locking="best-effort")
    except (OSError, RuntimeError, ValueError) as error:
        raise BadInput(f"{path}: not a whole HDF5 file ({_said(error)})") from error
    with file:
        _refuse_links(path, file)
        yield file


def _refuse_links(path: Path, file: h5py.File) -> None:
    def look(name: bytes, info: h5l.LinkInfo) -> bytes | None:
        return None if info.type == h5l.TYPE_HARD else name

    try:
        # Follows plain links only, each object once; stops at the first name that is returned.
        name = file.id.links.visit(look, info=True)
        if name is None:
            return
        text = name.decode(errors="replace")
        kind = "a soft link" if file.id.links.get_info(name).type == h5l.TYPE_SOFT else "a link to another file"
    except (OSError, RuntimeError, KeyError, ValueError) as error:
        raise BadInput(f"{path}: not a whole HDF5 file ({_said(error)})") from error
    raise BadInput(f"{path}: {text!r} is {kind}, expected the object itself")


def group(parent: h5py.Group, name: str) -> h5py.Group:
    """Returns a group inside another.

    Raises:
        BadInput: It is missing or no group.
    """
    found = _get(parent, name, "a group")
    if not isinstance(found, h5py.Group):
        raise BadInput(f"{_place(parent, name)} is no group")
    return found


def array(parent: h5py.Group, name: str, shape: tuple[int | None, ...], kinds: str = "f") -> h5py.Dataset:
    """Returns an array whose declared size is what the file holds; its values are not read yet.

    Chunks are cached so that a reader in blocks of rows decompresses each once, even where they are long and narrow.

    Args:
        parent: Group that holds it.
        name: Its name there.
        shape: Expected shape; None stands for any length.
        kinds: NumPy kinds of dtype that are allowed: "f" float, "i" and "u" integer, "b" bool.

    Raises:
        BadInput: It is missing, of another shape or dtype, lies outside the file, or is not whole.
    """
    found, place = _get(parent, name, "an array"), _place(parent, name)
    if not isinstance(found, h5py.Dataset):
        raise BadInput(f"{place} is no array")
    # Before the shape: HDF5 opens the sources of a virtual dataset to tell how long it is.
    creation = found.id.get_create_plist()
    layout = creation.get_layout()
    if layout == h5d.VIRTUAL:
        raise BadInput(f"{place} is a virtual dataset, whose values lie in other files")
    if layout == h5d.CONTIGUOUS and creation.get_external_count():
        raise BadInput(f"{place} keeps its values in other files")
    wanted = "(" + ", ".join("any" if size is None else str(size) for size in shape) + ")"
    have = found.shape or ()
    if len(have) != len(shape):
        raise BadInput(f"{place} has {len(have)} dimensions, expected {len(shape)}: {wanted}")
    if any(size not in (None, length) for size, length in zip(shape, have)):
        raise BadInput(f"{place} has shape {have}, expected {wanted}")
    if found.dtype.kind not in kinds:
        names = [{"f": "float", "i": "int", "u": "uint", "b": "bool"}[kind] for kind in kinds]
        raise BadInput(f"{place} is {found.dtype}, expected {' or '.join(names)}")
    if 0 in have:
        return found
    _check_size(found, creation, place)
    return _with_cache(parent, name, found)


def _get(parent: h5py.Group, name: str, what: str) -> h5py.Group | h5py.Dataset | h5py.Datatype:
    try:
        found = parent[name] if name in parent else None  # noqa: SIM401 (get hides unreadable headers)
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
        raise BadInput(f"{_place(parent, name)} has an unreadable header ({_said(error)})") from error
    if found is None:
        raise BadInput(f"{_place(parent, name)} is missing, expected {what}")
    return found


def _check_size(dataset: h5py.Dataset, creation: h5p.PropDCID, place: str) -> None:
    itemsize, layout = dataset.id.get_type().get_size(), creation.get_layout()
    size = math.prod(dataset.shape) * itemsize
    held = size <= LARGEST
    if held and layout == h5d.CONTIGUOUS:
        offset = dataset.id.get_offset()
        held = offset is not None and offset + size <= dataset.file.id.get_filesize()
    elif held and layout == h5d.CHUNKED:
        chunk = creation.get_chunk()
        if math.prod(chunk) * itemsize > LARGEST_CHUNK:
            raise BadInput(f"{place} is in chunks of shape {chunk}, more than {LARGEST_CHUNK >> 30} GiB each")
        chunks = math.prod(math.ceil(length / step) for length, step in zip(dataset.shape, chunk))
        held = dataset.id.get_num_chunks() == chunks
    if not held:
        raise BadInput(f"{place} declares shape {dataset.shape}, but the file does not hold that much")


def _with_cache(parent: h5py.Group, name: str, dataset: h5py.Dataset) -> h5py.Dataset:
    """Opens an array again with room for two rows of chunks: a block of rows may touch two."""
    chunk = dataset.chunks
    if chunk is None:
        return dataset
    across = math.prod(math.ceil(size / step) for size, step in zip(dataset.shape[1:], chunk[1:]))
    size = min(2 * across * math.prod(chunk) * dataset.id.get_type().get_size(), LARGEST_CACHE)
    access = h5p.create(h5p.DATASET_ACCESS)
    # A chunk that was read to its end goes first; few slots would make chunks push each other out.
    access.set_chunk_cache(max(521, 101 * across), max(size, 1 << 20), 1.0)
    return h5py.Dataset(h5d.open(parent.id, name.encode(), access))


def _place(parent: h5py.Group, name: str) -> str:
    return f"{parent.file.filename}: " + f"{parent.name}/{name}".strip("/")


def _said(error: Exception) -> str:
    return (str(error.args[-1] if error.args else error).splitlines() or [type(error).__name__])[0]
