"""Meta-World: the 50 tasks of its v3 package under their v2 names, 200 steps an episode, goals drawn anew each time.

    from lram.collectors.metaworld import make
    env = make("reach-v2", num_envs=1, seed=0)
    states, infos = env.reset()                             # (1, 39) float32
    states, rewards, terminated, truncated, infos = env.step(env.action_space.sample())

A state is the 39 numbers of Meta-World's observation: hand, gripper and objects (18), the same one step earlier (18),
and the goal (3). The goal is visible, as in the multi-task benchmark that the LRAM code evaluates on; that code has a
wrapper that hides it, and uses it nowhere. Rewards are those called v2. `info["success"]` says whether the task has
been solved at any step of the episode so far, as Continual World counts it. No episode terminates.
What it trades away: 160 to 380 microseconds a step, most of it Meta-World's Python; the numbers stay its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np

from lram.collectors.slots import Slots
from lram.datasets.specs import BadInput

INSTALL = 'pip install "lram[metaworld]"'
HORIZON = 200
"""Steps per episode, as in the published data; the package's own limit is 500."""
STATE_WIDTH = 39
"""Columns of a state."""


def make(task: str, num_envs: int = 1, seed: int = 0, first_episode: int | Sequence[int] = 0) -> Slots:
    """Builds `num_envs` slots of one task.

    Args:
        task: Name, `reach-v2` for example.
        num_envs: Slots.
        seed: Of all episodes: episode k of slot i is a function of (seed, i, k).
        first_episode: Number of the first episode, for all slots or for each.

    Raises:
        BadInput: There is no such task, or Meta-World is not installed.
    """
    return Slots(partial(Sawyer, task), num_envs, seed, first_episode)


def state_layout(task: str) -> None:
    """Returns None: a state has one key."""


def package_name(task: str) -> str:
    """Returns what the package calls a task: `reach-v3` for `reach-v2`.

    Raises:
        BadInput: There is no such task, or Meta-World is not installed.
    """
    try:
        from metaworld import ALL_V3_ENVIRONMENTS
    except ImportError as error:
        raise BadInput(f"metaworld needs the package metaworld: {INSTALL} ({error})") from error
    name = f"{task.removesuffix('-v2')}-v3"
    if not task.endswith("-v2") or name not in ALL_V3_ENVIRONMENTS:
        raise BadInput(f"metaworld has no task {task!r}; names are like 'reach-v2' or 'pick-place-wall-v2'")
    return name


class Sawyer:
    """One Meta-World environment, as `Slots` wants it.

    Attributes:
        env: The Meta-World environment.
        observation_space: (39,) float32.
        action_space: (4,) float32 in [-1, 1].
        state_layout: Empty: a state has one key.
    """

    def __init__(self, task: str) -> None:
        name = package_name(task)
        from metaworld import ALL_V3_ENVIRONMENTS

        self.env: Any = ALL_V3_ENVIRONMENTS[name](reward_function_version="v2")
        # What the package's own goal-observable classes set, except that goals are drawn for every episode and from
        # the environment's generator, and not from NumPy's global one.
        self.env._partially_observable = False
        del self.env.sawyer_observation_space
        self.env._set_task_called = True
        self.env._freeze_rand_vec = False
        self.env.seeded_rand_vec = True
        self.observation_space: gym.spaces.Box = gym.spaces.Box(-np.inf, np.inf, (STATE_WIDTH,), np.float32)
        self.action_space: gym.Space = gym.spaces.Box(-1.0, 1.0, (4,), np.float32)
        self.state_layout: dict[str, list[int]] = {}
        self._steps, self._success = 0, False

    def start(self, seeds: np.random.SeedSequence, state: np.ndarray) -> None:
        """Starts an episode whose objects and goal are placed by `seeds`."""
        self.env.np_random = np.random.default_rng(seeds)
        state[:] = self.env.reset()[0]
        self._steps, self._success = 0, False

    def step(self, action: np.ndarray, state: np.ndarray) -> tuple[float, bool, bool]:
        """Takes one step; the episode is truncated at the horizon."""
        state[:], reward, _, _, info = self.env.step(action)
        self._steps += 1
        self._success |= bool(info["success"])
        return reward, False, self._steps >= HORIZON

    def info(self) -> dict[str, bool | float]:
        """Returns whether the task has been solved in this episode."""
        return {"success": self._success}

    def close(self) -> None:
        """Closes the environment."""
        self.env.close()
