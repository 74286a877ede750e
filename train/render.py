"""Simulates an episode of DMControl or Meta-World a second time, and renders it with MuJoCo.

    scenes = render(trajectory, seed=0, every=2, side=256)          # in a process where MUJOCO_GL was set first

An episode follows from its seed, number and actions, so the states come out as they were; that is checked.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lram.datasets.trajectory import Trajectory
from lram.train.simulators import FIRST_SEED


class RenderError(RuntimeError):
    """There is no way to render here."""


def render(trajectory: Trajectory, seed: int, every: int, side: int) -> list[np.ndarray]:
    """Returns every `every`-th scene of an episode, each (side, side, 3) uint8.

    Args:
        trajectory: As an evaluation with the seed played it.
        seed: The evaluation's.
        every: Steps from one scene to the next.
        side: Height and width, in pixels.

    Raises:
        RenderError: MuJoCo finds no graphics.
        RuntimeError: The episode comes out otherwise.
    """
    from lram.collectors import dmcontrol, metaworld

    slot = (dmcontrol.Control if trajectory.domain == "dmcontrol" else metaworld.Sawyer)(trajectory.task)
    import mujoco

    camera: Any = "corner"
    if isinstance(slot, dmcontrol.Control):
        model, data = slot.env.physics.model.ptr, slot.env.physics.data.ptr
        camera = 0 if model.ncam else -1
    else:
        model, data = slot.env.model, slot.env.data
    turn = -1 if camera == "corner" else 1  # Meta-World's camera is upside down
    try:
        renderer = mujoco.Renderer(model, side, side)
    except Exception as error:  # whatever the graphics driver says
        raise RenderError(str(error)) from error
    state = np.empty(slot.observation_space.shape, np.float32)
    slot.start(np.random.SeedSequence((FIRST_SEED + seed, 0, trajectory.episode)), state)
    scenes = []
    for t, action in enumerate(trajectory.actions):
        if not np.array_equal(state, trajectory.states[t]):
            raise RuntimeError(f"{trajectory.domain}/{trajectory.task}: step {t} does not come out as it was")
        if t % every == 0:
            renderer.update_scene(data, camera)
            scenes.append(renderer.render()[::turn, ::turn].copy())
        slot.step(action, state)
    renderer.close()
    slot.close()
    return scenes
