"""Reads slices of trajectories straight from disk: `os.preadv` at the index's offsets, no HDF5 call.

    reader = open_task(ROOT / "darkroom" / "room10x10-goal-07-03")
    rewards_T = reader.slice("rewards", row=3, start=10, stop=60)

A directory of files, tar shards where they lie, and a Zarr store differ in one thing, `Places`: in which file
and at which byte an array or a chunk of it begins. Slices go into the caller's memory; those of arrays that lie
near each other come with one system call, and of a compressed array only the chunks that are needed are
inflated. Files stay open, up to a bound shared by all tasks. Threads and forked processes may read at will.
What is traded away: nothing is verified here, that is the business of `lram check`.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import resource
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from zlib_ng import zlib_ng

from lram.datasets.index import VALIDATION, TaskIndex, read_index, trajectory_path
from lram.datasets.specs import DOMAINS, BadInput, state_columns
from lram.datasets.trajectory import IMAGE_CHUNK, VECTOR_CHUNK

OPEN_FILES = min(512, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)
"""How many data files stay open in a process, below the usual limit of 1,024."""
NEAR = 16 * 1024
"""Bytes between two arrays that cost less to read over than another system call."""
PIECE = 96 * 1024
"""Bytes inflated at once: below malloc's threshold for fresh pages, whose faults cost more than inflating does."""

READ = ("states", "actions", "rewards", "returns_to_go")
COLUMNS = [
    *("episode", "length", "return", "split", "shard", "member_offset", "chunk_offsets", "chunk_sizes"),
    *(f"{name}_offset" for name in READ),
]
"""What reading needs of an index."""

Runs = tuple[tuple[int, int, int], ...]
"""(native column, policy column, how many) of neighbouring columns."""

_over = memoryview(bytearray(NEAR))  # what lies between two arrays lands here, from all threads
_zstd = pa.Codec("zstd")


class _OpenFile:
    """A file descriptor that closes when the last user lets go of it."""

    def __init__(self, path: str) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


_cached = functools.lru_cache(OPEN_FILES)(_OpenFile)


def _open(path: str) -> _OpenFile:
    try:
        return _cached(path)
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}, but the index names it") from error


@dataclass(frozen=True)
class Chunks:
    """Where the chunks of one array of a task lie.

    Attributes:
        codec: "gzip" or "zstd".
        shuffled: The bytes of each significance are stored together (HDF5's shuffle filter).
        rows: Rows of a whole chunk.
        first_N: Number of the chunk that holds row 0 of each trajectory.
        skip_N: Rows before that one in its chunk; None where each trajectory begins a chunk, and where a
            trajectory shorter than a chunk has a chunk of its own length.
        offsets_M: Byte offset of each chunk in its file.
        sizes_M: Stored bytes of each chunk.
        path: Returns the file that holds a chunk, from (row of the index, number of the chunk).
    """

    codec: str
    shuffled: bool
    rows: int
    first_N: np.ndarray
    skip_N: np.ndarray | None
    offsets_M: np.ndarray
    sizes_M: np.ndarray
    path: Callable[[int, int], str]


@dataclass(frozen=True)
class Places:
    """Where the arrays of a task's trajectories lie.

    Attributes:
        path: Returns the file of a trajectory's contiguous arrays, from its row in the index.
        offsets_NA: Byte offset of each array of `READ` in that file, 0 for those in chunks.
        chunks: The arrays of `READ` that are in chunks.
    """

    path: Callable[[int], str]
    offsets_NA: np.ndarray
    chunks: dict[str, Chunks]


def file_places(index: TaskIndex) -> Places:
    """Says where the arrays of trajectory files lie, in folders or as members of tar shards.

    Raises:
        BadInput: The index lacks the place of an array.
    """
    table, folder = index.table, str(index.folder)
    codec = index.meta["codec"]
    plain = READ if codec == "none" else READ[1:]
    for name in plain:
        if table[f"{name}_offset"].null_count:
            raise BadInput(f"{folder}: the index lacks the offset of {name}, rebuild it with `lram index`")
    offsets_NA = np.stack([pc.fill_null(table[f"{name}_offset"], 0).to_numpy() for name in READ], axis=1)
    if "shard" in table.column_names:
        shards = table["shard"].combine_chunks().dictionary_encode()
        names = [f"{folder}/{name}" for name in shards.dictionary.to_pylist()]
        codes, members = shards.indices.to_numpy(), index.numpy("member_offset")
        offsets_NA += members[:, None]

        def path(row: int) -> str:
            return names[codes[row]]
    else:
        episodes, members = index.numpy("episode"), None

        def path(row: int) -> str:
            return f"{folder}/{trajectory_path(int(episodes[row]))}"

    if codec == "none":
        return Places(path, offsets_NA, {})
    lists = table["chunk_offsets"].combine_chunks()
    starts, offsets = lists.offsets.to_numpy(), lists.flatten().to_numpy()
    sizes = table["chunk_sizes"].combine_chunks().flatten().to_numpy()
    image = len(index.meta["state_shape"]) == 3
    rows = IMAGE_CHUNK if image else VECTOR_CHUNK
    if len(sizes) != len(offsets) or (np.diff(starts) != -(-index.numpy("length") // rows)).any():
        raise BadInput(f"{folder}: the index's chunk tables do not fit its lengths, rebuild it with `lram index`")
    if members is not None:
        offsets = offsets + np.repeat(members, np.diff(starts))
    chunks = Chunks(codec, not image, rows, starts[:-1], None, offsets, sizes, lambda row, chunk: path(row))
    return Places(path, offsets_NA, {"states": chunks})


def zarr_places(index: TaskIndex) -> Places:
    """Says where the chunks of a packed task lie, from the tables at the end of its shards; zarr itself is slower.

    Raises:
        BadInput: A shard is missing or cut, or the arrays are not stored as `lram pack` does.
    """
    lengths = index.numpy("length").astype(np.int64)
    starts_N = np.cumsum(lengths) - lengths
    places = Places(lambda row: str(index.folder), np.zeros((len(lengths), len(READ)), np.int64), {})
    for name in READ:
        folder = index.folder / name
        try:
            meta = json.loads((folder / "zarr.json").read_text())
            shard = meta["chunk_grid"]["configuration"]["chunk_shape"]
            codec = meta["codecs"][0]["configuration"]
            rows = codec["chunk_shape"][0]
            known = [step["name"] for step in codec["codecs"]] == ["bytes", "zstd"]
            whole = meta["shape"][0] == lengths.sum() and meta["shape"][1:] == shard[1:] == codec["chunk_shape"][1:]
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise BadInput(f"{folder}/zarr.json: not the metadata of a packed array ({error!r})") from error
        if not known or not whole or codec["index_location"] != "end" or shard[0] % rows:
            raise BadInput(f"{folder}/zarr.json: not an array of its index's lengths as `lram pack` stores them")
        per_shard = shard[0] // rows
        tail = "/0" * (len(shard) - 1)
        paths = [f"{folder}/c/{number}{tail}" for number in range(-(-int(lengths.sum()) // shard[0]))]
        table_M2 = np.concatenate([_shard_table(path, per_shard) for path in paths])
        table_M2 = table_M2[: -(-int(lengths.sum()) // rows)]

        def path(row: int, chunk: int, paths: list[str] = paths, per_shard: int = per_shard) -> str:
            return paths[chunk // per_shard]

        places.chunks[name] = Chunks(
            "zstd", False, rows, starts_N // rows, starts_N % rows, table_M2[:, 0], table_M2[:, 1], path
        )
    return places


def _shard_table(path: str, chunks: int) -> np.ndarray:
    """Reads (offset, stored bytes) of every chunk of a Zarr shard, checked by the CRC-32C behind it."""
    size = 16 * chunks + 4
    try:
        with open(path, "rb") as file:
            file.seek(-size, os.SEEK_END)
            table = file.read()
    except OSError as error:
        raise BadInput(f"{path}: missing or cut, expected a shard of {chunks} chunks") from error
    if google_crc32c.value(table[:-4]) != int.from_bytes(table[-4:], "little"):
        raise BadInput(f"{path}: its table of chunks is damaged, unpack or pack it again")
    return np.frombuffer(table, "<i8", 2 * chunks).reshape(chunks, 2)


class TaskReader:
    """Slices of the trajectories of one task.

    Attributes:
        folder: The task's folder.
        domain: Its domain's spec.
        task: Its name.
        lengths: Transitions of every trajectory, (N,).
        returns: Return of every trajectory, (N,).
        episodes: Episode number of every trajectory, (N,), ascending.
        validation: Which trajectories are validation, (N,) bool.
        num_dims: Width of a continuous action, 0 for discrete ones.
        state_shape: Shape of one state.
        row_bytes: Bytes of one row of every array.
        state_runs: Native columns of vector states that stay neighbours in the policy's columns.
        action_runs: The same of continuous actions.
    """

    def __init__(self, index: TaskIndex, places: Callable[[TaskIndex], Places] = file_places) -> None:
        """Prepares a task for reading.

        Args:
            index: Its index, with the columns `COLUMNS` at least.
            places: Says where its arrays lie.

        Raises:
            BadInput: The index holds no trajectory, or states that do not fit the policy.
        """
        if index.table.num_rows == 0:
            raise BadInput(f"{index.folder}: holds no trajectory")
        _cached.cache_clear()  # files open from an earlier index may have been replaced since
        meta = index.meta
        self.folder: Path = index.folder
        self.task: str = meta["task"]
        self.domain = DOMAINS[meta["domain"]]
        self.lengths = index.numpy("length").astype(np.int64)
        self.returns = index.numpy("return")
        self.episodes = index.numpy("episode")
        self.validation = pc.equal(index.table["split"], VALIDATION).to_numpy()
        self._places = places(index)
        states = np.dtype(meta["state_dtype"]), tuple(meta["state_shape"])
        actions = np.dtype(np.int64 if self.domain.action == "discrete" else np.float32)
        single = np.dtype(np.float32), ()
        self._kinds: dict[str, tuple[np.dtype, tuple[int, ...]]] = {
            "states": states,
            "actions": (actions, tuple(meta["action_shape"])),
            "rewards": single,
            "returns_to_go": single,
        }
        self.row_bytes = {
            name: dtype.itemsize * int(np.prod(shape, dtype=np.int64)) for name, (dtype, shape) in self._kinds.items()
        }
        self.num_dims: int = meta["action_shape"][0] if meta["action_shape"] else 0
        self.state_shape: tuple[int, ...] = states[1]
        self.action_runs: Runs = ((0, 0, self.num_dims),)
        self.state_runs: Runs = ()
        if self.domain.state == "vector":
            columns = state_columns(self.domain.name, meta["state_layout"], states[1][0])
            cuts = [0, *(np.flatnonzero(np.diff(columns) != 1) + 1).tolist(), len(columns)]
            self.state_runs = tuple((a, int(columns[a]), b - a) for a, b in itertools.pairwise(cuts))

    def __len__(self) -> int:
        return len(self.lengths)

    def slice(self, name: str, row: int, start: int, stop: int) -> np.ndarray:
        """Reads rows start to stop of one array of trajectory `row`.

        Args:
            name: "states", "actions", "rewards" or "returns_to_go".
            row: Position of the trajectory in the index.
            start: First transition.
            stop: One past the last transition.

        Returns:
            Array of shape (stop - start, …) in the stored dtype.

        Raises:
            BadInput: The file is missing, or shorter than the index says.
        """
        dtype, shape = self._kinds[name]
        out = np.empty((stop - start, *shape), dtype)
        self.read(row, [(name, start, stop, out.data.cast("B"))])
        return out

    def read(self, row: int, cuts: Sequence[tuple[str, int, int, memoryview]]) -> None:
        """Reads slices of several arrays of one trajectory, in as few system calls as their places allow.

        Args:
            row: Position of the trajectory in the index.
            cuts: (array, first transition, one past the last, where its bytes go) of each slice.

        Raises:
            BadInput: The file is missing, or shorter than the index says.
        """
        states, actions, rewards, returns_to_go = self._places.offsets_NA[row].tolist()
        offsets = {"states": states, "actions": actions, "rewards": rewards, "returns_to_go": returns_to_go}
        plain = []
        for name, first, last, out in cuts:
            if name in self._places.chunks:
                self._inflate(self._places.chunks[name], row, name, first, last, out)
            else:
                plain.append((offsets[name] + first * self.row_bytes[name], out))
        if not plain:
            return
        plain.sort(key=_first)
        path = self._places.path(row)
        file = _open(path)
        begin, out = plain[0]
        end, parts = begin + len(out), [out]
        for offset, out in plain[1:]:
            if 0 <= offset - end <= NEAR:
                if offset > end:
                    parts.append(_over[: offset - end])
            else:
                _preadv(path, file, parts, begin, end)
                begin, parts = offset, []
            parts.append(out)
            end = offset + len(out)
        _preadv(path, file, parts, begin, end)

    def _inflate(self, chunks: Chunks, row: int, name: str, first: int, last: int, out: memoryview) -> None:
        rows, chunk, width = chunks.rows, int(chunks.first_N[row]), self.row_bytes[name]
        if chunks.skip_N is None:
            rows = min(rows, int(self.lengths[row]))
        else:
            first, last = first + int(chunks.skip_N[row]), last + int(chunks.skip_N[row])
        done = 0
        for number in range(first // rows, (last - 1) // rows + 1):
            start, stop = max(first - number * rows, 0), min(last - number * rows, rows)
            path = chunks.path(row, chunk + number)
            size, offset = int(chunks.sizes_M[chunk + number]), int(chunks.offsets_M[chunk + number])
            file = _open(path)  # held until it is read: another thread may push it out
            try:
                data = os.pread(file.descriptor, size, offset)
            except (OSError, ValueError) as error:
                raise BadInput(f"{path}: cannot be read at the index's offsets ({error})") from error
            if len(data) != size:
                raise BadInput(f"{path}: shorter than its index says, run `lram check`")
            part = out[done : done + (stop - start) * width]
            decode = _decode_shuffled if chunks.shuffled else _decode
            try:
                decode(chunks.codec, data, rows * width, start * width, part)
            except (zlib_ng.error, OSError, ValueError) as error:  # type: ignore[misc]  # its stub says value
                raise BadInput(f"{path}: a chunk of {name} does not inflate ({error})") from error
            done += len(part)


def open_task(folder: Path) -> TaskReader:
    """Opens one task for reading, from a directory of files, tar shards or a Zarr store.

    Raises:
        BadInput: Its index is missing or cannot be used.
    """
    index = read_index(folder, columns=COLUMNS)
    return TaskReader(index, zarr_places if (index.folder / "zarr.json").is_file() else file_places)


def _first(pair: tuple[int, memoryview]) -> int:
    return pair[0]


def _preadv(path: str, file: _OpenFile, parts: list[memoryview], begin: int, end: int) -> None:
    try:
        whole = os.preadv(file.descriptor, parts, begin) == end - begin
    except OSError as error:
        raise BadInput(f"{path}: cannot be read at the index's offsets ({error})") from error
    if not whole:
        raise BadInput(f"{path}: shorter than its index says, run `lram check`")


def _decode(codec: str, data: bytes, size: int, start: int, out: memoryview) -> None:
    """Writes bytes start to start + len(out) of a chunk of `size` bytes into `out`, inflating none after them."""
    if codec == "zstd":
        out[:] = memoryview(_zstd.decompress(data, size)).cast("B")[start : start + len(out)]
        return
    inflater = zlib_ng.decompressobj()
    at, end = -start, len(out)
    while at < end:
        piece = inflater.decompress(data, min(PIECE, end - at))
        if not piece:
            raise ValueError("it ends early")
        data = inflater.unconsumed_tail
        if at >= 0:
            out[at : at + len(piece)] = piece
        elif at + len(piece) > 0:
            out[: at + len(piece)] = piece[-at:]
        at += len(piece)


def _decode_shuffled(codec: str, data: bytes, size: int, start: int, out: memoryview) -> None:
    """Does the same where byte k of all float32 values lies together, for each k in turn."""
    whole = _zstd.decompress(data, size) if codec == "zstd" else zlib_ng.decompress(data, bufsize=size)
    planes_KN = np.frombuffer(whole, np.uint8, size).reshape(4, -1)
    values_NK = np.frombuffer(out, np.uint8).reshape(-1, 4)
    first = start // 4
    for k in range(4):  # by plane: half the time of one transposed copy
        values_NK[:, k] = planes_KN[k, first : first + len(values_NK)]
