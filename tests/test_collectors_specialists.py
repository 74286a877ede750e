"""Specialists learn, their histories repeat to the byte, and what is complete is not made again."""

from __future__ import annotations

import dataclasses
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro

from lram.collectors.darkroom import goals, parse_task
from lram.collectors.specialists import DarkRoomSettings, tasks_of, train_goal
from lram.datasets.index import read_index
from lram.datasets.specs import BadInput
from lram.datasets.trajectory import read
from lram.datasets.writer import finished

TINY = DarkRoomSettings(size=3, horizon=6, steps=200, num_envs=4, minibatches=2, epochs=1)
TASK = tasks_of(TINY)[0]


def contents(root: Path) -> dict[str, bytes]:
    files = [path for path in root.rglob("*") if path.is_file()]
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tiny")
    train_goal(TINY, TASK, root)
    return root


def test_tasks_are_the_goals() -> None:
    settings = DarkRoomSettings()
    training, holdout = goals(10)
    assert [parse_task(task).goal for task in tasks_of(settings, "training")] == training
    assert [parse_task(task).goal for task in tasks_of(settings, "holdout")] == holdout
    assert tasks_of(settings) == tasks_of(settings, "training") + tasks_of(settings, "holdout")
    assert tasks_of(settings)[0] == "room10x10-goal-02-00"
    assert tasks_of(DarkRoomSettings(size=5, horizon=20, keydoor=True))[0].startswith("keydoor5x5-h20-key-")


def test_every_setting_has_a_help_text(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tyro.cli(DarkRoomSettings, args=["--help"])
    text = capsys.readouterr().out
    for field in dataclasses.fields(DarkRoomSettings):
        assert f"--{field.name.replace('_', '-')}" in text
    assert "Pay only the first step on the goal" in " ".join(text.replace("│", " ").split())
    assert pickle.loads(pickle.dumps((train_goal, TINY))) == (train_goal, TINY)


def test_a_specialist_learns_5x5_gradually(tmp_path: Path) -> None:
    settings = DarkRoomSettings(size=5, horizon=20, steps=8_000)
    task = tasks_of(settings)[0]
    result = train_goal(settings, task, tmp_path)
    assert result["steps"] == 8_000 and result["episodes"] == 400 and not result["skipped"]
    returns = read_index(tmp_path / "darkroom" / task).numpy("return")
    quarters = returns.reshape(4, 100).mean(1)
    assert quarters[0] < 0.5 * result["best_return"] and (np.diff(quarters) > 0).all()
    assert result["last_return"] >= 0.75 * result["best_return"] >= 12
    assert result["first_return"] == returns[:40].mean() and result["last_return"] == returns[-40:].mean()


def test_a_keydoor_specialist_runs(tmp_path: Path) -> None:
    settings = dataclasses.replace(TINY, keydoor=True, sparse=True)
    result = train_goal(settings, tasks_of(settings, "holdout")[0], tmp_path)
    assert result["best_return"] == 2 and result["steps"] >= 200


def test_trajectories_are_raw_whole_and_in_order(tiny: Path) -> None:
    index = read_index(tiny / "darkroom" / TASK)
    # 200 steps are rounded up to whole episodes in each of the 4 slots.
    assert len(index.table) == 36 and index.numpy("length").tolist() == [6] * 36
    room = parse_task(TASK)
    for number, path in enumerate(index.table["path"].to_pylist()):
        trajectory = read(index.folder / path)
        assert trajectory.episode == number and trajectory.truncated and not trajectory.terminated
        walked = np.vstack([trajectory.states, trajectory.final_state])
        assert walked[0].tolist() == [0, 0] and (np.abs(np.diff(walked, axis=0)).sum(1) <= 1).all()
        np.testing.assert_array_equal(trajectory.rewards, (walked[1:] == room.goal).all(1))
        assert trajectory.success == bool(trajectory.rewards.any())
        assert "stable-baselines3" in trajectory.source
    slots = index.numpy("seed")
    assert slots.tolist() == (slots[0] + np.arange(36) % 4).tolist()
    assert finished(tiny, "darkroom", TASK)["learning_rate"] == TINY.learning_rate


def test_the_same_settings_give_the_same_bytes(tiny: Path, tmp_path: Path) -> None:
    torch.rand(3)  # whatever was drawn in this process before
    np.random.rand(3)  # noqa: NPY002
    train_goal(TINY, TASK, tmp_path)
    assert contents(tmp_path) == contents(tiny)


def test_another_seed_or_goal_gives_another_history(tiny: Path, tmp_path: Path) -> None:
    def actions(root: Path, task: str) -> list[int]:
        return (
            read(root / "darkroom" / task / "000" / "000000000.hdf5").actions.tolist()
            + read(root / "darkroom" / task / "000" / "000000001.hdf5").actions.tolist()
        )

    train_goal(dataclasses.replace(TINY, seed=1), TASK, tmp_path)
    train_goal(TINY, tasks_of(TINY)[1], tmp_path)
    histories = [actions(tiny, TASK), actions(tmp_path, TASK), actions(tmp_path, tasks_of(TINY)[1])]
    assert histories[0] != histories[1] != histories[2] != histories[0]


def test_a_finished_goal_is_not_trained_again(tiny: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in tiny.rglob("*")}
    result = train_goal(TINY, TASK, tiny)
    assert result["skipped"] and result["seconds"] < 1 and result["episodes"] == 36
    assert {path: path.stat().st_mtime_ns for path in tiny.rglob("*")} == before


def test_other_settings_are_refused_with_folder_and_setting(tiny: Path) -> None:
    with pytest.raises(BadInput, match=rf"{TASK}: was made with entropy = 0.01, not 0.5"):
        train_goal(dataclasses.replace(TINY, entropy=0.5), TASK, tiny)


def test_a_task_of_other_settings_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="not a task of these settings, which are like room3x3-h6-goal"):
        train_goal(TINY, "room10x10-goal-02-00", tmp_path)
    with pytest.raises(BadInput, match="not a Dark-Room task"):
        train_goal(TINY, "../elsewhere", tmp_path)
    assert not list(tmp_path.iterdir())


KILLED = """
import os, signal
from pathlib import Path
from lram.collectors.specialists import *
from lram.datasets.writer import TaskWriter
add = TaskWriter.add
def die(writer, trajectory):
    if trajectory.episode == 50:
        os.kill(os.getpid(), signal.SIGKILL)
    return add(writer, trajectory)
TaskWriter.add = die
train_goal({settings!r}, {task!r}, Path({root!r}))
"""


def test_a_killed_goal_is_made_again_with_the_same_bytes(tmp_path: Path) -> None:
    settings = DarkRoomSettings(size=3, horizon=6, steps=4_000, epochs=1)
    task = tasks_of(settings)[0]
    train_goal(settings, task, tmp_path / "whole")
    killed = tmp_path / "killed"
    child = subprocess.run([sys.executable, "-c", KILLED.format(settings=settings, task=task, root=str(killed))])
    assert child.returncode == -signal.SIGKILL
    # The last few may not have their names yet.
    assert 30 < len(list(killed.rglob("*.hdf5"))) <= 50
    assert finished(killed, "darkroom", task) is None
    result = train_goal(settings, task, killed)
    assert not result["skipped"] and result["episodes"] == len(list(killed.rglob("*.hdf5")))
    assert contents(killed) == contents(tmp_path / "whole")
