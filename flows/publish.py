"""Publishes a dataset as tar shards with an index and a card: to a Hub repository, or to a directory.

    lram publish ROOT me/trajectories --tag v1
    lram publish ROOT --to OUT
    lram publish ROOT me/trajectories --dry-run

Only tasks that changed since the last publish are sent. They are checked first, and refused when anything is wrong
with them; those that are there already were checked when they were sent. An upload that was killed goes on where it
was. A repository is private unless it is said to be public. Whoever is logged in with `hf auth login`, or whose token
is in HF_TOKEN, publishes.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import tyro
from prefect import flow, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE

from lram.datasets.card import IMAGE, card, plot, summaries
from lram.datasets.index import DESCRIPTION, TaskIndex, find_tasks, read_index, write_description
from lram.datasets.publish import (
    COMMITS_PER_HOUR,
    UPLOAD_RATE,
    Plan,
    TaskPlan,
    commit,
    patiently,
    plan_dataset,
    remote_indices,
    upload_task,
)
from lram.datasets.shards import SHARD_BYTES, shard_task
from lram.datasets.specs import BadInput
from lram.datasets.trajectory import write_whole
from lram.flows.check import CheckSettings, check_dataset
from lram.flows.events import announce
from lram.flows.progress import bar
from lram.flows.retry import may_help

STAGING = ".publish"
"""Folder in the dataset's that holds one shard at a time on its way."""


@dataclass(frozen=True)
class PublishSettings:
    """What to publish, and where to."""

    root: Path
    """Dataset directory."""
    repo: Annotated[str, tyro.conf.Positional] = ""
    """Repository on the Hub, OWNER/NAME; it is made when it is missing."""
    to: Path | None = None
    """Directory to write the same layout to, instead of a repository."""
    tag: str | None = None
    """Name that this version is kept under."""
    public: bool = False
    """Make a new repository public."""
    shard_bytes: int = SHARD_BYTES
    """Bytes of trajectory files in a shard, at most."""
    workers: int = 0
    """Processes that check files; 0 takes all cores."""
    dry_run: bool = False
    """Only say what would be sent."""


@task(
    task_run_name="send {first} …",
    cache_policy=NO_CACHE,
    retries=3,
    retry_delay_seconds=[10, 60, 300],
    retry_condition_fn=may_help,
)
def send(first: str, hub: Any, settings: PublishSettings, tasks: list[TaskPlan]) -> None:
    """Sends the shards of some tasks, and commits them together; the Hub keeps what it got of a failed attempt."""
    operations = []
    for part in tasks:
        operations += upload_task(
            hub, settings.repo, settings.root, part, settings.root / STAGING, settings.shard_bytes
        )
    names = ", ".join(part.name for part in tasks[:3]) + (f" and {len(tasks) - 3} more" if len(tasks) > 3 else "")
    commit(hub, settings.repo, operations, f"Add {names}")


@flow(name="publish")
def publish(settings: PublishSettings) -> str:
    """Checks a dataset and publishes what changed.

    Returns:
        The address of the repository, or the directory.

    Raises:
        BadInput: No place is named or two, the dataset is refused, the plan breaks a limit, or the Hub refuses.
    """
    _check_place(settings)
    write_description(settings.root)  # what it says of tasks that have grown since is old
    plan = _plan(settings)
    changed = [task.name for task in plan.tasks if task.changed]
    results = check_dataset(CheckSettings(settings.root, settings.workers), changed)
    findings = [finding for result in results for finding in result.findings]
    if findings:
        raise BadInput(
            f"{settings.root}: {len(findings)} findings, first {findings[0]}; `lram check` lists them, "
            "`lram check --quarantine` moves bad files out"
        )
    place = _to_directory(settings) if settings.to else _to_hub(settings, plan)
    words = f"{len(find_tasks(settings.root))} tasks published to {place}"
    create_markdown_artifact(words, key="publish", description="What was published")
    if settings.to:
        announce("publish", settings.root, str(settings.to.resolve()))
    else:
        announce("publish", settings.root, place, "hub")
    return place


def _to_directory(settings: PublishSettings) -> str:
    assert settings.to is not None
    folders = find_tasks(settings.root)
    with bar("publish", len(folders), "tasks") as step:
        for folder in folders:
            shard_task(folder, settings.to, settings.shard_bytes)
            step(1, folder.name)
    for name, data in _papers(settings, settings.to.name).items():
        write_whole(settings.to / name, data)
    return str(settings.to)


def _to_hub(settings: PublishSettings, plan: Plan) -> str:
    from huggingface_hub import CommitOperationAdd

    hub = hub_api()
    made = patiently(
        lambda: hub.create_repo(settings.repo, repo_type="dataset", private=not settings.public, exist_ok=True)
    )
    shutil.rmtree(settings.root / STAGING, ignore_errors=True)  # what a killed run left
    with bar("publish", len(plan.commits) + 1, "commits") as step:
        for tasks in plan.commits:
            send(tasks[0].name, hub, settings, tasks)
            step(1, tasks[-1].name)
        papers = [CommitOperationAdd(name, data) for name, data in _papers(settings, settings.repo).items()]
        head = commit(hub, settings.repo, papers, "Describe the dataset")
        step(1, "card")
    shutil.rmtree(settings.root / STAGING, ignore_errors=True)
    if settings.tag:
        _tag(hub, settings.repo, settings.tag, head)
    return str(made)


def _papers(settings: PublishSettings, name: str) -> dict[str, bytes]:
    """Makes the card, its plot, and dataset.json."""
    tasks = summaries(settings.root)
    return {
        "README.md": card(tasks, name, 0, settings.tag).encode(),
        IMAGE: plot(tasks),
        DESCRIPTION: (settings.root / DESCRIPTION).read_bytes(),
    }


def _tag(hub: Any, repo: str, tag: str, head: str) -> None:
    """Gives a commit its name; a name that stands for another commit never moves."""
    refs = patiently(lambda: hub.list_repo_refs(repo, repo_type="dataset"))
    for known in refs.tags:
        if known.name == tag and known.target_commit != head:
            raise BadInput(f"{repo}: the tag {tag} names another version already; choose another tag")
        if known.name == tag:
            return
    patiently(lambda: hub.create_tag(repo, tag=tag, revision=head, repo_type="dataset"))


def hub_api() -> Any:
    """Returns the Hub's client; HF_ENDPOINT and HF_TOKEN say which Hub and who asks."""
    from huggingface_hub import HfApi

    return HfApi(library_name="lram")


def _plan(settings: PublishSettings) -> Plan:
    """Plans against what the repository or the directory holds; nothing is made."""
    if settings.to:
        return plan_dataset(settings.root, partial(_there, settings.to), settings.shard_bytes)
    hub, old = hub_api(), {}
    if patiently(lambda: hub.repo_exists(settings.repo, repo_type="dataset")):
        old = remote_indices(hub, settings.repo, "main")
    return plan_dataset(
        settings.root, lambda name: read_index(old[name]) if name in old else None, settings.shard_bytes
    )


def _there(to: Path, name: str) -> TaskIndex | None:
    """Returns the index of a task in shards that a directory holds whole."""
    try:
        index = read_index(to / name)
    except BadInput:
        return None
    shards = index.meta.get("shards", {})
    return index if shards and all((to / name / shard).is_file() for shard in shards) else None


def main(settings: PublishSettings) -> int:
    """Runs the flow, or prints its plan."""
    _check_place(settings)
    if settings.dry_run:
        _say(_plan(settings))
    else:
        print(publish(settings))
    return 0


def _check_place(settings: PublishSettings) -> None:
    if bool(settings.repo) == bool(settings.to):
        raise BadInput("say where to publish: a repository OWNER/NAME, or --to DIRECTORY")


def _say(plan: Plan) -> None:
    for part in plan.tasks:
        size = sum(part.send.values()) / 1e9
        print(f"{part.name}: {len(part.send)} shards to send ({size:.2f} GB), {len(part.keep)} there already")
    print(f"{plan.files} files in {len(plan.tasks)} folders, {len(plan.commits) + 1} commits")
    print(
        f"{plan.bytes_to_send / 1e9:.2f} GB to send: {plan.hours:.1f} hours at {UPLOAD_RATE / 1e6:.0f} MB a second "
        f"and at most {COMMITS_PER_HOUR} commits an hour"
    )
