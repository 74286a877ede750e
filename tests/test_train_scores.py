"""Scores: normalisation, what a mean covers, casualties, comparison."""

import numpy as np
import pytest

from lram.datasets.specs import tasks
from lram.train.scores import ALL, aggregate, by_task, compare, failures, normalised, score, summarise


def result(task, episode=0, total=1.0, success=None, score=None, **more):
    fixed = {"target": 1.0, "length": 10, "terminated": False, "truncated": True}
    return {"task": task, "episode": episode, "return": total, "success": success, "score": score, **fixed, **more}


def test_normalised_scores_are_those_of_the_table():
    reach = tasks()["metaworld", "reach-v2"]
    assert normalised(result("metaworld/reach-v2", total=reach.score_low)) == 0
    assert normalised(result("metaworld/reach-v2", total=reach.score_high)) == 1
    # Atari is scored by the game, not by clipped rewards; MimicGen by success.
    assert normalised(result("atari/amidar", total=3.0, score=1719.5)) == 1
    assert score(result("atari/amidar", total=3.0, score=1719.5)) == 1719.5
    assert normalised(result("mimicgen/Coffee_D0", total=0.0, success=True)) == 1
    assert normalised(result("mimicgen/Coffee_D0", total=1.0, success=False)) == 0
    assert normalised(result("mimicgen/Coffee_D0")) is None
    # A variant is measured by the task it varies; some tasks by nothing.
    assert normalised(result("metaworld/reach-v2.expert", total=reach.score_high)) == 1
    for unscored in ("atari/pooyan", "atari/carnival", "darkroom/room5x5-goal-01-01"):
        assert normalised(result(unscored)) is None


def test_every_mean_says_how_many_tasks_it_covers():
    results = [result("atari/pooyan", episode, 5.0, score=100.0) for episode in range(3)]
    results += [result("atari/amidar", episode, 1.0, score=5.8 + 1713.7 * episode / 2) for episode in range(3)]
    results += [result("metaworld/reach-v2", episode, 147.103, success=episode == 0) for episode in range(3)]
    summary = summarise(results, seed=0)
    atari, everything = summary["domains"]["atari"], summary["domains"][ALL]
    assert (atari["played"], atari["tasks"], atari["repetitions"]) == (2, 1, 3)
    assert atari["mean"][0] == pytest.approx(0.5) and atari["success"] is None and atari["success_tasks"] == 0
    assert (everything["played"], everything["tasks"], everything["episodes"]) == (3, 2, 9)
    assert everything["mean"][0] == pytest.approx(0.25) and everything["success"][0] == pytest.approx(1 / 3)
    assert everything["success_tasks"] == 1 and summary["unscored"] == ["atari/pooyan"]
    low, high = everything["mean"][1:]
    assert 0 <= low < 0.25 < high <= 0.5
    rows = {row["task"]: row for row in summary["tasks"]}
    assert list(rows) == ["atari/amidar", "atari/pooyan", "metaworld/reach-v2"]
    assert rows["atari/pooyan"]["normalised"] is None and rows["atari/pooyan"]["score"][0] == 100
    assert rows["metaworld/reach-v2"]["split"] == "train"
    assert summarise(results[::-1], seed=0) == summary


def test_the_last_result_of_an_episode_counts():
    lost = {"task": "metaworld/reach-v2", "episode": 1, "failed": "it hung"}
    results = [result("metaworld/reach-v2", 0), lost]
    assert failures(results) == [lost] and len(by_task(results)["metaworld/reach-v2"]) == 1
    results.append(result("metaworld/reach-v2", 1))
    assert failures(results) == [] and len(by_task(results)["metaworld/reach-v2"]) == 2
    assert summarise([lost], seed=0)["domains"] == {}


def test_tasks_with_lost_episodes_count_as_much_as_the_others():
    whole, torn = [1.0] * 4, [0.0]
    assert aggregate([whole, torn], seed=0, draws=50)["mean"] == [0.5, 0.5, 0.5]
    assert aggregate([], seed=0) == {"tasks": 0, "repetitions": 0}


def runs_of(*offsets):
    low, high = tasks()["metaworld", "reach-v2"].score_low, tasks()["metaworld", "reach-v2"].score_high
    rng = np.random.default_rng(0)
    names = ("metaworld/reach-v2", "darkroom/room5x5-goal-01-01")
    return [
        [
            result(name, episode, low + (high - low) * (offset + 0.1 * rng.normal()))
            for name in names
            for episode in range(5)
        ]
        for offset in offsets
    ]


def test_runs_that_differ_in_their_seed_are_repetitions_of_one_policy():
    single, group = runs_of(0.5), runs_of(0.2, 0.3, 0.4)
    rows = compare({"a": single, "b": group}, seed=0)
    assert [(row["domain"], row["label"], row["unit"], row["repetitions"], row["tasks"]) for row in rows] == [
        ("metaworld", "a", "episode", 5, 1),
        ("metaworld", "b", "run", 3, 1),
        (ALL, "a", "episode", 5, 1),
        (ALL, "b", "run", 3, 1),
    ]
    assert rows[0]["mean"][0] == pytest.approx(0.5, abs=0.15)
    low, high = (np.mean([normalised(episode) for episode in run[:5]]) for run in (group[0], group[2]))
    assert low - 1e-9 <= rows[1]["mean"][1] < rows[1]["mean"][2] <= high + 1e-9


def test_only_tasks_that_all_have_played_are_compared():
    one, two = runs_of(0.5)[0], [result("metaworld/push-v2", 0, 10.0)]
    assert compare({"a": [one], "b": [two]}, seed=0) == []
    rows = compare({"a": [one], "b": [two + one[:5]]}, seed=0)
    assert [row["tasks"] for row in rows] == [1, 1, 1, 1]
    assert rows[0]["mean"] == rows[1]["mean"]
