"""What the collecting flows share: one Prefect task per task of a domain, each in a worker process of its own.

    results = collect_tasks(names, train_off_policy, specialist, "dmcontrol", where=settings)

Workers are processes of this machine, one core and one torch thread each, or those of a Dask cluster, which have to
be started with `--nthreads 1`: agents draw from random generators that a process has once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any, Protocol

from prefect import task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.futures import as_completed

from lram.collectors.recorder import CURVE, read_curve
from lram.datasets.index import find_tasks, write_description
from lram.datasets.specs import tasks
from lram.flows.events import announce
from lram.flows.processes import workers
from lram.flows.progress import bar


class Where(Protocol):
    """The settings that say where data goes and who makes it."""

    @property
    def root(self) -> Path:
        """Dataset directory to write to."""

    @property
    def workers(self) -> int:
        """Processes of this machine; 0 takes one per core."""

    @property
    def scheduler(self) -> str | None:
        """Address of a Dask scheduler, whose workers are used instead."""


@task(task_run_name="{name}", cache_policy=NO_CACHE)
def collect_task(name: str, pool: Executor, collect: Callable[..., dict[str, Any]], arguments: Any) -> dict[str, Any]:
    """Collects one task in a worker process."""
    return pool.submit(collect, *arguments).result()


def collect_tasks(
    names: Sequence[str],
    collect: Callable[..., dict[str, Any]],
    *arguments: Any,
    where: Where,
    note: Callable[[dict[str, Any]], str],
    unit: str = "tasks",
) -> list[dict[str, Any]]:
    """Calls `collect(*arguments, name, where.root)` for every name, in worker processes; call it in a flow.

    The learning curves of these tasks are shown in Prefect, as the artifact `learning-curves`.

    Args:
        names: Tasks.
        collect: What collects one; it and its arguments have to pickle.
        *arguments: What comes before the name and the dataset's directory.
        where: Directory and workers.
        note: Says in a few words how one went, for the progress bar.
        unit: What the bar counts.

    Returns:
        What `collect` says of each, in the order of names.
    """
    with workers(where.workers, where.scheduler) as pool, bar("collect", len(names), unit) as step:
        futures = [collect_task.submit(name, pool, collect, (*arguments, name, where.root)) for name in names]
        for future in as_completed(futures):
            step(1, note(future.result()))
        results = [future.result() for future in futures]
    write_description(where.root)
    rows = learning_curves(where.root, names)
    if rows:
        create_table_artifact(rows, key="learning-curves", description=f"Mean returns of training, {where.root}")
    announce("collect", where.root)
    return results


def learning_curves(root: Path, names: Sequence[str]) -> list[dict[str, Any]]:
    """Says how the specialists of these tasks learned: a row for each that has a learning curve.

    Returns:
        `task`, `episodes`, `steps` (transitions of training), `first` and `last` (mean returns over the first and the
        last tenth of the episodes), and `curve`, the file with all of them.
    """
    rows = []
    for folder in find_tasks(root):
        if folder.name not in names or not (folder / CURVE).exists():
            continue
        curve = read_curve(folder)
        returns, tenth = curve["return"].to_numpy(), max(1, len(curve) // 10)
        rows.append(
            {
                "task": folder.name,
                "episodes": len(returns),
                "steps": int(curve["length"].to_numpy().sum()),
                "first": round(float(returns[:tenth].mean()), 2) if len(returns) else None,
                "last": round(float(returns[-tenth:].mean()), 2) if len(returns) else None,
                "curve": str(folder / CURVE),
            }
        )
    return rows


def tasks_of_domain(domain: str, chosen: Sequence[str]) -> list[str]:
    """Returns the chosen tasks, or when there are none all tasks that the policy is trained and evaluated on."""
    return list(chosen) or [name for which, name in tasks() if which == domain]


def learned(result: dict[str, Any]) -> str:
    """Says how one specialist went."""
    return f"{result['task']} return {result['last_return']:.1f}"


def show(results: list[dict[str, Any]], root: Path) -> None:
    """Prints what specialists made, a line each."""
    width = max(len(result["task"]) for result in results)
    for result in results:
        line = f"{result['task']:<{width}}  {result['episodes']:>7,} trajectories  {result['steps']:>11,} transitions"
        line += f"  last return {result['last_return']:8.1f}"
        if result["skipped"]:
            line += "  complete already"
        elif result["learned"]:
            line += f"  {result['learned'] / result['seconds']:,.0f} steps a second"
        if result["left_out"]:
            line += f"  {result['left_out']:,} transitions left out"
        print(line)
    print(root)
