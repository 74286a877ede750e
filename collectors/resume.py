"""Checkpoints of specialists: what a killed run needs to go on as if it had not been.

    save(folder, {"agent": agent_state(agent), "random": random_state(agent), "recorder": recorder.state()})
    state = load(folder)                                     # None when there is none
    restore_agent(agent, state["agent"])
    restore_random(agent, state["random"])                   # last: building an environment may draw

The checkpoint is one hidden file in the task's folder, `.checkpoint.pt`, written whole, so that all of it is of the
same moment. It holds networks, optimizers (the entropy coefficient's too), normalisation, counters and the state of
every random generator, as tensors and plain values: it is loaded without unpickling objects. The replay buffer is
not in it: the trajectories on disk hold the same transitions, and `refill` reads them back. The last checkpoint stays
where it is: it is the specialist.
"""

from __future__ import annotations

import io
import random
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.save_util import recursive_getattr
from stable_baselines3.common.vec_env import VecNormalize

from lram.datasets.index import trajectory_path
from lram.datasets.specs import BadInput
from lram.datasets.trajectory import read, write_whole

CHECKPOINT = ".checkpoint.pt"


def save(folder: Path, state: dict[str, Any]) -> None:
    """Writes a task's checkpoint whole, in place of the one before."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_whole(folder / CHECKPOINT, buffer.getvalue())


def load(folder: Path) -> dict[str, Any] | None:
    """Reads a task's checkpoint, None when there is none.

    Raises:
        BadInput: It is unreadable, or holds more than tensors and plain values.
    """
    path = folder / CHECKPOINT
    if not path.exists():
        return None
    try:
        return torch.load(path, weights_only=True, map_location="cpu")
    except (OSError, RuntimeError, ValueError, EOFError, UnpicklingError) as error:
        said = "unsafe content" if isinstance(error, UnpicklingError) else error
        raise BadInput(f"{path}: not a readable checkpoint ({said}); remove the folder to begin again") from error


def agent_state(agent: BaseAlgorithm) -> dict[str, Any]:
    """Returns all that an agent has learned and counted, without its replay buffer."""
    modules, variables = agent._get_torch_save_params()
    norm = agent.get_vec_normalize_env()
    return {
        "modules": {name: recursive_getattr(agent, name).state_dict() for name in modules},
        "variables": {name: recursive_getattr(agent, name).detach() for name in variables},
        "normaliser": None if norm is None else normaliser_state(norm),
        "steps": agent.num_timesteps,
        "updates": agent._n_updates,
        "episodes": agent._episode_num,
    }


def restore_agent(agent: BaseAlgorithm, state: dict[str, Any]) -> None:
    """Puts what `agent_state` returned into an agent of the same settings."""
    for name, values in state["modules"].items():
        recursive_getattr(agent, name).load_state_dict(values)
    for name, value in state["variables"].items():
        # In place: the optimizer of an entropy coefficient holds this very tensor.
        recursive_getattr(agent, name).data.copy_(value)
    norm = agent.get_vec_normalize_env()
    if norm is not None:
        restore_normaliser(norm, state["normaliser"])
    agent.num_timesteps, agent._n_updates, agent._episode_num = state["steps"], state["updates"], state["episodes"]


def normaliser_state(norm: VecNormalize) -> dict[str, float]:
    """Returns the running statistics of returns, by which rewards are divided."""
    return {"mean": float(norm.ret_rms.mean), "var": float(norm.ret_rms.var), "count": float(norm.ret_rms.count)}


def restore_normaliser(norm: VecNormalize, state: dict[str, float]) -> None:
    """Puts what `normaliser_state` returned into another normaliser."""
    norm.ret_rms.mean, norm.ret_rms.var = np.array(state["mean"]), np.array(state["var"])
    norm.ret_rms.count = state["count"]


def random_state(agent: BaseAlgorithm) -> dict[str, Any]:
    """Returns the state of every generator that an agent draws from: Python's, NumPy's, torch's, its actions'."""
    name, keys, *rest = np.random.get_state()  # noqa: NPY002  (stable-baselines3 samples its buffer with it)
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys, np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "actions": agent.action_space.np_random.bit_generator.state,
    }


def restore_random(agent: BaseAlgorithm, state: dict[str, Any]) -> None:
    """Sets every generator to what `random_state` returned."""
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    agent.action_space.np_random.bit_generator.state = state["actions"]


def refill(buffer: ReplayBuffer, folder: Path, lengths: np.ndarray) -> None:
    """Puts a task's first trajectories back into an empty replay buffer of one slot, each where it was.

    Args:
        buffer: The buffer.
        folder: The task's folder.
        lengths: Transitions of each trajectory, from episode 0 on.

    Raises:
        BadInput: A trajectory is missing or unreadable.
    """
    size, total = buffer.buffer_size, int(lengths.sum())
    ends = np.cumsum(lengths)
    for episode, (end, length) in enumerate(zip(ends, lengths)):
        if end <= total - size:
            continue  # overwritten by later ones
        t = read(folder / trajectory_path(episode))
        assert t.final_state is not None and t.length == length
        rows = np.arange(end - length, end) % size
        buffer.observations[rows, 0] = t.states
        buffer.next_observations[rows, 0] = np.concatenate([t.states[1:], t.final_state[None]])
        buffer.actions[rows, 0] = t.actions
        buffer.rewards[rows, 0] = t.rewards
        buffer.dones[rows, 0] = t.dones
        # Of one slot, the end of an episode is a timeout unless the task ended it.
        buffer.timeouts[rows, 0] = t.dones & (not t.terminated)
    buffer.pos, buffer.full = total % size, total >= size
