"""Tells Prefect what was finished, so that the next flow can start by itself.

    announce("collect", root)

The events are named `lram.collect.finished`, `lram.publish.finished` and so on; the deployments in `prefect.yaml`
wait for them. An event carries `lram.version`, a hash over the dataset's content: who names his output by it does
nothing twice, and everything that is new. Outside a flow nothing is said.
"""

from __future__ import annotations

from pathlib import Path

from prefect.context import FlowRunContext
from prefect.events import emit_event

from lram.datasets.index import find_tasks, fingerprint

RESOURCE = "lram.dataset"
"""Identifier that triggers match: the event is about a dataset."""
VERSION_DIGITS = 12
"""Hexadecimal digits of the content's hash that an event carries."""


def announce(what: str, root: Path, place: str | None = None, kind: str = "directory") -> None:
    """Emits the event that a job on a dataset has finished.

    Args:
        what: Which job: "collect", "convert", "publish".
        root: The dataset's directory.
        place: Where its result is, by default the directory itself.
        kind: What that is, "directory" or "hub".
    """
    if FlowRunContext.get() is None:
        return
    where = str(Path(root).resolve())
    resource = {
        "prefect.resource.id": RESOURCE,
        "lram.root": where,
        "lram.place": place or where,
        "lram.kind": kind,
        "lram.version": fingerprint(find_tasks(root))[:VERSION_DIGITS],
    }
    emit_event(f"lram.{what}.finished", resource=resource)
