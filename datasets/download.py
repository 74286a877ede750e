"""Downloads a published dataset, or some tasks of it, and compares every shard with the hash that its index names.

    download(HfApi(), "me/trajectories", ["dmcontrol/cartpole-swingup"], Path("data"))

`huggingface_hub` does the transfer: a download that was killed goes on where it was, what is there already stays.
The shards are trained from as they lie. A shard with other bytes than its index says is removed and named, so that
the same command fetches it again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lram.datasets.index import INDEX, NAME
from lram.datasets.publish import patiently
from lram.datasets.shards import damaged
from lram.datasets.specs import DOMAINS, BadInput


def published_tasks(hub: Any, repo: str, revision: str | None = None) -> list[str]:
    """Lists "<domain>/<task>" of every task that a repository holds, sorted.

    Raises:
        BadInput: The repository cannot be read, or holds no task.
    """
    listed = patiently(lambda: hub.list_repo_files(repo, repo_type="dataset", revision=revision))
    names = []
    for path in listed:
        domain, _, rest = path.partition("/")
        task, _, file = rest.partition("/")
        if file == INDEX and domain in DOMAINS and NAME.fullmatch(task):
            names.append(f"{domain}/{task}")
    if not names:
        raise BadInput(f"{repo}: holds no task, expected <domain>/<task>/{INDEX}")
    return sorted(names)


def chosen(names: list[str], wanted: list[str], repo: str) -> list[str]:
    """Returns the tasks that are meant by names of tasks and of domains; all of them when none is given.

    Raises:
        BadInput: A name fits no task.
    """
    found: list[str] = []
    for want in wanted:
        fits = [name for name in names if want in (name, name.split("/")[0])]
        if not fits:
            near = [name for name in names if want.split("/")[-1].lower() in name.lower()] or names
            more = f" and {len(near) - 5} more" if len(near) > 5 else ""
            raise BadInput(f"{repo}: has no task or domain {want!r}; it has {', '.join(near[:5])}{more}")
        found += fits
    return sorted(set(found)) if wanted else names


def download_tasks(hub: Any, repo: str, tasks: list[str], to: Path, revision: str | None = None) -> list[str]:
    """Fetches tasks, dataset.json and the card; compares the shards with their hashes.

    Args:
        hub: A `huggingface_hub.HfApi`.
        repo: The repository.
        tasks: Some of what `published_tasks` lists.
        to: The dataset directory to write to.
        revision: A tag, branch or commit; the newest when None.

    Returns:
        One sentence per damaged shard; they are removed.

    Raises:
        BadInput: The repository cannot be read.
    """
    patterns = [f"{task}/*" for task in tasks] + ["dataset.json", "README.md", "*.png"]
    patiently(
        lambda: hub.snapshot_download(
            repo, repo_type="dataset", revision=revision, local_dir=to, allow_patterns=patterns
        )
    )
    problems = []
    for task in tasks:
        for path, problem in damaged(Path(to) / task):
            problems.append(problem)
            path.unlink(missing_ok=True)
    return problems
