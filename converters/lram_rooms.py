"""Tells which Dark-Room task a published buffer holds: its name gives cells, its rewards say which is which.

    for task, path, detail in named(paths, blocks): ...

A name is `[0,0]_[2,0].npz`, start and goal, in a folder that says the size. LRAM hands the goal to MiniHack as (x, y)
and records (row, column), so [2,0] should be row 0, column 2; of Dark Key-Door the data set's card says
START_KEY_DOOR and the code START_DOOR_KEY. Which it is, the data shows: a step that is rewarded ends on the goal, and
in Key-Door the first rewarded step of an episode on the key. Files of one folder are of one kind.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lram.datasets.specs import BadInput

Cell = tuple[int, int]
Block = dict[str, np.ndarray]

LOOK = 5
"""Files of a folder that are read to tell its kind, at most."""

_CELL = r"\[(\d+), ?(\d+)\]"
_NAME = re.compile(rf"{_CELL}_{_CELL}(?:_{_CELL})?")
_SIZE = re.compile(r"(?<!\d)(\d+)x(\d+)(?!\d)")


@dataclass(frozen=True)
class Room:
    """Where a buffer's rewards are.

    Attributes:
        rows: Height of the grid.
        cols: Width of the grid.
        start: (row, column) that episodes start at.
        goal: Cell of the goal, or of the door.
        key: Cell of the key, None where there is none.
    """

    rows: int
    cols: int
    start: Cell
    goal: Cell
    key: Cell | None

    @classmethod
    def parse(cls, text: str) -> Room:
        """Reads the detail of a job that `named` made."""
        parts: dict[str, Any] = json.loads(text)
        parts |= {key: tuple(part) for key, part in parts.items() if isinstance(part, list)}
        return cls(**parts)

    @property
    def task(self) -> str:
        """Returns the task's name as Dark-Room's environment has it; another start than [0, 0] is a variant."""
        kind, end = ("room", "goal") if self.key is None else ("keydoor", "door")
        name = f"{kind}{self.rows}x{self.cols}"
        name += f"-key-{self.key[0]:02d}-{self.key[1]:02d}" if self.key else ""
        name += f"-{end}-{self.goal[0]:02d}-{self.goal[1]:02d}"
        return name + (f".start-{self.start[0]:02d}-{self.start[1]:02d}" if any(self.start) else "")

    def fits(self, first: set[Cell], later: set[Cell]) -> bool:
        """Says whether rewards that ended on these cells, the first of an episode and later ones, can be its."""
        inside = all(0 <= row < self.rows and 0 <= col < self.cols for row, col in (self.start, self.goal))
        return inside and first <= {self.key or self.goal} and later <= {self.goal}

    def check(self, path: Path, episode: Block) -> None:
        """Raises BadInput where an episode's cells or rewards are not this room's."""
        first, later = paid([episode])
        if not self.fits(first, later):
            raise BadInput(f"{path}: rewarded on {sorted(first | later)}, expected {self.task} as its name tells")
        cells = episode["observations"]
        if cells.shape[1] != 2 or (cells < 0).any() or (cells >= (self.rows, self.cols)).any():
            raise BadInput(f"{path}: observations are not cells of a room of {self.rows}x{self.cols}")

    def success(self, rewards: np.ndarray) -> bool:
        """Says whether the goal, or the door, has paid."""
        return bool((rewards > 0).sum() > (self.key is not None))


def cells(path: Path) -> list[Cell]:
    """Returns the cells that a file's name gives, none where it is no room's."""
    match = _NAME.fullmatch(path.stem)
    numbers = [int(number) for number in match.groups() if number is not None] if match else []
    return list(zip(numbers[::2], numbers[1::2]))


def paid(blocks: Iterable[Block]) -> tuple[set[Cell], set[Cell]]:
    """Returns the cells that rewarded steps ended on: the first of each episode, and later ones."""
    first: set[Cell] = set()
    later: set[Cell] = set()
    fresh = True
    for block in blocks:
        for row in np.flatnonzero((block["rewards"] > 0) | block["dones"]).tolist():
            # After the last step the next episode's first cell may stand in place of the last one.
            if block["rewards"][row] > 0:
                if not block["dones"][row]:
                    (first if fresh else later).add(tuple(block["next_observations"][row].astype(int).tolist()))
                fresh = False
            fresh = fresh or bool(block["dones"][row])
    return first, later


def named(paths: list[Path], blocks: Callable[[Path], Iterator[Block]]) -> Iterator[tuple[str, Path, str]]:
    """Yields the task, the path and the detail (`Room.parse`) of each file.

    Args:
        paths: Files whose names give cells.
        blocks: Reads a file's rows.

    Raises:
        BadInput: No folder above a file says the size, or a file's rewards fit its name in no way.
    """
    for _, group in itertools.groupby(sorted(paths), key=lambda path: path.parent):
        files = list(group)
        for count in sorted({len(cells(path)) for path in files}):
            alike = [path for path in files if len(cells(path)) == count]
            kind = _kind(alike, blocks)
            for path in alike:
                room = _room(path, *kind)
                yield room.task, path, json.dumps(asdict(room))


def _kind(files: list[Path], blocks: Callable[[Path], Iterator[Block]]) -> tuple[bool, bool]:
    """Tells whether names give (x, y), and whether the key comes last, from the first files that show it."""
    # In the order of preference, where nothing is rewarded: what LRAM's code does comes first.
    kinds = list(itertools.product((True, False), (True, False) if len(cells(files[0])) == 3 else (False,)))
    # Goals off the diagonal tell (row, column) from (column, row).
    for path in sorted(files, key=lambda path: all(x == y for x, y in cells(path)))[:LOOK]:
        first, later = paid(blocks(path))
        fitting = [kind for kind in kinds if _room(path, *kind).fits(first, later)]
        if not fitting:
            raise BadInput(f"{path}: rewarded on {sorted(first | later)}, which its name does not tell")
        kinds = fitting
        if len(kinds) == 1:
            break
    return kinds[0]


def _room(path: Path, xy: bool, key_last: bool) -> Room:
    sizes = [match for part in reversed(path.absolute().parts[:-1]) if (match := _SIZE.search(part))]
    if not sizes:
        raise BadInput(f"{path}: no folder above it says the room's size, expected one like 10x10")
    width, height = int(sizes[0][1]), int(sizes[0][2])
    rows, cols = (height, width) if xy else (width, height)
    start, *rest = [(y, x) if xy else (x, y) for x, y in cells(path)]
    if len(rest) == 1:
        return Room(rows, cols, start, rest[0], None)
    return Room(rows, cols, start, *(rest if key_last else rest[::-1]))
