"""Means with their uncertainty.

    mean, low, high = bootstrap_mean(returns_NS, np.random.default_rng(0))

Intervals are percentile bootstraps over tasks and, inside a task, over seeds: what would another draw of tasks
and seeds have given? With few tasks they are wide, and honestly so.
"""

from __future__ import annotations

import numpy as np


def bootstrap_mean(
    values_NS: np.ndarray, rng: np.random.Generator, confidence: float = 0.95, draws: int = 2000
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
