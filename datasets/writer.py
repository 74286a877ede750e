"""Writes the trajectories of one task so that a kill at any moment loses none that was on disk.

    with TaskWriter(ROOT, "darkroom", "room5x5-goal-02-03", provenance={"seed": 0}) as writer:
        writer.add(trajectory)
        writer.sync()           # where something else relies on what was added
        writer.finish()

Every file appears whole under its final name, in the order of adding; index rows follow in parts of 1,000. Opening a
task again removes temporary files and adopts whole ones that the index does not know yet. One process at a time may
write a task (a lock says so); different tasks of a dataset can be written at once. Each file costs an fsync, half a
millisecond on a fast disk, many on a busy one: threads wait for it, and the next `add` or `sync` gives the file its
name. A kill can lose the last `BEHIND` trajectories that were added and not synced.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from lram.datasets.disk import whole
from lram.datasets.index import (
    INDEX,
    PARTS,
    check_place,
    read_index,
    row_of,
    shared_meta,
    table_of,
    task_folder,
    trajectory_files,
    write_index,
)
from lram.datasets.specs import BadInput
from lram.datasets.trajectory import Codec, Trajectory, encode, scan

ROWS_PER_PART = 1000
BEHIND = 16
"""Files that wait for the disk at once."""
SYNCS = 4
"""Files that are synced at once, each by a thread: file systems take several together."""
LOCK_SECONDS = 5.0


class TaskWriter:
    """Adds trajectories to one task, in any order of episodes.

    When the disk fails a file, none after it appears either, and every later call raises that error.

    Attributes:
        folder: The task's folder.
        next_episode: The lowest episode number above all that were added.
        adopted: Number of whole files found on opening that the index had lost to a kill.
    """

    def __init__(
        self, root: Path, domain: str, task: str, provenance: dict[str, Any], codec: Codec | None = None
    ) -> None:
        """Opens or creates a task.

        Args:
            root: The dataset's directory.
            domain: The task's domain.
            task: The task's name.
            provenance: Who makes these trajectories, with which settings; JSON values only.
            codec: How to store states, the domain's default when None.

        Raises:
            BadInput: Another process writes this task, the task was made with other settings, or what is on
                disk breaks the format.
        """
        self.folder = task_folder(root, domain, task)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._codec = codec
        self._lock = _lock(self.folder)
        try:
            self._meta: dict[str, Any] = {"domain": domain, "task": task, "complete": False}
            # Through JSON, so that what is compared is what is stored.
            self._meta["provenance"] = json.loads(json.dumps(provenance))
            self._rows: dict[int, dict[str, Any]] = {}
            self._pending: list[dict[str, Any]] = []
            self._under_way: deque[tuple[dict[str, Any], ExitStack, Future[None]]] = deque()
            self._failed: BaseException | None = None
            self.adopted = self._recover()
            self._episodes = set(self._rows)
        except BaseException:
            self._lock.close()
            raise
        self._disk = ThreadPoolExecutor(SYNCS)

    def _recover(self) -> int:
        for temporary in self.folder.glob("**/.*.tmp"):
            temporary.unlink()
        indices = [read_index(self.folder)] if (self.folder / INDEX).exists() else []
        for index in indices:
            same_provenance(index.meta["provenance"], self._meta["provenance"], self.folder)
            self._meta = index.meta
        indices += [read_index(self.folder, part.name) for part in sorted(self.folder.glob(PARTS))]
        for index in indices:
            self._meta |= {key: index.meta[key] for key in index.meta if key != "complete"}
            self._rows |= {row["episode"]: row for row in index.table.drop_columns("split").to_pylist()}
        known = {row["path"] for row in self._rows.values()}
        adopted = 0
        for path in trajectory_files(self.folder):
            if f"{path.parent.name}/{path.name}" not in known:
                trajectory, image = scan(path)
                check_place(trajectory, self.folder, path)
                self._meta |= shared_meta(trajectory, image)
                self._remember(row_of(trajectory, image))
                adopted += 1
        if not indices:
            write_index(self.folder, table_of(self._meta, []))
        return adopted

    @property
    def next_episode(self) -> int:
        """Returns the lowest episode number above all that were added."""
        return max(self._episodes, default=-1) + 1

    def __len__(self) -> int:
        return len(self._episodes)

    def __contains__(self, episode: int) -> bool:
        return episode in self._episodes

    def add(self, trajectory: Trajectory) -> None:
        """Stores a trajectory; one of the same episode number is replaced.

        Raises:
            BadInput: It breaks the format, belongs to another task, or has states or actions of another shape
                than the trajectories before it.
            OSError, DiskFull: It, or an earlier one, could not be written.
        """
        here = self._meta["domain"], self._meta["task"]
        if (trajectory.domain, trajectory.task) != here:
            raise BadInput(f"{self.folder}: a trajectory of {trajectory.domain}/{trajectory.task} is not its own")
        image = encode(trajectory, self._codec)
        for key, value in shared_meta(trajectory, image).items():
            if key in self._meta and self._meta[key] != value:
                found = f"episode {trajectory.episode} has {key} {value}, expected {self._meta[key]}"
                raise BadInput(f"{self.folder}: {found}")
            self._meta[key] = value
        # One that replaces another may have its temporary name.
        self._settle(0 if trajectory.episode in self else BEHIND - 1)
        row = row_of(trajectory, image)
        path = self.folder / row["path"]
        path.parent.mkdir(exist_ok=True)
        with ExitStack() as opened:
            file = opened.enter_context(whole(path, sync=False))
            file.write(image.data)
            file.flush()
            self._under_way.append((row, opened.pop_all(), self._disk.submit(os.fsync, file.fileno())))
        self._episodes.add(trajectory.episode)
        if len(self._pending) >= ROWS_PER_PART:
            self.flush()

    def _settle(self, behind: int) -> None:
        """Gives the files that are on disk their names, and waits until at most so many are not."""
        if self._failed:
            raise self._failed
        while self._under_way and (len(self._under_way) > behind or self._under_way[0][2].done()):
            row, opened, synced = self._under_way.popleft()
            try:
                with opened:
                    synced.result()
            except BaseException as error:
                self._failed = error  # nor do those behind it get a name: a later run would not see the gap
                raise
            self._remember(row)

    def _remember(self, row: dict[str, Any]) -> None:
        self._rows[row["episode"]] = row
        self._pending.append(row)

    def sync(self) -> None:
        """Waits until all that was added is on disk, where no kill can take it."""
        self._settle(0)

    def flush(self) -> None:
        """Writes the rows that are not on disk yet as a part of the index, after their files."""
        self.sync()
        if self._pending:
            name = PARTS.replace("*", f"{self._pending[0]['episode']:09d}")
            write_index(self.folder, table_of(self._meta, self._pending), name)
            self._pending = []

    def finish(self, account: dict[str, Any] | None = None) -> None:
        """Merges the index and marks the task complete: the moment from which it need not be made again.

        Args:
            account: What can be said only now, kept in the index and in dataset.json: rows read, written and left
                out, say; JSON values only.
        """
        self.sync()
        self._meta["complete"] = True
        if account is not None:
            self._meta["account"] = account
        self._merge()

    def _merge(self) -> None:
        write_index(self.folder, table_of(self._meta, list(self._rows.values())))
        self._pending = []
        for part in self.folder.glob(PARTS):
            part.unlink()

    def close(self) -> None:
        """Merges what was added and lets other processes write the task."""
        with closing(self._lock), self._disk:
            try:
                self.sync()
            finally:
                if self._pending or any(self.folder.glob(PARTS)):
                    self._merge()

    def __enter__(self) -> TaskWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _lock(folder: Path) -> IO[str]:
    """Takes the task's lock, waiting a little: the writers of a killed run may be a moment from their end."""
    lock = open(folder / ".lock", "w")  # noqa: SIM115 (held until close)
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
        except OSError as error:
            if time.monotonic() > deadline:
                lock.close()
                raise BadInput(f"{folder}: another process is writing this task") from error
            time.sleep(0.05)


def same_provenance(old: dict[str, Any], new: dict[str, Any], folder: Path, free: frozenset[str] = frozenset()) -> None:
    """Checks that a task on disk was made as it would be made now.

    Args:
        old: The provenance on disk.
        new: The provenance of whoever comes now, JSON values as they come back from a file.
        folder: The task's folder.
        free: Keys that may differ.

    Raises:
        BadInput: They differ; the message names the first key that does.
    """
    for key in sorted((old.keys() | new.keys()) - free):
        if old.get(key) != new.get(key):
            raise BadInput(
                f"{folder}: was made with {key} = {old.get(key)!r}, not {new.get(key)!r}; "
                "choose another dataset directory, or remove this folder"
            )


def discard(root: Path, domain: str, task: str) -> None:
    """Removes a task that is to be made anew: whole or, killed on the way, not at all.

    Raises:
        BadInput: Another process is writing it.
    """
    folder = task_folder(root, domain, task)
    aside = folder.with_name(f".{task}.old")
    shutil.rmtree(aside, ignore_errors=True)  # what a kill left
    with _lock(folder):
        folder.rename(aside)
    shutil.rmtree(aside)


def finished(root: Path, domain: str, task: str) -> dict[str, Any] | None:
    """Returns the provenance of a task that is complete on disk, None otherwise."""
    folder = task_folder(root, domain, task)
    if not (folder / INDEX).exists():
        return None
    meta = read_index(folder).meta
    return meta["provenance"] if meta["complete"] else None
