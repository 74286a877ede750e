"""Measures one conversion through threads, through processes, and through a Dask cluster reached by its address.

    lram bench convert --part runners
    rows = bench_runners(ConvertBenchSettings(part="runners"))

The same flow, the same source, two workers each. The workers are started and have imported what they run before the
clock starts; what starting takes is given apart. The overhead of a task is what Prefect and the workers add to it:
the time of a task that does nothing, sent the same way, beside the mean work of one that converts. Every file that
the three ways write is compared.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from lram.converters import composuite
from lram.converters.bench_convert import TASK, ConvertBenchSettings, make_composuite, nothing, ready
from lram.converters.run import Result
from lram.datasets.bench_loader import Row
from lram.datasets.disk import sha256_of
from lram.datasets.specs import tasks
from lram.flows.convert import submit_jobs
from lram.flows.processes import process_pool, workers

WORKERS = 2
JOBS = 8
ROWS = {False: 500_000, True: 1_000}
"""Rows of each job's source, by whether it is to be quick."""
EMPTY = {False: 100, True: 10}
"""Tasks that do nothing."""


def bench_runners(settings: ConvertBenchSettings, progress: Callable[[str], None] | None = None) -> Iterator[Row]:
    """Converts the same source in three ways; call it in a flow.

    Args:
        settings: Where the data goes, and how much of it.
        progress: Told what is done now.

    Yields:
        The rows of the table.
    """
    tell = progress or (lambda text: None)
    rows = ROWS[settings.quick]
    section = f"the same conversion, {JOBS} tasks of {rows:,} × 93, {WORKERS} workers"
    place = tempfile.TemporaryDirectory() if settings.work is None else nullcontext(settings.work)
    with place as name:
        source, made = Path(name) / f"runners-{rows}", Path(name) / "converted"
        tell(f"making {rows:,} rows of Composuite")
        make_source(source, rows)
        options = composuite.Options(episodes=0)
        jobs = composuite.jobs(source, options)
        digests = []
        for runner, start in RUNNERS.items():
            tell(f"converting through {runner}")
            root = made / runner.split()[0]
            try:
                began = time.perf_counter()
                with start() as pool:
                    _wake(pool)
                    starting = time.perf_counter() - began
                    began = time.perf_counter()
                    results = [f.result() for f in submit_jobs("composuite", jobs, options, root, None, pool)]
                    wall = time.perf_counter() - began
                    began = time.perf_counter()
                    for future in [empty_task.submit(pool) for _ in range(EMPTY[settings.quick])]:
                        future.result()
                    empty = (time.perf_counter() - began) / EMPTY[settings.quick]
                digests.append(content(root))
            finally:
                shutil.rmtree(made, ignore_errors=True)
            work = sum(_seconds(result) for result in results) / len(results)
            share = empty / work
            yield Row(section, f"{runner}, all tasks", f"{wall:.1f} s, after {starting:.1f} s of starting")
            value = f"{empty * 1e3:.1f} ms of {work:.1f} s, {share:.2%}"
            yield Row(section, f"{runner}, overhead of a task", value, None, "≤ 2%", share <= 0.02)
        same = all(digest == digests[0] for digest in digests)
        value = f"{len(digests[0]):,} files, {'identical' if same else 'NOT IDENTICAL'}"
        yield Row(section, "what the three wrote, by SHA-256", value, None, "identical", same)


def make_source(folder: Path, rows: int) -> None:
    """Makes a file as Composuite's, and links it as that of `JOBS` tasks."""
    make_composuite(folder, rows)
    names = [name for domain, name in tasks() if domain == "composuite"]
    for name in names[: JOBS + 1]:
        if name != TASK and len(list(folder.glob("expert/*"))) < JOBS:
            (folder / "expert" / name).mkdir(exist_ok=True)
            os.link(folder / "expert" / TASK / "data.hdf5", folder / "expert" / name / "data.hdf5")


def content(root: Path) -> dict[str, str]:
    """Returns the SHA-256 of every file of a dataset."""
    paths = sorted(path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): sha256_of(path) for path in paths}


# ---- Who does the work ----


@contextmanager
def _threads() -> Iterator[Executor]:
    with ThreadPoolExecutor(WORKERS) as pool:
        yield pool


@contextmanager
def _dask() -> Iterator[Executor]:
    """Gives the workers of a cluster that is found by its address alone, as one on other machines is."""
    from distributed import LocalCluster

    cluster = LocalCluster(n_workers=WORKERS, threads_per_worker=1, dashboard_address=None)
    with cluster, workers(scheduler=cluster.scheduler_address) as pool:
        yield pool


RUNNERS: dict[str, Any] = {
    "threads": _threads,
    "processes": lambda: process_pool(WORKERS),
    "dask cluster": _dask,
}


@task(task_run_name="nothing", cache_policy=NO_CACHE)
def empty_task(pool: Executor) -> None:
    """Does nothing, in a worker."""
    return pool.submit(nothing).result()


def _wake(pool: Executor) -> None:
    """Waits until every worker has imported what it runs."""
    for future in [pool.submit(ready) for _ in range(WORKERS)]:
        future.result()


def _seconds(result: Any) -> float:
    if not isinstance(result, Result):
        raise result
    return result.seconds
