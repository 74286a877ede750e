"""Moves bad trajectories out of a dataset, so that what stays passes its check.

    quarantine(ROOT, results, ROOT.with_name("bad"))

Each file that a check found bad goes to DIR/<domain>/<task>/…; nothing is deleted and nothing overwritten. The
index of a task that lost files is rebuilt, and remembers which episodes were taken out, so that the gap in their
numbering is no finding. Trajectories in tar shards stay: a tar is rewritten by making its dataset again.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterable
from pathlib import Path

from lram.datasets.check import TaskCheck
from lram.datasets.index import DESCRIPTION, SHARDS, TRAJECTORY_PATH, rebuild, write_description, write_index
from lram.datasets.specs import BadInput


def quarantine(root: Path, results: Iterable[TaskCheck], out: Path) -> int:
    """Moves the files that a check found bad out of a dataset and rebuilds the indices of their tasks.

    Args:
        root: The dataset.
        results: What its check found.
        out: Where bad files go, below their task's name; outside the dataset.

    Returns:
        How many were moved.

    Raises:
        BadInput: `out` lies in the dataset, or a file that would be moved is there already.
    """
    root, out = Path(root), Path(out)
    if out.resolve().is_relative_to(root.resolve()):
        raise BadInput(f"{out}: lies in the dataset itself, expected a folder outside {root}")
    bad = [result for result in results if result.findings]
    moves = {finding.path for result in bad for finding in result.findings if finding.movable}
    moves -= {path for path in moves if any(str(parent) in moves for parent in Path(path).parents)}
    for path in sorted(moves):
        if (out / path).exists() or (out / path).is_symlink():
            raise BadInput(f"{out / path}: exists already, expected a quarantine folder without it")
    for path in sorted(moves):
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.move(root / path, out / path)
    for result in bad:
        folder = root / result.task
        if folder.is_dir() and not any(folder.glob(SHARDS)):
            _reindex(folder, {path.removeprefix(f"{result.task}/") for path in moves})
    if bad and (root / DESCRIPTION).exists():
        # A task without a readable index is a finding of its own, and stays one.
        with contextlib.suppress(BadInput):
            write_description(root)
    return len(moves)


def _reindex(folder: Path, moved: set[str]) -> None:
    """Rebuilds a task's index and notes the episodes that were taken out of it."""
    gone = {int(Path(path).stem) for path in moved if TRAJECTORY_PATH.fullmatch(path)}
    index = rebuild(folder)
    earlier = index.meta.pop("quarantined", [])
    if isinstance(earlier, list):
        gone |= {episode for episode in earlier if type(episode) is int}
    gone -= set(index.table["episode"].to_pylist())
    meta = {**index.meta, "quarantined": sorted(gone)} if gone else index.meta
    write_index(folder, index.table.replace_schema_metadata({"lram": json.dumps(meta, sort_keys=True)}))
