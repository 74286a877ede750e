from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from types import SimpleNamespace

import numpy as np
import pytest

from lram.train.metrics import AGGREGATES, bootstrap_mean, intervals, resample


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


@pytest.fixture(scope="module")
def rliable():
    """The package rliable: its `library` and `metrics`."""
    pytest.importorskip("rliable", reason="rliable is compared with in tests only")
    # The package `arch`, whose bootstrap rliable builds on, imports much more that does not go with every pandas.
    spec = importlib.util.find_spec("arch")
    with pytest.MonkeyPatch.context() as patch:
        bare = types.ModuleType("arch")
        bare.__path__ = list(spec.submodule_search_locations)
        patch.setitem(sys.modules, "arch", bare)
        yield SimpleNamespace(
            library=importlib.import_module("rliable.library"), metrics=importlib.import_module("rliable.metrics")
        )
        for name in [name for name in sys.modules if name.startswith("arch.")]:
            patch.delitem(sys.modules, name)


SCORES = np.random.default_rng(3).gamma(2.0, 0.4, (5, 11)) * np.linspace(0.2, 2, 11)


def test_aggregates_are_rliable_s(rliable):
    theirs = {
        "mean": rliable.metrics.aggregate_mean,
        "median": rliable.metrics.aggregate_median,
        "iqm": rliable.metrics.aggregate_iqm,
        "optimality_gap": rliable.metrics.aggregate_optimality_gap,
    }
    for shape in ((5, 11), (1, 3), (4, 1), (20, 45)):
        scores = np.random.default_rng(shape[0]).normal(0.7, 0.5, shape)
        for name, aggregate in AGGREGATES.items():
            assert aggregate(scores) == pytest.approx(theirs[name](scores), abs=1e-12)


@pytest.mark.parametrize("over_tasks", [False, True])
def test_intervals_are_rliable_s_on_the_same_draws(rliable, over_tasks):
    reps = 300

    def all_of(scores):
        return np.array([aggregate(scores) for aggregate in AGGREGATES.values()])

    np.random.seed(5)  # noqa: NPY002  (rliable draws from the global generator)
    _, theirs = rliable.library.get_interval_estimates({"policy": SCORES}, all_of, task_bootstrap=over_tasks, reps=reps)

    def same_draws():
        np.random.seed(5)  # noqa: NPY002
        for _ in range(reps):
            rows = np.random.choice(5, SCORES.shape, replace=True)  # noqa: NPY002
            tasks = np.random.choice(11, (1, 11), replace=True) if over_tasks else np.arange(11)[None]  # noqa: NPY002
            yield rows, tasks

    ours = intervals(SCORES, same_draws())
    for (low, high), estimate in zip(theirs["policy"].T, ours.values()):
        assert estimate.low == pytest.approx(low, abs=1e-6) and estimate.high == pytest.approx(high, abs=1e-6)


@pytest.mark.parametrize("over_tasks", [False, True])
def test_intervals_agree_with_rliable_s_on_other_draws(rliable, over_tasks):
    def iqm_of(scores):
        return np.array([AGGREGATES["iqm"](scores), AGGREGATES["mean"](scores)])

    np.random.seed(6)  # noqa: NPY002
    _, theirs = rliable.library.get_interval_estimates({"policy": SCORES}, iqm_of, task_bootstrap=over_tasks, reps=4000)
    ours = intervals(SCORES, resample(SCORES, np.random.default_rng(0), over_tasks, 4000))
    for (low, high), name in zip(theirs["policy"].T, ("iqm", "mean")):
        # An end of an interval of 4,000 draws moves by about 2 % of the width from one seed to the next.
        assert abs(ours[name].low - low) < 0.08 * (high - low) > abs(ours[name].high - high)


def test_a_missing_repetition_is_never_drawn():
    scores = SCORES.copy()
    scores[3:, 2] = np.nan
    drawn = list(resample(scores, np.random.default_rng(0), draws=50))
    assert max(int(rows[:, 2].max()) for rows, _ in drawn) == 2 and not any(np.isnan(scores[d]).any() for d in drawn)
    found = intervals(scores, drawn)
    assert found["mean"].value == pytest.approx(np.mean([column[~np.isnan(column)].mean() for column in scores.T]))
    assert found["iqm"].low < found["iqm"].value < found["iqm"].high


def test_tasks_drawn_too_widen_the_interval():
    widths = []
    for over_tasks in (False, True):
        found = intervals(SCORES, resample(SCORES, np.random.default_rng(1), over_tasks, 500))["mean"]
        widths.append(found.high - found.low)
    assert widths[1] > 1.5 * widths[0]
