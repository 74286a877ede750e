"""A policy plays episodes of many tasks: one recurrent state per slot, one forward pass for all of a half's slots.

    jobs = [Job("dmcontrol", "walker-stand", episode) for episode in range(20)]
    for result in play(policy, jobs, {"dmcontrol/walker-stand": 950.0}, RolloutSettings(slots=16)):
        print(result["task"], result["return"])

A control step is one call of three tokens: r_{t-1}, s_t, R_t; on a CPU it is `FastPolicy` that is called. Where
simulators are slow, one half of the slots is simulated while the policy reads the other. A recurrent state is carried
to an episode's end, however short the windows of training were: in 1,000 steps after windows of 50, xLSTM's loss on
recorded actions was that of windows of 50, Mamba's 0.003 above it. DT sees its window.

A result depends on (seed, task, episode, target) and on nothing else, with one reservation: a forward pass rounds
differently for another number of rows. So every pass has a row for every slot, the idle ones too, and actions are
drawn with the Gumbel-max trick from numbers of the episode's own: an action changes when its lead over the runner-up
is smaller than the rounding, for one row against 16 one draw in ten million, where inverting a cumulative distribution
of 256 bins would change fifty times as many. DT encodes the slots whose window is full apart from the others, so its
rows do vary.
What it trades away: while the last episodes run out, idle rows are computed for nothing.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from lram.collectors import environments
from lram.datasets.specs import DOMAINS, NUM_BINS, NUM_DIMS, NUM_DISCRETE, BadInput
from lram.datasets.trajectory import Trajectory
from lram.model.policy import Policy, bin_centre
from lram.model.state import State, reset_state
from lram.train.fast import FastPolicy
from lram.train.simulators import Board, Event, Job, Make, Simulators

LOST = 3
"""An episode that has been lost this often is not played again."""
SLOW = ("composuite", "mimicgen")
"""Domains whose simulators take longer than the policy. Elsewhere two passes of half the slots cost more than the
overlap wins: with xLSTM 0.42 against 0.24 ms a step at size tiny, and at 16M as much as one of all slots."""
SMALL = 4_000_000
"""Below this number of parameters, threads that wait for each other cost more than they bring. Above it, with several
slots, each core reads rows of its own: 8 and 8 rows of a 16M xLSTM take 20 ms, 16 shared by two cores 28 ms."""


@dataclass(frozen=True)
class RolloutSettings:
    """How episodes are played.

    Attributes:
        slots: Episodes of a domain played at once.
        workers: Processes with simulators; 0 takes one per core.
        temperature: Divides the logits; 0 takes the likeliest action.
        seed: Of episodes and actions.
        timeout: Seconds that a call of a simulator may take.
        overlap: Simulate one half of the slots while the policy reads the other; None for domains in `SLOW`.
    """

    slots: int = 16
    workers: int = 0
    temperature: float = 1.0
    seed: int = 0
    timeout: float = 120.0
    overlap: bool | None = None


Record = Callable[[Trajectory], None]
"""Takes the trajectory of every episode that ended."""


def play(
    policy: Policy,
    jobs: Iterable[Job],
    targets: Mapping[str, float],
    settings: RolloutSettings,
    make: Make = environments.make,
    record: Record | None = None,
    source: str = "",
) -> Iterator[dict[str, Any]]:
    """Plays episodes, domain after domain.

    Args:
        policy: In evaluation mode, on the device to use.
        jobs: The episodes.
        targets: Return to ask for, by "<domain>/<task>".
        settings: How to play.
        make: Builds an environment.
        record: Called with every episode's trajectory, before its result is given.
        source: Who plays, for those trajectories.

    Yields:
        For every episode, as it ends: `task`, `episode`, `target`, `return`, `length`, `terminated`, `truncated`,
        `success`, `score` (the last two None where the simulator does not say). For those that could not be played:
        `task`, `episode`, `failed` (why), and `missing` where that goes for the whole task.
    """
    by_domain: dict[str, list[Job]] = {}
    for job in jobs:
        by_domain.setdefault(job.domain, []).append(job)
    cpu = next(policy.parameters()).device.type == "cpu"
    acting = FastPolicy(policy) if cpu else policy
    threads, parts = torch.get_num_threads(), 1
    if sum(parameter.numel() for parameter in policy.parameters()) < SMALL:
        torch.set_num_threads(1)
    elif cpu and settings.slots > 1:
        parts = min(threads, settings.slots)
        torch.set_num_threads(1)
    pool = ThreadPoolExecutor(parts)
    try:
        for domain, mine in by_domain.items():
            if DOMAINS[domain].state == "image" and policy.encode_image is None:
                yield from (_failure(job, "the policy has no image encoder", missing=True) for job in mine)
                continue
            yield from _Domain(acting, mine, targets, settings, record, source, parts, pool).play(make)
    finally:
        pool.shutdown()
        torch.set_num_threads(threads)


def share(jobs: Sequence[Job], part: tuple[int, int], whole_tasks: bool = False) -> list[Job]:
    """Returns the jobs of one of several processes or machines.

    Args:
        jobs: All of them.
        part: Its number, of how many.
        whole_tasks: All episodes of a task go to the same one.
    """
    number, of = part
    if not whole_tasks:
        return list(jobs[number::of])
    mine = set(list(dict.fromkeys(job.name for job in jobs))[number::of])
    return [job for job in jobs if job.name in mine]


def _failure(job: Job, words: str, missing: bool = False) -> dict[str, Any]:
    return {"task": job.name, "episode": job.episode, "failed": words} | ({"missing": True} if missing else {})


class Queue:
    """Episodes left to play: each slot has a run of neighbours, and one that is through takes half of the longest."""

    def __init__(self, jobs: Sequence[Job], slots: int) -> None:
        ordered = sorted(jobs)
        cuts = [len(ordered) * slot // slots for slot in range(slots + 1)]
        self._runs = [deque(ordered[start:stop]) for start, stop in pairwise(cuts)]

    def next(self, slot: int) -> Job | None:
        """Returns the next episode for a slot, None when there is none."""
        if not self._runs[slot]:
            longest = max(self._runs, key=len)
            taken = [longest.pop() for _ in range((len(longest) + 1) // 2)]
            self._runs[slot].extend(reversed(taken))
        return self._runs[slot].popleft() if self._runs[slot] else None

    def again(self, slot: int, job: Job) -> None:
        """Puts an episode back."""
        self._runs[slot].appendleft(job)

    def drop(self, name: str) -> list[Job]:
        """Removes and returns the episodes of a task."""
        dropped = [job for run in self._runs for job in run if job.name == name]
        self._runs = [deque(job for job in run if job.name != name) for run in self._runs]
        return dropped


class _Slot:
    """The episode under way in a slot."""

    def __init__(self, job: Job, target: float, seed: int, detail: dict[str, Any]) -> None:
        self.job, self.target = job, target
        self.columns, self.layout, self.dims = detail["columns"], detail["layout"], detail["dims"]
        self.random = np.random.default_rng([seed, zlib.crc32(job.name.encode()), job.episode])
        self.states: list[np.ndarray] = []
        self.actions: list[Any] = []
        self.rewards: list[float] = []

    def native(self, state: np.ndarray) -> np.ndarray:
        """Returns a copy of a state as the simulator gave it."""
        return state.copy() if self.columns is None else state[self.columns]

    def trajectory(self, final: np.ndarray, detail: dict[str, Any], seed: int, source: str) -> Trajectory:
        """Returns what has been played as a trajectory."""
        continuous = DOMAINS[self.job.domain].action == "continuous"
        return Trajectory(
            domain=self.job.domain,
            task=self.job.task,
            episode=self.job.episode,
            seed=seed,
            states=np.stack(self.states),
            actions=np.array(self.actions, np.float32 if continuous else np.int64),
            rewards=np.array(self.rewards, np.float32),
            terminated=detail["terminated"],
            truncated=detail["truncated"],
            source=source,
            final_state=self.native(final),
            success=detail["success"],
            state_layout=self.layout,
        )


class _Domain:
    """One domain's episodes on their way through the slots.

    Shapes: n rows of a half, A discrete actions, or 8 dimensions of 256 bins.
    """

    def __init__(
        self,
        policy: Policy | FastPolicy,
        jobs: list[Job],
        targets: Mapping[str, float],
        settings: RolloutSettings,
        record: Record | None,
        source: str,
        parts: int,
        pool: ThreadPoolExecutor,
    ) -> None:
        self.policy, self.targets, self.settings = policy, targets, settings
        self.record, self.source = record, source
        self.parts, self.map = parts, pool.map if parts > 1 else map
        self.spec = DOMAINS[jobs[0].domain]
        self.device = next(policy.parameters()).device
        self.count = settings.slots
        self.queue, self.lost = Queue(jobs, self.count), dict.fromkeys(jobs, 0)
        self.given: dict[int, Job] = {}
        self.slots: dict[int, _Slot] = {}
        self.asked, self.rewards = np.zeros((2, self.count))
        self.fresh = np.zeros(self.count, bool)
        bins = (NUM_DIMS, NUM_BINS) if self.spec.action == "continuous" else (self.spec.num_actions,)
        self.noise = np.full((self.count, *bins), 0.5, np.float32)
        # Taken before each state, as `PreviousAction` reads them; nothing precedes the first.
        self.before = np.full((self.count, *bins[:-1]), -1 if len(bins) == 1 else np.nan)
        self.states: dict[int, State] = {}

    def play(self, make: Make) -> Iterator[dict[str, Any]]:
        """Plays everything; yields results."""
        settings = self.settings
        overlap = self.spec.name in SLOW if settings.overlap is None else settings.overlap
        how = settings.workers, settings.seed, settings.timeout, make, overlap
        with Simulators(self.spec.name, self.count, *how) as simulators:
            for half in range(len(simulators.halves)):
                simulators.send(half, self._starts(simulators.halves[half]))
            while self.given:
                for half, rows in enumerate(simulators.halves):
                    if not any(rows.start <= slot < rows.stop for slot in self.given):
                        continue
                    stepped = [slot for slot in self.slots if rows.start <= slot < rows.stop]
                    events = simulators.receive(half)
                    for slot in stepped:
                        self._reward(slot, float(simulators.board.rewards[slot]))
                    results = [result for event in events for result in self._take(event, simulators)]
                    starts = self._starts(rows)
                    if any(slot in self.slots for slot in range(rows.start, rows.stop)):
                        self._act(rows, simulators)
                    simulators.send(half, starts)
                    yield from results

    def _starts(self, rows: slice) -> dict[int, Job]:
        """Gives the idle slots their next episodes."""
        starts = {}
        for slot in range(rows.start, rows.stop):
            if slot not in self.given and (job := self.queue.next(slot)) is not None:
                starts[slot] = self.given[slot] = job
        return starts

    def _reward(self, slot: int, reward: float) -> None:
        self.rewards[slot] = reward
        self.asked[slot] -= reward
        if self.record:
            self.slots[slot].rewards.append(reward)

    def _take(self, event: Event, simulators: Simulators) -> Iterator[dict[str, Any]]:
        """Takes note of what happened in a slot; yields the results that follow."""
        slot, job = event.slot, self.given[event.slot]
        if event.kind == "started":
            self.slots[slot] = _Slot(job, self.targets[job.name], self.settings.seed, event.detail)
            self.asked[slot], self.rewards[slot], self.fresh[slot] = self.targets[job.name], 0.0, True
            self.before[slot] = -1 if self.spec.action == "discrete" else np.nan
            return
        played = self.slots.pop(slot, None)
        del self.given[slot]
        if event.kind == "ended":
            assert played is not None
            if self.record:
                final = simulators.board.finals[slot]
                self.record(played.trajectory(final, event.detail, self.settings.seed, self.source))
            yield {"task": job.name, "episode": job.episode, "target": played.target, **event.detail}
        elif event.kind == "lost":
            self.lost[job] += 1
            if self.lost[job] < LOST:
                self.queue.again(slot, job)
            else:
                yield _failure(job, f"its process ended {LOST} times")
        elif event.kind == "missing":
            for other in [job, *self.queue.drop(job.name)]:
                yield _failure(other, event.detail["words"], missing=True)
        else:
            yield _failure(job, event.detail["words"])

    def _act(self, rows: slice, simulators: Simulators) -> None:
        """Reads a half's states and puts its actions on the board."""
        board, count = simulators.board, rows.stop - rows.start
        cuts = [rows.start + count * part // self.parts for part in range(self.parts + 1)]
        parts = [slice(start, stop) for start, stop in pairwise(cuts) if start < stop]
        logits_nV = torch.cat(list(self.map(partial(self._read, board), parts)))
        actions = self._draw(logits_nV, rows)
        board.actions[rows] = actions
        for slot in range(rows.start, rows.stop):
            played = self.slots.get(slot)
            if played is None:
                continue
            action = actions[slot - rows.start]
            if self.spec.action == "continuous":
                action[played.dims :] = 0
                action = action[: played.dims].copy()
            self.before[slot] = actions[slot - rows.start]
            if self.record:
                played.states.append(played.native(board.states[slot]))
                played.actions.append(action)

    @torch.no_grad()
    def _read(self, board: Board, rows: slice) -> torch.Tensor:
        """Has the policy read the states of some rows, in a thread of their own; returns logits (n, V)."""
        state = self.states.get(rows.start)
        fresh = torch.from_numpy(self.fresh[rows].copy())
        if fresh.any() and state is not None:
            state = reset_state(state, fresh.to(self.device))
        self.fresh[rows] = False
        scale = self.spec.reward_scale
        arrays = (board.states[rows], self.asked[rows] / scale, self.rewards[rows] / scale)
        states, asked, rewards = (torch.from_numpy(array[:, None]).to(self.device) for array in arrays)
        before = None
        if self.policy.settings.with_actions:
            kind = np.float32 if self.spec.action == "continuous" else np.int64
            before = torch.from_numpy(self.before[rows, None].astype(kind)).to(self.device)
        logits, self.states[rows.start] = self.policy.step(
            states, asked.float(), rewards.float(), state, prev_actions=before
        )
        return logits[:, -1].float().cpu()

    def _draw(self, logits_nV: torch.Tensor, rows: slice) -> np.ndarray:
        """Draws actions: (n,) integers, or (n, 8) bin centres; argmax of logits plus Gumbel noise is a draw.

        Source: Gumbel (1954); Maddison et al., "A* Sampling", arXiv 1411.0030, section 2.
        """
        continuous = self.spec.action == "continuous"
        if continuous:
            logits = logits_nV[:, NUM_DISCRETE:].unflatten(-1, (NUM_DIMS, NUM_BINS))
        else:
            logits = logits_nV[:, : self.spec.num_actions]
        if self.settings.temperature > 0:
            for slot in range(rows.start, rows.stop):
                if slot in self.slots:
                    # Of the domain's dimensions, not the task's: what an episode draws does not hang on the others'.
                    self.slots[slot].random.random(out=self.noise[slot][: self.spec.num_actions], dtype=np.float32)
            uniform = torch.from_numpy(self.noise[rows])
            logits = logits / self.settings.temperature - uniform.log().neg().log()
        choice = logits.argmax(-1)
        return (bin_centre(choice) if continuous else choice).numpy()


def check(settings: RolloutSettings) -> None:
    """Refuses numbers that mean nothing.

    Raises:
        BadInput: One of them does.
    """
    if settings.slots < 1:
        raise BadInput(f"--slots {settings.slots}: expected at least 1")
    if not settings.temperature >= 0:
        raise BadInput(f"--temperature {settings.temperature}: expected 0 or more")
    if settings.seed < 0:
        raise BadInput(f"--seed {settings.seed}: expected 0 or more")
    if not settings.timeout > 0:
        raise BadInput(f"--timeout {settings.timeout}: expected more than 0 seconds")
