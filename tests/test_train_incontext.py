from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lram.collectors.darkroom import DarkRoomVector, parse_task, rooms, task_name
from lram.datasets.specs import BadInput
from lram.model.policy import Policy, PolicySettings
from lram.train import checkpoint
from lram.train.incontext import (
    Actor,
    InContextSettings,
    evaluate,
    goals_of,
    in_context_returns,
    key_figures,
    results_folder,
    summarise,
    target_return,
)
from lram.train.trainer import TrainSettings, train

SETTINGS = InContextSettings(checkpoint=Path("none"), trials=4, seeds=2)
TASKS = [task_name(room) for room in rooms(3, horizon=6)[0][:3]]


def actor(backbone: str = "xlstm", seed: int = 0) -> Actor:
    torch.manual_seed(0)
    policy = Policy(PolicySettings(backbone=backbone, size="tiny", max_steps=12, image=False)).eval()
    return Actor(policy, "darkroom", torch.Generator().manual_seed(seed), 1.0)


def test_an_agent_that_knows_the_way_gets_the_best_return():
    goals = [parse_task(task).goal for task in TASKS for _ in range(SETTINGS.seeds)]

    def walk(states, returns, rewards):
        down = np.array([goal[0] for goal in goals]) > states[:, 0]
        right = np.array([goal[1] for goal in goals]) > states[:, 1]
        return np.where(down, 2, np.where(right, 1, 4))

    for returns_NS in in_context_returns(walk, TASKS, SETTINGS, 5.0):
        best = [[parse_task(task).best_return] * SETTINGS.seeds for task in TASKS]
        assert returns_NS.tolist() == best


def test_returns_asked_for_fall_by_what_was_paid_and_start_anew():
    seen = []

    def stay(states, returns, rewards):
        seen.append((returns.copy(), np.array(rewards)))
        return np.full(len(states), 2)

    list(in_context_returns(stay, TASKS, SETTINGS, 5.0))
    horizon = parse_task(TASKS[0]).horizon
    for step, (returns, _) in enumerate(seen):
        if step % horizon == 0:
            assert (returns == 5.0).all()
        else:
            assert np.array_equal(returns, seen[step - 1][0] - seen[step][1])


@pytest.mark.parametrize("backbone", ["xlstm", "mamba", "dt"])
def test_each_step_equals_encoding_the_whole_context(backbone):
    """What the recurrent state gives is what one forward pass over past and present episodes gives."""
    settings = replace(SETTINGS, trials=3, context_episodes=2)
    player = actor(backbone)
    policy, logged = player.policy, []
    inner = player.act

    def spy(states, returns, rewards):
        actions = inner(states, returns, rewards)
        logged.append((states.copy(), returns.copy(), np.array(rewards, np.float64), actions))
        return actions

    player.act = spy
    list(in_context_returns(player, TASKS, settings, 3.0))
    # Replay the third trial from scratch: the second, with the returns it really had, then its own steps.
    states, asked, rewards, actions = (np.stack(part, axis=1) for part in zip(*logged))
    past, now = slice(6, 12), slice(12, 18)
    env = DarkRoomVector([task for task in TASKS for _ in range(settings.seeds)])
    env.reset()
    paid = np.stack([env.step(actions[:, t])[1] for t in range(18)], axis=1)[:, past]
    true_returns = np.cumsum(paid[:, ::-1], axis=1)[:, ::-1]
    before = np.concatenate([np.zeros((6, 1)), paid[:, :-1]], axis=1)
    inputs = (
        np.concatenate([states[:, past], states[:, now]], axis=1),
        np.concatenate([true_returns, asked[:, now]], axis=1),
        np.concatenate([before, rewards[:, now]], axis=1),
    )
    assert np.array_equal(rewards[:, 12], paid[:, -1])
    padded = np.zeros((6, 12, 204), np.float32)
    padded[..., :2] = inputs[0]
    with torch.no_grad():
        tensors = [torch.from_numpy(array.astype(np.float32)) for array in (padded, *inputs[1:])]
        whole = policy(*tensors)[:, 6:, :5]
        fresh = Actor(policy, "darkroom", torch.Generator(), 1.0)
        fresh.remember(states[:, past], true_returns, before)
        for t in range(6):
            step = fresh._encode(states[:, 12 + t, None], asked[:, 12 + t, None], rewards[:, 12 + t, None])
            assert torch.allclose(step[:, 0, :5], whole[:, t], atol=1e-4)


def test_slots_do_not_depend_on_their_neighbours():
    alone = [list(in_context_returns(actor_greedy(), [task], replace(SETTINGS, seeds=1), 3.0)) for task in TASKS]
    together = list(in_context_returns(actor_greedy(), TASKS, replace(SETTINGS, seeds=1), 3.0))
    for number in range(len(TASKS)):
        assert [trial[number, 0] for trial in together] == [trial[0, 0] for trial in alone[number]]


def actor_greedy() -> Actor:
    player = actor()
    player.temperature = 1e-6
    return player


def test_the_same_seed_plays_the_same_episodes():
    one, two, other = (list(in_context_returns(actor(seed=s), TASKS, SETTINGS, 3.0)) for s in (1, 1, 2))
    assert np.array_equal(one, two)
    assert not np.array_equal(one, other)


def test_a_state_carried_through_all_trials_is_never_reset():
    player = actor()
    list(in_context_returns(player, TASKS, replace(SETTINGS, context_episodes=0), 3.0))
    carried = player.state
    list(in_context_returns(player, TASKS, replace(SETTINGS, context_episodes=2, trials=1), 3.0))
    assert carried is not None and player.state is not carried


def test_goal_sets_are_disjoint_and_of_the_same_rooms():
    training, holdout = rooms(5, horizon=20)
    names = [f"darkroom/{task_name(room)}" for room in training]
    sets = goals_of([*names, "procgen/bigfish"], "both")
    assert len(sets["training"]) == 20 and len(sets["holdout"]) == 5
    assert set(sets["holdout"]) == {task_name(room) for room in holdout}
    assert list(goals_of(names, "holdout")) == ["holdout"]
    with pytest.raises(BadInput, match="not trained on Dark-Room"):
        goals_of(["procgen/bigfish"], "both")
    with pytest.raises(BadInput, match="one horizon"):
        list(in_context_returns(lambda *a: None, [TASKS[0], "room5x5-goal-01-01"], SETTINGS, 1.0))


def test_key_figures_are_of_the_first_trial_and_the_last_fifth():
    returns = np.arange(20.0)[:, None, None] + np.zeros((20, 4, 2))
    curve = {"policy": summarise(returns, 0), "random": summarise(returns * 0 + 3, 0)}
    assert key_figures(curve) == {"first_trial": 0, "last_fifth": 17.5, "rise": None, "random_mean": 3}
    curve["policy"] = summarise(returns + 1, 0)
    assert key_figures(curve)["rise"] == 18.5
    assert curve["policy"]["low"] == curve["policy"]["high"] == list(range(1, 21))


def test_an_evaluation_writes_results_and_plot(rooms_run, tmp_path):
    told = []
    settings = InContextSettings(rooms_run, trials=3, seeds=2, out=tmp_path)
    result = evaluate(settings, lambda *a: told.append(a))
    assert told[:3] == [("training goals", 1, 3), ("training goals", 2, 3), ("training goals", 3, 3)]
    assert json.loads((tmp_path / "in_context.json").read_text()) == json.loads(json.dumps(result))
    assert (tmp_path / "in_context.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert set(result["curves"]) == {"training", "holdout"}
    curve = result["curves"]["training"]
    returns = np.array(curve["policy"]["returns"])
    assert returns.shape == (7, 2, 3)
    assert np.allclose(returns.mean(axis=(0, 1)), curve["policy"]["mean"])
    assert results_folder(replace(settings, out=None)) == rooms_run / "evaluation"
    newest = checkpoint.find(rooms_run)
    assert results_folder(InContextSettings(newest)) == rooms_run / "evaluation"
    assert evaluate(replace(settings, checkpoint=newest)) == result


@pytest.fixture(scope="module")
def rooms_run(rooms, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("run")
    return train(TrainSettings(rooms, out, size="tiny", updates=4, per_domain=8, gap=10, validate_every=4))


def test_the_return_asked_for_is_the_median_best_or_a_number():
    bests = {"darkroom/a": 3.0, "darkroom/b": 5.0, "darkroom/c": 11.0, "atari/d": 900.0}
    state = checkpoint.State(target_returns=bests)
    assert target_return(state, "best") == 5.0 and target_return(state, "7.5") == 7.5
    with pytest.raises(BadInput, match="--target table"):
        target_return(state, "table")
