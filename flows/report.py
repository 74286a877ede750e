"""Writes the quality report of a dataset: one HTML page that opens offline, the same as JSON, a Prefect artifact.

    lram report ROOT
    page = report_dataset(ReportSettings(root=Path("ROOT")))

The dataset is checked first, so that failures stand at the top of the page; the statistics are computed by dask
over all cores.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import dask
from dask.callbacks import Callback
from prefect import flow, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE

from lram.datasets.check import TaskCheck
from lram.datasets.index import find_tasks
from lram.datasets.report import markdown, write_report
from lram.datasets.statistics import task_statistics
from lram.flows.check import CheckSettings, check_dataset
from lram.flows.processes import process_pool
from lram.flows.progress import bar


@dataclass(frozen=True)
class ReportSettings:
    """What to report on."""

    root: Path
    """Dataset directory."""
    out: Path | None = None
    """Folder for report.html and report.json; by default ROOT/report."""
    workers: int = 0
    """Tasks read at once; 0 takes all cores."""


@task(cache_policy=NO_CACHE)
def publish_artifact(root: Path, checks: list[TaskCheck], statistics: list[dict]) -> None:
    """Shows the report's summary in Prefect."""
    create_markdown_artifact(markdown(root, checks, statistics), key="quality-report", description=str(root))


@flow(name="report")
def report_dataset(settings: ReportSettings) -> Path:
    """Checks a dataset, computes its statistics and writes the report.

    Returns:
        Path of the HTML page.
    """
    checks = check_dataset(CheckSettings(settings.root, settings.workers))
    folders = find_tasks(settings.root)
    duplicates = {result.task: result.duplicates for result in checks}
    lazy = [
        dask.delayed(task_statistics)(folder, duplicates.get(f"{folder.parent.name}/{folder.name}"))
        for folder in folders
    ]
    with process_pool(settings.workers) as pool, bar("report", len(folders), "tasks") as step:

        def advance(*_: object) -> None:
            step(1, "")

        with Callback(posttask=advance):
            statistics = list(dask.compute(*lazy, scheduler=pool))
    publish_artifact(settings.root, checks, statistics)
    return write_report(settings.root, checks, statistics, settings.out or settings.root / "report")


def main(settings: ReportSettings) -> int:
    """Runs the flow and prints the page's path."""
    print(report_dataset(settings))
    return 0
