"""Collects Dark-Room data: one specialist per goal, all its training recorded.

    lram collect darkroom runs/darkroom --size 10
    collect_darkroom(CollectSettings(root=Path("runs/darkroom")))

Goals run in parallel over processes; a Prefect task is one goal. Goals complete on disk are not trained again.
"""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.futures import as_completed
from prefect.task_runners import ThreadPoolTaskRunner

from lram.collectors.specialists import DarkRoomSettings, tasks_of, train_goal
from lram.datasets.index import write_description
from lram.flows.processes import process_pool
from lram.flows.progress import bar


@dataclass(frozen=True)
class CollectSettings:
    """Which goals to collect, where to."""

    root: Path
    """Dataset directory to write to."""
    goals: Literal["all", "training", "holdout"] = "all"
    """Which goals get a specialist; hold-out goals are needed for evaluation, not for training."""
    workers: int = 0
    """Goals trained at once, each on one core; 0 takes all cores."""
    specialist: DarkRoomSettings = field(default_factory=DarkRoomSettings)
    """Settings of the specialists."""


@task(task_run_name="{name}", cache_policy=NO_CACHE)
def train_specialist(name: str, settings: CollectSettings, pool: ProcessPoolExecutor) -> dict[str, Any]:
    """Trains the specialist of one goal in a worker process."""
    return pool.submit(train_goal, settings.specialist, name, settings.root).result()


@flow(name="collect-darkroom", task_runner=ThreadPoolTaskRunner[Any](max_workers=64))  # type: ignore[arg-type]
def collect_darkroom(settings: CollectSettings) -> list[dict[str, Any]]:
    """Trains a specialist on every goal and records all its transitions.

    Returns:
        What `train_goal` says of each goal, in order of tasks.
    """
    names = tasks_of(settings.specialist, settings.goals)
    with process_pool(settings.workers) as pool, bar("collect", len(names), "goals") as step:
        futures = [train_specialist.submit(name, settings, pool) for name in names]
        for future in as_completed(futures):
            step(1, f"return {future.result()['last_return']:.1f}")
        results = [future.result() for future in futures]
    write_description(settings.root)
    return results


def main(settings: CollectSettings) -> int:
    """Runs the flow and says what it made."""
    results = collect_darkroom(settings)
    skipped = sum(result["skipped"] for result in results)
    episodes = sum(result["episodes"] for result in results)
    last = sum(result["last_return"] for result in results) / len(results)
    best = sum(result["best_return"] for result in results) / len(results)
    print(f"{len(results)} goals ({skipped} were complete already), {episodes:,} trajectories")
    print(f"mean return of the last tenth of training: {last:.1f} of {best:.1f} possible")
    print(settings.root)
    return 0
