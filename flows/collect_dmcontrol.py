"""Collects DMControl data: one SAC, TQC or CrossQ agent per task, all its training recorded.

    lram collect dmcontrol runs/dmcontrol --tasks cartpole-swingup walker-stand --steps 60000
    collect_dmcontrol(CollectDmcontrolSettings(Path("runs/dmcontrol"), ("cartpole-swingup",)))

Tasks run in parallel over processes; a Prefect task is one DMControl task. What is complete on disk is not made
again, and what a kill interrupted goes on from its last checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro
from prefect import flow
from prefect.task_runners import ThreadPoolTaskRunner

from lram.collectors.off_policy import OffPolicySettings, train_off_policy
from lram.flows.specialists import collect_tasks, learned, show, tasks_of_domain


@dataclass(frozen=True)
class CollectDmcontrolSettings:
    """Which tasks to collect, where to, and how the agents learn."""

    root: Path
    """Dataset directory to write to."""
    tasks: tuple[str, ...] = ()
    """Tasks to collect, `walker-stand` for example; none stands for all that are trained and evaluated on."""
    workers: int = 0
    """Tasks collected at once, each on one core; 0 takes all cores."""
    scheduler: str | None = None
    """Address of a Dask scheduler whose workers, of one thread each, collect instead of this machine's processes."""
    specialist: Annotated[OffPolicySettings, tyro.conf.arg(name="")] = field(default_factory=OffPolicySettings)
    """Settings of the agents."""


@flow(name="collect-dmcontrol", task_runner=ThreadPoolTaskRunner[Any](max_workers=64))  # type: ignore[arg-type]
def collect_dmcontrol(settings: CollectDmcontrolSettings) -> list[dict[str, Any]]:
    """Trains a specialist on every chosen task and records it.

    Returns:
        What `train_off_policy` says of each task, in order of tasks.
    """
    names = tasks_of_domain("dmcontrol", settings.tasks)
    return collect_tasks(names, train_off_policy, settings.specialist, "dmcontrol", where=settings, note=learned)


def main(settings: CollectDmcontrolSettings) -> int:
    """Runs the flow and says what it made."""
    show(collect_dmcontrol(settings), settings.root)
    return 0
