"""Reads slices of trajectories straight from disk: `os.pread` at the index's offsets, no HDF5 call.

    reader = TaskReader(read_index(ROOT / "darkroom" / "room10x10-goal-07-03"))
    rewards_T = reader.slice("rewards", row=3, start=10, stop=60)

Contiguous arrays are one system call; chunked states are inflated chunk by chunk. Files stay open, up to a
bound shared by all tasks. What is traded away: nothing is verified here, that is the business of `lram check`.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
from isal import isal_zlib

from lram.datasets.index import TaskIndex
from lram.datasets.specs import DOMAINS, BadInput, state_columns
from lram.datasets.trajectory import IMAGE_CHUNK, VECTOR_CHUNK

OPEN_FILES = 512
"""How many trajectory files stay open in a process, below the usual limit of 1,024."""


class _OpenFile:
    """A file descriptor that closes when the last user lets go of it."""

    def __init__(self, path: str) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


_open = functools.lru_cache(OPEN_FILES)(_OpenFile)


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
        columns: Policy columns of the native state columns, as an index; None for images.
        num_dims: Width of a continuous action, 0 for discrete ones.
    """

    def __init__(self, index: TaskIndex) -> None:
        """Prepares a task for reading.

        Raises:
            BadInput: The index holds no trajectory, or states that do not fit the policy.
        """
        if index.table.num_rows == 0:
            raise BadInput(f"{index.folder}: holds no trajectory")
        meta = index.meta
        self.folder: Path = index.folder
        self.task: str = meta["task"]
        self.domain = DOMAINS[meta["domain"]]
        self.lengths = index.numpy("length").astype(np.int64)
        self.returns = index.numpy("return")
        self.episodes = index.numpy("episode")
        self.validation = index.numpy("split") == "validation"
        self._paths: list[str] = index.table["path"].to_pylist()
        self._codec: str = meta["codec"]
        self._offsets = {
            name: index.numpy(f"{name}_offset") for name in ("actions", "rewards", "returns_to_go", "states")
        }
        if self._codec != "none":
            chunks = index.table["chunk_offsets"].combine_chunks()
            self._chunk_starts = chunks.offsets.to_numpy()
            self._chunk_offsets = chunks.flatten().to_numpy()
            self._chunk_sizes = index.table["chunk_sizes"].combine_chunks().flatten().to_numpy()
        states = np.dtype(meta["state_dtype"]), tuple(meta["state_shape"])
        actions = np.dtype(np.int64 if self.domain.action == "discrete" else np.float32)
        single = np.dtype(np.float32), ()
        self._kinds: dict[str, tuple[np.dtype, tuple[int, ...]]] = {
            "states": states,
            "actions": (actions, tuple(meta["action_shape"])),
            "rewards": single,
            "returns_to_go": single,
        }
        self.num_dims: int = meta["action_shape"][0] if meta["action_shape"] else 0
        self.state_shape: tuple[int, ...] = states[1]
        self.columns: np.ndarray | slice | None = None
        if self.domain.state == "vector":
            self.columns = state_columns(self.domain.name, meta["state_layout"], states[1][0])
            if np.array_equal(self.columns, np.arange(states[1][0])):
                self.columns = slice(states[1][0])  # a block copy, several times faster than a scatter

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
            Array of shape (stop - start, …) in the stored dtype, read-only.

        Raises:
            BadInput: The file is missing, or shorter than the index says.
        """
        path = f"{self.folder}/{self._paths[row]}"
        try:
            descriptor = _open(path).descriptor
        except OSError as error:
            raise BadInput(f"{path}: {error.strerror}, but the index names it") from error
        dtype, shape = self._kinds[name]
        if name == "states" and self._codec != "none":
            return self._inflate(path, descriptor, row, start, stop)
        bytes_per_row = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
        offset = int(self._offsets[name][row]) + start * bytes_per_row
        data = _pread(path, descriptor, (stop - start) * bytes_per_row, offset)
        return np.frombuffer(data, dtype).reshape(stop - start, *shape)

    def _inflate(self, path: str, descriptor: int, row: int, start: int, stop: int) -> np.ndarray:
        dtype, shape = self._kinds["states"]
        rows = min(int(self.lengths[row]), IMAGE_CHUNK if len(shape) == 3 else VECTOR_CHUNK)
        first, last = start // rows, (stop - 1) // rows
        out = np.empty(((last - first + 1) * rows, *shape), dtype)
        size = rows * int(np.prod(shape)) * dtype.itemsize
        for i in range(first, last + 1):
            at = self._chunk_starts[row] + i
            data = _pread(path, descriptor, int(self._chunk_sizes[at]), int(self._chunk_offsets[at]))
            try:
                if self._codec == "gzip":
                    raw = isal_zlib.decompress(data, bufsize=size)
                else:
                    raw = pa.Codec("zstd").decompress(data, size, asbytes=True)
            except (isal_zlib.error, OSError) as error:
                raise BadInput(f"{path}: a chunk of states does not inflate ({error})") from error
            if dtype.itemsize > 1:  # HDF5's shuffle filter stores the bytes of each significance together.
                raw = np.frombuffer(raw, np.uint8).reshape(dtype.itemsize, -1).T.tobytes()
            out[(i - first) * rows : (i - first + 1) * rows] = np.frombuffer(raw, dtype).reshape(rows, *shape)
        return out[start - first * rows : stop - first * rows]


def _pread(path: str, descriptor: int, size: int, offset: int) -> bytes:
    data = os.pread(descriptor, size, offset)
    if len(data) != size:
        raise BadInput(f"{path}: shorter than its index says, run `lram check`")
    return data
