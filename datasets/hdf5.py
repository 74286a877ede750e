"""The HDF5 calls behind the trajectory file: arrays and attributes to bytes, and back.

    data = build(arrays, attributes, "none")        # the bytes of a file, made in memory
    content = parse(data)                           # content.arrays, content.attributes, where each array lies

h5py's low-level interface with types and property lists made once: five times faster than its high-level one on
the short trajectories that there are millions of. Files keep to the format of HDF5 1.8, whose headers carry
checksums, and hold no timestamps. What is read is believed only after its type, shape and place are checked, so
that a damaged or hostile file neither reads other files nor asks for memory that it does not fill. The price:
a file that says the same in another way (other integer types, other filters) is refused.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass, field
from typing import Any, Literal

import h5py
import hdf5plugin
import numpy as np
from h5py import h5a, h5d, h5f, h5l, h5p, h5s, h5t, h5z

from lram.datasets.specs import BadInput

Codec = Literal["gzip", "zstd", "none"]

IMAGE_CHUNK = 64
"""Rows of one compressed chunk of image states."""
VECTOR_CHUNK = 128
"""Rows of one compressed chunk of vector states."""
LARGEST = 1 << 32
"""Bytes of one array at most: 25 times the longest Atari episode."""
GZIP_LEVEL = 4
ZSTD_LEVEL = 3


def _file_access() -> h5p.PropFAID:
    access = h5p.create(h5p.FILE_ACCESS)
    access.set_fapl_core(1 << 16, False)
    access.set_fclose_degree(h5f.CLOSE_STRONG)
    access.set_libver_bounds(h5f.LIBVER_V18, h5f.LIBVER_V18)
    access.set_meta_block_size(0)
    return access


def _file_creation() -> h5p.PropFCID:
    creation = h5p.create(h5p.FILE_CREATE)
    creation.set_obj_track_times(False)
    # Attributes stay in the root's header: beyond eight, HDF5 would make a heap and a tree for them.
    creation.set_attr_phase_change(64, 0)
    return creation


def _contiguous() -> h5p.PropDCID:
    creation = h5p.create(h5p.DATASET_CREATE)
    creation.set_obj_track_times(False)
    creation.set_fill_time(h5d.FILL_TIME_NEVER)
    return creation


_FILE_ACCESS = _file_access()
_FILE_CREATION = _file_creation()
_CONTIGUOUS = _contiguous()
_SCALAR = h5s.create(h5s.SCALAR)
_TEXT = h5py.string_dtype()
_DTYPES: dict[type, np.dtype] = {
    str: _TEXT,
    int: np.dtype(np.int64),
    float: np.dtype(np.float64),
    bool: np.dtype(bool),
}
_NUMBERS = [np.dtype(kind) for kind in (np.float32, np.float64, np.int64, np.uint8, bool)]
# In a file and in memory; the two differ for text alone, a Python object in memory.
_STORED = {dtype: h5t.py_create(dtype, logical=True) for dtype in (*_NUMBERS, _TEXT)}
_HELD = {dtype: h5t.py_create(dtype) for dtype in (*_NUMBERS, _TEXT)}
_NAMES = {str: "text", int: "int64", float: "float64", bool: "bool"}


@dataclass
class Content:
    """What a file holds.

    Attributes:
        codec: How `states` are stored; "none" means contiguous.
        arrays: The arrays by name.
        attributes: The attributes by name, as str, int, float and bool.
        offsets: Byte offset of every contiguous array in the file.
        chunks: For `states` in chunks, (byte offset, stored bytes) of each, in order of rows.
    """

    codec: Codec = "none"
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    attributes: dict[str, Any] = field(default_factory=dict)
    offsets: dict[str, int] = field(default_factory=dict)
    chunks: list[tuple[int, int]] = field(default_factory=list)


def build(
    arrays: dict[str, np.ndarray], attributes: dict[str, Any], codec: Codec
) -> tuple[bytes, dict[str, int], list[tuple[int, int]]]:
    """Makes the bytes of a file; the same content gives the same bytes.

    Args:
        arrays: Arrays by name; `states` come last and are stored under `codec`, the others contiguous.
        attributes: Attributes by name: str, int, float or bool.
        codec: How to store `states`.

    Returns:
        The bytes, the offset of every contiguous array, and (offset, stored bytes) of each chunk of `states`.
    """
    # HDF5 takes two files of one name for the same file, even in memory.
    name = f"trajectory-{threading.get_ident()}".encode()
    file = h5f.create(name, h5f.ACC_TRUNC, _FILE_CREATION, _FILE_ACCESS)
    try:
        # All headers first, all data behind them: else HDF5 leaves gaps of up to 2 KB between the two.
        datasets = {}
        for key, array in arrays.items():
            storage = _chunked(array, codec) if key == "states" and codec != "none" else _CONTIGUOUS
            space = h5s.create_simple(array.shape)
            datasets[key] = h5d.create(file, key.encode(), _STORED[array.dtype], space, storage)
        for key, value in attributes.items():
            dtype = _DTYPES[type(value)]
            attribute = h5a.create(file, key.encode(), _STORED[dtype], _SCALAR)
            attribute.write(np.array(value, dtype), _HELD[dtype])
        offsets, chunks = {}, []
        for key, array in arrays.items():
            dataset = datasets[key]
            dataset.write(h5s.ALL, h5s.ALL, np.ascontiguousarray(array), _HELD[array.dtype])
            if key == "states" and codec != "none":
                h5f.flush(file)  # Before it, a chunk has no place yet.
                chunks = _chunk_table(dataset)
            else:
                offsets[key] = dataset.get_offset()
        h5f.flush(file)
        return file.get_file_image(), offsets, chunks
    finally:
        file.close()


def chunk_rows(shape: tuple[int, ...]) -> int:
    """Returns the rows of one compressed chunk of states of this shape."""
    return min(shape[0], IMAGE_CHUNK if len(shape) == 4 else VECTOR_CHUNK)


def _chunked(states: np.ndarray, codec: Codec) -> h5p.PropDCID:
    creation = h5p.create(h5p.DATASET_CREATE)
    creation.set_obj_track_times(False)
    creation.set_chunk((chunk_rows(states.shape), *states.shape[1:]))
    if states.dtype.itemsize > 1:
        creation.set_shuffle()
    if codec == "gzip":
        creation.set_deflate(GZIP_LEVEL)
    else:
        creation.set_filter(hdf5plugin.ZSTD_ID, h5z.FLAG_MANDATORY, (ZSTD_LEVEL,))
    return creation


def _chunk_table(dataset: h5d.DatasetID) -> list[tuple[int, int]]:
    table: list = []
    dataset.chunk_iter(table.append)
    table.sort(key=lambda info: info.chunk_offset)
    return [(info.byte_offset, info.size) for info in table]


def parse(data: bytes, required: dict[str, type], optional: dict[str, type], arrays: set[str]) -> Content:
    """Reads a file's bytes.

    Args:
        data: The bytes.
        required: Type of every attribute that must be there.
        optional: Type of every attribute that may be there.
        arrays: Names of all arrays that may be there; what is there beside them is refused.

    Raises:
        BadInput: With what was found and what was expected, without the file's name.
        OSError, RuntimeError, KeyError, ValueError, TypeError: The bytes are no whole HDF5 file.
    """
    try:
        file = h5f.open_file_image(data)
    except (OSError, ValueError) as error:
        raise BadInput("not a whole trajectory file (no HDF5 file, cut, or damaged in its first bytes)") from error
    content = Content()
    try:
        names: list[bytes] = []
        file.links.iterate(names.append)
        datasets, dtypes = {}, {}
        for name in sorted(raw.decode() for raw in names):
            if name not in arrays:
                raise BadInput(f"holds {name!r}, expected only {', '.join(sorted(arrays))}")
            datasets[name], dtypes[name] = _open(file, name, len(data), content)
        # Lengths before contents: what declares a length that no other array has is not read.
        lengths = {name: dataset.shape[0] for name, dataset in datasets.items() if name != "final_state"}
        if len(set(lengths.values())) > 1:
            found = ", ".join(f"{name} {length}" for name, length in lengths.items())
            raise BadInput(f"lengths are {found}, expected equal ones")
        _check_heaps(data, content, datasets)
        for name, kind in (required | optional).items():
            if name in required or h5a.exists(file, name.encode()):
                content.attributes[name] = _attribute(file, name, kind)
        for name, dataset in datasets.items():
            array = np.empty(dataset.shape, dtypes[name])
            dataset.read(h5s.ALL, h5s.ALL, array, _HELD[dtypes[name]])
            content.arrays[name] = array
    finally:
        file.close()
    return content


def _check_heaps(data: bytes, content: Content, datasets: dict[str, h5d.DatasetID]) -> None:
    """Checks the heaps that texts lie in: a flipped bit in one sends HDF5 into an endless loop."""
    places = [(at, at + datasets[name].get_storage_size()) for name, at in content.offsets.items()]
    places += [(at, at + stored) for at, stored in content.chunks]
    at = data.find(b"GCOL")
    while at >= 0:
        if not any(start <= at < stop for start, stop in places):
            _check_heap(data, at)
        at = data.find(b"GCOL", at + 4)


def _check_heap(data: bytes, start: int) -> None:
    if start + 16 > len(data):
        raise BadInput("a heap of texts is cut")
    end = start + int.from_bytes(data[start + 8 : start + 16], "little")
    at = start + 16
    # Objects: index and references (8 bytes), size (8), bytes padded to 8; index 0 is free space up to the end.
    while at + 16 <= min(end, len(data)):
        size = int.from_bytes(data[at + 8 : at + 16], "little")
        if data[at : at + 2] == b"\0\0":
            at += size
            break
        at += 16 + (size + 7) // 8 * 8
    if not at <= end < at + 16 or end > len(data):
        raise BadInput("a heap of texts is damaged")


def _attribute(file: h5f.FileID, name: str, kind: type) -> Any:
    try:
        attribute = h5a.open(file, name.encode())
    except KeyError as error:
        raise BadInput(f"attribute {name} is missing") from error
    dtype = _DTYPES[kind]
    if attribute.shape != () or not attribute.get_type().equal(_STORED[dtype]):
        raise BadInput(f"attribute {name} is {attribute.dtype} {attribute.shape}, expected one {_NAMES[kind]}")
    value = np.empty((), dtype)
    attribute.read(value, _HELD[dtype])
    if kind is not str:
        return value.item()
    text = value.item()
    return text.decode() if isinstance(text, bytes) else ""


def _open(file: h5f.FileID, name: str, size: int, content: Content) -> tuple[h5d.DatasetID, np.dtype]:
    """Opens an array after checking that it lies in the file, whole; notes its place in `content`."""
    # A link or a virtual array could make a download read other files of its user.
    if file.links.get_info(name.encode()).type != h5l.TYPE_HARD:
        raise BadInput(f"dataset {name} is a link, expected an array in the file")
    try:
        dataset = h5d.open(file, name.encode())
    except (KeyError, OSError, TypeError, ValueError) as error:
        raise BadInput(f"dataset {name} is no readable array ({error})") from error
    creation = dataset.get_create_plist()
    layout = creation.get_layout()
    if layout == h5d.VIRTUAL or (layout == h5d.CONTIGUOUS and creation.get_external_count()):
        raise BadInput(f"dataset {name} points to other files, expected an array in the file")
    shape, stored = dataset.shape, dataset.get_type()
    dtype = next((dtype for dtype in _NUMBERS if stored.equal(_STORED[dtype])), None)
    if dtype is None:
        raise BadInput(f"{name} are {stored.dtype}, a type that no array of the format has")
    if not shape:
        raise BadInput(f"{name} has no dimension, expected (T, …)")
    if 0 in shape:
        raise BadInput(f"{name} has shape {shape}: no transitions, expected at least one")
    wanted = math.prod(shape) * dtype.itemsize
    if wanted > LARGEST:
        raise BadInput(f"{name} declares shape {shape}, more than {LARGEST >> 30} GiB")
    if layout == h5d.CONTIGUOUS:
        offset = dataset.get_offset()
        if offset is None or offset + wanted > size:
            raise BadInput(f"{name} declares shape {shape}, but the file does not hold that much")
        content.offsets[name] = offset
    elif layout == h5d.CHUNKED and name == "states":
        content.codec = _codec_of(creation, shape, dtype.itemsize)
        content.chunks = _chunk_table(dataset)
        if len(content.chunks) != math.ceil(shape[0] / chunk_rows(shape)):
            raise BadInput(f"states of shape {shape} are in {len(content.chunks)} chunks: some are missing")
    else:
        raise BadInput(f"{name} is not stored contiguous")
    return dataset, dtype


def _codec_of(creation: h5p.PropDCID, shape: tuple[int, ...], itemsize: int) -> Codec:
    expected = (chunk_rows(shape), *shape[1:])
    if creation.get_chunk() != expected:
        raise BadInput(f"states are in chunks of {creation.get_chunk()}, expected {expected}")
    filters = [creation.get_filter(i)[0] for i in range(creation.get_nfilters())]
    before = [h5z.FILTER_SHUFFLE] if itemsize > 1 else []
    if filters == [*before, h5z.FILTER_DEFLATE]:
        return "gzip"
    if filters == [*before, hdf5plugin.ZSTD_ID]:
        return "zstd"
    raise BadInput(f"states pass through the filters {filters}, expected those of gzip or zstd")
