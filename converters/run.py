"""Runs one conversion job: hashes its files, writes its trajectories, continues what a kill left, keeps the account.

    job = dqn_replay.jobs(src, options)[0]
    result = convert_job("dqn_replay", job, options, Path("ROOT"))

What a task is made of (the SHA-256 of every source file, the converter's version, the options, the codec) stands
in its index. As long as nothing of that changes, a task that is complete is not made again; when something does, it
is made anew in place of the old one. A source file is hashed again only when its size or time has changed. A task
that was interrupted is read again from the start of its source, and what is on disk is not written again: decoding
is repeated, compression and fsync are not.
"""

from __future__ import annotations

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
from lram.datasets.disk import sha256_of
from lram.datasets.index import INDEX, TaskIndex, read_index, task_folder
from lram.datasets.specs import BadInput
from lram.datasets.trajectory import Codec, write_whole
from lram.datasets.writer import TaskWriter, discard, same_provenance

HASHED = ".sources.json"
"""In a task's folder: the size, time and SHA-256 of its source files when they were last hashed."""
FREE = frozenset({"lram"})
"""What may differ in a task that is not made again: the converter's own version tells when its bytes change."""


@dataclass
class Result:
    """What became of a job.

    Attributes:
        name: "<domain>/<task>".
        skipped: It was complete on disk.
        anew: What has changed since it was made before, and why it was made anew; empty when it was not.
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
    anew: str = ""
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
        BadInput: The source cannot be read, or the task is not this converter's.
    """
    started = time.perf_counter()
    converter = importlib.import_module(f"lram.converters.{source}")
    folder = task_folder(root, job.domain, job.task)
    provenance, hashed = _provenance(source, job, options, folder, codec)
    index = _made(folder)
    anew = _changed(index, provenance)
    if not anew and index and index.meta["complete"]:
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
    count = Count()
    trajectories: Iterable[Any] = iter(converter.trajectories(job, options, count))
    first = next(iter(trajectories), None)
    if anew:  # not before the source has shown that it can be read
        discard(root, job.domain, job.task)
    if first is not None:
        with TaskWriter(root, job.domain, job.task, provenance, codec) as writer:
            write_whole(folder / HASHED, json.dumps(hashed).encode())
            for trajectory in itertools.chain([first], trajectories):
                if trajectory.episode not in writer:
                    writer.add(trajectory)
            count.check()
            if len(writer) != count.episodes:
                raise BadInput(f"{folder}: holds {len(writer)} trajectories, but its source has {count.episodes}")
            writer.finish(asdict(count))
    count.check()
    seconds = time.perf_counter() - started
    account = (count.dropped, count.changed, count.problems)
    return Result(job.name, False, count.episodes, count.written, anew, *account, seconds)


def state_of(source: str, job: Job, options: Any, root: Path, codec: Codec | None = None) -> str:
    """Says what `convert_job` would do, in a few words, without doing it.

    Raises:
        BadInput: A file of the source cannot be read, or the task is not this converter's.
    """
    folder = task_folder(root, job.domain, job.task)
    index = _made(folder)
    if index is None:
        return "to make"
    if anew := _changed(index, _provenance(source, job, options, folder, codec)[0]):
        return f"to make anew: {anew}"
    return "complete" if index.meta["complete"] else "to make"


def _provenance(
    source: str, job: Job, options: Any, folder: Path, codec: Codec | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns all that decides a task's content, and what is to be remembered of the files that were hashed."""
    files, hashed = _files(job, folder)
    return {
        "converter": source,
        "version": importlib.import_module(f"lram.converters.{source}").VERSION,
        "options": _options(options),
        "codec": codec,
        "source": str(job.files[0].parent.relative_to(job.src)) if job.files[0] != job.src else job.src.name,
        "detail": job.detail,
        "files": files,
        "lram": importlib.metadata.version("lram"),
    }, hashed


def _made(folder: Path) -> TaskIndex | None:
    """Returns the index of what is there of a task, if anything is."""
    return read_index(folder, columns=["length"]) if (folder / INDEX).exists() else None


def _changed(index: TaskIndex | None, new: dict[str, Any]) -> str:
    """Says what has changed since a task was made, "options.last" say; nothing where there is none, or all is the same.

    Raises:
        BadInput: The task was collected, or made by another converter: that is not to be lost.
    """
    if index is None:
        return ""
    old = index.meta["provenance"]
    if old.get("converter") != new["converter"]:
        same_provenance(old, new, index.folder, FREE)
    names = []
    for key in sorted((old.keys() | new.keys()) - FREE):
        was, now = old.get(key), new.get(key)
        if isinstance(was, dict) and isinstance(now, dict):
            names += [f"{key}.{part}" for part in sorted(was.keys() | now.keys()) if was.get(part) != now.get(part)]
        elif was != now:
            names.append(key)
    return ", ".join(names)


def _options(options: Any) -> dict[str, Any]:
    """Returns the options that decide a task's content, as JSON values; those that select tasks do not."""
    deciding = {f.name: getattr(options, f.name) for f in fields(options) if not f.metadata.get(SELECTS)}
    return json.loads(json.dumps(deciding))


def _files(job: Job, folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Lists a job's files with size and SHA-256; a file of the size and time that it was hashed with is not read."""
    try:
        known = json.loads((folder / HASHED).read_text())
    except (OSError, ValueError):
        known = {}
    rows, hashed = [], {}
    for path in job.files:
        name = path.relative_to(job.src).as_posix() if path != job.src else path.name
        try:
            stat = path.stat()
            size, moment, digest = known.get(name, (None, None, None))
            if (size, moment) != (stat.st_size, stat.st_mtime_ns):
                digest = sha256_of(path)
        except OSError as error:
            raise BadInput(f"{path}: cannot be read ({error.strerror})") from error
        rows.append({"path": name, "size": stat.st_size, "sha256": digest})
        hashed[name] = [stat.st_size, stat.st_mtime_ns, digest]
    return rows, hashed
