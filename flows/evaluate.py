"""Evaluates a policy: in-context learning on Dark-Room, with intervals and a random policy beside it.

lram evaluate RUN --trials 40
evaluate_policy(EvaluateSettings(checkpoint=Path("RUN")))
"""

from __future__ import annotations

from typing import Any

from prefect import flow
from rich.table import Table

from lram.flows.progress import bar, console
from lram.train.evaluate import GOALS, EvaluateSettings, evaluate, results_folder


@flow(name="evaluate")
def evaluate_policy(settings: EvaluateSettings) -> dict[str, Any]:
    """Plays the in-context protocol.

    Returns:
        The content of `in_context.json`.
    """
    sets = 2 if settings.goals == "both" else 1
    with bar("evaluate", sets * settings.trials, "trials") as step:
        return evaluate(settings, lambda which, done, total: step(1, which))


def show(result: dict[str, Any]) -> None:
    """Prints the curves' key figures as a table."""
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


def main(settings: EvaluateSettings) -> int:
    """Runs the flow, prints the table and where the results are."""
    result = evaluate_policy(settings)
    show(result)
    folder = results_folder(settings)
    print(folder / "in_context.json")
    print(folder / "in_context.png")
    return 0
