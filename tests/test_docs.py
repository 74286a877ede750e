"""What README and docs/ say is run here: every command, and every example in Python."""

from __future__ import annotations

import csv
import re
import shlex
import sys
import types
from pathlib import Path

import pytest
import torch

from lram.converters.run import convert_job
from lram.datasets.check import check_task
from lram.datasets.index import read_index
from lram.flows.cli import COMMANDS
from lram.model.state import reset_state, select_state

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.S)


def examples(name: str) -> list[str]:
    return blocks(ROOT / "docs" / name, "python")


def commands() -> list[tuple[str, str]]:
    """Lists every `lram …` line of the pages, with its page."""
    found = []
    for page in PAGES:
        for block in blocks(page, "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                if line.startswith("lram "):
                    found.append((page.name, line.split(" #")[0].strip()))
    return found


@pytest.mark.parametrize(("page", "line"), commands())
def test_every_command_is_one_that_the_command_line_takes(page, line):
    """Parses the words as `lram` does; what the commands do is tested where they are."""
    import importlib

    import tyro

    words = shlex.split(line)[1:]
    name = next(name for name in COMMANDS if words[: len(name.split())] == name.split())
    module, settings, _ = COMMANDS[name]
    flow = importlib.import_module(f"lram.flows.{module}")
    rest = words[len(name.split()) :]
    tyro.cli(getattr(flow, settings), args=rest, config=(tyro.conf.PositionalRequiredArgs,))


def test_a_task_is_added_as_the_guide_says(tmp_path, monkeypatch):
    pytest.importorskip("dm_control", reason="the guide's example plays DMControl")
    monkeypatch.chdir(tmp_path)
    exec(compile(examples("extending.md")[0], "extending.md", "exec"), {})
    folder = tmp_path / "data" / "dmcontrol" / "pendulum-swingup"
    assert not check_task(folder).findings
    index = read_index(folder)
    assert index.numpy("length").tolist() == [1000, 1000] and index.meta["complete"]


def test_a_source_is_added_as_the_guide_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType("lram.converters.robot")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    source, call = examples("extending.md")[1:3]
    exec(compile(source, "extending.md", "exec"), vars(module))
    for number, length in enumerate((4, 6)):
        path = tmp_path / "logs" / "push-v2" / f"{number}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w", newline="") as file:
            csv.writer(file).writerows([[step, step / 10, 0.5, 1.0] for step in range(length)])
    names = {**vars(module), "convert_job": convert_job}
    exec(compile(call, "extending.md", "exec"), names)
    assert (names["result"].episodes, names["result"].transitions) == (2, 10)
    folder = tmp_path / "data" / "metaworld" / "push-v2"
    assert not check_task(folder).findings
    assert read_index(folder).meta["account"]["read"] == 10


def test_a_backbone_is_added_as_the_guide_says(in_pieces):
    names: dict = {}
    exec(compile(examples("extending.md")[3], "extending.md", "exec"), names)
    torch.manual_seed(0)
    gru = names["GRU"](2, 16)
    x = torch.randn(3, 20, 16)
    whole = gru(x)
    pieces, state = in_pieces(gru, x, [3, 1, 7])
    torch.testing.assert_close(pieces, whole)
    again = gru.step(x[:, :5], reset_state(state, torch.tensor([True, False, True])))[0]
    torch.testing.assert_close(again[[0, 2]], whole[[0, 2], :5])
    assert not torch.allclose(again[1], whole[1, :5])
    assert select_state(state, torch.tensor([2, 0])).shape == (2, 2, 16)
