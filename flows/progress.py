"""Progress bars of the flows, and the few words printed around them.

    with bar("collect", total=20, unit="goals") as step:
        step(1, "return 12.1")

A bar goes to standard error; when that is no terminal, only its last state is printed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console(stderr=True)

Step = Callable[[float, str], None]


@contextmanager
def bar(name: str, total: float, unit: str) -> Iterator[Step]:
    """Shows a bar named `name` over `total` units; the function it gives advances it and sets the note behind."""
    columns = (
        TextColumn("{task.description:<10}"),
        BarColumn(20),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(name, total=total, note="")

        def step(advance: float, note: str = "") -> None:
            progress.update(task, advance=advance, note=note)

        yield step
