"""Atari: the frames that DQN-Replay holds, for the same play; its ends, cuts and rewards."""

from __future__ import annotations

import itertools
from pathlib import Path

import cv2
import numpy as np
import pytest

from lram.collectors import atari
from lram.collectors.atari import Console, make, rom_name
from lram.datasets.images import shrink
from lram.datasets.specs import BadInput, tasks

ale_py = pytest.importorskip("ale_py", reason="ale-py is not installed")

DATA = Path(__file__).parent / "data" / "atari" / "breakout.npz"
"""The first 80 steps that Dopamine's own replay buffer recorded of random play: 81 frames and 80 minimal actions."""


class Dopamine:
    """Dopamine's Atari preprocessing, written from its description straight onto the emulator."""

    def __init__(self, rom: str, random: np.random.Generator) -> None:
        self.ale, self.random, self.executed = ale_py.ALEInterface(), random, 0
        self.ale.setFloat("repeat_action_probability", 0.0)
        self.ale.loadROM(ale_py.roms.get_rom_path(rom))
        self.ale.reset_game()

    def gray(self) -> np.ndarray:
        return self.ale.getScreenGrayscale()

    @staticmethod
    def pool(last: np.ndarray, before: np.ndarray) -> np.ndarray:
        return cv2.resize(np.maximum(last, before), (84, 84), interpolation=cv2.INTER_AREA)

    def step(self, action: int) -> tuple[np.ndarray | None, float, bool]:
        """Returns the 84x84 frame (None when the game is over), the sum of rewards, and whether it is."""
        screens, total = [], 0.0
        for draw in self.random.random(4):
            # Sticky: with probability a quarter, what was executed at the last frame goes on.
            self.executed = self.executed if draw < 0.25 else action
            total += self.ale.act(self.ale.getLegalActionSet()[self.executed])
            if self.ale.game_over():
                return None, total, True
            screens.append(self.gray())
        return self.pool(screens[3], screens[2]), total, False


@pytest.mark.parametrize("task", ["breakout", "space-invaders"])
def test_frames_rewards_and_ends_are_dopamines(task):
    env = make(task, num_envs=2, seed=4, first_episode=[0, 3])
    states, infos = env.reset()
    assert states.shape == (2, 1, 64, 64) and states.dtype == np.uint8 and infos["score"].tolist() == [0, 0]
    generators = [np.random.default_rng(np.random.SeedSequence((4, slot, number))) for slot, number in ((0, 0), (1, 3))]
    originals = [Dopamine(rom_name(task), generator) for generator in generators]
    for original, state in zip(originals, states):
        first = original.pool(original.gray(), np.zeros((210, 160), np.uint8))
        np.testing.assert_array_equal(state, shrink(first[None]))
    rng, score, big = np.random.default_rng(0), 0.0, 0
    for _ in range(1000):
        action = rng.integers(18, size=2)
        states, rewards, terminated, truncated, infos = env.step(action)
        for slot, original in enumerate(originals):
            frame, reward, over = original.step(int(action[slot]))
            assert rewards[slot] == np.clip(reward, -1, 1) and terminated[slot] == over and not truncated[slot]
            if frame is not None:
                np.testing.assert_array_equal(states[slot], shrink(frame[None]))
            else:
                last = original.pool(original.gray(), original.gray())
                np.testing.assert_array_equal(infos["final_obs"][slot], shrink(last[None]))
            if slot == 0:
                score, big = score + reward, big + (reward > 1)
                assert (infos["final_info"] if over else infos)["score"][0] == score
        if terminated.any():
            break
    assert terminated.any() and (task == "breakout" or big)


def test_recorded_frames_come_back_from_the_same_play():
    """Searches the sticky draws that lead from each recorded frame to the next; every frame has to be found."""
    with np.load(DATA) as file:
        frames, played = file["observation"], file["action"]
    console, state = Console("breakout"), np.empty((1, 64, 64), np.uint8)
    ale = console.ale
    console.start(np.random.SeedSequence(0), state)
    np.testing.assert_array_equal(console.frame, frames[0])
    np.testing.assert_array_equal(state, shrink(frames[:1]))
    full = [0, 1, 3, 4]  # Breakout's minimal actions among the 18
    places = [(ale.cloneState(), 0)]
    for action, frame in zip(played, frames[1:]):
        found = {}
        for (place, before), sticks in itertools.product(places, itertools.product((1.0, 0.0), repeat=4)):
            ale.restoreState(place)
            console._action, console._random = before, Drawn(sticks)
            console.step(full[action], state)
            if np.array_equal(console.frame, frame):
                np.testing.assert_array_equal(state, shrink(frame[None]))
                found[ale.getRAM().tobytes(), console._action] = ale.cloneState(), console._action
        assert found
        places = list(found.values())[:4]


class Drawn:
    """A generator whose next numbers are known."""

    def __init__(self, numbers: tuple[float, ...]) -> None:
        self.numbers = numbers

    def random(self, size: int) -> np.ndarray:
        return np.array(self.numbers[:size])


@pytest.mark.parametrize("task", ["assault", "breakout", "beam-rider", "time-pilot"])
def test_episodes_leave_no_trace(task):
    # In all of these but Breakout, the emulator's own reset lets the last game show in the next.
    env, rng = make(task, seed=1), np.random.default_rng(0)
    env.reset()
    for action in rng.integers(18, size=(300, 1)):
        env.step(action)
    states, number = env.reset()[0], int(env.episodes[0])
    fresh = make(task, seed=1, first_episode=number)
    np.testing.assert_array_equal(fresh.reset()[0], states)
    for action in rng.integers(18, size=(100, 1)):
        ours, theirs = fresh.step(action), env.step(action)
        np.testing.assert_array_equal(ours[0], theirs[0])
        np.testing.assert_array_equal(ours[4]["score"], theirs[4]["score"])


def test_the_time_limit_truncates(monkeypatch):
    assert atari.HORIZON == 27_000
    monkeypatch.setattr(atari, "HORIZON", 20)
    env = make("breakout")
    env.reset()
    for number in range(1, 41):
        _, _, terminated, truncated, _ = env.step(np.array([0]))
        assert not terminated[0] and truncated[0] == (number % 20 == 0)
    assert env.episodes[0] == 2


def test_every_task_has_its_cartridge():
    names = [name for domain, name in tasks() if domain == "atari"]
    assert len(names) == 46
    assert all(Path(ale_py.roms.get_rom_path(rom_name(name))).exists() for name in names)


def test_refuses_what_makes_no_sense():
    with pytest.raises(BadInput, match="no task 'Breakout'"):
        make("Breakout")
    env = make("breakout")
    env.reset()
    for action in (18, -1):
        with pytest.raises(ValueError, match=r"none of 0\.\.17"):
            env.step(np.array([action]))
