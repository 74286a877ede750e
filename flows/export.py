"""Gives a dataset to other libraries: to Minari, or to the LRAM code.

    lram export ROOT OUT --to minari
    lram export ROOT OUT --to lram
    export_dataset(ExportSettings(root=Path("ROOT"), out=Path("OUT")))

Tasks are exported in parallel over processes. Each appears whole or not at all. A task that is there already is left
as it is, and made anew when the dataset's has changed since, so that the same command continues after a kill.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from prefect import flow

from lram.datasets.export import export_lram, export_minari, minari_id, state_of
from lram.datasets.index import find_tasks
from lram.flows.processes import process_pool
from lram.flows.progress import bar


@dataclass(frozen=True)
class ExportSettings:
    """What to export, and where to."""

    root: Path
    """Dataset directory."""
    out: Path
    """Folder to write to; for Minari it is what MINARI_DATASETS_PATH is to be."""
    to: Literal["minari", "lram"] = "minari"
    """Whose form: one Minari dataset per task, or the LRAM code's folders of files with JSON beside them."""
    workers: int = 0
    """Tasks exported at once; 0 takes all cores."""


@flow(name="export")
def export_dataset(settings: ExportSettings) -> list[Path]:
    """Exports every task of a dataset that is not there yet as it is now.

    Returns:
        The folders of all of them, in order of tasks.

    Raises:
        BadInput: A task cannot be read, or its folder is there and was not exported by lram.
    """
    export = export_minari if settings.to == "minari" else export_lram
    folders = find_tasks(settings.root)
    targets = []
    for folder in folders:
        domain, task = folder.parent.name, folder.name
        targets.append(settings.out / (minari_id(domain, task) if settings.to == "minari" else f"{domain}/{task}"))
    states = [state_of(folder, target) for folder, target in zip(folders, targets)]
    for target, state in zip(targets, states):
        if state == "old":
            shutil.rmtree(target)
    todo = [folder for folder, state in zip(folders, states) if state != "same"]
    with process_pool(settings.workers) as pool, bar("export", len(todo), "tasks") as step:
        for _ in pool.map(export, todo, [settings.out] * len(todo)):
            step(1, "")
    return targets


def main(settings: ExportSettings) -> int:
    """Runs the flow and says where the tasks are."""
    targets = export_dataset(settings)
    print(f"{len(targets)} tasks exported to {settings.to}")
    print(settings.out)
    return 0
