"""Scripted Meta-World: policies that succeed, noise that is recorded, collections that go on."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from lram.collectors.scripted import ScriptedSettings, collect_scripted
from lram.datasets.check import check_task
from lram.datasets.index import read_index, trajectory_path
from lram.datasets.specs import BadInput
from lram.datasets.trajectory import read

pytest.importorskip("metaworld", reason="metaworld is not installed")


def files(root: Path, task: str) -> list[bytes]:
    return [path.read_bytes() for path in sorted((root / "metaworld" / task).rglob("*.hdf5"))]


@pytest.mark.parametrize("task", ["reach-v2", "door-open-v2", "drawer-close-v2"])
def test_scripts_succeed(task, tmp_path):
    result = collect_scripted(ScriptedSettings(episodes=4), task, tmp_path)
    assert result["success_rate"] == 1.0 and result["mean_return"] > 1000
    assert (result["task"], result["skipped"], result["episodes"], result["steps"]) == (task, False, 4, 800)
    folder = tmp_path / "metaworld" / task
    assert check_task(folder).findings == []
    trajectory = read(folder / trajectory_path(3))
    assert trajectory.length == 200 and trajectory.truncated and not trajectory.terminated and trajectory.success
    assert trajectory.source.startswith("Meta-World scripted policy: lram ")
    # The last state is the episode's own: its older half is the state before.
    np.testing.assert_array_equal(trajectory.final_state[18:36], trajectory.states[-1, :18])
    meta = read_index(folder).meta
    assert meta["complete"] and meta["provenance"]["noise"] == 0.1 and "episodes" not in meta["provenance"]


def test_a_killed_and_a_longer_collection_are_as_one_run(tmp_path, monkeypatch):
    from lram.datasets.writer import TaskWriter

    settings, task = ScriptedSettings(episodes=4, seed=3), "drawer-close-v2"
    collect_scripted(settings, task, tmp_path / "whole")

    # A kill after the second file: nothing of what follows runs.
    add = TaskWriter.add

    def until_killed(self, trajectory):
        if trajectory.episode == 2:
            raise KeyboardInterrupt
        add(self, trajectory)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(TaskWriter, "add", until_killed)
        collect_scripted(settings, task, tmp_path / "killed")
    assert len(files(tmp_path / "killed", task)) == 2
    assert not collect_scripted(settings, task, tmp_path / "killed")["skipped"]
    assert files(tmp_path / "killed", task) == files(tmp_path / "whole", task)

    collect_scripted(dataclasses.replace(settings, episodes=1), task, tmp_path / "longer")
    result = collect_scripted(settings, task, tmp_path / "longer")
    assert not result["skipped"] and result["episodes"] == 4
    assert files(tmp_path / "longer", task) == files(tmp_path / "whole", task)
    assert collect_scripted(settings, task, tmp_path / "longer")["skipped"]
    # Fewer than there are: they stay.
    assert collect_scripted(dataclasses.replace(settings, episodes=2), task, tmp_path / "longer")["episodes"] == 4


def test_noise_is_of_the_size_asked_for_and_changes_nothing_else(tmp_path):
    task, actions = "reach-v2", {}
    for noise in (0.0, 0.2):
        collect_scripted(ScriptedSettings(episodes=2, noise=noise), task, tmp_path / str(noise))
        folder = tmp_path / str(noise) / "metaworld" / task
        first, second = (read(folder / trajectory_path(episode)) for episode in range(2))
        actions[noise] = first.states[0], first.actions, second.actions
    np.testing.assert_array_equal(actions[0.0][0], actions[0.2][0])
    # reach never closes the hand: without noise its fourth action is 0.
    assert not actions[0.0][1][:, 3].any()
    assert 0.15 < actions[0.2][1][:, 3].std() < 0.25
    assert (actions[0.2][1][:, 3] != actions[0.2][2][:, 3]).all()
    assert np.abs(actions[0.2][1]).max() <= 1


def test_seeds_and_tasks_have_their_own_episodes(tmp_path):
    for seed in (0, 1):
        collect_scripted(ScriptedSettings(episodes=1, seed=seed), "reach-v2", tmp_path / str(seed))
    one, other = (read(tmp_path / str(seed) / "metaworld/reach-v2" / trajectory_path(0)) for seed in (0, 1))
    assert one.seed != other.seed and (one.states[0, 36:] != other.states[0, 36:]).all()


def test_refuses_what_makes_no_sense(tmp_path):
    with pytest.raises(BadInput, match="metaworld has no task 'reach-v3'"):
        collect_scripted(ScriptedSettings(), "reach-v3", tmp_path)
    for field in ({"episodes": 0}, {"noise": -0.1}, {"seed": -1}):
        with pytest.raises(BadInput, match="expected at least one episode"):
            collect_scripted(ScriptedSettings(**field), "reach-v2", tmp_path)
    assert not list(tmp_path.iterdir())
    collect_scripted(ScriptedSettings(episodes=1), "reach-v2", tmp_path)
    with pytest.raises(BadInput, match=r"was made with noise = 0\.1, not 0\.5"):
        collect_scripted(ScriptedSettings(episodes=1, noise=0.5), "reach-v2", tmp_path)
