"""Checks a dataset: every file opened, every rule of the format held, the index compared with the files.

    for folder in find_tasks(ROOT):
        result = check_task(folder)
        for finding in result.findings: print(finding)

What is wrong with one trajectory costs no other: each is reported and the check goes on. Every file is read
once and hashed, so the price of a check is one pass over the data.
"""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from lram.datasets.index import (
    INDEX,
    PARTS,
    SCHEMA,
    check_place,
    read_index,
    row_of,
    shared_meta,
    splits,
    trajectory_files,
)
from lram.datasets.specs import BadInput
from lram.datasets.trajectory import scan


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        task: "<domain>/<task>".
        path: The file it is about, relative to the dataset.
        problem: What was found and what was expected, in a sentence.
    """

    task: str
    path: str
    problem: str

    def __str__(self) -> str:
        return f"{self.path}: {self.problem}"


@dataclass
class TaskCheck:
    """What the check of one task saw.

    Attributes:
        task: "<domain>/<task>".
        trajectories: Files opened.
        transitions: Transitions in the files that could be read.
        duplicates: Trajectories whose arrays equal those of an earlier one.
        findings: What is wrong; empty when all is well.
    """

    task: str
    trajectories: int = 0
    transitions: int = 0
    duplicates: int = 0
    findings: list[Finding] = field(default_factory=list)


def check_task(folder: Path) -> TaskCheck:
    """Checks all files of one task, and its index against them.

    Args:
        folder: The task's folder, ROOT/<domain>/<task>.

    Returns:
        Counts and findings; never raises for what is on disk.
    """
    folder = Path(folder)
    root = folder.parent.parent
    result = TaskCheck(f"{folder.parent.name}/{folder.name}")

    def found(path: Path, problem: str) -> None:
        problem = problem.removeprefix(f"{path}: ")
        result.findings.append(Finding(result.task, str(path.relative_to(root)), problem))

    index = None
    try:
        index = read_index(folder)
    except BadInput as error:
        found(folder / INDEX, str(error))
    for leftover in [*folder.glob("**/.*.tmp"), *folder.glob(PARTS)]:
        found(leftover, "left behind by a kill, open the task for writing once or rebuild its index")
    indexed: dict[str, dict[str, Any]] = {}
    if index is not None:
        table = pa.Table.from_arrays(index.table.columns, schema=SCHEMA)
        indexed = {row["path"]: row for row in table.to_pylist()}
        expected = splits(index.meta["domain"], index.meta["task"], index.table["episode"].to_pylist())
        if index.table["split"].to_pylist() != expected:
            found(folder / INDEX, "column split is not the hash of (task, episode)")
    contents: dict[bytes, Path] = {}
    episodes = []
    for path in trajectory_files(folder):
        result.trajectories += 1
        row = indexed.pop(f"{path.parent.name}/{path.name}", None)
        try:
            trajectory, image = scan(path)
            check_place(trajectory, folder, path)
        except BadInput as error:
            found(path, str(error))
            continue
        result.transitions += trajectory.length
        episodes.append(trajectory.episode)
        arrays = (trajectory.states, trajectory.actions, trajectory.rewards)
        content = hashlib.sha256(b"".join(array.tobytes() for array in arrays)).digest()
        if content in contents:
            result.duplicates += 1
            # In a small grid with few actions, a converged specialist repeats itself honestly.
            if trajectory.states.ndim == 4 or trajectory.actions.ndim == 2:
                found(path, f"same content as {contents[content].name}")
        contents.setdefault(content, path)
        if index is None:
            continue
        if row is None:
            found(path, "not in the index, run `lram index`")
            continue
        fresh = row_of(trajectory, image)
        stale = [key for key, value in fresh.items() if row[key] != value]
        stale += [key for key, value in shared_meta(trajectory, image).items() if index.meta.get(key) != value]
        if "sha256" in stale:
            found(path, "sha256 differs from the index's: the file changed after it was written")
        elif stale:
            found(path, f"the index has other values for {', '.join(stale)}, run `lram index`")
    for name in indexed:
        found(folder / name, "in the index, but there is no such file")
    missing = sorted(set(range(max(episodes, default=-1) + 1)) - set(episodes))
    if missing and not result.findings:
        found(
            folder,
            f"episodes are not numbered without gaps: {len(missing)} missing, the first is {missing[0]}",
        )
    return result


def as_json(results: list[TaskCheck]) -> list[dict[str, Any]]:
    """Returns checks as plain data for the report and for JSON."""
    return [dataclasses.asdict(result) for result in results]
