"""Checks a dataset and says what is wrong with it; exits with 1 when anything is.

    lram check ROOT
    lram check ROOT --quarantine DIR
    results = check_dataset(CheckSettings(root=Path("ROOT")))

A Prefect task is one task of the dataset; its files are opened in ranges by a pool of processes, so that one large
task is checked on all cores as well as many small ones. With `--quarantine`, bad trajectory files are moved out,
never deleted, and what stays passes the next check.
"""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.task_runners import ThreadPoolTaskRunner

from lram.datasets.check import TaskCheck, check_root, judge, look, members
from lram.datasets.index import find_tasks
from lram.datasets.quarantine import quarantine
from lram.flows.processes import process_pool
from lram.flows.progress import bar

SHOWN = 50
"""Findings printed; the report and the return value hold all of them."""
RANGE = 250
"""Trajectories that a worker opens at a time."""


@dataclass(frozen=True)
class CheckSettings:
    """What to check."""

    root: Path
    """Dataset directory."""
    workers: int = 0
    """Processes that open files; 0 takes all cores."""
    quarantine: Path | None = None
    """Folder that bad trajectory files are moved to, outside the dataset; by default they stay."""


@task(task_run_name="check {folder.name}", cache_policy=NO_CACHE)
def check(folder: Path, pool: ProcessPoolExecutor) -> TaskCheck:
    """Checks one task, its trajectories in worker processes."""
    found, broken = members(folder)
    ranges = [found[start : start + RANGE] for start in range(0, len(found), RANGE)]
    seen = [item for looked in pool.map(look, [folder] * len(ranges), ranges) for item in looked]
    return judge(folder, seen, broken)


@flow(name="check", task_runner=ThreadPoolTaskRunner[Any](max_workers=64))  # type: ignore[arg-type]
def check_dataset(settings: CheckSettings, only: list[str] | None = None) -> list[TaskCheck]:
    """Checks every trajectory and index of a dataset, and moves bad files out where the settings say so.

    Args:
        settings: Which dataset, and what to do with bad files.
        only: "<domain>/<task>" of the tasks to check; all when None.

    Returns:
        One result per task, in order of names; a last one, "dataset", when something concerns no single task.
    """
    folders = find_tasks(settings.root)
    if only is not None:
        folders = [folder for folder in folders if f"{folder.parent.name}/{folder.name}" in only]
    results = []
    with process_pool(settings.workers) as pool, bar("check", len(folders), "tasks") as step:
        for future in [check.submit(folder, pool) for folder in folders]:
            results.append(future.result())
            step(1, f"{sum(len(result.findings) for result in results)} findings")
    common = check_root(settings.root)
    if common:
        results.append(TaskCheck("dataset", findings=common))
    if settings.quarantine and any(result.findings for result in results):
        moved = quarantine(settings.root, results, settings.quarantine)
        print(f"{moved} files moved to {settings.quarantine}; the indices of their tasks are rebuilt")
    return results


def main(settings: CheckSettings) -> int:
    """Runs the flow, prints the findings, and returns 1 when there are any."""
    results = check_dataset(settings)
    findings = [finding for result in results for finding in result.findings]
    for finding in findings[:SHOWN]:
        print(finding)
    if len(findings) > SHOWN:
        print(f"… and {len(findings) - SHOWN} more, all of them in the report (`lram report`)")
    tasks = sum(result.task != "dataset" for result in results)
    trajectories = sum(result.trajectories for result in results)
    transitions = sum(result.transitions for result in results)
    print(f"{tasks} tasks, {trajectories:,} trajectories, {transitions:,} transitions: {len(findings)} findings")
    print(settings.root)
    return 1 if findings else 0
