"""Tar shards: a task's unchanged trajectory files as members of uncompressed tars, trained from where they lie.

    shard_task(ROOT / "atari" / "breakout", OUT, shard_bytes=2**30)
    Windows.open(OUT, settings)

    OUT/<domain>/<task>/shard-00000.tar …     members 000/000000123.hdf5 …, in order of episodes
    OUT/<domain>/<task>/index.parquet         the task's index and, for each file, its shard and its first byte in it

The same files give the same bytes: no times, no owners. A shard is as many whole files as fit, or one larger file;
so few files travel well, and one of them lost or cut costs its own trajectories only.
"""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

import pyarrow as pa

from lram.datasets.index import read_index, write_index
from lram.datasets.specs import BadInput


def write_shard(path: Path, members: list[tuple[str, Path]]) -> list[int]:
    """Writes files into one tar, whole or not at all; the same files give the same bytes.

    Args:
        path: The tar.
        members: (name in the tar, file) of each member, in order.

    Returns:
        The byte of the tar at which each member's data starts.
    """
    offsets, at = [], 0
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as out:
        with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for name, source in members:
                info = tarfile.TarInfo(name)  # mode 644, user 0, time 0
                info.size = source.stat().st_size
                with open(source, "rb") as file:
                    tar.addfile(info, file)
                offsets.append(at + tarfile.BLOCKSIZE)
                at += tarfile.BLOCKSIZE * (1 + -(-info.size // tarfile.BLOCKSIZE))
        out.flush()
        os.fsync(out.fileno())
    temporary.rename(path)
    return offsets


def shard_task(folder: Path, out: Path, shard_bytes: int) -> Path:
    """Puts a task's files into tar shards below another dataset directory, with their index.

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
    if "shard" in index.table.column_names:
        raise BadInput(f"{folder}: is stored in shards already, expected trajectory files")
    target = Path(out) / index.folder.parent.name / index.folder.name
    target.mkdir(parents=True, exist_ok=True)
    groups: list[list[str]] = []
    filled = shard_bytes
    for path, size in zip(index.table["path"].to_pylist(), index.table["size"].to_pylist()):
        if filled + size > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(path)
        filled += size
    shards: list[str] = []
    offsets: list[int] = []
    for number, paths in enumerate(groups):
        name = f"shard-{number:05d}.tar"
        try:
            offsets += write_shard(target / name, [(path, index.folder / path) for path in paths])
        except FileNotFoundError as error:
            raise BadInput(f"{error.filename}: missing, but the index names it") from error
        shards += [name] * len(paths)
    table = index.table.append_column("shard", pa.array(shards, pa.string()))
    write_index(target, table.append_column("member_offset", pa.array(offsets, pa.int64())))
    return target
