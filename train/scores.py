"""Scores: what episodes are worth, per task, per domain and over all, with intervals and the tasks they cover.

    summary = summarise(results, seed=0)            # what `lram.train.rollouts.play` yields
    summary["domains"]["dmcontrol"]["iqm"]          # [value, low, high]
    rows = compare({"xlstm": results, "dt": others}, seed=0)

An episode's normalised score is (score - low) / (high - low) with the two of `tasks.csv`: a human's play for Atari,
what the published data holds elsewhere, success for MimicGen. The score is the return, for Atari the game's own and
not the clipped one. A task without references (Dark-Room; carnival and pooyan) has returns and success rates only,
and every mean says of how many tasks it is. A repetition is an episode: intervals say what other episodes would have
given, not what another training run would; for that, compare runs that differ in their seed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from lram.datasets.specs import DOMAINS, reference
from lram.train.metrics import DRAWS, bootstrap_mean, intervals, resample

Result = dict[str, Any]
"""What `lram.train.rollouts.play` yields of an episode."""
ALL = "all"


def normalised(result: Result) -> float | None:
    """Returns an episode's normalised score, None where `tasks.csv` has no references for its task."""
    row = reference(*result["task"].split("/", 1))
    if row is None or row.score_low is None or row.score_high is None or row.score_low == row.score_high:
        return None
    value: float | None = score(result)
    if row.reference == "success":
        value = None if result["success"] is None else float(result["success"])
    return None if value is None else (value - row.score_low) / (row.score_high - row.score_low)


def score(result: Result) -> float:
    """Returns an episode's own score: the simulator's where it keeps one, else the return."""
    return float(result["return"] if result["score"] is None else result["score"])


def by_task(results: Iterable[Result]) -> dict[str, list[Result]]:
    """Groups the episodes that ended by task, in order of domains, tasks and episodes; the last result of each."""
    latest = {(result["task"], result["episode"]): result for result in results}
    grouped: dict[str, list[Result]] = {}
    order = {domain: place for place, domain in enumerate(DOMAINS)}
    for name, episode in sorted(latest, key=lambda key: (order[key[0].split("/")[0]], key)):
        if "failed" not in latest[name, episode]:
            grouped.setdefault(name, []).append(latest[name, episode])
    return grouped


def failures(results: Iterable[Result]) -> list[Result]:
    """Returns the episodes that could not be played, and were not played later."""
    latest = {(result["task"], result["episode"]): result for result in results}
    return [result for _, result in sorted(latest.items()) if "failed" in result]


def matrix(columns: list[list[float]]) -> np.ndarray:
    """Returns values per task as (repetitions, tasks), NaN at the end of a task that has fewer."""
    found = np.full((max(map(len, columns)), len(columns)), np.nan)
    for place, column in enumerate(columns):
        found[: len(column), place] = column
    return found


def aggregate(columns: list[list[float]], seed: int, draws: int = DRAWS) -> dict[str, Any]:
    """Aggregates normalised scores.

    Args:
        columns: For every task, a score for each repetition.
        seed: Of the bootstrap.
        draws: Resamples.

    Returns:
        `tasks` and `repetitions`, and where there are tasks [value, low, high] of `mean`, `median`, `iqm` and
        `optimality_gap`, and the same with tasks drawn as well under `over_tasks`.
    """
    if not columns:
        return {"tasks": 0, "repetitions": 0}
    scores_RN = matrix(columns)
    found: dict[str, Any] = {"tasks": len(columns), "repetitions": len(scores_RN)}
    for over_tasks in (False, True):
        drawn = resample(scores_RN, np.random.default_rng(seed), over_tasks, draws)
        estimates = {name: list(estimate) for name, estimate in intervals(scores_RN, drawn).items()}
        found |= {"over_tasks": estimates} if over_tasks else estimates
    return found


def _mean(values: list[float], seed: int) -> list[float] | None:
    """Returns a mean and its interval over episodes."""
    return list(bootstrap_mean(np.array(values)[None], np.random.default_rng(seed))) if values else None


def task_row(name: str, episodes: list[Result], seed: int) -> dict[str, Any]:
    """Returns what is said of a task: means with intervals of return, score, normalised score and success."""
    values = {
        "return": [float(episode["return"]) for episode in episodes],
        "score": [score(episode) for episode in episodes],
        "normalised": [value for value in map(normalised, episodes) if value is not None],
        "success": [float(episode["success"]) for episode in episodes if episode["success"] is not None],
    }
    row = reference(*name.split("/", 1))
    return {
        "task": name,
        "split": row.split if row else None,
        "reference": row.reference if row else None,
        "episodes": len(episodes),
        "target": episodes[0]["target"],
        "length": float(np.mean([episode["length"] for episode in episodes])),
        **{key: _mean(found, seed) for key, found in values.items()},
    }


def summarise(results: list[Result], seed: int) -> dict[str, Any]:
    """Makes tables of results.

    Returns:
        `tasks`, a row each; `domains`, by name and under `ALL` for all of them: `played` tasks, episodes, the
        aggregates of normalised scores with the `tasks` they cover, `success` [value, low, high] and
        `success_tasks`; `failures`; and `unscored`, the tasks without references.
    """
    grouped = by_task(results)
    rows = [task_row(name, episodes, seed) for name, episodes in grouped.items()]
    domains = {}
    names = list(dict.fromkeys(name.split("/")[0] for name in grouped))
    for domain in [*names, ALL] if names else []:
        mine = [name for name in grouped if domain in (ALL, name.split("/")[0])]
        domains[domain] = _domain(mine, grouped, seed)
    unscored = [row["task"] for row in rows if row["normalised"] is None]
    return {"tasks": rows, "domains": domains, "failures": failures(results), "unscored": unscored}


def _domain(names: list[str], grouped: Mapping[str, list[Result]], seed: int) -> dict[str, Any]:
    columns, successes = [], []
    for name in names:
        scores = [value for value in map(normalised, grouped[name]) if value is not None]
        columns += [scores] if scores else []
        solved = [float(episode["success"]) for episode in grouped[name] if episode["success"] is not None]
        successes += [solved] if solved else []
    success = aggregate(successes, seed).get("mean") if successes else None
    return {
        "played": len(names),
        "episodes": sum(len(grouped[name]) for name in names),
        **aggregate(columns, seed),
        "success": success,
        "success_tasks": len(successes),
    }


def compare(runs: Mapping[str, list[list[Result]]], seed: int) -> list[dict[str, Any]]:
    """Compares groups of runs on the tasks that all of them have played and that have references.

    Args:
        runs: By label, the results of every run of a group; runs of a group differ in their training seed.
        seed: Of the bootstrap.

    Returns:
        A row for each domain that is shared, and for all of them, and each label: `domain`, `label`, `runs`, `unit`
        ("run" or "episode", what a repetition is), and the aggregates.
    """
    grouped = {label: [by_task(results) for results in group] for label, group in runs.items()}
    everyone = [tasks for group in grouped.values() for tasks in group]
    if not everyone:
        return []
    shared = [
        name
        for name in everyone[0]
        if all(name in tasks for tasks in everyone) and normalised(everyone[0][name][0]) is not None
    ]
    rows = []
    for domain in [*dict.fromkeys(name.split("/")[0] for name in shared), ALL] if shared else []:
        mine = [name for name in shared if domain in (ALL, name.split("/")[0])]
        for label, group in grouped.items():
            columns = []
            for name in mine:
                scores = [[normalised(episode) or 0.0 for episode in tasks[name]] for tasks in group]
                columns.append(scores[0] if len(group) == 1 else [float(np.mean(run)) for run in scores])
            unit = "episode" if len(group) == 1 else "run"
            rows.append(
                {"domain": domain, "label": label, "runs": len(group), "unit": unit, **aggregate(columns, seed)}
            )
    return rows
