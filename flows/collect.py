"""Collects Dark-Room data: one specialist per goal, all its training recorded.

    lram collect darkroom runs/darkroom --size 10
    collect_darkroom(CollectSettings(root=Path("runs/darkroom")))

Goals run in parallel over processes; a Prefect task is one goal. Goals complete on disk are not trained again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from prefect import flow
from prefect.task_runners import ThreadPoolTaskRunner

from lram.collectors.specialists import DOMAIN, DarkRoomSettings, tasks_of, train_goal
from lram.datasets.writer import finished
from lram.flows.specialists import collect_tasks


@dataclass(frozen=True)
class CollectSettings:
    """Which goals to collect, where to."""

    root: Path
    """Dataset directory to write to."""
    goals: Literal["all", "training", "holdout"] = "all"
    """Which goals get a specialist; hold-out goals are needed for evaluation, not for training."""
    at_most: int = 0
    """Goals to train in this run, those that are complete not counted; 0 trains all: a nightly share, say."""
    workers: int = 0
    """Goals trained at once, each on one core; 0 takes all cores."""
    scheduler: str | None = None
    """Address of a Dask scheduler whose workers, of one thread each, train instead of this machine's processes."""
    specialist: Annotated[DarkRoomSettings, tyro.conf.arg(name="")] = field(default_factory=DarkRoomSettings)
    """Settings of the specialists."""


@flow(name="collect-darkroom", task_runner=ThreadPoolTaskRunner[Any](max_workers=64))  # type: ignore[arg-type]
def collect_darkroom(settings: CollectSettings) -> list[dict[str, Any]]:
    """Trains a specialist on every goal and records all its transitions.

    Returns:
        What `train_goal` says of each goal, in order of tasks.
    """
    names = tasks_of(settings.specialist, settings.goals)
    if settings.at_most:
        missing = [name for name in names if finished(settings.root, DOMAIN, name) is None]
        names = [name for name in names if name not in missing[settings.at_most :]]
    return collect_tasks(names, train_goal, settings.specialist, where=settings, note=_returned, unit="goals")


def _returned(result: dict[str, Any]) -> str:
    return f"return {result['last_return']:.1f}"


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
