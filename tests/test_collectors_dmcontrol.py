"""DMControl: dm_control's own numbers, episodes of 1,000 steps, and nothing left over from one to the next."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from lram.collectors.dmcontrol import make, state_layout
from lram.datasets.specs import BadInput, state_columns, tasks

suite = pytest.importorskip("dm_control.suite", reason="dm-control is not installed")

TASKS = [name for domain, name in tasks() if domain == "dmcontrol"]


def actions(env, count: int, seed: int = 0) -> np.ndarray:
    shape = (count, *env.action_space.shape)
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


@pytest.mark.parametrize("task", TASKS)
def test_every_task_lasts_1000_steps_and_leaves_no_trace(task):
    env = make(task, seed=3)
    played = actions(env, 1000)
    states = env.reset()[0]
    assert states.shape == (1, env.single_observation_space.shape[0]) and states.dtype == np.float32
    assert len(set(state_columns("dmcontrol", env.state_layout, states.shape[1]))) == states.shape[1]
    for number, action in enumerate(played, 1):
        states, _, terminated, truncated, infos = env.step(action)
        assert not terminated[0] and truncated[0] == (number == 1000)
    assert infos["final_obs"][0].shape == states[0].shape and (infos["final_obs"][0] != states[0]).any()
    assert env.episodes[0] == 1

    fresh = make(task, seed=3, first_episode=1)
    np.testing.assert_array_equal(fresh.reset()[0], states)
    for action in actions(env, 50, seed=1):
        ours, theirs = fresh.step(action), env.step(action)
        np.testing.assert_array_equal(ours[0], theirs[0])
        np.testing.assert_array_equal(ours[1], theirs[1])


@pytest.mark.parametrize("task", ["walker-stand", "cheetah-run", "finger-turn_easy", "ball_in_cup-catch"])
def test_numbers_are_dm_controls_own(task):
    env = make(task, num_envs=2, seed=7)
    played = actions(env, 1000)
    # Written out once more, one fresh environment an episode: a slot's generator, then dm_control alone.
    originals = []
    for slot in range(2):
        words = np.random.SeedSequence((7, slot, 0)).generate_state(8)
        random = np.random.RandomState(words)
        originals.append(suite.load(*task.split("-"), task_kwargs={"random": random}))

    def flat(observation):
        return np.concatenate([np.ravel(value) for value in observation.values()]).astype(np.float32)

    np.testing.assert_array_equal(env.reset()[0], [flat(original.reset().observation) for original in originals])
    for number, action in enumerate(played, 1):
        states, rewards, _, _, infos = env.step(action)
        moments = [original.step(row) for original, row in zip(originals, action)]
        expected = [flat(moment.observation) for moment in moments]
        np.testing.assert_array_equal(infos["final_obs"].tolist() if number == 1000 else states, expected)
        np.testing.assert_array_equal(rewards, np.float32([moment.reward for moment in moments]))
    assert all(moment.last() and moment.discount == 1.0 for moment in moments)


def test_layout_is_in_dm_controls_order():
    assert state_layout("walker-stand") == {"orientations": [0, 14], "height": [14, 15], "velocity": [15, 24]}


def test_actions_are_clipped_to_what_is_executed():
    once, twice = make("cartpole-swingup"), make("cartpole-swingup")
    once.reset(), twice.reset()
    inside, outside = once.step(np.ones((1, 1), np.float32)), twice.step(np.full((1, 1), 2, np.float32))
    np.testing.assert_array_equal(inside[0], outside[0])
    # Cartpole pays for small control: the reward, too, is of the action that was executed.
    np.testing.assert_array_equal(inside[1], outside[1])


def test_a_task_that_ends_early_is_terminated():
    env = make("acrobot-swingup")
    env.reset()
    original = env._slots[0].env
    original.task.get_termination = lambda physics: 0.0
    _, _, terminated, truncated, _ = env.step(np.zeros((1, 1), np.float32))
    assert terminated[0] and not truncated[0]


def test_needs_no_display_and_says_nothing():
    environment = {key: value for key, value in os.environ.items() if key not in ("DISPLAY", "MUJOCO_GL")}
    script = "from lram.collectors.dmcontrol import make; print(make('reacher-easy').reset()[0].shape)"
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("(1, 6)\n", "")


def test_refuses_what_is_no_task():
    with pytest.raises(BadInput, match="no task 'walker-fly'"):
        make("walker-fly")
    with pytest.raises(BadInput, match=r"'quadruped-walk' takes actions outside \[-1, 1\]"):
        make("quadruped-walk")
