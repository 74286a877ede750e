"""`lram collect` for DMControl and Meta-World: tasks side by side, learned or scripted, and made once."""

from __future__ import annotations

import json
import urllib.request

import pytest

from lram.datasets.index import read_index

# Warm-up as long as training: what is tested is the way there, not the learning.
SHORT = ("--learning-starts", 1000, "--train-freq", 100, "--batch-size", 8)


def curves(server: str, root: object) -> list[dict]:
    """Returns the rows of the learning curves that Prefect shows for a dataset."""
    body = json.dumps({"artifacts": {"key": {"any_": ["learning-curves"]}}}).encode()
    request = urllib.request.Request(f"{server}/artifacts/filter", body, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        found = [artifact["data"] for artifact in json.load(answer) if str(root) in artifact["description"]]
    return json.loads(found[0]) if found else []


def test_dmcontrol_tasks_side_by_side(lram, server, tmp_path):
    pytest.importorskip("dm_control", reason="DMControl is not installed")
    words = ("collect", "dmcontrol", tmp_path, "--tasks", "cartpole-swingup", "walker-stand", "--workers", 2)
    collected = lram(*words, "--steps", 1000, "--seed", 5, *SHORT)
    assert collected.returncode == 0, collected.stderr
    lines = collected.stdout.splitlines()
    assert [line.split()[:5] for line in lines[:2]] == [
        [task, "1", "trajectories", "1,000", "transitions"] for task in ("cartpole-swingup", "walker-stand")
    ]
    assert "steps a second" in lines[0] and lines[-1] == str(tmp_path)
    index = read_index(tmp_path / "dmcontrol" / "walker-stand")
    assert index.numpy("length").tolist() == [1000] and index.meta["provenance"]["learning_starts"] == 1000
    for row, task in zip(curves(server, tmp_path), ("cartpole-swingup", "walker-stand"), strict=True):
        folder = tmp_path / "dmcontrol" / task
        assert (row["task"], row["curve"]) == (task, str(folder / "learning_curve.parquet"))
        assert (row["episodes"], row["steps"], row["first"]) == (1, 1000, row["last"])
        assert row["last"] == round(read_index(folder).numpy("return").item(), 2)
    checked = lram("check", tmp_path)
    assert checked.returncode == 0, checked.stdout
    again = lram(*words, "--steps", 1000, "--seed", 5, *SHORT)
    assert again.stdout.count("complete already") == 2
    other = lram(*words, "--steps", 2000, "--seed", 5, *SHORT)
    assert other.returncode == 1 and "was made with steps = 1000, not 2000" in other.stderr


def test_metaworld_learned_and_scripted(lram, server, tmp_path):
    pytest.importorskip("metaworld", reason="Meta-World is not installed")
    learned = ("collect", "metaworld", tmp_path / "learned", "--tasks", "reach-v2", "--steps", 400)
    result = lram(*learned, "--algorithm", "tqc", "--learning-starts", 400, "--workers", 1)
    assert result.returncode == 0, result.stderr
    assert "2 trajectories" in result.stdout
    provenance = read_index(tmp_path / "learned" / "metaworld" / "reach-v2").meta["provenance"]
    assert (provenance["algorithm"], provenance["train_freq"]) == ("tqc", 50)
    scripted = ("collect", "metaworld", tmp_path / "scripted", "--tasks", "reach-v2", "--policy", "scripted")
    result = lram(*scripted, "--scripted.episodes", 2, "--workers", 1)
    assert result.returncode == 0, result.stderr
    assert "2 trajectories  success 100%" in result.stdout
    assert len(curves(server, tmp_path / "learned")) == 1
    assert not curves(server, tmp_path / "scripted")  # nobody learned
