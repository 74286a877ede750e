"""Writes a page of numbers: one HTML file with everything in it, that opens offline and asks no server for anything.

    fill_page(resources.files("lram.datasets").joinpath("report.html"), content, OUT / "report.html")

The shell, page.html, has what all pages share: the style, and functions for elements, numbers, plots and tables. A
page's own part, its style and its script, comes after them and draws `content`, the JSON that stands inside the page.
So a page needs JavaScript, but no network, and the same content gives the same bytes. What comes from files reaches
it as text, never as markup.
"""

from __future__ import annotations

import json
import re
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from lram.datasets.trajectory import write_whole

SHELL = "page.html"
SLOTS = re.compile("@@CONTENT_JSON@@|@@PAGE@@")
"""Where the content goes in the shell, and after it the page's own part."""


def fill_page(part: Traversable, content: dict[str, Any], path: Path) -> Path:
    """Writes a page.

    Args:
        part: The page's own part: HTML that goes behind the shared script.
        content: What its script finds as `content`.
        path: Where to.

    Returns:
        The path.
    """
    shell = resources.files("lram.datasets").joinpath(SHELL).read_text(encoding="utf-8")
    # Only the shell is searched for slots: what a file says cannot open another one.
    before, between, after = SLOTS.split(shell)
    page = before + _inside_script(content) + between + part.read_text(encoding="utf-8") + after
    write_whole(path, page.encode())
    return path


def _inside_script(content: dict[str, Any]) -> str:
    """Returns JSON that cannot leave its <script> element, whatever its strings hold."""
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    # json.dumps has escaped all that is not ASCII, line separators included.
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
