"""The shell of the pages: filled once, deaf to what files say, with tables that sort and a search box."""

import html
import json
import re

import pytest

from lram.datasets.page import fill_page

HOSTILE = "</script><b>&\u2028 <!--<script @@PAGE@@ @@CONTENT_JSON@@"
PART = """<script>
"use strict";
const columns = [["Task", "", item => item.task], ["Score", "n", item => item.score]];
const row = item => el("tr", {}, ...cells([item.task, number(item.score)], columns));
const {box, listed} = table(columns, content.tasks, row);
const {search, line} = finder(listed);
search.oninput();
section(content.note, line, box);
</script>
"""


@pytest.fixture
def part(tmp_path):
    path = tmp_path / "part.html"
    path.write_text(PART)
    return path


def test_content_stays_in_its_element_and_opens_no_slot(part, tmp_path):
    content = {"note": HOSTILE, "tasks": [{"task": HOSTILE, "score": None}]}
    path = fill_page(part, content, tmp_path / "page.html")
    assert path == tmp_path / "page.html"
    text = path.read_text()
    data = re.search('id="content">(.*?)</script>', text, re.DOTALL)[1]
    assert json.loads(data) == content and not set("<>&\u2028") & set(data)
    assert "@@" not in text.replace(data, "") and text.count(PART) == 1
    assert fill_page(part, content, tmp_path / "again.html").read_text() == text


def test_a_slot_in_a_part_is_text(tmp_path):
    part = tmp_path / "part.html"
    part.write_text("<p>@@CONTENT_JSON@@ @@PAGE@@</p>")
    assert "<p>@@CONTENT_JSON@@ @@PAGE@@</p>" in fill_page(part, {"a": 1}, tmp_path / "page.html").read_text()


def test_numbers_that_are_not_json_are_refused(part, tmp_path):
    with pytest.raises(ValueError):
        fill_page(part, {"score": float("nan")}, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_browser_sorts_with_unknown_last_and_finds(part, tmp_path, open_page):
    scores = {"b/two": 2.0, "a/none": None, "a/tiny": -0.0004, "a/ten": 10.0}
    content = {"note": HOSTILE, "tasks": [{"task": task, "score": score} for task, score in scores.items()]}
    script = """
    const rows = () => [...document.querySelectorAll("tbody tr:not([hidden])")].map(row => row.cells[1].textContent);
    const status = document.querySelector(".find span"), score = document.querySelector("th.n button");
    const say = {given: rows(), all: status.textContent};
    score.click(); say.down = rows();
    score.click(); say.up = rows();
    search.value = "A/ T"; search.oninput(); say.found = rows(); say.left = status.textContent;
    say.title = document.querySelector("h2").textContent;
    document.body.setAttribute("data-say", JSON.stringify(say));
    """
    document, console = open_page(fill_page(part, content, tmp_path / "page.html"), script)
    assert console == []
    assert json.loads(html.unescape(re.search('data-say="(.*?)"', document)[1])) == {
        "given": ["2", "–", "−4.0e−4", "10"],
        "all": "4 tasks",
        "down": ["10", "2", "−4.0e−4", "–"],
        "up": ["−4.0e−4", "2", "10", "–"],
        "found": ["−4.0e−4", "10"],
        "left": "2 of 4 tasks",
        "title": HOSTILE,
    }
