"""Procgen: the 16 games in easy mode, levels 0 to 199, all slots stepped at once by EnvPool.

    from lram.collectors.procgen import make
    env = make("coinrun", num_envs=64, seed=0)
    states, infos = env.reset()                             # (64, 1, 64, 64) uint8
    states, rewards, terminated, truncated, infos = env.step(env.action_space.sample())

Frames are Procgen's 64x64 in gray. EnvPool starts the next episode in the step after an end; here it starts in the
same step, and `infos["final_obs"]` is the frame that was really seen last. An episode is a function of its level and
the actions; a slot's levels are drawn by the engine from the slot's seed, one per episode. Starting at a later episode
draws as many levels first, a twentieth of a millisecond each.
What it trades away: EnvPool's Procgen needs Qt, Debian's package libqt5gui5.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from lram.datasets.images import gray
from lram.datasets.specs import IMAGE_SIDE, BadInput, tasks

INSTALL = 'pip install "lram[procgen]" and apt-get install libqt5gui5'
LEVELS = 200
"""Levels are drawn from 0 to 199, as for the published data."""
NUM_ACTIONS = 15


def make(task: str, num_envs: int = 1, seed: int = 0, first_episode: int | Sequence[int] = 0) -> ProcgenVector:
    """Builds `num_envs` slots of one game.

    Args:
        task: Name, `coinrun` for example.
        num_envs: Slots.
        seed: Of all episodes: the levels of slot i are drawn from (seed, i).
        first_episode: Number of the first episode, for all slots or for each.

    Raises:
        BadInput: There is no such task, or EnvPool's Procgen is not installed.
    """
    return ProcgenVector(task, num_envs, seed, first_episode)


class ProcgenVector(VectorEnv[np.ndarray, np.ndarray, np.ndarray]):
    """Many slots of one game in `AutoresetMode.SAME_STEP`.

    Attributes:
        episodes: Number of the episode under way in each slot, shape (N,) int64.
        levels: Its level, shape (N,) int64.
        state_layout: None: states are images.
    """

    state_layout = None

    def __init__(self, task: str, num_envs: int, seed: int, first_episode: int | Sequence[int] = 0) -> None:
        """Builds the environment; see `make`."""
        if ("procgen", task) not in tasks():
            raise BadInput(f"procgen has no task {task!r}; names are like 'coinrun' or 'bigfish'")
        if num_envs < 1 or seed < 0 or np.min(first_episode) < 0:
            raise BadInput(
                f"num_envs {num_envs}, seed {seed}, first_episode {first_episode}: expected at least one slot, "
                "and neither seed nor episode below 0"
            )
        self.num_envs = num_envs
        self.metadata = {"render_modes": [], "autoreset_mode": AutoresetMode.SAME_STEP}
        self.single_observation_space = gym.spaces.Box(0, 255, (1, IMAGE_SIDE, IMAGE_SIDE), np.uint8)
        self.single_action_space = gym.spaces.Discrete(NUM_ACTIONS)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.action_space.seed(seed)
        self._task, self._seed, self._fresh = task, seed, True
        self._first = np.broadcast_to(np.asarray(first_episode, np.int64), (num_envs,))
        self.episodes = self._first.copy()
        self.levels = np.zeros(num_envs, np.int64)
        self._pool = _load(task, num_envs, seed)

    def _start(self, slots: np.ndarray) -> np.ndarray:
        """Starts the next episode of some slots; returns its first states, (len(slots), 1, 64, 64)."""
        rgb, infos = self._pool.reset(slots.astype(np.int32))
        self.levels[slots] = infos["level_seed"]
        return gray(rgb)[:, None]

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Starts an episode in every slot: the first one, and when called again the next.

        Args:
            seed: Takes the place of the one given at the start, and begins at the first episode again.
            options: Not used.

        Returns:
            States (N, 1, 64, 64) and infos.
        """
        if seed is not None:
            self._seed = seed
            self._pool.close()
            self._pool = _load(self._task, self.num_envs, seed)
        if seed is not None or self._fresh:
            self.episodes[:] = self._first
            for passed in range(int(self._first.max())):
                self._start(np.flatnonzero(self._first > passed))
        else:
            self.episodes += 1
        self._fresh = False
        return self._start(np.arange(self.num_envs)), {}

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Steps every slot.

        Args:
            actions: (N,) integers 0..14.

        Returns:
            States (N, 1, 64, 64) uint8, rewards (N,) float32, terminated and truncated (N,) bool, and infos with
            `final_obs` where an episode ended. Truncated means that the game's own time was up.
        """
        actions = np.asarray(actions)
        if actions.shape != (self.num_envs,) or actions.min() < 0 or actions.max() >= NUM_ACTIONS:
            raise ValueError(f"actions must be {self.num_envs} integers 0..{NUM_ACTIONS - 1}: {actions}")
        rgb, rewards, terminated, truncated, _ = self._pool.step(actions.astype(np.int32))
        states = gray(rgb)[:, None]
        ended = terminated | truncated
        if not ended.any():
            return states, rewards, terminated, truncated, {}
        slots, final_obs = np.flatnonzero(ended), np.full(self.num_envs, None, object)
        for slot in slots.tolist():
            final_obs[slot] = states[slot].copy()
        self.episodes[slots] += 1
        states[slots] = self._start(slots)
        return states, rewards, terminated, truncated, {"final_obs": final_obs, "_final_obs": ended}

    def close_extras(self, **kwargs: Any) -> None:
        """Ends the engine's threads."""
        self._pool.close()


def _load(task: str, num_envs: int, seed: int) -> Any:
    """Returns EnvPool's environment, every slot with a seed of its own."""
    seeds = [int(np.random.SeedSequence((seed, slot)).generate_state(1)[0]) >> 1 for slot in range(num_envs)]
    try:
        import envpool

        return envpool.make_gymnasium(
            f"{task.capitalize()}Easy-v0",
            num_envs=num_envs,
            env_seed=seeds,
            num_levels=LEVELS,
            start_level=0,
            channel_first=False,
        )
    except ImportError as error:
        raise BadInput(f"procgen needs EnvPool and Debian's libqt5gui5: {INSTALL} ({error})") from error
