"""Takes in a Minari dataset, what `lram export minari` made or anyone else's of a known domain.

    lram convert minari ~/.minari/datasets/lram/metaworld/reach-v0 ROOT
    lram convert minari ~/.minari/datasets/D4RL/x-v2 ROOT --domain metaworld --task x

SRC is the dataset's folder, the one that holds `data`. The reading is `datasets.export.from_minari`'s: Minari holds
one trajectory at a time in memory. Needs the extra `minari`. What it trades away: one task a call.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lram.converters.source import Count, Job
from lram.datasets.export import KEY, from_minari
from lram.datasets.specs import BadInput
from lram.datasets.trajectory import Trajectory

VERSION = 1
"""Of this converter: raised when the bytes that it makes change."""


@dataclass(frozen=True)
class Options:
    """What a Minari dataset is a dataset of, where it does not say."""

    domain: str = ""
    """Its domain; may be left out where lram made the dataset, which then says."""
    task: str = ""
    """Its task; likewise."""


def jobs(src: Path, options: Options) -> list[Job]:
    """Lists the one task that a Minari dataset holds.

    Raises:
        BadInput: SRC is no Minari dataset, or nobody says of which domain and task.
    """
    data = Path(src) / "data"
    try:
        said = json.loads(json.loads((data / "metadata.json").read_text()).get(KEY, "{}"))
        domain, task = options.domain or said.get("domain"), options.task or said.get("task")
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise BadInput(f"{src}: not a Minari dataset, expected data/metadata.json in it ({error})") from error
    if not isinstance(domain, str) or not isinstance(task, str):
        raise BadInput(f"{src}: was not made by lram, expected --domain and --task")
    return [Job(domain, task, Path(src), tuple(sorted(path for path in data.rglob("*") if path.is_file())))]


def trajectories(job: Job, options: Options, count: Count) -> Iterator[Trajectory]:
    """Makes the dataset's trajectories; one that ends nowhere stays unfinished, as it is.

    Raises:
        BadInput: Minari is missing, or the dataset has what the domain has not.
    """
    for trajectory in from_minari(job.src, job.domain, job.task):
        count.read += trajectory.length
        count.wrote(trajectory.length)
        yield trajectory
