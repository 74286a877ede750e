from __future__ import annotations

import numpy as np

from lram.train.metrics import bootstrap_mean


def test_the_interval_holds_the_mean_and_shrinks_with_tasks():
    rng = np.random.default_rng(0)
    widths = []
    for tasks in (5, 50, 500):
        mean, low, high = bootstrap_mean(rng.normal(3, 1, (tasks, 4)), np.random.default_rng(1))
        assert low < mean < high
        widths.append(high - low)
    assert widths[0] > 2 * widths[1] > 4 * widths[2]


def test_equal_values_have_no_interval():
    assert bootstrap_mean(np.full((4, 3), 2.5), np.random.default_rng(0)) == (2.5, 2.5, 2.5)


def test_intervals_cover_about_95_percent():
    rng = np.random.default_rng(2)
    hits = 0
    for _ in range(300):
        # What differs between tasks and what differs between seeds both belong in the interval.
        values = rng.normal(0, 1, (30, 1)) + rng.normal(0, 0.5, (30, 3))
        _, low, high = bootstrap_mean(values, rng, draws=400)
        hits += low <= 0 <= high
    assert 0.90 < hits / 300 < 0.99


def test_the_same_draws_give_the_same_interval():
    values = np.random.default_rng(0).random((6, 2))
    one, two = (bootstrap_mean(values, np.random.default_rng(7)) for _ in range(2))
    assert one == two
