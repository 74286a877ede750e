"""DMControl: dm_control's own tasks in their native layout, 1,000 steps an episode, one control step per action.

    from lram.collectors.dmcontrol import make, state_layout
    env = make("walker-stand", num_envs=1, seed=0)
    states, infos = env.reset()                             # (1, 24) float32
    states, rewards, terminated, truncated, infos = env.step(env.action_space.sample())
    state_layout("walker-stand")                            # {"orientations": [0, 14], "height": [14, 15], …}

Tasks are named domain-task, as dm_control names the two: `walker-stand`, `finger-turn_easy`, `ball_in_cup-catch`.
A state is the task's observations end to end, in dm_control's order. Physics, rewards and the end of an episode are
dm_control's; only the flattening is ours. No display is needed.
What it trades away: dm_control steps in 20 to 70 microseconds, of which MuJoCo has a tenth to a half. The rest is
dm_control's named indexing in rewards and observations, which could only be had back by writing its tasks again.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np

from lram.collectors.slots import Slots
from lram.datasets.specs import BadInput

INSTALL = 'pip install "lram[dmcontrol]"'


def make(task: str, num_envs: int = 1, seed: int = 0, first_episode: int | Sequence[int] = 0) -> Slots:
    """Builds `num_envs` slots of one task.

    Args:
        task: Name, `walker-stand` for example.
        num_envs: Slots.
        seed: Of all episodes: episode k of slot i is a function of (seed, i, k).
        first_episode: Number of the first episode, for all slots or for each.

    Raises:
        BadInput: There is no such task, or dm_control is not installed.
    """
    return Slots(partial(Control, task), num_envs, seed, first_episode)


def state_layout(task: str) -> dict[str, list[int]]:
    """Returns where each of a task's observations is in its states: {key: [start, stop]}."""
    return Control(task).state_layout


class Control:
    """One dm_control environment, as `Slots` wants it.

    Attributes:
        env: The dm_control environment.
        observation_space: (D,) float32.
        action_space: (A,) float32 in [-1, 1].
        state_layout: {key: [start, stop]} over the columns of its states.
    """

    def __init__(self, task: str) -> None:
        self.env = _load(task)
        spec = self.env.action_spec()
        # Not so of quadruped and lqr; the policy acts in [-1, 1], and what is stored has to be what was executed.
        if not ((spec.minimum == -1.0) & (spec.maximum == 1.0)).all():
            raise BadInput(f"dmcontrol task {task!r} takes actions outside [-1, 1], which trajectories cannot hold")
        self.state_layout: dict[str, list[int]] = {}
        width = 0
        for key, value in self.env.observation_spec().items():
            self.state_layout[key] = [width, width := width + int(np.prod(value.shape))]
        self.observation_space: gym.spaces.Box = gym.spaces.Box(-np.inf, np.inf, (width,), np.float32)
        self.action_space: gym.Space = gym.spaces.Box(-1.0, 1.0, spec.shape, np.float32)

    def start(self, seeds: np.random.SeedSequence, state: np.ndarray) -> None:
        """Starts an episode whose initial state is drawn with `seeds`."""
        self.env.task.random.seed(seeds.generate_state(8))
        self._write(self.env.reset().observation, state)

    def step(self, action: np.ndarray, state: np.ndarray) -> tuple[float, bool, bool]:
        """Takes one control step; dm_control says with a discount of 0 that the task has ended the episode."""
        moment = self.env.step(action)
        self._write(moment.observation, state)
        last = moment.last()
        return moment.reward, last and moment.discount == 0.0, last and moment.discount != 0.0

    def _write(self, observation: dict[str, Any], state: np.ndarray) -> None:
        for (start, stop), value in zip(self.state_layout.values(), observation.values()):
            # The common case spares the reshape: values are vectors, or numbers where they fill one column.
            state[start:stop] = value if np.ndim(value) < 2 else np.ravel(value)

    def info(self) -> dict[str, bool | float]:
        """Returns nothing: DMControl knows no success."""
        return {}

    def close(self) -> None:
        """Frees MuJoCo's model and data."""
        self.env.physics.free()


def _load(task: str) -> Any:
    """Loads a task of dm_control's suite."""
    try:
        with warnings.catch_warnings():
            # Without a display, looking for a way to render warns; nothing here renders.
            warnings.simplefilter("ignore")
            from dm_control import suite
    except ImportError as error:
        raise BadInput(f"dmcontrol needs the package dm-control: {INSTALL} ({error})") from error
    domain, _, name = task.partition("-")
    if (domain, name) not in suite.ALL_TASKS:
        raise BadInput(f"dmcontrol has no task {task!r}; names are like 'walker-stand' or 'finger-turn_easy'")
    return suite.load(domain, name, task_kwargs={"random": 0})
