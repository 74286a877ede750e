from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lram.datasets import writer as writer_module
from lram.datasets.check import check_task
from lram.datasets.index import find_tasks, read_index
from lram.datasets.specs import BadInput
from lram.datasets.writer import TaskWriter, finished


def contents(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_files_are_at_most_a_thousand_a_folder(write, tmp_path):
    folder = write(tmp_path, count=1001, length=1)
    assert sorted(p.name for p in folder.iterdir() if p.is_dir()) == ["000", "001"]
    assert len(list((folder / "000").iterdir())) == 1000
    assert finished(tmp_path, "darkroom", "task") == {"maker": "test"}
    assert not list(folder.glob("index-part-*"))


def test_unfinished_tasks_are_not_finished_and_go_on(make, write, tmp_path):
    with TaskWriter(tmp_path / "a", "darkroom", "task", {"maker": "test"}) as task:
        task.add(make(episode=0))
    assert finished(tmp_path / "a", "darkroom", "task") is None
    assert finished(tmp_path / "a", "darkroom", "other") is None
    with TaskWriter(tmp_path / "a", "darkroom", "task", {"maker": "test"}) as task:
        assert task.next_episode == 1
        for episode in range(1, 12):
            task.add(make(episode=episode))
        task.finish()
    write(tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_another_provenance_is_refused(write, tmp_path):
    write(tmp_path)
    with pytest.raises(BadInput, match="was made with maker = 'test', not 'me'"):
        TaskWriter(tmp_path, "darkroom", "task", {"maker": "me"})


def test_two_writers_of_one_task_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(writer_module, "LOCK_SECONDS", 0.1)
    with (
        TaskWriter(tmp_path, "darkroom", "task", {}),
        pytest.raises(BadInput, match="another process is writing this task"),
    ):
        TaskWriter(tmp_path, "darkroom", "task", {})
    TaskWriter(tmp_path, "darkroom", "task", {}).close()


def test_foreign_trajectories_are_refused(make, tmp_path):
    with TaskWriter(tmp_path, "metaworld", "task", {}) as task:
        task.add(make("metaworld", 0))
        with pytest.raises(BadInput, match="metaworld/other is not its own"):
            task.add(make("metaworld", 1, task="other"))
        narrow = make("metaworld", 1)
        narrow.actions = narrow.actions[:, :3].copy()
        with pytest.raises(BadInput, match=r"action_shape \[3\], expected \[4\]"):
            task.add(narrow)
        assert len(task) == 1


# Forks writers of four tasks and kills each at a random moment, until `kills` have died of it; then lets them
# finish. One process imports for all, so that the moments fall into the writing and not into the imports.
KILLER = """
import json, os, random, signal, sys, time
from pathlib import Path
import numpy as np
from lram.datasets.trajectory import Trajectory
from lram.datasets.writer import TaskWriter

root, wanted = Path(sys.argv[1]), int(sys.argv[2])
names = ["one", "two", "three", "four"]

def write(name):
    with TaskWriter(root, "darkroom", name, {"maker": "killed"}) as writer:
        for episode in range(writer.next_episode, 800):
            rng = np.random.default_rng(episode)
            states, rewards = rng.random((30, 2), np.float32), rng.random(30, np.float32)
            actions = rng.integers(0, 5, 30)
            writer.add(Trajectory("darkroom", name, episode, 0, states, actions, rewards, False, True, "s"))
            if episode % 20 == 0:
                writer.flush()
        writer.finish()

def start(name):
    child = os.fork()
    if not child:
        status = 1
        try:
            write(name)
            status = 0
        finally:
            os._exit(status)
    return child

rng = random.Random(0)
kills = temporaries = 0
while kills < wanted:
    running = [start(name) for name in names]
    for child in rng.sample(running, 4):
        time.sleep(rng.uniform(0, 0.02))
        os.kill(child, signal.SIGKILL)
        kills += os.WIFSIGNALED(os.waitpid(child, 0)[1])
    temporaries += len(list(root.rglob(".*.tmp")))
    if len(list(root.rglob("*.hdf5"))) == 3200:
        break
whole = [os.waitpid(child, 0)[1] for child in [start(name) for name in names]]
print(json.dumps({"kills": kills, "temporaries": temporaries, "status": whole}))
"""


def test_killed_writers_lose_nothing(tmp_path, capsys):
    def run(name: str, kills: int) -> dict:
        command = [sys.executable, "-c", KILLER, str(tmp_path / name), str(kills)]
        return json.loads(subprocess.run(command, capture_output=True, check=True, timeout=120).stdout)

    assert run("whole", 0)["status"] == [0] * 4
    killed = run("killed", 50)
    assert killed["status"] == [0] * 4
    assert killed["kills"] >= 50
    with capsys.disabled():
        print(f"\n{killed['kills']} writers killed, {killed['temporaries']} of them within a file")
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    for folder in find_tasks(tmp_path / "killed"):
        assert read_index(folder).meta["complete"]
        result = check_task(folder)
        assert (result.trajectories, result.findings) == (800, [])
