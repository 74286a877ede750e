"""The report page: self-contained, safe against what files say, the same bytes for the same dataset."""

import copy
import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest

from lram.datasets.check import Finding, TaskCheck, check_task
from lram.datasets.index import find_tasks, fingerprint
from lram.datasets.report import markdown, summarise, write_report
from lram.datasets.specs import tasks
from lram.datasets.statistics import task_statistics
from lram.datasets.trajectory import Trajectory
from lram.datasets.writer import TaskWriter

HOSTILE = (
    "</script><script>document.title='owned'</script><img src=x onerror=alert(1)> & | `x` \u2028 </SCRIPT/ <!--<script"
)


def fill(root, domain, task, count=6, length=8, provenance=None):
    rng = np.random.default_rng(len(task))
    with TaskWriter(root, domain, task, provenance or {"seed": 0}) as writer:
        for episode in range(count):
            rewards = rng.random(length).astype(np.float32) * (episode + 1)
            if domain == "darkroom":
                states, actions = rng.integers(0, 5, (length, 2)).astype(np.float32), rng.integers(0, 5, length)
            elif domain == "procgen":
                x = np.arange(64) + np.arange(length)[:, None, None, None] + episode
                states = np.broadcast_to(x.astype(np.uint8), (length, 1, 64, 64)).copy()
                actions = rng.integers(0, 15, length)
            else:
                states = rng.random((length, 39)).astype(np.float32)
                actions = rng.uniform(-1, 1, (length, 4)).astype(np.float32)
            arrays = states, actions, rewards
            writer.add(Trajectory(domain, task, episode, 0, *arrays, False, True, "test", success=episode > 2))
        writer.finish()


@pytest.fixture
def dataset(tmp_path):
    root = tmp_path / "data"
    fill(root, "darkroom", "room5x5-goal-01-01")
    fill(root, "darkroom", "room5x5-goal-02-03", provenance={"note": HOSTILE})
    fill(root, "procgen", "bigfish", length=70)
    fill(root, "metaworld", "reach-v2")
    fill(root, "metaworld", next(name for domain, name in tasks() if domain == "metaworld" and name != "reach-v2"))
    return root


def examine(root):
    checks = [check_task(folder) for folder in find_tasks(root)]
    return checks, [task_statistics(folder, check.duplicates) for folder, check in zip(find_tasks(root), checks)]


class Page(HTMLParser):
    """Elements of a page, as a browser would see them before any script runs."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.scripts, self._inside = [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append((dict(attrs), ""))
            self._inside = tag

    def handle_data(self, data):
        if self._inside:
            self.scripts[-1] = self.scripts[-1][0], self.scripts[-1][1] + data

    def handle_endtag(self, tag):
        self._inside = None

    @property
    def report(self):
        return json.loads(next(text for attrs, text in self.scripts if attrs.get("id") == "content"))


def test_page_and_json_hold_the_statistics(dataset, tmp_path):
    checks, statistics = examine(dataset)
    before = copy.deepcopy(statistics)
    path = write_report(dataset, checks, statistics, tmp_path / "out")
    assert path == tmp_path / "out" / "report.html"
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["statistics"] == statistics == before
    assert Page(path.read_text()).report == report
    assert report["fingerprint"] == fingerprint(find_tasks(dataset))
    assert report["failures"] == [] and report["totals"]["failures"] == 0
    assert report["totals"]["tasks"] == 5 and report["totals"]["trajectories"] == 30
    assert report["totals"]["transitions"] == 4 * 6 * 8 + 6 * 70 == report["totals"]["checked_transitions"]
    assert report["totals"]["bytes"] == sum(file.stat().st_size for file in dataset.glob("*/*/*/*.hdf5"))


def test_coverage_counts_the_432_and_shows_darkroom_beside_them(dataset):
    report = summarise(dataset, *examine(dataset))
    rows = {row["domain"]: row for row in report["domains"]}
    assert report["totals"]["planned"] == 432
    assert sum(row["planned"] or 0 for row in rows.values()) == 432
    splits = [tasks()[key].split for key in (("metaworld", "reach-v2"), ("procgen", "bigfish"))]
    assert splits == ["train", "train"]
    assert (rows["procgen"]["train"], rows["procgen"]["planned"], rows["procgen"]["held_out_planned"]) == (1, 12, 4)
    assert (rows["darkroom"]["tasks"], rows["darkroom"]["planned"], rows["darkroom"]["train"]) == (2, None, 0)
    assert (rows["mimicgen"]["tasks"], rows["mimicgen"]["curve"]) == (0, None)
    assert report["totals"]["covered"] == rows["procgen"]["train"] + rows["metaworld"]["train"]
    assert rows["metaworld"]["normalised_tasks"] == 2
    found = [s for s in report["statistics"] if s["domain"] == "metaworld"]
    expected = np.mean([s["scores"]["normalised_mean"] for s in found])
    assert rows["metaworld"]["normalised_mean"] == pytest.approx(expected)
    assert rows["metaworld"]["action_mse"] == pytest.approx(np.mean([s["actions"]["mse_mean"] for s in found]))


def test_domain_curve_is_the_mean_over_tasks(dataset):
    checks, statistics = examine(dataset)
    rows = {row["domain"]: row["curve"] for row in summarise(dataset, checks, statistics)["domains"]}
    rooms = [s["learning_curve"]["mean"] for s in statistics if s["domain"] == "darkroom"]
    assert rows["darkroom"]["unit"] == "return" and rows["metaworld"]["unit"] == "normalised score"
    for at, episode in ((0, 0), (-1, -1), (8, 1)):  # the grid of 41 meets episode 1 of 6 at its ninth point
        expected = np.mean([room[episode] for room in rooms])
        assert rows["darkroom"]["mean"][at] == pytest.approx(expected, rel=1e-4)
    starts = []
    for one in (s for s in statistics if s["domain"] == "metaworld"):
        low, high = one["scores"]["low"], one["scores"]["high"]
        assert low > 0 and rows["metaworld"]["scales"][one["name"]] == [low, high]
        starts.append((one["learning_curve"]["mean"][0] - low) / (high - low))
    assert rows["metaworld"]["mean"][0] == pytest.approx(np.mean(starts), rel=1e-4)


def test_page_loads_nothing_from_elsewhere(dataset, tmp_path):
    text = write_report(dataset, *examine(dataset), tmp_path).read_text()
    for tag, attrs in Page(text).elements:
        assert tag not in {"link", "iframe", "object", "embed", "base", "img"}
        assert not {"src", "href", "xlink:href", "srcset"} & attrs.keys(), (tag, attrs)
    template = re.sub(r'<script type="application/json".*?</script>', "", text, flags=re.DOTALL)
    for forbidden in ("http:", "https:", "//cdn", "@import", "url(http", "fetch(", "XMLHttpRequest", "innerHTML"):
        assert forbidden not in template
    assert "default-src 'none'" in template


def test_hostile_strings_stay_text(dataset, tmp_path):
    checks, statistics = examine(dataset)
    checks[0].findings.append(Finding(checks[0].task, f"darkroom/{HOSTILE}", HOSTILE))
    source = write_report(dataset, checks, statistics, tmp_path).read_text()
    page = Page(source)
    assert len(page.scripts) == 3
    data = source.split('id="content">')[1].split("</script>")[0]
    assert data.endswith("}") and not set("<>&\u2028") & set(data)
    assert page.report["failures"][0]["problem"] == HOSTILE
    assert any(statistic["provenance"].get("note") == HOSTILE for statistic in page.report["statistics"])
    text = markdown(dataset, checks, statistics)
    line = next(line for line in text.splitlines() if line.startswith("- darkroom"))
    assert "<script>" not in text and "<img" not in text
    assert r"\|" in line and r"\`x\`" in line


def test_a_failing_check_comes_first(dataset, tmp_path):
    checks, statistics = examine(dataset)
    assert "No failures: 30 trajectories of 5 tasks" in markdown(dataset, checks, statistics)
    broken = dataset / "procgen" / "bigfish" / "000" / "000000002.hdf5"
    broken.write_bytes(broken.read_bytes()[:1000])
    checks, statistics = examine(dataset)
    report = summarise(dataset, checks, statistics)
    assert report["totals"]["failures"] == 1
    assert report["failures"][0]["path"] == "procgen/bigfish/000/000000002.hdf5"
    assert {row["domain"]: row["failures"] for row in report["domains"]}["procgen"] == 1
    text = markdown(dataset, checks, statistics)
    assert text.index("000000002") < text.index("30 trajectories") < text.index("| domain |")


def test_statistics_that_failed_are_failures_unless_the_check_said_so(dataset):
    (dataset / "metaworld" / "reach-v2" / "index.parquet").unlink()
    checks, statistics = examine(dataset)
    assert [f["path"] for f in summarise(dataset, checks, statistics)["failures"]] == [
        "metaworld/reach-v2/index.parquet"
    ]
    unchecked = summarise(dataset, [], statistics)
    assert unchecked["fingerprint"] is None
    assert len(unchecked["failures"]) == 1 and "no index" in unchecked["failures"][0]["problem"]
    assert unchecked["totals"]["checked_tasks"] == 0
    assert "**Not checked.**" in markdown(dataset, [], [s for s in statistics if not s["error"]])


def test_many_failures_are_cut_in_markdown_only(dataset):
    checks, statistics = examine(dataset)
    checks[0].findings = [Finding(checks[0].task, f"file-{i}", "broken") for i in range(500)]
    text = markdown(dataset, checks, statistics)
    assert text.count("broken") == 20 and "480 more" in text
    assert len(summarise(dataset, checks, statistics)["failures"]) == 500


def test_same_dataset_same_bytes(dataset, tmp_path):
    moved = tmp_path / "elsewhere" / dataset.name
    shutil.copytree(dataset, moved)
    for out, root in (("a", dataset), ("b", moved)):
        write_report(root, *examine(root), tmp_path / out)
    for name in ("report.html", "report.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.fixture
def full(dataset):
    """Checks and statistics as large as those of all 432 tasks with every curve and histogram filled."""
    _, statistics = examine(dataset)
    by_action = {s["actions"]["kind"] + str(bool(s["film"])): s for s in statistics}
    checks, filled = [], []
    for (domain, name), task in tasks().items():
        if task.split != "train":
            continue
        kind = "discreteTrue" if domain in ("atari", "procgen") else "continuousFalse"
        one = copy.deepcopy(by_action[kind])
        one |= {"task": f"{domain}/{name}", "domain": domain, "name": name, "split": "train"}
        one["learning_curve"] = {key: [i + 0.12345678 for i in range(50)] for key in one["learning_curve"]}
        for key in ("returns", "lengths"):
            one[key]["histogram"] = {"start": 0.123, "width": 1.5, "counts": list(range(1000, 1030))}
        one["lengths"]["min"] = 1.0
        if one["film"]:
            one["film"]["png"] = one["film"]["png"] * 8
        one["returns"]["mean"] = float(len(filled))
        filled.append(one)
        checks.append(TaskCheck(one["task"], 6, 48))
    return checks, filled


def test_432_tasks_make_a_page_below_10_mb(full, tmp_path):
    checks, statistics = full
    path = write_report(tmp_path, checks, statistics, tmp_path)
    assert len(Page(path.read_text()).report["statistics"]) == 432
    assert 500_000 < path.stat().st_size < 10_000_000


def test_browser_sorts_filters_and_opens(full, tmp_path, open_page):
    path = write_report(tmp_path, *full, tmp_path)
    script = """
    const say = {}, rows = () => [...document.querySelectorAll("section")].find(s => s.querySelector("input"))
      .querySelectorAll("tbody tr:not([hidden])");
    const head = name => [...document.querySelectorAll("th button")].find(b => b.textContent === name);
    say.rows = rows().length;
    head("Mean return").click(); say.down = rows()[0].cells[4].textContent;
    head("Mean return").click(); say.up = rows()[0].cells[4].textContent;
    say.plotsBefore = document.querySelectorAll("details svg").length;
    const search = document.querySelector("input"); search.value = "procgen BIG"; search.oninput();
    say.found = [...rows()].map(row => row.cells[0].textContent);
    location.hash = "#" + encodeURIComponent("task-procgen/bigfish");
    setTimeout(() => {
      say.plotsAfter = document.querySelectorAll("details[open] svg").length;
      say.film = document.querySelector("img.film").src.slice(0, 22);
      document.body.setAttribute("data-say", JSON.stringify(say));
    }, 500);
    """
    document, console = open_page(path, script)
    assert console == []
    said = next(attrs["data-say"] for tag, attrs in Page(document).elements if "data-say" in attrs)
    assert json.loads(said) == {
        "rows": 432,
        "down": "431",
        "up": "0",
        "plotsBefore": 0,
        "found": ["bigfish"],
        "plotsAfter": 4,
        "film": "data:image/png;base64,",
    }


def test_browser_shows_hostile_strings_as_text(dataset, tmp_path, open_page):
    checks, statistics = examine(dataset)
    checks[0].findings.append(Finding(checks[0].task, f"darkroom/{HOSTILE}", HOSTILE))
    path = write_report(dataset, checks, statistics, tmp_path)
    script = "document.querySelectorAll('details').forEach(entry => { entry.open = true; });"
    document, console = open_page(path, script)
    assert console == []
    shown = Page(document)
    assert len(shown.scripts) == 4  # data, the shared, the page's own, the probe above
    assert "owned" not in re.search("<title>(.*?)</title>", document)[1]
    assert document.count("&lt;img src=x onerror=alert(1)&gt;") >= 3  # path, problem, provenance
    assert [attrs for tag, attrs in shown.elements if tag == "img" and "onerror" in attrs] == []
