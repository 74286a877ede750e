"""Which tasks a run trains on, and how an update's windows are shared out among their domains.

    folders, left_out = choose(ROOT, patterns=("dmcontrol/*",), holdout=False, mix={"atari": 2.0})
    share_out(128, ["atari", "dmcontrol"], {"atari": 2.0})          # {"atari": 171, "dmcontrol": 85}

Hold-out tasks are those of `tasks.csv`, and in Dark-Room those whose goal is one of the collector's hold-out cells.
They are left out unless asked for, so that a dataset with everything in it does not leak them into training.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from lram.collectors import darkroom
from lram.datasets.index import find_tasks, read_index
from lram.datasets.specs import DOMAINS, BadInput, reference


def is_holdout(domain: str, task: str) -> bool:
    """Says whether a task is kept for fine-tuning; a variant (`<task>.<variant>`) follows its task.

    In Dark-Room the cell of the goal, or of the door where there is a key, decides. What nobody listed is not kept.
    """
    if domain != "darkroom":
        row = reference(domain, task)
        return row is not None and row.split == "holdout"
    try:
        room = darkroom.parse_task(task.split(".")[0])
    except BadInput:
        return False
    return room.goal in darkroom.goals((room.rows, room.cols))[1]


def choose(
    root: Path, patterns: Sequence[str] = (), holdout: bool = False, mix: dict[str, float] | None = None
) -> tuple[list[Path], dict[str, int]]:
    """Chooses the tasks to train on.

    Args:
        root: The dataset.
        patterns: Shell patterns of <domain>/<task>; none chooses all.
        holdout: Takes the hold-out tasks, instead of all others.
        mix: Shares by domain; a domain of share 0 is not chosen.

    Returns:
        The tasks' folders, and how many tasks were left out, by kind.

    Raises:
        BadInput: A pattern or a domain in `mix` fits no task, nothing is left, or an index cannot be read.
    """
    patterns, mix = patterns or ("*",), mix or {}
    names = {f"{folder.parent.name}/{folder.name}": folder for folder in find_tasks(root)}
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise BadInput(f"{root}: no task matches --tasks {pattern!r}, its tasks are like {next(iter(names))}")
    fitting = {name: folder for name, folder in names.items() if any(fnmatchcase(name, each) for each in patterns)}
    for domain, share in mix.items():
        if share and not any(folder.parent.name == domain for folder in fitting.values()):
            raise BadInput(f"{root}: no task of {domain} to train on, which --mix names")
    fitting = {name: folder for name, folder in fitting.items() if mix.get(folder.parent.name, 1)}
    chosen = [folder for folder in fitting.values() if is_holdout(folder.parent.name, folder.name) == holdout]
    filled = [folder for folder in chosen if read_index(folder, columns=["episode"]).table.num_rows]
    kinds = "tasks that are not hold-out tasks" if holdout else "hold-out tasks", "tasks without a trajectory"
    counts = len(fitting) - len(chosen), len(chosen) - len(filled)
    left_out = {kind: count for kind, count in zip(kinds, counts) if count}
    if not fitting:
        raise BadInput(f"{root}: no task to train on, --mix gives none of its domains a share")
    if not filled:
        why = ", ".join(f"{count} {kind}" for kind, count in left_out.items())
        raise BadInput(f"{root}: no task to train on, there are {why}; --holdout trains on hold-out tasks")
    return filled, left_out


def read_mix(texts: Sequence[str]) -> dict[str, float]:
    """Reads shares such as "atari=2".

    Raises:
        BadInput: One is not <domain>=<share>, or its share is below 0.
    """
    mix = {}
    for text in texts:
        domain, _, share = text.partition("=")
        try:
            mix[domain] = float(share)
        except ValueError:
            mix[domain] = -1.0
        if domain not in DOMAINS or not 0 <= mix[domain] < math.inf:
            raise BadInput(f"--mix {text}: expected <domain>=<share> such as atari=2, domains are {', '.join(DOMAINS)}")
    return mix


def share_out(per_domain: int, domains: Sequence[str], mix: dict[str, float]) -> dict[str, int]:
    """Returns how many of an update's `per_domain` × domains windows are of each domain, by largest remainders."""
    total = per_domain * len(domains)
    shares = {domain: mix.get(domain, 1.0) for domain in sorted(domains)}
    parts = {domain: total * share / sum(shares.values()) for domain, share in shares.items()}
    counts = {domain: int(part) for domain, part in parts.items()}
    by_remainder = sorted(parts, key=lambda domain: counts[domain] - parts[domain])
    for domain in by_remainder[: total - sum(counts.values())]:
        counts[domain] += 1
    return counts
