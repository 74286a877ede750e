"""Converts the DQN-Replay dataset (Agarwal et al. 2020): 200 million frames of every Atari game, as DQN recorded them.

    lram convert dqn-replay SRC ROOT                      # SRC/<Game>/<run>/replay_logs, the last 5 million transitions
    lram convert dqn-replay SRC/Breakout ROOT --last 0    # all of one game

A recording is a row of checkpoints: copies of a circular buffer of a million rows, made when its cursor stood at the
last row. In order of time a checkpoint begins with that last row, which the cursor had yet to overwrite, and goes on
from row 0 up to the cursor; what lies behind the cursor of the final one is older. Episodes run from one checkpoint
into the next, and each begins with three all-zero rows, which pad its first stack of four frames. Where these carried
the cursor over the last row, a whole round was never written: a gap, and no episode is joined across one.

Frames are decompressed in blocks and never held as a whole. Every observation file is decompressed twice: once to
verify its checksum and to learn its last row, which belongs before all others, and once to convert it: a tenth of
the time. An episode is converted whole or not at all. There is no final state: none was recorded. Rewards are clipped
to [-1, 1], as recorded: returns are not game scores.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lram.converters.dqn_stream import BLOCK, HEADER, KINDS, Broken, Cut, open_array
from lram.converters.source import SELECTS, Count, Job
from lram.datasets.images import shrink
from lram.datasets.specs import BadInput
from lram.datasets.trajectory import Trajectory

VERSION = 1
PADDING = 3
"""All-zero rows before an episode: Dopamine's stack of four frames, less one."""
LONGEST = 27_000
"""Steps after which Dopamine cuts an episode (half an hour at 60 frames a second), and stores it as terminal."""
Files = tuple[int, dict[str, Path]]  # A checkpoint before it is read: its number, and its files by kind.
NAME = re.compile(r"(?:\$store\$_(action|reward|terminal|observation)|(add_count))_ckpt\.(\d{1,6})\.gz")
SUSPECT = {"Asterix": 2}
"""Run to take by default of games whose first is suspect (google-research/batch_rl, issue 28)."""
NOT_ASKED = "before the transitions asked for with --last"
NO_BEGINNING = "of an episode whose beginning is missing"


@dataclass(frozen=True)
class Options:
    """What to take from DQN-Replay."""

    last: int = 5_000_000
    """Transitions of each game: the latest whole episodes that together hold at most so many; 0 takes all."""
    run: int | None = None
    """Which of a game's five runs; by default 1, and 2 for Asterix, whose first is suspect."""
    games: tuple[str, ...] = field(default=(), metadata={SELECTS: True})
    """Games to convert, by folder or by task name (SpaceInvaders or space-invaders); all by default."""


@dataclass
class _Checkpoint:
    """The small arrays of one checkpoint.

    Attributes:
        number: The N of ckpt.N.
        frames: The file of its observations.
        capacity: Rows of the buffer.
        add_count: Rows that were ever added to the buffer; in the final checkpoint, where the cursor stood.
        actions, rewards, terminals: As far as all three can be read.
        problems: What is damaged.
    """

    number: int
    frames: Path
    capacity: int
    add_count: int
    actions: np.ndarray
    rewards: np.ndarray
    terminals: np.ndarray
    problems: list[str]

    @property
    def readable(self) -> int:
        """Rows from 0 to here can be read."""
        return len(self.actions)

    @property
    def stop(self) -> int:
        """Rows from 0 to here follow each other in time."""
        return min(self.add_count % self.capacity, self.readable)

    @property
    def first(self) -> int:
        """First row in order of time: -1, the last row, where it was written and can be read, else 0."""
        written = self.number > 0 or self.add_count >= self.capacity
        return -1 if written and self.readable == self.capacity else 0

    @property
    def opens(self) -> bool:
        """Whether the first rows in order of time can be the padding before an episode, as far as is known here."""
        rows = np.arange(self.first, min(self.first + PADDING, self.stop))
        return len(rows) == PADDING and not any(x[rows].any() for x in (self.actions, self.rewards, self.terminals))


# ---- Which recordings there are ----


def jobs(src: Path, options: Options) -> list[Job]:
    """Lists the games that can be converted, one job each.

    Args:
        src: A folder of games, or one game, one run or one replay_logs folder.
        options: Which games, which run, and how many transitions: with `last`, only the checkpoints that are needed.

    Raises:
        BadInput: There is no recording, a game or the run asked for is missing, or a folder has a strange name.
    """
    if options.last < 0:
        raise BadInput(f"last is {options.last}, expected a number of transitions, or 0 for all")
    one = [src] if _checkpoints(src.glob("*.gz")) else sorted(src.glob("replay_logs"))
    folders = one or sorted(src.glob("*/replay_logs")) or sorted(src.glob("*/*/replay_logs"))
    runs: dict[str, dict[int, Path]] = {}
    for folder in folders:
        game, run = _place(folder)
        runs.setdefault(game, {})[run] = folder
    if not runs:
        raise BadInput(f"{src}: no DQN-Replay recording found, expected <Game>/<run>/replay_logs")
    asked = {name.lower().replace("-", ""): name for name in options.games}
    if unknown := asked.keys() - {game.lower() for game in runs}:
        raise BadInput(f"{src}: holds no game {asked[min(unknown)]!r}, only {', '.join(runs)}")
    made = []
    for game, there in runs.items():
        if asked and game.lower() not in asked:
            continue
        run = options.run if options.run is not None else min(there) if one else SUSPECT.get(game, 1)
        if run not in there:
            held = ", ".join(map(str, sorted(there)))
            raise BadInput(f"{src}: {game} has no run {run}, only {held}; choose one with --run")
        checkpoints = _checkpoints(there[run].glob("*.gz"))
        if not checkpoints:
            raise BadInput(f"{there[run]}: holds no checkpoint, expected files like add_count_ckpt.0.gz")
        try:
            earliest = _plan(checkpoints, options.last)[2]
        except BadInput:
            earliest = 0  # Said when the game is converted: it shall not keep the others from it.
        files = tuple(path for _, paths in checkpoints[earliest:] for path in paths.values())
        made.append(Job("atari", _spelled(game, "-"), src, files, f"{game}, run {run}"))
    return sorted(made, key=lambda job: job.task)


def _place(folder: Path) -> tuple[str, int]:
    """Returns the game and the run that a replay_logs folder belongs to, by the names above it."""
    *_, game, run, _ = ("", "", *Path(os.path.abspath(folder)).parts)
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9]*", game) or not re.fullmatch(r"\d{1,6}", run):
        raise BadInput(f"{folder}: lies in {game}/{run}, expected <Game>/<number of the run>/replay_logs")
    return game, int(run)


def _spelled(game: str, separator: str) -> str:
    """Spells SpaceInvaders as space-invaders (our task) or space_invaders (ale-py's)."""
    return re.sub("(?<!^)(?=[A-Z])", separator, game).lower()


def _checkpoints(files: Iterable[Path]) -> list[Files]:
    """Groups files by their checkpoint's number, in order; others (invalid_range, pickled indices) are not needed."""
    found: dict[int, dict[str, Path]] = {}
    for path in files:
        if match := NAME.fullmatch(path.name):
            found.setdefault(int(match[3]), {})[match[1] or match[2]] = path
    return [(number, {kind: paths[kind] for kind in KINDS if kind in paths}) for number, paths in sorted(found.items())]


def _action_set(game: str, folder: Path) -> np.ndarray:
    """Returns the number in the full set of 18 of each action in a game's minimal set, which DQN chose from."""
    try:
        import ale_py
        from ale_py import roms
    except ImportError as error:
        raise BadInput("converting DQN-Replay needs ale-py, for the games' action sets: lram[atari]") from error
    name = _spelled(game, "_")
    if name not in roms.get_all_rom_ids():
        raise BadInput(f"{folder}: ale-py knows no game {game!r}, expected a name like SpaceInvaders")
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    emulator = ale_py.ALEInterface()
    emulator.loadROM(str(roms.get_rom_path(name)))
    return np.array([action.value for action in emulator.getMinimalActionSet()], np.int64)


# ---- The trajectories of a recording ----


def trajectories(job: Job, options: Options, count: Count, block: int = BLOCK) -> Iterator[Trajectory]:
    """Yields a game's episodes in order of time.

    Args:
        job: The game, with the files of the checkpoints to read.
        options: How many transitions to take.
        count: The account; rows that no file holds in a readable state are only told in its problems.
        block: Compressed bytes read at once; the trajectories do not depend on it.

    Raises:
        BadInput: An array has another type, shape or capacity than DQN-Replay's, its values are none that a game
            makes, or ale-py is missing or does not know the game.
    """
    game, run = _place(job.files[0].parent)
    checkpoints = _checkpoints(job.files)
    _check_headers(checkpoints)
    source = (
        f"DQN-Replay (Agarwal et al. 2020), {game} run {run}: sticky actions 0.25, frame skip 4, rewards clipped to "
        f"[-1, 1] (the return is no game score); converted by lram {importlib.metadata.version('lram')}"
    )
    walk = _Walk(job.task, source, _action_set(game, job.files[0].parent), count)
    begin, start, _ = _plan(checkpoints, options.last)
    before: _Checkpoint | None = None
    for number, paths in checkpoints[begin:]:
        checkpoint = _load(number, paths)
        if not checkpoint:
            continue
        if isinstance(checkpoint, str):
            count.problems.append(checkpoint)
            walk.lose()
            before = None
            continue
        count.problems += checkpoint.problems
        joined, problem = _joined(before, checkpoint) if before else (False, "")
        count.problems += [problem] if problem else []
        if not joined:
            walk.lose()
        yield from _episodes(checkpoint, checkpoint.first if start is None else start, walk, block)
        before, start = checkpoint, None
    walk.leave("of the unfinished episode at the end of the recording")


def _episodes(checkpoint: _Checkpoint, at: int, walk: _Walk, block: int) -> Iterator[Trajectory]:
    """Walks over one checkpoint in order of time, from the row `at` on; -1 is the last row, which comes first."""
    count, stop, capacity, path = walk.count, checkpoint.stop, checkpoint.capacity, checkpoint.frames
    readable, last_frame, problem = _survey(path, block)
    if problem:
        count.problems.append(f"{path}: {problem}; {readable:,} of {capacity:,} frames could be read")
    count.read += capacity
    count.drop("stale or never written", checkpoint.readable - (stop - checkpoint.first))
    count.drop(NOT_ASKED, at - checkpoint.first)
    unreadable = capacity - checkpoint.readable
    if at < 0:
        if last_frame is None:
            unreadable += 1
            walk.lose()
        else:
            yield from walk.over(checkpoint, capacity - 1, last_frame)
        at = 0
    end = min(stop, readable)
    row = 0
    for frames in open_array(path, "observation", block)[1] if at < end else ():
        low = max(at - row, 0)
        yield from walk.over(checkpoint, row + low, frames[low : end - row])
        row += len(frames)
        if row >= end:
            break
    if end < stop:
        unreadable += stop - max(end, at)
        walk.lose()
    count.drop("unreadable", unreadable)


@dataclass
class _Walk:
    """Puts episodes together from rows that come in order of time, in pieces of any size.

    Attributes:
        task, source: What its trajectories are called.
        action_set: Number in the full set of each action of the minimal one.
        count: The account it keeps.
        lost: Why the rows up to the next end of an episode are left out; empty where an episode is kept.
        unsure: No row of this episode was seen yet, nor the end of the one before: what comes may be its middle.
        padding: All-zero rows seen of this episode.
        length: Transitions seen of this episode.
        frames, actions, rewards: They themselves, in pieces.
    """

    task: str
    source: str
    action_set: np.ndarray
    count: Count
    lost: str = ""
    unsure: bool = True
    padding: int = 0
    length: int = 0
    frames: list[np.ndarray] = field(default_factory=list)
    actions: list[np.ndarray] = field(default_factory=list)
    rewards: list[np.ndarray] = field(default_factory=list)

    def over(self, checkpoint: _Checkpoint, row: int, frames: np.ndarray) -> Iterator[Trajectory]:
        """Goes over the rows that begin at `row` and have these frames; yields the episodes that end in them."""
        ends = np.flatnonzero(checkpoint.terminals[row : row + len(frames)]) + 1
        for number, (low, high) in enumerate(itertools.pairwise([0, *ends.tolist(), len(frames)])):
            if low < high:
                self._take(checkpoint, row + low, frames[low:high])
            if number < len(ends):
                trajectory = self._finished() if self.length and not self.lost else None
                self._begin()
                if trajectory:
                    yield trajectory

    def _take(self, checkpoint: _Checkpoint, row: int, frames: np.ndarray) -> None:
        """Adds rows that belong to one episode."""
        if not self.lost and self.padding < PADDING:
            pads = min(PADDING - self.padding, len(frames))
            zero = ~frames[:pads].any((1, 2))
            for array in (checkpoint.actions, checkpoint.rewards, checkpoint.terminals):
                zero &= array[row : row + pads] == 0
            good = pads if zero.all() else int(zero.argmin())
            self.count.drop("all-zero padding before an episode", good)
            self.padding += good
            row, frames = row + good, frames[good:]
            if good < pads and self.unsure:
                self.lost = NO_BEGINNING
            elif good < pads:
                self._skip("of an episode without three all-zero rows before it", checkpoint, row)
        if not self.lost and self.length + len(frames) > LONGEST:
            self._skip(f"of an episode of more than {LONGEST:,} steps", checkpoint, row + LONGEST - self.length)
        if self.lost:
            self.count.drop(self.lost, len(frames))
        elif len(frames):
            actions, rewards = (x[row : row + len(frames)] for x in (checkpoint.actions, checkpoint.rewards))
            highest, where = len(self.action_set) - 1, f"{checkpoint.frames}: from row {row:,} on"
            if actions.min() < 0 or actions.max() > highest:
                raise BadInput(f"{where}, actions are {actions.min()} to {actions.max()}, expected 0 to {highest}")
            if not (np.abs(rewards) <= 1).all():
                raise BadInput(f"{where}, rewards lie outside [-1, 1], expected clipped ones")
            self.actions.append(self.action_set[actions])
            self.rewards.append(rewards)
            self.frames.append(shrink(frames))
            self.length += len(frames)

    def _finished(self) -> Trajectory:
        trajectory = Trajectory(
            domain="atari",
            task=self.task,
            episode=self.count.episodes,
            seed=-1,
            states=np.concatenate(self.frames)[:, None],
            actions=np.concatenate(self.actions),
            rewards=np.concatenate(self.rewards),
            terminated=self.length < LONGEST,
            truncated=self.length == LONGEST,
            source=self.source,
        )
        self.count.wrote(self.length)
        return trajectory

    def _begin(self) -> None:
        self.lost, self.unsure, self.padding, self.length = "", False, 0, 0
        self.frames, self.actions, self.rewards = [], [], []

    def _skip(self, reason: str, checkpoint: _Checkpoint, row: int) -> None:
        """Leaves the episode out; says so the first time that there is such a reason."""
        if reason not in self.count.dropped:
            self.count.problems.append(f"{checkpoint.frames}: row {row:,} is {reason}; all such episodes are left out")
        self.leave(reason)
        self.lost = reason

    def leave(self, reason: str) -> None:
        """Leaves out what there is of the current episode."""
        length = self.length
        self._begin()
        self.count.drop(reason, length)

    def lose(self) -> None:
        """Notes that rows are missing here: what was begun has no end, what follows no beginning."""
        self.leave("of an episode whose end is missing")
        self.unsure = True


# ---- How checkpoints follow each other ----


def _plan(checkpoints: list[Files], last: int) -> tuple[int, int | None, int]:
    """Finds where the last transitions begin, from the small arrays of the latest checkpoints alone.

    Args:
        checkpoints: Number and files of each, in order.
        last: Transitions wanted at most; 0 means all.

    Returns:
        Index of the checkpoint and the row in it (-1 is the last row, the first in time) with which an episode
        begins, the row None for the beginning of the recording; and the index of the earliest checkpoint looked at.
    """
    ends = np.empty((0, 2), np.int64)  # Of every row that ends an episode, its place in time and its segment.
    bases = []  # Of every checkpoint, the place of its first row in time, its index, that row; places end at 0.
    base = segment = 0
    after: _Checkpoint | None = None
    for index in range(len(checkpoints) - 1, -2, -1) if last else ():
        loaded = _load(*checkpoints[index]) if index >= 0 else ""
        checkpoint = None if isinstance(loaded, str) else loaded
        if after and not (checkpoint and _joined(checkpoint, after)[0]):
            ends = np.concatenate([[[base - 1, segment]], ends]) if after.opens else ends
            segment -= 1
        if checkpoint:
            order = np.arange(checkpoint.first, checkpoint.stop)
            base -= len(order)
            bases.append((base, index, checkpoint.first))
            here = base + np.flatnonzero(checkpoint.terminals[order])
            ends = np.concatenate([np.stack([here, np.full(len(here), segment)], 1), ends])
        lengths = np.diff(ends[:, 0]) - PADDING
        lengths[(np.diff(ends[:, 1]) != 0) | (lengths < 0) | (lengths > LONGEST)] = 0
        held = np.cumsum(lengths[::-1])
        if len(held) and held[-1] > last:
            start = int(ends[-1 - np.searchsorted(held, last, side="right"), 0]) + 1
            place, begin, first = next(each for each in bases if each[0] <= start)
            return begin, start - place + first, max(index, 0)
        after = checkpoint
    return 0, None, 0


def _joined(before: _Checkpoint, after: _Checkpoint) -> tuple[bool, str]:
    """Says whether one checkpoint follows another without a gap, and what is to be said if not."""
    apart = "; no episode is joined across"
    if after.number != before.number + 1:
        missing = " to ".join(map(str, sorted({before.number + 1, after.number - 1})))
        return False, f"{after.frames.parent}: holds no checkpoint {missing}{apart}"
    if before.readable < before.capacity or after.first == 0:
        return False, ""  # Said already: an array is cut.
    if after.add_count < after.capacity and before.stop == before.capacity - 1:  # The final one counts from its row 0.
        stale = slice(after.add_count, after.capacity - 1)
        arrays = ((c.terminals[stale], c.actions[stale], c.rewards[stale]) for c in (before, after))
        if not all(map(np.array_equal, *arrays)):
            return False, f"{after.frames}: the rows behind its end are not those of the checkpoint before{apart}"
    elif after.add_count - before.add_count != after.capacity or before.stop != before.capacity - 1:
        step = f"{before.add_count:,} to {after.add_count:,}"
        return False, f"{after.frames}: add_count goes from {step}, expected a step of {after.capacity:,}{apart}"
    return True, ""


def _check_headers(checkpoints: list[Files]) -> None:
    """Checks type, shape and capacity of every array before the first trajectory is made."""
    first: tuple[int, Path] | None = None
    for _, paths in checkpoints:
        for kind, path in paths.items():
            with suppress(Cut):
                capacity, _ = open_array(path, kind, HEADER)
                if kind != "add_count":
                    first = first or (capacity, path)
                    if capacity != first[0]:
                        raise BadInput(
                            f"{path}: holds {capacity:,} rows, expected {first[0]:,} as {first[1].name} does"
                        )


def _load(number: int, paths: dict[str, Path]) -> _Checkpoint | str:
    """Reads the small arrays of a checkpoint; returns a sentence where nothing of it can be used, or nothing is new."""
    if missing := [kind for kind in KINDS if kind not in paths]:
        folder = next(iter(paths.values())).parent
        return f"{folder}: checkpoint {number} has no {missing[0]} file; it is left out"
    capacity, arrays, problems = 0, {}, []
    for kind in ("add_count", "action", "reward", "terminal"):
        parts: list[np.ndarray] = []
        try:
            capacity, content = open_array(paths[kind], kind)
            for part in content:
                parts.append(part)
        except Cut as error:
            if isinstance(error, Broken) or not parts:
                return f"{paths[kind]}: {error}; checkpoint {number} is left out"
            problems.append(f"{paths[kind]}: {error}; {sum(map(len, parts)):,} of {capacity:,} rows could be read")
        arrays[kind] = np.concatenate(parts)
    add_count = int(arrays["add_count"][0])
    if add_count < 0:
        raise BadInput(f"{paths['add_count']}: add_count is {add_count}, expected the number of rows added")
    if number > 0 and add_count == capacity - 1:
        return ""  # The recording ended where the one before was written: this one repeats it.
    readable = min(len(arrays[kind]) for kind in ("action", "reward", "terminal"))
    actions, rewards, terminals = (arrays[kind][:readable] for kind in ("action", "reward", "terminal"))
    return _Checkpoint(number, paths["observation"], capacity, add_count, actions, rewards, terminals, problems)


def _survey(path: Path, block: int) -> tuple[int, np.ndarray | None, str]:
    """Decompresses a file of observations; returns how many rows are good, (1, 84, 84) the last, and what is wrong."""
    rows, last = 0, None
    try:
        for frames in open_array(path, "observation", block)[1]:
            rows += len(frames)
            last = frames[-1:]
    except Cut as error:
        return (0 if isinstance(error, Broken) else rows), None, str(error)
    return rows, last, ""


# ---- Arrays in gzip-compressed .npy files, from front to back ----
