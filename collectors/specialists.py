"""Trains one PPO agent per Dark-Room goal and records every transition of its training, in order.

    settings = DarkRoomSettings(size=5, horizon=20, steps=20_000)
    for task in tasks_of(settings, "training"):         # or over processes: train_goal pickles
        print(train_goal(settings, task, Path("data")))

The learning history is the product, as Algorithm Distillation needs it: from random walking to the shortest path,
gradually. The agent is stable-baselines3's PPO, told its cell as a one-hot vector; what is recorded is the raw
(row, column). The same settings give the same files, byte for byte, on the same versions and machine.
A goal that is complete on disk is not trained again; one that a kill left half-done is trained from its first
episode, which rewrites the same files.
What it trades away: Dark-Room runs at 25,000 to 40,000 steps a second, so nothing is checkpointed within a goal.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lram.collectors.darkroom import Room, make, parse_task, rooms, task_name
from lram.collectors.defaults import defaults, source
from lram.collectors.recorder import Recorder
from lram.datasets.index import read_index, task_folder
from lram.datasets.specs import BadInput
from lram.datasets.writer import TaskWriter, finished, same_provenance

DOMAIN = "darkroom"
_DEFAULTS = defaults("ppo", DOMAIN)


@dataclass(frozen=True)
class DarkRoomSettings:
    """Settings of the Dark-Room specialists; the defaults are the paper's 10x10 rooms at 100,000 steps a goal.

    How they learn stands in settings/ppo_darkroom.yaml.
    """

    size: int = 10
    """Side of the square grid, in cells."""
    horizon: int = 0
    """Steps per episode; 0 stands for one per cell."""
    sparse: bool = False
    """Pay only the first step on the goal in an episode, not every one."""
    keydoor: bool = False
    """Dark Key-Door: a key has to be found before the goal pays."""
    steps: int = _DEFAULTS["steps"]
    """Transitions per goal, rounded up to whole episodes in every slot."""
    seed: int = 0
    """Seed from which every goal's own is derived."""
    num_envs: int = _DEFAULTS["num_envs"]
    """Slots that one agent acts in at once."""
    learning_rate: float = _DEFAULTS["learning_rate"]
    """Adam's step size; 1e-3 stretches the improvement over twice as many episodes, 3e-3 shortens it."""
    epochs: int = _DEFAULTS["epochs"]
    """Passes over the transitions of an update; an update follows one episode in every slot."""
    minibatches: int = _DEFAULTS["minibatches"]
    """Pieces that the transitions of an update are cut into."""
    gamma: float = _DEFAULTS["gamma"]
    """Discount."""
    gae_lambda: float = _DEFAULTS["gae_lambda"]
    """Lambda of the generalised advantage estimate."""
    entropy: float = _DEFAULTS["entropy"]
    """Weight of the entropy bonus."""
    hidden: int = _DEFAULTS["hidden"]
    """Width of the one hidden layer of policy and value."""


def rooms_of(settings: DarkRoomSettings, goals: Literal["all", "training", "holdout"] = "all") -> list[Room]:
    """Lists the rooms of all, of the training, or of the hold-out goals, training goals first."""
    training, holdout = rooms(settings.size, settings.keydoor, settings.sparse, settings.horizon)
    return {"all": training + holdout, "training": training, "holdout": holdout}[goals]


def tasks_of(settings: DarkRoomSettings, goals: Literal["all", "training", "holdout"] = "all") -> list[str]:
    """Lists the task names of all, of the training, or of the hold-out goals, training goals first."""
    return [task_name(room) for room in rooms_of(settings, goals)]


def train_goal(settings: DarkRoomSettings, task: str, root: Path) -> dict[str, Any]:
    """Trains one specialist on one goal and records all of its training.

    Args:
        settings: How; the goal's seed is derived from `settings.seed` and its place in `tasks_of(settings)`.
        task: Which goal, one of `tasks_of(settings)`.
        root: The dataset's directory.

    Returns:
        `task`, `skipped` (it was complete on disk), `episodes`, `steps`, `first_return` and `last_return` (means
        over the first and last tenth of the episodes), `best_return` (of an agent that knows the goal), and
        `seconds` that it took.

    Raises:
        BadInput: The task is none of these settings, or its folder was made with others.
    """
    started = time.perf_counter()
    root = Path(root)
    every = rooms_of(settings)
    room = parse_task(task)
    if room not in every:
        raise BadInput(f"{task} is not a task of these settings, which are like {task_name(every[0])}")
    provenance = _provenance(settings)
    old = finished(root, DOMAIN, task)
    if old is None:
        # One word per goal: seeds of two goals, or of two runs, have nothing to do with each other.
        seed = int(np.random.SeedSequence((settings.seed, every.index(room))).generate_state(1)[0])
        with TaskWriter(root, DOMAIN, task, provenance) as writer:
            _train(settings, room, seed, writer)
            writer.finish()
    else:
        # A finished goal stays finished when a library is updated: only settings count.
        same_provenance(old, provenance, task_folder(root, DOMAIN, task), free=frozenset({"source"}))
    index = read_index(task_folder(root, DOMAIN, task))
    returns = index.numpy("return")
    tenth = max(1, len(returns) // 10)
    return {
        "task": task,
        "skipped": old is not None,
        "episodes": len(returns),
        "steps": int(index.numpy("length").sum()),
        "first_return": float(returns[:tenth].mean()),
        "last_return": float(returns[-tenth:].mean()),
        "best_return": room.best_return,
        "seconds": time.perf_counter() - started,
    }


def _train(settings: DarkRoomSettings, room: Room, seed: int, writer: TaskWriter) -> None:
    """Runs PPO on one room; every transition goes to the writer."""
    import torch
    from stable_baselines3 import PPO

    from lram.collectors.sb3 import OneHotCells, RecordVecEnv, VectorToSb3, slot_seeds

    # Goals run in parallel over processes: a second thread would only take another goal's core.
    torch.set_num_threads(1)
    task = task_name(room)
    env = make(task, settings.num_envs, seed)
    recorder = Recorder(
        writer,
        DOMAIN,
        task,
        seeds=slot_seeds(seed, settings.num_envs),
        source=_source(),
        first_episode=0,
    )
    per_update = settings.num_envs * room.horizon
    agent = PPO(
        "MlpPolicy",
        OneHotCells(RecordVecEnv(VectorToSb3(env), recorder), env),
        n_steps=room.horizon,
        batch_size=max(1, per_update // settings.minibatches),
        n_epochs=settings.epochs,
        learning_rate=settings.learning_rate,
        gamma=settings.gamma,
        gae_lambda=settings.gae_lambda,
        ent_coef=settings.entropy,
        policy_kwargs={"net_arch": [settings.hidden]},
        seed=seed,
        device="cpu",
    )
    agent.learn(settings.steps)
    recorder.close()
    recorder.write_curve()
    # Every update is one episode in every slot, so none can be cut off.
    assert recorder.left_out_steps == 0


def _source() -> str:
    """Says who made the trajectories."""
    return source("Dark-Room PPO specialist", "stable-baselines3")


def _provenance(settings: DarkRoomSettings) -> dict[str, Any]:
    """Returns what decides the content of a goal's files, with a key for every setting."""
    return {"collector": "darkroom", "algorithm": "PPO", **asdict(settings), "source": _source()}
