"""Tar shards: a task's unchanged trajectory files as members of uncompressed tars, trained from where they lie.

    shard_task(ROOT / "atari" / "breakout", OUT, shard_bytes=2**30)
    Windows.open(OUT, settings)

    OUT/<domain>/<task>/shard-00000.tar …     members 000/000000123.hdf5 …, in order of episodes
    OUT/<domain>/<task>/index.parquet         the task's index and, for each file, its shard and its first byte in it

The same files give the same bytes: no times, no owners. A shard is as many whole files as fit, or one larger file;
so few files travel well, and one of them lost or cut costs its own trajectories only. Shards are filled in order of
episodes: what is added at a task's end changes its last shard, what is taken out of its middle all that follow.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from lram.datasets.disk import sha256_of, whole
from lram.datasets.index import INDEX, SCHEMA, SHARD_SCHEMA, TaskIndex, read_index, write_index
from lram.datasets.specs import BadInput
from lram.datasets.trajectory import write_whole

SHARD_BYTES = 2**30
"""Bytes of trajectory files in a shard: a download that breaks off costs a minute, and 432 tasks stay few files."""
_END = 2 * tarfile.BLOCKSIZE


@dataclass(frozen=True)
class Shard:
    """A shard as it is, or would be.

    Attributes:
        name: Name of its file.
        members: (path in the task's folder, bytes, SHA-256) of its files, in order.
    """

    name: str
    members: tuple[tuple[str, int, bytes], ...]

    @property
    def offsets(self) -> list[int]:
        """Returns the byte of the tar at which each member's data starts."""
        offsets, at = [], 0
        for _, size, _ in self.members:
            offsets.append(at + tarfile.BLOCKSIZE)
            at += tarfile.BLOCKSIZE + _padded(size, tarfile.BLOCKSIZE)
        return offsets

    @property
    def size(self) -> int:
        """Returns the bytes of the tar."""
        last = self.members[-1][1]
        return _padded(self.offsets[-1] + _padded(last, tarfile.BLOCKSIZE) + _END, tarfile.RECORDSIZE)


def _padded(size: int, block: int) -> int:
    return block * -(-size // block)


def shards_of(index: TaskIndex, shard_bytes: int) -> list[Shard]:
    """Says which shards a task's files fill.

    Args:
        index: The index of the task's files.
        shard_bytes: Bytes of trajectory files in a shard, at most; one file may be larger.

    Raises:
        BadInput: The task is stored in shards already.
    """
    if "shard" in index.table.column_names:
        raise BadInput(f"{index.folder}: is stored in shards already, expected trajectory files")
    groups: list[list[tuple[str, int, bytes]]] = []
    filled = shard_bytes
    for member in zip(*(index.table[name].to_pylist() for name in ("path", "size", "sha256"))):
        if filled + member[1] > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(member)
        filled += member[1]
    return [Shard(f"shard-{number:05d}.tar", tuple(group)) for number, group in enumerate(groups)]


def shards_at(index: TaskIndex) -> list[Shard]:
    """Says which shards the index of a task in shards names."""
    groups: dict[str, list[tuple[str, int, bytes]]] = {}
    for name, *member in zip(*(index.table[name].to_pylist() for name in ("shard", "path", "size", "sha256"))):
        groups.setdefault(name, []).append((member[0], member[1], member[2]))
    return [Shard(name, tuple(group)) for name, group in groups.items()]


def shard_index(index: TaskIndex, shards: list[Shard], hashes: dict[str, str]) -> pa.Table:
    """Makes the index of a task in shards from that of its files.

    Args:
        index: The index of the files.
        shards: The shards that they fill, in order.
        hashes: SHA-256 of each shard, in hexadecimal, kept in the table's metadata under "shards".

    Returns:
        The table, columns of `SHARD_SCHEMA`.
    """
    names = [shard.name for shard in shards for _ in shard.members]
    offsets = [offset for shard in shards for offset in shard.offsets]
    meta = {**index.meta, "shards": {shard.name: hashes[shard.name] for shard in shards}}
    columns = [*index.table.columns, pa.array(names, pa.string()), pa.array(offsets, pa.int64())]
    return _table(columns, SHARD_SCHEMA, meta)


def _table(columns: list[pa.ChunkedArray], schema: pa.Schema, meta: dict[str, Any]) -> pa.Table:
    # The schema is given anew: one read from Parquet carries marks of its own, and other bytes would be written.
    return pa.Table.from_arrays(columns, schema=schema.with_metadata({"lram": json.dumps(meta, sort_keys=True)}))


def write_shard(path: Path, members: list[tuple[str, Path]]) -> str:
    """Writes files into one tar, whole or not at all; the same files give the same bytes.

    Args:
        path: The tar.
        members: (name in the tar, file) of each member, in order.

    Returns:
        Its SHA-256, in hexadecimal.

    Raises:
        DiskFull: There is no room for it.
    """
    with whole(path) as out:
        with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for name, source in members:
                info = tarfile.TarInfo(name)  # mode 644, user 0, time 0
                info.size = source.stat().st_size
                with open(source, "rb") as file:
                    tar.addfile(info, file)
        out.seek(0)
        digest = hashlib.file_digest(out, "sha256").hexdigest()
    return digest


def shard_task(folder: Path, out: Path, shard_bytes: int = SHARD_BYTES) -> Path:
    """Puts a task's files into tar shards below another dataset directory, with their index.

    A shard that lies there already with the same files is left as it is.

    Args:
        folder: The task's folder, ROOT/<domain>/<task>.
        out: The other dataset directory.
        shard_bytes: Bytes of trajectory files in a shard, at most; one file may be larger.

    Returns:
        The task's folder there.

    Raises:
        BadInput: The index cannot be read, is one of shards already, or names a file that is missing.
    """
    index = read_index(folder)
    shards = shards_of(index, shard_bytes)
    target = Path(out) / index.folder.parent.name / index.folder.name
    target.mkdir(parents=True, exist_ok=True)
    hashes = unchanged(shards, target)
    for shard in shards:
        if shard.name not in hashes:
            hashes[shard.name] = build(shard, index.folder, target)
    write_index(target, shard_index(index, shards, hashes))
    for path in target.glob("shard-*.tar"):
        if path.name not in hashes:
            path.unlink()
    return target


def build(shard: Shard, folder: Path, target: Path) -> str:
    """Writes one shard of a task into the folder `target`; returns its SHA-256, in hexadecimal.

    Raises:
        BadInput: A file is missing.
    """
    try:
        return write_shard(target / shard.name, [(path, folder / path) for path, _, _ in shard.members])
    except FileNotFoundError as error:
        raise BadInput(f"{error.filename}: missing, but the index names it") from error


def unchanged(shards: list[Shard], target: Path) -> dict[str, str]:
    """Returns the hashes of those shards that lie in a folder already, by what its index says of them."""
    try:
        old = read_index(target)
    except BadInput:
        return {}
    here = {shard.name: shard for shard in shards_at(old)} if "shard" in old.table.column_names else {}
    hashes: dict[str, str] = old.meta.get("shards", {})
    return {
        shard.name: hashes[shard.name]
        for shard in shards
        if here.get(shard.name) == shard and shard.name in hashes and (target / shard.name).is_file()
    }


def damaged(folder: Path) -> Iterator[tuple[Path, str]]:
    """Gives path and a sentence for each shard of a task that is missing or has other bytes than its index says."""
    index = read_index(folder)
    for name, expected in index.meta.get("shards", {}).items():
        path = Path(folder) / name
        if not path.is_file():
            yield path, f"{path}: missing, but the index names it"
            continue
        found = sha256_of(path)
        if found != expected:
            said = f"its SHA-256 is {found[:12]}…, not {expected[:12]}… as its index says"
            yield path, f"{path}: damaged or cut, {said}"


def unpack_shards(folder: Path, root: Path) -> int:
    """Writes the trajectory files of a task in shards and their index; a task that is whole there stays as it is.

    Args:
        folder: The task's folder with the shards.
        root: The dataset directory to write to.

    Returns:
        Number of trajectories.

    Raises:
        BadInput: A shard is missing or holds other bytes than the index says, or `root` holds other trajectories.
    """
    index = read_index(folder)
    target = Path(root) / index.folder.parent.name / index.folder.name
    meta = {key: value for key, value in index.meta.items() if key != "shards"}
    table = _table(index.table.select(SCHEMA.names).columns, SCHEMA, meta)
    if (target / INDEX).is_file():
        if not read_index(target).table.equals(table):
            raise BadInput(f"{target}: holds other trajectories than {folder}, choose another directory")
        return table.num_rows
    for shard in shards_at(index):
        path = index.folder / shard.name
        try:
            file = open(path, "rb")  # noqa: SIM115 (closed below)
        except OSError as error:
            raise BadInput(f"{path}: cannot be read, but the index names it") from error
        with file:
            for (name, size, digest), offset in zip(shard.members, shard.offsets):
                data = os.pread(file.fileno(), size, offset)
                if hashlib.sha256(data).digest() != digest:
                    raise BadInput(f"{path}: member {name} has other bytes than the index says")
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                write_whole(target / name, data)
    write_index(target, table)
    return table.num_rows
