"""Steps several copies of one environment in this process, with episodes that can be replayed from their number.

    env = Slots(Pole, num_envs=4, seed=0)                           # anything that makes a `Slot`
    env = Slots(Pole, num_envs=4, seed=0, first_episode=200)        # as if 200 episodes of each had been played

Episode k of slot i is drawn from SeedSequence((seed, i, k)) and from nothing else: whoever knows the seed can start
at any episode and sees the same numbers, bit for bit, which is what an exact resume of a collection stands on.
It returns what Gymnasium's `SyncVectorEnv` returns in SAME_STEP mode, which knows neither slot nor episode, and adds
6 microseconds to a step of one slot where that adds 9 (cheetah-run, 17 microseconds bare).
What it trades away: one process, one core; for more, run more of these.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from lram.datasets.specs import BadInput


class Slot(Protocol):
    """One environment of `Slots`. States are written into the row that is handed in.

    Attributes:
        observation_space: float32 (D,) or uint8 (C, 64, 64).
        action_space: Actions in a Box are clipped to it before they come here.
        state_layout: {key: [start, stop]} over the columns of vector states, empty where there is one key only.
    """

    observation_space: gym.spaces.Box
    action_space: gym.Space
    state_layout: dict[str, list[int]]

    def start(self, seeds: np.random.SeedSequence, state: np.ndarray) -> None:
        """Starts the episode that `seeds` stand for; nothing of earlier episodes may show in it."""

    def step(self, action: Any, state: np.ndarray) -> tuple[float, bool, bool]:
        """Takes one step; returns reward, terminated and truncated."""

    def info(self) -> dict[str, bool | float]:
        """Returns what is known of the episode besides its states, the same keys every time."""

    def close(self) -> None:
        """Frees what the environment holds."""


class Slots(VectorEnv[np.ndarray, np.ndarray, np.ndarray]):
    """Many slots of one task, stepped one after the other.

    An episode that ends starts again within the same step (`AutoresetMode.SAME_STEP`): the state returned is then
    the new episode's first, and the one that was really seen last is in `infos["final_obs"]`.

    Attributes:
        episodes: Number of the episode under way in each slot, shape (N,) int64.
        state_layout: {key: [start, stop]} over the columns of vector states, None where there is one key only.
    """

    def __init__(
        self, make_slot: Callable[[], Slot], num_envs: int, seed: int, first_episode: int | Sequence[int] = 0
    ) -> None:
        """Builds the environments.

        Args:
            make_slot: Builds one; called once for each slot.
            num_envs: Slots.
            seed: Of every slot's episodes, together with the slot's and the episode's number.
            first_episode: Number of the first episode, for all slots or for each.

        Raises:
            BadInput: No slots, a negative seed or a negative episode.
        """
        if num_envs < 1 or seed < 0 or np.min(first_episode) < 0:
            raise BadInput(
                f"num_envs {num_envs}, seed {seed}, first_episode {first_episode}: expected at least one slot, "
                "and neither seed nor episode below 0"
            )
        self.num_envs = num_envs
        self._slots = [make_slot() for _ in range(num_envs)]
        observation_space, action_space = self._slots[0].observation_space, self._slots[0].action_space
        self.metadata = {"render_modes": [], "autoreset_mode": AutoresetMode.SAME_STEP}
        self.single_observation_space, self.single_action_space = observation_space, action_space
        self.observation_space = batch_space(observation_space, self.num_envs)
        self.action_space = batch_space(action_space, self.num_envs)
        self.action_space.seed(seed)
        self.state_layout = self._slots[0].state_layout or None
        self._seed, self._fresh = seed, True
        self._first = np.broadcast_to(np.asarray(first_episode, np.int64), (num_envs,))
        self.episodes = self._first.copy()
        self._shape = (self.num_envs, *observation_space.shape)
        self._box = action_space if isinstance(action_space, gym.spaces.Box) else None
        self._all = np.ones(self.num_envs, bool)

    def _start(self, slot: int, state: np.ndarray) -> None:
        self._slots[slot].start(np.random.SeedSequence((self._seed, slot, int(self.episodes[slot]))), state)

    def _infos(self, rows: list[dict[str, Any]], where: np.ndarray) -> dict[str, Any]:
        """Turns one dictionary per slot into one array per key, zero where `where` is false."""
        infos: dict[str, Any] = {}
        for key in rows[0]:
            infos[key] = np.array([row[key] for row in rows]) * where
            infos[f"_{key}"] = where.copy()
        return infos

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Starts an episode in every slot: the first one, and when called again the next.

        Args:
            seed: Takes the place of the one given at the start, and begins at the first episode again.
            options: Not used.

        Returns:
            States (N, ...) and infos.
        """
        if seed is not None:
            self._seed = seed
        if seed is not None or self._fresh:
            self.episodes[:] = self._first
        else:
            self.episodes += 1
        self._fresh = False
        states = np.empty(self._shape, self.single_observation_space.dtype)
        for i, state in enumerate(states):
            self._start(i, state)
        return states, self._infos([slot.info() for slot in self._slots], self._all)

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Steps every slot.

        Args:
            actions: (N,) integers or (N, A) floats.

        Returns:
            States (N, ...), rewards (N,) float32, terminated and truncated (N,) bool, and infos as Gymnasium's
            `SyncVectorEnv` gives them in SAME_STEP mode: where an episode ended `final_obs` and `final_info`.
        """
        actions = np.asarray(actions)
        if self._box is not None:
            actions = actions.clip(self._box.low, self._box.high)
        if actions.shape != self.action_space.shape:
            raise ValueError(f"actions have shape {actions.shape}, expected {self.action_space.shape}")
        states = np.empty(self._shape, self.single_observation_space.dtype)
        rewards = np.empty(self.num_envs, np.float32)
        terminated, truncated = np.empty((2, self.num_envs), bool)
        for i, (slot, action, state) in enumerate(zip(self._slots, actions, states)):
            rewards[i], terminated[i], truncated[i] = slot.step(action, state)
        rows = [slot.info() for slot in self._slots]
        ended = terminated | truncated
        if not ended.any():
            return states, rewards, terminated, truncated, self._infos(rows, self._all) if rows[0] else {}
        final_obs, final_info = np.full(self.num_envs, None, object), self._infos(rows, ended)
        for i in np.flatnonzero(ended).tolist():
            final_obs[i] = states[i].copy()
            self.episodes[i] += 1
            self._start(i, states[i])
        infos = self._infos([slot.info() for slot in self._slots], self._all) | {
            "final_obs": final_obs,
            "_final_obs": ended,
            "final_info": final_info,
            "_final_info": ended.copy(),
        }
        return states, rewards, terminated, truncated, infos

    def close_extras(self, **kwargs: Any) -> None:
        """Closes every slot."""
        for slot in self._slots:
            slot.close()
