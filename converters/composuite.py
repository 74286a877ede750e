"""CompoSuite's offline data: a million rows a task, flat, in one HDF5 file of gzip chunks.

    lram convert composuite SRC ROOT
    lram convert composuite SRC ROOT --kinds expert --episodes 0

SRC is the folder of all kinds, of one kind, or of one task; folders named as in the published archives
(`expert-panda-offline-comp-data`) are understood. A kind other than expert becomes a suffix of the task, so that
none overwrites another. The two end flags are read whole, which tells where every episode lies; states, actions and
rewards follow in blocks of whole episodes.

* The published actions are a bounded action plus noise, and the simulator clips what it is given to [-1, 1]: so does
  this converter, since what was carried out is what the next state follows from.
* The environment knows no end but its time limit (the arm goes on after success), and says so in `terminals`: a row
  with `timeouts`, or the 500th row, is a truncation whatever `terminals` says.
* The observation after the last action is not stored: trajectories have no `final_state`.

What limits the speed is compressing the states and writing a file per episode; reading takes a tenth of the time.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import h5py
import numpy as np

from lram.converters.safe_hdf5 import array, opened
from lram.converters.source import SELECTS, Count, Job
from lram.datasets.specs import BadInput, tasks
from lram.datasets.trajectory import Trajectory

VERSION = 1
Kind = Literal["expert", "medium", "warmstart", "medium-replay-subsampled"]
KINDS: dict[str, Kind] = {"random": "warmstart", **{kind: kind for kind in get_args(Kind)}}
"""Kinds by the names of their folders; `random` is what the first release called warmstart."""
FOLDER = re.compile(f"({'|'.join(KINDS)})(-[a-z0-9]+-offline-comp-data)?")
HORIZON = 500
"""Steps of an episode at most (`env_horizon` of CompoSuite's `make`)."""
BLOCK = 8192
"""Rows of whole episodes read at once."""
DEPTH = 4
"""Folders between SRC and a file at most: kind, published archive, task, and one more."""
WIDTHS = {
    "object-state": 14,
    "obstacle-state": 14,
    "goal-state": 17,
    "object_id": 4,
    "robot_id": 4,
    "obstacle_id": 4,
    "subtask_id": 4,
    "robot0_proprio-state": 32,
}
"""Columns of an observation, by the keys of CompoSuite's own wrapper, in its order."""
NUM_COLUMNS = sum(WIDTHS.values())
NUM_ACTIONS = 8
Span = tuple[int, int]
"""Rows [start, stop) of an episode."""


@dataclass(frozen=True)
class Options:
    """What to take of Composuite's data."""

    tasks: tuple[str, ...] = field(default=(), metadata={SELECTS: True})
    """Tasks to convert, such as IIWA_Box_None_PickPlace; none named means all."""
    kinds: tuple[Kind, ...] = field(default=(), metadata={SELECTS: True})
    """Kinds to convert; none named means all."""
    episodes: int = 2000
    """Episodes of each task at most, from the start of its file; 0 takes all."""
    unfinished: bool = False
    """Keep the rows behind the last end flag, as a trajectory that is neither terminated nor truncated."""


def state_layout() -> dict[str, list[int]]:
    """Returns {key: [start, stop]} over the 93 columns of an observation."""
    stops = np.cumsum(list(WIDTHS.values())).tolist()
    return {key: [stop - width, stop] for (key, width), stop in zip(WIDTHS.items(), stops)}


def jobs(src: Path, options: Options) -> list[Job]:
    """Lists the tasks of a source, sorted by name.

    Raises:
        BadInput: Nothing is found, or a folder's name is no task or kind.
    """
    known = {task for domain, task in tasks() if domain == "composuite"}
    for task in options.tasks:
        if task not in known:
            raise BadInput(f"option tasks: {task!r} is no Composuite task, expected one like IIWA_Box_None_PickPlace")
    # Named levels and no `**`: the four robots of a kind are often linked into one folder.
    paths = [src] if src.is_file() else [p for d in range(DEPTH + 1) for p in src.glob("*/" * d + "data.hdf5")]
    found = []
    for path in paths:
        task, kind = path.absolute().parent.name, _kind(path)
        if task not in known:
            raise BadInput(f"{path}: lies in {task!r}, expected the folder of a task like IIWA_Box_None_PickPlace")
        if task in (options.tasks or known) and kind in (options.kinds or get_args(Kind)):
            name = task if kind == "expert" else f"{task}.{kind}"
            found.append(Job("composuite", name, src, (path,), kind))
    if not found:
        raise BadInput(f"{src}: nothing to convert, expected <kind>/<task>/data.hdf5 of the chosen kinds and tasks")
    return sorted(found, key=lambda job: job.task)


def _kind(path: Path) -> Kind:
    """Returns the kind that the nearest folder above a task names."""
    for folder in path.absolute().parents[1:]:
        if match := FOLDER.fullmatch(folder.name):
            return KINDS[match[1]]
    raise BadInput(f"{path}: no folder above it is named after a kind ({', '.join(KINDS)})")


def trajectories(job: Job, options: Options, count: Count) -> Iterator[Trajectory]:
    """Makes the trajectories of one task, in the order of its file.

    Raises:
        BadInput: The file is unsafe or not whole, or an array is missing or of another shape or dtype.
    """
    path = job.files[0]
    version = importlib.metadata.version("lram")
    source = (
        f"CompoSuite offline data, {job.detail} (Hussing et al. 2023), actions clipped, converted by lram {version}"
    )
    with opened(path) as file:
        columns = [
            array(file, "observations", (None, NUM_COLUMNS)),
            array(file, "actions", (None, NUM_ACTIONS)),
            array(file, "rewards", (None,)),
        ]
        flags = [array(file, name, (None,), "buif") for name in ("terminals", "timeouts")]
        lengths = {column.name.strip("/"): len(column) for column in (*columns, *flags)}
        if len(set(lengths.values())) > 1:
            found = ", ".join(f"{name} {length}" for name, length in lengths.items())
            raise BadInput(f"{path}: lengths are {found}, expected equal ones")
        terminals, timeouts = (_flag(path, flag) for flag in flags)
        count.read += len(timeouts)
        spans = _spans(terminals | timeouts, options, count)
        # A lost end flag would make one episode of two.
        damaged = [(f"longer than {HORIZON} steps", *span) for span in spans if span[1] - span[0] > HORIZON]
        spans = [span for span in spans if span[1] - span[0] <= HORIZON]
        for (start, stop), rows in _rows(columns, spans):
            if rows is None:
                damaged.append(("unreadable rows", start, stop))
                continue
            if not all(np.isfinite(part).all() for part in rows):
                damaged.append(("values that are not finite", start, stop))
                continue
            states, actions, rewards = rows
            count.change("actions clipped to [-1, 1]", int((np.abs(actions) > 1).any(1).sum()))
            ended = bool(terminals[stop - 1] or timeouts[stop - 1])
            truncated = ended and bool(timeouts[stop - 1] or stop - start == HORIZON)
            trajectory = Trajectory(
                domain="composuite",
                task=job.task,
                episode=count.episodes,
                seed=-1,
                states=states,
                actions=np.clip(actions, -1, 1),
                rewards=rewards,
                terminated=ended and not truncated,
                truncated=truncated,
                source=source,
                success=bool((rewards == 1).any()),
                state_layout=state_layout(),
            )
            count.wrote(trajectory.length)
            yield trajectory
        _say(path, damaged, count)


def _flag(path: Path, dataset: h5py.Dataset) -> np.ndarray:
    try:
        values = dataset[:]
    except OSError as error:
        raise BadInput(f"{path}: {dataset.name.strip('/')} cannot be read, so no episode's end is known") from error
    if not np.isin(values, (0, 1)).all():
        raise BadInput(f"{path}: {dataset.name.strip('/')} holds other values than 0 and 1")
    return values.astype(bool)


def _say(path: Path, damaged: list[tuple[str, int, int]], count: Count) -> None:
    """Counts damaged episodes as left out, and tells those of one reason in one sentence."""
    for reason in dict.fromkeys(span[0] for span in damaged):
        rows = [(start, stop) for why, start, stop in damaged if why == reason]
        count.drop(reason, sum(stop - start for start, stop in rows))
        count.problems.append(f"{path}: {len(rows)} episodes left out ({reason}), the first from row {rows[0][0]} on")


def _spans(ends: np.ndarray, options: Options, count: Count) -> list[Span]:
    """Returns the rows [start, stop) of every episode that is wanted; counts the others as left out."""
    stops = (np.flatnonzero(ends) + 1).tolist()
    spans = list(zip([0, *stops], stops))
    tail = (stops[-1] if stops else 0, len(ends))
    kept = spans[: options.episodes or None]
    count.drop("episodes beyond the number asked for", sum(stop - start for start, stop in spans[len(kept) :]))
    if options.unfinished and len(kept) == len(spans) and tail[0] < tail[1]:
        return [*kept, tail]
    count.drop("unfinished episode at the end", tail[1] - tail[0])
    return kept


def _rows(columns: list[h5py.Dataset], spans: list[Span]) -> Iterator[tuple[Span, list[np.ndarray] | None]]:
    """Reads episodes a block at a time; yields each with its part of every column, None where one is unreadable."""
    while spans:
        size = next((n for n, span in enumerate(spans) if n and span[1] - spans[0][0] > BLOCK), len(spans))
        yield from _block(columns, spans[:size])
        spans = spans[size:]


def _block(columns: list[h5py.Dataset], spans: list[Span]) -> Iterator[tuple[Span, list[np.ndarray] | None]]:
    first, last = spans[0][0], spans[-1][1]
    try:
        block = [column[first:last].astype(np.float32, copy=False) for column in columns]
    except OSError:
        # Around what is unreadable, one episode after the other.
        for span in spans:
            yield from _block(columns, [span]) if len(spans) > 1 else [(span, None)]
        return
    for start, stop in spans:
        yield (start, stop), [part[start - first : stop - first] for part in block]
