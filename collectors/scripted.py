"""Expert data for all 50 Meta-World tasks in minutes: the package's own scripted policies, with noise on their actions.

    settings = ScriptedSettings(episodes=100, noise=0.1)
    for task in ("reach-v2", "push-v2"):                # or over processes: collect_scripted pickles
        print(collect_scripted(settings, task, Path("data")))

The policy sees the state that is stored, goal included, and what is stored is the action that was executed: the
script's plus noise, clipped to [-1, 1]. Failures are stored too, with `success` false. An episode is a function of
the seed, the task and its number alone, so a killed collection goes on after its last whole file, and a finished one
can be made longer, as if it had been one run.
What it trades away: scripts solve a task and do not maximise its shaped reward: with the button pressed the hand
leaves, and the return stays far below a specialist's. Some tasks they solve only mostly.
"""

from __future__ import annotations

import importlib.metadata
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lram.collectors.metaworld import make, package_name
from lram.collectors.recorder import Recorder
from lram.datasets.index import read_index, task_folder
from lram.datasets.specs import BadInput
from lram.datasets.writer import TaskWriter, finished, same_provenance

DOMAIN = "metaworld"


@dataclass(frozen=True)
class ScriptedSettings:
    """Settings of Meta-World's scripted policies."""

    episodes: int = 100
    """Trajectories per task; can be raised later, and only the missing ones are made."""
    noise: float = 0.1
    """Standard deviation of the normal noise that is added to every action before it is clipped to [-1, 1]."""
    seed: int = 0
    """Seed from which every task's own is derived."""


def collect_scripted(settings: ScriptedSettings, task: str, root: Path) -> dict[str, Any]:
    """Records a task's scripted policy.

    Args:
        settings: How.
        task: Name of the task.
        root: The dataset's directory.

    Returns:
        `task`, `skipped` (there were as many on disk), `episodes`, `steps`, `success_rate`, `mean_return`, and
        `seconds` that it took.

    Raises:
        BadInput: There is no such task, its folder was made with other settings, or Meta-World is not installed.
    """
    started = time.perf_counter()
    root = Path(root)
    name = package_name(task)
    if settings.episodes < 1 or settings.noise < 0 or settings.seed < 0:
        raise BadInput(f"expected at least one episode, and neither noise nor seed below 0: {settings}")
    provenance = _provenance(settings)
    folder = task_folder(root, DOMAIN, task)
    old = finished(root, DOMAIN, task)
    # What is on disk stays as it is when a library is updated: only settings count.
    if old is not None:
        same_provenance(old, provenance, folder, free=frozenset({"source"}))
    skipped = old is not None and read_index(folder).table.num_rows >= settings.episodes
    if not skipped:
        with TaskWriter(root, DOMAIN, task, provenance) as writer:
            _play(settings, task, name, writer)
            writer.finish()
    index = read_index(folder)
    return {
        "task": task,
        "skipped": skipped,
        "episodes": index.table.num_rows,
        "steps": int(index.numpy("length").sum()),
        "success_rate": float(np.mean(index.table["success"].to_pylist())),
        "mean_return": float(index.numpy("return").mean()),
        "seconds": time.perf_counter() - started,
    }


def _play(settings: ScriptedSettings, task: str, name: str, writer: TaskWriter) -> None:
    """Plays the episodes that are missing, one slot, in order."""
    from metaworld.policies import ENV_POLICY_MAP

    script: Any = ENV_POLICY_MAP[name]
    # The task's name is part of the seed: no two tasks share their noise.
    seed = int(np.random.SeedSequence((settings.seed, *task.encode())).generate_state(1)[0])
    first = writer.next_episode
    env = make(task, seed=seed, first_episode=first)
    recorder = Recorder(writer, DOMAIN, task, seeds=[seed], source=_source(), action_space=env.single_action_space)
    states, _ = env.reset()
    recorder.reset(states)
    for episode in range(first, settings.episodes):
        # A new policy for every episode: whatever one remembers goes with it.
        policy, noise = script(), np.random.default_rng((seed, episode))
        ended = False
        while not ended:
            with warnings.catch_warnings():
                # "Constant(s) may be too high": actions are clipped.
                warnings.simplefilter("ignore")
                action = policy.get_action(states[0].astype(np.float64))
            # The environment and the recorder clip it, both.
            action = (action + settings.noise * noise.standard_normal(4)).astype(np.float32)[None]
            states, rewards, terminated, truncated, infos = env.step(action)
            recorder.step(action, states, rewards, terminated, truncated, infos)
            ended = bool(truncated[0])
    recorder.close()
    env.close()


def _source() -> str:
    """Says who made the trajectories."""
    names = ("lram", "metaworld", "mujoco", "numpy")
    return "Meta-World scripted policy: " + ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)


def _provenance(settings: ScriptedSettings) -> dict[str, Any]:
    """Returns what decides the content of a task's files; how many there are does not."""
    return {"collector": "metaworld-scripted", "noise": settings.noise, "seed": settings.seed, "source": _source()}
