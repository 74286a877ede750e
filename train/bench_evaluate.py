"""Measures what playing many episodes at once is worth: what `lram bench evaluate` prints.

    rows = bench_evaluate(BenchEvaluateSettings(task="metaworld/reach-v2", episodes=16))
    print(as_table(rows))

The same episodes are played one at a time and 16 at a time, in turns, so that other processes of the machine slow
both alike; medians are given. The clock runs from the policy's first call to the last episode's end, so the start of
processes is apart. The trajectories of both have to be equal in every action.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from lram.datasets.bench_loader import Row
from lram.datasets.trajectory import Trajectory
from lram.model.policy import Policy, PolicySettings
from lram.train.rollouts import RolloutSettings, play
from lram.train.simulators import Job


@dataclass(frozen=True)
class BenchEvaluateSettings:
    """What to play."""

    task: str = "metaworld/reach-v2"
    """Task, as <domain>/<task>."""
    episodes: int = 16
    """Episodes of a round."""
    slots: int = 16
    """Episodes played at once."""
    workers: int = 0
    """Processes with simulators; 0 takes one per core."""
    rounds: int = 3
    """Times that both ways take turns."""
    backbone: Literal["xlstm", "mamba", "dt"] = "xlstm"
    """Sequence model of the policy, whose weights are random."""
    size: str = "16M"
    """Its size."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where it is."""


def bench_evaluate(settings: BenchEvaluateSettings) -> list[Row]:
    """Plays both ways in turns.

    Returns:
        A row for each way, and one that says whether they took the same actions.
    """
    torch.manual_seed(0)
    policy = Policy(PolicySettings(settings.backbone, settings.size)).eval().to(settings.device)
    domain, _, task = settings.task.partition("/")
    jobs = [Job(domain, task, episode) for episode in range(settings.episodes)]
    rates: dict[int, list[float]] = {1: [], settings.slots: []}
    actions: dict[int, dict[int, np.ndarray]] = {slots: {} for slots in rates}
    for _ in range(settings.rounds):
        for slots, found in rates.items():
            seconds = _play(policy, jobs, settings.task, slots, settings.workers, actions[slots])
            found.append(sum(len(taken) for taken in actions[slots].values()) / seconds)
    one, many = rates
    equal = sum(np.array_equal(actions[one][episode], actions[many][episode]) for episode in range(len(jobs)))
    section = f"{settings.task}, {settings.episodes} episodes, {settings.backbone} {settings.size}, {settings.device}"
    single, batched = (statistics.median(rates[slots]) for slots in (one, many))
    pairs = [fast / slow for slow, fast in zip(rates[one], rates[many])]
    ratio = statistics.median(pairs)
    return [
        Row(section, "one at a time", f"{single:,.1f} steps/s"),
        Row(section, f"{many} at a time", f"{batched:,.1f} steps/s", ratio, "4×", ratio >= 4),
        Row(section, "episodes with the same actions", f"{equal} of {len(jobs)}", None, "all", equal == len(jobs)),
    ]


def _play(
    policy: Policy, jobs: list[Job], name: str, slots: int, workers: int, actions: dict[int, np.ndarray]
) -> float:
    """Plays the episodes, notes their actions, and returns the seconds from the first step to the last."""
    began: list[float] = []

    def record(trajectory: Trajectory) -> None:
        actions[trajectory.episode] = trajectory.actions

    def first(*_: object) -> None:
        if not began:
            began.append(time.perf_counter())

    hook = policy.token_norm.register_forward_pre_hook(first)
    try:
        for result in play(policy, jobs, {name: 0.0}, RolloutSettings(slots, workers), record=record):
            if "failed" in result:
                raise RuntimeError(f"{name}: {result['failed']}")
    finally:
        hook.remove()
    return time.perf_counter() - began[0]
