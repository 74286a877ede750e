"""The evaluator: which tasks, which returns, results that survive a kill, and what it writes."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from lram.collectors.darkroom import rooms, task_name
from lram.collectors.environments import ENVIRONMENTS
from lram.datasets.check import check_task
from lram.datasets.index import read_index
from lram.datasets.specs import BadInput, tasks
from lram.datasets.trajectory import read
from lram.model.policy import Policy, PolicySettings
from lram.train import checkpoint
from lram.train.evaluate import (
    EvaluateSettings,
    all_jobs,
    chosen,
    evaluate,
    finish,
    key_of,
    play_share,
    protocol,
    remaining,
    rollouts,
    targets,
)
from lram.train.results import read_results
from lram.train.rollouts import share
from lram.train.settings import TrainSettings, plain

ROOMS = [f"darkroom/{task_name(room)}" for room in rooms(5, horizon=6)[0][:4]]
HOLDOUT = [f"darkroom/{task_name(room)}" for room in rooms(5, horizon=6)[1]]


def save_run(out: Path, names: list[str], seed: int = 0, backbone: str = "xlstm", image: bool = False) -> Path:
    """Writes the checkpoint of an untrained policy that says it was trained on `names`."""
    torch.manual_seed(seed)
    policy = Policy(PolicySettings(backbone=backbone, size="tiny", max_steps=4, image=image))
    with torch.no_grad():
        policy.head.weight.mul_(3)
    trained = plain(TrainSettings(Path("data"), out, size="tiny", seed=seed, backbone=backbone))
    state = checkpoint.State(7, {}, (2.0, 7), dataclasses.asdict(policy.settings), trained)
    state.dataset, state.target_returns = {"tasks": names}, dict.fromkeys(names, 3.0)
    checkpoint.save(out, state, policy, torch.optim.AdamW(policy.parameters()))
    return out


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return save_run(tmp_path_factory.mktemp("runs") / "one", ROOMS)


@pytest.fixture
def settings(run, tmp_path) -> EvaluateSettings:
    return EvaluateSettings(run, tmp_path / "out", protocol="training", episodes=3, slots=4, workers=1)


@pytest.fixture(scope="module")
def evaluated(run, tmp_path_factory):
    """An evaluation of four rooms that was not interrupted: its settings and its result."""
    settings = EvaluateSettings(
        run, tmp_path_factory.mktemp("whole"), protocol="training", episodes=3, slots=4, workers=1
    )
    return settings, evaluate(settings)


def test_protocols_choose_tasks():
    trained = ["metaworld/reach-v2", "metaworld/push-v2", *ROOMS]
    held_out = [f"metaworld/{task.name}" for task in tasks().values()
                if task.domain == "metaworld" and task.split == "holdout"]  # fmt: skip
    assert chosen(trained, "training") == sorted(trained)
    assert set(chosen(trained, "holdout")) == {*held_out, *HOLDOUT}
    assert set(chosen(trained, "all")) == {*trained, *held_out, *HOLDOUT}
    assert chosen(trained, "training", ["metaworld/*", "metaworld/push-v2"]) == trained[1::-1]
    # A full name may be of any task; a pattern that fits nothing is a mistake.
    assert chosen(trained, "training", ["dmcontrol/walker-stand"]) == ["dmcontrol/walker-stand"]
    for wrong in ("dmcontrol/*", "walker-stand", "nowhere/task", "metaworld/"):
        with pytest.raises(BadInput, match="fits no task of protocol training"):
            chosen(trained, "training", [wrong])
    # What was trained on is no hold-out task any more: evaluation after fine-tuning.
    assert held_out[0] not in chosen([*trained, held_out[0]], "holdout")
    with pytest.raises(BadInput, match="no tasks to play"):
        chosen(["composuite/x"], "training", []) and chosen([], "holdout")


def test_auto_is_in_context_for_rooms_alone(run, tmp_path, settings):
    mixed = save_run(tmp_path / "mixed", ["metaworld/reach-v2", *ROOMS])
    assert protocol(EvaluateSettings(run)) == "in-context"
    assert protocol(EvaluateSettings(run, tasks=("darkroom/*",))) == "training"
    assert protocol(EvaluateSettings(mixed)) == "training"
    assert protocol(EvaluateSettings(mixed, protocol="holdout")) == "holdout"


def test_returns_asked_for():
    state = checkpoint.State(target_returns={"metaworld/reach-v2": 1500.0, "darkroom/a": 3.0, "darkroom/b": 5.0})
    table = tasks()["metaworld", "reach-v2"].target_return
    assert targets(state, ["metaworld/reach-v2"], "best") == {"metaworld/reach-v2": 1500.0}
    assert targets(state, ["metaworld/reach-v2"], "table") == {"metaworld/reach-v2": table}
    assert targets(state, ["metaworld/push-v2"], "best")["metaworld/push-v2"] == pytest.approx(1791.2247)
    assert targets(state, ["darkroom/c"], "best") == {"darkroom/c": 4.0}
    assert targets(state, ["darkroom/c"], "-2.5") == {"darkroom/c": -2.5}
    for names, how, words in ((["darkroom/c"], "table", "neither its data"), (["x/y"], "bset", "--target bset")):
        with pytest.raises(BadInput, match=words):
            targets(state, names, how)


def test_results_are_whole_and_repeatable(evaluated, settings):
    whole, result = evaluated
    assert {episode["task"] for episode in result["episodes"]} == set(ROOMS)
    assert [episode["episode"] for episode in result["episodes"]] == [0, 1, 2] * 4
    assert json.loads((whole.out / "evaluation.json").read_text()) == result
    table = pq.read_table(whole.out / "episodes.parquet").to_pylist()
    assert [row["return"] for row in table] == [episode["return"] for episode in result["episodes"]]
    assert table[0]["domain"] == "darkroom" and table[0]["normalised"] is None
    assert (whole.out / "evaluation.html").stat().st_size > 10_000
    assert result["domains"]["darkroom"]["played"] == 4 and result["domains"]["darkroom"]["tasks"] == 0
    # Other slots, other processes, parts of it first: the same numbers.
    other = replace(settings, slots=3, workers=2)
    play_share(other, share(remaining(other), (1, 2)), "episodes-0001.jsonl")
    assert len(remaining(other)) == 6
    assert evaluate(other)["episodes"] == result["episodes"]
    assert remaining(other) == []


def test_more_episodes_add_to_those_there_are(evaluated, settings):
    _, result = evaluated
    first = evaluate(replace(settings, episodes=1, tasks=(ROOMS[0],)))
    assert len(first["episodes"]) == 1
    grown = replace(settings, episodes=3)
    assert len(remaining(grown)) == 11
    assert evaluate(grown)["episodes"] == result["episodes"]
    # Another seed, return or temperature is another evaluation, in the same file.
    folder = checkpoint.best(settings.checkpoint)
    keys = {key_of(replace(settings, **{name: value}), folder) for name, value in
            (("seed", 1), ("target", "2"), ("temperature", 0.5), ("slots", 9), ("episodes", 4))}  # fmt: skip
    assert len(keys) == 4 and len(remaining(replace(grown, seed=1))) == 12


KILLED = """
import time
from pathlib import Path
from lram.train.evaluate import EvaluateSettings, evaluate
def wait(task, done, of):
    if done == 5:
        time.sleep(600)
if __name__ == "__main__":
    evaluate(EvaluateSettings(Path({run!r}), Path({out!r}), protocol="training", episodes=3, slots=4, workers=1), wait)
"""


def test_a_killed_evaluation_goes_on_with_the_same_scores(evaluated, settings, tmp_path):
    _, whole = evaluated
    script = tmp_path / "evaluate.py"
    script.write_text(KILLED.format(run=str(settings.checkpoint), out=str(settings.out)))
    lines = settings.out / "episodes.jsonl"
    process = subprocess.Popen([sys.executable, str(script)], start_new_session=True)
    deadline = time.monotonic() + 300
    while (not lines.exists() or lines.read_bytes().count(b"\n") < 5) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.002)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    assert children
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert len(read_results(settings.out, key_of(settings, checkpoint.best(settings.checkpoint)))) == 5
    with lines.open("ab") as file:  # what a kill in the middle of a write leaves
        file.write(lines.read_bytes()[:40])
    assert len(remaining(settings)) == 7
    result = evaluate(settings)
    assert result["episodes"] == whole["episodes"] and result["domains"] == whole["domains"]
    assert lines.read_bytes().count(b"\n") == 5 + 1 + 7
    # Simulators do not outlive whom they simulate for.
    while any(Path(f"/proc/{child}").exists() for child in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{child}").exists() for child in children)


def test_recorded_episodes_are_a_dataset(settings, tmp_path):
    recorded = replace(settings, record=tmp_path / "data", tasks=tuple(ROOMS[:2]))
    evaluate(replace(recorded, record=None))
    assert len(remaining(recorded)) == 6  # they have results, but no trajectories
    result = evaluate(recorded)
    assert remaining(recorded) == []
    for name in ROOMS[:2]:
        folder = tmp_path / "data" / name
        assert check_task(folder).findings == []
        index = read_index(folder)
        assert index.meta["complete"] and index.meta["provenance"]["seed"] == 0
        returns = [episode["return"] for episode in result["episodes"] if episode["task"] == name]
        assert index.table["return"].to_pylist() == returns
    trajectory = read(next((tmp_path / "data" / ROOMS[0]).glob("*/*.hdf5")))
    assert trajectory.source == "lram evaluate, xlstm tiny, update 7" and trajectory.length == 6
    with pytest.raises(BadInput, match="was made with"):
        remaining(replace(recorded, temperature=0.5))


def test_every_domain_is_played_in_one_evaluation(tmp_path):
    names = [f"{domain}/{environment.example}" for domain, environment in ENVIRONMENTS.items()]
    run = save_run(tmp_path / "run", names, image=True)
    result = evaluate(EvaluateSettings(run, protocol="training", episodes=1, workers=1))
    played = {row["task"]: row for row in result["tasks"]}
    missing = {failure["task"]: failure["failed"] for failure in result["failures"]}
    assert played.keys() | missing.keys() == set(names) and not played.keys() & missing.keys()
    assert all("install" in words for words in missing.values()), missing  # simulators that are not here
    assert f"darkroom/{ENVIRONMENTS['darkroom'].example}" in played
    for name, row in played.items():
        assert row["length"] > 1 and np.isfinite(row["return"]).all()
        assert (row["normalised"] is None) == name.startswith("darkroom/")
        assert (row["success"] is None) == name.startswith(("atari/", "dmcontrol/", "procgen/"))
    assert result["domains"]["all"]["played"] == len(played)


def test_runs_are_compared_and_seeds_grouped(evaluated, settings, tmp_path):
    whole, _ = evaluated
    others = []
    for name, seed, backbone in (("two", 1, "xlstm"), ("three", 0, "mamba")):
        other = save_run(tmp_path / name, ROOMS, seed, backbone)
        evaluate(EvaluateSettings(other, protocol="training", episodes=2, slots=8, workers=1))
        others.append(other)
    finish(replace(whole, compare=tuple(others)))
    text = (whole.out / "evaluation.html").read_text()
    content = json.loads(text.split('id="content">')[1].split("</script>")[0])
    assert content["comparison"] == []  # rooms have no reference scores
    with pytest.raises(BadInput, match="evaluate it first"):
        finish(replace(whole, compare=(tmp_path,)))


def test_numbers_that_mean_nothing_are_refused(settings):
    for wrong in ({"episodes": 0}, {"slots": 0}, {"timeout": -1}):
        with pytest.raises(BadInput, match=f"--{next(iter(wrong))}"):
            rollouts(replace(settings, **wrong))
    # No more rows than episodes of a domain, and as many when half of them are played already.
    assert rollouts(replace(settings, slots=64)).slots == len(all_jobs(settings)) == 12
