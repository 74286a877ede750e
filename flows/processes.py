"""Runs plain functions in worker processes: of this machine, or of a Dask cluster reached by its address.

    with workers(settings.workers, settings.scheduler) as pool:
        results = [pool.submit(train_goal, settings, task, root) for task in tasks]

Processes of this machine end with this one, even when it is killed. They are spawned, not forked: Prefect has
threads, and a fork of a process with threads may hang. Each costs the imports of what it runs, a second or two. A
Dask cluster's workers need this package installed, and see the same files under the same paths.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import Connection

from lram.datasets.specs import BadInput

CONNECT_SECONDS = 10


@contextmanager
def workers(number: int = 0, scheduler: str | None = None) -> Iterator[Executor]:
    """Gives an executor over processes.

    Args:
        number: Processes of this machine; 0 takes one per core.
        scheduler: Address of a Dask scheduler ("tcp://host:8786"), whose workers are used instead.

    Raises:
        BadInput: No scheduler answers at the address.
    """
    if scheduler is None:
        with process_pool(number) as pool:
            yield pool
        return
    from distributed import Client

    try:
        client = Client(scheduler, timeout=CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError) as error:
        raise BadInput(f"{scheduler}: no Dask scheduler answers there ({error})") from error
    with client, client.get_executor(pure=False) as pool:
        yield pool


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
