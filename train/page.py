"""The evaluation's page: one HTML file with everything in it, that opens anywhere and asks no server for anything.

    write_page(content, Path("evaluation.html"))

The page is `page.html` beside this file with the content as JSON inside; its script draws bars, tables, curves and
the map. What comes from files (names, error messages) is shown as text and never parsed as markup.
"""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

from lram.datasets.trajectory import write_whole

TEMPLATE, SLOT = "page.html", "@@CONTENT_JSON@@"


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
    before, _, after = resources.files("lram.train").joinpath(TEMPLATE).read_text().partition(SLOT)
    text = json.dumps(shown, separators=(",", ":"), allow_nan=False)
    # json.dumps has escaped all that is not ASCII; with these three gone, nothing can end the script element.
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    write_whole(path, (before + text + after).encode())
    return path


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
    kind = " [7:1]" if result["policy"].get("slstm") else ""
    label = f"{result['policy']['backbone']}{kind} {result['policy']['size']}"
    return {"name": result["name"], "label": label, "curves": curves}
