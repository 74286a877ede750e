"""Runs plain functions in worker processes that end with this one, even when it is killed.

    with process_pool(workers) as pool:
        results = [pool.submit(train_goal, settings, task, root) for task in tasks]

Workers are spawned, not forked: Prefect has threads, and a fork of a process with threads may hang. Each costs
the imports of what it runs, a second or two.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.connection import Connection


def process_pool(workers: int) -> ProcessPoolExecutor:
    """Returns a pool of `workers` processes; 0 takes one per core."""
    context = multiprocessing.get_context("spawn")
    alive, held = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(workers or os.cpu_count() or 1, context, _end_with_parent, (alive,))
    # Only this process holds the writing end: when it is gone, for whatever reason, the workers read its end.
    pool._lram_alive = held  # type: ignore[attr-defined]
    return pool


def _end_with_parent(alive: Connection) -> None:
    def wait() -> None:
        try:
            alive.recv()
        except EOFError:
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
