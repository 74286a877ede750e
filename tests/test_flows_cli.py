"""The real commands, each in its own process, against one real Prefect server."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from lram.flows.cli import COMMANDS
from lram.train import checkpoint

LRAM = [sys.executable, "-m", "lram.flows.cli"]


def api(server: str, path: str, body: dict) -> list[dict]:
    request = urllib.request.Request(
        f"{server}/{path}", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


def test_the_whole_way_by_single_commands(lram, server, tmp_path):
    root = tmp_path / "data"
    small = ("--size", 3, "--horizon", 6, "--steps", 600)
    collected = lram("collect", "darkroom", root, "--goals", "training", *small)
    assert collected.returncode == 0, collected.stderr
    assert "7 goals (0 were complete already), 700 trajectories" in collected.stdout
    assert collected.stdout.splitlines()[-1] == str(root)
    again = lram("collect", "darkroom", root, "--goals", "training", *small)
    assert "7 goals (7 were complete already), 700 trajectories" in again.stdout
    assert json.loads((root / "dataset.json").read_text())["tasks"].keys() == {
        f"darkroom/{path.name}" for path in (root / "darkroom").iterdir()
    }

    checked = lram("check", root)
    assert checked.returncode == 0
    assert "7 tasks, 700 trajectories, 4,200 transitions: 0 findings" in checked.stdout

    reported = lram("report", root)
    assert reported.returncode == 0
    page = Path(reported.stdout.splitlines()[-1])
    assert page == root / "report" / "report.html" and page.stat().st_size > 10_000
    artifacts = api(server, "artifacts/filter", {"artifacts": {"key": {"any_": ["quality-report"]}}})
    assert len(artifacts) == 1 and "700" in artifacts[0]["data"]

    run = tmp_path / "run"
    flags = ("--size", "tiny", "--updates", 6, "--per-domain", 8, "--gap", 10, "--save-every", 3)
    trained = lram("train", root, "--out", run, *flags)
    assert trained.returncode == 0, trained.stderr
    assert re.search(r"validation perplexity on darkroom: \d\.\d+", trained.stdout)
    assert trained.stdout.splitlines()[-1] == str(run / "update-000000006")

    evaluated = lram("evaluate", run, "--trials", 2, "--seeds", 1)
    assert evaluated.returncode == 0, evaluated.stderr
    assert evaluated.stdout.splitlines()[-1] == str(run / "evaluation" / "in_context.png")

    runs = api(server, "flow_runs/filter", {})
    flows = {flow["id"]: flow["name"] for flow in api(server, "flows/filter", {})}
    done = {flows[run["flow_id"]] for run in runs if run["state_type"] == "COMPLETED"}
    assert done >= {"collect-darkroom", "check", "report", "train", "evaluate"}


def says(done: subprocess.CompletedProcess, sentence: str) -> None:
    """Asserts one sentence of error, an exit status that says so, and no traceback."""
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and re.search(sentence, errors[0]), done.stderr


def test_bad_input_is_one_sentence_and_an_exit_status(lram, rooms, tmp_path):
    says(lram("train", tmp_path / "missing", "--out", tmp_path / "r"), "missing: no such dataset directory")
    says(lram("check", tmp_path / "missing"), "missing: no such dataset directory")
    says(lram("evaluate", tmp_path), "no checkpoint, expected a folder update-")

    data = tmp_path / "data"
    shutil.copytree(rooms, data)
    task = sorted((data / "darkroom").iterdir())[0]
    (task / "000" / "000000003.hdf5").unlink()
    cut = task / "000" / "000000005.hdf5"
    cut.write_bytes(cut.read_bytes()[:700])
    checked = lram("check", data)
    assert checked.returncode == 1
    assert "000000003.hdf5: in the index, but there is no such file" in checked.stdout
    assert "000000005.hdf5: not a whole trajectory file" in checked.stdout
    assert "2 findings" in checked.stdout

    small = ("--size", "tiny", "--per-domain", 64, "--gap", 1, "--episodes", 2, "--out", tmp_path / "run")
    # The training draw covers every file sooner or later, also the missing one.
    says(lram("train", data, *small, "--updates", 200), r"00000000[35].hdf5: .*(No such file|shorter than)")

    unknown = lram("train", data, "--backbone", "gru")
    assert unknown.returncode == 2 and "xlstm" in unknown.stderr and "gru" in unknown.stderr
    assert lram("fly").returncode == 1


def test_a_checkpoint_of_another_size_is_refused(lram, rooms, tmp_path):
    flags = ("--updates", 2, "--per-domain", 8, "--gap", 10, "--out", tmp_path)
    assert lram("train", rooms, "--size", "tiny", *flags).returncode == 0
    says(lram("train", rooms, "--size", "16M", *flags), "was trained with size = tiny, not 16M; choose another --out")
    state = json.loads((checkpoint.find(tmp_path) / "state.json").read_text())
    state["policy"]["size"] = "16M"
    (checkpoint.find(tmp_path) / "state.json").write_text(json.dumps(state))
    says(lram("evaluate", tmp_path, "--trials", 1), "a checkpoint of another policy")


def test_an_index_is_rebuilt(lram, rooms, tmp_path):
    shutil.copytree(rooms, tmp_path / "data")
    task = sorted((tmp_path / "data" / "darkroom").iterdir())[0]
    before = (task / "index.parquet").read_bytes()
    (task / "index.parquet").unlink()
    says(lram("train", tmp_path / "data", "--size", "tiny"), "no index, rebuild it with `lram index`")
    assert "1,400 trajectories indexed" in lram("index", tmp_path / "data").stdout
    checked = lram("check", tmp_path / "data")
    assert checked.returncode == 0, checked.stdout
    assert len((task / "index.parquet").read_bytes()) <= len(before)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name):
    done = subprocess.run([*LRAM, *name.split(), "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert f"usage: lram {name}" in done.stdout


def test_help_lists_the_commands():
    done = subprocess.run([*LRAM, "--help"], capture_output=True, text=True, check=True)
    assert all(f"  {name} " in done.stdout for name in COMMANDS)
    assert subprocess.run(LRAM, capture_output=True, check=False).returncode == 2
