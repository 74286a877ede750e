"""Dark-Rooms of which some break: what `tests/test_train_rollouts.py` gives to the worker processes.

A task of goal column C breaks in its episode 1, at step 3: C = 1 raises, 2 returns NaN, 3 hangs, 4 kills its process.
"""

import os
import time

import numpy as np

from lram.collectors.darkroom import DarkRoomVector, parse_task
from lram.datasets.specs import BadInput


class Breaking(DarkRoomVector):
    def __init__(self, task, episode):
        super().__init__([task])
        self.kind, self.episode, self.count = parse_task(task).goal[1], episode, 0

    def step(self, actions):
        self.count += 1
        if self.episode == 1 and self.count == 3:
            if self.kind == 1:
                raise RuntimeError("the physics exploded")
            if self.kind == 3:
                time.sleep(3600)
            if self.kind == 4:
                os._exit(7)
        states, rewards, terminated, truncated, infos = super().step(actions)
        if self.episode == 1 and self.count == 3 and self.kind == 2:
            states = states * np.float32("nan")
        if truncated[0]:
            self.episode, self.count = self.episode + 1, 0
        return states, rewards, terminated, truncated, infos


class SlowToStart:
    """Makes what `make` does, in a process that takes six seconds to start."""

    def __call__(self, *arguments):
        return make(*arguments)

    def __reduce__(self):
        return _slowly, ()


def _slowly():
    time.sleep(6)
    return SlowToStart()


def make(domain, task, num_envs, seed, first_episode):
    if parse_task(task).goal == (4, 4):
        raise BadInput("room5x5 needs a package that is not installed")
    return Breaking(task, first_episode)
