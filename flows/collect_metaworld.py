"""Collects Meta-World data: one learning agent per task, or the package's own scripted policies.

    lram collect metaworld runs/metaworld --tasks reach-v2 push-v2
    lram collect metaworld runs/metaworld --policy scripted --scripted.episodes 100
    collect_metaworld(CollectMetaworldSettings(Path("runs/metaworld"), policy="scripted"))

Tasks run in parallel over processes; a Prefect task is one Meta-World task. What is complete on disk is not made
again, and what a kill interrupted goes on where it was.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from prefect import flow
from prefect.task_runners import ThreadPoolTaskRunner

from lram.collectors.off_policy import OffPolicySettings, train_off_policy
from lram.collectors.scripted import ScriptedSettings, collect_scripted
from lram.flows.specialists import collect_tasks, learned, show, tasks_of_domain


@dataclass(frozen=True)
class CollectMetaworldSettings:
    """Which tasks to collect, where to, and from whom."""

    root: Path
    """Dataset directory to write to."""
    tasks: tuple[str, ...] = ()
    """Tasks to collect, `reach-v2` for example; none stands for all 50."""
    policy: Literal["learned", "scripted"] = "learned"
    """Whose actions: an agent's that learns, or those of Meta-World's script for the task, with noise."""
    workers: int = 0
    """Tasks collected at once, each on one core; 0 takes all cores."""
    scheduler: str | None = None
    """Address of a Dask scheduler whose workers, of one thread each, collect instead of this machine's processes."""
    specialist: Annotated[OffPolicySettings, tyro.conf.arg(name="")] = field(default_factory=OffPolicySettings)
    """Settings of the agents."""
    scripted: ScriptedSettings = field(default_factory=ScriptedSettings)
    """Settings of the scripted policies."""


@flow(name="collect-metaworld", task_runner=ThreadPoolTaskRunner[Any](max_workers=64))  # type: ignore[arg-type]
def collect_metaworld(settings: CollectMetaworldSettings) -> list[dict[str, Any]]:
    """Trains a specialist on every chosen task, or plays its script, and records it.

    Returns:
        What `train_off_policy` or `collect_scripted` says of each task, in order of tasks.
    """
    names = tasks_of_domain("metaworld", settings.tasks)
    if settings.policy == "scripted":
        return collect_tasks(names, collect_scripted, settings.scripted, where=settings, note=_succeeded)
    return collect_tasks(names, train_off_policy, settings.specialist, "metaworld", where=settings, note=learned)


def _succeeded(result: dict[str, Any]) -> str:
    return f"{result['task']} success {result['success_rate']:.0%}"


def main(settings: CollectMetaworldSettings) -> int:
    """Runs the flow and says what it made."""
    results = collect_metaworld(settings)
    if settings.policy == "learned":
        show(results, settings.root)
        return 0
    for result in results:
        words = f"success {result['success_rate']:>4.0%}  return {result['mean_return']:7.1f}"
        print(f"{result['task']:<30}  {result['episodes']:>6,} trajectories  {words}")
    skipped = sum(result["skipped"] for result in results)
    print(f"{len(results)} tasks ({skipped} were complete already)")
    print(settings.root)
    return 0
