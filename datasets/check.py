"""Checks a dataset: every file opened, every rule of the format held, the index compared with the files.

    for folder in find_tasks(ROOT):
        result = check_task(folder)
        for finding in result.findings: print(finding)

A task is checked in two steps, so that one large task can use all cores: `look` opens a range of its trajectories
and keeps a few numbers of each, `judge` compares them with each other and with the index. What is wrong with one
trajectory costs no other: each is reported and the check goes on. Every file is read once and hashed, so the
price of a check is one pass over the data.
"""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from lram.datasets.index import (
    DESCRIPTION,
    INDEX,
    NAME,
    SHARDS,
    TRAJECTORY_PATH,
    TaskIndex,
    check_place,
    read_index,
    row_of,
    shared_meta,
    splits,
    trajectory_files,
)
from lram.datasets.specs import DOMAINS, BadInput
from lram.datasets.trajectory import Trajectory, scan_bytes

LIMIT_SHOWN = 20
"""A time limit counts as known when this many trajectories of a task were truncated at it."""
BELONGS = re.compile(r"index\.parquet|learning_curve\.parquet|shard-\d{5,}\.tar|\d{3,}")
"""Names that a task's folder may hold, beside hidden ones."""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        task: "<domain>/<task>"; "dataset" for what concerns no single one.
        path: The file it is about, relative to the dataset.
        problem: What was found and what was expected, in a sentence.
        movable: The file itself is bad: taken out, with the index rebuilt, the rest is well.
    """

    task: str
    path: str
    problem: str
    movable: bool = False

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


@dataclass(frozen=True)
class Member:
    """Where a trajectory lies: in a file of its own, or in a tar shard.

    Attributes:
        path: Its path inside the task's folder, or inside the shard.
        shard: The shard's name, None for a file of its own.
        offset: First byte in the shard.
        size: Bytes in the shard.
    """

    path: str
    shard: str | None = None
    offset: int = 0
    size: int = 0

    @property
    def label(self) -> str:
        """Returns what findings call it, inside the task's folder."""
        return f"{self.shard}/{self.path}" if self.shard else self.path


@dataclass(frozen=True)
class Seen:
    """What `look` keeps of one trajectory.

    Attributes:
        member: Where it lies.
        problem: What is wrong with it on its own, None when nothing is; then the rest is set.
        row: Its index row.
        shared: What it shares with all trajectories of its task.
        content: Hash of its states, actions and rewards.
    """

    member: Member
    problem: str | None = None
    row: dict[str, Any] = field(default_factory=dict)
    shared: dict[str, Any] = field(default_factory=dict)
    content: bytes = b""


def members(folder: Path) -> tuple[list[Member], list[tuple[str, str]]]:
    """Lists the trajectories of a task, and (name, problem) of shards that are not whole."""
    found = [Member(f"{path.parent.name}/{path.name}") for path in trajectory_files(folder)]
    broken = []
    for shard in sorted(folder.glob(SHARDS)):
        try:
            with tarfile.open(shard, "r:") as tar:
                size = shard.stat().st_size
                for info in tar:
                    if not info.isreg() or info.offset_data + info.size > size:
                        raise tarfile.ReadError(f"member {info.name} is cut or no file")
                    found.append(Member(info.name, shard.name, info.offset_data, info.size))
                # Two empty blocks end a tar; Python takes whatever it cannot read for the end.
                with open(shard, "rb") as file:
                    file.seek(tar.offset)
                    if file.read(2 * tarfile.BLOCKSIZE) != bytes(2 * tarfile.BLOCKSIZE):
                        raise tarfile.ReadError(f"no member and no end at byte {tar.offset}")
        except (tarfile.TarError, OSError, ValueError) as error:
            broken.append((shard.name, f"cut or damaged ({error}): trajectories behind that place are lost"))
    return found, broken


def look(folder: Path, some: list[Member]) -> list[Seen]:
    """Opens some trajectories of a task and checks each on its own; never raises for what is on disk."""
    return [_look(folder, member) for member in some]


def _look(folder: Path, member: Member) -> Seen:
    path = folder / member.path
    try:
        if member.shard:
            with open(folder / member.shard, "rb") as tar:
                tar.seek(member.offset)
                data = tar.read(member.size)
        elif not path.is_file():
            return Seen(member, "no regular file")
        else:
            data = path.read_bytes()
        trajectory, image = scan_bytes(data, str(path))
        check_place(trajectory, folder, path)
        problem = _blank(trajectory)
        row, shared = row_of(trajectory, image), shared_meta(trajectory, image)
    except BadInput as error:
        return Seen(member, str(error).removeprefix(f"{path}: "))
    except OSError as error:
        return Seen(member, f"cannot be read ({error.strerror})")
    except Exception as error:  # A file that surprises costs itself, not the check of 20,000 others.
        return Seen(member, f"cannot be checked ({type(error).__name__}: {error})")
    content = hashlib.sha256()
    for array in (trajectory.states, trajectory.actions, trajectory.rewards):
        content.update(array.tobytes())
    return Seen(member, problem, row, shared, content.digest())


def _blank(trajectory: Trajectory) -> str | None:
    """Says what is wrong with the range of image states, None when nothing is."""
    states = trajectory.states
    if states.ndim != 4 or len(states) == 1:
        return None
    low, high = int(states.min()), int(states.max())
    if low == high:
        return f"all pixels of all states are {low}: a recording of nothing"
    if high <= 1:
        return "pixels are 0 and 1 only: scaled to [0, 1] before they were made whole, expected 0..255"
    return None


def judge(folder: Path, seen: list[Seen], broken: list[tuple[str, str]] | None = None) -> TaskCheck:
    """Compares the trajectories of a task with each other, with its index and with its folder.

    Args:
        folder: The task's folder, ROOT/<domain>/<task>.
        seen: All its trajectories.
        broken: Shards that are not whole, from `members`.

    Returns:
        Counts and findings; never raises for what is on disk.
    """
    root, name = folder.parent.parent, f"{folder.parent.name}/{folder.name}"
    result = TaskCheck(name, trajectories=len(seen))

    def found(label: str, problem: str, movable: bool = False) -> None:
        path = f"{name}/{label}".rstrip("/")
        problem = problem.removeprefix(f"{root / path}: ")
        result.findings.append(Finding(name, path, problem, movable))

    for label, what in broken or []:
        found(label, what)
    for label, what in _foreign(folder):
        found(label, what, movable=True)
    meta: dict[str, Any] = {}
    rows: dict[tuple[str | None, str], dict[str, Any]] = {}
    try:
        meta, rows = _indexed(read_index(folder))
    except BadInput as error:
        found(INDEX, str(error))
    good = [item for item in seen if item.problem is None]
    shapes = [json.dumps(item.shared, sort_keys=True) for item in good]
    usual = Counter(shapes).most_common(1)[0][0] if shapes else "{}"
    ends = odd_ends([item.row for item in good])
    contents: dict[bytes, str] = {}
    odd = dict(zip((item.member for item in good), zip(shapes, ends)))
    for item in seen:
        label, row = item.member.label, rows.pop((item.member.shard, item.member.path), None)
        result.transitions += item.row.get("length", 0)
        shape, end = odd.get(item.member, (usual, None))
        problem = item.problem or end
        if shape != usual:
            mine, others = json.loads(shape), json.loads(usual)
            differs = [f"{key} {mine[key]}, expected {others[key]}" for key in mine if mine[key] != others[key]]
            problem = f"has {', '.join(differs)} as in the task's other trajectories"
        if item.problem is None and item.content in contents:
            result.duplicates += 1
            # In a small grid with few actions, a converged specialist repeats itself honestly.
            if len(item.shared["state_shape"]) == 3 or item.shared["action_shape"]:
                problem = problem or f"same content as {contents[item.content]}"
        contents.setdefault(item.content, label)
        if problem is not None:
            found(label, problem, movable=item.member.shard is None)
        elif meta:
            stale, changed = _stale(item, row)
            if stale:
                found(label, stale, movable=changed and item.member.shard is None)
    lost = Counter(shard for shard, _ in rows if shard and not (folder / shard).exists())
    for tar, count in lost.items():
        found(tar, f"in the index with {count} trajectories, but there is no such file")
    for shard, path in rows:
        if shard not in lost and shard not in dict(broken or []):
            found(f"{shard}/{path}" if shard else path, "in the index, but there is no such file")
    shared = {key: meta[key] for key in json.loads(usual) if key in meta}
    if meta and good and json.dumps(shared, sort_keys=True) != usual:
        found(INDEX, f"says {shared}, but the trajectories have {usual}, run `lram index`")
    for what in _numbering(seen, meta, bool(rows or broken)):
        found("", what)
    return result


def check_task(folder: Path) -> TaskCheck:
    """Checks all trajectories of one task, and its index against them.

    Args:
        folder: The task's folder, ROOT/<domain>/<task>.

    Returns:
        Counts and findings; never raises for what is on disk.
    """
    folder = Path(folder)
    found, broken = members(folder)
    return judge(folder, look(folder, found), broken)


def _foreign(folder: Path) -> list[tuple[str, str]]:
    """Lists what lies in a task's folder and does not belong there, with the reason."""
    found = []
    for path in sorted(folder.rglob("*")):
        label = str(path.relative_to(folder))
        if path.name.startswith(".") and path.name.endswith(".tmp"):
            found.append((label, "left behind by a kill: open the task for writing once, or remove it"))
        elif path.match("index-part-*.parquet") and path.parent == folder:
            found.append((label, "left behind by a kill: open the task for writing once, or run `lram index`"))
        elif any(part.startswith(".") for part in Path(label).parts):
            continue  # .lock, and what file managers and download tools leave
        elif path.parent == folder:
            if not BELONGS.fullmatch(path.name) or path.is_dir() != path.name.isdigit():
                found.append((label, "does not belong into a task's folder"))
        elif path.parent.parent == folder and path.match("[0-9]*/[0-9]*.hdf5"):
            continue
        elif not any(label.startswith(f"{name}/") for name, _ in found):
            found.append((label, "does not belong into a task's folder"))
    return found


def _indexed(index: TaskIndex) -> tuple[dict[str, Any], dict[tuple[str | None, str], dict[str, Any]]]:
    """Returns an index's metadata, and its rows by (shard, path).

    Raises:
        BadInput: It contradicts itself.
    """
    path = index.folder / INDEX
    lacking = {"complete", "provenance"} - index.meta.keys()
    if lacking:
        raise BadInput(f"{path}: its metadata lack {', '.join(sorted(lacking))}")
    out = index.meta.get("quarantined", [])
    if not isinstance(out, list) or not all(type(episode) is int for episode in out):
        raise BadInput(f"{path}: its metadata's quarantined is {out!r}, expected episode numbers")
    try:
        rows = index.table.to_pylist()
    except (pa.ArrowException, ValueError) as error:
        raise BadInput(f"{path}: not a readable index ({error})") from error
    episodes = [row["episode"] for row in rows]
    if None in episodes or episodes != sorted(set(episodes)):
        raise BadInput(f"{path}: episodes are not ascending, each once")
    if [row["split"] for row in rows] != splits(index.meta["domain"], index.meta["task"], episodes):
        raise BadInput(f"{path}: column split is not the hash of (task, episode), run `lram index`")
    named = {(row.get("shard"), row["path"]): row for row in rows}
    if len(named) != len(rows):
        raise BadInput(f"{path}: names a path twice")
    return index.meta, named


def _stale(item: Seen, row: dict[str, Any] | None) -> tuple[str | None, bool]:
    """Compares a trajectory with its index row: what is wrong (None: nothing), and whether the file is to blame."""
    if row is None:
        return "not in the index, run `lram index`", False
    fresh = item.row
    if item.member.shard:
        fresh = {**fresh, "member_offset": item.member.offset}
    stale = [key for key, value in fresh.items() if row.get(key) != value]
    if stale == ["sha256"]:
        return "sha256 differs from the index's: the file changed after it was written", True
    if stale:
        return f"the index has other values for {', '.join(stale)}, run `lram index`", False
    return None, False


def odd_ends(rows: list[dict[str, Any]]) -> list[str | None]:
    """Finds trajectories whose end contradicts the task's time limit.

    A limit is known where at least 20 trajectories were truncated at one length and at most one in a hundred (or
    one) at any other; tasks whose truncations differ are left alone, so that none is accused wrongly.

    Args:
        rows: Index rows of a task's trajectories.

    Returns:
        For each, what is odd about its end, or None.
    """
    cut = Counter(row["length"] for row in rows if row["truncated"] and not row["terminated"])
    limit, count = cut.most_common(1)[0] if cut else (0, 0)
    others = cut.total() - count
    if count < LIMIT_SHOWN or others > max(1, cut.total() // 100):
        return [None] * len(rows)
    odd: list[str | None] = []
    for row in rows:
        length, problem = row["length"], None
        if not row["terminated"] and row["truncated"] and length != limit:
            problem = f"truncated after {length} transitions, but the task's time limit is {limit}"
        elif not row["terminated"] and not row["truncated"] and length >= limit:
            problem = f"unfinished after {length} transitions, but the task's time limit is {limit}"
        odd.append(problem)
    return odd


def _numbering(seen: list[Seen], meta: dict[str, Any], lost: bool) -> list[str]:
    """Returns what is wrong with the numbers of a task's episodes, as a list of at most one."""
    out = set(meta.get("quarantined", []))
    if not seen and not out and not lost:
        return ["holds no trajectory"]
    # A damaged file still says by its name that its episode was recorded.
    names = [item.member.path for item in seen if TRAJECTORY_PATH.fullmatch(item.member.path)]
    episodes = {int(Path(name).stem) for name in names} | out
    gaps = sorted(set(range(max(episodes, default=-1) + 1)) - episodes) if len(episodes) < 10**8 else []
    if gaps and not lost:
        return [f"episodes are not numbered without gaps: {len(gaps)} missing, the first is {gaps[0]}"]
    return []


def check_root(root: Path) -> list[Finding]:
    """Checks what concerns no single task: foreign folders, and dataset.json against the indices."""
    root = Path(root)
    findings = []
    for path in sorted(path for path in root.iterdir() if path.is_dir()):
        data = [*path.glob(f"*/{INDEX}"), *path.glob("*/[0-9]*/[0-9]*.hdf5"), *path.glob(f"*/{SHARDS}")]
        if path.name not in DOMAINS and data:
            problem = f"holds tasks, but is none of the domains {', '.join(DOMAINS)}"
            findings.append(Finding("dataset", path.name, problem))
    for domain in DOMAINS:
        for path in sorted((root / domain).glob("*")):
            if not path.name.startswith(".") and not (path.is_dir() and NAME.fullmatch(path.name)):
                problem = "does not belong into a domain's folder, expected folders of tasks"
                findings.append(Finding("dataset", f"{domain}/{path.name}", problem, movable=True))
    if (root / DESCRIPTION).exists():
        for problem in _description(root):
            findings.append(Finding("dataset", DESCRIPTION, problem))
    return findings


def _description(root: Path) -> list[str]:
    try:
        described = json.loads((root / DESCRIPTION).read_text())["tasks"]
        counts = {name: (task["trajectories"], task["transitions"]) for name, task in described.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"not a readable description ({type(error).__name__}: {error}), run `lram index`"]
    problems = []
    folders = {f"{path.parent.name}/{path.name}": path for domain in DOMAINS for path in (root / domain).glob("*/")}
    for name in sorted(counts.keys() | folders.keys()):
        if name not in folders:
            problems.append(f"names the task {name!r}, but there is no such folder")
            continue
        try:
            index = read_index(folders[name], columns=["length"])
        except BadInput:
            continue  # a finding of the task's own
        actual = index.table.num_rows, int(index.numpy("length").sum())
        if counts.get(name) != actual:
            said = f"{counts[name][0]} trajectories of {counts[name][1]}" if name in counts else "nothing"
            problems.append(f"says {said} transitions of {name}, its index {actual[0]} of {actual[1]}")
    return [f"{problem}, run `lram index`" for problem in problems]
