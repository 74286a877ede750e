"""Measures what playing many episodes at once is worth.

    lram bench evaluate                                     # Meta-World's reach, a 16M policy
    lram bench evaluate --task dmcontrol/walker-stand --backbone mamba
    rows = list(bench_evaluate(EvaluateBenchSettings(task="metaworld/reach-v2", episodes=16)))

The same episodes are played one at a time and 16 at a time, in turns, so that other processes of the machine slow
both alike; medians are given. The clock runs from the policy's first call to the last episode's end, so the start of
processes is apart. The trajectories of both have to be equal in every action.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from lram.datasets.bench_loader import Row, as_table
from lram.datasets.specs import BadInput
from lram.datasets.trajectory import Trajectory
from lram.model.policy import Policy, PolicySettings
from lram.train.ranks import device_of
from lram.train.rollouts import RolloutSettings, play
from lram.train.settings import BackboneName, DeviceName, SizeName
from lram.train.simulators import Job

__all__ = ["EvaluateBenchSettings", "as_table", "bench_evaluate"]


@dataclass(frozen=True)
class EvaluateBenchSettings:
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
    backbone: BackboneName = "xlstm"
    """Sequence model of the policy, which has its initial weights."""
    size: SizeName = "16M"
    """Its size."""
    device: DeviceName = "auto"
    """Where it is; auto takes CUDA when there is one."""


def bench_evaluate(settings: EvaluateBenchSettings, progress: Callable[[str], None] | None = None) -> Iterator[Row]:
    """Plays both ways in turns.

    Args:
        settings: What to play.
        progress: Told what is done now.

    Yields:
        A row for each way, and one that says whether they took the same actions.

    Raises:
        BadInput: The task cannot be played here, or there is nothing to compare.
    """
    if settings.slots < 2 or settings.episodes < 1 or settings.rounds < 1:
        raise BadInput("--slots has to be at least 2, --episodes and --rounds at least 1")
    torch.manual_seed(0)
    device = device_of(settings.device)
    policy = Policy(PolicySettings(settings.backbone, settings.size)).eval().to(device)
    domain, _, task = settings.task.partition("/")
    jobs = [Job(domain, task, episode) for episode in range(settings.episodes)]
    rates: dict[int, list[float]] = {1: [], settings.slots: []}
    actions: dict[int, dict[int, np.ndarray]] = {slots: {} for slots in rates}
    for number in range(settings.rounds):
        for slots, found in rates.items():
            if progress:
                progress(f"round {number + 1} of {settings.rounds}, {slots} at a time")
            seconds = _play(policy, jobs, RolloutSettings(slots, settings.workers), actions[slots])
            found.append(sum(map(len, actions[slots].values())) / seconds)
    one, many = rates
    section = f"{settings.task}, {settings.episodes} episodes, {settings.backbone} {settings.size}, {device.type}"
    single, batched = (statistics.median(rates[slots]) for slots in (one, many))
    ratio = statistics.median(fast / slow for slow, fast in zip(rates[one], rates[many]))
    equal = sum(np.array_equal(actions[one][episode], actions[many][episode]) for episode in range(len(jobs)))
    yield Row(section, "one at a time", f"{single:,.1f} steps/s")
    yield Row(section, f"{many} at a time", f"{batched:,.1f} steps/s", ratio, "≥ 4×", ratio >= 4)
    yield Row(section, "episodes with the same actions", f"{equal} of {len(jobs)}", None, "all", equal == len(jobs))


def _play(policy: Policy, jobs: list[Job], how: RolloutSettings, actions: dict[int, np.ndarray]) -> float:
    """Plays the episodes, notes their actions, and returns the seconds from the first step to the last."""
    began: list[float] = []

    def record(trajectory: Trajectory) -> None:
        actions[trajectory.episode] = trajectory.actions

    def first(*_: object) -> None:
        if not began:
            began.append(time.perf_counter())

    hook = policy.token_norm.register_forward_pre_hook(first)
    try:
        for result in play(policy, jobs, {jobs[0].name: 0.0}, how, record=record):
            if "failed" in result:
                raise BadInput(f"{result['task']}: {result['failed']}")
    finally:
        hook.remove()
    return time.perf_counter() - began[0]
