"""Atari: frames, actions and episode ends made as DQN-Replay's were, for Arcade Learning Environment games.

    from lram.collectors.atari import make
    env = make("breakout", num_envs=8, seed=0)
    states, infos = env.reset()                             # (8, 1, 64, 64) uint8
    states, rewards, terminated, truncated, infos = env.step(env.action_space.sample())
    infos["score"]                                          # unclipped, of the episode so far

As in Dopamine, which recorded DQN-Replay: an action lasts four frames; at each of them the one before it goes on
instead with probability 0.25; the console's own gray, the pixelwise maximum of the last two frames, 84x84 by area;
only the end of the game terminates, and 27,000 steps truncate. Then 64x64 by area, as the converter does. Actions
are all 18; rewards are clipped to [-1, 1] as in the data.
Two things differ. The repetition of actions is drawn here and not in the console, the only chance there is in these
games, so that an episode depends on its number alone. And the state after game over shows the screen as it was left,
where Dopamine shows the step before; DQN-Replay holds neither.
What it trades away: one process, some 3,000 steps a second on a core, of which the console takes three quarters.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import cv2
import gymnasium as gym
import numpy as np

from lram.collectors.slots import Slots
from lram.datasets.images import shrink
from lram.datasets.specs import IMAGE_SIDE, NUM_DISCRETE, BadInput, tasks

INSTALL = 'pip install "lram[atari]"'
FRAME_SKIP = 4
"""Frames that an action lasts."""
STICKY = 0.25
"""Probability that the action of the frame before goes on, at every frame."""
HORIZON = 27_000
"""Steps after which an episode is cut: half an hour of play."""
SIDE = 84
"""Height and width of DQN-Replay's frames, in pixels."""


def make(task: str, num_envs: int = 1, seed: int = 0, first_episode: int | Sequence[int] = 0) -> Slots:
    """Builds `num_envs` slots of one game.

    Args:
        task: Name, `breakout` for example.
        num_envs: Slots.
        seed: Of all episodes: episode k of slot i is a function of (seed, i, k).
        first_episode: Number of the first episode, for all slots or for each.

    Raises:
        BadInput: There is no such task, or ale-py is not installed.
    """
    return Slots(partial(Console, task), num_envs, seed, first_episode)


class Console:
    """One game, as `Slots` wants it.

    Attributes:
        ale: The emulator.
        frame: What Dopamine would store at this moment, (84, 84) uint8.
        observation_space: (1, 64, 64) uint8.
        action_space: 18 actions.
        state_layout: Empty: states are images.
    """

    def __init__(self, task: str) -> None:
        self.ale = _load(task)
        # Restored at every start: resetting the game leaves traces of the last one in some games.
        self._cold = self.ale.cloneState()
        self._actions = self.ale.getLegalActionSet()
        self._screens = np.zeros((2, *self.ale.getScreenDims()), np.uint8)
        self.frame = np.zeros((SIDE, SIDE), np.uint8)
        self.observation_space: gym.spaces.Box = gym.spaces.Box(0, 255, (1, IMAGE_SIDE, IMAGE_SIDE), np.uint8)
        self.action_space: gym.Space = gym.spaces.Discrete(NUM_DISCRETE)
        self.state_layout: dict[str, list[int]] = {}

    def start(self, seeds: np.random.SeedSequence, state: np.ndarray) -> None:
        """Starts a game in which `seeds` decide where actions stick."""
        self._random = np.random.default_rng(seeds)
        self._steps, self._score, self._action = 0, 0.0, 0
        self.ale.restoreState(self._cold)
        self.ale.reset_game()
        self.ale.getScreenGrayscale(self._screens[0])
        self._screens[1] = 0
        self._write(state)

    def step(self, action: np.int64, state: np.ndarray) -> tuple[float, bool, bool]:
        """Plays one action for four frames, or until the game is over; returns the clipped reward."""
        if not 0 <= action < NUM_DISCRETE:
            raise ValueError(f"action {action} is none of 0..{NUM_DISCRETE - 1}")
        reward, over = 0.0, False
        for frame, draw in enumerate(self._random.random(FRAME_SKIP)):
            if draw >= STICKY:
                self._action = int(action)
            reward += self.ale.act(self._actions[self._action])
            over = self.ale.game_over()
            if over:
                self.ale.getScreenGrayscale(self._screens[0])
                self._screens[1] = 0
                break
            if frame >= FRAME_SKIP - 2:
                self.ale.getScreenGrayscale(self._screens[frame - (FRAME_SKIP - 2)])
        self._steps += 1
        self._score += reward
        self._write(state)
        return min(max(reward, -1.0), 1.0), over, not over and self._steps >= HORIZON

    def _write(self, state: np.ndarray) -> None:
        pooled = np.maximum(*self._screens)
        cv2.resize(pooled, (SIDE, SIDE), dst=self.frame, interpolation=cv2.INTER_AREA)
        state[:] = shrink(self.frame[None])

    def info(self) -> dict[str, bool | float]:
        """Returns the game's own score so far, unclipped."""
        return {"score": self._score}

    def close(self) -> None:
        """Nothing to free."""


def rom_name(task: str) -> str:
    """Returns what the emulator calls a game: `kung_fu_master` for `kung-fu-master`.

    Raises:
        BadInput: There is no such task.
    """
    known = tasks().get(("atari", task))
    if known is None:
        raise BadInput(f"atari has no task {task!r}; names are like 'breakout' or 'kung-fu-master'")
    game = known.env_id.removeprefix("ALE/").removesuffix("-v5")
    return re.sub(r"(?<!^)(?=[A-Z])", "_", game).lower()


def _load(task: str) -> Any:
    """Returns an emulator with the game's cartridge in, and no randomness of its own."""
    try:
        import ale_py
    except ImportError as error:
        raise BadInput(f"atari needs the package ale-py: {INSTALL} ({error})") from error
    # It greets on standard error otherwise.
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    ale = ale_py.ALEInterface()
    ale.setFloat("repeat_action_probability", 0.0)
    ale.setInt("random_seed", 0)
    cartridge = ale_py.roms.get_rom_path(rom_name(task))
    if cartridge is None:
        raise BadInput(f"atari: ale-py {ale_py.__version__} has no cartridge {rom_name(task)!r}")
    ale.loadROM(cartridge)
    return ale
