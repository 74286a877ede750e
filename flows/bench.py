"""Measures a part of the product, and prints one table.

    lram bench loader
    lram bench convert --quick

What is measured, and how, stands in the modules named below. A bar that is not met is said, and changes no exit
status: what a machine shared with others measures is no failure of the code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from prefect import flow

from lram.collectors.bench_collect import CollectBenchSettings, bench_collect
from lram.converters.bench_convert import ConvertBenchSettings, bench_convert
from lram.datasets.bench_loader import LoaderBenchSettings, Row, as_table, bench_loader
from lram.flows.bench_runners import bench_runners
from lram.flows.progress import console
from lram.train.bench_evaluate import EvaluateBenchSettings, bench_evaluate
from lram.train.bench_inference import InferenceBenchSettings, bench_inference
from lram.train.bench_train import TrainBenchSettings, bench_train

__all__ = [
    "CollectBenchSettings",
    "ConvertBenchSettings",
    "EvaluateBenchSettings",
    "InferenceBenchSettings",
    "LoaderBenchSettings",
    "TrainBenchSettings",
    "measure",
]


def _bench_convert(settings: ConvertBenchSettings, progress: Callable[[str], None]) -> Iterator[Row]:
    """Measures the converters, and then the ways to run them, which need Prefect."""
    if settings.part != "runners":
        yield from bench_convert(settings, progress)
    if settings.part != "sources":
        yield from bench_runners(settings, progress)


BENCHES: dict[type, Callable[..., Iterator[Row]]] = {
    CollectBenchSettings: bench_collect,
    ConvertBenchSettings: _bench_convert,
    EvaluateBenchSettings: bench_evaluate,
    InferenceBenchSettings: bench_inference,
    LoaderBenchSettings: bench_loader,
    TrainBenchSettings: bench_train,
}


@flow(name="bench", validate_parameters=False)
def measure(settings: Any) -> list[Row]:
    """Measures what the settings are of.

    Returns:
        The rows of the table.
    """
    return list(BENCHES[type(settings)](settings, lambda text: console.print(f"bench      {text}")))


def main(settings: Any) -> int:
    """Runs the flow and prints the table."""
    print(as_table(measure(settings)))
    return 0
