"""What every converter shares: the job it is given, and the account it keeps of every row.

    count = Count()
    for trajectory in dqn_replay.trajectories(job, options, count):
        ...
    count.check()

A converter is a module with a frozen dataclass `Options`, `jobs(src, options)`, which lists what could be made
without reading the data, and `trajectories(job, options, count)`, which makes the trajectories of one job in a
deterministic order and in bounded memory. Writing, resuming and progress are `lram.converters.run`'s.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

SELECTS = "selects"
"""Metadata key of the fields of `Options` that choose which tasks are made, and change nothing in them:
`games: tuple[str, ...] = field(default=(), metadata={SELECTS: True})`."""


@dataclass(frozen=True)
class Job:
    """One task of the dataset to be made, and the source files that it comes from.

    Attributes:
        domain: Its domain's name.
        task: Its name inside the domain.
        src: The source that the user named; provenance gives paths relative to it.
        files: The files to read, in reading order.
        detail: What else tells this job from another of the same files, a member's name or a game, say.
    """

    domain: str
    task: str
    src: Path
    files: tuple[Path, ...]
    detail: str = ""

    @property
    def name(self) -> str:
        """Returns "<domain>/<task>"."""
        return f"{self.domain}/{self.task}"


@dataclass
class Count:
    """The account of one job: every row that was read is written, or dropped for a reason.

    Attributes:
        read: Rows of the source looked at, a row being one step as the source stores them.
        written: Transitions handed out in trajectories.
        episodes: Trajectories handed out.
        dropped: Rows that were not handed out, by reason.
        changed: Rows that were handed out with other values than the source has, by reason.
        problems: Damage found in the source, one sentence each with the file's name: what could be kept was kept.
    """

    read: int = 0
    written: int = 0
    episodes: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    changed: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def wrote(self, length: int) -> None:
        """Counts a trajectory of `length` transitions."""
        self.episodes += 1
        self.written += length

    def drop(self, reason: str, rows: int) -> None:
        """Counts rows that are left out."""
        if rows:
            self.dropped[reason] = self.dropped.get(reason, 0) + rows

    def change(self, reason: str, rows: int) -> None:
        """Counts rows whose values are changed on the way."""
        if rows:
            self.changed[reason] = self.changed.get(reason, 0) + rows

    def check(self) -> None:
        """Raises AssertionError unless every row that was read is accounted for."""
        assert self.read == self.written + sum(self.dropped.values()), f"rows do not add up: {self}"
