"""Means with their uncertainty.

    mean, low, high = bootstrap_mean(returns_NS, np.random.default_rng(0))
    found = intervals(scores_RN, resample(scores_RN, np.random.default_rng(0)))
    found["iqm"]                                        # Estimate(value=0.71, low=0.66, high=0.75)

`bootstrap_mean` draws tasks and, inside a task, seeds: what would another draw of both have given? With few tasks its
interval is wide, and honestly so. `intervals` is the stratified bootstrap of Agarwal et al., "Deep Reinforcement
Learning at the Edge of the Statistical Precipice", arXiv 2108.13264, whose package is rliable: it draws repetitions
inside every task, and tasks too where asked. All are percentile bootstraps.

Shapes: N tasks, R repetitions of each (episodes of one policy, or training runs), S seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import NamedTuple

import numpy as np

DRAWS = 2000
"""Resamples of a bootstrap."""
CONFIDENCE = 0.95
AT_ONCE = 1_000_000
"""Scores of resamples held in memory."""


def bootstrap_mean(
    values_NS: np.ndarray, rng: np.random.Generator, confidence: float = CONFIDENCE, draws: int = DRAWS
) -> tuple[float, float, float]:
    """Estimates a mean over tasks and seeds with a hierarchical percentile bootstrap.

    Args:
        values_NS: One value for each of N tasks and S seeds.
        rng: Source of the draws.
        confidence: Coverage of the interval.
        draws: Number of resamples.

    Returns:
        Mean, and the lower and upper end of its interval.
    """
    N, S = values_NS.shape
    tasks = rng.integers(N, size=(draws, N, 1))
    seeds = rng.integers(S, size=(draws, N, S))
    means = values_NS[tasks, seeds].mean(axis=(1, 2))
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(values_NS.mean()), float(low), float(high)


# Aggregates of scores that are normalised so that 1 is the reference ------------------------------------------------
# Over the last two axes. A repetition that is missing is NaN, at the end of its task's column.


def mean(scores_RN: np.ndarray) -> np.ndarray:
    """Returns the mean over tasks of their means."""
    return np.nanmean(scores_RN, axis=-2).mean(axis=-1)


def median(scores_RN: np.ndarray) -> np.ndarray:
    """Returns the median over tasks of their means."""
    return np.median(np.nanmean(scores_RN, axis=-2), axis=-1)


def iqm(scores_RN: np.ndarray) -> np.ndarray:
    """Returns the interquartile mean: of all repetitions of all tasks, the mean of the middle half."""
    ordered = np.sort(scores_RN.reshape(*scores_RN.shape[:-2], -1), axis=-1)
    known = int((~np.isnan(ordered)).sum(axis=-1).max())  # NaN comes last
    return ordered[..., known // 4 : known - known // 4].mean(axis=-1)


def optimality_gap(scores_RN: np.ndarray) -> np.ndarray:
    """Returns by how much the scores fall short of 1 on average; what is above 1 makes up for nothing."""
    return 1 - np.nanmean(np.minimum(scores_RN, 1), axis=-2).mean(axis=-1)


Aggregate = Callable[[np.ndarray], np.ndarray]
AGGREGATES: dict[str, Aggregate] = {
    "mean": mean,
    "median": median,
    "iqm": iqm,
    "optimality_gap": optimality_gap,
}


class Estimate(NamedTuple):
    """A number, and the ends of its interval."""

    value: float
    low: float
    high: float


Draw = tuple[np.ndarray, np.ndarray]
"""Repetition (R, N) and task (1, N) that each place of a resampled matrix is taken from."""


def resample(
    scores_RN: np.ndarray, rng: np.random.Generator, over_tasks: bool = False, draws: int = DRAWS
) -> Iterator[Draw]:
    """Draws repetitions inside every task, and tasks as well with `over_tasks`.

    Args:
        scores_RN: What is to be resampled; of a task with missing repetitions the others are drawn.
        rng: Source of the draws.
        over_tasks: The tasks stand for others like them, instead of being the ones that count.
        draws: Number of resamples.
    """
    R, N = scores_RN.shape
    known_N, every_1N = (~np.isnan(scores_RN)).sum(axis=0), np.arange(N)[None]
    for _ in range(draws):
        tasks_1N = rng.integers(N, size=(1, N)) if over_tasks else every_1N
        yield rng.integers(known_N[tasks_1N], size=(R, N)), tasks_1N


def intervals(
    scores_RN: np.ndarray,
    draws: Iterable[Draw],
    aggregates: dict[str, Aggregate] = AGGREGATES,
    confidence: float = CONFIDENCE,
) -> dict[str, Estimate]:
    """Estimates aggregates with percentile intervals.

    Args:
        scores_RN: Normalised scores.
        draws: What every resample takes.
        aggregates: Functions of (…, R, N).
        confidence: Coverage of the intervals.

    Returns:
        An estimate for every aggregate; without width where R is 1 and tasks are not drawn.
    """
    values: dict[str, list[np.ndarray]] = {name: [] for name in aggregates}
    drawing = iter(draws)
    while some := list(islice(drawing, max(1, AT_ONCE // scores_RN.size))):
        rows, tasks = (np.stack(part) for part in zip(*some))
        resampled = scores_RN[rows, tasks]
        for name, aggregate in aggregates.items():
            values[name].append(aggregate(resampled))
    tail = (1 - confidence) / 2
    found = {}
    for name, aggregate in aggregates.items():
        low, high = np.quantile(np.concatenate(values[name]), [tail, 1 - tail])
        found[name] = Estimate(float(aggregate(scores_RN)), float(low), float(high))
    return found
