"""Downloads a published dataset, or some tasks of it, and compares every shard with its hash.

    lram download me/trajectories dmcontrol/cartpole-swingup --to data
    lram download me/trajectories --to data

The shards are trained from as they lie: `lram train data`; `lram unpack` makes plain HDF5 files of them. A
download that was killed goes on where it was.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from lram.datasets.download import chosen, download_tasks, published_tasks
from lram.datasets.specs import BadInput
from lram.flows.publish import hub_api
from lram.flows.retry import may_help


@dataclass(frozen=True)
class DownloadSettings:
    """What to download, and where to."""

    repo: str
    """Repository on the Hub, OWNER/NAME."""
    tasks: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Tasks (dmcontrol/cartpole-swingup) and domains (dmcontrol); all of them when none is named."""
    to: Path = Path("data")
    """Dataset directory to write to."""
    revision: str | None = None
    """Tag, branch or commit; the newest by default."""


@task(cache_policy=NO_CACHE, retries=2, retry_delay_seconds=30, retry_condition_fn=may_help)
def fetch(settings: DownloadSettings, names: list[str]) -> list[str]:
    """Fetches tasks and compares their shards with their hashes."""
    return download_tasks(hub_api(), settings.repo, names, settings.to, settings.revision)


@flow(name="download")
def download(settings: DownloadSettings) -> Path:
    """Downloads tasks of a published dataset.

    Returns:
        The dataset directory.

    Raises:
        BadInput: The repository or a task is unknown, or a shard arrived damaged.
    """
    known = published_tasks(hub_api(), settings.repo, settings.revision)
    problems = fetch(settings, chosen(known, list(settings.tasks), settings.repo))
    if problems:
        more = f" (and {len(problems) - 1} more shards)" if len(problems) > 1 else ""
        raise BadInput(f"{problems[0]}{more}; removed, the same command fetches it again")
    return settings.to


def main(settings: DownloadSettings) -> int:
    """Runs the flow and prints the directory."""
    print(download(settings))
    return 0
