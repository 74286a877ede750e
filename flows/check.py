"""Checks a dataset and says what is wrong with it; exits with 1 when anything is.

    lram check ROOT
    results = check_dataset(CheckSettings(root=Path("ROOT")))

Tasks are checked in parallel over processes; a Prefect task is one task of the dataset.
"""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.task_runners import ThreadPoolTaskRunner

from lram.datasets.check import TaskCheck, check_task
from lram.datasets.index import find_tasks
from lram.flows.processes import process_pool
from lram.flows.progress import bar

SHOWN = 50
"""Findings printed; the report and the return value hold all of them."""


@dataclass(frozen=True)
class CheckSettings:
    """What to check."""

    root: Path
    """Dataset directory."""
    workers: int = 0
    """Tasks checked at once; 0 takes all cores."""


@task(task_run_name="check {folder.name}", cache_policy=NO_CACHE)
def check(folder: Path, pool: ProcessPoolExecutor) -> TaskCheck:
    """Checks one task in a worker process."""
    return pool.submit(check_task, folder).result()


@flow(name="check", task_runner=ThreadPoolTaskRunner[Any](max_workers=64))  # type: ignore[arg-type]
def check_dataset(settings: CheckSettings) -> list[TaskCheck]:
    """Checks every trajectory and index of a dataset.

    Returns:
        One result per task, in order of names.
    """
    folders = find_tasks(settings.root)
    results = []
    with process_pool(settings.workers) as pool, bar("check", len(folders), "tasks") as step:
        for future in [check.submit(folder, pool) for folder in folders]:
            results.append(future.result())
            step(1, f"{sum(len(result.findings) for result in results)} findings")
    return results


def main(settings: CheckSettings) -> int:
    """Runs the flow, prints the findings, and returns 1 when there are any."""
    results = check_dataset(settings)
    findings = [finding for result in results for finding in result.findings]
    for finding in findings[:SHOWN]:
        print(finding)
    if len(findings) > SHOWN:
        print(f"… and {len(findings) - SHOWN} more, all of them in the report (`lram report`)")
    trajectories = sum(result.trajectories for result in results)
    transitions = sum(result.transitions for result in results)
    print(f"{len(results)} tasks, {trajectories:,} trajectories, {transitions:,} transitions: {len(findings)} findings")
    print(settings.root)
    return 1 if findings else 0
