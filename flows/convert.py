"""Converts what others recorded into trajectories.

    lram convert composuite SRC ROOT
    lram convert dqn-replay SRC ROOT --last 5000000 --dry-run
    convert("mimicgen", Path("SRC"), Path("ROOT"))

A Prefect task is one game or task of the source, run in a worker process: of this machine, or of a Dask cluster.
What is complete on disk is not converted again, unless a source file, an option or the converter's version has
changed: then the task is made anew. A source that is damaged costs what is damaged; a job that cannot
be done at all costs no other; both are said at the end, with exit status 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import tyro
from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.futures import PrefectFuture
from prefect.task_runners import ThreadPoolTaskRunner
from pydantic import TypeAdapter, ValidationError
from rich.table import Table

from lram.converters import composuite, dqn_replay, lram_hub, mimicgen, minari, procgen
from lram.converters.run import Result, convert_job, state_of
from lram.converters.source import Job
from lram.datasets.disk import DiskFull
from lram.datasets.index import write_description
from lram.datasets.specs import BadInput
from lram.datasets.trajectory import Codec
from lram.flows.events import announce
from lram.flows.processes import workers as worker_pool
from lram.flows.progress import bar

SOURCES: dict[str, ModuleType] = {
    "composuite": composuite,
    "dqn-replay": dqn_replay,
    "lram": lram_hub,
    "mimicgen": mimicgen,
    "minari": minari,
    "procgen": procgen,
}


@dataclass(frozen=True)
class ConvertSettings:
    """What to convert, and where to."""

    src: Path
    """Folder or file that holds the source."""
    root: Path
    """Dataset directory to write to; other tasks in it stay as they are."""
    workers: int = 0
    """Tasks converted at once, each on one core; 0 takes all cores."""
    scheduler: str | None = None
    """Address of a Dask scheduler, tcp://HOST:PORT, whose workers do the work instead."""
    codec: Codec | None = None
    """How states are stored; by default images and Composuite's vectors with gzip, other vectors plain."""
    dry_run: bool = False
    """Only list what would be made."""


@dataclass(frozen=True)
class ComposuiteSettings(ConvertSettings):
    """Composuite's offline data: <kind>/<task>/data.hdf5."""

    options: Annotated[composuite.Options, tyro.conf.arg(name="")] = field(default_factory=composuite.Options)
    """What is particular to Composuite."""


@dataclass(frozen=True)
class DqnReplaySettings(ConvertSettings):
    """The DQN-Replay dataset: <Game>/<run>/replay_logs."""

    options: Annotated[dqn_replay.Options, tyro.conf.arg(name="")] = field(default_factory=dqn_replay.Options)
    """What is particular to DQN-Replay."""


@dataclass(frozen=True)
class LramSettings(ConvertSettings):
    """The sets that LRAM's authors published: npz, tar.gz and pickled buffers."""

    options: Annotated[lram_hub.Options, tyro.conf.arg(name="")] = field(default_factory=lram_hub.Options)
    """What is particular to LRAM's sets."""


@dataclass(frozen=True)
class MimicgenSettings(ConvertSettings):
    """MimicGen and robomimic: one HDF5 file per task."""

    options: Annotated[mimicgen.Options, tyro.conf.arg(name="")] = field(default_factory=mimicgen.Options)
    """What is particular to MimicGen."""


@dataclass(frozen=True)
class MinariSettings(ConvertSettings):
    """A Minari dataset on disk."""

    options: Annotated[minari.Options, tyro.conf.arg(name="")] = field(default_factory=minari.Options)
    """What is particular to Minari."""


@dataclass(frozen=True)
class ProcgenSettings(ConvertSettings):
    """Procgen recordings of RA-DT: a file per episode, or pickled buffers."""

    options: Annotated[procgen.Options, tyro.conf.arg(name="")] = field(default_factory=procgen.Options)
    """What is particular to Procgen."""


SETTINGS: dict[str, Callable[..., ConvertSettings]] = {
    "composuite": ComposuiteSettings,
    "dqn-replay": DqnReplaySettings,
    "lram": LramSettings,
    "mimicgen": MimicgenSettings,
    "minari": MinariSettings,
    "procgen": ProcgenSettings,
}


class PartlyConverted(BadInput):
    """Some tasks of a source could not be converted at all.

    Attributes:
        made: What became of the others.
        wrong: What was wrong with each of them.
    """

    def __init__(self, src: Path, made: list[Result], wrong: list[BadInput]) -> None:
        of = len(made) + len(wrong)
        super().__init__(
            f"{src}: {len(wrong)} of {of} tasks could not be converted, first: {wrong[0]}; "
            "mend or remove what is wrong and run the same again, the others are done"
        )
        self.made, self.wrong = made, wrong


@task(task_run_name="{job.name}", cache_policy=NO_CACHE)
def convert_task(
    source: str, job: Job, options: Any, root: Path, codec: Codec | None, pool: Executor
) -> Result | BadInput:
    """Converts one job in a worker process; what is wrong with its source is its result, so that others go on."""
    try:
        return pool.submit(convert_job, module_name(source), job, options, root, codec).result()
    except DiskFull:
        raise  # nor would another job find room
    except BadInput as error:
        return error


def submit_jobs(
    source: str, jobs: list[Job], options: Any, root: Path, codec: Codec | None, pool: Executor
) -> list[PrefectFuture]:
    """Hands every job to the workers of a pool; call it in a flow."""
    return [convert_task.submit(source, job, options, root, codec, pool) for job in jobs]


@flow(name="convert", task_runner=ThreadPoolTaskRunner[Any](max_workers=64))  # type: ignore[arg-type]
def convert(
    source: str,
    src: Path,
    root: Path,
    options: dict[str, Any] | None = None,
    workers: int = 0,
    scheduler: str | None = None,
    codec: Codec | None = None,
) -> list[Result]:
    """Converts every task that a source holds.

    Args:
        source: Which format, a key of `SOURCES`.
        src: Folder or file that holds the source.
        root: Dataset directory to write to.
        options: Fields of the converter's `Options` that differ from their defaults.
        workers: Tasks converted at once; 0 takes all cores.
        scheduler: Address of a Dask scheduler whose workers do the work instead.
        codec: How states are stored, the domain's default when None.

    Returns:
        For every job, in order, what became of it.

    Raises:
        PartlyConverted: Some could not be done at all; the others are.
        BadInput: The source or an option is unknown, or nothing is found.
    """
    chosen, jobs = plan(source, src, options)
    with worker_pool(workers, scheduler) as pool, bar("convert", len(jobs), "tasks") as step:
        futures = submit_jobs(source, jobs, chosen, root, codec, pool)
        results = []
        for job, future in zip(jobs, futures):
            results.append(future.result())
            step(1, job.task)
    made = [result for result in results if isinstance(result, Result)]
    if any(result.episodes for result in made):
        write_description(root)
        announce("convert", root)
    if len(made) < len(jobs):
        raise PartlyConverted(src, made, [result for result in results if isinstance(result, BadInput)])
    return made


def plan(source: str, src: Path, options: dict[str, Any] | None = None) -> tuple[Any, list[Job]]:
    """Returns a converter's options, checked, and the jobs that it finds in a source.

    Raises:
        BadInput: The source or an option is unknown, nothing is found, or two jobs would make the same task.
    """
    if source not in SOURCES:
        raise BadInput(f"unknown source {source!r}, expected one of {', '.join(SOURCES)}")
    if not src.exists():
        raise BadInput(f"{src}: no such file or folder; put the source there, or name another")
    converter = SOURCES[source]
    try:
        chosen = TypeAdapter(converter.Options).validate_python(options or {})
    except ValidationError as error:
        first = error.errors()[0]
        raise BadInput(f"options of {source}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    jobs: list[Job] = converter.jobs(src, chosen)
    names = [job.name for job in jobs]
    for name in names:
        if names.count(name) > 1:
            raise BadInput(f"{src}: holds {name} more than once; name the folder of one of them")
    return chosen, jobs


def module_name(source: str) -> str:
    """Returns the name of a source's module in `lram.converters`."""
    return SOURCES[source].__name__.rpartition(".")[2]


def main(settings: ConvertSettings) -> int:
    """Runs the flow and says what it made and what it left out; 1 when anything was wrong with the source."""
    source = next(name for name, kind in SETTINGS.items() if type(settings) is kind)
    options = asdict(settings.options)  # type: ignore[attr-defined]
    if settings.dry_run:
        return _show_plan(source, settings)
    wrong: list[BadInput] = []
    try:
        made = convert(
            source, settings.src, settings.root, options, settings.workers, settings.scheduler, settings.codec
        )
    except PartlyConverted as error:
        made, wrong = error.made, error.wrong
    for result in made:
        if result.anew:
            print(f"made anew: {result.name} (changed: {result.anew})")
    for reason, rows in _added_up(result.dropped for result in made).items():
        print(f"left out: {rows:,} rows: {reason}")
    for reason, rows in _added_up(result.changed for result in made).items():
        print(f"changed: {rows:,} rows: {reason}")
    problems = [problem for result in made for problem in result.problems] + [str(error) for error in wrong]
    for problem in problems:
        print(f"problem: {problem}")
    episodes, transitions = sum(r.episodes for r in made), sum(r.transitions for r in made)
    skipped = sum(result.skipped for result in made)
    print(
        f"{len(made)} tasks ({skipped} were complete already): {episodes:,} trajectories, {transitions:,} transitions"
    )
    print(settings.root)
    return 1 if problems else 0


def _added_up(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    """Adds up rows by reason."""
    total: dict[str, int] = {}
    for count in counts:
        for reason, rows in count.items():
            total[reason] = total.get(reason, 0) + rows
    return total


def _show_plan(source: str, settings: ConvertSettings) -> int:
    """Prints what would be made from which files."""
    from rich.console import Console

    options, jobs = plan(source, settings.src, asdict(settings.options))  # type: ignore[attr-defined]
    table = Table("task", "files", "MB", "state", title=f"{len(jobs)} tasks")
    for job in jobs:
        size = sum(path.stat().st_size for path in job.files) / 1e6
        state = state_of(module_name(source), job, options, settings.root, settings.codec)
        table.add_row(job.name, str(len(job.files)), f"{size:,.1f}", state)
    Console().print(table)
    print(settings.root)
    return 0
