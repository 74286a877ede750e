"""Packs a dataset into one sharded Zarr store, and unpacks such a store or tar shards to the same files again.

    lram pack ROOT OUT.zarr
    lram unpack OUT.zarr ROOT2
    lram unpack DOWNLOADED ROOT2

Tasks are done in parallel over processes. What is whole at the destination is left as it is, so the same command
continues after a kill.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

from prefect import flow

from lram.datasets.index import SHARDS, find_tasks, write_description
from lram.datasets.pack import pack_description, pack_task, unpack_description, unpack_task
from lram.datasets.shards import unpack_shards
from lram.datasets.specs import BadInput
from lram.flows.processes import process_pool
from lram.flows.progress import bar


@dataclass(frozen=True)
class PackSettings:
    """What to pack, and where to."""

    root: Path
    """Dataset directory."""
    out: Path
    """Zarr store to write."""
    workers: int = 0
    """Tasks packed at once; 0 takes all cores."""


@dataclass(frozen=True)
class UnpackSettings:
    """What to unpack, and where to."""

    packed: Path
    """Zarr store, or dataset directory with tar shards."""
    root: Path
    """Dataset directory to write."""
    workers: int = 0
    """Tasks unpacked at once; 0 takes all cores."""


@flow(name="pack")
def pack(settings: PackSettings) -> int:
    """Packs every task of a dataset.

    Returns:
        The number of trajectories.
    """
    folders = find_tasks(settings.root)
    pack_description(settings.root, settings.out)
    rows = 0
    with process_pool(settings.workers) as pool, bar("pack", len(folders), "tasks") as step:
        for count in pool.map(functools.partial(pack_task, out=settings.out), folders):
            rows += count
            step(1, f"{rows:,} trajectories")
    return rows


@flow(name="unpack")
def unpack(settings: UnpackSettings) -> int:
    """Unpacks every task of a store, or of a directory with tar shards.

    Returns:
        The number of trajectories.
    """
    folders = find_tasks(settings.packed)
    zarr = (settings.packed / "zarr.json").is_file()
    if not zarr and not all(any(folder.glob(SHARDS)) for folder in folders):
        raise BadInput(f"{settings.packed}: neither a Zarr store nor tar shards: its files need no unpacking")
    unpack_one = unpack_task if zarr else unpack_shards
    rows = 0
    with process_pool(settings.workers) as pool, bar("unpack", len(folders), "tasks") as step:
        for count in pool.map(functools.partial(unpack_one, root=settings.root), folders):
            rows += count
            step(1, f"{rows:,} trajectories")
    if zarr:
        unpack_description(settings.packed, settings.root)
    else:
        write_description(settings.root)
    return rows


def main(settings: PackSettings | UnpackSettings) -> int:
    """Runs the flow of the settings, says how much was done and where it is."""
    packing = isinstance(settings, PackSettings)
    rows = pack(settings) if isinstance(settings, PackSettings) else unpack(settings)
    print(f"{rows:,} trajectories {'packed' if packing else 'unpacked'}")
    print(settings.out if isinstance(settings, PackSettings) else settings.root)
    return 0
