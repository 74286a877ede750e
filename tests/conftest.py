"""Small real datasets that several tests share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings

from lram.collectors.specialists import DarkRoomSettings, tasks_of, train_goal
from lram.datasets.trajectory import Trajectory
from lram.datasets.writer import TaskWriter

torch.set_num_threads(1)
# Speed is measured in `lram bench`, never asserted in a test.
settings.register_profile("lram", deadline=None)
settings.load_profile("lram")

Make = Callable[..., Trajectory]


@pytest.fixture(scope="session")
def make() -> Make:
    """Makes trajectories of any domain with random content, seeded by the episode."""

    def make(domain: str = "darkroom", episode: int = 0, length: int = 20, task: str = "task", **fields) -> Trajectory:
        rng = np.random.default_rng([episode, length])
        layout = None
        if domain in ("atari", "procgen"):
            # Smooth frames: noise would not compress.
            ramp = rng.integers(0, 4, (length, 1, 1, 1)) * np.arange(64, dtype=np.uint8)
            states = np.broadcast_to(ramp, (length, 1, 64, 64)).astype(np.uint8)
            actions = rng.integers(0, 15, length)
        elif domain == "darkroom":
            states = rng.integers(0, 5, (length, 2)).astype(np.float32)
            actions = rng.integers(0, 5, length)
        else:
            width = {"composuite": 93, "dmcontrol": 5, "metaworld": 39}[domain]
            states = rng.standard_normal((length, width), np.float32)
            actions = rng.uniform(-1, 1, (length, 4)).astype(np.float32)
            if domain == "dmcontrol":
                layout = {"position": [0, 3], "velocity": [3, 5]}
        given = {
            "states": states,
            "actions": actions,
            "rewards": rng.integers(0, 2, length).astype(np.float32),
            "seed": episode,
            "terminated": False,
            "truncated": True,
            "source": "test",
            "final_state": states[-1],
            "state_layout": layout,
        }
        return Trajectory(domain=domain, task=task, episode=episode, **(given | fields))

    return make


@pytest.fixture
def write(make: Make) -> Callable[..., Path]:
    """Writes a task of `count` trajectories and returns its folder."""

    def write(root: Path, domain: str = "darkroom", task: str = "task", count: int = 12, **fields) -> Path:
        with TaskWriter(root, domain, task, {"maker": "test"}) as writer:
            for episode in range(count):
                writer.add(make(domain, episode, task=task, **fields))
            writer.finish()
        return root / domain / task

    return write


@pytest.fixture(scope="session")
def in_pieces() -> Callable[..., tuple[torch.Tensor, Any]]:
    """Runs a backbone's `step` over pieces of a sequence, whose lengths are `cuts` in turn."""

    def run(model, x, cuts, state=None):
        outputs, start = [], 0
        while start < x.shape[1]:
            size = cuts[len(outputs) % len(cuts)]
            y, state = model.step(x[:, start : start + size], state)
            outputs.append(y)
            start += size
        return torch.cat(outputs, 1), state

    return run


@pytest.fixture(scope="session")
def rooms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real Dark-Room dataset: specialists of the seven training goals of 3x3, 200 episodes each."""
    root = tmp_path_factory.mktemp("rooms")
    settings = DarkRoomSettings(size=3, horizon=6, steps=1200, learning_rate=1e-2)
    for task in tasks_of(settings, "training"):
        train_goal(settings, task, root)
    return root
