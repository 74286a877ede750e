"""A dataset as one sharded Zarr v3 store, and back: for object stores, and for analysis with dask.

    pack_task(ROOT / "atari" / "breakout", OUT)       # OUT.zarr/atari/breakout/{states,actions,…}
    unpack_task(OUT / "atari" / "breakout", ROOT2)    # the same files again, byte for byte
    dask.array.from_zarr(OUT, component="atari/breakout/states").mean(axis=0).compute()

Per task one group. `states`, `actions`, `rewards`, `returns_to_go` and `dones` hold all episodes end to end, the
rows of episode i being offsets[i] to offsets[i + 1]; arrays of one value an episode say the rest, and `index` is
the task's index.parquet as bytes, written last: a group that has it is whole, so packing again continues.
Chunks are zstd without a filter, which every Zarr library reads; vectors shrink less than with HDF5's shuffle.
A trajectory that could not be given back byte for byte is refused when it is packed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import ZstdCodec
from zarr.errors import BaseZarrError

from lram.datasets.index import DESCRIPTION, INDEX, TaskIndex, index_path, read_index, trajectory_path
from lram.datasets.specs import BadInput
from lram.datasets.trajectory import IMAGE_CHUNK, Trajectory, encode, scan, write_whole

STATE_ROWS = 128
"""Rows of one chunk of vector states and actions."""
VALUE_ROWS = 1024
"""Rows of one chunk of the arrays with one value a step."""
SHARD_ROWS = {True: 128 * IMAGE_CHUNK, False: 65_536}
"""Rows of one shard, for image states and for vectors: some tens of megabytes."""
EPISODES = 65_536
"""Rows of one chunk of the arrays with one value an episode."""


class _Appender:
    """Writes rows to the end of a Zarr array, a whole shard at a time."""

    def __init__(self, array: zarr.Array) -> None:
        self._array = array
        self._buffer = np.empty(((array.shards or array.chunks)[0], *array.shape[1:]), array.dtype)
        self._written = self._filled = 0

    def add(self, rows: np.ndarray) -> None:
        while len(rows):
            part = rows[: len(self._buffer) - self._filled]
            self._buffer[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            rows = rows[len(part) :]
            if self._filled == len(self._buffer):
                self.flush()

    def flush(self) -> None:
        if self._filled:
            self._array[self._written : self._written + self._filled] = self._buffer[: self._filled]
        self._written, self._filled = self._written + self._filled, 0


def pack_task(folder: Path, out: Path) -> int:
    """Packs the trajectory files of one task into a Zarr store; a task that is whole there is left as it is.

    Args:
        folder: The task's folder, ROOT/<domain>/<task>.
        out: The Zarr store.

    Returns:
        Number of trajectories.

    Raises:
        BadInput: The index or a file cannot be read, they disagree, or a file could not be given back.
    """
    index = read_index(folder)
    if "shard" in index.table.column_names:
        raise BadInput(f"{folder}: is stored in tar shards, expected trajectory files")
    raw = (index.folder / INDEX).read_bytes()
    name = f"{index.folder.parent.name}/{index.folder.name}"
    target = Path(out) / name
    if index_path(target).is_file() and index_path(target).read_bytes() == raw:
        return index.table.num_rows
    shutil.rmtree(target, ignore_errors=True)
    group = zarr.open_group(out, mode="a", zarr_format=3).require_group(name)
    sources = _pack_arrays(index, group) if index.table.num_rows else []
    group.attrs.update(index.meta | {"sources": [{"source": text, "state_layout": layout} for text, layout in sources]})
    whole = group.create_array("index", shape=(len(raw),), dtype="uint8", chunks=(len(raw),), compressors=None)
    whole[:] = np.frombuffer(raw, np.uint8)
    return index.table.num_rows


def _pack_arrays(index: TaskIndex, group: zarr.Group) -> list[tuple[str, str]]:
    """Writes all arrays of a task; returns the texts that the numbers in `source` stand for."""
    meta, lengths = index.meta, index.numpy("length").astype(np.int64)
    image = len(meta["state_shape"]) == 3
    rows = IMAGE_CHUNK if image else STATE_ROWS
    actions = np.int64 if not meta["action_shape"] else np.float32
    kinds: dict[str, tuple[Any, list[int], int]] = {
        "states": (meta["state_dtype"], meta["state_shape"], rows),
        "actions": (actions, meta["action_shape"], STATE_ROWS),
        "rewards": (np.float32, [], VALUE_ROWS),
        "returns_to_go": (np.float32, [], VALUE_ROWS),
        "dones": (np.bool_, [], VALUE_ROWS),
    }
    appenders = {}
    for name, (dtype, shape, rows) in kinds.items():
        array = group.create_array(
            name,
            shape=(int(lengths.sum()), *shape),
            dtype=dtype,
            chunks=(rows, *shape),
            shards=(SHARD_ROWS[image], *shape),
            compressors=ZstdCodec(level=3),
            # So that a missing chunk means damage, never zeros.
            config={"write_empty_chunks": True},
        )
        appenders[name] = _Appender(array)
    finals = _Appender(
        group.create_array(
            "final_state",
            shape=(len(lengths), *meta["state_shape"]),
            dtype=meta["state_dtype"],
            chunks=(rows, *meta["state_shape"]),
            compressors=ZstdCodec(level=3),
        )
    )
    columns: dict[str, list[Any]] = {name: [] for name in ("has_final_state", "success", "source")}
    sources: dict[tuple[str, str], int] = {}
    hashes = index.table["sha256"].to_pylist()
    for path, expected in zip(index.table["path"].to_pylist(), hashes):
        trajectory, stored = scan(index.folder / path)
        if stored.sha256 != expected:
            raise BadInput(f"{index.folder / path}: differs from what its index says, run `lram check`")
        if encode(trajectory, stored.codec).data != stored.data:
            raise BadInput(
                f"{index.folder / path}: was written by other versions of lram or HDF5 and could not be given back"
            )
        for name, appender in appenders.items():
            appender.add(getattr(trajectory, name))
        final = trajectory.final_state
        finals.add(np.zeros((1, *meta["state_shape"]), meta["state_dtype"]) if final is None else final[None])
        columns["has_final_state"].append(final is not None)
        columns["success"].append(-1 if trajectory.success is None else int(trajectory.success))
        # The layout as text: the order of its keys is in the file's bytes.
        texts = trajectory.source, json.dumps(trajectory.state_layout)
        columns["source"].append(sources.setdefault(texts, len(sources)))
    for appender in (*appenders.values(), finals):
        appender.flush()
    ends = np.cumsum(lengths)
    values: dict[str, np.ndarray] = {
        "offsets": np.concatenate([[0], ends]),
        **{name: index.numpy(name) for name in ("episode", "return", "seed", "terminated", "truncated")},
        "has_final_state": np.array(columns["has_final_state"], bool),
        "success": np.array(columns["success"], np.int8),
        "source": np.array(columns["source"], np.int32),
    }
    for name, value in values.items():
        array = group.create_array(name, shape=value.shape, dtype=value.dtype, chunks=(min(len(value), EPISODES),))
        array[:] = value
    return list(sources)


def unpack_task(packed: Path, root: Path) -> int:
    """Writes the trajectory files and the index of a packed task; a task that is whole there is left as it is.

    Args:
        packed: The task's group in the Zarr store, OUT.zarr/<domain>/<task>.
        root: Dataset directory to write to.

    Returns:
        Number of trajectories.

    Raises:
        BadInput: The store is damaged, its trajectories are not those of its index, or `root` holds others.
    """
    packed = Path(packed)
    index = read_index(packed)
    raw = index_path(packed).read_bytes()
    folder = Path(root) / packed.parent.name / packed.name
    if (folder / INDEX).is_file():
        if (folder / INDEX).read_bytes() != raw:
            raise BadInput(f"{folder}: holds other trajectories than {packed}, choose another directory")
        return index.table.num_rows
    hashes = index.table["sha256"].to_pylist()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        for trajectory, expected in zip(_trajectories(index), hashes):
            image = encode(trajectory, index.meta["codec"])
            if image.sha256 != expected:
                found = f"episode {trajectory.episode} is not what its index says"
                raise BadInput(f"{packed}: {found}: damaged, or packed by other versions of lram or HDF5")
            path = folder / trajectory_path(trajectory.episode)
            path.parent.mkdir(exist_ok=True)
            write_whole(path, image.data)
    except (BaseZarrError, OSError, KeyError, RuntimeError) as error:
        raise BadInput(f"{packed}: a packed array cannot be read ({str(error).splitlines()[0]})") from error
    write_whole(folder / INDEX, raw)
    return index.table.num_rows


def _trajectories(index: TaskIndex) -> Iterator[Trajectory]:
    group = zarr.open_group(index.folder, mode="r")
    attributes: dict[str, Any] = dict(group.attrs)
    lengths = index.numpy("length").tolist()
    if not lengths:
        return
    columns = {name: np.asarray(_array(group, name)[:]).tolist() for name in ("has_final_state", "success", "source")}
    arrays = zip(*(_episodes(_array(group, name), lengths) for name in ("states", "actions", "rewards")))
    finals = _episodes(_array(group, "final_state"), [1] * len(lengths))
    table = index.table.select(["episode", "seed", "terminated", "truncated"])
    for i, (row, (states, actions, rewards)) in enumerate(zip(table.to_pylist(), arrays)):
        final, success = next(finals)[0], columns["success"][i]
        texts = attributes["sources"][columns["source"][i]]
        yield Trajectory(
            domain=attributes["domain"],
            task=attributes["task"],
            **row,
            states=states,
            actions=actions,
            rewards=rewards,
            source=texts["source"],
            final_state=final if columns["has_final_state"][i] else None,
            success=None if success < 0 else bool(success),
            state_layout=json.loads(texts["state_layout"]),
        )


def _array(group: zarr.Group, name: str) -> zarr.Array:
    array = group[name]
    assert isinstance(array, zarr.Array)
    return array


def _episodes(array: zarr.Array, lengths: list[int]) -> Iterator[np.ndarray]:
    """Cuts an array into episodes, reading each shard once."""
    step = (array.shards or array.chunks)[0]
    held, first = np.asarray(array[:step]), 0
    at = 0
    for length in lengths:
        while at + length > first + len(held):
            following = np.asarray(array[first + len(held) : first + len(held) + step])
            held, first = np.concatenate([held[at - first :], following]), at
        yield held[at - first : at - first + length]
        at += length


def pack_description(root: Path, out: Path) -> None:
    """Keeps ROOT/dataset.json in the attributes of the store."""
    path = Path(root) / DESCRIPTION
    group = zarr.open_group(out, mode="a", zarr_format=3)
    group.attrs["dataset"] = path.read_text() if path.is_file() else None


def unpack_description(packed: Path, root: Path) -> None:
    """Gives ROOT/dataset.json back, where there was one."""
    text = json.loads((Path(packed) / "zarr.json").read_text())["attributes"].get("dataset")
    if text is not None:
        write_whole(Path(root) / DESCRIPTION, text.encode())
