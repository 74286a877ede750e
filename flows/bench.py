"""Measures the reader of training windows, and prints one table.

    lram bench loader
    lram bench loader --quick

The measurements are those of `lram.datasets.bench_loader`; a bar that is not met is said, and changes no exit
status: what a machine shared with others measures is no failure of the code.
"""

from __future__ import annotations

from prefect import flow

from lram.datasets.bench_loader import LoaderBenchSettings, Row, as_table, bench_loader
from lram.flows.progress import console


@flow(name="bench-loader")
def measure_loader(settings: LoaderBenchSettings) -> list[Row]:
    """Measures every reader on the same data.

    Returns:
        The rows of the table.
    """
    return list(bench_loader(settings, lambda text: console.print(f"bench      {text}")))


def main(settings: LoaderBenchSettings) -> int:
    """Runs the flow and prints the table."""
    print(as_table(measure_loader(settings)))
    return 0
