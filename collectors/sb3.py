"""Joins our environments and recorder to stable-baselines3: three small `VecEnv`s, one per job.

    rooms = make(task, 20, seed=0)
    venv = RecordVecEnv(VectorToSb3(rooms), recorder)       # what is below here is what is recorded
    model = PPO("MlpPolicy", OneHotCells(venv, rooms))      # what is above is what the agent alone is shown

Importing this module imports stable-baselines3 and torch, which takes seconds: do it in the function that trains.
What it trades away: `VectorToSb3` wants every slot in this process, as a NumPy or EnvPool environment is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper
from stable_baselines3.common.vec_env.base_vec_env import VecEnvStepReturn

from lram.collectors.darkroom import DarkRoomVector
from lram.collectors.recorder import Recorder


class VectorToSb3(VecEnv):
    """Shows a `gymnasium.vector` environment in SAME_STEP mode to stable-baselines3."""

    def __init__(self, env: VectorEnv) -> None:
        if env.metadata.get("autoreset_mode") != AutoresetMode.SAME_STEP:
            raise ValueError("VectorToSb3 needs an environment in AutoresetMode.SAME_STEP")
        self.env = env
        super().__init__(env.num_envs, env.single_observation_space, env.single_action_space)

    def reset(self) -> np.ndarray:
        """Resets every slot, with the seed given to `seed` before, once."""
        seed = self._seeds[0]
        self._reset_seeds()
        return self.env.reset(seed=seed)[0]

    def step_async(self, actions: np.ndarray) -> None:
        """Keeps the actions for `step_wait`."""
        self._actions = actions

    def step_wait(self) -> VecEnvStepReturn:
        """Steps; infos carry `terminal_observation`, `TimeLimit.truncated` and `is_success` at episode ends."""
        states, rewards, terminated, truncated, infos = self.env.step(self._actions)
        rows: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        dones = terminated | truncated
        if dones.any():
            success = infos.get("final_info", {}).get("success")
            for slot in np.flatnonzero(dones):
                rows[slot]["terminal_observation"] = infos["final_obs"][slot]
                rows[slot]["TimeLimit.truncated"] = bool(truncated[slot] and not terminated[slot])
                if success is not None:
                    rows[slot]["is_success"] = bool(success[slot])
        return states, rewards, dones, rows

    def close(self) -> None:
        """Closes the environment."""
        self.env.close()

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """Returns an attribute of the environment, the same for every slot."""
        return [getattr(self.env, attr_name) for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Sets an attribute of the environment, for all slots at once."""
        setattr(self.env, attr_name, value)

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        """Calls a method of the environment once for all slots."""
        return [getattr(self.env, method_name)(*args, **kwargs)]

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper], indices: Any = None) -> list[bool]:
        """Says that no slot is wrapped: there are no environments inside."""
        return [False for _ in self._get_indices(indices)]


class RecordVecEnv(VecEnvWrapper):
    """Records every step that passes through it.

    Wrap the environment whose states and rewards are to be stored, below any `VecNormalize` or `OneHotCells`.
    """

    def __init__(self, venv: VecEnv, recorder: Recorder) -> None:
        super().__init__(venv)
        self.recorder = recorder

    def reset(self) -> np.ndarray:
        """Resets every slot; episodes under way are left out of the recording."""
        states = self.venv.reset()
        assert isinstance(states, np.ndarray), "the recorder stores arrays, not dictionaries of them"
        self.recorder.reset(states)
        return states

    def step_async(self, actions: np.ndarray) -> None:
        """Keeps the actions, which are recorded when their step has been taken."""
        self._actions = actions
        self.venv.step_async(actions)

    def step_wait(self) -> VecEnvStepReturn:
        """Steps and records."""
        states, rewards, dones, rows = self.venv.step_wait()
        truncated, infos = np.zeros_like(dones), {}
        if dones.any():
            truncated = np.array([bool(row.get("TimeLimit.truncated")) for row in rows]) & dones
            infos = {
                "final_obs": [row.get("terminal_observation") for row in rows],
                "final_info": {"success": [row.get("is_success", row.get("success")) for row in rows]},
            }
        assert isinstance(states, np.ndarray)
        self.recorder.step(self._actions, states, rewards, dones & ~truncated, truncated, infos)
        return states, rewards, dones, rows


class OneHotCells(VecEnvWrapper):
    """Shows a Dark-Room specialist its cell as a one-hot vector, and where there is a key whether it is held.

    A specialist learns from this in a fraction of the steps, and Key-Door rooms become Markov for it. What is
    recorded underneath stays the raw (row, column).
    """

    def __init__(self, venv: VecEnv, rooms: DarkRoomVector) -> None:
        """Wraps an environment.

        Args:
            venv: `rooms`, shown to stable-baselines3 and usually recorded.
            rooms: The slots at the bottom of `venv`, all of one size.
        """
        self._rooms = rooms
        self._cols = rooms.rooms[0].cols
        cells = rooms.rooms[0].rows * self._cols
        keys = any(room.key is not None for room in rooms.rooms)
        # Without a key every agent counts as holding one: half of the features would never be used.
        self._held = cells if keys else 0
        self._rows = np.eye(cells + self._held, dtype=np.float32)
        space = gym.spaces.Box(0.0, 1.0, (cells + self._held,), np.float32)
        super().__init__(venv, observation_space=space)

    def _view(self, states: np.ndarray, has_key: np.ndarray) -> np.ndarray:
        cell = (states[..., 0] * self._cols + states[..., 1]).astype(np.int64)
        return self._rows[cell + has_key * self._held]

    def reset(self) -> np.ndarray:
        """Resets every slot."""
        return self._view(np.asarray(self.venv.reset()), self._rooms.has_key)

    def step_wait(self) -> VecEnvStepReturn:
        """Steps, and translates states and terminal observations."""
        states, rewards, dones, rows = self.venv.step_wait()
        for slot in np.flatnonzero(dones):
            final = rows[slot]["terminal_observation"]
            rows[slot]["terminal_observation"] = self._view(final, self._rooms.final_has_key[slot])
        return self._view(np.asarray(states), self._rooms.has_key), rewards, dones, rows


def slot_seeds(seed: int, num_envs: int) -> Sequence[int]:
    """Returns the seeds that Gymnasium and stable-baselines3 give an environment's slots, upwards from `seed`."""
    return range(seed, seed + num_envs)
