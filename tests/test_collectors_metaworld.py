"""Meta-World: the package's own numbers, goals in sight, and nothing left over from one episode to the next."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from lram.collectors.metaworld import HORIZON, make, package_name, state_layout
from lram.datasets.specs import BadInput, tasks

metaworld = pytest.importorskip("metaworld", reason="metaworld is not installed")

TASKS = [name for domain, name in tasks() if domain == "metaworld"]


def actions(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (count, 1, 4)).astype(np.float32)


@pytest.mark.parametrize("task", TASKS)
def test_every_task_leaves_no_trace(task):
    env = make(task, seed=3)
    states = env.reset()[0]
    assert states.shape == (1, 39) and states.dtype == np.float32 and env.state_layout is state_layout(task) is None
    # Both halves of the frame stack begin alike, and the goal is seen.
    np.testing.assert_array_equal(states[0, :18], states[0, 18:36])
    np.testing.assert_array_equal(states[0, 36:], np.float32(env._slots[0].env._target_pos))
    for action in actions(25):
        states = env.step(action)[0]
        assert states[0, 36:].any()
    second = env.reset()[0]
    assert env.episodes[0] == 1
    fresh = make(task, seed=3, first_episode=1)
    np.testing.assert_array_equal(fresh.reset()[0], second)
    for action in actions(10, seed=1):
        ours, theirs = fresh.step(action), env.step(action)
        np.testing.assert_array_equal(ours[0], theirs[0])
        np.testing.assert_array_equal(ours[1], theirs[1])


def test_the_50_tasks_are_the_packages():
    assert {package_name(task) for task in TASKS} == set(metaworld.ALL_V3_ENVIRONMENTS) and len(TASKS) == 50


@pytest.mark.parametrize("task", ["reach-v2", "pick-place-v2", "door-open-v2"])
def test_numbers_are_the_packages_own(task):
    env = make(task, seed=2)
    states = env.reset()[0]
    ours = env._slots[0].env
    # The same goal set in the package's public way, as its multi-task benchmark does.
    original = metaworld.ALL_V3_ENVIRONMENTS[package_name(task)]()
    words = {"rand_vec": ours._last_rand_vec, "env_cls": type(original), "partially_observable": False}
    original.set_task(metaworld.Task(env_name=package_name(task), data=pickle.dumps(words)))
    np.testing.assert_array_equal(states[0], original.reset()[0].astype(np.float32))
    for action in actions(HORIZON):
        states, rewards, terminated, truncated, infos = env.step(action)
        state, reward, *_ = original.step(action[0])
        np.testing.assert_array_equal(infos["final_obs"][0] if truncated[0] else states[0], state.astype(np.float32))
        assert rewards[0] == np.float32(reward) and not terminated[0]
    assert truncated[0] and infos["final_info"].keys() == {"success", "_success"}
    # The next episode has begun, with another goal.
    assert (states[0, 36:] != state[36:].astype(np.float32)).any()


def test_goals_differ_between_episodes_and_slots():
    env = make("reach-v2", num_envs=2, seed=0)
    goals = np.concatenate([env.reset()[0][:, 36:] for _ in range(5)])
    assert len(np.unique(goals, axis=0)) == 10
    np.testing.assert_array_equal(make("reach-v2", num_envs=2, seed=0).reset()[0][:, 36:], goals[:2])
    assert not np.array_equal(make("reach-v2", num_envs=2, seed=1).reset()[0][:, 36:], goals[:2])


def test_no_generator_outside_is_used_or_moved():
    before = np.random.get_state()  # noqa: NPY002  (the one that must not be used)
    make("reach-v2").reset()
    np.testing.assert_equal(np.random.get_state(), before)  # noqa: NPY002


def test_success_once_is_success():
    env = make("reach-v2", seed=0)
    states, infos = env.reset()
    assert not infos["success"][0]
    reached = []
    for step in range(HORIZON):
        toward = np.clip(10 * (states[:, 36:] - states[:, :3]), -1, 1) * (1 if step < 100 else -1)
        states, _, _, truncated, infos = env.step(np.append(toward, [[0]], axis=1).astype(np.float32))
        reached.append((infos["final_info"] if truncated[0] else infos)["success"][0])
    assert not reached[0] and reached[100] and reached == sorted(reached)
    assert not infos["success"][0]


def test_refuses_what_is_no_task():
    for name in ("reach-v3", "reach", "fly-v2"):
        with pytest.raises(BadInput, match="metaworld has no task"):
            make(name)
