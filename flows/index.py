"""Rebuilds the indices of a dataset from its files.

    lram index ROOT
    rebuild_indices(IndexSettings(root=Path("ROOT")))

Files are the truth; an index that was lost, or that names other files, is made again from them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from prefect import flow

from lram.datasets.index import find_tasks, rebuild, write_description
from lram.flows.processes import process_pool
from lram.flows.progress import bar


@dataclass(frozen=True)
class IndexSettings:
    """What to index."""

    root: Path
    """Dataset directory."""
    workers: int = 0
    """Tasks indexed at once; 0 takes all cores."""


@flow(name="index")
def rebuild_indices(settings: IndexSettings) -> int:
    """Rebuilds the index of every task.

    Returns:
        The number of trajectories indexed.
    """
    folders = find_tasks(settings.root)
    rows = 0
    with process_pool(settings.workers) as pool, bar("index", len(folders), "tasks") as step:
        for index in pool.map(rebuild, folders):
            rows += index.table.num_rows
            step(1, f"{rows:,} trajectories")
    write_description(settings.root)
    return rows


def main(settings: IndexSettings) -> int:
    """Runs the flow and says how much was indexed."""
    print(f"{rebuild_indices(settings):,} trajectories indexed")
    print(settings.root)
    return 0
