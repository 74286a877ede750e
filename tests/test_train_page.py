"""The evaluation's page: self-contained, safe against names, without a console error; and the embedding map."""

import json
import re

import numpy as np
import pytest
import torch

from lram.datasets.specs import BadInput, tasks
from lram.train.embedding import WINDOWS, embed, embedding, project
from lram.train.evaluate import grouped
from lram.train.page import write_page
from lram.train.scores import ALL, compare, summarise
from lram.train.trainer import TrainSettings, train

HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)> & \u2028 <!--<script"


def episodes_of(offset):
    """Four episodes of all 432 training tasks and a room."""
    rng, episodes = np.random.default_rng(0), []
    names = [(f"{t.domain}/{t.name}", t) for t in tasks().values() if t.split == "train"]
    for name, task in [*names, ("darkroom/room5x5-goal-01-01", None)]:
        low, high = (task.score_low or 0.0, task.score_high or 1.0) if task else (0.0, 1.0)
        for episode in range(4):
            value = low + (high - low) * (offset + 0.3 * rng.normal())
            success = bool(rng.random() < offset) if name.startswith(("metaworld", "mimicgen", "darkroom")) else None
            own = value * 3 if name.startswith("atari") else None
            fields = {"target": high, "length": 100, "terminated": False, "truncated": True}
            episodes.append(
                {"task": name, "episode": episode, "return": value, "success": success, "score": own, **fields}
            )
    return episodes


def result_of():
    """What `evaluation.json` holds of them and two casualties."""
    episodes = episodes_of(0.5)
    lost = [{"task": "atari/breakout", "episode": 4, "failed": HOSTILE}]
    lost += [{"task": f"composuite/{HOSTILE}", "episode": 0, "failed": "not installed", "missing": True}]
    settings = {"protocol": "training", "episodes": 4, "target": "best", "temperature": 1.0, "seed": 0}
    summary = summarise([*episodes, *lost], 0)
    return {"label": "xlstm 16M", "update": 33300, "settings": settings, **summary, "episodes": [*episodes, *lost]}


def curves_of(trials=12):
    mean = list(np.linspace(1, 9, trials))
    curve = {"mean": mean, "low": [y - 1 for y in mean], "high": [y + 1 for y in mean], "returns": [[[1.0]]]}
    sets = {"tasks": ["a", "b"], "policy": curve, "random": curve, "best_possible": 10.0}
    return {
        "policy": {"backbone": "mamba", "size": "16M", "slstm": False},
        "curves": {"training": sets, "holdout": sets},
    }


@pytest.fixture(scope="module")
def content():
    result = result_of()
    rows = compare({"xlstm 16M": [result["episodes"]], "dt 16M": [episodes_of(0.3)] * 3}, 0)
    rng = np.random.default_rng(1)
    points = [{"task": f"{domain}/{n}", "points": (place + rng.normal(size=(32, 2))).tolist()}
              for place, domain in enumerate(("atari", "dmcontrol", "procgen")) for n in range(5)]  # fmt: skip
    return {
        "name": f"run {HOSTILE}",
        "result": result,
        "comparison": rows,
        "in_context": [{"name": "one", **curves_of()}, {"name": "two", **curves_of(20)}],
        "embedding": {"tasks": points, "variance": [0.4, 0.2]},
        "all": ALL,
    }


def test_a_page_is_whole_and_loads_nothing(content, tmp_path):
    text = write_page(content, tmp_path / "page.html").read_text()
    data = text.split('id="content">')[1].split("</script>")[0]
    assert not set("<>&\u2028") & set(data)
    stored = json.loads(data)
    assert stored["name"] == content["name"] and len(stored["result"]["tasks"]) == 433
    assert (
        "episodes" not in stored["result"] and "returns" not in stored["in_context"][0]["curves"]["training"]["policy"]
    )
    assert content["result"]["episodes"]  # what was handed in is as it was
    template = text.replace(data, "")
    assert text.count("<script") == 3 and "default-src 'none'" in template
    for forbidden in ("http:", "https:", "//cdn", "@import", "url(", "fetch(", "XMLHttpRequest", "innerHTML", "src="):
        assert forbidden not in template.replace("http://www.w3.org", "")
    assert len(text) < 1_500_000
    assert write_page(content, tmp_path / "again.html").read_bytes() == text.encode()


def test_browser_draws_sorts_and_finds(content, tmp_path, open_page):
    path = write_page(content, tmp_path / "page.html")
    script = """
    const say = {}, sections = [...document.querySelectorAll("section")];
    say.sections = sections.map(s => s.querySelector("h2").textContent);
    const tasks = sections.at(-1), rows = () => [...tasks.querySelectorAll("tbody tr:not([hidden])")];
    say.rows = rows().length;
    const value = row => parseFloat(row.cells[7].textContent.replace("−", "-"));
    const head = [...tasks.querySelectorAll("th button")].find(b => b.textContent === "Normalised");
    head.click(); say.down = value(rows()[0]) >= value(rows()[1]) && value(rows()[1]) >= value(rows()[2]);
    head.click(); say.up = value(rows()[0]) <= value(rows()[1]);
    const search = tasks.querySelector("input"); search.value = "procgen BIG"; search.oninput();
    say.found = rows().map(row => row.cells[0].textContent);
    const domains = sections.find(s => s.querySelector("h2").textContent === "Domains");
    const named = [...domains.querySelector("tbody").rows].map(row => [...row.cells].map(cell => cell.textContent));
    say.atari = named.find(cells => cells[0] === "atari")[2];
    say.bars = domains.querySelectorAll("svg rect").length;
    say.dots = document.querySelectorAll("path.dots").length;
    say.curves = document.querySelectorAll("path.curve").length;
    document.body.setAttribute("data-say", JSON.stringify(say));
    """
    document, console = open_page(path, script)
    assert console == []
    said = json.loads(re.search('data-say="(.*?)"', document)[1].replace("&quot;", '"'))
    assert said == {
        "sections": ["1 episode lost", "1 task not played", "Domains", "Comparison", "In-context learning",
                     "Embedding map", "Tasks"],
        "rows": 433, "down": True, "up": True, "found": ["procgen/bigfish"],
        # carnival and pooyan have no human score
        "atari": "39 tasks", "bars": 7, "dots": 15, "curves": 6,
    }  # fmt: skip
    assert "owned" not in re.search("<title>(.*?)</title>", document, re.DOTALL)[1].split("–")[-1]
    assert document.count("&lt;img src=x onerror=alert(1)&gt;") >= 3 and "<img" not in document


def test_an_empty_evaluation_is_a_page_too(tmp_path, open_page):
    nothing = {"label": "dt tiny", "update": 1, "settings": {"temperature": 0, "seed": 0, "target": "1"}}
    lost = [{"task": "atari/breakout", "episode": 0, "failed": "it hung"}]
    content = {"name": "run", "result": {**nothing, **summarise(lost, 0), "episodes": lost}, "comparison": [],
               "in_context": [], "embedding": None, "all": ALL}  # fmt: skip
    document, console = open_page(write_page(content, tmp_path / "page.html"))
    assert console == [] and "1 episode lost" in document


def test_runs_are_grouped_by_all_but_their_seed():
    def result(label, seed, **train):
        policy = {"backbone": label, "size": "16M"}
        return {"label": label, "policy": policy, "update": 5, "train": {"seed": seed, **train}, "episodes": [seed]}

    runs = [("a", result("dt", 0)), ("b", result("dt", 1)), ("c", result("dt", 0, top=0.1)), ("d", result("mamba", 0))]
    assert grouped(runs) == {"dt": [[0], [1]], "dt (c)": [[0]], "mamba": [[0]]}


def test_points_lie_along_the_directions_of_most_variance():
    rng = np.random.default_rng(0)
    plane = rng.normal(size=(200, 2)) * [5, 2]
    turned, _ = np.linalg.qr(rng.normal(size=(8, 8)))
    points = plane @ turned[:2] + 7
    found, variance = project(points.astype(np.float32))
    assert sum(variance) == pytest.approx(1) and variance[0] > variance[1]
    gaps = np.linalg.norm(plane[:, None] - plane[None], axis=-1)
    assert np.allclose(np.linalg.norm(found[:, None] - found[None], axis=-1), gaps, atol=1e-3)
    assert np.array_equal(project(-points)[0] != 0, found != 0) and project(points[:1])[0].tolist() == [[0, 0]]


def test_windows_of_the_training_data_are_embedded(rooms, tmp_path):
    out = train(TrainSettings(rooms, tmp_path / "run", size="tiny", updates=1, per_domain=4, gap=10, readers=0))
    found = embedding(out, torch.device("cpu"), seed=0)
    assert len(found["tasks"]) == 7 and all(np.shape(task["points"]) == (WINDOWS, 2) for task in found["tasks"])
    assert embedding(out, torch.device("cpu"), seed=0) == found != embedding(out, torch.device("cpu"), seed=1)
    with pytest.raises(BadInput, match="--embedding"):
        embedding(out, torch.device("cpu"), seed=0, root=tmp_path / "gone")


def test_padding_does_not_show_in_an_embedding(rooms):
    from lram.datasets.windows import Windows, WindowSettings
    from lram.model.policy import Policy, PolicySettings

    torch.manual_seed(0)
    policy = Policy(PolicySettings(size="tiny", image=False)).eval()
    batch = next(Windows.open(rooms, WindowSettings(episodes=1, context=6)).batches(0, "train", 8, 0))
    whole = embed(policy, batch, torch.device("cpu"))
    batch.mask[:, 4:] = False
    short = embed(policy, batch, torch.device("cpu"))
    batch.states[:, 4:] = 99.0
    assert np.allclose(embed(policy, batch, torch.device("cpu")), short, atol=1e-6) and not np.allclose(short, whole)
