"""The evaluation's page: one HTML file with everything in it, that opens anywhere and asks no server for anything.

    write_page(content, Path("evaluation.html"))

`evaluation.html` beside this file, filled by `lram.datasets.page`, draws bars, tables, curves and the map. Single
episodes and single returns are left to the JSON files, so that the page stays small.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

from lram.datasets.page import fill_page
from lram.train.results import label_of

PART = "evaluation.html"


def write_page(content: dict[str, Any], path: Path) -> Path:
    """Writes the page.

    Args:
        content: `name`; `result`, as in evaluation.json, or None; `comparison`, rows of `lram.train.scores.compare`;
            `in_context`, results as in in_context.json with their runs' `name`; `embedding`, or None; `all`, the name
            of the row over all domains.
        path: Where to.

    Returns:
        The path.
    """
    shown = dict(content)
    if shown["result"]:
        # Episodes stand in the JSON beside it; the page has a row per task.
        shown["result"] = {key: value for key, value in shown["result"].items() if key != "episodes"}
    shown["in_context"] = [_curves(result) for result in shown["in_context"]]
    return fill_page(resources.files("lram.train").joinpath(PART), shown, path)


def _curves(result: dict[str, Any]) -> dict[str, Any]:
    """Returns an in-context result without its single returns."""
    curves = {
        which: {
            **{key: value for key, value in curve.items() if key != "tasks"},
            "tasks": len(curve["tasks"]),
            **{who: {end: curve[who][end] for end in ("mean", "low", "high")} for who in ("policy", "random")},
        }
        for which, curve in result["curves"].items()
    }
    return {"name": result["name"], "label": label_of(result["policy"]), "curves": curves}
