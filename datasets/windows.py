"""Windows for training: which ones an update sees, and their arrays, from the update's number alone.

    windows = Windows.open(ROOT, WindowSettings(context=50))
    for batch in windows.batches(update=17, split="train", per_domain=128, seed=0): ...

Trajectories are drawn in proportion to their length inside a domain, and the window's last step uniformly on
1..T, which together is a uniform draw over transitions. Algorithm Distillation's windows hold several whole
episodes of one task, `gap` episodes apart, so the later ones are further along in the specialist's training
(Laskin et al. 2022). Shorter windows are padded on the right and masked. A batch depends on (seed, update,
split) and on nothing else, so a run resumes from the update's number, on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lram.datasets.index import find_tasks, read_index
from lram.datasets.reader import TaskReader
from lram.datasets.specs import DOMAINS, STATE_WIDTH, BadInput, DomainSpec


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
    """

    context: int = 50
    episodes: int | None = None
    gap: int = 100

    def chain(self, domain: str) -> int:
        """Returns how many whole episodes a window of this domain holds; 1 means `context` steps."""
        return self.episodes or DOMAINS[domain].window_episodes


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
            (domain, split): _Draw(tasks, split == "validation", settings.chain(domain), settings.gap)
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
    def open(cls, root: Path, settings: WindowSettings) -> Windows:
        """Opens the indices of all tasks below ROOT.

        Raises:
            BadInput: ROOT is missing or holds no task, or an index cannot be used.
        """
        return cls([TaskReader(read_index(folder)) for folder in find_tasks(root)], settings)

    def steps(self, domain: str) -> int:
        """Returns the steps of a domain's longest window: `context`, or the longest chain of episodes."""
        chain = self.settings.chain(domain)
        if chain == 1:
            return self.settings.context
        return chain * max(int(task.lengths.max()) for task in self.tasks[domain])

    @property
    def transitions(self) -> int:
        """Number of transitions in the dataset."""
        return sum(int(task.lengths.sum()) for tasks in self.tasks.values() for task in tasks)

    def batches(
        self, update: int, split: str, per_domain: int, seed: int, part: tuple[int, int] = (0, 1)
    ) -> Iterator[Batch]:
        """Draws one batch per domain; domains without windows in the split are left out.

        Args:
            update: Number of the optimizer update.
            split: "train" or "validation".
            per_domain: Windows of each domain, over all ranks.
            seed: Seed of the run.
            part: (rank, ranks): of the same draw, each rank reads its own part.

        Yields:
            Batches of this rank's part, in order of domain names.
        """
        for number, domain in enumerate(sorted(self.tasks)):
            draw = self._draws[domain, split]
            if draw.count == 0:
                continue
            rng = np.random.default_rng([seed, update, number, int(split == "validation")])
            targets = rng.integers(draw.count, size=per_domain)[part[0] :: part[1]]
            yield self.read(domain, [draw.window(int(target)) for target in targets], split)

    def read(self, domain: str, windows: list[tuple[TaskReader, list[int], int]], split: str) -> Batch:
        """Reads windows into one batch.

        Args:
            domain: Their domain.
            windows: (task, rows of its index, stop) each; with several rows, whole episodes end to end, with
                one row the `context` steps before `stop`.
            split: With several rows, the loss of "validation" counts the last episode only: those before it
                may be training ones.

        Returns:
            The batch, padded to `steps`.
        """
        spec = DOMAINS[domain]
        B, C = len(windows), self.steps(domain)
        dims = max(task.num_dims for task in self.tasks[domain])
        channels = self.tasks[domain][0].state_shape
        image = spec.state == "image"
        batch = Batch(
            spec,
            np.zeros((B, C, *channels), np.uint8) if image else np.zeros((B, C, STATE_WIDTH), np.float32),
            np.zeros((B, C), np.int64) if dims == 0 else np.zeros((B, C, dims), np.float32),
            np.zeros((B, C), np.float32),
            np.zeros((B, C), np.float32),
            np.zeros((B, C), bool),
            None if dims == 0 else np.zeros((B, dims), bool),
        )
        for b, (task, rows, stop) in enumerate(windows):
            at, carried = 0, 0.0
            for row in rows:
                length = int(task.lengths[row])
                last = length if len(rows) > 1 else stop
                first = 0 if len(rows) > 1 else max(0, stop - self.settings.context)
                n = last - first
                states = task.slice("states", row, first, last)
                if image:
                    batch.states[b, at : at + n] = states
                else:
                    batch.states[b, at : at + n][:, task.columns] = states
                actions = task.slice("actions", row, first, last)
                batch.actions[b, at : at + n, ...] = actions if dims == 0 else _widen(actions, dims)
                batch.returns_to_go[b, at : at + n] = task.slice("returns_to_go", row, first, last)
                before = max(first - 1, 0)
                rewards = task.slice("rewards", row, before, last)
                batch.previous_rewards[b, at] = rewards[0] if first else carried
                batch.previous_rewards[b, at + 1 : at + n] = rewards[first - before : -1]
                carried = rewards[-1]
                batch.mask[b, at : at + n] = split == "train" or row == rows[-1]
                at += n
            if batch.action_mask is not None:
                batch.action_mask[b, : task.num_dims] = True
        batch.previous_rewards /= spec.reward_scale
        batch.returns_to_go /= spec.reward_scale
        return batch


def _widen(actions: np.ndarray, dims: int) -> np.ndarray:
    return np.pad(actions, ((0, 0), (0, dims - actions.shape[1])))


class _Draw:
    """The windows of one domain and split, numbered from 0 to `count`: one per transition, or per last one."""

    def __init__(self, tasks: list[TaskReader], validation: bool, chain: int, gap: int) -> None:
        self.tasks = tasks
        # Episodes of a window, as distances from the last one.
        self.back = [k * gap for k in range(chain - 1, -1, -1)]
        owners, rows, weights = [], [], []
        for number, task in enumerate(tasks):
            # The last episode decides the split; those before it only have to exist.
            chosen = task.validation == validation
            for distance in self.back[:-1]:
                chosen &= np.isin(task.episodes - distance, task.episodes)
            picked = np.flatnonzero(chosen)
            owners.append(np.full(len(picked), number, np.int32))
            rows.append(picked.astype(np.int32))
            weights.append(task.lengths[picked])
        self.owners, self.rows = np.concatenate(owners), np.concatenate(rows)
        self.ends = np.cumsum(np.concatenate(weights))
        self.count = int(self.ends[-1]) if len(self.ends) else 0

    def window(self, target: int) -> tuple[TaskReader, list[int], int]:
        """Returns the window whose last transition is number `target` of the domain."""
        at = int(np.searchsorted(self.ends, target, side="right"))
        task, row = self.tasks[self.owners[at]], int(self.rows[at])
        stop = target + int(task.lengths[row]) - int(self.ends[at]) + 1
        if len(self.back) == 1:
            return task, [row], stop
        wanted = task.episodes[row] - np.array(self.back)
        return task, np.searchsorted(task.episodes, wanted).tolist(), stop
