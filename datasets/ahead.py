"""Batches read ahead of their use by worker processes, into memory that all share.

    for update, batches in batches_ahead(windows, range(first, updates), "train", per_domain=128, seed=0):
        ...  # the arrays are valid until the next update is asked for

Processes, because a window of vectors is a few microseconds of Python, which threads would take from each other
and from the training loop. Forked, because the index of millions of trajectories is then in memory once; a worker
does nothing but read, so what other threads held at the fork does not matter to it. Worker k of W reads every Wth
update and has `SLOTS` pieces of shared memory: memory is bounded, no batch is pickled, and the order is that of
the updates whatever the number of workers. Linux only.
"""

from __future__ import annotations

import contextlib
import mmap
import multiprocessing
import signal
from collections.abc import Callable, Generator, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from lram.datasets.specs import DOMAINS
from lram.datasets.windows import Allocate, Batch, Windows

SLOTS = 2
"""Updates that a worker reads ahead."""
ALIGNMENT = 64
"""Bytes on whose multiples arrays begin."""
FIELDS = ("states", "actions", "previous_rewards", "returns_to_go", "mask", "action_mask")

Read = Callable[[int, Allocate], list[Batch]]


def batches_ahead(
    windows: Windows,
    updates: Sequence[int],
    split: str,
    per_domain: int | Mapping[str, int],
    seed: int,
    part: tuple[int, int] = (0, 1),
    workers: int = 2,
) -> Generator[tuple[int, list[Batch]], None, None]:
    """Reads the batches of updates, in order, in worker processes.

    Args:
        windows: What to draw from.
        updates: Numbers of the updates.
        split: "train" or "validation".
        per_domain: Windows of each domain over all ranks, one number or one for each.
        seed: Seed of the run.
        part: (rank, ranks).
        workers: Processes; 0 reads in this one, when asked.

    Yields:
        (update, its batches, as `Windows.batches` gives them); the arrays are valid until the next is asked for.

    Raises:
        BadInput: A file is missing or damaged.
        RuntimeError: A worker was killed.
    """

    def read(update: int, allocate: Allocate = np.empty) -> list[Batch]:
        return list(windows.batches(update, split, per_domain, seed, part, allocate))

    if not workers or len(updates) < 2:
        for update in updates:
            yield update, read(update)
        return
    first = read(updates[0])
    size = sum(_aligned(array.nbytes) for batch in first for array in _arrays(batch) if array is not None)
    context = multiprocessing.get_context("fork")
    connections: list[Connection] = []
    memories: list[list[mmap.mmap]] = []
    processes = []
    try:
        for k in range(workers):
            here, there = context.Pipe()
            connections.append(here)
            memories.append([mmap.mmap(-1, size) for _ in range(SLOTS)])
            arguments = (there, list(connections), memories[k], updates[1 + k :: workers], read)
            processes.append(context.Process(target=_work, args=arguments, daemon=True))
            processes[-1].start()
            there.close()
        yield updates[0], first
        for i, update in enumerate(updates[1:]):
            connection = connections[i % workers]
            try:
                message = connection.recv()
            except (EOFError, ConnectionResetError) as error:
                raise RuntimeError(f"a process that reads windows was killed before update {update}") from error
            if isinstance(message, Exception):
                raise message
            slot, described = message
            yield update, [_batch(memories[i % workers][slot], *batch) for batch in described]
            with contextlib.suppress(OSError):  # a worker that has read its last update is gone
                connection.send(slot)
    finally:
        for connection in connections:
            connection.close()
        for process in processes:
            process.terminate()
            process.join()


def _arrays(batch: Batch) -> list[np.ndarray | None]:
    return [getattr(batch, name) for name in FIELDS]


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _batch(memory: mmap.mmap, domain: str, places: list[tuple[int, tuple[int, ...], str] | None]) -> Batch:
    """Makes a batch of views into a worker's memory, from (offset, shape, dtype) of each array."""
    arrays: list[Any] = [
        None if place is None else np.ndarray(place[1], place[2], buffer=memory, offset=place[0]) for place in places
    ]
    return Batch(DOMAINS[domain], *arrays)


def _work(
    connection: Connection, others: list[Connection], memories: list[mmap.mmap], updates: Sequence[int], read: Read
) -> None:
    """Reads updates into memory that is free, and says where they lie, until the reader goes away."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one who is interrupted ends its workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # by this, whatever it does on it itself
    for other in others:  # a copy of its own end would keep a worker from seeing that the reader has gone
        other.close()
    free = list(range(len(memories)))
    try:
        for update in updates:
            slot = free.pop() if free else connection.recv()
            memory, used = memories[slot], 0
            base = np.frombuffer(memory, np.uint8).ctypes.data

            def allocate(shape: tuple[int, ...], dtype: Any, memory: mmap.mmap = memory) -> np.ndarray:
                nonlocal used
                array = np.ndarray(shape, dtype, buffer=memory, offset=used)
                used += _aligned(array.nbytes)
                return array

            try:
                batches = read(update, allocate)
            except Exception as error:
                connection.send(error)
                return
            described = [
                (
                    batch.domain.name,
                    [
                        None if array is None else (array.ctypes.data - base, array.shape, array.dtype.str)
                        for array in _arrays(batch)
                    ],
                )
                for batch in batches
            ]
            connection.send((slot, described))
    except (EOFError, OSError):
        return
