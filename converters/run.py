"""Runs one conversion job: hashes its files, writes its trajectories, continues what a kill left, keeps the account.

    job = dqn_replay.jobs(src, options)[0]
    result = convert_job("dqn_replay", job, options, Path("ROOT"))

A task that is complete on disk is not made again as long as its source has the same files of the same sizes and
the options are the same. A task that was interrupted is read again from the start of its source, and what is on
disk is not written again: decoding is repeated, compression and fsync are not.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import itertools
import json
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from lram.converters.source import SELECTS, Count, Job
from lram.datasets.index import read_index, task_folder
from lram.datasets.specs import BadInput
from lram.datasets.trajectory import Codec
from lram.datasets.writer import TaskWriter, finished, same_provenance

HASH_BLOCK = 1 << 22


@dataclass
class Result:
    """What became of a job.

    Attributes:
        name: "<domain>/<task>".
        skipped: It was complete on disk.
        episodes: Trajectories of the task.
        transitions: Transitions of the task.
        dropped: Rows of the source that are in no trajectory, by reason.
        changed: Rows that have other values than in the source, by reason.
        problems: Damage found in the source, one sentence each.
        seconds: Time it took.
    """

    name: str
    skipped: bool
    episodes: int
    transitions: int
    dropped: dict[str, int] = field(default_factory=dict)
    changed: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0


def convert_job(source: str, job: Job, options: Any, root: Path, codec: Codec | None = None) -> Result:
    """Makes one task of a dataset from its source files.

    Args:
        source: Name of the converter, a module of `lram.converters`.
        job: Which task, from which files; one of what the converter's `jobs` lists.
        options: The converter's `Options`.
        root: The dataset's directory.
        codec: How to store states, the domain's default when None.

    Returns:
        What was made and what was left out; `episodes` is 0, and there is no task, where the source held none.

    Raises:
        BadInput: The source cannot be read, or the task was made from other files or with other options.
    """
    started = time.perf_counter()
    converter = importlib.import_module(f"lram.converters.{source}")
    provenance = {
        "converter": source,
        "version": converter.VERSION,
        "options": _options(options),
        "codec": codec,
        "source": str(job.files[0].parent.relative_to(job.src)) if job.files[0] != job.src else job.src.name,
        "detail": job.detail,
        "files": _files(job, hashed=False),
    }
    folder = task_folder(root, job.domain, job.task)
    if (old := finished(root, job.domain, job.task)) is not None:
        # Sizes tell well enough that the source is the one of then: hashing terabytes again to skip them does not pay.
        told = {**old, "files": [{k: v for k, v in file.items() if k != "sha256"} for file in old.get("files", [])]}
        same_provenance(told, provenance, folder, free=frozenset({"lram"}))
        index = read_index(folder, columns=["length"])
        account = index.meta.get("account", {})
        return Result(
            job.name,
            skipped=True,
            episodes=index.table.num_rows,
            transitions=int(index.numpy("length").sum()),
            dropped=account.get("dropped", {}),
            changed=account.get("changed", {}),
            problems=account.get("problems", []),
        )
    provenance["files"] = _files(job, hashed=True)
    provenance["lram"] = importlib.metadata.version("lram")
    count = Count()
    trajectories: Iterable[Any] = iter(converter.trajectories(job, options, count))
    first = next(iter(trajectories), None)
    if first is not None:
        with TaskWriter(root, job.domain, job.task, provenance, codec) as writer:
            for trajectory in itertools.chain([first], trajectories):
                if trajectory.episode not in writer:
                    writer.add(trajectory)
            count.check()
            if len(writer) != count.episodes:
                raise BadInput(f"{folder}: holds {len(writer)} trajectories, but its source has {count.episodes}")
            writer.finish(asdict(count))
    count.check()
    seconds = time.perf_counter() - started
    return Result(job.name, False, count.episodes, count.written, count.dropped, count.changed, count.problems, seconds)


def _options(options: Any) -> dict[str, Any]:
    """Returns the options that decide a task's content, as JSON values; those that select tasks do not."""
    deciding = {f.name: getattr(options, f.name) for f in fields(options) if not f.metadata.get(SELECTS)}
    return json.loads(json.dumps(deciding))


def _files(job: Job, hashed: bool) -> list[dict[str, Any]]:
    """Lists a job's files: path relative to its source, size in bytes, and SHA-256 where asked for."""
    rows = []
    for path in job.files:
        name = path.relative_to(job.src).as_posix() if path != job.src else path.name
        try:
            row: dict[str, Any] = {"path": name, "size": path.stat().st_size}
            if hashed:
                row["sha256"] = _sha256(path)
        except OSError as error:
            raise BadInput(f"{path}: cannot be read ({error.strerror})") from error
        rows.append(row)
    return rows


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(HASH_BLOCK):
            digest.update(block)
    return digest.hexdigest()
