"""Windows for training: which ones an update sees, and their arrays, from the update's number alone.

    windows = Windows.open(ROOT, WindowSettings(context=50))
    for batch in windows.batches(update=17, split="train", per_domain=128, seed=0): ...

ROOT is a directory of trajectory files, of tar shards, or a Zarr store: the windows are the same.
Trajectories are drawn in proportion to their length inside a domain, and the window's last step uniformly on
1..T, which together is a uniform draw over transitions. Algorithm Distillation's windows hold several whole
episodes of one task, `gap` episodes apart, so the later ones are further along in the specialist's training
(Laskin et al. 2022). Shorter windows are padded on the right and masked. A batch depends on (seed, update,
split) and on nothing else, so a run resumes from the update's number, on any number of ranks.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lram.datasets.index import find_tasks
from lram.datasets.reader import TaskReader, open_task
from lram.datasets.specs import DOMAINS, STATE_WIDTH, BadInput, DomainSpec

Allocate = Callable[[tuple[int, ...], Any], np.ndarray]
"""Makes an array of (shape, dtype), of any content."""


@dataclass
class Batch:
    """Windows of one domain, as the policy takes them: scaled, padded on the right, masked.

    Attributes:
        domain: The domain's spec.
        states: (B, C, 204) float32 in policy columns, or (B, C, channels, 64, 64) uint8.
        actions: (B, C) int64, or (B, C, A) float32, A the widest action in the batch's domain.
        previous_rewards: (B, C) float32, r_{t-1} over the reward scale, 0 before the first step.
        returns_to_go: (B, C) float32 over the reward scale.
        mask: (B, C) bool, True where the action counts in the loss.
        action_mask: (B, A) bool, the valid dimensions of each window's task; None for discrete actions.
    """

    domain: DomainSpec
    states: np.ndarray
    actions: np.ndarray
    previous_rewards: np.ndarray
    returns_to_go: np.ndarray
    mask: np.ndarray
    action_mask: np.ndarray | None


@dataclass(frozen=True)
class WindowSettings:
    """How a training window is cut.

    Attributes:
        context: Steps C of a window of one episode.
        episodes: Whole episodes a window holds; None takes the domain's own (`DomainSpec.window_episodes`).
        gap: Distance between the episodes of a window, in episodes of the task.
        top: Share of each task's trajectories that windows are cut from (in chains: that they end in), those of the
            highest returns, at least one, of equal ones the earlier; training and validation apart.
    """

    context: int = 50
    episodes: int | None = None
    gap: int = 100
    top: float = 1.0

    def chain(self, domain: str) -> int:
        """Returns how many whole episodes a window of this domain holds; 1 means `context` steps."""
        return self.episodes or DOMAINS[domain].window_episodes


class Piece(NamedTuple):
    """A slice of one trajectory, and its place in a batch: a window is one of them, or a chain of whole episodes.

    Attributes:
        window: Number of its window in the batch.
        task: Its task.
        row: The trajectory's row in the task's index.
        first: First transition.
        last: One past the last.
        at: Step of the window at which it begins.
        final: Nothing follows it in the window.
    """

    window: int
    task: TaskReader
    row: int
    first: int
    last: int
    at: int
    final: bool


class Windows:
    """All tasks of a dataset, ready to draw windows from.

    Attributes:
        settings: How windows are cut.
        tasks: Readers of every task, by domain.
    """

    def __init__(self, readers: list[TaskReader], settings: WindowSettings) -> None:
        """Groups the tasks by domain and lays out what can be drawn.

        Raises:
            BadInput: A domain mixes image shapes, or holds no history long enough for the gap.
        """
        self.settings = settings
        self.tasks: dict[str, list[TaskReader]] = {}
        for reader in readers:
            self.tasks.setdefault(reader.domain.name, []).append(reader)
        self._draws = {
            (domain, split): Draw(tasks, split == "validation", settings.chain(domain), settings.gap, settings.top)
            for domain, tasks in self.tasks.items()
            for split in ("train", "validation")
        }
        for domain, tasks in self.tasks.items():
            shapes = {task.state_shape for task in tasks}
            if DOMAINS[domain].state == "image" and len(shapes) > 1:
                raise BadInput(f"{domain}: states of shapes {sorted(shapes)} cannot be mixed in one batch")
            if self._draws[domain, "train"].count == 0:
                raise BadInput(
                    f"{domain}: no windows of {settings.chain(domain)} episodes {settings.gap} apart, "
                    f"the longest history has {max(len(task) for task in tasks)} episodes"
                )

    @classmethod
    def open(cls, root: Path, settings: WindowSettings, folders: list[Path] | None = None) -> Windows:
        """Opens the indices of all tasks below ROOT, or of those in `folders`, several at once.

        Raises:
            BadInput: ROOT is missing or holds no task, or an index cannot be used.
        """
        folders = find_tasks(root) if folders is None else folders
        with ThreadPoolExecutor(min(len(folders), os.cpu_count() or 1)) as pool:
            return cls(list(pool.map(open_task, folders)), settings)

    def steps(self, domain: str) -> int:
        """Returns the steps of a domain's longest window: `context`, or the longest chain of episodes."""
        chain = self.settings.chain(domain)
        if chain == 1:
            return self.settings.context
        return chain * max(int(task.lengths.max()) for task in self.tasks[domain])

    @property
    def every_task(self) -> list[TaskReader]:
        """Readers of every task, domain after domain."""
        return [task for tasks in self.tasks.values() for task in tasks]

    @property
    def transitions(self) -> int:
        """Number of transitions in the dataset."""
        return sum(int(task.lengths.sum()) for task in self.every_task)

    def batches(
        self,
        update: int,
        split: str,
        per_domain: int | Mapping[str, int],
        seed: int,
        part: tuple[int, int] = (0, 1),
        allocate: Allocate = np.empty,
    ) -> Iterator[Batch]:
        """Draws one batch per domain; domains without windows in the split are left out.

        Args:
            update: Number of the optimizer update.
            split: "train" or "validation".
            per_domain: Windows of each domain over all ranks, one number or one for each.
            seed: Seed of the run.
            part: (rank, ranks): of the same draw, each rank reads its own part.
            allocate: Makes the arrays of a batch.

        Yields:
            Batches of this rank's part, in order of domain names.
        """
        for domain in sorted(self.tasks):
            if self._draws[domain, split].count:
                count = per_domain if isinstance(per_domain, int) else per_domain[domain]
                yield self.read(domain, self.draw(domain, update, split, count, seed, part), split, allocate)

    def draw(
        self, domain: str, update: int, split: str, count: int, seed: int, part: tuple[int, int] = (0, 1)
    ) -> list[Piece]:
        """Chooses the windows of one domain that an update sees, without reading them.

        Args:
            domain: The domain.
            update: Number of the optimizer update.
            split: "train" or "validation".
            count: Windows over all ranks.
            seed: Seed of the run.
            part: (rank, ranks).

        Returns:
            The pieces of this rank's windows, in order; empty where the split has no window.
        """
        draw = self._draws[domain, split]
        if draw.count == 0:
            return []
        rng = np.random.default_rng([seed, update, sorted(self.tasks).index(domain), int(split == "validation")])
        targets = rng.integers(draw.count, size=count)[part[0] :: part[1]]
        return draw.pieces(targets, self.settings.context)

    def read(self, domain: str, pieces: list[Piece], split: str, allocate: Allocate = np.empty) -> Batch:
        """Reads windows into one batch.

        Args:
            domain: Their domain.
            pieces: What they are made of, in order of windows.
            split: In chains of episodes, the loss of "validation" counts the last episode only: those before it
                may be training ones.
            allocate: Makes the arrays of the batch, from (shape, dtype).

        Returns:
            The batch, padded to `steps`.

        Raises:
            BadInput: A file is missing or damaged.
        """
        spec, tasks = DOMAINS[domain], self.tasks[domain]
        B, C = (pieces[-1].window + 1 if pieces else 0), self.steps(domain)
        dims = max(task.num_dims for task in tasks)
        image = spec.state == "image"
        owners = [piece.task for piece in pieces if piece.at == 0]
        state_shape, action_shape = tasks[0].state_shape if image else (STATE_WIDTH,), (dims,) if dims else ()
        batch = Batch(
            spec,
            allocate((B, C, *state_shape), np.uint8 if image else np.float32),
            allocate((B, C, *action_shape), np.float32 if dims else np.int64),
            allocate((B, C), np.float32),
            allocate((B, C), np.float32),
            allocate((B, C), bool),
            allocate((B, dims), bool) if dims else None,
        )
        for array in (batch.actions, batch.previous_rewards, batch.returns_to_go, *([] if image else [batch.states])):
            array.fill(0)
        if not pieces:
            return batch
        states = _Stored(batch.states, owners, "states")
        actions = _Stored(batch.actions, owners, "actions")
        rewards = batch.previous_rewards.data.cast("B")
        returns = batch.returns_to_go.data.cast("B")
        counted_from, ends = [0] * B, [0] * B
        for piece in pieces:
            b, first, last, at = piece.window, piece.first, piece.last, piece.at
            end = at + last - first
            row = 4 * b * C
            cuts = [
                ("states", first, last, states.place(b, at, end)),
                ("actions", first, last, actions.place(b, at, end)),
                ("returns_to_go", first, last, returns[row + 4 * at : row + 4 * end]),
            ]
            # Step t has the reward of t - 1; the last one of a window has no step to go to.
            before = int(at == 0 and first > 0)
            low, high = first - before, last - piece.final
            if high > low:
                to = row + 4 * (at + 1 - before)
                cuts.append(("rewards", low, high, rewards[to : to + 4 * (high - low)]))
            piece.task.read(piece.row, cuts)
            ends[b] = end
            if split != "train":
                counted_from[b] = at
            if image and piece.final and end < C:
                batch.states[b, end:] = 0  # not all of it beforehand: that would cost a fourth of the reading
        states.scatter()
        actions.scatter()
        steps_C = np.arange(C)
        batch.mask[:] = (steps_C >= np.array(counted_from)[:, None]) & (steps_C < np.array(ends)[:, None])
        if batch.action_mask is not None:
            batch.action_mask[:] = np.arange(dims) < np.array([task.num_dims for task in owners])[:, None]
        batch.previous_rewards /= spec.reward_scale
        batch.returns_to_go /= spec.reward_scale
        return batch


class _Stored:
    """Rows of one array as they are stored, on their way into the columns of a batch.

    Where stored rows are as wide as the batch's they are read into it, else into memory ordered by layout.
    """

    def __init__(self, out: np.ndarray, owners: list[TaskReader], name: str) -> None:
        self._out, self._groups = out, []
        B, C = out.shape[:2]
        full = out[0, 0].nbytes
        self._width = [task.row_bytes[name] for task in owners]
        runs = [task.state_runs if name == "states" else task.action_runs for task in owners]
        if all(width == full for width in self._width):
            self._bytes = out.data.cast("B")
            self._start = [b * C * full for b in range(B)]
            return
        groups: dict[tuple, list[int]] = {}
        for b, key in enumerate(runs):
            groups.setdefault(key, []).append(b)
        stored = np.zeros(sum(self._width) * C, np.uint8)
        self._bytes, self._start = stored.data, [0] * B
        at = 0
        for key, members in groups.items():
            size = self._width[members[0]] * C
            for i, b in enumerate(members):
                self._start[b] = at + i * size
            block = stored[at : at + len(members) * size].view(np.float32).reshape(len(members), C, -1)
            self._groups.append((key, members, block))
            at += len(members) * size

    def place(self, b: int, at: int, end: int) -> memoryview:
        """Returns where the rows of window `b` from step `at` to `end` go."""
        start, width = self._start[b], self._width[b]
        return self._bytes[start + at * width : start + end * width]

    def scatter(self) -> None:
        """Puts what was read into the batch's columns, a run of neighbours at a time."""
        everyone = len(self._groups) == 1
        for runs, members, block in self._groups:
            windows = slice(None) if everyone else members
            for column, to, width in runs:
                self._out[windows, :, to : to + width] = block[:, :, column : column + width]


class Draw:
    """The windows of one domain and split, numbered from 0 to `count`: one per transition, or per last one.

    Attributes:
        count: How many there are.
    """

    def __init__(self, tasks: list[TaskReader], validation: bool, chain: int, gap: int, top: float = 1.0) -> None:
        self._tasks = tasks
        # Episodes of a window, as distances from the last one.
        self._back = np.arange(chain - 1, -1, -1) * gap
        owners, rows, weights = [], [], []
        for number, task in enumerate(tasks):
            # The last episode decides the split; those before it only have to exist.
            chosen = task.validation == validation
            for distance in self._back[:-1]:
                chosen &= np.isin(task.episodes - distance, task.episodes)
            picked = np.flatnonzero(chosen)
            if top < 1:
                best_first = np.lexsort((task.episodes[picked], -task.returns[picked]))
                picked = np.sort(picked[best_first[: max(1, round(top * len(picked)))]])
            owners.append(np.full(len(picked), number, np.int32))
            rows.append(picked.astype(np.int32))
            weights.append(task.lengths[picked])
        self._owners, self._rows = np.concatenate(owners), np.concatenate(rows)
        self._lengths = np.concatenate(weights)
        self._ends = np.cumsum(self._lengths)
        self.count = int(self._ends[-1]) if len(self._ends) else 0

    def pieces(self, targets_B: np.ndarray, context: int) -> list[Piece]:
        """Returns the pieces of the windows whose last transitions are these numbers of the domain's."""
        at_B = np.searchsorted(self._ends, targets_B, side="right")
        stop_B = targets_B + self._lengths[at_B] - self._ends[at_B] + 1
        found = zip(self._owners[at_B].tolist(), self._rows[at_B].tolist(), stop_B.tolist())
        if len(self._back) == 1:
            return [
                Piece(b, self._tasks[owner], row, max(0, stop - context), stop, 0, True)
                for b, (owner, row, stop) in enumerate(found)
            ]
        pieces = []
        for b, (owner, row, _) in enumerate(found):
            task, at = self._tasks[owner], 0
            rows = np.searchsorted(task.episodes, task.episodes[row] - self._back).tolist()
            for k, (row, length) in enumerate(zip(rows, task.lengths[rows].tolist())):
                pieces.append(Piece(b, task, row, 0, length, at, k == len(rows) - 1))
                at += length
        return pieces
