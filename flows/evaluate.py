"""Evaluates a policy: rollouts of many tasks with intervals, or in-context learning beside a random policy.

lram evaluate RUN --tasks 'dmcontrol/*' --episodes 20
lram evaluate RUN --trials 40
lram evaluate RUN --scheduler tcp://host:8786
evaluate_policy(EvaluateSettings(checkpoint=Path("RUN")))

Given a scheduler's address, its Dask workers play shares of the episodes, each into a file of its own; they see the
checkpoint and the results' folder under the same paths.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import flow
from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Column, Table

from lram.flows.processes import workers
from lram.flows.progress import bar, console
from lram.train.evaluate import (
    EvaluateSettings,
    evaluate,
    finish,
    play_share,
    protocol,
    remaining,
    results_folder,
)
from lram.train.incontext import GOALS
from lram.train.results import CURVES, EPISODES, PAGE, RESULT
from lram.train.rollouts import share
from lram.train.scores import ALL
from lram.train.simulators import Job


@flow(name="evaluate")
def evaluate_policy(settings: EvaluateSettings) -> dict[str, Any]:
    """Plays the protocol.

    Returns:
        The content of `evaluation.json` or `in_context.json`.
    """
    if protocol(settings) == "in-context":
        sets = 2 if settings.goals == "both" else 1
        with bar("evaluate", sets * settings.trials, "trials") as step:
            return evaluate(settings, lambda which, done, total: step(1, which))
    jobs = remaining(settings)
    with bar("evaluate", len(jobs), "episodes") as step:
        if settings.scheduler is None:
            play_share(settings, jobs, progress=lambda name, done, total: step(1, name))
        elif jobs:
            _play_on_dask(settings, jobs, step)
    return finish(settings)


def _play_on_dask(settings: EvaluateSettings, jobs: list[Job], step: Any) -> None:
    """Gives every worker of a Dask cluster a share of what is left to play."""
    with workers(scheduler=settings.scheduler) as pool:
        parts = max(1, len(pool._client.scheduler_info()["workers"]))  # type: ignore[attr-defined]
        shares = [share(jobs, (part, parts), whole_tasks=settings.record is not None) for part in range(parts)]
        stem = Path(EPISODES).stem
        futures = [
            pool.submit(play_share, settings, mine, f"{stem}-{part:04d}.jsonl") for part, mine in enumerate(shares)
        ]
        for mine, future in zip(shares, futures):
            future.result()
            step(len(mine), "")


def show(result: dict[str, Any]) -> None:
    """Prints the key figures as a table."""
    (_show_curves if "curves" in result else _show_scores)(result)


def _show_curves(result: dict[str, Any]) -> None:
    table = Table("goals", "tasks", "first trial", "last fifth", "95 %", "last / first", "random", "best possible")
    for which, curve in result["curves"].items():
        fifth = max(1, len(curve["policy"]["mean"]) // 5)
        low, high = (sum(curve["policy"][end][-fifth:]) / fifth for end in ("low", "high"))
        table.add_row(
            GOALS[which],
            str(len(curve["tasks"])),
            f"{curve['first_trial']:.1f}",
            f"{curve['last_fifth']:.1f}",
            f"{low:.1f}–{high:.1f}",
            "–" if curve["rise"] is None else f"{curve['rise']:.2f}",
            f"{curve['random_mean']:.1f}",
            f"{curve['best_possible']:.1f}",
        )
    console.print(table)


def _estimate(value: list[float] | None, digits: int = 2) -> str:
    """Returns a number, and its interval on a second line."""
    return "–" if value is None else "{0:.{3}f}\n{1:.{3}f}–{2:.{3}f}".format(*value, digits)


def _table(first: str, *names: str) -> Table:
    """Returns a table whose numbers are never cut, as narrow as can be."""
    columns = (Column(name, no_wrap=True) for name in names)
    return Table(Column(first, overflow="fold"), *columns, box=SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))


def _show_scores(result: dict[str, Any]) -> None:
    if len(result["tasks"]) <= 40:
        table = _table("task", "episodes", "target", "return", "normalised", "success")
        for row in result["tasks"]:
            numbers = str(row["episodes"]), f"{row['target']:.1f}", _estimate(row["return"], 1)
            table.add_row(escape(row["task"]), *numbers, _estimate(row["normalised"]), _estimate(row["success"]))
        console.print(table)
    table = _table("domain", "scored", "mean", "median", "IQM", "gap", "success")
    for domain, row in result["domains"].items():
        success = _estimate(row["success"])
        if row["success"] is not None and row["success_tasks"] != row["played"]:
            success += f"\nof {row['success_tasks']}"
        table.add_row(
            "all" if domain == ALL else domain,
            f"{row['tasks']} of {row['played']}",
            *(_estimate(row.get(name)) for name in ("mean", "median", "iqm", "optimality_gap")),
            success,
        )
    console.print(table)
    console.print(
        "normalised scores, of as many tasks as 'scored' says; gap: optimality gap; second lines: 95 % over episodes"
    )
    if result["unscored"]:
        console.print(f"without reference scores: {escape(', '.join(result['unscored']))}")
    missing = {failure["task"]: failure["failed"] for failure in result["failures"] if failure.get("missing")}
    for name, words in missing.items():
        console.print(f"not played: {escape(name)}: {escape(words)}")
    for failure in result["failures"]:
        if not failure.get("missing"):
            console.print(f"lost: {escape(failure['task'])} episode {failure['episode']}: {escape(failure['failed'])}")


def main(settings: EvaluateSettings) -> int:
    """Runs the flow, prints the tables and where the results are."""
    result = evaluate_policy(settings)
    show(result)
    folder = results_folder(settings)
    print(folder / PAGE)
    if "curves" in result:
        print(folder / CURVES)
        print(folder / "in_context.png")
    else:
        print(folder / RESULT)
    return 0
