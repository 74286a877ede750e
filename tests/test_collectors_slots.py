"""Slots: the same interface as Gymnasium's SyncVectorEnv, and episodes that follow from their number alone."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from lram.collectors.slots import Slots
from lram.datasets.specs import BadInput


class Walk:
    """A walk that starts anywhere and ends beyond 3 (terminated) or after 10 steps (truncated)."""

    def __init__(self) -> None:
        self.observation_space: gym.spaces.Box = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
        self.action_space: gym.Space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)
        self.state_layout: dict[str, list[int]] = {"at": [0, 1], "step": [1, 2]}
        self.closed = False

    def start(self, seeds: np.random.SeedSequence, state: np.ndarray) -> None:
        self.random = np.random.default_rng(seeds)
        self.at, self.steps = self.random.normal(), 0
        state[:] = self.at, 0

    def step(self, action: np.ndarray, state: np.ndarray) -> tuple[float, bool, bool]:
        self.at += float(action[0]) + self.random.normal()
        self.steps += 1
        state[:] = self.at, self.steps
        return self.at, abs(self.at) > 3, abs(self.at) <= 3 and self.steps == 10

    def info(self) -> dict[str, bool | float]:
        return {"success": self.at > 3, "far": self.at}

    def close(self) -> None:
        self.closed = True


class Single(gym.Env):
    """The same slot as a Gymnasium environment that is told its place, for SyncVectorEnv."""

    def __init__(self, seed: int, slot: int) -> None:
        self.walk, self.place, self.episode = Walk(), (seed, slot), 0
        self.observation_space, self.action_space = self.walk.observation_space, self.walk.action_space

    def reset(self, *, seed: Any = None, options: Any = None) -> tuple[np.ndarray, dict]:
        state = np.empty(2, np.float32)
        self.walk.start(np.random.SeedSequence((*self.place, self.episode)), state)
        self.episode += 1
        return state, self.walk.info()

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        state = np.empty(2, np.float32)
        return (state, *self.walk.step(np.clip(action, -1, 1), state), self.walk.info())


def test_returns_what_gymnasium_returns():
    env = Slots(Walk, 3, seed=5)
    other = SyncVectorEnv([lambda i=i: Single(5, i) for i in range(3)], autoreset_mode=AutoresetMode.SAME_STEP)
    assert env.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
    assert env.observation_space == other.observation_space and env.action_space == other.action_space
    np.testing.assert_equal(env.reset(), other.reset())
    rng, ended = np.random.default_rng(0), np.zeros(2, int)
    for _ in range(100):
        action = rng.uniform(-2, 2, (3, 1)).astype(np.float32)
        ours, theirs = env.step(action), other.step(action)
        assert ours[0].dtype == ours[1].dtype == np.float32
        np.testing.assert_array_equal(ours[0], theirs[0])
        np.testing.assert_array_equal(ours[1], theirs[1].astype(np.float32))
        np.testing.assert_array_equal(ours[2:4], theirs[2:4])
        assert ours[4].keys() == theirs[4].keys()
        for key in ("success", "_success", "far", "_far"):
            np.testing.assert_array_equal(ours[4][key], theirs[4][key])
        done = ours[2] | ours[3]
        if done.any():
            np.testing.assert_array_equal(ours[4]["_final_obs"], done)
            for slot in np.flatnonzero(done):
                np.testing.assert_array_equal(ours[4]["final_obs"][slot], theirs[4]["final_obs"][slot])
            for key in ("success", "_success", "far", "_far"):
                np.testing.assert_array_equal(ours[4]["final_info"][key], theirs[4]["final_info"][key])
        ended += ours[2].sum(), ours[3].sum()
    assert (ended > 5).all()


def test_every_episode_can_be_started_at():
    def play(env: Slots, steps: int) -> dict[tuple[int, int], list[np.ndarray]]:
        states, episodes = env.reset()[0], {}
        for _ in range(steps):
            for slot, state in enumerate(states):
                episodes.setdefault((slot, int(env.episodes[slot])), []).append(state)
            states = env.step(np.zeros((env.num_envs, 1), np.float32))[0]
        return episodes

    known = play(Slots(Walk, 3, seed=1), 100)
    later = play(Slots(Walk, 3, seed=1, first_episode=[4, 0, 2]), 20)
    assert {(0, 4), (1, 0), (2, 2)} <= later.keys() and (0, 3) not in later
    for key, states in later.items():
        np.testing.assert_array_equal(states, known[key][: len(states)])
    starts = [tuple(states[0]) for states in known.values()]
    assert len(set(starts)) == len(starts)
    assert not np.array_equal(play(Slots(Walk, 1, seed=2), 1)[0, 0], known[0, 0][:1])


def test_reset_goes_on_and_a_seed_begins_again():
    env = Slots(Walk, 2, seed=1, first_episode=3)
    first, second = env.reset()[0], env.reset()[0]
    np.testing.assert_array_equal(env.episodes, [4, 4])
    assert (first[:, 0] != second[:, 0]).all()
    np.testing.assert_array_equal(env.reset(seed=1)[0], first)
    np.testing.assert_array_equal(env.episodes, [3, 3])
    assert (env.reset(seed=2)[0][:, 0] != first[:, 0]).all()


def test_what_is_returned_is_the_callers():
    env = Slots(Walk, 2, seed=0)
    states = env.reset()[0]
    before = states.copy()
    for _ in range(30):
        env.step(np.ones((2, 1), np.float32))
    np.testing.assert_array_equal(states, before)


def test_refuses_what_makes_no_sense():
    for arguments in ({"num_envs": 0}, {"seed": -1}, {"first_episode": [0, -1]}):
        with pytest.raises(BadInput, match="expected at least one slot"):
            Slots(Walk, **{"num_envs": 2, "seed": 0, **arguments})
    env = Slots(Walk, 2, seed=0)
    env.reset()
    with pytest.raises(ValueError, match=r"\(3, 1\), expected \(2, 1\)"):
        env.step(np.zeros((3, 1), np.float32))


def test_closes_every_slot():
    env = Slots(Walk, 2, seed=0)
    slots = env._slots
    env.close()
    assert all(slot.closed for slot in slots)
