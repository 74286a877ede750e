"""Collects Procgen data: one PPO agent with the IMPALA network per game, all its training recorded.

    lram collect procgen runs/procgen --tasks coinrun bigfish --last 2000000
    collect_procgen(CollectProcgenSettings(Path("runs/procgen"), ("coinrun",)))

Games run in parallel over processes; a Prefect task is one game. The network wants a GPU: 25 million transitions
are an afternoon there and weeks on a core. What is complete on disk is not made again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro
from prefect import flow
from prefect.task_runners import ThreadPoolTaskRunner

from lram.collectors.on_policy import OnPolicySettings, train_on_policy
from lram.flows.specialists import collect_tasks, learned, show, tasks_of_domain


@dataclass(frozen=True)
class CollectProcgenSettings:
    """Which games to collect, where to, and how the agents learn."""

    root: Path
    """Dataset directory to write to."""
    tasks: tuple[str, ...] = ()
    """Games to collect, `coinrun` for example; none stands for all that are trained and evaluated on."""
    workers: int = 1
    """Games collected at once; 0 takes one per core."""
    scheduler: str | None = None
    """Address of a Dask scheduler whose workers, of one thread each, collect instead of this machine's processes."""
    specialist: Annotated[OnPolicySettings, tyro.conf.arg(name="")] = field(default_factory=OnPolicySettings)
    """Settings of the agents."""


@flow(name="collect-procgen", task_runner=ThreadPoolTaskRunner[Any](max_workers=64))  # type: ignore[arg-type]
def collect_procgen(settings: CollectProcgenSettings) -> list[dict[str, Any]]:
    """Trains a specialist on every chosen game and records it.

    Returns:
        What `train_on_policy` says of each game, in order of games.
    """
    names = tasks_of_domain("procgen", settings.tasks)
    return collect_tasks(names, train_on_policy, settings.specialist, "procgen", where=settings, note=learned)


def main(settings: CollectProcgenSettings) -> int:
    """Runs the flow and says what it made."""
    show(collect_procgen(settings), settings.root)
    return 0
