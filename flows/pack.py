"""Packs a dataset into one sharded Zarr store, and unpacks it again to the same bytes.

    lram pack ROOT OUT.zarr
    lram unpack OUT.zarr ROOT2

Tasks are done in parallel over processes. What is whole at the destination is left as it is, so the same command
continues after a kill.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

from prefect import flow

from lram.datasets.index import find_tasks
from lram.datasets.pack import pack_description, pack_task, unpack_description, unpack_task
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
    """Zarr store."""
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
    """Unpacks every task of a store.

    Returns:
        The number of trajectories.
    """
    if not (settings.packed / "zarr.json").is_file():
        raise BadInput(f"{settings.packed}: no Zarr store, expected what `lram pack` wrote")
    folders = find_tasks(settings.packed)
    rows = 0
    with process_pool(settings.workers) as pool, bar("unpack", len(folders), "tasks") as step:
        for count in pool.map(functools.partial(unpack_task, root=settings.root), folders):
            rows += count
            step(1, f"{rows:,} trajectories")
    unpack_description(settings.packed, settings.root)
    return rows


def main(settings: PackSettings | UnpackSettings) -> int:
    """Runs the flow of the settings, says how much was done and where it is."""
    packing = isinstance(settings, PackSettings)
    rows = pack(settings) if isinstance(settings, PackSettings) else unpack(settings)
    print(f"{rows:,} trajectories {'packed' if packing else 'unpacked'}")
    print(settings.out if isinstance(settings, PackSettings) else settings.root)
    return 0
