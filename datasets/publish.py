"""Publishes a dataset as tar shards: plans what has to move, and moves it to a Hub repository or a directory.

    plan = plan_dataset(Path("ROOT"), old={})
    upload_tasks(hub, "me/trajectories", Path("ROOT"), plan.commits[0], staging, old={})

    <domain>/<task>/shard-00000.tar …   unchanged trajectory files, in uncompressed tars
    <domain>/<task>/index.parquet       one row per trajectory, with its shard, its place in it and its SHA-256
    dataset.json, README.md             what is in the dataset, as JSON and as the Hub's dataset card

Shards are built one task at a time, sent, and removed again, so publishing takes the room of one task. A shard that
the destination holds with the same files is neither built nor sent. An upload that was killed goes on where it was:
the Hub keeps the files it has received, and asks for the others only. Traded away: trajectories taken out of a
task's middle change all of its shards behind them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa

from lram.datasets.index import INDEX, TaskIndex, find_tasks, read_index, write_index
from lram.datasets.shards import SHARD_BYTES, build, shard_index, shards_at, shards_of
from lram.datasets.specs import BadInput

FILES_PER_COMMIT = 100
"""Files in a commit, at most; the Hub's documentation asks for 50 to 100."""
BYTES_PER_COMMIT = 50 * 2**30
"""Bytes in a commit, at most: what is lost when it is refused is hours, not days."""
COMMITS_PER_HOUR = 128
"""Commits that the Hub takes in an hour."""
FILES_PER_FOLDER = 1000
"""Files in a folder that we allow ourselves; the Hub refuses more than 10,000."""
FILES_PER_REPOSITORY = 2000
"""Files in a repository that we allow ourselves for all 432 tasks."""
UPLOAD_RATE = 50e6
"""Bytes a second that plans reckon with: a good line, measured by nobody but the user."""
PATIENCE = 20
"""Times that a request which the Hub puts off is asked again."""


@dataclass(frozen=True)
class TaskPlan:
    """What publishing does to one task.

    Attributes:
        name: "<domain>/<task>".
        send: Bytes of every shard to build and send, by name.
        keep: Hashes of the shards that the destination holds already, by name.
        drop: Shards that the destination holds and no longer should.
        changed: Whether its index differs from the destination's.
        trajectories: Number of its trajectories.
        transitions: Number of their transitions.
    """

    name: str
    send: dict[str, int]
    keep: dict[str, str]
    drop: list[str]
    changed: bool
    trajectories: int
    transitions: int

    @property
    def files(self) -> int:
        """Returns the files of the task at the destination."""
        return len(self.send) + len(self.keep) + 1


@dataclass
class Plan:
    """What publishing does to a dataset; `commits` are the groups of tasks that travel together."""

    tasks: list[TaskPlan]
    commits: list[list[TaskPlan]] = field(init=False)

    def __post_init__(self) -> None:
        self.commits = []
        files, size = FILES_PER_COMMIT, 0
        for task in self.tasks:
            if not task.changed:
                continue
            more, bytes_more = len(task.send) + 1, sum(task.send.values())
            if files + more > FILES_PER_COMMIT or size + bytes_more > BYTES_PER_COMMIT:
                self.commits.append([])
                files = size = 0
            self.commits[-1].append(task)
            files, size = files + more, size + bytes_more

    @property
    def files(self) -> int:
        """Returns the files of the repository, the card and the description among them."""
        return sum(task.files for task in self.tasks) + 2

    @property
    def bytes_to_send(self) -> int:
        """Returns the bytes of the shards to send."""
        return sum(sum(task.send.values()) for task in self.tasks)

    @property
    def hours(self) -> float:
        """Returns how long sending takes at `UPLOAD_RATE`, or at the Hub's pace of commits where that is slower."""
        return max(self.bytes_to_send / UPLOAD_RATE / 3600, (len(self.commits) + 1) / COMMITS_PER_HOUR)

    def check(self) -> None:
        """Checks the plan against the Hub's limits and ours.

        Raises:
            BadInput: A folder or the repository would hold too many files.
        """
        for task in self.tasks:
            if task.files > FILES_PER_FOLDER:
                raise BadInput(
                    f"{task.name}: {task.files} files in a folder, at most {FILES_PER_FOLDER}: larger shards"
                )
        if self.files > FILES_PER_REPOSITORY:
            raise BadInput(f"{self.files} files in the repository, at most {FILES_PER_REPOSITORY}: take larger shards")


def plan_task(index: TaskIndex, old: TaskIndex | None, shard_bytes: int = SHARD_BYTES) -> TaskPlan:
    """Says which shards of a task have to be built and sent.

    Args:
        index: The index of its files.
        old: Its index at the destination, None where there is none.
        shard_bytes: Bytes of trajectory files in a shard, at most.

    Raises:
        BadInput: The task is stored in shards already, or holds no trajectory.
    """
    shards = shards_of(index, shard_bytes)
    if not shards:
        raise BadInput(f"{index.folder}: holds no trajectory, remove it or collect it")
    there = {shard.name: shard for shard in shards_at(old)} if old is not None else {}
    hashes: dict[str, str] = old.meta.get("shards", {}) if old is not None else {}
    keep = {shard.name: hashes[shard.name] for shard in shards if there.get(shard.name) == shard}
    send = {shard.name: shard.size for shard in shards if shard.name not in keep}
    drop = sorted(there.keys() - {shard.name for shard in shards})
    changed = bool(send or drop)
    # Splits and provenance may change without any file: then the index alone travels.
    changed = changed or old is None or not _same(shard_index(index, shards, keep), old.table)
    name = f"{index.folder.parent.name}/{index.folder.name}"
    return TaskPlan(name, send, keep, drop, changed, index.table.num_rows, int(index.numpy("length").sum()))


def _same(new: pa.Table, old: pa.Table) -> bool:
    return new.equals(old) and new.schema.metadata[b"lram"] == old.schema.metadata[b"lram"]


def plan_dataset(
    root: Path, old: Callable[[str], TaskIndex | None] = lambda task: None, shard_bytes: int = SHARD_BYTES
) -> Plan:
    """Plans the publishing of a dataset; only its indices are read.

    Args:
        root: The dataset's directory.
        old: Gives the index that the destination has of "<domain>/<task>", or None.
        shard_bytes: Bytes of trajectory files in a shard, at most.

    Raises:
        BadInput: The dataset cannot be read, or the plan breaks a limit.
    """
    tasks = [plan_task(read_index(folder), old(_name(folder)), shard_bytes) for folder in find_tasks(root)]
    plan = Plan(tasks)
    plan.check()
    return plan


def _name(folder: Path) -> str:
    return f"{folder.parent.name}/{folder.name}"


# A Hub repository -------------------------------------------------------------------------------------------------

Answer = TypeVar("Answer")


def patiently(ask: Callable[[], Answer], sleep: Callable[[float], None] = time.sleep) -> Answer:
    """Asks the Hub, and asks again when it says "later", after the time that it names.

    Args:
        ask: The request; it must be safe to repeat.
        sleep: Waits the seconds given.

    Raises:
        BadInput: The Hub refuses, cannot be reached, or still says "later" after `PATIENCE` times.
    """
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    for number in range(PATIENCE):
        try:
            return ask()
        except HFValidationError as error:
            raise BadInput(f"not a name of a repository: {error}") from error
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            # The client reports a refused listing as a missing local file: the refusal is its cause.
            refused = error if isinstance(error, HfHubHTTPError) else error.__cause__
            response = getattr(refused, "response", None)
            status = response.status_code if response is not None else None
            if response is None or status not in (429, 500, 502, 503, 504) or number == PATIENCE - 1:
                hint = "; log in with `hf auth login`, or set HF_TOKEN" if status in (401, 403) else ""
                raise BadInput(f"the Hub refuses: {str(refused or error).splitlines()[0]}{hint}") from error
            asked = response.headers.get("Retry-After", "")
            sleep(float(asked) if asked.isdigit() else min(300.0, 2.0**number))
    raise AssertionError("unreachable")


def remote_indices(hub: Any, repo: str, revision: str) -> dict[str, Path]:
    """Fetches the indices that a Hub repository holds; returns their folders by "<domain>/<task>"."""
    listed = patiently(lambda: hub.list_repo_files(repo, repo_type="dataset", revision=revision))
    names = [name for name in listed if name.count("/") == 2 and name.endswith(f"/{INDEX}")]

    def fetch(name: str) -> Path:
        return Path(hub.hf_hub_download(repo, name, repo_type="dataset", revision=revision)).parent

    return {name.removesuffix(f"/{INDEX}"): patiently(partial(fetch, name)) for name in names}


def upload_task(hub: Any, repo: str, root: Path, task: TaskPlan, staging: Path, shard_bytes: int) -> list[Any]:
    """Builds and sends the shards of a task that the repository lacks; nothing shows there before the commit.

    Args:
        hub: A `huggingface_hub.HfApi`.
        repo: The repository.
        root: The dataset's directory.
        task: What to do.
        staging: Folder for one shard at a time.
        shard_bytes: As planned.

    Returns:
        The operations that the commit has to make.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    index = read_index(Path(root) / task.name)
    shards = shards_of(index, shard_bytes)
    hashes = dict(task.keep)
    place = staging / task.name
    place.mkdir(parents=True, exist_ok=True)
    operations: list[Any] = []
    for shard in shards:
        if shard.name in hashes:
            continue
        hashes[shard.name] = build(shard, index.folder, place)
        operation = CommitOperationAdd(f"{task.name}/{shard.name}", place / shard.name)
        patiently(partial(hub.preupload_lfs_files, repo, [operation], repo_type="dataset"))
        (place / shard.name).unlink()
        operations.append(operation)
    write_index(place, shard_index(index, shards, hashes))
    operations.append(CommitOperationAdd(f"{task.name}/{INDEX}", (place / INDEX).read_bytes()))
    operations += [CommitOperationDelete(f"{task.name}/{name}") for name in task.drop]
    (place / INDEX).unlink()
    return operations


def commit(hub: Any, repo: str, operations: list[Any], message: str) -> str:
    """Makes a commit of files that are sent already, or small; returns its hash."""
    return patiently(lambda: hub.create_commit(repo, operations, commit_message=message, repo_type="dataset")).oid
