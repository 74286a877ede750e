from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lram.datasets import writer as writer_module
from lram.datasets.index import INDEX, read_index
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


WRITER = """
import sys
import numpy as np
from pathlib import Path
from lram.datasets.trajectory import Trajectory
from lram.datasets.writer import TaskWriter

root, name = Path(sys.argv[1]), sys.argv[2]
print("go", flush=True)
with TaskWriter(root, "darkroom", name, {"maker": "killed"}) as writer:
    for episode in range(writer.next_episode, 150):
        rng = np.random.default_rng(episode)
        states, rewards = rng.random((30, 2), np.float32), rng.random(30, np.float32)
        writer.add(Trajectory("darkroom", name, episode, 0, states, rng.integers(0, 5, 30), rewards, False, True, "s"))
        if episode % 20 == 0:
            writer.flush()
    writer.finish()
"""


def test_a_killed_writer_loses_nothing(tmp_path):
    names = ["one", "two"]

    def start(root: Path) -> list[subprocess.Popen]:
        run = [sys.executable, "-c", WRITER, str(root)]
        return [subprocess.Popen([*run, name], stdout=subprocess.PIPE) for name in names]

    for process in start(tmp_path / "whole"):
        assert process.wait() == 0
    rng = random.Random(0)
    adopted = 0
    for _ in range(10):
        running = start(tmp_path / "killed")
        for process in running:
            process.stdout.readline()
        time.sleep(rng.uniform(0.01, 0.12))
        for process in running:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        for name in names:
            with TaskWriter(tmp_path / "killed", "darkroom", name, {"maker": "killed"}) as task:
                adopted += task.adopted
                files = len(list((tmp_path / "killed" / "darkroom" / name).glob("*/*.hdf5")))
                assert len(task) == files == task.next_episode
    for process in start(tmp_path / "killed"):
        assert process.wait() == 0
    assert adopted > 0
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert read_index(tmp_path / "killed" / "darkroom" / "one").meta["complete"]
    assert (tmp_path / "killed" / "darkroom" / "two" / INDEX).exists()
