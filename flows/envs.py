"""Shows which environments this machine can build, and what to install for the rest.

    lram envs
    lram envs --domain dmcontrol

One environment of each domain is built to find out, which takes a few seconds.
"""

from __future__ import annotations

from dataclasses import dataclass

from lram.collectors.environments import ENVIRONMENTS, status
from lram.datasets.specs import BadInput, tasks


@dataclass(frozen=True)
class EnvsSettings:
    """What to show."""

    domain: str = ""
    """List the tasks of this domain, one a line; by default all domains are shown."""


def rows() -> list[tuple[str, str, str, str]]:
    """Returns one row per domain: its name, its tasks in number, "yes" or "no", and versions or what to install."""
    table = []
    for domain in ENVIRONMENTS:
        splits = [task.split for (of, _), task in tasks().items() if of == domain]
        count = f"{splits.count('train')} + {splits.count('holdout')}" if splits else "any size"
        found = status(domain)
        table.append((domain, count, "yes" if found.works else "no", found.words))
    return table


def main(settings: EnvsSettings) -> int:
    """Prints the table, or a domain's tasks."""
    if settings.domain:
        names = [name for domain, name in tasks() if domain == settings.domain]
        if not names:
            known = sorted({domain for domain, _ in tasks()})
            raise BadInput(f"no tasks are listed for domain {settings.domain!r}, expected one of {', '.join(known)}")
        print("\n".join(names))
        return 0
    table = [("domain", "train + holdout", "here", "from, or what to install"), *rows()]
    widths = [max(len(row[column]) for row in table) for column in range(3)]
    for row in table:
        print(*(f"{cell:<{width}}" for cell, width in zip(row, widths)), row[3], sep="  ")
    return 0
