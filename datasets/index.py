"""The index of a task: one Parquet row per trajectory, and everything needed to read windows without HDF5.

    index = read_index(ROOT / "darkroom" / "room10x10-goal-07-03")
    index.table["length"], index.meta["provenance"]

A row holds path, length, return, success, seed, split, sha256 and the byte offset (contiguous) or chunk table
(chunked) of every array. What all trajectories of a task share (row shapes, dtypes, layout, provenance) stands
once, as JSON in the table's metadata. The files are the truth: `rebuild` makes the same index from them, at the
cost of opening each one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lram.datasets.specs import DOMAINS, BadInput, reference
from lram.datasets.trajectory import ARRAYS, VERSION, FileImage, Trajectory, scan, write_whole

INDEX = "index.parquet"
DESCRIPTION = "dataset.json"
PARTS = "index-part-*.parquet"
FILES_PER_FOLDER = 1000
VALIDATION_SHARE = 0.025
VALIDATION = "validation"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
TRAJECTORY_PATH = re.compile(r"\d{3,}/\d{9,}\.hdf5")

SCHEMA = pa.schema(
    [
        ("episode", pa.int64()),
        ("path", pa.string()),
        ("length", pa.int32()),
        ("return", pa.float64()),
        ("success", pa.bool_()),
        ("terminated", pa.bool_()),
        ("truncated", pa.bool_()),
        ("seed", pa.int64()),
        ("split", pa.string()),
        ("size", pa.int64()),
        ("sha256", pa.binary(32)),
        *((f"{name}_offset", pa.int64()) for name in ARRAYS),
        ("chunk_offsets", pa.list_(pa.int64())),
        ("chunk_sizes", pa.list_(pa.int32())),
    ]
)

SHARD_SCHEMA = pa.schema([*SCHEMA, ("shard", pa.string()), ("member_offset", pa.int64())])
"""The index of a task in tar shards: which one holds a trajectory's file, and at which byte the file starts."""
SHARDS = "shard-*.tar"
SHARD_NAME = "shard-[0-9]{5,}[.]tar"


@dataclass
class TaskIndex:
    """A task's index.

    Attributes:
        folder: The task's folder, ROOT/<domain>/<task>.
        meta: What all rows share: domain, task, complete, provenance, codec, state_shape, state_dtype, action_shape,
            state_layout (shapes are those of one row, None while there is no trajectory), and where its maker
            kept one, account (rows read, written and left out).
        table: One row per trajectory, ordered by episode, columns of `SCHEMA`.
    """

    folder: Path
    meta: dict[str, Any]
    table: pa.Table

    def numpy(self, column: str) -> np.ndarray:
        """Returns a column as a NumPy array."""
        return self.table[column].to_numpy()


def task_folder(root: Path, domain: str, task: str) -> Path:
    """Returns ROOT/<domain>/<task>.

    Raises:
        BadInput: A name is unsafe in a path, or the domain is unknown.
    """
    if domain not in DOMAINS:
        raise BadInput(f"unknown domain {domain!r}, expected one of {', '.join(DOMAINS)}")
    if not NAME.fullmatch(task):
        raise BadInput(f"task name {task!r} may hold letters, digits, '.', '_' and '-' only")
    return Path(root) / domain / task


def trajectory_path(episode: int) -> str:
    """Returns the path of an episode inside its task's folder, at most 1,000 files a folder."""
    return f"{episode // FILES_PER_FOLDER:03d}/{episode:09d}.hdf5"


def find_tasks(root: Path) -> list[Path]:
    """Returns the folders of all tasks below ROOT, sorted.

    Raises:
        BadInput: ROOT is missing, or holds no task.
    """
    root = Path(root)
    if not root.is_dir():
        raise BadInput(f"{root}: no such dataset directory; collect or convert one there, or name another")
    folders = [folder for domain in sorted(DOMAINS) for folder in sorted((root / domain).glob("*"))]
    folders = [folder for folder in folders if folder.is_dir() and NAME.fullmatch(folder.name)]
    if not folders:
        raise BadInput(f"{root}: no tasks found, expected folders <domain>/<task> (domains: {', '.join(DOMAINS)})")
    return folders


def validation_rank(domain: str, task: str, episode: int) -> float:
    """Returns a number in [0, 1) fixed by (task, episode); below `VALIDATION_SHARE` means validation."""
    digest = hashlib.sha256(f"{domain}/{task}/{episode}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def splits(domain: str, task: str, episodes: list[int]) -> list[str]:
    """Assigns each episode to "train" or "validation".

    An episode whose rank is below 2.5 % stays validation whatever is added later. In a task where no episode
    qualifies yet, the lowest-ranked one stands in, unless it is the only one.
    """
    ranks = [validation_rank(domain, task, episode) for episode in episodes]
    limit = VALIDATION_SHARE
    if len(ranks) > 1 and min(ranks) >= limit:
        limit = float(np.nextafter(min(ranks), 1))
    return [VALIDATION if rank < limit else "train" for rank in ranks]


def row_of(trajectory: Trajectory, image: FileImage) -> dict[str, Any]:
    """Makes the index row of a trajectory stored as `image`; `split` is set when rows become a table."""
    return {
        "episode": trajectory.episode,
        "path": trajectory_path(trajectory.episode),
        "length": trajectory.length,
        "return": trajectory.total,
        "success": trajectory.success,
        "terminated": trajectory.terminated,
        "truncated": trajectory.truncated,
        "seed": trajectory.seed,
        "size": len(image.data),
        "sha256": image.sha256,
        **{f"{name}_offset": image.offsets.get(name) for name in ARRAYS},
        "chunk_offsets": [offset for offset, _ in image.chunks] or None,
        "chunk_sizes": [size for _, size in image.chunks] or None,
    }


def shared_meta(trajectory: Trajectory, image: FileImage) -> dict[str, Any]:
    """Returns the part of a task's metadata that its trajectories fix."""
    return {
        "codec": image.codec,
        "state_shape": list(trajectory.states.shape[1:]),
        "state_dtype": str(trajectory.states.dtype),
        "action_shape": list(trajectory.actions.shape[1:]),
        "state_layout": trajectory.state_layout,
    }


def table_of(meta: dict[str, Any], rows: list[dict[str, Any]]) -> pa.Table:
    """Makes the index table: rows ordered by episode, splits assigned, metadata attached."""
    rows = sorted(rows, key=lambda row: row["episode"])
    parts = splits(meta["domain"], meta["task"], [row["episode"] for row in rows])
    rows = [{**row, "split": part} for row, part in zip(rows, parts)]
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    return table.replace_schema_metadata({"lram": json.dumps(meta, sort_keys=True)})


def write_index(folder: Path, table: pa.Table, name: str = INDEX) -> None:
    """Writes an index table whole into a task's folder."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    write_whole(folder / name, buffer.getvalue())


def index_path(folder: Path) -> Path:
    """Returns the file that holds a task's index: in a Zarr store it is the one chunk of the array `index`."""
    packed = Path(folder) / "index" / "c" / "0"
    return packed if packed.is_file() else Path(folder) / INDEX


def read_index(folder: Path, name: str = INDEX, columns: list[str] | None = None) -> TaskIndex:
    """Reads the index of a task.

    Args:
        folder: The task's folder.
        name: Name of the index in it.
        columns: Columns to read, those of them that it has; all when None.

    Raises:
        BadInput: The index is missing, unreadable, of another shape, or names a path outside its folder.
    """
    folder = Path(folder)
    path = index_path(folder) if name == INDEX else folder / name
    if not path.is_file():
        raise BadInput(f"{path}: no index, rebuild it with `lram index`")
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            table = file.read([name for name in columns if name in schema.names] if columns else None)
        meta = json.loads(schema.metadata[b"lram"])
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise BadInput(f"{path}: not a readable index ({str(error).splitlines()[0]})") from error
    expected = SHARD_SCHEMA if "shard" in schema.names else SCHEMA
    if not schema.equals(expected, check_metadata=False):
        raise BadInput(f"{path}: columns are {schema.names}, expected {expected.names}")
    named = f"{meta.get('domain')}/{meta.get('task')}"
    if named != f"{folder.parent.name}/{folder.name}":
        raise BadInput(f"{path}: names the task {named!r}, expected that of its folder")
    for column, pattern, form in (
        ("path", TRAJECTORY_PATH.pattern, "NNN/NNNNNNNNN.hdf5"),
        ("shard", SHARD_NAME, "shard-NNNNN.tar"),
    ):
        if column not in table.column_names:
            continue
        values = table[column]
        safe = pc.fill_null(pc.match_substring_regex(values, f"^(?:{pattern})$"), False)
        if not pc.all(safe).as_py() and len(values):
            value = values.filter(pc.invert(safe))[0].as_py()
            raise BadInput(f"{path}: column {column} holds {value!r}, expected {form}")
    return TaskIndex(folder, meta, table)


def rebuild(folder: Path) -> TaskIndex:
    """Makes a task's index from its files, keeping the provenance of the old index where it can be read.

    Raises:
        BadInput: A file breaks the format, lies under another task's or episode's name, or is in a tar shard,
            whose index comes with it.
    """
    folder = Path(folder)
    if any(folder.glob(SHARDS)):
        raise BadInput(f"{folder}: holds tar shards, whose index cannot be rebuilt: fetch it again")
    meta: dict[str, Any] = {"domain": folder.parent.name, "task": folder.name}
    meta |= {"complete": False, "provenance": {}}
    try:
        old = read_index(folder).meta
        meta |= {key: old[key] for key in ("complete", "provenance", "account", "quarantined") if key in old}
    except BadInput:
        pass
    rows = []
    for path in trajectory_files(folder):
        trajectory, image = scan(path)
        check_place(trajectory, folder, path)
        meta |= shared_meta(trajectory, image)
        rows.append(row_of(trajectory, image))
    table = table_of(meta, rows)
    write_index(folder, table)
    for part in folder.glob(PARTS):
        part.unlink()
    return TaskIndex(folder, meta, table)


def trajectory_files(folder: Path) -> list[Path]:
    """Returns the trajectory files of a task, ordered by episode."""
    return sorted(folder.glob("[0-9]*/[0-9]*.hdf5"), key=lambda path: path.name)


def check_place(trajectory: Trajectory, folder: Path, path: Path) -> None:
    """Checks that a trajectory lies where its attributes say.

    Raises:
        BadInput: It belongs to another task or episode.
    """
    said = f"{trajectory.domain}/{trajectory.task}/{trajectory_path(trajectory.episode)}"
    lies = f"{folder.parent.name}/{folder.name}/{path.parent.name}/{path.name}"
    if said != lies:
        raise BadInput(f"{path}: its attributes say {said}")


def fingerprint(folders: list[Path]) -> str:
    """Returns one hash over what tasks hold: equal when, and only when, episodes and their files' hashes are.

    The same files in folders, in tar shards and packed in a Zarr store have one fingerprint.
    """
    digest = hashlib.sha256()
    for folder in sorted(folders):
        index = read_index(folder, columns=["episode", "sha256"])
        digest.update(f"{folder.parent.name}/{folder.name}/{index.table.num_rows}".encode())
        digest.update(index.numpy("episode").astype("<i8").tobytes())
        digest.update(b"".join(index.table["sha256"].to_pylist()))
    return digest.hexdigest()


def write_description(root: Path) -> Path:
    """Writes ROOT/dataset.json: format version, tasks with counts and provenance, reference scores.

    Returns:
        Its path.
    """
    described = {}
    for folder in find_tasks(root):
        index = read_index(folder)
        name = f"{index.meta['domain']}/{index.meta['task']}"
        scores = reference(index.meta["domain"], index.meta["task"])
        described[name] = {
            "trajectories": index.table.num_rows,
            "transitions": int(index.numpy("length").sum()),
            "bytes": int(index.numpy("size").sum()),
            "complete": index.meta["complete"],
            "codec": index.meta.get("codec"),
            "provenance": index.meta["provenance"],
            **({"account": index.meta["account"]} if "account" in index.meta else {}),
            "reference": scores and dataclasses.asdict(scores),
        }
    description = {"format": "lram-dataset", "version": VERSION, "tasks": described}
    path = Path(root) / DESCRIPTION
    write_whole(path, json.dumps(description, indent=1, sort_keys=True).encode())
    return path
