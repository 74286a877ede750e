"""Procgen: EnvPool's own frames in gray, real last frames, and episodes that can be started at."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from lram.collectors.procgen import LEVELS, make
from lram.datasets.images import gray
from lram.datasets.specs import BadInput, tasks

try:
    make("coinrun")
except BadInput as reason:
    pytest.skip(str(reason), allow_module_level=True)

TASKS = [name for domain, name in tasks() if domain == "procgen"]


def slot_seed(seed: int, slot: int) -> int:
    return int(np.random.SeedSequence((seed, slot)).generate_state(1)[0]) >> 1


@pytest.mark.parametrize("task", ["bigfish", "starpilot", "coinrun"])
def test_frames_and_ends_are_envpools(task):
    import envpool

    slots, steps = 3, 1100 if task == "coinrun" else 400
    env = make(task, num_envs=slots, seed=5)
    states, infos = env.reset()
    assert states.shape == (slots, 1, 64, 64) and states.dtype == np.uint8 and infos == {}
    # One pool a slot, channels first, in EnvPool's own mode: the step after an end starts the next episode.
    settings = {"num_envs": 1, "num_levels": 200, "start_level": 0}
    originals = [
        envpool.make_gymnasium(f"{task.capitalize()}Easy-v0", env_seed=[slot_seed(5, slot)], **settings)
        for slot in range(slots)
    ]

    def one(rgb: np.ndarray) -> np.ndarray:
        return cv2.cvtColor(np.ascontiguousarray(rgb[0].transpose(1, 2, 0)), cv2.COLOR_RGB2GRAY)[None]

    np.testing.assert_array_equal(states, [one(original.reset()[0]) for original in originals])
    rng, ends = np.random.default_rng(0), np.zeros(2, int)
    for _ in range(steps):
        action = rng.integers(15, size=slots)
        states, rewards, terminated, truncated, infos = env.step(action)
        for slot, original in enumerate(originals):
            rgb, reward, over, cut, _ = original.step(action[slot : slot + 1].astype(np.int32))
            assert (rewards[slot], terminated[slot], truncated[slot]) == (reward[0], over[0], cut[0])
            if over[0] or cut[0]:
                np.testing.assert_array_equal(infos["final_obs"][slot], one(rgb))
                rgb = original.step(np.zeros(1, np.int32))[0]
            np.testing.assert_array_equal(states[slot], one(rgb))
        ends += terminated.sum(), truncated.sum()
    assert ends[0] > 3 if task != "coinrun" else ends[1] > 0
    env.close()


def test_every_episode_can_be_started_at():
    played, steps = np.random.default_rng(0).integers(15, size=(500, 3)), 500
    env = make("bigfish", num_envs=3, seed=1)
    states = env.reset()[0]
    episodes: dict[tuple[int, int], list] = {}
    for step in range(steps):
        for slot in range(3):
            row = (states[slot], played[step, slot], int(env.levels[slot]))
            episodes.setdefault((slot, int(env.episodes[slot])), []).append(row)
        states = env.step(played[step])[0]
    for first in ([2, 0, 1], [0, 2, 2]):
        later = make("bigfish", num_envs=3, seed=1, first_episode=first)
        states = later.reset()[0]
        wanted = [episodes[slot, number] for slot, number in enumerate(first)]
        for step in range(min(map(len, wanted))):
            np.testing.assert_array_equal(states, [rows[step][0] for rows in wanted])
            assert later.levels.tolist() == [rows[step][2] for rows in wanted]
            states = later.step(np.array([rows[step][1] for rows in wanted]))[0]
        later.close()
    assert all(0 <= rows[0][2] < LEVELS for rows in episodes.values())
    assert len({rows[0][2] for rows in episodes.values()}) > 3
    again, first = env.reset(seed=1)[0], [episodes[slot, 0][0][0] for slot in range(3)]
    np.testing.assert_array_equal(again, first)
    assert env.episodes.tolist() == [0, 0, 0]
    assert not np.array_equal(env.reset(seed=2)[0], first)
    env.close()


def test_reset_goes_on():
    env = make("maze", num_envs=2, seed=3)
    env.reset()
    second = env.reset()[0]
    assert env.episodes.tolist() == [1, 1]
    np.testing.assert_array_equal(make("maze", num_envs=2, seed=3, first_episode=1).reset()[0], second)


@pytest.mark.parametrize("task", TASKS)
def test_every_task_resets_and_steps(task):
    env = make(task, num_envs=2)
    states = env.reset()[0]
    assert env.single_action_space.n == 15 and states.std() > 0
    assert env.step(np.array([0, 14]))[0].shape == (2, 1, 64, 64)
    env.close()


def test_gray_is_the_converters():
    """The converter takes (T, 3, 64, 64) episodes and weighs their colours by the same function."""
    import envpool

    rgb = envpool.make_gymnasium("CoinrunEasy-v0", env_seed=[slot_seed(0, 0)], num_envs=1, num_levels=200).reset()[0]
    np.testing.assert_array_equal(make("coinrun").reset()[0][:, 0], gray(rgb.transpose(0, 2, 3, 1)))


def test_refuses_what_makes_no_sense():
    with pytest.raises(BadInput, match="no task 'tetris'"):
        make("tetris")
    for arguments in ({"num_envs": 0}, {"seed": -1}, {"first_episode": -1}):
        with pytest.raises(BadInput, match="expected at least one slot"):
            make("coinrun", **arguments)
    env = make("coinrun", num_envs=2)
    env.reset()
    for actions in ([0], [0, 15], [-1, 0]):
        with pytest.raises(ValueError, match=r"2 integers 0\.\.14"):
            env.step(np.array(actions))
